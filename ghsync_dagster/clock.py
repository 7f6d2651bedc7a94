"""The clock by which this process judges what it may still do.

Belongs here: that clock. Not here: times of day, and how long something took, for which ``time`` does.
"""

from __future__ import annotations

import time
from typing import Final

_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def now() -> float:
    """Return seconds of a clock that never goes back and, where the system has one, counts sleep."""
    return time.clock_gettime(_CLOCK)
