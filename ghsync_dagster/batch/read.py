"""Read: every line of the input files becomes a typed event, a quarantined line with its reason, or is blank.

Belongs here: which task reads what, the conservation of lines and bytes, and the progress. Not here: how a task decides
its lines (``batch.decide``), and which files there are (``batch.search``).
"""

from __future__ import annotations

import platform
import shutil
import time
from collections import Counter, defaultdict
from datetime import UTC, datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec.structs import replace

from ghsync_dagster.batch.decide import (
    BLANK,
    EVENTS,
    FAULT,
    PIECE,
    QUARANTINE,
    REASON,
    Piece,
    Tally,
    Task,
    changed,
    event_schema,
    folder_errors,
    quarantine_schema,
    read_progress,
    write_task,
)
from ghsync_dagster.batch.files import InputFile, combine_errors
from ghsync_dagster.batch.reports import FileCount, LeftOut, ReadReport, count_rows
from ghsync_dagster.batch.search import find_files
from ghsync_dagster.domain.errors import ConfigError, InputError, PermanentError, shown
from ghsync_dagster.domain.event import latest_time
from ghsync_dagster.folders import ROOM, ensure_folder
from ghsync_dagster.logging import get_logger
from ghsync_dagster.progress import log_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import pyarrow as pa
    from pyspark.sql import SparkSession

    from ghsync_dagster.domain.user import Rule

_MIB: Final = 1 << 20
_COST: Final = {None: 1, "gzip": 6, "zstd": 7, "bzip2": 10}
"""The cost of reading a byte on disk, relative to a plain one: it unpacks to about as many bytes of JSON lines."""
_FILE_COST: Final = 1 << 14
"""The cost of opening a file, in plain bytes."""
_TASKS_A_CORE: Final = 4
_LEAST_PIECE: Final = 8 * _MIB
"""Starting a task costs about as much as deciding some megabytes of lines."""
_PROGRESS_SECONDS: Final = 3.0
_PATHS_SHOWN: Final = 5
log = get_logger("read")


