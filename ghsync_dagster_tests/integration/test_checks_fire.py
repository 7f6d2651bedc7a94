"""Every check fires in a real Dagster run on real parts, stops what it must stop, and says how to recover."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bson import ObjectId, json_util

from ghsync_dagster.batch.flow import BatchFlow
from ghsync_dagster.batch.load import ROUNDS, Step
from ghsync_dagster.definitions import build_defs
from ghsync_dagster.defs.resources import BatchResource, SparkResource

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ghsync_dagster.batch.reports import FlattenReport, LoadReport
    from ghsync_dagster.stores.mongo.users import UserStore

pytestmark = [pytest.mark.integration, pytest.mark.servers("spark")]

BATCH_CHECKS = {
    "quarantined_ratio",
    "users_valid",
    "spark_temp_marked",
    "users_complete",
    "no_spark_temp_left",
    "unique_user_id_index",
    "documents_conform",
}


def _nothing(*_: object) -> None:
    """Stand in for a hook that a test does not need."""


@dataclasses.dataclass(frozen=True)
class HookedFlow(BatchFlow):
    """The real flow, with a place from which a test acts as another program would."""

    after_flatten: Callable[[FlattenReport], None] = _nothing
    at_step: Callable[[Step], None] = _nothing

    def flatten(self) -> FlattenReport:
        """Flatten, then let the test act."""
        report = super().flatten()
        self.after_flatten(report)
        return report

    def load(self, run_id: str, on_step: Callable[[Step], None] = _nothing) -> LoadReport:
        """Load, and let the test act at each step."""

        def both(step: Step) -> None:
            on_step(step)
            self.at_step(step)

        return super().load(run_id, on_step=both)


@dataclasses.dataclass
class Runner:
    """Runs the real jobs in this process on the test's own flow."""

    flow: HookedFlow
    events: Path

    def batch(
        self,
        *,
        max_ratio: float | None = None,
        after_flatten: Callable[[FlattenReport], None] = _nothing,
        at_step: Callable[[Step], None] = _nothing,
    ) -> dg.ExecuteInProcessResult:
        """Run ``users_batch_job`` as from the launchpad."""
        config: dict[str, Any] = {"read_events": {"config": {"events_path": str(self.events)}}}
        if max_ratio is not None:
            config["raw_events_quarantined_ratio"] = {"config": {"max_quarantined_ratio": max_ratio}}
        flow = dataclasses.replace(self.flow, after_flatten=after_flatten, at_step=at_step)
        return self._run("users_batch_job", flow, config)

    def audit(self) -> dg.ExecuteInProcessResult:
        """Run ``users_audit_job``."""
        return self._run("users_audit_job", self.flow, {})

    def _run(self, job: str, flow: BatchFlow, ops: dict[str, Any]) -> dg.ExecuteInProcessResult:
        class TestBatch(BatchResource):
            def build(self, run_id: str | None = None) -> BatchFlow:
                del run_id
                return flow

        defs = build_defs(resource_overrides={"batch": TestBatch(spark=SparkResource())})
        with dg.DagsterInstance.ephemeral() as instance:
            return defs.resolve_job_def(job).execute_in_process(
                run_config={"ops": ops, "loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
                instance=instance,
                raise_on_error=False,
            )


@pytest.fixture
def runner(flow: BatchFlow, tmp_path: Path, event_line: Callable[..., str]) -> Runner:
    """A runner on thirty users in one file."""
    path = tmp_path / "in.json"
    path.write_text("\n".join(event_line(number, f"user-{number}", number=number) for number in range(1, 31)))
    values = {field.name: getattr(flow, field.name) for field in dataclasses.fields(flow)}
    return Runner(HookedFlow(**values), path)


def failed(result: dg.ExecuteInProcessResult) -> dict[str, dict[str, Any]]:
    """Return the metadata of each failed check, with its description, by name."""
    return {
        evaluation.check_name: {key: value.value for key, value in evaluation.metadata.items()}
        | {"description": evaluation.description}
        for evaluation in result.get_asset_check_evaluations()
        if not evaluation.passed
    }


def evaluated(result: dg.ExecuteInProcessResult) -> set[str]:
    return {evaluation.check_name for evaluation in result.get_asset_check_evaluations()}


def materialized(result: dg.ExecuteInProcessResult) -> set[str]:
    events = result.get_asset_materialization_events()
    return {event.asset_key.to_user_string() for event in events if event.asset_key}


def dump(store: UserStore) -> dict[str, str]:
    """Return everything in the test's database, as text."""
    names = store.database.list_collection_names()
    return {
        name: json_util.dumps(
            [
                list(store.database[name].find().sort("_id", 1)),
                [dict(index) for index in store.database[name].list_indexes()],
            ]
        )
        for name in sorted(names)
    }


def test_good_events_pass_every_check_and_a_second_run_changes_nothing(runner: Runner, store: UserStore) -> None:
    result = runner.batch()
    assert result.success
    assert materialized(result) == {"raw_events", "quarantined_events", "users", "mongo_users"}
    assert evaluated(result) == BATCH_CHECKS
    assert failed(result) == {}
    assert store.users.count_documents({}) == 30
    documents = list(store.users.find().sort("_id", 1))
    assert runner.batch().success
    assert list(store.users.find().sort("_id", 1)) == documents


def add_bad_lines(path: Path, lines: int) -> None:
    path.write_text(path.read_text() + "".join(f"\nbad line {number}" for number in range(lines)))


def test_too_many_bad_lines_stop_everything_after_the_read(runner: Runner, store: UserStore) -> None:
    add_bad_lines(runner.events, 10)
    result = runner.batch()
    assert not result.success
    assert materialized(result) == {"raw_events", "quarantined_events"}
    assert evaluated(result) == {"quarantined_ratio"}
    found = failed(result)["quarantined_ratio"]
    assert (found["lines"], found["events"], found["quarantined"], found["ratio"]) == (40, 30, 10, 0.25)
    assert found["allowed"] == pytest.approx(0.01)
    assert len(found["offenders"]) == 10
    assert found["offenders"][0] == {
        "file": str(runner.events),
        "line": 31,
        "reason": "malformed JSON: invalid character (byte 0)",
    }
    assert "GHSYNC_MAX_QUARANTINED_RATIO" in found["way_out"]
    assert dump(store) == {}


def test_at_most_twenty_offenders_are_shown(runner: Runner) -> None:
    add_bad_lines(runner.events, 50)
    found = failed(runner.batch())["quarantined_ratio"]
    assert (found["quarantined"], len(found["offenders"])) == (50, 20)


@pytest.mark.parametrize("content", ["\n \n", "bad\n"])
def test_a_file_without_an_event_stops_everything_after_the_read(
    runner: Runner, store: UserStore, content: str
) -> None:
    runner.events.write_text(content)
    result = runner.batch(max_ratio=1)
    assert not result.success
    assert materialized(result) == {"raw_events", "quarantined_events"}
    assert failed(result)["quarantined_ratio"]["description"].startswith("no event in ")
    assert dump(store) == {}


def test_the_launchpad_can_bear_more_bad_lines_and_the_audit_still_tells_them(runner: Runner, store: UserStore) -> None:
    add_bad_lines(runner.events, 10)
    assert runner.batch(max_ratio=0.25).success
    assert store.users.count_documents({}) == 30
    audit = runner.audit()
    assert not audit.success
    assert set(failed(audit)) == {"quarantined_ratio"}


def rewritten(report: FlattenReport, change: Callable[[list[dict[str, Any]]], Sequence[dict[str, Any]]]) -> None:
    """Rewrite the flattened users as a fault in the code between read and load would leave them."""
    table = pq.read_table(report.users_path)
    rows = change(table.to_pylist())
    for file in Path(report.users_path).iterdir():
        file.unlink()
    pq.write_table(pa.Table.from_pylist(rows, table.schema), Path(report.users_path) / "part-00000.parquet")


@pytest.mark.parametrize(
    ("change", "counts", "shown"),
    [
        (lambda rows: [*rows[1:], rows[0] | {"login": None}], {"login_format": 1}, 1),
        (lambda rows: [row | {"user_id": f"-{row['user_id']}"} for row in rows], {"user_id_positive": 30}, 20),
        (
            lambda rows: [row | {"url": "ftp://x" + "x" * 300} for row in rows[:2]],
            {"url_format": 2, "url_length": 2},
            2,
        ),
        (lambda rows: [*rows, rows[0], rows[1]], {"repeated": 2}, 2),
    ],
    ids=["null", "range", "format and length", "repeated"],
)
def test_users_that_break_a_rule_are_not_loaded(
    runner: Runner,
    store: UserStore,
    change: Callable[[list[dict[str, Any]]], Sequence[dict[str, Any]]],
    counts: dict[str, int],
    shown: int,
) -> None:
    result = runner.batch(after_flatten=lambda report: rewritten(report, change))
    assert not result.success
    assert materialized(result) == {"raw_events", "quarantined_events", "users"}
    found = failed(result)["users_valid"]
    assert {name: found[name] for name in counts} == counts
    assert shown <= len(found["offenders"]) <= 20
    assert "nothing has been loaded" in found["way_out"]
    assert dump(store) == {}


def test_users_of_another_schema_are_not_loaded(runner: Runner, store: UserStore) -> None:
    def with_numbers(report: FlattenReport) -> None:
        for file in Path(report.users_path).iterdir():
            file.unlink()
        pq.write_table(pa.table({"user_id": [1]}), Path(report.users_path) / "part-00000.parquet")

    result = runner.batch(after_flatten=with_numbers)
    assert not result.success
    assert "wrong schema: expected user_id string" in failed(result)["users_valid"]["description"]
    assert dump(store) == {}


def test_a_lost_marker_is_found_though_the_user_is_stored(
    runner: Runner, store: UserStore, event_line: Callable[..., str]
) -> None:
    def unmark(step: Step) -> None:
        if step is Step.PLANNED:
            store.users.update_one({"user_id": "7"}, {"$unset": {"spark_temp": ""}})

    assert runner.batch().success
    renamed = [event_line(key, f"new-{key}", "2015-01-01T16:00:00Z", 100 + key) for key in range(1, 31)]
    runner.events.write_text("\n".join(renamed))
    result = runner.batch(at_step=unmark)
    assert not result.success
    found = failed(result)
    assert set(found) == {"spark_temp_marked"}
    assert (found["spark_temp_marked"]["expected"], found["spark_temp_marked"]["lost"]) == (30, 1)
    assert found["spark_temp_marked"]["offenders"] == [{"user_id": "7"}]
    assert "stop it" in found["spark_temp_marked"]["way_out"]
    assert runner.batch().success


def test_a_user_that_goes_missing_again_and_again_is_found_and_the_next_run_recovers(
    runner: Runner, store: UserStore
) -> None:
    deletions: list[int] = []

    def delete(step: Step) -> None:
        if step is Step.VERSIONED:
            deletions.append(store.users.delete_one({"user_id": "7"}).deleted_count)

    result = runner.batch(at_step=delete)
    assert deletions == [1] * (ROUNDS + 1)
    assert not result.success
    found = failed(result)["users_complete"]
    assert (found["users"], found["missing"], found["unresolved"]) == (30, 1, 1)
    assert found["offenders"] == [{"user_id": "7"}]
    assert "Run users_batch_job again" in found["way_out"]
    again = runner.batch()
    assert again.success
    assert failed(again) == {}
    assert store.users.count_documents({"spark_temp": {"$exists": False}}) == 30


def test_a_user_that_goes_missing_once_is_written_again(runner: Runner, store: UserStore) -> None:
    deletions: list[int] = []

    def delete_once(step: Step) -> None:
        if step is Step.VERSIONED and not deletions:
            deletions.append(store.users.delete_one({"user_id": "7"}).deleted_count)

    result = runner.batch(at_step=delete_once)
    assert deletions == [1]
    assert result.success
    metadata = result.asset_materializations_for_node("mongo_users")[0].metadata
    assert (metadata["missing"].value, metadata["reconciled"].value, metadata["unresolved"].value) == (1, 1, 0)
    assert store.users.count_documents({}) == 30


def leave_a_marker(store: UserStore) -> None:
    store.users.update_one({"user_id": "7"}, {"$set": {"spark_temp": "spark_write"}})


def drop_the_index(store: UserStore) -> None:
    store.users.drop_index("user_id_unique")


def write_around_the_validator(store: UserStore) -> None:
    unchecked = store.users.with_options()
    # What JSON can't hold is to be shown too.
    odd = {"at": datetime.now(UTC), "by": ObjectId(), "raw": b"\xff", "within": {"of": [ObjectId()]}}
    unchecked.insert_one({"user_id": "99", "login": 5, **odd}, bypass_document_validation=True)


def lose_a_user(store: UserStore) -> None:
    store.users.delete_one({"user_id": "7"})


def change_a_user(store: UserStore) -> None:
    store.users.update_one({"user_id": "7"}, {"$set": {"login": "someone-else"}})


STORE_FAULTS: list[tuple[Callable[[UserStore], None], str, Callable[[dict[str, Any]], bool]]] = [
    (
        leave_a_marker,
        "no_spark_temp_left",
        lambda found: found["marked"] == 1 and found["offenders"][0]["user_id"] == "7",
    ),
    (drop_the_index, "unique_user_id_index", lambda found: found["indexes"] == 0),
    (
        write_around_the_validator,
        "documents_conform",
        lambda found: found["broken"] == 1 and found["offenders"][0]["login"] == 5 and "at" in found["offenders"][0],
    ),
]
AUDIT_FAULTS: list[tuple[Callable[[UserStore], None], str, Callable[[dict[str, Any]], bool]]] = [
    (lose_a_user, "users_complete", lambda found: found["offenders"] == [{"user_id": "7", "problem": "not stored"}]),
    (
        change_a_user,
        "users_complete",
        lambda found: found["offenders"] == [{"user_id": "7", "problem": "stored otherwise: login"}],
    ),
]


@pytest.mark.parametrize(("fault", "check", "is_shown"), STORE_FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_fault_of_the_store_right_after_the_load_fails_the_run(
    runner: Runner,
    store: UserStore,
    fault: Callable[[UserStore], None],
    check: str,
    is_shown: Callable[[dict[str, Any]], bool],
) -> None:
    result = runner.batch(at_step=lambda step: fault(store) if step is Step.DONE else None)
    assert not result.success
    assert "mongo_users" in materialized(result)
    found = failed(result)
    assert set(found) == {check}
    assert is_shown(found[check])
    assert found[check]["way_out"]


@pytest.mark.parametrize(
    ("fault", "check", "is_shown"), [*STORE_FAULTS, *AUDIT_FAULTS], ids=lambda value: getattr(value, "__name__", "")
)
def test_the_audit_finds_a_later_fault_of_the_store_and_writes_nothing(
    runner: Runner,
    store: UserStore,
    fault: Callable[[UserStore], None],
    check: str,
    is_shown: Callable[[dict[str, Any]], bool],
) -> None:
    assert runner.batch().success
    fault(store)
    before = dump(store)
    files = {path: path.stat().st_mtime_ns for path in runner.flow.artifacts.root.rglob("*")}
    result = runner.audit()
    assert not result.success
    assert materialized(result) == set()
    assert evaluated(result) == BATCH_CHECKS
    found = failed(result)
    assert set(found) == {check}
    assert is_shown(found[check])
    assert dump(store) == before
    assert {path: path.stat().st_mtime_ns for path in runner.flow.artifacts.root.rglob("*")} == files


def test_the_audit_of_a_good_collection_passes_and_writes_nothing(runner: Runner, store: UserStore) -> None:
    assert runner.batch().success
    before = dump(store)
    result = runner.audit()
    assert result.success
    assert evaluated(result) == BATCH_CHECKS
    assert dump(store) == before


def test_the_audit_before_any_run_fails_with_the_way_out_and_no_check_says_failed(
    runner: Runner, store: UserStore
) -> None:
    result = runner.audit()
    assert not result.success
    failures = [event.step_failure_data.user_failure_data for event in result.all_events if event.is_step_failure]
    words = [failure.description or "" for failure in failures if failure]
    assert words
    assert all("nothing has been materialized there yet" in text for text in words)
    assert "users_valid" not in evaluated(result)
    assert dump(store) == {}
