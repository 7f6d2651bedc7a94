"""The content of an input file as bytes of UTF-8: unpacked, decoded, and cut into lines or JSON values.

Belongs here: streams of bytes, and what makes one damaged. Not here: which files there are, nor what a line says: an
event is known by its keys only, where a bad value ends.
All of it is streamed: what is kept in memory is a block, or the longest line or value.
"""

from __future__ import annotations

import bz2
import codecs
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import chain
from json import JSONDecodeError, JSONDecoder
from typing import IO, Any, Final

from ghsync_dagster.domain.event import REQUIRED_FIELDS

GZIP: Final = "gzip"
BZIP2: Final = "bzip2"
ZSTD: Final = "zstd"
PACKINGS: Final = (
    (b"\x1f\x8b", GZIP),
    (b"BZh", BZIP2),
    (b"\x28\xb5\x2f\xfd", ZSTD),
    # Frames to be skipped, as pzstd writes one first.
    *((bytes([byte, 0x2A, 0x4D, 0x18]), ZSTD) for byte in range(0x50, 0x60)),
)
"""How a packed file begins, and the name of its packing."""

BLOCK: Final = 1 << 20
_PACKED_BLOCK: Final = 1 << 16
"""Unpacked this may be a thousand times as long."""
_UTF16_MARKS: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_UTF32_MARKS: Final = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
_GAP: Final = re.compile("(?:\xef\xbb\xbf)?[ \t\r\n,]*")
_WORD: Final = re.compile(r'\0++|[^ \t\r\n,"{}\[\]\0]++')
"""A number, true, false, null, or what is no JSON: it ends where something else begins."""
_SPACE: Final = re.compile("[ \t]*")
_NO_TEXT: Final = re.compile(r"[ \t\r\n]*(:|\Z)|[^ \t\r\n,\]]")
"""What follows a string that is no value, or may be none: a key without its object, or where a quote is missing."""
_BETWEEN: Final = b" \t\r\n,[]\xef\xbb\xbf"
_LONGEST_VALUE: Final = 16 * BLOCK
"""Of an array: what does not end would otherwise be looked at again with every block. A longer word is cut."""
_CUT_SHORT: Final = re.compile(r"[ \t\r\n]*(?:-|\.|[eE][+-]?|t(?:ru?)?|f(?:a(?:ls?)?)?|n(?:ul?)?|u[0-9a-fA-F]{0,4})?\Z")
"""What stands between an error and the end of a text that may be good as far as it goes."""
_PLACE: Final = r"\n[ \t]{0,%d}(?:[\]\[},][\]\[}, \t]*)?(?P<place>\{)"
"""An object that begins a line which is not indented deeper than so many spaces."""
_OBJECT: Final = (
    r'|(?P<actor>"actor"[ \t\r\n]*)?(?P<nested>:[ \t\r\n]*)?(?P<start>\{)(?P<event>[ \t\r\n]*"(?:id"\s*:\s*"[0-9]'
    r'|type"\s*:\s*"\w+Event"|created_at"\s*:\s*"[0-9]|(?:actor|repo|payload)"\s*:\s*\{|public"\s*:))?'
)
"""An object elsewhere, and whether it begins as GitHub's events do."""
_decode: Final = JSONDecoder(parse_int=str, parse_float=str).raw_decode

_ZSTD_ERRORS: Final = {
    "Truncated": "ends early",
    "Unknown frame": "goes on with something else, such as zeros, which zstd does not skip",
}


class DamagedError(Exception):
    """The bytes are not whole: the packed data, the encoding or the JSON array ends early or is broken."""


class TooLongError(Exception):
    """A value of an array is longer than what is kept in memory."""


def packing_of(head: bytes) -> str | None:
    """Return the packing of a file that begins so; None for a plain one."""
    return next((name for magic, name in PACKINGS if head.startswith(magic)), None)


def is_utf16(head: bytes) -> bool:
    """Tell whether text says by its byte order mark that it is UTF-16."""
    return head.startswith(_UTF16_MARKS) and not head.startswith(_UTF32_MARKS)


def unpacked(raw: IO[bytes], packing: str | None) -> Iterator[bytes]:
    """Yield the content of a whole file.

    Raises:
        DamagedError: The packed data ends early or is broken.
    """
    if packing == GZIP:
        # 31: a gzip header and its check sum, which zlib sees to.
        yield from _members(raw, lambda: zlib.decompressobj(31), packing)
    elif packing == BZIP2:
        yield from _members(raw, bz2.BZ2Decompressor, packing)
    elif packing == ZSTD:
        yield from _frames(raw)
    else:
        while part := raw.read(BLOCK):
            yield part


