"""The kind of a file by its head: events that can be read, or something else, with the command that converts it.

Belongs here: the judgement of a head's bytes. Not here: opening files, and the judgement of single lines: if any line
of the head is an event, every line is judged by itself.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
import shlex
from pathlib import PurePath
from typing import Any, Final

import msgspec

from ghsync_dagster.batch.unpack import BZIP2, GZIP, ZSTD, goes_on, packing_of
from ghsync_dagster.domain.errors import InputError

ENDINGS: Final = {None: "", GZIP: ".gz", BZIP2: ".bz2", ZSTD: ".zst"}
"""How the name of a file of a packing ends."""

_KEY: Final = re.compile(rb'"(?:[^"\\]|\\.)*"\s*:')
_OPENED: Final = re.compile(rb"\{[ \t\r]*\n")
_ITEM: Final = re.compile(rb'$|[][{]|(?:null|true|false|-?\d+)\b|"')
"""How the first value of an array begins, or its end."""
_HOUR: Final = re.compile(r"\d{4}-\d{2}-\d{2}-\d{1,2}")
_TAR: Final = slice(257, 262)
_FEW_NULS: Final = 100
_CSV_MARKS: Final = ",;\t"
_CSV_FIELDS: Final = 3
_CSV_HEAD: Final = 1 << 16
_CSV_WORDS: Final = frozenset(
    {"id", "type", "created_at", "actor", "actor_id", "login", "repo", "repo_name", "user_id"}
)
TOOLS: Final = {GZIP: "gunzip", BZIP2: "bzip2 -d", ZSTD: "zstd -d"}
_FROM_PARQUET: Final = (
    "import sys, json, pyarrow.parquet as pq; file = pq.ParquetFile(sys.argv[1]); "
    # Bytes that are no text become surrogates, which a used field refuses.
    "plain = lambda v: v.decode('utf-8', 'surrogateescape') if isinstance(v, bytes) else "
    "v.isoformat() + 'Z' * (not getattr(v, 'tzinfo', 1)) if hasattr(v, 'isoformat') else str(v); "
    "open(sys.argv[2], 'w').writelines(json.dumps(dict((k, str(v) if k == 'id' and isinstance(v, int) else v) "
    "for k, v in row.items()), default=plain) + '\\n' for rows in file.iter_batches() for row in rows.to_pylist())"
)
_EXPORT: Final = "Export the events as JSON lines; then name the new file."
_SHAPE: Final = (
    "GH Archive's shape is needed: id a string, created_at with its zone (Z), actor an object whose id is a number. "
    "Hours in that shape: ghsync fetch 2015-01-01-15."
)
_UNPACK: Final = (
    (b"PK\x03\x04", "a zip archive", "python3 -m zipfile -e {path} {folder}"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x {path} -o{folder}"),
    (b"\xfd7zXZ", "compressed with xz", "xz -dc {path} > {plain}"),
    (b"\x04\x22\x4d\x18", "compressed with lz4", "lz4 -dc {path} > {plain}"),
    # From standard input, as gunzip refuses other suffixes.
    (b"\x1f\x9d", "compressed with compress", "gunzip -c < {path} > {plain}"),
    (b"PAR1", "a Parquet file", f'.venv/bin/python -c "{_FROM_PARQUET}" {{path}} {{plain}}'),
    (b"ORC", "an ORC file", ""),
    (b"Obj\x01", "an Avro file", ""),
    (b"SQLite format 3", "an SQLite database", ""),
    (b"%PDF", "a PDF document", ""),
    (codecs.BOM_UTF32_LE, "UTF-32 text", "iconv -f UTF-32 -t UTF-8 {path} > {plain}"),
    (codecs.BOM_UTF32_BE, "UTF-32 text", "iconv -f UTF-32 -t UTF-8 {path} > {plain}"),
)


class _Parts(msgspec.Struct):
    actor: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_decode_parts: Final = msgspec.json.Decoder(_Parts).decode


def has_lines(path: str, packing: str | None, text: bytes, *, is_whole: bool = False) -> bool:
    """Return whether a file has one event a line; else it is a JSON array, or objects one after the other.

    Args:
        path: The file, for the error.
        packing: How it is packed.
        text: Its unpacked head, in UTF-8; the last line may be cut.
        is_whole: Whether the head is certainly the whole file.

    Raises:
        InputError: It is of another kind; the way out converts it.
    """
    if _is_event(text.partition(b"\n")[0]) and text.count(b"\0") < _FEW_NULS:
        return True
    _refuse_other_kinds(path, packing, text)
    # NUL bytes at the end did not reach the disk; the rest may be intact.
    text = text.rstrip(b"\0") or text
    lines = text.split(b"\n")
    # A few NUL bytes may belong to a bad line, or to a bad value if all is one line.
    if sum(b"\x00" in line for line in lines) * 2 > len(lines) and text.count(b"\0") * 4 > len(text):
        raise _not_text(path, packing, text)
    content = text.removeprefix(codecs.BOM_UTF8).lstrip()
    first, _, rest = content.partition(b"\n")
    second = rest.lstrip().partition(b"\n")[0]
    shaped = (content.startswith(b"[") and _begins_array(first, second)) or (
        content.startswith(b"{")
        and bool(second)
        and not _is_json(first)
        and _spans_lines(content, second, is_whole=is_whole)
    )
    if shaped or not any(_is_object(line) for line in lines):
        _refuse_other_text(path, content)
    _refuse_payloads(path, content if shaped else first)
    return not shaped


def _is_event(line: bytes) -> bool:
    """Return, at little cost, whether a line is probably an event: most files have nothing else."""
    try:
        return _decode_parts(line).actor is not msgspec.UNSET
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False


def _refuse_other_kinds(path: str, packing: str | None, head: bytes) -> None:
    if head[_TAR] == b"ustar":
        command = "mkdir -p {folder} && tar -xf {path} -C {folder}"
        raise _other(path, packing, "a tar archive", command, "then name the folder")
    if packing and (inner := packing_of(head)):
        command = f"{TOOLS[packing]} -c < {{path}} > {{plain}}{ENDINGS[inner]}"
        raise _other(path, None, f"compressed twice ({inner} in {packing})", command, "then name the new file")
    for magic, words, command in _UNPACK:
        if head.startswith(magic):
            then = "then name the folder" if "{folder}" in command else "then name the new file"
            then = f"{then}. {_SHAPE[:-1]}" if _FROM_PARQUET in command else then
            raise _other(path, packing, words, command, then)


def _other(path: str, packing: str | None, words: str, command: str, then: str) -> InputError:
    """Return the error of a file of another kind, with the command that converts it."""
    # The whole name: files that differ only in their suffixes must not overwrite each other.
    names = {"path": path, "folder": f"{path}-unpacked", "plain": f"{path}-events.jsonl", "inner": f"{path}-inner"}
    quoted = {name: shlex.quote(value) for name, value in names.items()}
    if packing and command:
        # An intermediate file, not a pipe: so the command fails if the packed data is damaged.
        command = command.replace("{path}", "{inner}")
        command = f"{TOOLS[packing]} -c < {{path}} > {{inner}} && {command} && rm {{inner}}"
    within = f" in {packing} data" if packing else ""
    way_out = f"{command.format(**quoted)} ; {then}." if command else f"{_EXPORT} {_SHAPE}"
    return InputError(f"{path} is {words}{within}, not JSON of events.", way_out=way_out)


def _not_text(path: str, packing: str | None, text: bytes) -> InputError:
    even, odd = text[::2].count(b"\0"), text[1::2].count(b"\0")
    if (even == 0) != (odd == 0):
        order = "LE" if even == 0 else "BE"
        command = f"iconv -f UTF-16{order} -t UTF-8 {{path}} > {{plain}}"
        return _other(path, packing, "UTF-16 text without a byte order mark", command, "then name the new file")
    return InputError(
        f"{path} is not text: it is full of NUL bytes.",
        way_out="Get the file again: what was written into it did not reach the disk.",
    )


def _refuse_other_text(path: str, content: bytes) -> None:
    """Refuse text that is certainly no JSON."""
    start = content[:4096].lower()
    hour = _HOUR.match(PurePath(path).name)
    again = (
        f"rm {shlex.quote(path)} ; ghsync fetch {hour.group()} --target {shlex.quote(str(PurePath(path).parent))}"
        if hour
        else f"Get the file again from where it comes from, with a login if that asks for one. {_SHAPE[:-1]}"
    )
    if start.startswith((b"<!doctype html", b"<html")):
        raise InputError(f"{path} is a web page (HTML), not JSON of events.", way_out=f"{again} ; or remove it.")
    if start.startswith(b"<"):
        raise InputError(
            f"{path} is XML, as a server's error message is, not JSON of events.", way_out=f"{again} ; or remove it."
        )
    if _is_csv(content):
        raise InputError(
            f"{path} is a table with separators (CSV), not JSON of events.",
            way_out=f"{_EXPORT} {_SHAPE}",
        )


def _is_csv(content: bytes) -> bool:
    lines = content[:_CSV_HEAD].decode("utf-8", "replace").splitlines()[:2]
    for mark in _CSV_MARKS:
        rows = list(csv.reader(lines, delimiter=mark))
        if rows and len(rows[0]) >= _CSV_FIELDS and len({len(row) for row in rows}) == 1:
            return bool(_CSV_WORDS & {cell.strip().lower().replace(".", "_") for cell in rows[0]})
    return False


def _refuse_payloads(path: str, text: bytes) -> None:
    """Refuse what GitHub sends to a webhook: it has no id, type and time of an event."""
    value = _first_value(text)
    if not isinstance(value, dict):
        return
    value = value.get("payload", value) if "actor" not in value else value
    if isinstance(value, dict) and "actor" not in value and "sender" in value:
        raise InputError(
            f"{path} holds payloads of a webhook (sender, no actor), not GitHub events.",
            way_out="Get the events themselves: gh api repos/OWNER/REPOSITORY/events > events.json, or ghsync fetch "
            "2015-01-01-15 for an hour of all; then name the new file.",
        )


def _first_value(text: bytes) -> Any:  # noqa: ANN401  any JSON
    start = text.lstrip(b"[ \t\r\n").decode("utf-8", "replace")
    try:
        # As text, because Python refuses to make an int of very many digits.
        return json.JSONDecoder(parse_int=str).raw_decode(start)[0]
    except (ValueError, RecursionError):
        return None


def _begins_array(first: bytes, second: bytes) -> bool:
    """Distinguish an array of events from a bad first line, after which the next line is complete by itself."""
    inner = first.strip()[1:].lstrip()
    if inner[:1] in (b"", b"{", b"]") and first.rstrip().endswith((b"[", b",")):
        return True
    return bool(_ITEM.match(inner)) and (not second or not (_is_json(first) or _is_json(second)))


def _spans_lines(text: bytes, second: bytes, *, is_whole: bool) -> bool:
    """Return whether a text's first JSON object spans several lines, perhaps beyond the end of the head."""
    if (_KEY.match(second) or _OPENED.match(text)) and not _is_json(second):
        return True
    content = text.decode("utf-8", "replace")
    try:
        _, end = json.JSONDecoder(parse_int=str).raw_decode(content)
    except json.JSONDecodeError as error:
        return not is_whole and goes_on(content, error)
    except RecursionError:
        return False
    return "\n" in content[:end]


def _is_object(line: bytes) -> bool:
    return line.lstrip()[:1] == b"{" and _is_json(line)


def _is_json(line: bytes) -> bool:
    try:
        msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True