def read_events(
    spark: Callable[[], SparkSession],
    events_paths: Sequence[str],
    target: Path,
    rules: Sequence[Rule],
    home: Path | None = None,
) -> ReadReport:
    """Read all files under ``events_paths`` into ``target``.

    Args:
        spark: Returns the session; called only after the files have been scanned.
        events_paths: Files, folders or globs; a file that several name is read once.
        target: Empty folder for the Parquet output, which driver and executors share.
        rules: The user rules that decide between event and quarantine.
        home: GHSYNC_HOME, which is never input.

    Raises:
        InputError: A path or a whole file can't be read as JSON lines, or changed meanwhile.
        ConfigError: There is no room for what the files become.
        PermanentError: Lines went missing between the files and the output.
    """
    started = time.monotonic()
    with log_progress("looking for files", every=_PROGRESS_SECONDS):
        found = find_files(events_paths, home)
    state = found.state
    # A shell may have expanded one glob to very many paths.
    paths = [shown(path) for path in events_paths[:_PATHS_SHOWN]]
    log.info("scanning files", files=len(state.files), megabytes=state.size // _MIB, paths=paths)
    try:
        with log_progress("scanning files", lambda: {"files": found.scanned}, every=_PROGRESS_SECONDS):
            files = found.scan()
    finally:
        # Logged in case of an error too.
        left_out = found.report()
        for entry in left_out:
            log.warning("files left out", reason=entry.reason, files=entry.files, names=entry.names)
    ensure_folder(target, "GHSYNC_HOME", needed=ROOM + sum(map(_output, files)))
    requested_at = time.monotonic()
    session = spark()
    # The report's seconds are those of reading, not of a JVM that is still starting.
    started += time.monotonic() - requested_at
    tasks = plan_tasks(files, session.sparkContext.defaultParallelism)
    log.info("reading", files=len(files), megabytes=state.size // _MIB, tasks=len(tasks))
    tallies = _decide_all(session, files, tasks, rules, target)
    report = replace(_report(files, left_out, tallies, target, started), input_version=state.version)
    log.info("read", lines=report.lines, events=report.events, quarantined=report.quarantined, seconds=report.seconds)
    return report


def _output(file: InputFile) -> int:
    """Return how many bytes all steps of a run may write for a file: the used fields of its events."""
    return file.size // 2 if file.packing is None else file.size * 2


def _cost(file: InputFile) -> int:
    return file.size * _COST[file.packing] + _FILE_COST


def _largest_piece(files: Sequence[InputFile], cores: int) -> int:
    """Return the highest cost of a task: enough tasks to balance the cores, few enough to be cheap."""
    return min(max(sum(map(_cost, files)) // (cores * _TASKS_A_CORE), _LEAST_PIECE), 64 * _MIB)


def plan_tasks(files: Sequence[InputFile], cores: int) -> list[list[Piece]]:
    """Assign the files to tasks, the costly ones first.

    A plain file of lines that costs more than one task may is cut into ranges, each a task of its own. A packed file
    is read whole. Small files share tasks.
    """
    largest = _largest_piece(files, cores)
    tasks: list[tuple[int, list[Piece]]] = []
    shared: list[Piece] = []
    shared_cost = 0
    for number, file in enumerate(files):
        cost = _cost(file)
        if cost > largest and file.packing is None and file.has_lines and not file.is_utf16:
            count = -(-file.size // largest)
            bounds = [file.size * part // count for part in range(count + 1)]
            tasks += [(cost // count, [Piece(number, file, *pair)]) for pair in pairwise(bounds)]
            continue
        if shared and shared_cost + cost > largest:
            tasks.append((shared_cost, shared))
            shared, shared_cost = [], 0
        shared.append(Piece(number, file))
        shared_cost += cost
    if shared:
        tasks.append((shared_cost, shared))
    return [pieces for _, pieces in sorted(tasks, key=lambda task: -task[0])]


def _decide_all(
    session: SparkSession, files: Sequence[InputFile], tasks: Sequence[list[Piece]], rules: Sequence[Rule], target: Path
) -> list[Tally]:
    """Decide every line on Spark's workers; return their counts, and keep only the parts that they name.

    Raises:
        InputError: A file can't be read.
    """
    from ghsync_dagster.stores.spark import TALLY_SCHEMA, spark_errors, to_arrow

    with folder_errors(target):
        for kind in (EVENTS, QUARANTINE, "tasks"):
            (target / kind).mkdir(parents=True)
    for number, pieces in enumerate(tasks):
        write_task(target, number, pieces)
    with spark_errors("Reading events"):
        task = Task(str(target), tuple(rules), latest_time(datetime.now(UTC)), platform.node())
        numbers = session.range(0, len(tasks), 1, len(tasks))
        size, began = sum(file.size for file in files), time.monotonic()
        with log_progress(
            "reading", lambda: _progress(read_progress(target), len(files), size, began), every=_PROGRESS_SECONDS
        ):
            rows = to_arrow(numbers.mapInArrow(task.run, TALLY_SCHEMA))
    shutil.rmtree(target / "tasks")
    tallies = [Tally(**row) for row in rows.to_pylist()]
    _raise_faults([tally.name for tally in tallies if tally.kind == FAULT])
    with folder_errors(target):
        for kind, schema in ((EVENTS, event_schema()), (QUARANTINE, quarantine_schema())):
            _keep_parts(target / kind, {tally.name for tally in tallies if tally.kind == kind}, schema)
        _number_lines(target / QUARANTINE, tasks, tallies)
    return tallies


def _number_lines(folder: Path, tasks: Sequence[list[Piece]], tallies: Sequence[Tally]) -> None:
    """Turn the line numbers of ranges into those of their files: a worker knows only the lines of its own range."""
    pieces = _pieces(tallies)
    for tally in tallies:
        if tally.kind != QUARANTINE:
            continue
        first = tasks[int(tally.name.split("-")[1])][0]
        if first.start:
            before = sum(piece.rows for start, piece in pieces[first.number].items() if start < first.start)
            _add_to_lines(folder / tally.name, before)


def _pieces(tallies: Sequence[Tally]) -> defaultdict[int, dict[int, Tally]]:
    """Return the tallies of pieces, by the index of their file and their first byte."""
    pieces: defaultdict[int, dict[int, Tally]] = defaultdict(dict)
    for tally in tallies:
        if tally.kind == PIECE:
            number, start = map(int, tally.name.split())
            pieces[number][start] = tally
    return pieces


def _add_to_lines(part: Path, before: int) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    unfinished = part.with_name(f".{part.name}")
    schema = quarantine_schema()
    index = schema.get_field_index("line")
    with pq.ParquetFile(part) as old, pq.ParquetWriter(unfinished, schema) as new:
        for batch in old.iter_batches():
            columns = list(batch.columns)
            columns[index] = pc.add(columns[index], before)
            new.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
    unfinished.replace(part)


def _raise_faults(faults: Sequence[str]) -> None:
    """Raise the workers' errors: one that concerns no file alone, such as a full disk, or all unreadable files."""
    errors = [msgspec.json.decode(fault) for fault in sorted(set(faults))]
    for kind, message, way_out in errors:
        if kind != InputError.__name__:
            raise (ConfigError if kind == ConfigError.__name__ else PermanentError)(message, way_out=way_out)
    if errors:
        raise combine_errors([InputError(message, way_out=way_out) for _, message, way_out in errors])


def _progress(done: tuple[int, int], files: int, size: int, started: float) -> dict[str, object]:
    """Return the progress of the tasks, to be logged."""
    files_done, bytes_done = done
    seconds = time.monotonic() - started
    left = {"seconds_left": round(seconds * (size - bytes_done) / bytes_done)} if bytes_done else {}
    megabytes = f"{bytes_done // _MIB} of {size // _MIB}"
    return {"files": f"{files_done} of {files}", "megabytes": megabytes, **left}


def _keep_parts(folder: Path, names: set[str], schema: pa.Schema) -> None:
    """Remove the parts of failed tasks; if no part is left, write an empty one."""
    import pyarrow.parquet as pq

    for file in folder.iterdir():
        if file.name not in names:
            file.unlink()
    if not names:
        pq.ParquetWriter(folder / "part-empty.parquet", schema).close()


def _report(
    files: Sequence[InputFile],
    left_out: list[LeftOut],
    tallies: Sequence[Tally],
    target: Path,
    started: float,
) -> ReadReport:
    """Sum up the workers' counts, and compare them with the files."""
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    pieces = _pieces(tallies)
    for tally in tallies:
        counts[tally.kind] += tally.rows
        if tally.kind == REASON:
            reasons[tally.name] += tally.rows
    for number, file in enumerate(files):
        if (size := sum(piece.bytes for piece in pieces[number].values())) != file.size:
            raise changed(file.path, file.size, size)
    stored = {kind: count_rows(target / kind) for kind in (EVENTS, QUARANTINE)}
    if counts[PIECE] != sum(stored.values()) + counts[BLANK]:
        raise PermanentError(
            f"{counts[PIECE]} lines went in, but {stored[EVENTS]} events, {stored[QUARANTINE]} quarantined and "
            f"{counts[BLANK]} blank lines came out.",
            way_out="Run again; if it stays, tell us: no file changed meanwhile.",
        )
    return ReadReport(
        events_path=str(target / EVENTS),
        quarantine_path=str(target / QUARANTINE),
        files=[
            FileCount(file.path, sum(piece.rows for piece in pieces[number].values()))
            for number, file in enumerate(files)
        ],
        lines=counts[PIECE],
        events=stored[EVENTS],
        quarantined=stored[QUARANTINE],
        blank=counts[BLANK],
        reasons=dict(reasons.most_common()),
        seconds=round(time.monotonic() - started, 3),
        bytes=sum(file.size for file in files),
        left_out=left_out,
    )
