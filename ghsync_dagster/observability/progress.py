"""Progress of what takes long: a log line now and then, so that nobody takes a wait for a hang.

Belongs here: that a line comes, and when. Not here: what the work is.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from ghsync_dagster.observability.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EVERY_SECONDS: Final = 8.0


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
    log, done, began = get_logger("progress"), threading.Event(), time.monotonic()

    def run() -> None:
        while not done.wait(every):
            log.info(f"still {what}", seconds=round(time.monotonic() - began), **known())

    thread = threading.Thread(target=run, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
