"""How SIGTERM and Ctrl-C reach a loop that goes on until an event is set.

Belongs here: the one handler for both signals. Not here: what ends, how, or with which exit code.
"""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def stop_on_signals(stop: threading.Event, *, again_ends: bool = False) -> Iterator[list[int]]:
    """Have SIGTERM and SIGINT set an event, in place of what they did before; nothing changes in another thread.

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
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

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
