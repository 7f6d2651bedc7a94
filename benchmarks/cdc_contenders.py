"""Who is measured on the way from Kafka to MongoDB, and how a run goes.

Belongs here: starting a contender, knowing when it begins and when it is done, what it tells. Not here: the events,
measuring processes, or comparing results.

The rule, for all who read Kafka: a contender starts and applies the snapshot, which is its warm-up. Then the
transaction is ended behind which the changes are, and the clock starts. It stops when the last change is in the
collection. Who does not read Kafka writes the snapshot first too, and tells its own seconds.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymongo import MongoClient

from benchmarks import harness, results
from benchmarks.cdc_events import History, Topic
from benchmarks.contenders import COLLECTION, PEERS, check_users, inherited_environment, parse_output, program
from benchmarks.harness import BenchmarkError
from benchmarks.peers.kafka_sink import DEAD

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from benchmarks.peers.kafka_sink import Worker

LOOK_SECONDS = 0.005
SETTLE_SECONDS = 1.0
END_SECONDS = 60.0
RAW_BATCH = 5_000
OURS, SINK, RAW = "ours", "sink", "raw"
WORDS = {
    OURS: "ghsync cdc run",
    SINK: "mongo-kafka sink connector, ordered",
    RAW: "pymongo bulk_write of the same operations",
}


@dataclass(frozen=True)
class Bench:
    """What stays the same through all runs.

    Attributes:
        folder: Where the store's files and the contenders' homes go.
        scratch: Where outputs of contenders go.
        bootstrap: The broker.
        broker_pid: Its process.
        worker: What the sink's Connect worker is made of.
        timeout_seconds: How long one run may take, its start and warm-up apart as long again.
    """

    folder: Path
    scratch: Path
    bootstrap: str
    broker_pid: int
    worker: Worker
    timeout_seconds: float

    def run(self, name: str, history: History, round_number: int, operations: int | None) -> results.Run:
        """Run a contender once on a new topic and an empty store, and check what it left.

        Args:
            name: ``OURS``, ``SINK`` or ``RAW``.
            history: The input.
            round_number: Which time around, from 1.
            operations: Of ``RAW``: how many operations the changes are to coalesce to, if that is known.

        Raises:
            BenchmarkError: It failed, took too long, or left something else than was due.
        """
        with (
            harness.embedded_store(self.folder) as store,
            tempfile.TemporaryDirectory(prefix="home-", dir=self.folder) as home,
        ):
            _prepare(store)
            once = _Once(self, history, store, Path(home))
            outcome = once.raw(operations) if name == RAW else once.consume(_CONSUMERS[name](once))
            content = check_users(name, store, history.due)
            stored_mb = store.stored_mb()
        case = history.case
        return results.Run(
            contender=name,
            events=case.events,
            case=case.words,
            round=round_number,
            phases={},
            stored_mb=stored_mb,
            documents=content.documents,
            **outcome,
        )


def _prepare(store: harness.Store) -> None:
    """Give all contenders the same collection: the contract's validator and the unique index."""
    from ghsync_dagster.stores.mongo.users import UserStore

    with UserStore(store.uri, store.database, COLLECTION) as opened:
        opened.ensure_collection()


@dataclass(frozen=True)
class _Consumer:
    """A contender that reads Kafka.

    Attributes:
        name: Which.
        command: Makes its command line from the topic's name.
        environment: Makes its whole environment from the topic's name.
        tells: Reads the numbers that it tells from its output; raises where they are not as they should be.
        dead: What stands in its log once it has failed, though its process goes on.
    """

    name: str
    command: Callable[[str], list[str]]
    environment: Callable[[str], Mapping[str, str]]
    tells: Callable[[str, History], dict[str, int]]
    dead: str | None = None


