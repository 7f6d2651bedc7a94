"""``dagster dev`` as a user starts it, on a stack: its daemon, its sensors, and the slices that these run.

Belongs here: its start, what it knows of its slices, the process of one, its clean end. Not here: what is measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime
from typing import TYPE_CHECKING

import dagster as dg

from benchmarks import harness
from benchmarks.harness import BenchmarkError
from ghsync_dagster.dagster_home import ensure_dagster_home
from ghsync_dagster.defs.cdc.sensors import read_slices
from ghsync_dagster.defs.cdc.supervisor import Phase

if TYPE_CHECKING:
    from collections.abc import Callable

    import psutil

    from benchmarks.stack import Stack
    from ghsync_dagster.defs.cdc.supervisor import Slice

# Looking costs what is measured: Dagster's storage is read.
LOOK_SECONDS = 5.0
_CAME = '"event": "partitions assigned"'
_STARTED = "Started process for run (pid: "


class DagsterDev:
    """``dagster dev`` with short slices, from the way in to the way out.

    Args:
        stack: The servers.
        slice_seconds: How long a slice consumes.
        session_seconds: How long Kafka waits for a silent consumer.
    """

    def __init__(self, stack: Stack, *, slice_seconds: float, session_seconds: float) -> None:
        self._settings = stack.settings
        self._logs = stack.logs
        home = ensure_dagster_home(stack.settings)
        self._environment = stack.environment() | {
            "DAGSTER_HOME": str(home),
            "GHSYNC_CDC_SLICE_SECONDS": f"{slice_seconds:g}",
            "GHSYNC_CDC_SESSION_TIMEOUT_SECONDS": f"{session_seconds:g}",
            "GHSYNC_LOG_FORMAT": "json",
        }
        self._around = contextlib.ExitStack()

    def __enter__(self) -> DagsterDev:
        command = [sys.executable, "-m", "dagster", "dev", "-m", "ghsync_dagster.definitions", "--port", _free_port()]
        with contextlib.ExitStack() as started:
            self._process = started.enter_context(
                harness.watched(command, self._environment, self._logs / "dagster.out", self._logs / "dagster.err")
            )
            started.callback(self._interrupt)
            self._instance = started.enter_context(dg.DagsterInstance.from_config(self._environment["DAGSTER_HOME"]))
            self._around = started.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._around.close()

    def _interrupt(self) -> None:
        """End it as Ctrl-C does, its slices too; what is left is ended by who started it."""
        self._process.tree()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.child.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.child.wait(harness.STOP_SECONDS)

    def processes(self) -> list[psutil.Process]:
        """Return its processes, those of slices too."""
        return self._process.tree()

    def slices(self) -> list[Slice]:
        """Return the slices that live and those that ended."""
        return read_slices(self._instance, self._settings)

    def running(self) -> list[Slice]:
        """Return the slices that run, the oldest first."""
        return sorted((one for one in self.slices() if one.phase is Phase.RUNNING), key=lambda one: one.created)

    def taken_over_ms(self) -> list[int]:
        """Return when consumers were given partitions, in ms since 1970 UTC, by their own log."""
        found = []
        for line in (self._logs / "dagster.err").read_text(encoding="utf-8", errors="replace").splitlines():
            if _CAME in line:
                with contextlib.suppress(json.JSONDecodeError):
                    told = json.loads(line)
                    if told["partitions"]:
                        found.append(round(datetime.fromisoformat(told["timestamp"]).timestamp() * 1000))
        return sorted(found)

    def kill(self, one: Slice) -> int:
        """Kill -9 the process of a slice; return when, in ms since 1970 UTC.

        Raises:
            BenchmarkError: It is not known, or has ended.
        """
        pid = self._pid(one.run_id)
        try:
            at = time.time_ns() // 1_000_000
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            raise BenchmarkError(f"The process of slice {one.run_id} ended before it was killed.") from None
        return at

    def _pid(self, run_id: str) -> int:
        for entry in self._instance.all_logs(run_id, of_type=dg.DagsterEventType.ENGINE_EVENT):
            words = entry.dagster_event.message if entry.dagster_event else None
            if words and words.startswith(_STARTED):
                return int(words.removeprefix(_STARTED).rstrip(")."))
        raise BenchmarkError(f"The process of slice {run_id} is not known: Dagster's words for its start have changed.")

    def wait(self, look: Callable[[], object], what: str, seconds: float) -> None:
        """Wait until something is there.

        Raises:
            BenchmarkError: It took too long, or ``dagster dev`` ended.
        """
        deadline = time.monotonic() + seconds
        while not look():
            code = self._process.child.poll()
            if code is not None or time.monotonic() > deadline:
                why = f"`dagster dev` ended with {code}" if code is not None else f"Not within {seconds:.0f} s"
                raise BenchmarkError(f"{why}: {what}. Its last lines:\n{harness.tail(self._logs / 'dagster.err')}")
            time.sleep(LOOK_SECONDS)


def _free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])
