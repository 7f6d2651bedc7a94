"""The change flow in real Dagster on the real stack: slices, drains, checks, and the supervisor with its hand-overs."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import psutil
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from dagster._core.storage.tags import SENSOR_NAME_TAG

from ghsync_dagster.cdc.stream.consume import ChangeConsumer, ConsumerReport
from ghsync_dagster.dagster_home import ensure_dagster_home
from ghsync_dagster.definitions import build_defs
from ghsync_dagster.defs.batch.columns import USERS_CHANGES
from ghsync_dagster.defs.cdc import jobs
from ghsync_dagster.defs.cdc.checks import CDC_CHECKS
from ghsync_dagster.defs.cdc.jobs import SYNC_JOB, SYNC_OP
from ghsync_dagster.defs.cdc.slice import consume
from ghsync_dagster.defs.ops.alerts import alerts_sensor
from ghsync_dagster.defs.resources import ChangesResource
from ghsync_dagster.domain.user import USER_FIELDS, json_schema
from ghsync_dagster.settings import Settings, load_settings
from ghsync_dagster.stores.kafka.backlog import read_backlog
from ghsync_dagster.stores.kafka.client import consumer_config
from ghsync_dagster.stores.mongo.books import GroupBook
from ghsync_dagster.stores.mongo.users import UserStore
from ghsync_dagster.stores.mysql import MySqlStore
from ghsync_dagster.wiring import existing_kafka
from ghsync_dagster_tests.support.cdc_parts import free_port
from ghsync_dagster_tests.support.long_campaign import HANG_SECONDS, LONG
from ghsync_dagster_tests.support.process_parts import children_of, kill_family, words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

pytestmark = [pytest.mark.integration, pytest.mark.servers("stream")]

ROOT = Path(__file__).parents[2]
QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


class Stack:
    """The running stack of one test, and what a test does with it."""

    def __init__(self, settings: Settings, home: Path) -> None:
        self.settings = settings
        self.home = home
        self.kafka = existing_kafka(settings)
        self.mysql = MySqlStore(_secret(settings.mysql_url))

    def insert(self, *keys: int, login: str = "octo") -> None:
        """Insert rows in MySQL, one transaction each."""
        for key in keys:
            values = (key, login, None, "a", f"u{key}")
            self.mysql.execute([("INSERT INTO `Users` VALUES (%s, %s, %s, %s, %s)", values)])

    def produce(self, value: bytes, key: bytes | None = None) -> None:
        """Write a record straight into the topic."""
        producer = Producer({"bootstrap.servers": self.kafka.bootstrap_servers})
        producer.produce(self.kafka.topic, value=value, key=key)
        assert producer.flush(20) == 0

    def await_topic(self, records: int) -> None:
        """Wait until the topic holds so many records that the group has not applied."""
        wait_for(lambda: read_backlog(self.kafka).waiting >= records, f"{records} records in the topic")

    def store(self) -> UserStore:
        """Open the users' collection."""
        return UserStore(_secret(self.settings.mongodb_uri), self.settings.mongodb_database, "Users")

    def stored(self) -> set[str]:
        """The keys of all stored users."""
        with self.store() as store:
            return {found["user_id"] for found in store.users.find({}, {"user_id": 1})}

    def members(self) -> int:
        """How many consumers the group has."""
        admin = AdminClient({"bootstrap.servers": self.kafka.bootstrap_servers})
        [described] = admin.describe_consumer_groups([self.kafka.group_id]).values()
        return len(described.result(20).members)

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of a process that works on this stack."""
        own = {
            "GHSYNC_HOME": str(self.home),
            "DAGSTER_HOME": str(self.home / "dagster"),
            "MONGODB_URI": _secret(self.settings.mongodb_uri),
            "MONGODB_DATABASE": self.settings.mongodb_database,
            "KAFKA_BOOTSTRAP_SERVERS": self.kafka.bootstrap_servers,
            "KAFKA_GROUP_ID": self.kafka.group_id,
            "MYSQL_URL": _secret(self.settings.mysql_url),
            "GHSYNC_CDC_REPORT_SECONDS": "1",
        }
        return {**os.environ, **own, **more}


def _secret(value: Any) -> str:
    assert value is not None
    return str(value.get_secret_value())


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """Wait until something is there; return it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.2)
    raise AssertionError(f"not within {seconds} s: {what}")


