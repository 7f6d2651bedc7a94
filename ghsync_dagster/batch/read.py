"""Read: every line of the input files becomes a typed event, a quarantined line with its reason, or is blank.

Belongs here: how Spark walks the files, and that lines are conserved. What a task does with its lines is
``batch.decide``'s, the look at whole files is ``batch.files``'s.
"""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from ghsync_dagster.batch.decide import BLANK, EVENTS, QUARANTINE, REASON, Tally, Task, event_schema, quarantine_schema
from ghsync_dagster.batch.files import InputFile, find_files, inspect_file
from ghsync_dagster.batch.reports import FileCount, ReadReport, count_rows
from ghsync_dagster.domain.errors import PermanentError
from ghsync_dagster.observability.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import pyarrow as pa
    from pyspark.sql import SparkSession

    from ghsync_dagster.domain.user import Rule

_MIB: Final = 1 << 20
log = get_logger("read")


def read_events(
    spark: Callable[[], SparkSession], events_paths: Sequence[str], target: Path, rules: Sequence[Rule]
) -> ReadReport:
    """Read all files under ``events_paths`` into ``target``.

    Args:
        spark: Gives the session; asked only after the files have been looked at.
        events_paths: Files, folders or globs; a file that several name is read once.
        target: Empty folder for the Parquet output.
        rules: The user rules that decide between event and quarantine.

    Raises:
        InputError: A path or a whole file can't be read as JSON lines.
        PermanentError: Lines went missing between the files and the output.
    """
    started = time.monotonic()
    paths = list(dict.fromkeys(path for spec in events_paths for path in find_files(spec)))
    log.info("looking at the files", files=len(paths), paths=list(events_paths))
    block_size = _block_size(paths)
    with ThreadPoolExecutor(max_workers=4) as pool:
        files = list(pool.map(lambda path: inspect_file(path, block_size), paths))
    asked = time.monotonic()
    session = spark()
    # The report's seconds are those of reading, not of a JVM that is still starting.
    started += time.monotonic() - asked
    log.info("reading", lines=sum(file.lines for file in files), megabytes=sum(f.size for f in files) // _MIB)
    tallies = _decide_all(session, files, block_size, rules, target)
    report = _report(files, tallies, target, started)
    log.info("read", lines=report.lines, events=report.events, quarantined=report.quarantined, seconds=report.seconds)
    return report


def _block_size(paths: Sequence[Path]) -> int:
    """Return how many bytes of a plain file one task reads: enough tasks for the cores, few enough to be cheap."""
    total = sum(path.stat().st_size for path in paths)
    return min(max(total // 16 // _MIB, 2), 64) * _MIB


def _decide_all(
    session: SparkSession, files: Sequence[InputFile], block_size: int, rules: Sequence[Rule], target: Path
) -> list[Tally]:
    """Have Spark's workers decide every line; return what they counted, and keep only the parts that they name."""
    from pyspark.sql import functions as F  # noqa: N812

    from ghsync_dagster.stores.spark import TALLY_SCHEMA, file_blocks, spark_errors

    for kind in (EVENTS, QUARANTINE):
        (target / kind).mkdir(parents=True)
    task = Task(str(target), tuple(rules), block_size, {str(file.path): file.block_lines for file in files})
    with spark_errors("Reading events"), file_blocks(session, block_size):
        lines = (
            session.read.option("lineSep", "\n")
            .text([_as_uri(file.path) for file in files])
            .select(
                F.col("value").cast("binary").alias("value"),
                F.col("_metadata.file_path").alias("file"),
                F.col("_metadata.file_block_start").alias("block"),
            )
        )
        tallies = [Tally(*row) for row in lines.mapInArrow(task.run, TALLY_SCHEMA).collect()]
    for kind, schema in ((EVENTS, event_schema()), (QUARANTINE, quarantine_schema())):
        _keep_parts(target / kind, {tally.name for tally in tallies if tally.kind == kind}, schema)
    return tallies


def _keep_parts(folder: Path, names: set[str], schema: pa.Schema) -> None:
    """Remove what tasks left that did not succeed; leave an empty part where there is none."""
    import pyarrow.parquet as pq

    for file in folder.iterdir():
        if file.name not in names:
            file.unlink()
    if not names:
        pq.ParquetWriter(folder / "part-empty.parquet", schema).close()


def _as_uri(path: Path) -> str:
    # Spark takes a path for a glob; a backslash keeps its special characters.
    return "file:" + "".join(f"\\{char}" if char in "{}[]*?\\" else char for char in str(path))


def _report(files: Sequence[InputFile], tallies: Sequence[Tally], target: Path, started: float) -> ReadReport:
    """Sum up what the workers counted, and hold it against the files."""
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for tally in tallies:
        counts[tally.kind] += tally.rows
        if tally.kind == REASON:
            reasons[tally.name] += tally.rows
    lines = sum(file.lines for file in files)
    stored = {kind: count_rows(target / kind) for kind in (EVENTS, QUARANTINE)}
    if lines != sum(stored.values()) + counts[BLANK]:
        raise PermanentError(
            f"{lines} lines went in, but {stored[EVENTS]} events, {stored[QUARANTINE]} quarantined and "
            f"{counts[BLANK]} blank lines came out.",
            way_out="A file changed while it was read: run again on files that are at rest.",
        )
    return ReadReport(
        events_path=str(target / EVENTS),
        quarantine_path=str(target / QUARANTINE),
        files=[FileCount(str(file.path), file.lines) for file in files],
        lines=lines,
        events=stored[EVENTS],
        quarantined=stored[QUARANTINE],
        blank=counts[BLANK],
        reasons=dict(reasons.most_common()),
        seconds=round(time.monotonic() - started, 3),
    )
