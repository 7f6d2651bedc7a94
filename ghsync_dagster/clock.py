"""The clock of deadlines, such as the end of a lease.

Not here: times of day and durations, for which ``time`` is enough.
"""

from __future__ import annotations

import time
from typing import Final

_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def now() -> float:
    """Return seconds of a clock that never goes back and, if the system has such a clock, counts suspended time."""
    return time.clock_gettime(_CLOCK)
