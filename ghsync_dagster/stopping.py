"""How a process ends: by SIGTERM, Ctrl-C and a closed terminal, and past a library that does not let it.

Belongs here: the handlers for these signals, and what the outermost layers (the command line, a run of Dagster) do
where a library hangs. Not here: what else ends, and how.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import select
import signal
import sys
import threading
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Final, NoReturn

from ghsync_dagster.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterator


SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
FROZEN_SECONDS: Final = 180.0
"""How long no line of Python may run in a consumer's process: its session has ended long before."""

log = get_logger("stopping")
_left_behind: list[str] = []


def leave_behind(what: str) -> None:
    """Log that a library's call does not return, and go on without its thread, which must be a daemon.

    Args:
        what: The call and its consequence, in words.
    """
    _left_behind.append(what)
    log.error("library hangs; leaving it behind", what=what)


def end_past_what_hangs(code: int) -> None:
    """End the process at once with an exit code, where anything was left behind; else do nothing.

    For the outermost layer of a process, once all else is done: nothing of Python's own end runs.
    """
    if _left_behind:
        sys.stderr.write(f"ended with exit code {code}, though {'; '.join(_left_behind)}\n")
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


@contextmanager
def killed_when_frozen(seconds: float = FROZEN_SECONDS) -> Iterator[None]:
    """Have the system kill this process by SIGALRM where no line of Python runs for so long.

    A library that hangs while it holds the interpreter's lock stops every thread of Python's, so that no code of ours
    can end the process. The stacks of all threads go to standard error then. Where SIGALRM has a use, nothing is done.
    """
    if signal.getsignal(signal.SIGALRM) != signal.SIG_DFL or sys.__stderr__ is None:
        yield
        return
    ended = threading.Event()

    def postpone() -> None:
        while not ended.is_set():
            signal.setitimer(signal.ITIMER_REAL, seconds)
            ended.wait(seconds / 4)

    faulthandler.register(signal.SIGALRM, file=sys.__stderr__, all_threads=True, chain=True)
    thread = threading.Thread(target=postpone, name="frozen", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.unregister(signal.SIGALRM)


def is_unread(stream: IO[str]) -> bool:
    """Return whether the stream leads into a pipe that nobody reads any more, as of ``ghsync status | head -1``."""
    with suppress(OSError, ValueError):
        poll = select.poll()
        # That the reader is gone is told unasked.
        poll.register(stream, 0)
        return bool(poll.poll(0))
    return False


def exit_on_signals() -> None:
    """Have SIGTERM and a closed terminal end this process as Ctrl-C does, with everything closed: by ``SystemExit``.

    One that is ignored, as nohup has it of SIGHUP, stays so. The exit code is 128 and the signal's number.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _exit)


def _exit(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


@contextmanager
def stop_on_signals(stop: threading.Event, *, again_ends: bool = False) -> Iterator[list[int]]:
    """Have SIGTERM, SIGINT and SIGHUP set an event, in place of what they did before; in another thread change nothing.

    One that is ignored, as nohup has it of SIGHUP, stays so.

    Args:
        stop: What is set.
        again_ends: Whether a second signal of the same kind does what it did before.

    Yields:
        The signals that have come, in their order.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {number: handler for number in SIGNALS if (handler := signal.getsignal(number)) != signal.SIG_IGN}

    def ask(number: int, _frame: object) -> None:
        came.append(number)
        # In a thread of its own: setting takes a lock, which the code that is interrupted here may hold.
        threading.Thread(target=stop.set, name="stop").start()
        if again_ends:
            signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Have these signals wait until what is done here is over; the last one that came does then what it did before."""
    with stop_on_signals(threading.Event()) as came:
        yield
    if came:
        signal.raise_signal(came[-1])
