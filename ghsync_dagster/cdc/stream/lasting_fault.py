"""Logging of a fault that lasts: at its start, at growing intervals, and at its end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ghsync_dagster.logging import get_logger

if TYPE_CHECKING:
    from ghsync_dagster.domain.errors import GhsyncError

log = get_logger("cdc")


class LastingFault:
    """One fault, and when it was last logged.

    Args:
        what: What fails, such as ``batch write``.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._since: float | None = None
        self._logged_at = 0.0

    def failed(self, error: GhsyncError) -> None:
        """Log the fault, unless that was done recently."""
        now = time.monotonic()
        if self._since is None:
            self._since, self._logged_at = now, float("-inf")
        if now - self._logged_at >= min(5.0 + (now - self._since) / 2, 300.0):
            self._logged_at = now
            log.warning(f"{self._what} failed; retrying", seconds=round(now - self._since, 1), reason=error.message)

    def recovered(self) -> None:
        """Log that the fault is over, if there was one."""
        if self._since is not None:
            log.info(f"{self._what} recovered", seconds=round(time.monotonic() - self._since, 1))
            self._since = None
