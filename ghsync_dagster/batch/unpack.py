"""The content of an input file as bytes of UTF-8: unpacked, decoded, and cut into lines or JSON values.

Belongs here: streams of bytes, and what makes one damaged. Not here: which files there are, nor what a line says.
All of it is streamed: what is kept in memory is a block, or the longest line or value.
"""

from __future__ import annotations

import bz2
import codecs
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import IO, Any, Final

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
_STRUCTURE: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+("?)|[][{}]', re.DOTALL)
_GAP: Final = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\n,]*")
_STRING: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_WORD: Final = re.compile(rb'\0++|[^ \t\r\n,"{}\[\]\0]++')
"""A number, true, false, null, or what is no JSON: it ends where something else begins."""
_BETWEEN: Final = b" \t\r\n,[]\xef\xbb\xbf"
_LONGEST_VALUE: Final = 16 * BLOCK
"""Of an array: what does not end would otherwise be looked at again with every block. A longer word is cut."""


_ZSTD_ERRORS: Final = {
    "Truncated": "ends early",
    "Unknown frame": "goes on with something else, such as zeros, which zstd does not skip",
}


class DamagedError(Exception):
    """The bytes are not whole: the packed data, the encoding or the JSON array ends early or is broken."""


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


def values_of(parts: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield the values of JSON arrays, or those that follow each other, each with the number of its first line.

    What is no object is a value too where its end is certain: a string, a number, an array in an array, a bracket too
    many, a row of NUL bytes.

    Raises:
        DamagedError: The last value or array does not end.
    """
    text, line, in_array = b"", 1, False
    # None: there is no more.
    for part in chain(parts, [None]):
        text += part or b""
        at = 0
        while True:
            gap = _GAP.match(text, at)
            assert gap is not None  # noqa: S101  it matches nothing too
            line += text.count(b"\n", at, gap.end())
            at = gap.end()
            head = text[at : at + 1]
            if (head == b"[" and not in_array) or (head == b"]" and in_array):
                in_array = not in_array
                at += 1
                continue
            is_all = part is None or len(text) - at > _LONGEST_VALUE
            if not head or (end := _value_end(text, at, is_all=is_all)) is None:
                break
            yield line, text[at:end]
            line += text.count(b"\n", at, end)
            at = end
        text = text[at:]
        if len(text) > _LONGEST_VALUE:
            break
    if text or in_array:
        raise DamagedError(f"its JSON does not end: what is open at line {line} is not closed")


def _value_end(text: bytes, start: int, *, is_all: bool) -> int | None:
    """Return where the value that begins at a place ends; None where that is not to be seen yet."""
    head = text[start : start + 1]
    if head in b"{[":
        return _object_end(text, start)
    if head in b"]}":
        return start + 1
    found = (_STRING if head == b'"' else _WORD).match(text, start)
    is_open = found is None or (head != b'"' and found.end() == len(text) and not is_all)
    return None if found is None or is_open else found.end()


def weight_of(part: bytes) -> int:
    """Return how many bytes could not stand between values: all that is read has as many as its values."""
    return len(part.translate(None, _BETWEEN))


def _object_end(text: bytes, start: int) -> int | None:
    depth = 0
    for token in _STRUCTURE.finditer(text, start):
        word = token.group()
        if word[:1] == b'"':
            if not token.group(1):
                return None
        elif word in b"{[":
            depth += 1
        else:
            depth -= 1
            if depth == 0:
                return token.end()
    return None
