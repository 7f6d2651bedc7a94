"""Which files a run reads, and whether each can be read as JSON lines at all, before any Spark starts.

Belongs here: paths, compression, and faults of a whole file, each one clear error that names it. Not here: what a
single line says.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import re
import shlex
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from ghsync_dagster.domain.errors import InputError

SUFFIXES: Final = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
_READ: Final = 1 << 20
_GZIP: Final = b"\x1f\x8b"
_UTF8_BOM: Final = b"\xef\xbb\xbf"
_KEY: Final = re.compile(rb'"(?:[^"\\]|\\.)*"\s*:')
_OTHER_KINDS: Final = (
    (b"PAR1", "a Parquet file"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd"),
    (b"BZh", "compressed with bzip2"),
    (b"\xfd7zXZ", "compressed with xz"),
    (b"\xff\xfe", "UTF-16 text"),
    (b"\xfe\xff", "UTF-16 text"),
)


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file that has been looked at.

    Attributes:
        path: Absolute path.
        size: Bytes on disk.
        lines: Lines in it, an unterminated last one included.
        block_lines: Line ends before each block of ``block_size`` bytes; compressed files are one block.
    """

    path: Path
    size: int
    lines: int
    block_lines: tuple[int, ...]


def find_files(events_path: str) -> list[Path]:
    """Return the files that a path, a folder or a glob names, sorted by name.

    Folders, also those that a glob matches or a link leads to, are searched to any depth. Names that begin with a dot
    or an underscore are not input there, as in all of Spark's world.

    Raises:
        InputError: Nothing is there, nothing with a known suffix, a link to nothing, or a name that Spark can't read.
    """
    try:
        found = _named_files(events_path)
    except (OSError, RuntimeError) as error:
        # RuntimeError: the home folder of ~user is not known.
        raise InputError(
            f"{events_path} can't be looked at ({getattr(error, 'strerror', None) or error}).",
            way_out="Correct GHSYNC_EVENTS_PATH, or the permissions of its folders.",
        ) from None
    for entry in found:
        if not _has_known_suffix(entry):
            raise InputError(
                f"{entry} does not end in {', '.join(SUFFIXES)}.", way_out="Rename it by what it holds, then run again."
            )
        if problem := _name_problem(entry.resolve()):
            raise InputError(f"{str(entry)!a} {problem}.", way_out="Rename it, then run again.")
    # By links a file may be found more than once.
    return list(dict.fromkeys(entry.resolve() for entry in found))


def _named_files(events_path: str) -> list[Path]:
    path = Path(events_path).expanduser()
    if path.is_dir():
        found = sorted(_files_below(path, set()))
        if not found:
            raise InputError(
                f"The folder {path} has no file that ends in {', '.join(SUFFIXES)}.",
                way_out="Point GHSYNC_EVENTS_PATH at a folder with GH Archive files, or get some with ghsync fetch.",
            )
        return found
    if path.is_file():
        return [path]
    if not glob.has_magic(events_path):
        raise InputError(
            f"There is no file or folder {events_path}.",
            way_out="Correct GHSYNC_EVENTS_PATH, or run `ghsync sample` to write the sample.",
        )
    names = glob.glob(str(path), recursive=True)  # noqa: PTH207  Path.glob takes no absolute pattern
    searched: set[Path] = set()
    found = sorted(file for name in names for file in _files_at(Path(name), searched))
    if not found:
        raise InputError(f"No file matches {events_path}.", way_out="Correct the glob in GHSYNC_EVENTS_PATH.")
    return found


def _files_at(path: Path, searched: set[Path]) -> Iterator[Path]:
    """Yield what a glob matched: the file, or the input files of the folder."""
    if path.is_dir():
        if not _is_hidden(path.name):
            yield from _files_below(path, searched)
    elif _is_input(path):
        yield path


