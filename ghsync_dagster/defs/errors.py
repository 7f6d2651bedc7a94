"""How ghsync's errors reach Dagster: one clear message, no retry by Dagster, since the flows have retried already.

Not here: what an error means, or when it is tried again.
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
    """Checks that do not block did not pass, and the run that evaluated them is to fail for it."""


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
    """Return what a class of errors says of a run: ``infrastructure``, ``permanent``, or else ``unforeseen``."""
    if error is None:
        return "unforeseen"
    return "infrastructure" if issubclass(error, TransientError) else "permanent"


def own_class(error: SerializableErrorInfo) -> type[GhsyncError] | None:
    """Return the class of an error that is ghsync's own, or None."""
    found = getattr(errors, error.cls_name or "", None)
    return found if isinstance(found, type) and issubclass(found, GhsyncError) else None


def root_cause(error: SerializableErrorInfo | None) -> SerializableErrorInfo | None:
    """Return the error that a step's error comes from: ghsync's own, whatever caused it, or else the first one."""
    while error is not None and error.cause is not None and own_class(error) is None:
        error = error.cause
    return error
