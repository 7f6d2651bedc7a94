"""The one retry policy: transient faults are retried, with growing waits and jitter; permanent ones never.

Not here: which fault is transient. The error's own class says so, or the caller of another's library.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final, TypeVar

import stamina

from ghsync_dagster.domain.errors import GhsyncError, LeaseHeldError, TransientError
from ghsync_dagster.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")
log = get_logger("retry")

_FIRST_SECONDS: Final = 0.5
_LONGEST_SECONDS: Final = 30.0
_LONGEST_OF_A_STREAM_SECONDS: Final = 5.0
"""A stream retries without end, and has to notice soon that the fault is over, since changes wait."""


def is_transient(error: Exception) -> bool:
    """Return whether an error of ours is worth another try."""
    # The wait for a lease has its own limit, GHSYNC_LEASE_WAIT_SECONDS.
    return isinstance(error, TransientError) and not isinstance(error, LeaseHeldError)


def retrying(
    what: str, action: Callable[[], T], *, attempts: int, retry_on: Callable[[Exception], bool | float] = is_transient
) -> T:
    """Call ``action`` until it succeeds.

    Args:
        what: Names the action in the log.
        action: Safe to repeat.
        attempts: Tries in all.
        retry_on: Returns whether an error is worth another try, or the seconds to wait before it.

    Raises:
        Exception: What ``action`` raised: the first that is not worth another try, or the last of all tries.
    """
    for attempt in stamina.retry_context(
        on=retry_on, attempts=attempts, timeout=None, wait_initial=_FIRST_SECONDS, wait_max=_LONGEST_SECONDS
    ):
        with attempt:
            try:
                return action()
            except Exception as error:
                if retry_on(error) is not False:
                    log.warning(
                        "transient fault; retrying", what=what, attempt=attempt.num, of=attempts, reason=_reason(error)
                    )
                raise
    raise AssertionError("stamina either returns or raises")


def _reason(error: Exception) -> str:
    return error.message if isinstance(error, GhsyncError) else f"{type(error).__name__}: {error}"


def waits() -> Iterator[float]:
    """Yield without end how many seconds to wait before the next try, for callers with other work meanwhile."""
    longest = _FIRST_SECONDS
    while True:
        # Half of it is jitter, so that many clients of one server do not come back at once.
        yield longest * random.uniform(0.5, 1)  # noqa: S311  no secret
        longest = min(2 * longest, _LONGEST_OF_A_STREAM_SECONDS)
