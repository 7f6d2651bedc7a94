"""The one error hierarchy. Belongs here: what a failure means to its reader. Not here: messages of libraries."""

from __future__ import annotations

import re
from functools import partial
from typing import Final

WAY_OUT: Final = " Way out: "
"""The separator of an error's message and its way out in one text."""


_BYTE: Final = re.compile("[\udc80-\udcff]")
"""Python's character for a byte of a file name that is not UTF-8."""


def shown(text: str) -> str:
    r"""Return text that any encoder accepts: a byte of a file name that is not UTF-8 becomes ``\xff``."""
    plain = _BYTE.sub(lambda byte: f"\\x{ord(byte.group()) - 0xDC00:02x}", text)
    return plain.encode("utf-8", "backslashreplace").decode()


class GhsyncError(Exception):
    """A failure that ghsync understands. Its texts can be shown and logged, whatever the file names in them.

    Args:
        message: What went wrong, and where.
        way_out: What the reader should do, in one line.
    """

    def __init__(self, message: str, *, way_out: str) -> None:
        self.message = shown(message)
        self.way_out = shown(way_out)
        super().__init__(self.message, self.way_out)

    def __str__(self) -> str:
        return f"{self.message}{WAY_OUT}{self.way_out}"

    def __reduce__(self) -> tuple[object, ...]:
        return partial(type(self), way_out=self.way_out), (self.message,)


class PermanentError(GhsyncError):
    """Trying again cannot help: configuration, data or credentials must change first."""


class TransientError(GhsyncError):
    """Trying again can help: a server is unavailable, busy or electing."""


class ConfigError(PermanentError):
    """A setting is missing, malformed or contradicts what is there."""


class InputError(PermanentError):
    """An input path or file can't be read as JSON lines of GitHub events."""


class UndecodableError(PermanentError):
    """A record of the change topic that can't be applied. It alone becomes a dead letter.

    Args:
        kind: A slug for counts and filters: a `kind` of `domain.envelope.Refusal`.
        message: What is wrong, and where in the record. Never the whole record.
        way_out: What the reader should do, in one line.
    """

    def __init__(self, kind: str, message: str, *, way_out: str) -> None:
        super().__init__(message, way_out=way_out)
        self.kind = kind

    def __reduce__(self) -> tuple[object, ...]:
        return partial(type(self), way_out=self.way_out), (self.kind, self.message)


class RefusedError(PermanentError):
    """A server answered and refused: credentials, rights, or a collection set up in another way."""


class UnavailableError(TransientError):
    """A server can't be reached or can't answer now."""


class LeaseHeldError(TransientError):
    """Another load holds the collection."""


class LeaseLostError(TransientError):
    """This load's lease expired and another load may hold it: it must stop writing at once."""