@pytest.fixture
def stack(stack_settings: Settings, tmp_path: Path) -> Iterator[Stack]:
    """The stack, with a Dagster home of the test's own."""
    ensure_dagster_home(load_settings(GHSYNC_HOME=tmp_path))
    made = Stack(stack_settings, tmp_path)
    yield made
    made.mysql.close()


@pytest.fixture
def instance(stack: Stack) -> Iterator[dg.DagsterInstance]:
    """The Dagster instance of that home."""
    with dg.DagsterInstance.from_config(str(stack.home / "dagster")) as opened:
        yield opened


class InProcess:
    """Runs jobs in this process on the test's stack and instance."""

    def __init__(self, stack: Stack, instance: dg.DagsterInstance) -> None:
        class Changes(ChangesResource):
            def settings(self) -> Settings:
                return stack.settings.model_copy(update={"cdc_report_seconds": 0.5, "retry_attempts": 1})

        self.defs = build_defs({"changes": Changes()})
        self.instance = instance

    def run(self, job: str, config: Mapping[str, Mapping[str, Any]] | None = None, **more: Any) -> Any:
        """Run a job with config by op; return the result."""
        ops = {op: {"config": values} for op, values in (config or {}).items()}
        return self.defs.resolve_job_def(job).execute_in_process(
            run_config={"ops": ops, **QUIET}, instance=self.instance, raise_on_error=False, **more
        )


@pytest.fixture
def runs(stack: Stack, instance: dg.DagsterInstance) -> InProcess:
    """What runs jobs in this process."""
    return InProcess(stack, instance)


def observations(instance: dg.DagsterInstance, run_id: str | None = None) -> list[dict[str, Any]]:
    """The metadata of all observations of the changes, oldest first."""
    records = instance.fetch_observations(dg.AssetKey(USERS_CHANGES), limit=1_000, ascending=True).records
    return [
        {name: value.value for name, value in record.asset_observation.metadata.items()}
        for record in records
        if record.asset_observation and run_id in (None, record.run_id)
    ]


def job_command(job: str, *more: str) -> list[str]:
    """The command line that CI uses."""
    return [sys.executable, "-m", "dagster", "job", "execute", "-m", "ghsync_dagster.definitions", "-j", job, *more]


# Slices


def test_a_slice_applies_observes_and_ends_by_its_time(stack: Stack, runs: InProcess) -> None:
    stack.insert(*range(1, 101))
    stack.await_topic(100)
    result = runs.run(SYNC_JOB, {SYNC_OP: {"seconds": 6}})
    assert result.success
    assert stack.stored() == {str(key) for key in range(1, 101)}
    seen = observations(runs.instance)
    # One at the start, one every half second, one at the end; never one a change.
    assert 5 <= len(seen) <= 16
    last = seen[-1]
    assert (last["records"], last["records_applied"]) == (100, 100)
    # The last one is logged when the group is left.
    assert "lag_records" not in last
    assert [one["lag_records"] for one in seen if "lag_records" in one][-1] == 0
    assert (last["errors"], last["dead_letters"]) == (0, 0)
    busy = max(seen, key=lambda one: one["interval_records"])
    assert busy["interval_records"] > 0
    assert 0 <= busy["kafka_to_write_p50_ms"] <= busy["kafka_to_write_p95_ms"] <= busy["kafka_to_write_p99_ms"]
    assert busy["kafka_to_write_p99_ms"] <= busy["kafka_to_write_max_ms"]
    assert last["details"]["by_operation"] == {"c": {"applied": 100}}
    assert last["details"]["group"] == stack.kafka.group_id
    assert stack.members() == 0


