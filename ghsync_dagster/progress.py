"""Progress of long work: a line every few seconds, so that nobody takes a wait for a hang.

Belongs here: when a line is written. Not here: what the work is.
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


@contextmanager
def log_progress(
    what: str, known: Callable[[], dict[str, object]] = dict, *, every: float = EVERY_SECONDS
) -> Iterator[None]:
    """Log every few seconds that ``what`` is still going on.

    Args:
        what: The work, such as ``starting Spark``.
        known: Returns further fields of the line.
        every: Seconds before the first line, and between two lines.
    """
    log, began = get_logger("progress"), time.monotonic()
    with repeating(lambda: log.info(f"still {what}", seconds=round(time.monotonic() - began), **known()), every):
        yield


@contextmanager
def report_progress(progress: Callable[[str], None], what: str) -> Iterator[None]:
    """Report every few seconds to a person that ``what`` is still going on.

    Args:
        progress: Gets the line of text.
        what: The work, such as ``connect: starting``.
    """
    began = time.monotonic()
    with repeating(lambda: progress(f"{what}: {time.monotonic() - began:.0f} s so far"), EVERY_SECONDS):
        yield


@contextmanager
def repeating(
    action: Callable[[], object], every: float, *, join_seconds: float | None = None
) -> Iterator[threading.Event]:
    """Call ``action`` every few seconds in a thread of its own, until the block ends or the yielded event is set.

    Args:
        action: What is called.
        every: Seconds before the first call, and between two calls.
        join_seconds: How long the end of the block waits for a call under way; None for as long as it takes.
    """
    done = threading.Event()

    def run() -> None:
        while not done.wait(every):
            action()

    thread = threading.Thread(target=run, name="progress", daemon=True)
    thread.start()
    try:
        yield done
    finally:
        done.set()
        thread.join(join_seconds)
