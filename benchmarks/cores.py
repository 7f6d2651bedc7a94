"""Who kept the cores busy while something was measured: on a full machine latency tells of the machine.

Belongs here: CPU time by group of processes, sampled. Not here: memory, or one contender's run (``harness``).
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from benchmarks.harness import Usage, busy_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import psutil

SAMPLE_SECONDS = 1.0
OTHERS = "others"


class Cores:
    """Samples groups of processes from the way in to the way out.

    Args:
        groups: A name to what returns its processes, those that are new too.
    """

    def __init__(self, groups: Mapping[str, Callable[[], Sequence[psutil.Process]]]) -> None:
        self._groups = groups
        self._usage = {name: Usage() for name in groups}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cores", daemon=True)
        self.shares: dict[str, float] = {}
        """Cores that each group kept busy on average, ``OTHERS`` too; there after the way out."""

    def __enter__(self) -> Cores:
        self._sample()
        self._began, self._busy, self._spent = time.perf_counter(), busy_seconds(), self._seconds()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()
        seconds = time.perf_counter() - self._began
        spent = {name: after - self._spent[name] for name, after in self._seconds().items()}
        # The last moments of a process that has ended are missing from its group.
        spent[OTHERS] = max(busy_seconds() - self._busy - sum(spent.values()), 0.0)
        self.shares = {name: round(each / seconds, 2) for name, each in spent.items()}

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        for name, processes in self._groups.items():
            self._usage[name].take(processes())

    def _seconds(self) -> dict[str, float]:
        return {name: usage.cpu_seconds for name, usage in self._usage.items()}