def _members(raw: IO[bytes], new: Callable[[], Any], packing: str) -> Iterator[bytes]:
    """Unpack one member after the other; zeros after a member are padding, as gunzip takes them."""
    data = raw.read(_PACKED_BLOCK)
    while data:
        decoder = new()
        while not decoder.eof:
            if not data:
                raise DamagedError(f"its {packing} data ends early")
            try:
                part = decoder.decompress(data)
            except (zlib.error, OSError) as error:
                raise DamagedError(f"its {packing} data is broken ({error})") from None
            if part:
                yield part
            data = b"" if decoder.eof else raw.read(_PACKED_BLOCK)
        data = decoder.unused_data.lstrip(b"\0")
        while not data and (block := raw.read(_PACKED_BLOCK)):
            data = block.lstrip(b"\0")


class _NotClosed:
    """A file that Arrow does not close at the end of its own stream."""

    closed = False

    def __init__(self, raw: IO[bytes]) -> None:
        self.read = raw.read

    def close(self) -> None:
        """Leave it open."""


def _frames(raw: IO[bytes]) -> Iterator[bytes]:
    import pyarrow as pa

    stream = pa.CompressedInputStream(pa.PythonFile(_NotClosed(raw), mode="r"), "zstd")
    try:
        # In small parts: what came before an error counts.
        while part := stream.read(_PACKED_BLOCK):
            yield part
    except OSError as error:
        if error.errno is not None:
            raise
        words = next((words for sign, words in _ZSTD_ERRORS.items() if sign in str(error)), "is broken")
        raise DamagedError(f"its zstd data {words} ({error})") from None


