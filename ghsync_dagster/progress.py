"""Progress of what takes long: a log line now and then, so that nobody takes a wait for a hang.

Belongs here: that a line comes, and when. Not here: what the work is.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from ghsync_dagster.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EVERY_SECONDS: Final = 5.0


def _nothing() -> dict[str, object]:
    return {}


@contextmanager
def telling(
    what: str, known: Callable[[], dict[str, object]] = _nothing, *, every: float = EVERY_SECONDS
) -> Iterator[None]:
    """Log every few seconds that ``what`` is still going on.

    Args:
        what: What goes on, such as ``starting Spark``.
        known: Gives what else is known by then, for the same line.
        every: Seconds between two lines; the first comes after as many.
    """
    log, began = get_logger("progress"), time.monotonic()

    def tell() -> None:
        log.info(f"still {what}", seconds=round(time.monotonic() - began), **known())

    with repeating(tell, every):
        yield


@contextmanager
def saying(progress: Callable[[str], None], what: str) -> Iterator[None]:
    """Say every few seconds that ``what`` is still going on, where a person is told what goes on.

    Args:
        progress: Gets the line of text.
        what: What goes on, such as ``connect: starting``.
    """
    began = time.monotonic()
    with repeating(lambda: progress(f"{what}: {time.monotonic() - began:.0f} s so far"), EVERY_SECONDS):
        yield


@contextmanager
def repeating(
    tell: Callable[[], None], every: float, *, join_seconds: float | None = None
) -> Iterator[threading.Event]:
    """Tell every few seconds, in a thread of its own, until the event that is yielded is set, or the end.

    Args:
        tell: Tells it.
        every: Seconds between two times; the first comes after as many.
        join_seconds: How long the end waits for one that is being told; None for as long as it takes.
    """
    done = threading.Event()

    def run() -> None:
        while not done.wait(every):
            tell()

    thread = threading.Thread(target=run, name="progress", daemon=True)
    thread.start()
    try:
        yield done
    finally:
        done.set()
        thread.join(join_seconds)
