"""How SIGTERM, Ctrl-C and a closed terminal reach a loop that goes on until an event is set, or wait for what must end.

Belongs here: the one handler for these signals. Not here: what ends, how, or with which exit code.
"""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator


SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


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
