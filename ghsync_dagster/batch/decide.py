"""Decide: what Spark's Python workers do with one task's files, from bytes on disk to Parquet parts.

Belongs here: bytes in, parts and counts out, line numbers. Not here: the decision about one line (``domain.event``),
which files there are (``batch.search``), and which task reads which (``batch.read``).

A worker opens its files itself: passing every byte and every column through the JVM would cost more than all the rest.
Each attempt of a task gives its parts new names, and only the parts that successful tasks name are kept.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import struct
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from ghsync_dagster.batch.files import InputFile, damaged, open_file, unreadable
from ghsync_dagster.batch.heads import TOOLS
from ghsync_dagster.batch.unpack import (
    DamagedError,
    TooLongError,
    as_utf8,
    events_within,
    lines_of,
    range_of_lines,
    unpacked,
    values_of,
    weight_of,
)
from ghsync_dagster.batch.versions import FileState, state_of
from ghsync_dagster.domain.errors import ConfigError, GhsyncError, InputError, PermanentError
from ghsync_dagster.domain.event import RAW_LIMIT, Event, Refused, event_decoder, event_shape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import pyarrow as pa
    import pyarrow.parquet as pq

    from ghsync_dagster.domain.user import Rule

EVENTS: Final = "events"
QUARANTINE: Final = "quarantine"
BLANK: Final = "blank"
REASON: Final = "reason"
PIECE: Final = "piece"
FAULT: Final = "fault"

_COUNTS: Final = struct.Struct("<QQ")
_ROW_GROUP: Final = 50_000
_LINE_HEAD: Final = 100
_EVENTS: Final = '.. | objects | select(has("id") and has("type") and has("created_at") and has("actor"))'
_VALUES: Final = f'if type == "array" then .[] elif type != "object" or has("actor") then . else {_EVENTS} end'
_DETAIL: Final = re.compile(r", got .*| \(byte \d+\)|\".*\" follows", re.DOTALL)


class Piece(NamedTuple):
    """What a task reads of a file: all of it, or the lines of a plain one that begin in ``[start, end)``.

    Attributes:
        number: The file's index in the input.
        file: The file.
        start: First byte.
        end: The byte after the last; None: the whole file.
    """

    number: int
    file: InputFile
    start: int = 0
    end: int | None = None


class Tally(NamedTuple):
    """A count that a task returns.

    Attributes:
        kind: ``events`` or ``quarantine`` with the name of a part, ``reason`` with its words, ``blank``, ``piece`` with
            the index of a file and the first byte, or ``fault`` with an error's class, message and way out as JSON.
        name: Depends on the kind.
        rows: Rows of the part, or lines; for a piece, its lines, counted by their ends. If lines have several values,
            those beyond the first are another piece, after the end of the file: so no line's number changes.
        bytes: For a piece: how many bytes were read from the disk.
    """

    kind: str
    name: str
    rows: int
    bytes: int = 0


class Task(NamedTuple):
    """The parameters of all tasks. What each task reads is in a file of its own, since there may be very many.

    Attributes:
        target: Folder with a sub-folder for events, one for the quarantine, and one for the tasks.
        rules: The user rules.
        latest: The time after which an event is from the future.
        host: The machine that scanned the files.
    """

    target: str
    rules: tuple[Rule, ...]
    latest: str
    host: str

    def run(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Execute the tasks whose numbers arrive; yield their tallies."""
        for batch in batches:
            for number in batch.column(0).to_pylist():
                yield _as_batch(self._read(number))

    def _read(self, number: int) -> list[Tally]:
        from pyspark import TaskContext

        context = TaskContext.get()
        name = f"part-{number:05d}-{context.taskAttemptId() if context else 0}.parquet"
        try:
            return self._decide(number, name)
        except GhsyncError as error:
            return [_fault(error)]

    def _decide(self, number: int, name: str) -> list[Tally]:
        pieces = read_task(Path(self.target), number)
        tallies: list[Tally] = []
        with (
            _Part(Path(self.target) / EVENTS / name, event_schema(), _event_columns) as events,
            _Part(Path(self.target) / QUARANTINE / name, quarantine_schema(), _quarantine_columns) as quarantine,
            _Progress(Path(self.target), number) as progress,
        ):
            is_here = self.host == platform.node()
            sorter = _Sorter(event_decoder(self.rules, self.latest), events, quarantine, is_here=is_here)
            for piece in pieces:
                try:
                    tallies.extend(sorter.read(piece, progress))
                except InputError as error:
                    # Each unreadable file is reported, not only the first one.
                    tallies.append(_fault(error))
        counted = [Tally(EVENTS, name, events.rows), Tally(QUARANTINE, name, quarantine.rows)]
        counted += [Tally(BLANK, "", sorter.blank), *(Tally(REASON, *item) for item in sorter.reasons.items())]
        return [*tallies, *(tally for tally in counted if tally.rows)]