def test_sigterm_ends_a_slice_cleanly(stack: Stack, instance: dg.DagsterInstance) -> None:
    config = stack.home / "run.yaml"
    config.write_text(f"ops: {{{SYNC_OP}: {{config: {{seconds: 600}}}}}}")
    command = job_command(SYNC_JOB, "-c", str(config))
    with (stack.home / "out").open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=stack.environment(), stdout=out, stderr=out)
    try:
        stack.insert(1, 2, 3)
        wait_for(lambda: stack.stored() == {"1", "2", "3"}, "the rows are stored")
        wait_for(lambda: any(one["records"] >= 3 for one in observations(instance)), "an observation of them")
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        code = process.wait(30)
    finally:
        process.kill()
    assert code == 0, (stack.home / "out").read_text()
    assert time.monotonic() - asked < 15
    (run,) = instance.get_runs()
    assert run.status == dg.DagsterRunStatus.SUCCESS
    assert read_backlog(stack.kafka).waiting == 0
    assert stack.members() == 0


def test_a_terminated_run_ends_cleanly_as_canceled(stack: Stack, runs: InProcess) -> None:
    stack.insert(1)

    def terminate() -> None:
        wait_for(lambda: stack.stored() == {"1"}, "the row is stored")
        (run,) = runs.instance.get_runs()
        # What Dagster's launchers do: note it, then interrupt the process.
        runs.instance.report_run_canceling(run)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=terminate)
    thread.start()
    with pytest.raises(dg.DagsterExecutionInterruptedError):
        runs.defs.resolve_job_def(SYNC_JOB).execute_in_process(
            run_config={"ops": {SYNC_OP: {"config": {"seconds": 300}}}, **QUIET}, instance=runs.instance
        )
    thread.join()
    (run,) = runs.instance.get_runs()
    assert run.status == dg.DagsterRunStatus.CANCELED
    assert read_backlog(stack.kafka).waiting == 0
    assert stack.members() == 0


def test_a_run_that_dagster_holds_for_failed_stops_by_itself(stack: Stack, runs: InProcess) -> None:
    def note_as_failed() -> None:
        (run,) = wait_for(lambda: observations(runs.instance) and runs.instance.get_runs(), "a run at work")
        runs.instance.report_run_failed(run)

    thread = threading.Thread(target=note_as_failed)
    thread.start()
    started = time.monotonic()
    with pytest.raises(dg.DagsterExecutionInterruptedError):
        runs.defs.resolve_job_def(SYNC_JOB).execute_in_process(
            run_config={"ops": {SYNC_OP: {"config": {"seconds": 300}}}, **QUIET}, instance=runs.instance
        )
    thread.join()
    assert time.monotonic() - started < 60
    assert stack.members() == 0


def test_a_permanent_error_fails_the_run_with_its_kind_and_way_out(stack: Stack, runs: InProcess) -> None:
    stack.insert(1, 2)
    stack.await_topic(2)
    low = read_backlog(stack.kafka).partitions[0].low
    config = {"bootstrap.servers": stack.kafka.bootstrap_servers, "group.id": stack.kafka.group_id}
    consumer = Consumer({**config, "enable.auto.commit": False})
    consumer.commit(offsets=[TopicPartition(stack.kafka.topic, 0, low)], asynchronous=False)
    consumer.close()
    admin = AdminClient({"bootstrap.servers": stack.kafka.bootstrap_servers})
    [deleted] = admin.delete_records([TopicPartition(stack.kafka.topic, 0, low + 2)]).values()
    deleted.result(20)
    result = runs.run(SYNC_JOB, {SYNC_OP: {"seconds": 60}})
    assert not result.success
    failure = result.failure_data_for_node(SYNC_OP).user_failure_data
    assert failure.metadata["kind"].value == "permanent"
    assert "new snapshot" in failure.metadata["way_out"].value
    assert observations(runs.instance)[-1]["details"]["errors_by_class"] == {"PermanentError": 1}
    lag = runs.run("cdc_audit_job", op_selection=["users_changes_kafka_lag"]).get_asset_check_evaluations()[0]
    assert not lag.passed
    assert lag.metadata["lost"].value == 2


