"""One read of files in a process of its own: ``python files_once.py READER FILES SCRATCH`` prints what it took as JSON.

Belongs here: what runs on any build of ghsync, which is the one on PYTHONPATH. Not here: anything of this build alone.

Spark and its Python workers, one a core, are warm when the clock starts: a read of few events came before.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pyarrow as pa
    from pyspark.sql import SparkSession


def tree_seconds() -> float:
    """Return the CPU seconds of this process, its JVM and its workers so far."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def read_ours(session: SparkSession, files: str, target: Path) -> int:
    """Read by ghsync: every line decided, events and quarantine as Parquet."""
    from ghsync_dagster.batch.read import read_events
    from ghsync_dagster.domain.user import BUILT_IN_RULES

    target.mkdir()
    return read_events(lambda: session, [files], target, BUILT_IN_RULES).events


def read_spark(session: SparkSession, files: str, target: Path) -> int:
    """Read by Spark's own reader, told the schema, and write the same columns as Parquet; no line is judged."""
    from ghsync_dagster.batch.reports import count_rows
    from ghsync_dagster.stores.spark import EVENT_SCHEMA

    session.read.schema(EVENT_SCHEMA).json(files).write.parquet(str(target))
    return count_rows(target)


def warm(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Have a worker import what it will need, long enough for every core to get one."""
    import pyarrow.parquet  # noqa: F401

    import ghsync_dagster.batch.decide  # noqa: F401

    time.sleep(1)
    yield from batches


def main() -> None:
    """Read once and print seconds, CPU seconds and events."""
    import ghsync_dagster
    from ghsync_dagster.settings import load_settings
    from ghsync_dagster.wiring import spark_handle

    build = Path(ghsync_dagster.__file__).parent.parent
    # Spark's Python workers look for packages in the working folder first.
    os.chdir(build)
    reader, files, scratch = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    read: Callable[[SparkSession, str, Path], int] = {"ours": read_ours, "spark": read_spark}[reader]
    handle = spark_handle(load_settings(GHSYNC_HOME=scratch / "home"))
    session = handle.session()
    first = scratch / "first.json"
    with first.open("wb") as few, next(iter(_plain_files(Path(files)))).open("rb") as many:
        few.writelines(line for _, line in zip(range(500), many, strict=False))
    read(session, str(first), scratch / "first")
    cores = session.sparkContext.defaultParallelism
    session.range(0, cores, 1, cores).mapInArrow(warm, "id long").collect()
    cpu, began = tree_seconds(), time.perf_counter()
    events = read(session, files, scratch / "out")
    seconds = time.perf_counter() - began
    taken = {
        "build": str(build),
        "seconds": round(seconds, 3),
        "cpu_seconds": round(tree_seconds() - cpu, 2),
        "events": events,
    }
    handle.stop()
    sys.stdout.write(f"\n{json.dumps(taken)}\n")


def _plain_files(files: Path) -> list[Path]:
    """Return a plain file of events, of the input itself or alongside it."""
    return [*([files] if files.suffix == ".json" else []), *sorted(files.parent.glob("*.json"))]


if __name__ == "__main__":
    main()
