"""Processes of a benchmark that tell by lines of JSON what they do, and when, by the machine's one clock.

Belongs here: starting, hearing and ending them. Not here: what they do or what is made of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from benchmarks import harness
from benchmarks.harness import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

LOOK_SECONDS = 0.1


def now_ms() -> int:
    """Return the time in ms since 1970 UTC."""
    return time.time_ns() // 1_000_000


def say(line: dict[str, Any]) -> None:
    """Tell a line; for the process itself."""
    sys.stdout.write(f"{json.dumps(line)}\n")
    sys.stdout.flush()


class Teller:
    """A process that tells what it does by lines of JSON, with a thread that reads them.

    Args:
        name: Names it in files and errors.
        module: What it runs, with ``python -m``.
        arguments: Of the module.
        environment: Its whole environment.
        logs: Folder that gets its standard error.
    """

    def __init__(
        self, name: str, module: str, arguments: Sequence[str], environment: Mapping[str, str], logs: Path
    ) -> None:
        self.name = name
        self.lines: list[dict[str, Any]] = []
        """What it told, but for the two kinds of lines below."""
        self.records = 0
        """The sum of the ``records`` of these lines."""
        self.ready = False
        """Whether it told ``ready``."""
        self.report: dict[str, Any] | None = None
        """Its ``report``, the last that it tells."""
        self.ended = threading.Event()
        self._errors = logs / f"{name.replace(' ', '-')}.err"
        self._command = [sys.executable, "-m", module, *arguments]
        self._environment = dict(environment)

    def __enter__(self) -> Teller:
        with self._errors.open("wb") as errors:
            self._child = subprocess.Popen(
                self._command,
                env=self._environment,
                cwd=harness.PROJECT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        self._thread = threading.Thread(target=self._read, name=f"reader of {self.name}", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        harness.Watched(self._child).stop()
        self._thread.join(harness.STOP_SECONDS)

    def _read(self) -> None:
        try:
            for told in self._child.stdout or ():
                self._take(json.loads(told))
        finally:
            self.ended.set()

    def _take(self, line: dict[str, Any]) -> None:
        if "report" in line:
            self.report = line["report"]
        elif "records" in line:
            self.lines.append(line)
            self.records += line["records"]
        else:
            self.ready = True

    @property
    def pid(self) -> int:
        """Its process."""
        return self._child.pid

    def tail(self) -> str:
        """Return the last lines of its standard error."""
        return harness.tail(self._errors)

    def wait(self, done: Callable[[], bool], what: str, seconds: float) -> None:
        """Wait until something is done.

        Raises:
            BenchmarkError: It took too long, or the process ended.
        """
        deadline = time.monotonic() + seconds
        while not done():
            ended = self.ended.wait(LOOK_SECONDS)
            if done():
                return
            if ended or time.monotonic() > deadline:
                why = "ended early" if ended else f"did not {what} within {seconds:.0f} s"
                raise BenchmarkError(f"The {self.name} {why}. Its last lines:\n{self.tail()}")

    def end(self, code: int) -> None:
        """Ask it to end, and see that it does, with this exit code.

        Raises:
            BenchmarkError: It does not, or with another one.
        """
        if self._child.poll() is None and self.report is None:
            self._child.terminate()
        try:
            found = self._child.wait(harness.STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise BenchmarkError(f"The {self.name} did not end within {harness.STOP_SECONDS} s.") from None
        self._thread.join(harness.STOP_SECONDS)
        if found != code:
            raise BenchmarkError(f"The {self.name} exited with {found}. Its last lines:\n{self.tail()}")


def pause_until(began_ms: int, seconds: float, teller: Teller) -> None:
    """Wait until so many seconds after a time, unless a process ends before."""
    left = began_ms / 1000 + seconds - time.time()
    if left > 0 and teller.ended.wait(left):
        raise BenchmarkError(f"The {teller.name} ended early. Its last lines:\n{teller.tail()}")