@dataclass(frozen=True)
class _Once:
    """One run."""

    bench: Bench
    history: History
    store: harness.Store
    home: Path

    def consume(self, consumer: _Consumer) -> dict[str, Any]:
        """Run a contender that reads Kafka, and return what was measured."""
        bench = self.bench
        with Topic(bench.bootstrap, f"bench-{uuid.uuid4().hex[:12]}") as topic:
            topic.fill(self.history)
            with (
                _Watch(self.store, self.history.last_key, consumer.dead) as watch,
                harness.measured(
                    consumer.command(topic.name),
                    consumer.environment(topic.name),
                    bench.scratch,
                    name=consumer.name,
                    server_pid=self.store.pid,
                    # This process looks at the collection meanwhile.
                    alongside=(bench.broker_pid, os.getpid()),
                ) as process,
            ):
                watch.wait(present=True, process=process, seconds=bench.timeout_seconds)
                # What follows the last write of the snapshot, such as a commit, is not to fall into the run.
                time.sleep(SETTLE_SECONDS)
                process.check_alive()
                before = process.mark()
                topic.open()
                watch.wait(present=False, process=process, seconds=bench.timeout_seconds)
                after = process.mark()
                _end(process)
            told = consumer.tells(process.output.read_text(encoding="utf-8"), self.history)
        return {
            "seconds": round(after.at - before.at, 3),
            "cpu_seconds": round(after.cpu_seconds - before.cpu_seconds, 2),
            "store_cpu_seconds": round(after.server_cpu_seconds - before.server_cpu_seconds, 2),
            "foreign_cores": after.foreign_cores(before),
            "counts": told,
            **_memory(process.usage, process.server_usage),
            "load_average": round(process.load_average, 2),
        }

    def raw(self, operations: int | None) -> dict[str, Any]:
        """Write coalesced operations without Kafka, and return what was measured."""
        size = self.history.batch_size(operations) if operations else RAW_BATCH
        path = self.home / "operations.json"
        self.history.write_operations(path, size)
        finished = harness.run_watched(
            [sys.executable, str(PEERS / "raw_bulk_write.py"), str(path)],
            inherited_environment() | {"MONGODB_URI": self.store.uri, "MONGODB_DATABASE": self.store.database},
            self.bench.scratch,
            name=RAW,
            timeout_seconds=self.bench.timeout_seconds,
            server_pid=self.store.pid,
        )
        told = parse_output(finished.output)
        return {
            "seconds": round(told["seconds"], 3),
            "cpu_seconds": round(told["cpu_seconds"], 2),
            "store_cpu_seconds": None,
            "foreign_cores": finished.foreign_cores,
            "counts": {"operations": told["operations"], "batches": told["batches"]},
            **_memory(finished.usage, finished.server_usage),
            "load_average": finished.load_average,
        }

    @property
    def ours(self) -> _Consumer:
        """Ghsync's own consumer, as its command runs it."""
        ours = {
            "GHSYNC_HOME": str(self.home),
            "MONGODB_URI": self.store.uri,
            "MONGODB_DATABASE": self.store.database,
            "KAFKA_BOOTSTRAP_SERVERS": self.bench.bootstrap,
        }
        return _Consumer(
            OURS,
            lambda _: [program("ghsync"), "cdc", "run", "--json"],
            lambda topic: inherited_environment() | ours | {"KAFKA_TOPIC": topic, "KAFKA_GROUP_ID": f"ours-{topic}"},
            _ours_tells,
        )

    @property
    def sink(self) -> _Consumer:
        """MongoDB's connector in a worker of Kafka Connect."""

        def command(topic: str) -> list[str]:
            return self.bench.worker.command(
                self.home / "worker",
                bootstrap=self.bench.bootstrap,
                topic=topic,
                schemas=self.history.case.schemas,
                uri=self.store.uri,
                database=self.store.database,
                collection=COLLECTION,
            )

        return _Consumer(SINK, command, lambda _: inherited_environment(), lambda _output, _history: {}, DEAD)


_CONSUMERS: dict[str, Callable[[_Once], _Consumer]] = {OURS: lambda once: once.ours, SINK: lambda once: once.sink}


def _ours_tells(output: str, history: History) -> dict[str, int]:
    told = parse_output(output)
    if not told:
        raise BenchmarkError(f"{OURS} did not tell what it did.")
    if letters := told["dead_letters"]:
        raise BenchmarkError(f"{OURS} put records into the dead letters: {letters}.")
    # Each event of the snapshot is of another key, and so an operation of its own.
    operations = told["records"]["applied"] - history.snapshot_size
    return {"operations": operations, "batches": told["batches"], "retries": sum(told["retries"].values())}


def _memory(usage: harness.Usage, server: harness.Usage | None) -> dict[str, float | None]:
    return {
        "peak_mb": usage.total_mb,
        "peak_java_mb": usage.java_mb,
        "peak_other_mb": usage.other_mb,
        "store_peak_mb": server.total_mb if server else None,
    }


def _end(process: harness.Measured) -> None:
    """Ask a contender to end, and see that it ends as one that was asked."""
    child = process.process.child
    child.terminate()
    try:
        code = child.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        raise BenchmarkError(f"{process.name} did not end within {END_SECONDS:.0f} s of SIGTERM.") from None
    if code not in (0, -signal.SIGTERM, 128 + signal.SIGTERM):
        raise BenchmarkError(f"{process.name} exited with {code}. Its last lines:\n{process.tail()}")


class _Watch:
    """Looks whether the user that ends a history is in the collection; ``dead`` as in ``_Consumer``."""

    def __init__(self, store: harness.Store, key: str, dead: str | None = None) -> None:
        self._client = MongoClient[dict[str, Any]](store.uri)
        self._users = self._client[store.database][COLLECTION]
        self._key = key
        self._dead = dead

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def wait(self, *, present: bool, process: harness.Measured, seconds: float) -> None:
        """Wait until the user is there, or is gone.

        Raises:
            BenchmarkError: The process ended meanwhile, or it took too long.
        """
        deadline = time.monotonic() + seconds
        # The server can't be asked to tell of it, so it is asked again and again.
        while (self._users.find_one({"user_id": self._key}, {"_id": 1}) is not None) != present:
            process.check_alive()
            if self._dead and self._dead in process.errors.read_text(encoding="utf-8", errors="replace"):
                raise BenchmarkError(f"{process.name} failed. Its last lines:\n{process.tail()}")
            if time.monotonic() > deadline:
                stage = "the snapshot" if present else "the changes"
                raise BenchmarkError(
                    f"{process.name} did not apply {stage} within {seconds:.0f} s. "
                    f"Way out: raise --timeout, or see its last lines:\n{process.tail()}"
                )
            time.sleep(LOOK_SECONDS)
