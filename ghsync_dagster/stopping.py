"""How a process ends: by SIGTERM, Ctrl-C or a closed terminal, also while a library hangs.

Belongs here: the handlers for these signals, and what the command line and a run of Dagster do if a library hangs.
Not here: how anything else ends.
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
"""How long a consumer's process may run no line of Python: its Kafka session has timed out long before."""

log = get_logger("stopping")
_abandoned: list[str] = []


def abandon(what: str) -> None:
    """Log that a library's call does not return, and go on without its thread, which must be a daemon.

    Args:
        what: The call and its consequence, for the log.
    """
    _abandoned.append(what)
    log.error("library hangs; abandoning its thread", what=what)


def exit_if_abandoned(code: int) -> None:
    """End the process at once with an exit code if a call was abandoned; else do nothing.

    For the outermost layer of a process, once all else is done: Python's own shutdown is skipped.
    """
    if _abandoned:
        sys.stderr.write(f"ended with exit code {code}, though {'; '.join(_abandoned)}\n")
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


@contextmanager
def killed_when_frozen(seconds: float = FROZEN_SECONDS) -> Iterator[None]:
    """Have the system kill this process by SIGALRM if no line of Python runs for so many seconds.

    A library that hangs while it holds the interpreter's lock stops every Python thread, so that no code of ours can
    end the process. The stacks of all threads then go to standard error. If SIGALRM is in use, nothing is done.
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
    """Return whether the stream leads into a pipe without a reader, as in ``ghsync status | head -1``."""
    with suppress(OSError, ValueError):
        poll = select.poll()
        # POLLERR, which says that the reader is gone, is always reported.
        poll.register(stream, 0)
        return bool(poll.poll(0))
    return False


def exit_on_signals() -> None:
    """Have SIGTERM and a closed terminal end this process by ``SystemExit``, with everything closed.

    An ignored signal stays ignored, such as SIGHUP under nohup. The exit code is 128 and the signal's number.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _exit)


def _exit(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


@contextmanager
def stop_on_signals(stop: threading.Event, *, second_ends: bool = False) -> Iterator[list[int]]:
    """Have SIGTERM, SIGINT and SIGHUP set an event instead of what they did before.

    An ignored signal stays ignored, such as SIGHUP under nohup. Outside the main thread nothing is changed.

    Args:
        stop: The event.
        second_ends: Whether a second signal of the same kind has its former effect.

    Yields:
        The received signals, in their order.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: handler for number in SIGNALS if (handler := signal.getsignal(number)) != signal.SIG_IGN}

    def handle(number: int, _frame: object) -> None:
        received.append(number)
        # In a thread of its own: setting takes a lock, which the interrupted code may hold.
        threading.Thread(target=stop.set, name="stop").start()
        if second_ends:
            signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold these signals back until the block is over; then the last one takes its usual effect."""
    with stop_on_signals(threading.Event()) as received:
        yield
    if received:
        signal.raise_signal(received[-1])
