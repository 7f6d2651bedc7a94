"""The content of an input file as bytes of UTF-8: unpacked, decoded, and cut into lines or JSON values.

Belongs here: streams of bytes, and what makes one damaged. Not here: which files there are, and the content of a line:
only an event's keys count, to find the end of a bad value.
Everything is streamed: memory holds a block, or the longest line or value.
"""

from __future__ import annotations

import bz2
import codecs
import re
import zlib
from functools import lru_cache
from itertools import chain
from json import JSONDecodeError, JSONDecoder
from typing import IO, TYPE_CHECKING, Any, Final

from ghsync_dagster.domain.event import REQUIRED_FIELDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

GZIP: Final = "gzip"
BZIP2: Final = "bzip2"
ZSTD: Final = "zstd"
PACKINGS: Final = (
    (b"\x1f\x8b", GZIP),
    (b"BZh", BZIP2),
    (b"\x28\xb5\x2f\xfd", ZSTD),
    # Skippable frames, as pzstd writes one first.
    *((bytes([byte, 0x2A, 0x4D, 0x18]), ZSTD) for byte in range(0x50, 0x60)),
)
"""The first bytes of a packed file, and the name of its packing."""

BLOCK: Final = 1 << 20
_PACKED_BLOCK: Final = 1 << 16
"""Unpacked it may be a thousand times as long."""
_UTF16_MARKS: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_UTF32_MARKS: Final = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
_GAP: Final = re.compile("(?:\xef\xbb\xbf)?[ \t\r\n,]*")
_WORD: Final = re.compile(r'\0++|[^ \t\r\n,"{}\[\]\0]++')
"""A number, true, false, null, or text that is no JSON: it ends where something else begins."""
_SPACE: Final = re.compile("[ \t]*")
_NO_TEXT: Final = re.compile(r"[ \t\r\n]*(:|\Z)|[^ \t\r\n,\]]")
"""What follows a string that is no value, or may be none: a key without its object, or a missing quote."""
_BETWEEN: Final = b" \t\r\n,[]\xef\xbb\xbf"
_LONGEST_VALUE: Final = 16 * BLOCK
"""The limit of an array's value, as an open one is scanned again with more blocks. A longer word is cut."""
_CUT_SHORT: Final = re.compile(r"[ \t\r\n]*(?:-|\.|[eE][+-]?|t(?:ru?)?|f(?:a(?:ls?)?)?|n(?:ul?)?|u[0-9a-fA-F]{0,4})?\Z")
"""What is between an error and the end of a text that may be valid up to there."""
_PLACE: Final = r"\n[ \t]{0,%d}(?:[\]\[},][\]\[}, \t]*)?(?P<place>\{)"
"""An object that begins a line which is not indented deeper than so many spaces."""
_OBJECT: Final = (
    r'|(?P<actor>"actor"[ \t\r\n]*)?(?P<nested>:[ \t\r\n]*)?(?P<start>\{)(?P<event>[ \t\r\n]*"(?:id"\s*:\s*"[0-9]'
    r'|type"\s*:\s*"\w+Event"|created_at"\s*:\s*"[0-9]|(?:actor|repo|payload)"\s*:\s*(?=\{)|public"\s*:))?'
)
"""An object elsewhere, and whether it begins as GitHub's events do."""
_EVENT_BEGINS: Final = re.compile(_OBJECT[1:], re.ASCII)
_decode: Final = JSONDecoder(parse_int=str, parse_float=str).raw_decode
_OPENED: Final = re.compile(r'[ \t\r\n]*+"(?:[^"\\\0-\x1f]++|\\.)*+(?:\\|"[ \t\r\n]*)?\Z')
"""A string that the end of a text cuts, or a key before its colon."""
_TOKEN: Final = re.compile(
    r'[ \t\r\n]*+(?:(?P<string>"(?:[^"\\\0-\x1f]++|\\["\\/bfnrtu])*+")(?P<colon>[ \t\r\n]*+:)?'
    r"|(?P<begin>[{\[])|(?P<end>[}\]])|(?P<comma>,)"
    r"|(?P<word>-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?|true|false|null|NaN|-?Infinity))"
)
_LISTED: Final = re.compile(r"[ \t\r\n]*[,\]]")
_GOES_ON: Final = re.compile(r"[ \t\r]*(?:[\]}]|,[ \t\r,]*[^ \t\r,{])")
"""What follows an object inside another one, but no object alongside others on a line."""
_NESTED: Final = re.compile(r"(?:[:\[]|(?:^|[^}\] \t\r,])[ \t\r]*,)[ \t\r,]*\Z")
"""What precedes an object inside another one; in a row of objects the end of one precedes the next."""
_NEAR: Final = 100
"""How many characters before a position are searched."""
_BROKEN: Final = -1
_OPEN: Final = -2

