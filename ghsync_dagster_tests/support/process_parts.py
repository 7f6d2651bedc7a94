"""Looks at the processes of a test, each of which may end between two looks."""

from __future__ import annotations

import signal
import subprocess
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from pathlib import Path

_LOOK_SECONDS = 0.05


def words(process: psutil.Process) -> list[str]:
    """Return the command line of a process, empty where it has ended."""
    try:
        return list(process.cmdline())
    except psutil.NoSuchProcess:
        return []


def is_java(process: psutil.Process) -> bool:
    """Return whether a process is at work and Java's."""
    try:
        return bool(process.name() == "java")
    except psutil.NoSuchProcess:
        return False


def children_of(pid: int) -> list[psutil.Process]:
    """Return all processes below one, none where it has ended."""
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def kill_family(pid: int) -> None:
    """Kill a process and all below it."""
    for each in children_of(pid):
        with suppress(psutil.NoSuchProcess):
            each.kill()
    with suppress(psutil.NoSuchProcess):
        psutil.Process(pid).kill()


def left_by_a_signal(
    command: Sequence[str],
    folder: Path,
    is_at_work: Callable[[Collection[psutil.Process]], bool],
    seconds: float,
    after: float = 10,
) -> tuple[int, str, list[list[str]]]:
    """Start a command, end it by SIGTERM once it is at work, and look for what outlives it.

    Args:
        command: The command and its arguments.
        folder: Where it runs.
        is_at_work: Whether the processes seen below it show that it is at work.
        seconds: How long it may take until then, and again until its end.
        after: How many seconds the processes below it may go on after its end.

    Returns:
        Its exit code, its output, and the command lines of all below it that still run.
    """
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as running:
        deadline = time.monotonic() + seconds
        family: dict[int, psutil.Process] = {}
        try:
            while not is_at_work(family.values()):
                assert running.poll() is None, "it ended before it was at work"
                assert time.monotonic() < deadline, "it was never at work"
                family |= {each.pid: each for each in children_of(running.pid)}
                time.sleep(_LOOK_SECONDS)
            running.send_signal(signal.SIGTERM)
            output, _ = running.communicate(timeout=seconds)
        except BaseException:
            # Else the end of the with statement waits for it.
            kill_family(running.pid)
            raise
    _, alive = psutil.wait_procs(list(family.values()), timeout=after)
    return running.returncode, output, [words(process) for process in alive]
