"""How SIGTERM, Ctrl-C and a closed terminal reach a loop that goes on until an event is set, or wait for what must end.

Belongs here: the handlers for these signals. Not here: what ends, and how.
"""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator


SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


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
