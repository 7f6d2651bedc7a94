"""A load that is killed with -9, wherever that hits it, is finished by the next one: nothing lost, nothing twice.

What must be stored is reckoned here from the generated events alone and read by plain pymongo.
``TEST_FAULT_ROUNDS=N`` tries every step and N random moments, in place of a sixth of the steps and few moments.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pymongo import MongoClient

from ghsync_dagster.batch.flow import BatchFlow
from ghsync_dagster.batch.load import Step
from ghsync_dagster.batch.reports import Artifacts, FlattenReport, LoadReport
from ghsync_dagster.domain.user import BUILT_IN_RULES, USER_FIELDS
from ghsync_dagster.stores.mongo.users import UserStore
from ghsync_dagster_tests.support import kill_child
from ghsync_dagster_tests.support.long_campaign import HANG_SECONDS, ROUNDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ghsync_dagster.stores.spark import SparkHandle

pytestmark = [pytest.mark.faults, pytest.mark.servers("spark")]

SEED = int(os.environ.get("TEST_FAULT_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
SIZE = 3_000 if ROUNDS else 1_000
FEW = 100
RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(SEED))
"""Names the whole test run: all of its processes must find the same tests."""
STEPS = list(Step) if ROUNDS else random.Random(RUN).sample(list(Step), len(Step) // 6)  # noqa: S311
BEGINNINGS: list[dict[str, Any]] = [{"step": Step.COMPARED}, {"step": Step.PLANNED}, {"writes": 5}]
EARLY, MIDDLE, LATE = (f"2015-01-01T{hour}:00:00Z" for hour in (15, 16, 17))
Row = dict[str, Any]


def rows_of(keys: range, prefix: str, at: str) -> list[Row]:
    """Make users, each with the event that it comes from."""
    return [
        {
            "user_id": str(key),
            "login": f"{prefix}-{key}",
            "gravatar_id": None if key % 3 else "",
            "avatar_url": f"https://a/{key}",
            "url": f"https://u/{prefix}/{key}",
            "created_at": at,
            "event_id": key,
        }
        for key in keys
    ]


def groups(*sizes: int) -> list[range]:
    """Cut 1, 2, 3, ... into ranges of these sizes."""
    starts = [1 + sum(sizes[:index]) for index in range(len(sizes))]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


REPLACED, CONFIRMED, INSERTED, SAME, NEWER, STREAMED, DELETED = groups(SIZE, SIZE, SIZE, FEW, FEW, FEW, FEW)
FIRST = [
    *rows_of(REPLACED, "a", EARLY),
    *rows_of(CONFIRMED, "a", EARLY),
    *rows_of(SAME, "a", EARLY),
    *rows_of(NEWER, "a", LATE),
]
SECOND = [
    *rows_of(REPLACED, "b", MIDDLE),
    *rows_of(CONFIRMED, "a", MIDDLE),
    *rows_of(INSERTED, "b", MIDDLE),
    *rows_of(SAME, "a", EARLY),
    *rows_of(NEWER, "b", MIDDLE),
    *rows_of(STREAMED, "b", MIDDLE),
    *rows_of(DELETED, "b", MIDDLE),
]
STREAM = [{name: row[name] for name in USER_FIELDS} for row in rows_of(STREAMED, "mysql", EARLY)]
BY_LOAD = sorted(FIRST + SECOND, key=lambda row: (row["created_at"], row["event_id"]))
NEWEST = {row["user_id"]: row for row in BY_LOAD if int(row["user_id"]) < STREAMED.start}


def prepare(artifacts: Artifacts, rows: Sequence[Row]) -> None:
    """Leave users as ``flatten`` would, in no order."""
    shuffled = random.Random(1).sample(list(rows), len(rows))  # noqa: S311
    fields = [(name, pa.string()) for name in (*USER_FIELDS, "created_at")]
    folder = artifacts.new_folder("users")
    table = pa.Table.from_pylist(shuffled, schema=pa.schema([*fields, ("event_id", pa.int64())]))
    pq.write_table(table.slice(0, len(rows) // 2), folder / "part-0.parquet")
    pq.write_table(table.slice(len(rows) // 2), folder / "part-1.parquet")
    artifacts.publish(FlattenReport(str(folder), len(rows), 0.0))


@dataclass
class World:
    """A database that one real load and the stream have written, and a second load's users alongside it."""

    flow: BatchFlow
    uri: str
    database: str
    folder: Path
    restore: Callable[[str], dict[str, Any]]
    ids: dict[str, Any] = field(default_factory=dict)
    children: int = 0

    def begin(self) -> None:
        """Put the database in the state before the second load."""
        with self.flow.open_store() as store:
            store.client.drop_database(self.database)
        self.ids = self.restore(self.database)

    def kill(self, **moment: Any) -> float | None:
        """Load in a process that kills itself; return the load's milliseconds if it was through before."""
        self.children += 1
        home = self.folder / f"child-{self.children}"
        order = kill_child.Order(self.uri, self.database, str(home), str(self.flow.artifacts.root), **moment)
        command = [sys.executable, kill_child.__file__, msgspec.json.encode(order).decode()]
        environment = os.environ | {"GHSYNC_LOG_LEVEL": "ERROR"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, env=environment)
        assert done.returncode == -9, done.stderr[-3000:]
        return float(done.stdout) if done.stdout else None

    def finish(self, where: str) -> LoadReport:
        """Load again, in this process, and hold what is stored against the events."""
        report = self.flow.load("parent")
        self.assert_right()
        settled = ", ".join(f"{count} {repair}" for repair, count in report.recovered.items()) or "nothing"
        then = f"{report.inserted} inserted, {report.replaced} replaced, {report.confirmed} confirmed"
        sys.stdout.write(f"killed {where}: recovery settled {settled}; then {then}\n")
        return report

    def assert_right(self) -> None:
        """Hold what is stored against the events, and that nothing is half done."""
        with MongoClient[dict[str, Any]](self.uri) as client:
            database = client[self.database]
            stored = {found["user_id"]: found for found in database["Users"].find()}
            assert database["Users"].count_documents({}) == len(stored)
            entries = list(database["_ghsync_versions"].find())
            assert database["Users"].index_information()["user_id_unique"]["unique"]
            assert database["_ghsync_undo"].count_documents({}) == 0
            assert database["_ghsync_loads"].distinct("state") == ["done"]
            assert database["_ghsync_leases"].count_documents({}) == 0
            assert database["_ghsync_deleted"].count_documents({}) == len(DELETED)
        assert {key: found.pop("_id") for key, found in stored.items() if key in self.ids} == self.ids
        for found in stored.values():
            found.pop("_id", None)
        expected = {key: {name: row[name] for name in USER_FIELDS} for key, row in NEWEST.items()}
        assert stored == expected | {row["user_id"]: row for row in STREAM}
        versions = {entry["_id"]: (entry["created_at"], entry["id"]) for entry in entries}
        assert versions == {key: (row["created_at"], row["event_id"]) for key, row in NEWEST.items()}

    def assert_no_jvm(self) -> None:
        """Hold that no JVM of a killed process lives on."""
        deadline = time.monotonic() + 30
        while jvms := [process for process in psutil.process_iter() if self._is_ours(process)]:
            assert time.monotonic() < deadline, jvms
            time.sleep(0.1)

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return f"{self.folder}/child-" in " ".join(process.cmdline())
        except psutil.Error:
            return False


