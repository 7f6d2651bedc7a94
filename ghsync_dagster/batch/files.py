"""One input file before it is read: the scan of its head, how it is opened, and its errors.

Belongs here: whether a file is of a kind that can be read. Not here: which files there are (``batch.search``), what the
kinds are (``batch.heads``), nor the content beyond the head, which the workers read (``batch.decide``).
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Final

from ghsync_dagster.batch.heads import has_lines
from ghsync_dagster.batch.unpack import DamagedError, as_utf8, is_utf16, packing_of, unpacked
from ghsync_dagster.batch.versions import FileState  # noqa: TC001  msgspec looks it up
from ghsync_dagster.domain.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_FAULTS_SHOWN: Final = 5
_HEAD: Final = 1 << 16
_LONG_HEAD: Final = 1 << 21
_ACTOR: Final = re.compile(rb'"actor"\s*:')


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file that has been scanned.

    Attributes:
        state: The state of its content, from before the scan.
        packing: ``gzip``, ``bzip2``, ``zstd``, or None for a plain file.
        is_utf16: Whether its text is UTF-16, by its byte order mark.
        has_lines: Whether each event is a line; else the file is a JSON array, or objects one after the other.
    """

    state: FileState
    packing: str | None = None
    is_utf16: bool = False
    has_lines: bool = True

    @property
    def path(self) -> str:
        """Absolute path."""
        return self.state.path

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self.state.size


def scan_file(state: FileState) -> InputFile | None:
    """Scan the head of a file: its packing, its encoding, and whether its events are lines.

    Args:
        state: The file, as it was found.

    Returns:
        The file; None if it has no content.

    Raises:
        InputError: The file is damaged from its start on, or of a kind that can't be read.
    """
    path, size = state.path, state.size
    head = head_of(path, _HEAD)
    packing = packing_of(head)
    try:
        text, utf16 = _text_of(head, packing, is_whole=len(head) == size)
        # A longer line, or a larger packed block, needs a longer head.
        if len(head) == _HEAD and (b"\n" not in text if packing is None else not text):
            head = head_of(path, _LONG_HEAD)
            text, utf16 = _text_of(head, packing, is_whole=len(head) == size)
    except DamagedError as error:
        raise damaged(path, str(error)) from None
    if not text and len(head) < size:
        raise damaged(path, f"its {packing} data holds nothing in {len(head)} bytes")
    # Packed data may be cut in any case.
    is_whole = packing is None and len(head) == size
    return InputFile(state, packing, utf16, has_lines(path, packing, text, is_whole=is_whole)) if text else None


def names_actors(file: InputFile) -> bool:
    """Return whether the head of a file has the key ``actor``, as each event has."""
    head = head_of(file.path, _LONG_HEAD)
    # If the data ends early, reading the file reports it.
    text, _ = _text_of(head, file.packing, is_whole=False)
    return _ACTOR.search(text) is not None


def open_file(path: str, buffering: int = -1) -> IO[bytes]:
    """Open a regular file for reading; never block on another kind, such as a pipe without a writer.

    Raises:
        OSError: It can't be opened, or is no regular file.
    """
    return open(path, "rb", buffering, opener=_open_regular)


def _open_regular(path: str, flags: int) -> int:
    number = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "no regular file")
    return number


def head_of(path: str, size: int) -> bytes:
    """Return the first bytes of a file."""
    try:
        # Unbuffered: there may be very many files.
        with open_file(path, buffering=0) as raw:
            return raw.read(size) or b""
    except OSError as error:
        raise unreadable(path, error) from None


def _text_of(head: bytes, packing: str | None, *, is_whole: bool) -> tuple[bytes, bool]:
    """Return a head as UTF-8, and whether it was UTF-16."""
    text = _drained(unpacked(io.BytesIO(head), packing), is_whole=is_whole) if packing else head
    utf16 = is_utf16(text)
    return _drained(as_utf8([text]), is_whole=is_whole) if utf16 else text, utf16


def _drained(parts: Iterator[bytes], *, is_whole: bool) -> bytes:
    """Return the content of a file's head; that it ends early is no damage if the file continues."""
    taken: list[bytes] = []
    try:
        for part in parts:
            taken.append(part)  # noqa: PERF402  what came before the end counts
    except DamagedError as error:
        if is_whole or (not taken and "early" not in str(error)):
            raise
    return b"".join(taken)


def combine_errors(errors: Sequence[InputError]) -> InputError:
    """Return one error for all files that can't be read, the first of them with their ways out."""
    if len(errors) == 1:
        return errors[0]
    first = errors[:_FAULTS_SHOWN]
    more = [f"And {len(errors) - len(first)} more."] if len(errors) > len(first) else []
    messages = " ".join([*(error.message for error in first), *more])
    ways = dict.fromkeys(error.way_out for error in first)
    return InputError(f"{len(errors)} files can't be read: {messages}", way_out=" ".join(ways))


def unreadable(path: str, error: OSError) -> InputError:
    """Return the error of a file that the operating system can't read."""
    return InputError(
        f"{path} can't be read ({error.strerror or error}).",
        way_out="Check the file's permissions and its disk; executors of a cluster need the same path.",
    )


def damaged(path: str, problem: str) -> InputError:
    """Return the error of a file that is not whole."""
    return InputError(
        f"{path} is damaged: {problem}.",
        way_out="Get the file again (remove it first; ghsync fetch verifies what it gets), or remove it.",
    )