def as_utf8(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Yield UTF-16 text, whose mark tells the byte order, as UTF-8. A lone surrogate makes its line invalid only.

    Raises:
        DamagedError: It ends within a character.
    """
    decoder = codecs.getincrementaldecoder("utf-16")("surrogatepass")
    try:
        for part in parts:
            yield decoder.decode(part).encode("utf-8", "surrogatepass")
        yield decoder.decode(b"", final=True).encode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        raise DamagedError("its UTF-16 text ends within a character") from None


def range_of_lines(raw: IO[bytes], start: int, end: int) -> Iterator[bytes]:
    """Yield the bytes of a plain file's lines that begin in ``[start, end)``: ranges side by side give each once."""
    at = start and _after_line_end(raw, start - 1)
    raw.seek(at)
    if at >= end:
        return
    last = b""
    while at < end and (part := raw.read(min(BLOCK, end - at))):
        at += len(part)
        last = part[-1:]
        yield part
    while last != b"\n" and (part := raw.read(_PACKED_BLOCK)):
        head, found, _ = part.partition(b"\n")
        last = found
        yield head + found


def _after_line_end(raw: IO[bytes], at: int) -> int:
    raw.seek(at)
    while part := raw.read(_PACKED_BLOCK):
        if (found := part.find(b"\n")) >= 0:
            return at + found + 1
        at += len(part)
    return at


def lines_of(parts: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Yield the lines, many at a time, without their line ends."""
    open_line: list[bytes] = []
    for part in parts:
        head, found, tail = part.rpartition(b"\n")
        if found:
            yield b"".join([*open_line, head]).split(b"\n")
            open_line = []
        if tail:
            open_line.append(tail)
    if open_line:
        yield [b"".join(open_line)]


def values_of(parts: Iterable[bytes], *, is_line: bool = False) -> Iterator[tuple[int, bytes]]:
    """Yield the values of JSON arrays, or those that follow each other, each with the number of its first line.

    What is no object is a value too: a string, a number, an array in an array, a bracket too many, a row of NUL bytes.
    A value that is no JSON ends where the next one begins: at an object on a line that is not indented deeper, or at
    one that is an event or begins as one. So does a value with a whole event on such a line: its end is another's.

    Args:
        parts: The text, in any blocks.
        is_line: Whether it is one line, in one block: then what does not end is a last value of any length.

    Raises:
        DamagedError: The last value or array does not end.
        TooLongError: A value does not end within the longest one.
    """
    text, line, indent, in_array = "", 1, 0, False
    # None: there is no more.
    for part in chain(parts, [None]):
        is_last = part is None or is_line
        # A character for each byte, whatever the bytes are.
        text += (part or b"").decode("latin-1")
        at = 0
        while True:
            is_all = is_last or len(text) - at > _LONGEST_VALUE
            gap = _GAP.match(text, at)
            assert gap is not None  # noqa: S101  it matches nothing too
            if gap.end() == len(text) and not is_all:
                break
            line, indent = _after(text, at, gap.end(), line, indent)
            at = gap.end()
            head = text[at : at + 1]
            if (head == "[" and not in_array) or (head == "]" and in_array):
                in_array = not in_array
                at += 1
                continue
            end = _value_end(text, at, indent, is_all=is_all, is_last=is_last, is_line=is_line) if head else None
            if end is None:
                break
            if end < 0:
                end = _last_end(text, at, in_array=in_array)
            yield line, text[at:end].encode("latin-1")
            line, indent = _after(text, at, end, line, indent)
            at = end
            if at > max(_PACKED_BLOCK, len(text) >> 3):
                # What stands before an error is looked at with it.
                text, at = text[at:], 0
        text = text[at:]
        if len(text) > _LONGEST_VALUE and not is_last:
            raise TooLongError(f"what begins at line {line} does not end within {_LONGEST_VALUE >> 20} MiB")
    if is_line and in_array:
        yield line, b"["
    elif text or in_array:
        raise DamagedError(f"its JSON does not end: what is open at line {line} is not closed")


def weight_of(part: bytes) -> int:
    """Return how many bytes could not stand between values: all that is read has as many as its values."""
    return len(part.translate(None, _BETWEEN))


def events_within(value: bytes) -> int:
    """Return how many objects within a JSON value have the keys of an event; none where it is no JSON."""
    found = 0

    def seen(value: dict[str, Any]) -> dict[str, Any]:
        nonlocal found
        found += value.keys() >= REQUIRED_FIELDS
        return value

    try:
        whole = JSONDecoder(object_hook=seen, parse_int=str).decode(value.decode("latin-1"))
    except (ValueError, RecursionError):
        return 0
    return found - (isinstance(whole, dict) and whole.keys() >= REQUIRED_FIELDS)


def _after(text: str, start: int, end: int, line: int, indent: int) -> tuple[int, int]:
    """Return the line on which a part of a text ends, and how far that is indented."""
    ends = text.count("\n", start, end)
    if not ends:
        return line, indent
    at = text.rindex("\n", start, end) + 1
    space = _SPACE.match(text, at, end)
    return line + ends, space.end() - at if space else 0


def _value_end(text: str, at: int, indent: int, *, is_all: bool, is_last: bool, is_line: bool) -> int | None:
    """Return where the value that begins at a place ends.

    None where that is not to be seen yet, and -1 where all the rest is no JSON.
    """
    head = text[at]
    if head in "]}":
        return at + 1
    if head not in '{["':
        word = _WORD.match(text, at)
        assert word is not None  # noqa: S101  all else is a head or a gap
        return word.end() if word.end() < len(text) or is_all else None
    end, is_open = _json_end(text, at)
    if head == '"' and end is not None:
        after = _NO_TEXT.match(text, end)
        if after is None or (is_last and after[1] == ""):
            return end
        end, is_open = None, after[1] == ""
    is_open = is_open and not is_line
    # With a whole event at the place of a value it has the end of another value, or none.
    places = _starts(indent).finditer(text, at, end or len(text)) if end or is_open else ()
    if not (end or is_open) or any(_is_event(text, found.start("place")) for found in places):
        start = _next_start(text, at, indent, is_last=is_last)
        if start is not None:
            return _trimmed(text, at, start)
    return end if end is not None or is_open or not is_last else -1


def _json_end(text: str, at: int) -> tuple[int | None, bool]:
    """Return where a JSON value ends; None where it does not, and whether it may with more text."""
    try:
        return _decode(text, at)[1], False
    except JSONDecodeError as error:
        return None, error.msg.startswith("Unterminated") or _CUT_SHORT.match(text, error.pos) is not None
    except RecursionError:
        return None, False


def _is_event(text: str, at: int) -> bool:
    try:
        value, _ = _decode(text, at)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and value.keys() >= REQUIRED_FIELDS


@lru_cache(maxsize=64)
def _starts(indent: int, *, anywhere: bool = False) -> re.Pattern[str]:
    """Return what finds the objects at the place of a value that is indented so, or others too."""
    return re.compile(_PLACE % min(indent, 1_000) + _OBJECT * anywhere, re.ASCII)


def _next_start(text: str, at: int, indent: int, *, is_last: bool) -> int | None:
    """Return where the value after one that is no JSON begins; None where there is none yet."""
    actors = 0
    for found in _starts(indent, anywhere=True).finditer(text, at):
        if found["place"]:
            return found.start("place")
        start = found.start("start")
        actors += found["actor"] is not None
        if actors > 1:
            # The start of its event is no JSON either.
            return found.start()
        if start == at:
            continue
        if (found["event"] and found["nested"] is None) or _is_event(text, start):
            return start
        if not is_last and _json_end(text, start)[1] and not _starts(indent).search(text, start):
            # It may be an event.
            return None
    return None


def _trimmed(text: str, at: int, end: int) -> int:
    """Return where a part of a text ends without what stands between values."""
    part = text[at:end].rstrip(" \t\r\n,")
    if part.endswith("[") and (before := part[:-1].rstrip(" \t\r\n,")).endswith("]"):
        part = before[:-1].rstrip(" \t\r\n,")
    return at + max(len(part), 1)


def _last_end(text: str, at: int, *, in_array: bool) -> int:
    """Return where the last value ends, if it is no JSON: before the end of its array."""
    part = text[at:].rstrip(" \t\r\n,\0")
    return at + len(part.removesuffix("]") if in_array else part)