def _is_broken(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def _is_input(path: Path) -> bool:
    """Tell whether what is no folder is a file; what is neither raises, so that none is left out silently.

    False where a path leads through more links than the system follows, in a circle: a shorter one leads there.
    """
    if path.is_file():
        return True
    if not _is_broken(path):
        raise InputError(f"{path} is no regular file.", way_out="Remove it, or name the files by a glob.")
    try:
        path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise InputError(
            f"{path} is a link to nothing.", way_out="Mount or mend what it leads to, or remove the link."
        ) from None
    return False


def _files_below(folder: Path, searched: set[Path]) -> Iterator[Path]:
    """Yield the input files of a folder; one that can't be listed raises, so that none is left out silently.

    What is in ``searched`` is left out, and what is yielded added.
    """

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        # A link may lead back up.
        if (real := Path(parent).resolve()) in searched:
            folders.clear()
            continue
        searched.add(real)
        folders[:] = [name for name in folders if not _is_hidden(name)]
        for path in (Path(parent, name) for name in names if not _is_hidden(name)):
            # A broken link may have led to a folder, whatever its name.
            if (_has_known_suffix(path) or _is_broken(path)) and _is_input(path):
                yield path


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _name_problem(path: Path) -> str | None:
    """Tell why Spark can't read a file of this name, in words."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return "has a name that is not UTF-8"
    if _is_hidden(path.name):
        return "begins with a dot or an underscore: to Spark such a file is not there"
    return "has a colon in its name, which Spark can't read" if ":" in path.name else None


def _has_known_suffix(path: Path) -> bool:
    return path.name.endswith(SUFFIXES)


def inspect_file(path: Path, block_size: int) -> InputFile:
    """Read a file through once: is it whole, is it lines of text, and how many lines has it.

    Args:
        path: The file.
        block_size: Bytes of a block in which Spark will read an uncompressed file.

    Raises:
        InputError: The file is damaged, of another kind, or JSON that is not one object a line.
    """
    try:
        with path.open("rb") as raw:
            head = raw.read(6)
            compressed = head.startswith(_GZIP)
            _refuse_other_kinds(path, head, compressed=compressed)
            raw.seek(0)
            return _count(path, gzip.GzipFile(fileobj=raw) if compressed else raw, None if compressed else block_size)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"{path} is damaged: its gzip data ends early or is broken ({error}).",
            way_out="Get the file again (ghsync fetch verifies what it gets), or remove it.",
        ) from None
    except OSError as error:
        raise InputError(
            f"{path} can't be read ({error.strerror or error}).", way_out="Check the file's permissions and its disk."
        ) from None


def _refuse_other_kinds(path: Path, head: bytes, *, compressed: bool) -> None:
    named_gzip = path.name.endswith(".gz")
    if compressed and not named_gzip:
        raise InputError(
            f"{path} is gzip-compressed but its name does not end in .gz.", way_out=f"Rename it to {path.name}.gz."
        )
    if named_gzip and not compressed and head:
        raise InputError(
            f"{path} ends in .gz but is not gzip-compressed.", way_out=f"Rename it to {path.name.removesuffix('.gz')}."
        )
    kind = next((words for magic, words in _OTHER_KINDS if head.startswith(magic)), None)
    if kind:
        raise InputError(f"{path} is {kind}, not JSON lines.", way_out="Convert it to JSON lines in UTF-8.")


def _count(path: Path, stream: io.BufferedIOBase, block_size: int | None) -> InputFile:
    ends = size = 0
    block_lines = [0]
    last = b"\n"
    for part in _parts(stream, block_size):
        if size == 0:
            _refuse_other_json(path, part)
        ends += part.count(b"\n")
        size += len(part)
        last = part[-1:]
        if block_size is not None and size % block_size == 0:
            block_lines.append(ends)
    return InputFile(path, path.stat().st_size, ends + (last != b"\n"), tuple(block_lines))


def _parts(stream: io.BufferedIOBase, block_size: int | None) -> Iterator[bytes]:
    """Yield the content so that every block boundary is a boundary of a part."""
    wanted = _READ if block_size is None else min(_READ, block_size)
    while part := stream.read(wanted):
        yield part


def _refuse_other_json(path: Path, head: bytes) -> None:
    lines = head.split(b"\n")
    if sum(b"\x00" in line for line in lines) * 2 > len(lines):
        raise InputError(f"{path} is not text: it is full of NUL bytes.", way_out="Give JSON lines in UTF-8.")
    text = head.removeprefix(_UTF8_BOM).lstrip()
    first, _, rest = text.partition(b"\n")
    second = rest.lstrip().partition(b"\n")[0]
    if text.startswith(b"[") and _begins_array(first, second):
        raise InputError(
            f"{path} is one JSON array, not one event a line.",
            way_out=f"Convert it: {_reader(path)} | jq -c '.[]' > events.jsonl",
        )
    if text.startswith(b"{") and second and not _is_json(first) and _spans_lines(text, second):
        raise InputError(
            f"{path} is pretty-printed JSON: an event spans several lines.",
            way_out=f"Convert it: {_reader(path)} | jq -c . > events.jsonl",
        )


def _begins_array(first: bytes, second: bytes) -> bool:
    """Tell an array of events from a bad first line: after that the next line stands by itself."""
    return not second or first.rstrip().endswith((b"[", b",")) or not (_is_json(first) or _is_json(second))


def _spans_lines(text: bytes, second: bytes) -> bool:
    """Tell whether the first JSON object of a text goes on over its line end."""
    if _KEY.match(second) and not _is_json(second):
        return True
    content = text.decode("utf-8", "replace")
    try:
        _, end = json.JSONDecoder(parse_int=str).raw_decode(content)
    except (ValueError, RecursionError):
        return False
    return "\n" in content[:end]


def _reader(path: Path) -> str:
    return f"{'gunzip -c' if path.name.endswith('.gz') else 'cat'} {shlex.quote(str(path))}"


def _is_json(line: bytes) -> bool:
    try:
        msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True