def _fault(error: GhsyncError) -> Tally:
    return Tally(FAULT, msgspec.json.encode((type(error).__name__, error.message, error.way_out)).decode(), 1)


@contextmanager
def folder_errors(folder: Path) -> Iterator[None]:
    """Translate the errors of a folder in GHSYNC_HOME that a run writes and reads back.

    Raises:
        ConfigError: The folder can't be used: its disk is full, for example, or this executor does not have it.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{folder} can't be used ({os.strerror(error.errno) if error.errno else error}).",
            way_out="Free room on its disk, or set GHSYNC_HOME to a folder with more; executors of a cluster need the "
            "same folder under the same path.",
        ) from None


def write_task(target: Path, number: int, pieces: Sequence[Piece]) -> None:
    """Write what a task reads to the file that its worker opens."""
    with folder_errors(target):
        _task_file(target, number, "json").write_bytes(msgspec.json.encode(pieces))


def read_task(target: Path, number: int) -> list[Piece]:
    """Return what a task reads."""
    with folder_errors(target):
        return msgspec.json.decode(_task_file(target, number, "json").read_bytes(), type=list[Piece])


def _task_file(target: Path, number: int, suffix: str) -> Path:
    return target / "tasks" / f"{number:05d}.{suffix}"


class _Progress:
    """The progress of a task, in a file next to the task's own: a large file is one task, which ends late."""

    def __init__(self, target: Path, number: int) -> None:
        self._path = _task_file(target, number, "done")
        self._files = self._bytes = 0

    def __enter__(self) -> _Progress:
        with folder_errors(self._path.parent):
            self._file = self._path.open("wb", buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def report(self, more: int) -> None:
        """Report how many bytes of the present piece are read."""
        # If it fails, only the shown progress is wrong.
        with suppress(OSError):
            os.pwrite(self._file.fileno(), _COUNTS.pack(self._files, self._bytes + more), 0)

    def finish(self, size: int, *, is_first: bool) -> None:
        """Count a piece as read; a file is counted by its first piece."""
        self._files += is_first
        self._bytes += size
        self.report(0)


def read_progress(target: Path) -> tuple[int, int]:
    """Return how many files and bytes all tasks have read so far."""
    files = size = 0
    for path in (target / "tasks").glob("*.done"):
        with suppress(OSError, struct.error):
            more = _COUNTS.unpack(path.read_bytes())
            files, size = files + more[0], size + more[1]
    return files, size


class _Sorter:
    """Decides the lines of files, and adds each to the part that it belongs to.

    Attributes:
        blank: How many lines were blank.
        reasons: How often each kind of reason was given.
    """

    def __init__(
        self, decide: Callable[[bytes], Event | Refused | None], events: _Part, quarantine: _Part, *, is_here: bool
    ) -> None:
        self.blank = 0
        self.reasons: Counter[str] = Counter()
        self._decide = decide
        self._events = events
        self._quarantine = quarantine
        self._is_here = is_here

    def read(self, piece: Piece, progress: _Progress) -> list[Tally]:
        """Read a piece and report the progress; return the numbers of its lines and bytes.

        Raises:
            InputError: The file is damaged, can't be read, has changed since it was scanned, or its values can't be
                separated.
        """
        file = piece.file
        try:
            with open_file(file.path) as raw:
                before = _assert_unchanged(raw, file.state, is_here=self._is_here)
                counted = _Counted(raw, piece, progress)
                lines, more = self._lines(file, counted) if file.has_lines else (self._values(file, counted), 0)
                _assert_unchanged(raw, before)
        except DamagedError as error:
            raise damaged(file.path, str(error)) from None
        except TooLongError as error:
            raise _to_be_cut(file, str(error), _VALUES) from None
        except OSError as error:
            raise unreadable(file.path, error) from None
        progress.finish(counted.bytes, is_first=piece.start == 0)
        tallies = [Tally(PIECE, f"{piece.number} {piece.start}", lines, counted.bytes)]
        return [*tallies, Tally(PIECE, f"{piece.number} {file.size + piece.start}", more)] if more else tallies

    def _lines(self, file: InputFile, content: _Counted) -> tuple[int, int]:
        number = more = 0
        decide, add = self._decide, self._events.add
        for lines in lines_of(content):
            for line in lines:
                number += 1
                outcome = decide(line)
                if isinstance(outcome, Event):
                    add(outcome)
                else:
                    more += self._odd_line(file, number, line, outcome)
        return content.lines, more

    def _odd_line(self, file: InputFile, number: int, line: bytes, outcome: Refused | None) -> int:
        """Handle a line that is no event: blank, bad, or with several values; return how many beyond one."""
        values = (value for _, value in values_of([line] if outcome else [], is_line=True))
        # Without an array, whatever follows one object is no value, but makes the line a bad one.
        needed = 1 if line[:_LINE_HEAD].lstrip(b"\xef\xbb\xbf \t\r").startswith(b"[") else 2
        first: list[bytes] = []
        for value in values:
            first.append(value)
            needed -= value.startswith(b"{")
            if not needed:
                break
        else:
            self._other(file, number, line, outcome, is_line=True)
            return 0
        weight = count = 0
        for value in chain(first, values):
            self._value(file, number, value)
            weight += weight_of(value)
            count += 1
        _assert_weight(file.path, weight_of(line), weight)
        return count - 1

    def _values(self, file: InputFile, content: _Counted) -> int:
        values = weight = read = 0

        def weighed() -> Iterator[bytes]:
            nonlocal read
            for part in content:
                read += weight_of(part)
                yield part

        for line, value in values_of(weighed()):
            values += 1
            weight += weight_of(value)
            self._value(file, line, value)
        _assert_weight(file.path, read, weight)
        return values

    def _value(self, file: InputFile, number: int, value: bytes) -> None:
        outcome = self._decide(value)
        if isinstance(outcome, Event):
            # Events inside it are separate ones, lost because their ends are missing.
            _refuse_events_within(file, number, value, allowed=0)
            self._events.add(outcome)
        else:
            self._other(file, number, value, outcome)

    def _other(
        self, file: InputFile, number: int, line: bytes, outcome: Refused | None, *, is_line: bool = False
    ) -> None:
        if outcome is None:
            self.blank += 1
            return
        # It would count as one bad line, even if it holds many events.
        _refuse_events_within(file, number, line, allowed=1, is_line=is_line)
        self.reasons[_DETAIL.sub("", outcome.reason)] += 1
        self._quarantine.add((file.path, number, outcome.reason, _raw_text(line)))


def _assert_weight(path: str, read: int, weight: int) -> None:
    if weight != read:
        raise PermanentError(
            f"{path}: {read} bytes of JSON went in, but values of {weight} came out.",
            way_out="Run again; if it stays, tell us: the file did not change meanwhile.",
        )


def _refuse_events_within(file: InputFile, number: int, value: bytes, *, allowed: int, is_line: bool = False) -> None:
    if value.count(b'"actor"') > 1 and (events := events_within(value, is_line=is_line)) > allowed:
        raise _to_be_cut(file, f"what begins at line {number} has {events} events inside it", _EVENTS)


def _to_be_cut(file: InputFile, problem: str, query: str) -> InputError:
    """Return the error of a file whose values must first be put on lines, with the command for that."""
    path, lines = shlex.quote(file.path), shlex.quote(f"{file.path}-events.jsonl")
    # From standard input, as gunzip refuses unknown suffixes.
    read = f"{TOOLS[file.packing]} -c" if file.packing else "cat"
    text = f"{read} < {path}{' | iconv -f UTF-16 -t UTF-8' * file.is_utf16}"
    return InputError(
        f"{file.path}: {problem}.",
        way_out=f"Make each event a line: {text} | jq -c {shlex.quote(query)} > {lines} ; then name the new file.",
    )


class _Counted:
    """The content of a piece, counted as it is read: an independent count of its lines.

    Attributes:
        lines: Line ends so far, plus one for a last line without.
        bytes: Bytes read from the disk, once all of it is read.
    """

    def __init__(self, raw: IO[bytes], piece: Piece, progress: _Progress) -> None:
        self.bytes = 0
        self._raw = raw
        self._progress = progress
        self._piece = piece
        self._ends = 0
        self._last = b"\n"

    @property
    def lines(self) -> int:
        return self._ends + (self._last != b"\n")

    def __iter__(self) -> Iterator[bytes]:
        file, start, end = self._piece.file, self._piece.start, self._piece.end
        content = unpacked(self._raw, file.packing) if end is None else range_of_lines(self._raw, start, end)
        for part in as_utf8(content) if file.is_utf16 else content:
            if part:
                self._ends += part.count(b"\n")
                self._last = part[-1:]
                self.bytes += len(part)
                self._progress.report(self.bytes if file.packing is None else self._raw.tell())
                yield part
        if end is None:
            self.bytes = self._raw.tell()


def _assert_unchanged(raw: IO[bytes], state: FileState, *, is_here: bool = True) -> FileState:
    """Return the state of an open file, which must be the given one.

    Args:
        raw: The file.
        state: Its former state.
        is_here: Whether it was scanned on this machine: others may see another inode and ``ctime``.
    """
    now = state_of(state.path, os.fstat(raw.fileno()))
    if now != (state if is_here else replace(state, changed_ns=now.changed_ns, inode=now.inode)):
        raise changed(state.path, state.size, now.size)
    return now


def changed(path: str, before: int, after: int) -> InputError:
    """Return the error of a file that has changed since it was scanned."""
    how = f"{before} bytes when it was looked at, {after} when it was read" if before != after else "its time or inode"
    return InputError(
        f"{path} changed while it was read: {how}.",
        way_out="Run again on files that are at rest; executors of a cluster need the very same files.",
    )


class _Part:
    """A Parquet file that appears as a whole when the task is done; without rows it does not appear."""

    def __init__(self, path: Path, schema: pa.Schema, columns: Callable[[Sequence[Any]], Sequence[pa.Array]]) -> None:
        self.rows = 0
        self._path = path
        self._unfinished = path.with_name(f".{path.name}")
        self._schema = schema
        self._columns = columns
        self._pending: list[Any] = []
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> _Part:
        return self

    def add(self, row: Any) -> None:  # noqa: ANN401  an event, or a quarantined line's tuple
        """Take one row."""
        self._pending.append(row)
        if len(self._pending) >= _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        batch = pa.RecordBatch.from_arrays(self._columns(self._pending), schema=self._schema)
        with folder_errors(self._path.parent):
            if self._writer is None:
                self._writer = pq.ParquetWriter(self._unfinished, self._schema)
            self._writer.write_batch(batch)
        self.rows += len(self._pending)
        self._pending = []

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        try:
            if failed is None:
                self._finish()
        finally:
            # If it is not finished, or finishing failed.
            if self._writer is not None:
                with suppress(OSError):
                    self._unfinished.unlink()
                with suppress(OSError):
                    self._writer.close()

    def _finish(self) -> None:
        if self._pending:
            self._flush()
        if self._writer is not None:
            with folder_errors(self._path.parent):
                self._writer.close()
                self._unfinished.replace(self._path)


def _raw_text(line: bytes) -> str:
    text = line.decode("utf-8", "backslashreplace").replace("\x00", "\\x00")
    return text if len(text) <= RAW_LIMIT else f"{text[:RAW_LIMIT]}... ({len(line)} bytes)"


def event_schema() -> pa.Schema:
    """Return the columns of a part of events."""
    import pyarrow as pa

    return pa.schema(list(_event_type(event_shape())))


def _event_type(shape: Any) -> pa.DataType:  # noqa: ANN401  as event_shape gives it
    import pyarrow as pa

    if isinstance(shape, dict):
        return pa.struct([(name, _event_type(part)) for name, part in shape.items()])
    return {int: pa.int64(), str: pa.string()}[shape]


def _event_columns(events: Sequence[Event]) -> list[pa.Array]:
    return [_event_column(part, [getattr(event, name) for event in events]) for name, part in event_shape().items()]


def _event_column(shape: Any, values: list[Any]) -> pa.Array:  # noqa: ANN401  as event_shape gives it
    import pyarrow as pa

    kind = _event_type(shape)
    if not isinstance(shape, dict):
        return pa.array(values, kind)
    parts = [_event_column(part, [value and getattr(value, name) for value in values]) for name, part in shape.items()]
    return pa.StructArray.from_arrays(parts, fields=list(kind), mask=pa.array([value is None for value in values]))


def quarantine_schema() -> pa.Schema:
    """Return the columns of a part of the quarantine."""
    import pyarrow as pa

    return pa.schema([("file", pa.string()), ("line", pa.int64()), ("reason", pa.string()), ("raw", pa.string())])


def _quarantine_columns(rows: Sequence[tuple[str, int, str, str]]) -> list[pa.Array]:
    import pyarrow as pa

    return [
        pa.array(values, field.type) for values, field in zip(zip(*rows, strict=True), quarantine_schema(), strict=True)
    ]


def _as_batch(tallies: Sequence[Tally]) -> pa.RecordBatch:
    import pyarrow as pa

    schema = pa.schema([("kind", pa.string()), ("name", pa.string()), ("rows", pa.int64()), ("bytes", pa.int64())])
    return pa.RecordBatch.from_pylist([tally._asdict() for tally in tallies], schema=schema)