@pytest.fixture(scope="module")
def after_first(
    mongo_uri: str, spark: SparkHandle, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """Return a function that puts a database in the state after a real first load, with the stream's part."""
    name = f"test_first_{os.getpid()}"
    artifacts = Artifacts(tmp_path_factory.mktemp("first"))
    prepare(artifacts, FIRST)
    flow = flow_on(mongo_uri, name, spark, artifacts)
    flow.load("first")
    with UserStore(mongo_uri, name, "Users") as store:
        held = {part: list(store.database[part].find()) for part in ("Users", "_ghsync_versions", "_ghsync_loads")}
        store.client.drop_database(name)

    def restore(database: str) -> dict[str, Any]:
        with UserStore(mongo_uri, database, "Users") as target:
            target.ensure_collection()
            for part, documents in held.items():
                target.database[part].insert_many(documents)
            target.users.insert_many([dict(row) for row in STREAM])
            target.book("deleted").insert_many([{"_id": str(key)} for key in DELETED])
            return {found["user_id"]: found["_id"] for found in target.users.find()}

    return restore


def flow_on(uri: str, database: str, spark: SparkHandle, artifacts: Artifacts) -> BatchFlow:
    return BatchFlow(
        artifacts=artifacts,
        spark=spark,
        open_store=lambda: UserStore(uri, database, "Users", timeout_seconds=5),
        rules=BUILT_IN_RULES,
        max_quarantined_ratio=0.01,
        attempts=1,
        lease_wait_seconds=60,
        lease_quiet_seconds=2,
    )


@pytest.fixture
def world(
    after_first: Callable[[str], dict[str, Any]], mongo_uri: str, database: str, spark: SparkHandle, tmp_path: Path
) -> Iterator[World]:
    artifacts = Artifacts(tmp_path / "batch")
    prepare(artifacts, SECOND)
    made = World(flow_on(mongo_uri, database, spark, artifacts), mongo_uri, database, tmp_path, after_first)
    made.begin()
    yield made
    made.assert_no_jvm()


@pytest.mark.parametrize("step", STEPS)
def test_a_load_killed_when_a_step_is_done_is_finished_by_the_next(world: World, step: Step) -> None:
    lose = [str(key) for key in INSERTED[:5]] if step is Step.RECONCILED else []
    assert world.kill(step=step, lose=lose) is None
    world.finish(f"after {step}")
    again = world.flow.load("again")
    assert again.left == {"already stored": len(NEWEST) - FEW, "newer stored": FEW} | {
        "owned by the stream": FEW,
        "deleted by the stream": FEW,
    }
    world.assert_right()


@pytest.mark.parametrize("number", range(ROUNDS or 1))
def test_a_load_killed_at_a_random_moment_is_finished_by_the_next(world: World, number: int) -> None:
    sys.stdout.write(f"TEST_FAULT_SEED={SEED}\n")
    chance = random.Random(f"{SEED}-moment-{number}").random()  # noqa: S311
    longest = 6_000.0
    while True:
        moment = chance * longest
        lived = world.kill(milliseconds=moment)
        if lived is None:
            break
        # It was through before: place the moment within what a load takes here.
        world.assert_right()
        longest = min(lived, longest * 0.9)
        world.begin()
    world.finish(f"{moment:.0f} ms after the lease, round {number}")


@pytest.mark.parametrize("number", range(max(ROUNDS // 3, 1)))
def test_a_load_killed_after_a_random_write_of_its_plan_is_finished_by_the_next(world: World, number: int) -> None:
    sys.stdout.write(f"TEST_FAULT_SEED={SEED}\n")
    writes = random.Random(f"{SEED}-write-{number}").randint(2, 8 * SIZE // 1_000)  # noqa: S311
    while world.kill(writes=writes) is not None:
        # It was through before.
        world.assert_right()
        world.begin()
        writes = max(writes - 3, 1)
    world.finish(f"after write {writes}, round {number}")


@pytest.mark.parametrize("first", BEGINNINGS if ROUNDS else BEGINNINGS[:1], ids=str)
def test_a_recovery_killed_again_and_again_is_finished_by_the_next(world: World, first: dict[str, Any]) -> None:
    assert world.kill(**first) is None
    for writes in (1, 2, 3, 4, 6):
        assert world.kill(writes=writes, step=Step.RECOVERED) is None
    world.finish(f"at {first} and in five recoveries")