_ZSTD_ERRORS: Final = {
    "Truncated": "ends early",
    "Unknown frame": "goes on with something else, such as zeros, which zstd does not skip",
}


class DamagedError(Exception):
    """The bytes are incomplete: the packed data, the encoding or the JSON array ends early or is broken."""


class TooLongError(Exception):
    """A value of an array is longer than the limit for memory."""


def packing_of(head: bytes) -> str | None:
    """Return the packing of a file with this head; None for a plain one."""
    return next((name for magic, name in PACKINGS if head.startswith(magic)), None)


def is_utf16(head: bytes) -> bool:
    """Return whether the byte order mark of a text is that of UTF-16."""
    return head.startswith(_UTF16_MARKS) and not head.startswith(_UTF32_MARKS)


def unpacked(raw: IO[bytes], packing: str | None) -> Iterator[bytes]:
    """Yield the content of a whole file.

    Raises:
        DamagedError: The packed data ends early or is broken.
    """
    if packing == GZIP:
        # 31: with a gzip header and its checksum, which zlib verifies.
        yield from _members(raw, lambda: zlib.decompressobj(31), packing)
    elif packing == BZIP2:
        yield from _members(raw, bz2.BZ2Decompressor, packing)
    elif packing == ZSTD:
        yield from _frames(raw)
    else:
        while part := raw.read(BLOCK):
            yield part


def _members(raw: IO[bytes], new: Callable[[], Any], packing: str) -> Iterator[bytes]:
    """Unpack one member after the other; zeros after a member are padding, as for gunzip."""
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
        # In small parts: the content before an error counts.
        while part := stream.read(_PACKED_BLOCK):
            yield part
    except OSError as error:
        if error.errno is not None:
            raise
        words = next((words for sign, words in _ZSTD_ERRORS.items() if sign in str(error)), "is broken")
        raise DamagedError(f"its zstd data {words} ({error})") from None


