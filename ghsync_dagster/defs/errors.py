"""Turns ghsync's errors into Dagster failures with one message. Dagster does not retry, as the flows have retried.

Not here: what an error means, or when it is retried.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import dagster as dg

from ghsync_dagster.domain import errors
from ghsync_dagster.domain.errors import GhsyncError, TransientError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dagster_shared.error import SerializableErrorInfo


class ChecksFailedError(Exception):
    """Non-blocking checks did not pass, so the run that evaluated them fails."""


@contextmanager
def as_failure() -> Iterator[None]:
    """Turn a ghsync error into a Dagster failure with its way out as metadata."""
    try:
        yield
    except GhsyncError as error:
        name = type(error).__name__
        raise dg.Failure(
            description=f"{name}: {error}",
            metadata={"way_out": error.way_out, "kind": kind_of(type(error)), "error": name},
            allow_retries=False,
        ) from None


def kind_of(error: type[GhsyncError] | None) -> str:
    """Return the kind of a run's failure by its class of error: ``infrastructure``, ``permanent`` or ``unforeseen``."""
    if error is None:
        return "unforeseen"
    return "infrastructure" if issubclass(error, TransientError) else "permanent"


def own_class(error: SerializableErrorInfo) -> type[GhsyncError] | None:
    """Return the class of an error that is ghsync's own, or None."""
    found = getattr(errors, error.cls_name or "", None)
    return found if isinstance(found, type) and issubclass(found, GhsyncError) else None


def root_cause(error: SerializableErrorInfo | None) -> SerializableErrorInfo | None:
    """Return the cause of a step's error: the outermost error of ghsync's own, or else the innermost error."""
    while error is not None and error.cause is not None and own_class(error) is None:
        error = error.cause
    return error
