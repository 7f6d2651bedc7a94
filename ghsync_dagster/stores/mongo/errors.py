"""Translation of MongoDB's errors to ours.

Belongs here: which of the driver's errors are transient, which are refusals, and their messages. Not here: operations.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from pymongo.errors import (
    ConfigurationError,
    ConnectionFailure,
    ExecutionTimeout,
    InvalidURI,
    OperationFailure,
    PyMongoError,
    WriteConcernError,
)

from ghsync_dagster.domain.errors import ConfigError, RefusedError, UnavailableError
from ghsync_dagster.logging import redact

if TYPE_CHECKING:
    from collections.abc import Iterator

DUPLICATE_KEY: Final = 11000
_REFUSED: Final = frozenset({11, 13, 18, 31, 33, 8000})
"""UserNotFound, Unauthorized, AuthenticationFailed, RoleNotFound, and hosted services' own code for the same."""
PASSING: Final = frozenset(
    {6, 7, 24, 43, 50, 64, 89, 91, 112, 133, 134, 189, 202, 262, 9001, 10107, 11600, 11602, 13435, 13436, 14031}
)
"""Codes of transient errors: hosts, elections, write conflicts, lost cursors, time limits, a full disk."""


@contextmanager
def mongo_errors(what: str) -> Iterator[None]:
    """Translate the driver's failures to ours, credentials masked.

    Raises:
        UnavailableError: The server can't be looked up or reached, is electing, timed out, or did not confirm a write.
        RefusedError: The server answered and refused.
        ConfigError: The URI is malformed.
    """
    try:
        yield
    except (InvalidURI, ConfigurationError) as error:
        # The driver's own message may hold a part of the password.
        if is_unresolved(error):
            raise UnavailableError(
                f"{what}: the host of MONGODB_URI can't be looked up in DNS ({type(error.__cause__).__name__}).",
                way_out="Check the host's name and the network. mongodb+srv:// needs the DNS record "
                "_mongodb._tcp.HOST; where there is none, write mongodb://HOST:PORT.",
            ) from None
        raise ConfigError(
            f"MONGODB_URI is malformed ({type(error).__name__}).",
            way_out="Correct MONGODB_URI; percent-encode special characters of user and password.",
        ) from None
    except (ConnectionFailure, ExecutionTimeout) as error:
        raise UnavailableError(
            f"{what}: MongoDB can't be reached ({type(error).__name__}: {_first_line(error)}).",
            way_out="Check that the server is up (ghsync status), that MONGODB_URI names it, and that its TLS options "
            "(tls, tlsCAFile) fit the server; then run again.",
        ) from None
    except OperationFailure as error:
        labels = ("TransientTransactionError", "RetryableWriteError")
        passes = not PASSING.isdisjoint(_codes(error)) or any(error.has_error_label(label) for label in labels)
        if passes or _is_unconfirmed(error):
            raise UnavailableError(
                f"{what}: MongoDB could not finish now ({_first_line(error)}).", way_out="Run again."
            ) from None
        hint = (
            "Check the user, password and roles behind MONGODB_URI."
            if error.code in _REFUSED
            else "Read the server's answer above; the operation is in docs/explain/precedence.md or "
            "docs/explain/changes.md."
        )
        raise RefusedError(
            f"{what}: MongoDB refused (code {error.code}): {_first_line(error)}.", way_out=hint
        ) from None
    except PyMongoError as error:
        raise UnavailableError(f"{what}: {_first_line(error)}.", way_out="Run again.") from None


def is_unresolved(error: Exception) -> bool:
    """Return whether DNS has no record for a host of mongodb+srv://, which may be transient."""
    # The driver raises ConfigurationError for this too; the error of DNS is its cause.
    return type(error.__cause__).__module__.partition(".")[0] == "dns"


def _codes(error: OperationFailure) -> set[int | None]:
    """Return the error's code, and those of the single writes of a bulk."""
    return {error.code, *(item["code"] for item in (error.details or {}).get("writeErrors", ()))}


def _is_unconfirmed(error: OperationFailure) -> bool:
    """Return whether a majority did not confirm a write: a failover may undo it."""
    return isinstance(error, WriteConcernError) or bool((error.details or {}).get("writeConcernErrors"))


def _first_line(error: Exception) -> str:
    text = redact(str(error)).splitlines()[0] if str(error) else type(error).__name__
    return re.split(r", full error: |, Timeout: ", text)[0][:300].rstrip(".")
