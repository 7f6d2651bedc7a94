"""The one retry policy: transient faults are tried again, with growing waits and jitter; permanent ones never.

Not here: which fault is transient, which the error's own class says.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final, TypeVar

import stamina

from ghsync_dagster.domain.errors import LeaseHeldError, TransientError
from ghsync_dagster.observability.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")
log = get_logger("retry")

_FIRST_SECONDS: Final = 0.5
_LONGEST_SECONDS: Final = 30.0
_LONGEST_OF_A_STREAM_SECONDS: Final = 5.0
"""Whoever goes on without end is to notice soon that the fault is over, since changes wait."""


def _is_worth_it(error: Exception) -> bool:
    # Who waited for a lease in vain has waited as long as the settings say.
    return isinstance(error, TransientError) and not isinstance(error, LeaseHeldError)


def retrying(what: str, action: Callable[[], T], *, attempts: int) -> T:
    """Call ``action`` until it succeeds.

    Args:
        what: Names the action in the log.
        action: Safe to repeat.
        attempts: Tries in all.

    Raises:
        GhsyncError: The first permanent error, or the last transient one.
    """
    for attempt in stamina.retry_context(
        on=_is_worth_it, attempts=attempts, timeout=None, wait_initial=_FIRST_SECONDS, wait_max=_LONGEST_SECONDS
    ):
        with attempt:
            try:
                return action()
            except TransientError as error:
                log.warning("a transient fault", what=what, attempt=attempt.num, of=attempts, reason=error.message)
                raise
    raise AssertionError("stamina either returns or raises")


def waits() -> Iterator[float]:
    """Yield how many seconds to wait before each further try, without end: for who must do other things meanwhile."""
    longest = _FIRST_SECONDS
    while True:
        # Half of it is jitter, so that many who lost one server do not come back at once.
        yield longest * random.uniform(0.5, 1)  # noqa: S311  no secret
        longest = min(2 * longest, _LONGEST_OF_A_STREAM_SECONDS)