def as_utf8(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Yield UTF-16 text with a byte order mark as UTF-8. A lone surrogate makes only its own line invalid.

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
    """Yield the bytes of a plain file's lines that begin in ``[start, end)``: adjacent ranges yield each line once."""
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
    one that is an event or begins as one. So does a value with a whole event on such a line: its end is another's,
    unless it is an object that lists events. On a line that begins with no array, an object is none of the next ones if
    more of another value follows it, or if it stands with others in a list.

    Args:
        parts: The text, in any blocks.
        is_line: Whether it is one line, in one block: then what does not end is a last value of any length.

    Raises:
        DamagedError: The last value or array does not end.
        TooLongError: A value does not end within the longest one.
    """
    text, line, indent, in_array = "", 1, 0, False
    waiting: list[bytes] = []
    size = needed = 0
    # None: there is no more.
    for part in chain(parts, [None]):
        is_last = part is None or is_line
        waiting.append(part or b"")
        size += len(waiting[-1])
        if size < needed and not is_last:
            # An open value is scanned again only when it is twice as long, however short the blocks are.
            continue
        # A character for each byte, whatever the bytes are.
        text += b"".join(waiting).decode("latin-1")
        waiting = []
        found = _Values(text, is_last=is_last, is_line=is_line)
        at = 0
        while True:
            is_all = is_last or size - at > _LONGEST_VALUE
            gap = _GAP.match(text, at)
            assert gap is not None  # noqa: S101  it matches nothing too
            if gap.end() == size and not is_all:
                break
            line, indent = _after(text, at, gap.end(), line, indent)
            at = gap.end()
            head = text[at : at + 1]
            if (head == "[" and not in_array) or (head == "]" and in_array):
                in_array = not in_array
                at += 1
                continue
            end = found.end_of(at, indent, is_all=is_all) if head else None
            if end is None:
                break
            if end < 0:
                end = _last_end(text, at, in_array=in_array)
            yield line, text[at:end].encode("latin-1")
            line, indent = _after(text, at, end, line, indent)
            at = end
        text = text[at:]
        size = len(text)
        needed = min(2 * size, _LONGEST_VALUE)
        if size > _LONGEST_VALUE and not is_last:
            raise TooLongError(f"what begins at line {line} does not end within {_LONGEST_VALUE >> 20} MiB")
    if is_line and in_array:
        yield line, b"["
    elif text or in_array:
        raise DamagedError(f"its JSON does not end: what is open at line {line} is not closed")


def weight_of(part: bytes) -> int:
    """Return how many bytes can't be between values: the whole text has as many as its values together."""
    return len(part.translate(None, _BETWEEN))


def events_within(value: bytes, *, is_line: bool = False) -> int:
    """Return how many objects within a JSON value have the keys of an event; 0 if it is no JSON.

    Args:
        value: The value.
        is_line: Whether it is a whole line: then 0 for an event too, since its end is certain.
    """
    found = 0

    def seen(value: dict[str, Any]) -> dict[str, Any]:
        nonlocal found
        found += value.keys() >= REQUIRED_FIELDS
        return value

    try:
        whole = JSONDecoder(object_hook=seen, parse_int=str).decode(value.decode("latin-1"))
    except (ValueError, RecursionError):
        return 0
    is_event = isinstance(whole, dict) and whole.keys() >= REQUIRED_FIELDS
    return 0 if is_event and is_line else found - is_event


def goes_on(text: str, error: JSONDecodeError) -> bool:
    """Return whether an invalid JSON text may become valid with more text after it."""
    return error.msg.startswith("Unterminated") or _CUT_SHORT.match(text, error.pos) is not None


def _after(text: str, start: int, end: int, line: int, indent: int) -> tuple[int, int]:
    """Return the line on which a part of a text ends, and the indentation of that line."""
    ends = text.count("\n", start, end)
    if not ends:
        return line, indent
    at = text.rindex("\n", start, end) + 1
    space = _SPACE.match(text, at, end)
    return line + ends, space.end() - at if space else 0


class _Values:
    """Where the values of a text end. Whatever is in it, the work grows with its length only.

    Attributes:
        steps: How many tokens and objects have been scanned, besides those of valid JSON.
    """

    def __init__(self, text: str, *, is_last: bool, is_line: bool) -> None:
        self.steps = 0
        self._text = text
        self._is_last = is_last
        self._is_line = is_line
        # Where an array's value ends is no more certain on a line than in a file.
        gap = _GAP.match(text)
        self._is_row = is_line and gap is not None and not text.startswith("[", gap.end())
        self._ends: dict[int, int] = {}
        self._events: set[int] = set()
        self._event_places: dict[int, int] = {}
        self._first_event = 0
        self._slow_until = 0

    def end_of(self, at: int, indent: int, *, is_all: bool) -> int | None:
        """Return the end of the value that begins at a position.

        None if that is not known yet, and -1 if all the rest is no JSON.
        """
        text = self._text
        head = text[at]
        if head in "]}":
            return at + 1
        if head not in '{["':
            word = _WORD.match(text, at)
            assert word is not None  # noqa: S101  all else is a head or a gap
            return word.end() if word.end() < len(text) or is_all else None
        end = self._json_end(at)
        if head == '"' and end >= 0:
            after = _NO_TEXT.match(text, end)
            if after is None or (self._is_last and after[1] == ""):
                return end
            end = _OPEN if after[1] == "" else _BROKEN
        if end == _OPEN and self._is_line:
            end = _BROKEN
        if end == _BROKEN or self._has_others(at, indent, end):
            if end == _OPEN:
                # So are those that begin in it and are cut as well.
                self._walk(at)
            start = self._next_start(at, indent)
            if start is not None:
                return _trimmed(text, at, start)
        return end if end >= 0 else None if end == _OPEN or not self._is_last else -1

    def _json_end(self, at: int) -> int:
        """Return the end of a JSON value; else ``_BROKEN``, or ``_OPEN`` if it is valid up to the end of the text."""
        known = self._ends.get(at)
        if known is not None:
            return known
        if at >= self._slow_until:
            try:
                return _decode(self._text, at)[1]
            except JSONDecodeError as error:
                # The error counts all lines before it.
                self._slow_until = at + 1 + (at >> 6)
                if goes_on(self._text, error):
                    return _OPEN
            except RecursionError:
                pass
        return self._walk(at)

    def _walk(self, at: int) -> int:
        """Return the same by tokens, and store it for each inner object and array: their ends are needed next."""
        text, ends = self._text, self._ends
        opened: list[tuple[int, set[str]]] = []
        needs, known = "value", 0
        while token := _TOKEN.match(text, at):
            self.steps += 1
            kind = token.lastgroup
            is_value = needs in ("value", "value or end")
            if kind == "colon" and needs in ("key", "key or end"):
                opened[-1][1].add(token["string"][1:-1])
                needs = "value"
            elif kind in ("string", "word") and is_value:
                needs = "more"
            elif kind == "begin" and is_value:
                start = token.start("begin")
                known = ends.get(start, 0)
                if known < 0:
                    break
                if known:
                    needs = "more"
                else:
                    opened.append((start, set()))
                    needs = "key or end" if token["begin"] == "{" else "value or end"
                at = known or token.end()
                continue
            elif kind == "comma" and needs == "more" and opened:
                needs = "key" if text[opened[-1][0]] == "{" else "value"
            elif (
                kind == "end"
                and needs not in ("key", "value")
                and opened
                and text[opened[-1][0]] + token["end"] in ("{}", "[]")
            ):
                start, keys = opened.pop()
                ends[start] = token.end()
                if keys >= REQUIRED_FIELDS:
                    self._events.add(start)
                needs = "more"
            else:
                break
            at = token.end()
            if not opened and needs == "more":
                return at
        if known >= 0:
            is_cut = _CUT_SHORT.match(text, at) or (needs != "more" and _OPENED.match(text, at))
            known = _OPEN if is_cut else _BROKEN
        for start, _ in opened:
            ends[start] = known
        return known

    def _is_event(self, at: int) -> bool:
        """Return whether an object is a whole event."""
        if at not in self._ends:
            self._walk(at)
        return at in self._events

    def _has_others(self, at: int, indent: int, end: int) -> bool:
        """Return whether a value holds a whole event where a value stands: it has the end of another one, or none."""
        text, limit = self._text, end if end >= 0 else len(self._text)
        if _starts(indent).search(text, at, limit) is None:
            return False
        place = self._event_places.get(indent, 0)
        if not at < place < limit:
            places = (found.start("place") for found in _starts(indent).finditer(text, at, limit))
            place = next(filter(self._is_event, places), 0)
            if not place:
                return False
            self._event_places[indent] = place
        return not self._lists_events(at, indent)

    def _lists_events(self, at: int, indent: int) -> bool:
        """Return whether an object with events in it, which is none itself, lists them: it is no broken one."""
        text = self._text
        if not at < self._first_event:
            places = _starts(indent, anywhere=True).finditer(text, at)
            starts = (max(found.start("place"), found.start("start")) for found in places)
            self._first_event = next((start for start in starts if start > at and self._is_event(start)), at)
            if self._first_event == at:
                return False
        first = self._first_event
        begins = _EVENT_BEGINS.match(text, at)
        return (
            text[max(at, first - _NEAR) : first].rstrip().endswith("[")
            and _LISTED.match(text, self._ends[first]) is not None
            and begins is not None
            and begins["event"] is None
        )

    def _next_start(self, at: int, indent: int) -> int | None:
        """Return where the value after one that is no JSON begins; None where there is none yet."""
        text, actors, after = self._text, 0, at + 1
        has_place: bool | None = None
        for found in _starts(indent, anywhere=True).finditer(text, at):
            self.steps += 1
            if found["place"]:
                return found.start("place")
            start = found.start("start")
            actors += found["actor"] is not None
            if actors > 1 and not self._is_row:
                # The start of its event is no JSON either.
                return found.start()
            if start < after:
                continue
            if (found["event"] and found["nested"] is None) or self._is_event(start):
                after = self._end_within(start) if self._is_row else start
                if after <= start:
                    return start
            elif not self._is_last and self._json_end(start) == _OPEN:
                if has_place is None:
                    has_place = _starts(indent).search(text, start) is not None
                if not has_place:
                    # It may be an event.
                    return None
        return None

    def _end_within(self, start: int) -> int:
        """Return where an object of a line, and those that follow it, end inside another value; 0 if alongside it."""
        text, end, has_commas = self._text, self._json_end(start), False
        is_nested = _NESTED.search(text[max(0, start - _NEAR) : start]) is not None
        if end < 0:
            return start + is_nested
        while True:
            gap = _GAP.match(text, end)
            assert gap is not None  # noqa: S101  it matches nothing too
            following = self._json_end(gap.end()) if text.startswith("{", gap.end()) else None
            has_commas = has_commas or (following is not None and "," in gap[0])
            if following is None or following < 0:
                break
            end = following
        if _GOES_ON.match(text, end) or (is_nested and has_commas):
            return end if following is None else gap.end() + 1
        return 0


@lru_cache(maxsize=64)
def _starts(indent: int, *, anywhere: bool = False) -> re.Pattern[str]:
    """Return what finds the objects at the place of a value that is indented so, or others too."""
    return re.compile(_PLACE % min(indent, 1_000) + _OBJECT * anywhere, re.ASCII)


def _trimmed(text: str, at: int, end: int) -> int:
    """Return the end of a part of a text without the separators after it."""
    part = text[at:end].rstrip(" \t\r\n,")
    if part.endswith("[") and (before := part[:-1].rstrip(" \t\r\n,")).endswith("]"):
        part = before[:-1].rstrip(" \t\r\n,")
    return at + max(len(part), 1)


def _last_end(text: str, at: int, *, in_array: bool) -> int:
    """Return the end of a last value that is no JSON: before the end of its array."""
    part = text[at:].rstrip(" \t\r\n,\0")
    return at + len(part.removesuffix("]") if in_array else part)
