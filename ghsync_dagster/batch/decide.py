"""Decide: what Spark's Python workers do with the lines of one task, from bytes to Parquet parts.

Belongs here: batches in, parts and counts out, line numbers. The decision about one line is ``domain.event``'s; which
files there are is ``batch.read``'s.

A worker writes its parts itself, since handing every column back through the JVM costs more than all else together.
A part has a name of its own for each try of a task, and only the names that successful tasks return are kept.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import unquote, urlsplit

from ghsync_dagster.domain.event import RAW_LIMIT, Event, event_decoder, event_shape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import pyarrow as pa
    import pyarrow.parquet as pq

    from ghsync_dagster.domain.user import Rule

EVENTS: Final = "events"
QUARANTINE: Final = "quarantine"
BLANK: Final = "blank"
REASON: Final = "reason"

_ROW_GROUP: Final = 50_000
_DETAIL: Final = re.compile(r", got .*| \(byte \d+\)|\".*\" follows", re.DOTALL)


class Tally(NamedTuple):
    """A count that a task returns: rows of a part, blank lines, or lines refused for one kind of reason.

    Attributes:
        kind: ``events`` or ``quarantine`` with the part's file name, ``blank``, or ``reason`` with its words.
        name: As the kind says.
        rows: How many.
    """

    kind: str
    name: str
    rows: int


class Task(NamedTuple):
    """What every task is told.

    Attributes:
        target: Folder with a sub-folder for events and one for the quarantine.
        rules: The user rules.
        block_size: Bytes of a block of a plain file.
        line_ends: For each file, the line ends before each of its blocks.
    """

    target: str
    rules: tuple[Rule, ...]
    block_size: int
    line_ends: Mapping[str, tuple[int, ...]]

    def run(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Decide the lines of one task; yield its tallies."""
        from pyspark import TaskContext

        context = TaskContext.get()
        name = f"part-{context.partitionId():05d}-{context.taskAttemptId()}.parquet" if context else "part.parquet"
        decide = event_decoder(self.rules)
        tallies: Counter[tuple[str, str]] = Counter()
        place: Counter[tuple[str, int]] = Counter()
        with (
            _Part(Path(self.target) / EVENTS / name, event_schema(), _event_columns) as events,
            _Part(Path(self.target) / QUARANTINE / name, quarantine_schema(), _quarantine_columns) as quarantine,
        ):
            for batch in batches:
                for line, where, row in _placed(batch, place):
                    outcome = decide(line)
                    if isinstance(outcome, Event):
                        events.add(outcome)
                    elif outcome is None:
                        tallies[BLANK, ""] += 1
                    else:
                        tallies[REASON, _DETAIL.sub("", outcome.reason)] += 1
                        quarantine.add((_as_path(where[0]), self._line(where, row), outcome.reason, _raw_text(line)))
        tallies[EVENTS, name] = events.rows
        tallies[QUARANTINE, name] = quarantine.rows
        yield _as_batch(Tally(kind, part, rows) for (kind, part), rows in tallies.items() if rows)

    def _line(self, where: tuple[str, int], row: int) -> int:
        """Return a line's number in its file from its place in its block.

        A block at byte S begins with the first line that starts after S: the one at S belongs to the block before
        (Hadoop's LineRecordReader).
        """
        file, block = where
        return row + 1 if block == 0 else self.line_ends[_as_path(file)][block // self.block_size] + 1 + row + 1


class _Part:
    """A Parquet file that appears, whole, when the task is done; an empty one does not."""

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

        if self._writer is None:
            self._writer = pq.ParquetWriter(self._unfinished, self._schema)
        self._writer.write_batch(pa.RecordBatch.from_arrays(self._columns(self._pending), schema=self._schema))
        self.rows += len(self._pending)
        self._pending = []

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        if self._pending and failed is None:
            self._flush()
        if self._writer is not None:
            self._writer.close()
            if failed is None:
                self._unfinished.replace(self._path)
            else:
                self._unfinished.unlink(missing_ok=True)


def _placed(batch: pa.RecordBatch, place: Counter[tuple[str, int]]) -> Iterator[tuple[bytes, tuple[str, int], int]]:
    """Yield each line with its file and block, and its place in that block.

    A task's rows come file by file and block by block, so a running count is a row's place.
    """
    values, files, blocks = (batch.column(index) for index in range(3))
    if len(batch) and files[0] == files[-1] and blocks[0] == blocks[-1]:
        key = (files[0].as_py(), blocks[0].as_py())
        first = place[key]
        place[key] += len(batch)
        yield from ((line, key, first + index) for index, line in enumerate(values.to_pylist()))
        return
    for line, key in zip(values.to_pylist(), zip(files.to_pylist(), blocks.to_pylist(), strict=True), strict=True):
        yield line, key, place[key]
        place[key] += 1


def _raw_text(line: bytes) -> str:
    text = line.decode("utf-8", "backslashreplace").replace("\x00", "\\x00")
    return text if len(text) <= RAW_LIMIT else f"{text[:RAW_LIMIT]}... ({len(line)} bytes)"


def _as_path(uri: str) -> str:
    return unquote(urlsplit(uri).path)


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


def _as_batch(tallies: Iterator[Tally]) -> pa.RecordBatch:
    import pyarrow as pa

    schema = pa.schema([("kind", pa.string()), ("name", pa.string()), ("rows", pa.int64())])
    return pa.RecordBatch.from_pylist([tally._asdict() for tally in tallies], schema=schema)