# Drains


def drain(stack: Stack, **environment: str) -> subprocess.CompletedProcess[str]:
    """Drain as CI does."""
    command = job_command("cdc_drain_job")
    environment = stack.environment(**environment)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS)


def test_a_drain_consumes_to_the_end_and_ends_with_zero(stack: Stack) -> None:
    stack.insert(*range(1, 51))
    stack.await_topic(50)
    done = drain(stack)
    assert done.returncode == 0, done.stderr
    assert stack.stored() == {str(key) for key in range(1, 51)}
    assert read_backlog(stack.kafka).waiting == 0
    # Again: there is nothing, and it ends all the same.
    assert drain(stack).returncode == 0


def test_a_drain_that_makes_a_dead_letter_ends_with_one(stack: Stack) -> None:
    stack.insert(1)
    stack.await_topic(1)
    stack.produce(b'{"op": "c", "after": ', key=b'{"user_id": 2}')
    done = drain(stack)
    assert done.returncode == 1
    assert "new_dead_letters: 1 new dead letters (at most 0 may be)" in done.stderr
    # What was good is applied, and the record is not made a dead letter twice.
    assert stack.stored() == {"1"}
    assert drain(stack).returncode == 0


def test_a_dead_letter_that_another_consumer_makes_fails_the_drain_too(
    stack: Stack, runs: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack.produce(b"no JSON")

    def after_another(*arguments: Any, **more: Any) -> ConsumerReport:
        ChangeConsumer(stack.kafka, stack.store).run(threading.Event(), until_end=True, seconds=60)
        return consume(*arguments, **more)

    monkeypatch.setattr(jobs, "consume", after_another)
    result = runs.run("cdc_drain_job")
    assert not result.success
    assert "new_dead_letters: 1 new" in result.failure_data_for_node("gate_drain").user_failure_data.description
    monkeypatch.undo()
    assert runs.run("cdc_drain_job").success


def test_dead_letters_that_are_allowed_fail_no_drain(stack: Stack, runs: InProcess) -> None:
    stack.produce(b"no JSON")
    stack.produce(b"no JSON either")
    assert runs.run("cdc_drain_job", {"gate_drain": {"max_new_dead_letters": 2}}).success
    found = runs.run("cdc_audit_job", op_selection=["users_changes_dead_letters_empty"])
    (check,) = found.get_asset_check_evaluations()
    assert not check.passed
    assert check.metadata["dead_letters"].value == 2
    assert check.metadata["offenders"].value[0]["kind"] == "not-json"


def test_a_drain_fails_on_a_document_that_breaks_the_contract(stack: Stack, runs: InProcess) -> None:
    with stack.store() as store:
        store.ensure_collection()
        store.database.command("collMod", "Users", validator={}, validationLevel="off")
        store.users.insert_one({"user_id": "7", "login": 3})
        store.database.command("collMod", "Users", validator={"$jsonSchema": json_schema()}, validationLevel="strict")
    result = runs.run("cdc_drain_job")
    assert not result.success
    failure = result.failure_data_for_node("gate_drain").user_failure_data
    assert "documents_conform: 1 stored documents break the contract" in failure.description
    assert failure.metadata["kind"].value == "data"


def test_a_drain_fails_without_the_unique_index(stack: Stack, runs: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    def and_somebody_drops_it(*arguments: Any, **more: Any) -> ConsumerReport:
        report = consume(*arguments, **more)
        with stack.store() as store:
            store.users.drop_index("user_id_unique")
        return report

    stack.insert(1)
    stack.await_topic(1)
    monkeypatch.setattr(jobs, "consume", and_somebody_drops_it)
    result = runs.run("cdc_drain_job")
    assert not result.success
    failure = result.failure_data_for_node("gate_drain").user_failure_data
    assert "unique_user_id_index" in failure.description


def test_a_drain_that_may_not_go_on_long_enough_fails(stack: Stack, runs: InProcess) -> None:
    stack.insert(1)
    stack.await_topic(1)
    result = runs.run("cdc_drain_job", {"drain_changes": {"timeout_seconds": 0.001}})
    assert not result.success
    assert "1 changes that were there at the start are not applied" in str(
        result.failure_data_for_node("drain_changes").user_failure_data.description
    )


def test_a_drain_that_could_not_heed_a_note_to_go_back_fails(stack: Stack, runs: InProcess) -> None:
    stack.insert(1)
    stack.await_topic(1)
    assert runs.run("cdc_drain_job").success
    with stack.store() as store:
        GroupBook(store).request_rewind({f"{stack.kafka.group_name}/0": 0})
    # Another consumer has the partition, and hangs.
    hanging = Consumer(consumer_config(stack.kafka))
    try:
        hanging.subscribe([stack.kafka.topic])
        wait_for(lambda: hanging.poll(0.1) or hanging.assignment(), "the partition")
        result = runs.run("cdc_drain_job", {"drain_changes": {"timeout_seconds": 3}})
    finally:
        # Its close may block forever while partitions are still to come or go.
        hanging.unsubscribe()
        wait_for(lambda: hanging.poll(0.1) or not hanging.assignment(), "the end of its partition")
        hanging.close()
    assert not result.success
    assert "whether changes are to be applied again" in str(
        result.failure_data_for_node("drain_changes").user_failure_data.description
    )
    assert runs.run("cdc_drain_job").success
    with stack.store() as store:
        assert GroupBook(store).pending_rewinds([f"{stack.kafka.group_name}/0"]) == {}


# Checks


def test_the_collection_is_in_step_with_mysql_until_somebody_else_writes(stack: Stack, runs: InProcess) -> None:
    stack.insert(*range(1, 21))
    stack.await_topic(20)
    stack.produce(b"{", key=b'{"user_id":4}')
    assert runs.run("cdc_drain_job", {"gate_drain": {"max_new_dead_letters": 1}}).success
    audit = {"mongo_users_in_step_with_mysql": {"patience_seconds": 1.0}}
    chosen = ["mongo_users_in_step_with_mysql"]
    (check,) = runs.run("cdc_audit_job", audit, op_selection=chosen).get_asset_check_evaluations()
    assert check.passed
    assert (check.metadata["rows"].value, check.metadata["documents"].value) == (20, 20)
    with stack.store() as store:
        store.users.update_one({"user_id": "3"}, {"$set": {"login": "evil"}})
        store.users.delete_one({"user_id": "4"})
        store.users.insert_one({**dict.fromkeys(USER_FIELDS), "user_id": "99"})
    (check,) = runs.run("cdc_audit_job", audit, op_selection=chosen).get_asset_check_evaluations()
    assert not check.passed
    counts = {name: check.metadata[name].value for name in ("missing", "extra", "different")}
    assert counts == {"missing": 1, "extra": 1, "different": 1}
    assert {offender["user_id"] for offender in check.metadata["offenders"].value} == {"3", "4", "99"}
    assert "1 users have open dead letters" in str(check.metadata["way_out"].value)


def test_the_command_names_users_that_are_wrong_and_a_repair_puts_them_right(stack: Stack) -> None:
    stack.insert(*range(1, 6))
    stack.await_topic(5)
    stack.produce(b"{", key=b'{"user_id":4}')
    _ghsync(stack, "cdc", "drain")
    assert _ghsync(stack, "cdc", "audit").stdout.startswith("equal: 5 rows against 5 documents")
    with stack.store() as store:
        store.users.update_one({"user_id": "3"}, {"$set": {"login": "evil"}})
        store.users.delete_one({"user_id": "4"})
        store.users.insert_one({**dict.fromkeys(USER_FIELDS), "user_id": "99"})
    differing = _ghsync(stack, "cdc", "audit", "--patience", "1")
    assert differing.returncode == 1
    told = {tuple(line.split(maxsplit=2)) for line in differing.stdout.splitlines()[1:]}
    assert told == {("missing", "4"), ("extra", "99"), ("different", "3:", "login: MySQL 'octo', MongoDB 'evil'")}
    assert "docs/operate/runbook.md, in_step_with_mysql" in differing.stderr
    assert "1 users have open dead letters: ghsync dlq list" in differing.stderr
    one = _ghsync(stack, "cdc", "audit", "--patience", "0", "--limit", "1")
    assert (one.returncode, len(one.stdout.splitlines())) == (1, 3)
    assert one.stdout.splitlines()[2].startswith("  ... and 2 more: --limit N")
    for options, named in (((), 3), (("--limit", "2"), 2), (("--limit", "0"), 0)):
        done = _ghsync(stack, "cdc", "audit", "--patience", "0", "--json", *options)
        as_json = json.loads(done.stdout)
        assert (done.returncode, as_json["passed"]) == (1, False)
        assert [as_json["counts"][kind] for kind in ("missing", "extra", "different")] == [1, 1, 1]
        assert (len(as_json["offenders"]), as_json["counts"]["not_named"]) == (named, 3 - named)
    # As docs/operate/runbook.md has it.
    repaired = _ghsync(stack, "cdc", "repair", "--from-audit", "--patience", "0")
    assert repaired.returncode == 0, repaired.stderr
    assert _ghsync(stack, "cdc", "audit").returncode == 0


def _ghsync(stack: Stack, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ghsync_dagster.cli", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=stack.environment(), capture_output=True, text=True, timeout=HANG_SECONDS, check=False
    )


def test_every_check_passes_after_a_drain(stack: Stack, runs: InProcess) -> None:
    stack.insert(1)
    stack.await_topic(1)
    assert runs.run("cdc_drain_job").success
    # The row waited for the drain to start: as long as this machine takes for that.
    result = runs.run("cdc_audit_job", {"users_changes_cdc_latency": {"max_latency_ms": 60_000.0}})
    assert result.success
    assert {check.check_name: check.passed for check in result.get_asset_check_evaluations()} == {
        "connector_running": True,
        "kafka_lag": True,
        "cdc_latency": True,
        "dead_letters_empty": True,
        "source_settings": True,
        "in_step_with_mysql": True,
    }


def test_a_lag_that_stays_is_told_beside_the_differences(stack: Stack, runs: InProcess) -> None:
    stack.insert(1)
    stack.await_topic(1)
    config = {"mongo_users_in_step_with_mysql": {"patience_seconds": 0.2, "lag_wait_seconds": 0.5}}
    chosen = ["mongo_users_in_step_with_mysql"]
    (check,) = runs.run("cdc_audit_job", config, op_selection=chosen).get_asset_check_evaluations()
    assert not check.passed
    assert "1 changes were still waiting for the consumer" in str(check.description)


# The supervisor


@pytest.mark.faults
@LONG
def test_the_supervisor_hands_over_and_replaces_a_killed_slice(stack: Stack, instance: dg.DagsterInstance) -> None:
    """Slices of 40 s, one killed -9; changes come all the time, and all are applied."""
    port = free_port()
    command = [sys.executable, "-m", "dagster", "dev", "-m", "ghsync_dagster.definitions", "--port", str(port)]
    environment = stack.environment(GHSYNC_CDC_SLICE_SECONDS="40")
    with (stack.home / "out").open("wb") as out:
        dev = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        first = wait_for(lambda: _running(instance), "the first slice", 60)
        assert first.tags[SENSOR_NAME_TAG] == "cdc_supervisor"
        wait_for(lambda: observations(instance, first.run_id), "its observation")
        stack.insert(1)
        wait_for(lambda: stack.stored() == {"1"}, "the row")
        _worker(instance, first).kill()
        second = wait_for(lambda: _running(instance, other_than={first.run_id}), "the next slice", 60)
        failed = instance.get_run_by_id(first.run_id)
        assert failed
        assert failed.status == dg.DagsterRunStatus.FAILURE
        stack.insert(2)
        wait_for(lambda: "2" in stack.stored(), "the row after the kill")
        third = wait_for(lambda: _running(instance, other_than={first.run_id, second.run_id}), "the third slice", 60)
        # At the hand-over both live.
        still = instance.get_run_by_id(second.run_id)
        assert still
        assert still.status == dg.DagsterRunStatus.STARTED
        keys = itertools.count(3)

        def insert_until_it_ended() -> dg.DagsterRun | None:
            stack.insert(next(keys))
            return _ended(instance, second.run_id)

        ended = wait_for(insert_until_it_ended, "the end of the second slice", 60)
        assert ended.status == dg.DagsterRunStatus.SUCCESS
        inserted = next(keys)
        stack.insert(inserted)
        wait_for(lambda: len(stack.stored()) == inserted, "all rows")
        wait_for(lambda: any(one["records"] for one in observations(instance, third.run_id)), "the third at work")
        workers = children_of(dev.pid)
        os.killpg(dev.pid, signal.SIGINT)
        dev.wait(60)
        psutil.wait_procs(workers, timeout=30)
        assert [words(worker) for worker in workers if worker.is_running()] == []
        assert stack.members() == 0
    finally:
        kill_family(dev.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(dev.pid, signal.SIGKILL)


def _running(instance: dg.DagsterInstance, other_than: set[str] | None = None) -> dg.DagsterRun | None:
    started = instance.get_runs(dg.RunsFilter(job_name=SYNC_JOB, statuses=[dg.DagsterRunStatus.STARTED]))
    return next((run for run in started if run.run_id not in (other_than or ())), None)


def _ended(instance: dg.DagsterInstance, run_id: str) -> dg.DagsterRun | None:
    run = instance.get_run_by_id(run_id)
    return run if run and run.is_finished else None


def _worker(instance: dg.DagsterInstance, run: dg.DagsterRun) -> psutil.Process:
    """The process of a run, by what it logged at its start."""
    for entry in instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ENGINE_EVENT):
        words = entry.dagster_event.message if entry.dagster_event else None
        if words and words.startswith("Started process for run (pid: "):
            return psutil.Process(int(words.removeprefix("Started process for run (pid: ").removesuffix(").")))
    raise AssertionError("the run's process is not known")


def test_the_audit_job_ends_with_one_where_a_check_did_not_pass_and_each_is_one_alert(
    stack: Stack, instance: dg.DagsterInstance
) -> None:
    stack.insert(1, 2)
    stack.await_topic(2)
    assert drain(stack).returncode == 0

    def audit() -> subprocess.CompletedProcess[str]:
        # The rows waited for the drain to start: as long as this machine takes for that.
        environment = stack.environment(GHSYNC_MAX_LATENCY_MS="100000")
        command = job_command("cdc_audit_job")
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS, check=False
        )

    done = audit()
    assert done.returncode == 0, done.stderr
    with stack.store() as store:
        store.users.update_one({"user_id": "1"}, {"$set": {"login": "evil"}})
    stack.produce(b"no JSON")
    assert ChangeConsumer(stack.kafka, stack.store).run(threading.Event(), until_end=True, seconds=60).dead_letters
    done = audit()
    assert done.returncode == 1
    assert "Checks did not pass: " in done.stderr
    runs = instance.get_runs(dg.RunsFilter(job_name="cdc_audit_job"))
    assert [run.status for run in runs] == [dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.SUCCESS]
    # All checks were evaluated, though two did not pass.
    records = instance.get_records_for_run(runs[0].run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION).records
    found = [record.event_log_entry.asset_check_evaluation for record in records]
    assert {one.check_name for one in found if one} == set(CDC_CHECKS)
    failed = {one.check_name for one in found if one and not one.passed}
    assert failed == {"dead_letters_empty", "in_step_with_mysql"}
    context = dg.build_sensor_context(instance=instance, cursor='{"logged":0,"posted":0}')
    assert "2 alerts" in str(alerts_sensor.evaluate_tick(context).skip_message)
