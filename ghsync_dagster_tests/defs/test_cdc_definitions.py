"""The change flow as Dagster sees it: graph, checks, jobs, and the supervising sensor on a real instance."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, cast

import dagster as dg
import msgspec
import pytest
from dagster._core.run_coordinator.queued_run_coordinator import QueuedRunCoordinator
from dagster._daemon.sensor import MIN_INTERVAL_LOOP_TIME

from ghsync_dagster.cdc.dead_letters.index import OpenLetters
from ghsync_dagster.cdc.health.metrics import ChangeMetrics
from ghsync_dagster.cdc.stream.consume import ChangeConsumer, ConsumerReport
from ghsync_dagster.cdc.stream.listener import APPLIED, AppliedBatch, SilentListener
from ghsync_dagster.dagster_home import ensure_dagster_home
from ghsync_dagster.definitions import build_defs, defs
from ghsync_dagster.defs.batch.columns import USERS_CHANGES
from ghsync_dagster.defs.cdc import jobs, metadata, sensors
from ghsync_dagster.defs.cdc import slice as slices
from ghsync_dagster.defs.cdc.checks import CDC_CHECKS, in_step_with_mysql, latency_window, measured_since
from ghsync_dagster.defs.cdc.jobs import SYNC_JOB, SYNC_OP, cdc_sync_job
from ghsync_dagster.defs.cdc.sensors import REPLACED_TAG, cdc_supervisor, end_slice, read_slices
from ghsync_dagster.defs.cdc.supervisor import Phase, Replace, Rules
from ghsync_dagster.defs.gated import gated_executor
from ghsync_dagster.defs.resources import ChangesResource
from ghsync_dagster.domain.errors import RefusedError, UnavailableError
from ghsync_dagster.domain.finding import Finding
from ghsync_dagster.domain.letters import Letter
from ghsync_dagster.domain.source import Effect, Problem
from ghsync_dagster.local import stack
from ghsync_dagster.local.kafka import KafkaServer
from ghsync_dagster.local.supervisor import Record, ServiceStatus
from ghsync_dagster.settings import Settings, load_settings
from ghsync_dagster.stores.kafka.backlog import Backlog, PartitionBacklog
from ghsync_dagster.stores.kafka.client import KafkaSettings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dagster._core.definitions.assets.graph.asset_graph import AssetGraph

    from ghsync_dagster.cdc.stream.listener import ChangeListener

KAFKA = KafkaSettings("127.0.0.1:1", "mysql-server.new_data.Users", "ghsync-users", timeout_seconds=0.5)


@pytest.fixture(autouse=True)
def _no_server_left(tmp_path: Path) -> Iterator[None]:
    """Stop what a check or a slice started in the test's own home, such as the embedded MongoDB."""
    yield
    stack.down(load_settings(GHSYNC_HOME=tmp_path), progress=print)


@pytest.fixture(scope="module")
def graph() -> AssetGraph:
    """The graph of all assets and checks."""
    return defs.resolve_asset_graph()


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    """An instance of the test's own."""
    with dg.DagsterInstance.ephemeral() as opened:
        yield opened


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home in which no server was ever started."""
    monkeypatch.setenv("GHSYNC_HOME", str(tmp_path))
    return tmp_path


def test_the_lineage_leads_from_mysql_through_the_topic_to_the_collection(graph: AssetGraph) -> None:
    parents = {
        key.to_user_string(): {parent.to_user_string() for parent in graph.get(key).parent_keys}
        for key in graph.get_all_asset_keys()
    }
    assert parents["mysql_users"] == set()
    assert parents["users_changes"] == {"mysql_users"}
    assert parents["mongo_users"] == {"users", "users_changes"}
    assert parents["dead_letters"] == {"users_changes"}


def test_the_assets_from_outside_are_external_and_tell_where_they_are(graph: AssetGraph) -> None:
    group = {key for key in graph.get_all_asset_keys() if graph.get(key).group_name == "cdc"}
    assert {key.to_user_string() for key in group} == {"mysql_users", "users_changes", "dead_letters"}
    assert {key.to_user_string() for key in group if graph.get(key).is_external} == {"mysql_users", "users_changes"}
    assert graph.get(dg.AssetKey("mysql_users")).metadata["dagster/table_name"] == "new_data.Users"
    assert "mysql-server.new_data.Users" in graph.get(dg.AssetKey("users_changes")).metadata["topic"]


def test_the_checks_are_on_their_assets_and_block_nothing(graph: AssetGraph) -> None:
    nodes = {key.name: graph.get(key) for key in graph.asset_check_keys if key.name in CDC_CHECKS}
    assert {name: node.key.asset_key.to_user_string() for name, node in nodes.items()} == {
        "connector_running": "users_changes",
        "kafka_lag": "users_changes",
        "cdc_latency": "users_changes",
        "dead_letters_empty": "users_changes",
        "source_settings": "users_changes",
        "in_step_with_mysql": "mongo_users",
    }
    assert not any(node.blocking for node in nodes.values())
    assert all(node.description for node in nodes.values())


def test_the_checks_of_the_change_flow_are_in_a_job_of_their_own() -> None:
    names = {job: {node.name for node in defs.resolve_job_def(job).nodes} for job in _JOBS}
    assert names["cdc_audit_job"] == {
        "users_changes_connector_running",
        "users_changes_kafka_lag",
        "users_changes_cdc_latency",
        "users_changes_dead_letters_empty",
        "users_changes_source_settings",
        "mongo_users_in_step_with_mysql",
    }
    for job in ("users_batch_job", "users_audit_job"):
        assert not names[job] & names["cdc_audit_job"]


_JOBS = ("users_batch_job", "users_audit_job", "cdc_audit_job", "cdc_sync_job", "cdc_drain_job")


@pytest.mark.parametrize(
    ("name", "executor"),
    [
        ("cdc_sync_job", dg.in_process_executor),
        ("cdc_drain_job", dg.in_process_executor),
        ("cdc_audit_job", gated_executor),
    ],
)
def test_steps_run_in_the_process_of_the_run(name: str, executor: dg.ExecutorDefinition) -> None:
    assert defs.resolve_job_def(name).executor_def is executor


def test_the_schedule_of_the_checks_waits_for_a_person() -> None:
    schedule = defs.resolve_schedule_def("cdc_audit_schedule")
    assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED
    assert schedule.job_name == "cdc_audit_job"


def test_the_local_instance_runs_two_slices_at_most_and_watches_runs(tmp_path: Path) -> None:
    home = ensure_dagster_home(load_settings(GHSYNC_HOME=tmp_path))
    with dg.DagsterInstance.from_config(str(home)) as opened:
        limits = opened.get_concurrency_config().run_queue_config
        assert limits is not None
        assert list(limits.tag_concurrency_limits) == [{"key": "ghsync/flow", "value": "cdc", "limit": 2}]
        assert cdc_sync_job.tags["ghsync/flow"] == "cdc"
        assert isinstance(opened.run_coordinator, QueuedRunCoordinator)
        assert opened.run_coordinator.dequeue_interval_seconds == 1
        assert opened.run_monitoring_enabled


# The supervisor


def add_run(instance: dg.DagsterInstance, status: dg.DagsterRunStatus, **more: Any) -> dg.DagsterRun:
    """Put a run of the job on record."""
    return instance.create_run_for_job(cdc_sync_job, status=status, **more)


def start_run(instance: dg.DagsterInstance) -> dg.DagsterRun:
    """Put a run on record that has just begun to run."""
    run = add_run(instance, dg.DagsterRunStatus.STARTED)
    begins = dg.DagsterEvent(event_type_value=dg.DagsterEventType.RUN_START.value, job_name=SYNC_JOB)
    instance.report_dagster_event(begins, run.run_id)
    return run


def tick(instance: dg.DagsterInstance) -> Any:
    """Evaluate the sensor once."""
    return cdc_supervisor.evaluate_tick(dg.build_sensor_context(instance=instance, definitions=defs))


def observe(instance: dg.DagsterInstance, run: dg.DagsterRun, metrics: ChangeMetrics | None = None) -> None:
    """Log an observation of a run, as a slice does."""
    found = metadata.of_observation((metrics or ChangeMetrics()).snapshot(), KAFKA)
    event = dg.DagsterEvent(
        event_type_value=dg.DagsterEventType.ASSET_OBSERVATION.value,
        job_name=SYNC_JOB,
        event_specific_data=_observation_data(dg.AssetObservation(USERS_CHANGES, metadata=found)),
    )
    instance.report_dagster_event(event, run.run_id)


def _observation_data(observation: dg.AssetObservation) -> Any:
    from dagster._core.events import AssetObservationData

    return AssetObservationData(observation)


def test_the_sensor_runs_by_default_at_each_look_of_the_daemon() -> None:
    assert cdc_supervisor.default_status == dg.DefaultSensorStatus.RUNNING
    assert (cdc_supervisor.minimum_interval_seconds, MIN_INTERVAL_LOOP_TIME) == (1, 5)
    # Else the other sensors would be looked at less often.
    assert sensors._WATCH_SECONDS < MIN_INTERVAL_LOOP_TIME - 1
    assert cdc_supervisor.job_name == SYNC_JOB


@pytest.mark.usefixtures("nowhere")
def test_nothing_starts_where_there_is_no_kafka(instance: dg.DagsterInstance) -> None:
    data = tick(instance)
    assert not data.run_requests
    assert "There is no Kafka: KAFKA_BOOTSTRAP_SERVERS is not set" in str(data.skip_message)


@pytest.mark.usefixtures("nowhere")
def test_nothing_starts_while_kafka_does_not_answer(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1")
    monkeypatch.setattr(sensors, "_PROBE_SECONDS", 0.5)
    started = time.monotonic()
    data = tick(instance)
    assert not data.run_requests
    assert "Nothing is started: " in str(data.skip_message)
    assert "can't be reached" in str(data.skip_message)
    assert time.monotonic() - started < 10


@pytest.mark.usefixtures("nowhere")
def test_a_slice_that_runs_is_left_alone_without_asking_kafka(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensors, "_WATCH_SECONDS", 0.5)
    run = start_run(instance)
    observe(instance, run)
    assert "A slice runs for 3" in str(tick(instance).skip_message)


@pytest.mark.usefixtures("nowhere")
def test_a_slice_that_dies_while_a_tick_watches_it_is_replaced_in_that_tick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensors, "_WATCH_SECONDS", 60.0)
    # On disk, where the two threads wait for each other.
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        run = start_run(instance)
        started = time.monotonic()
        dies = threading.Timer(0.5, instance.report_run_failed, [run, "killed"])
        dies.start()
        # It is to be started, which needs Kafka.
        assert "Nothing is started: There is no Kafka" in str(tick(instance).skip_message)
        assert 0.5 <= time.monotonic() - started < 30
        dies.join()


@pytest.mark.usefixtures("nowhere")
def test_a_pause_after_failures_is_what_a_tick_says(instance: dg.DagsterInstance) -> None:
    for _ in range(2):
        instance.report_run_failed(add_run(instance, dg.DagsterRunStatus.STARTED), "killed")
    assert "2 slices failed in a row: the next one starts in " in str(tick(instance).skip_message)


@pytest.mark.usefixtures("nowhere")
def test_a_slice_that_a_person_cancels_is_replaced_in_no_tick_that_is_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensors, "_WATCH_SECONDS", 1.5)
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        run = start_run(instance)
        ends = threading.Timer(0.5, instance.report_run_canceled, [run])
        ends.start()
        assert "A slice runs for" in str(tick(instance).skip_message)
        ends.join()
        assert "Nothing is started: There is no Kafka" in str(tick(instance).skip_message)


def test_runs_become_slices(instance: dg.DagsterInstance) -> None:
    settings = load_settings(GHSYNC_CDC_SLICE_SECONDS=900)
    config = {"ops": {SYNC_OP: {"config": {"seconds": 60}}}}
    # A queued run needs a code location.
    phases = {status: phase for status, phase in sensors._PHASES.items() if phase is not Phase.QUEUED}
    for status in phases:
        add_run(instance, status)
    add_run(instance, dg.DagsterRunStatus.STARTED, run_config=config, tags={REPLACED_TAG: "stuck"})
    found = read_slices(instance, settings)
    assert {one.phase for one in found} == set(phases.values())
    (own,) = (one for one in found if one.replaced)
    assert own.seconds == 60
    assert {one.seconds for one in found if one is not own} == {900}
    assert all(one.observed is None for one in found)


def test_the_newest_observation_is_seen(instance: dg.DagsterInstance) -> None:
    run = add_run(instance, dg.DagsterRunStatus.STARTED)
    observe(instance, run)
    before = time.time()
    observe(instance, run)
    (found,) = read_slices(instance, load_settings())
    assert found.observed is not None
    assert before <= found.observed <= time.time()


def test_runs_of_other_jobs_are_not_slices(instance: dg.DagsterInstance) -> None:
    job = defs.resolve_job_def("cdc_drain_job")
    instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED)
    assert read_slices(instance, load_settings()) == []


def test_a_request_carries_its_length_its_limit_and_a_key_of_its_own() -> None:
    settings = load_settings(GHSYNC_CDC_SLICE_SECONDS=900)
    request = sensors.run_request(settings, "run-7", Rules())
    assert request.run_key == "after-run-7"
    assert request.run_config == {"ops": {SYNC_OP: {"config": {"seconds": 900}}}}
    assert request.tags == {"ghsync/flow": "cdc", "dagster/max_runtime": "1140"}
    assert sensors.run_request(settings, None, Rules()).run_key == "after-nothing"


def test_a_stuck_run_whose_process_is_gone_is_noted_as_failed(instance: dg.DagsterInstance) -> None:
    run = add_run(instance, dg.DagsterRunStatus.STARTED)
    end_slice(instance, Replace(run.run_id, "it was never observed in 99 s"))
    ended = instance.get_run_by_id(run.run_id)
    assert ended
    assert ended.status == dg.DagsterRunStatus.FAILURE
    assert ended.tags[REPLACED_TAG] == "it was never observed in 99 s"


def test_a_run_that_ended_meanwhile_is_left_as_it_is(instance: dg.DagsterInstance) -> None:
    run = add_run(instance, dg.DagsterRunStatus.SUCCESS)
    end_slice(instance, Replace(run.run_id, "too late"))
    left = instance.get_run_by_id(run.run_id)
    assert left
    assert left.status == dg.DagsterRunStatus.SUCCESS
    assert REPLACED_TAG not in left.tags


@pytest.mark.usefixtures("nowhere")
def test_a_stuck_slice_is_ended_even_while_kafka_is_away(instance: dg.DagsterInstance) -> None:
    run = start_run(instance)
    _move_start(instance, run.run_id, time.time() - 4_000)
    data = tick(instance)
    assert "Ended " in str(data.skip_message)
    assert "longer than it should" in str(data.skip_message)
    assert "There is no Kafka" in str(data.skip_message)
    ended = instance.get_run_by_id(run.run_id)
    assert ended
    assert ended.status == dg.DagsterRunStatus.FAILURE


def _move_start(instance: dg.DagsterInstance, run_id: str, at: float) -> None:
    from dagster._core.storage.runs.schema import RunsTable

    with instance.run_storage.connect() as connection:  # type: ignore[attr-defined]
        connection.execute(RunsTable.update().where(RunsTable.c.run_id == run_id).values(start_time=at))


# The checks, each made to pass and to fail


class Parts(ChangesResource):
    """The change flow's parts without Kafka: what each check gets is set by the test."""

    home: str
    waiting: int = 0
    lost: int = 0
    letters: int = 0

    def settings(self) -> Settings:
        """Settings of the test's own home."""
        return load_settings(GHSYNC_HOME=self.home, GHSYNC_MAX_LAG_RECORDS=100, GHSYNC_RETRY_ATTEMPTS=1)

    def kafka(self) -> KafkaSettings:
        """Kafka, which is not there."""
        return KAFKA

    def no_kafka(self) -> None:
        """Say that Kafka was set up."""

    def no_mysql(self) -> None:
        """Say that MySQL was set up."""

    def dead_letters(self) -> OpenLetters:
        """So many dead letters as the test says, or none."""
        failed_at = "2026-01-01T00:00:00+00:00"
        found = [
            Letter(KAFKA.topic, 0, at, None, "1", "not-json", "no JSON", failed_at, (0, at))
            for at in range(self.letters)
        ]
        return OpenLetters(Counter(letter.kind for letter in found), found[:20], found[:-51:-1])


@pytest.fixture
def backlog(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What the brokers tell: records that wait, and records that are gone."""
    told = {"waiting": 0, "lost": 0}

    def read_backlog(_: KafkaSettings) -> Backlog:
        low = 1_000 + told["lost"]
        return Backlog(KAFKA.topic, KAFKA.group_id, (PartitionBacklog(0, low, low + told["waiting"], 1_000),))

    monkeypatch.setattr("ghsync_dagster.stores.kafka.backlog.read_backlog", read_backlog)
    return told


def evaluate(instance: dg.DagsterInstance, check: str, parts: ChangesResource, **config: Any) -> Any:
    """Run one check; return its evaluation, or the failure if it raised."""
    job = build_defs({"changes": parts}).resolve_job_def("cdc_audit_job")
    result = job.execute_in_process(
        instance=instance,
        op_selection=[check],
        run_config={"ops": {check: {"config": config}}} if config else {},
        raise_on_error=False,
    )
    evaluations = result.get_asset_check_evaluations()
    return evaluations[0] if evaluations else result.failure_data_for_node(check)


def values(evaluation: dg.AssetCheckEvaluation) -> dict[str, Any]:
    """The plain values of an evaluation's metadata."""
    return {name: value.value for name, value in evaluation.metadata.items()}


@pytest.mark.parametrize(("waiting", "lost", "passed"), [(0, 0, True), (100, 0, True), (101, 0, False), (3, 2, False)])
def test_kafka_lag_holds_the_records_that_wait_against_the_limit(
    instance: dg.DagsterInstance, backlog: dict[str, int], tmp_path: Path, waiting: int, lost: int, passed: bool
) -> None:
    backlog |= {"waiting": waiting, "lost": lost}
    found = evaluate(instance, "users_changes_kafka_lag", Parts(home=str(tmp_path)))
    assert found.passed is passed
    assert (values(found)["waiting"], values(found)["lost"]) == (waiting, lost)
    if passed:
        assert "way_out" not in values(found)
    else:
        assert values(found)["offenders"][0]["partition"] == 0
        assert ("new snapshot" if lost else "GHSYNC_MAX_LAG_RECORDS") in values(found)["way_out"]


def test_the_launchpad_may_set_another_limit(
    instance: dg.DagsterInstance, backlog: dict[str, int], tmp_path: Path
) -> None:
    backlog["waiting"] = 3
    parts = Parts(home=str(tmp_path))
    assert not evaluate(instance, "users_changes_kafka_lag", parts, max_lag_records=2).passed


def applied(metrics: ChangeMetrics, latencies: list[int], *, grain_ms: int = 1) -> None:
    """Tell the metrics of records that were stored so many ms after their commit."""
    now = time.time_ns() // 1_000_000
    commits = [(now - latency) // grain_ms * grain_ms for latency in latencies]
    metrics.batch_applied(
        AppliedBatch(
            counts={("c", APPLIED): len(latencies)},
            acknowledged_ms=now,
            committed_ms=commits,
            appended_ms=[now - 5 for _ in latencies],
        )
    )


@pytest.mark.usefixtures("backlog")
@pytest.mark.parametrize(("latency", "passed"), [(20, True), (5_000, False)])
def test_cdc_latency_holds_the_p99_of_the_newest_observations_against_the_limit(
    instance: dg.DagsterInstance, tmp_path: Path, latency: int, passed: bool
) -> None:
    metrics = ChangeMetrics()
    applied(metrics, [10] * 90 + [latency] * 10)
    run = add_run(instance, dg.DagsterRunStatus.STARTED)
    observe(instance, run, metrics)
    observe(instance, run)
    found = evaluate(instance, "users_changes_cdc_latency", Parts(home=str(tmp_path)))
    assert found.passed is passed
    assert (values(found)["records"], values(found)["intervals"]) == (100, 1)
    assert abs(values(found)["p99_ms"] - latency) <= 8
    if not passed:
        assert values(found)["offenders"][0]["run_id"] == run.run_id


@pytest.mark.usefixtures("backlog")
def test_a_commit_time_in_whole_seconds_makes_no_false_alarm(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    metrics = ChangeMetrics()
    applied(metrics, [100] * 50, grain_ms=1_000)
    observe(instance, add_run(instance, dg.DagsterRunStatus.STARTED), metrics)
    parts = Parts(home=str(tmp_path))
    assert evaluate(instance, "users_changes_cdc_latency", parts, max_latency_ms=150.0).passed


@pytest.mark.parametrize(("waiting", "passed"), [(0, True), (7, False)])
def test_without_an_observation_changes_that_wait_fail_cdc_latency(
    instance: dg.DagsterInstance, backlog: dict[str, int], tmp_path: Path, waiting: int, passed: bool
) -> None:
    backlog["waiting"] = waiting
    observe(instance, add_run(instance, dg.DagsterRunStatus.STARTED))
    found = evaluate(instance, "users_changes_cdc_latency", Parts(home=str(tmp_path)))
    assert found.passed is passed
    assert ("no consumer is at work" in found.description) is not passed


def test_old_observations_are_not_looked_at(instance: dg.DagsterInstance) -> None:
    metrics = ChangeMetrics()
    applied(metrics, [10])
    observe(instance, add_run(instance, dg.DagsterRunStatus.STARTED), metrics)
    assert len(measured_since(instance, time.time() - 60)) == 1
    assert measured_since(instance, time.time() + 1) == []


def test_the_window_holds_several_reports() -> None:
    assert latency_window(load_settings(GHSYNC_CDC_REPORT_SECONDS=10)) == 60
    assert latency_window(load_settings(GHSYNC_CDC_REPORT_SECONDS=1)) == 60
    assert latency_window(load_settings(GHSYNC_CDC_REPORT_SECONDS=60)) == 360


@pytest.mark.parametrize("letters", [0, 1, 50])
def test_dead_letters_empty_counts_all_and_shows_twenty(
    instance: dg.DagsterInstance, tmp_path: Path, letters: int
) -> None:
    found = evaluate(instance, "users_changes_dead_letters_empty", Parts(home=str(tmp_path), letters=letters))
    assert found.passed is (letters == 0)
    assert values(found)["dead_letters"] == letters
    if letters:
        assert len(values(found)["offenders"]) == min(letters, 20)
        assert found.description == f"{letters} dead letters: {letters} not-json"
        assert "ghsync cdc repair --dead-letters" in values(found)["way_out"]
        assert {offender["user_id"] for offender in values(found)["offenders"]} == {"1"}


def test_dead_letters_is_a_table_with_counts(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    made = build_defs({"changes": Parts(home=str(tmp_path), letters=60)})
    result = made.resolve_implicit_global_asset_job_def().execute_in_process(
        instance=instance, asset_selection=[dg.AssetKey("dead_letters")]
    )
    (event,) = result.asset_materializations_for_node("dead_letters")
    shown: dict[str, Any] = dict(event.metadata)
    assert shown["dagster/row_count"].value == 60
    assert [dict(row.data) for row in shown["kinds"].records] == [{"kind": "not-json", "dead letters": 60}]
    newest = [row.data for row in shown["newest"].records]
    assert len(newest) == 50
    assert newest[0]["id"] == f"{KAFKA.topic}-0-59"


class Away(Parts):
    """A change flow whose Kafka is away."""

    def kafka(self) -> KafkaSettings:
        """Kafka, which is not there."""
        raise UnavailableError("Kafka is away.", way_out="Start it.")

    def dead_letters(self) -> OpenLetters:
        """So many dead letters as the test says, or none."""
        raise UnavailableError("Kafka is away.", way_out="Start it.")


@pytest.mark.parametrize(
    "check",
    [
        "users_changes_kafka_lag",
        "users_changes_cdc_latency",
        "users_changes_dead_letters_empty",
        "users_changes_source_settings",
        "mongo_users_in_step_with_mysql",
    ],
)
def test_a_server_that_is_away_raises_and_never_looks_like_failed_data(
    instance: dg.DagsterInstance, tmp_path: Path, check: str
) -> None:
    failure = evaluate(instance, check, Away(home=str(tmp_path)))
    assert not isinstance(failure, dg.AssetCheckEvaluation)
    assert failure.user_failure_data.metadata["kind"].value == "infrastructure"
    who = "There is no MySQL" if check == "users_changes_source_settings" else "Kafka is away"
    assert who in failure.user_failure_data.description


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize("url", ["", "mysql://u:p@127.0.0.1:1/new_data"])
def test_where_no_change_stream_was_set_up_there_is_nothing_to_compare(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("MYSQL_URL", url)
    found = evaluate(instance, "mongo_users_in_step_with_mysql", ChangesResource())
    assert found.passed
    assert found.description.startswith("not compared: there is no Kafka here")


@pytest.mark.parametrize("left", ["a copy's record", "a broken record", "data alone"])
def test_a_stream_that_was_set_up_is_not_taken_for_none_by_its_record(
    instance: dg.DagsterInstance, nowhere: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    monkeypatch.setenv("GHSYNC_RETRY_ATTEMPTS", "1")
    for service in ("kafka", "mysql"):
        data = nowhere / service / "data" / service
        data.mkdir(parents=True)
        record = Record(service, str(data), "log", 1, pid=1, born="then", started=True, folder="1:2")
        contents = {"a copy's record": msgspec.json.encode(record), "a broken record": b"{"}
        if left in contents:
            (nowhere / service / "state.json").write_bytes(contents[left])
    assert (ChangesResource().no_kafka(), ChangesResource().no_mysql()) == (None, None)
    failure = evaluate(instance, "mongo_users_in_step_with_mysql", ChangesResource())
    assert not isinstance(failure, dg.AssetCheckEvaluation)
    assert "There is no Kafka: KAFKA_BOOTSTRAP_SERVERS is not set" in failure.user_failure_data.description


@pytest.mark.parametrize("away", ["all is down", "Kafka", "MySQL", "refused"])
def test_a_load_of_files_is_green_whatever_of_the_stream_is_away_and_red_where_it_refuses(
    instance: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away: str
) -> None:
    """As after `make cdc`, which stops what it has started."""
    monkeypatch.setenv("GHSYNC_HOME", str(tmp_path))
    if away == "all is down":
        for service in ("kafka", "mysql"):
            (tmp_path / service / "data").mkdir(parents=True)
    else:
        monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1")
        monkeypatch.setenv("MYSQL_URL", "mysql://u:p@127.0.0.1:1/new_data")
        monkeypatch.setenv("GHSYNC_SERVER_TIMEOUT_SECONDS", "0.5")
    if away in ("MySQL", "refused"):
        error = RefusedError("MySQL refused.", way_out="x") if away == "refused" else UnavailableError("x", way_out="x")
        monkeypatch.setattr("ghsync_dagster.stores.kafka.backlog.await_no_lag", lambda *_: 0)
        monkeypatch.setattr("ghsync_dagster.wiring.check_source", raising(error))

    @dg.asset(name="mongo_users")
    def loaded() -> None:
        """Stand in for the load, which has its own tests."""

    definitions = dg.Definitions(
        assets=[loaded, dg.AssetSpec("mysql_users")],
        asset_checks=[in_step_with_mysql],
        resources={"changes": ChangesResource()},
    )
    job = definitions.resolve_implicit_global_asset_job_def()
    result = job.execute_in_process(instance=instance, raise_on_error=False)
    if away == "refused":
        # A password that is wrong since yesterday must not be green.
        assert not result.success
        assert result.get_asset_check_evaluations() == []
        return
    (found,) = result.get_asset_check_evaluations()
    assert result.success
    assert found.passed
    assert str(found.description).startswith("not compared: ")
    assert values(found)["way_out"]


def raising(error: Exception) -> Any:
    """Return a function that raises."""

    def raises(*_: object, **__: object) -> None:
        raise error

    return raises


@pytest.mark.usefixtures("nowhere")
def test_a_stream_whose_table_nobody_can_look_at_is_not_in_step(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1")
    found = evaluate(instance, "mongo_users_in_step_with_mysql", ChangesResource())
    assert not found.passed
    assert found.description.startswith("not compared: there is no MySQL here")
    assert "MYSQL_URL" in values(found)["way_out"]


def test_a_slice_starts_no_kafka_that_goes_just_then(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KAFKA_BOOTSTRAP_SERVERS", raising=False)
    up = ServiceStatus("kafka", "up", 1, login="127.0.0.1:9")
    monkeypatch.setattr(KafkaServer, "local_status", lambda _: up)
    monkeypatch.setattr(KafkaServer, "up", lambda *_: pytest.fail("Kafka was started"))
    assert ChangesResource().consumer(SilentListener()).kafka.bootstrap_servers == "127.0.0.1:9"
    assert list(nowhere.iterdir()) == []


@pytest.mark.parametrize("told", [True, False], ids=["told to end", "its time is over"])
def test_a_consumer_that_does_not_end_takes_its_process_along(
    instance: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    released = threading.Event()
    codes: list[int] = []

    class Hung(ChangeConsumer):
        """Hears of nothing."""

        def run(self, stop: threading.Event, **_: object) -> ConsumerReport:
            if told:
                stop.set()
            assert released.wait(30)
            return ConsumerReport(False, 0, 0, {}, {}, {})

    class Changes(Parts):
        """Consumes by that."""

        def consumer(self, listener: ChangeListener) -> ChangeConsumer:
            return Hung(self.kafka(), self.open_store, listener=listener)

    def leave(code: int) -> None:
        codes.append(code)
        released.set()

    monkeypatch.setattr(slices, "_END_SECONDS", -9.8)
    monkeypatch.setattr(os, "_exit", leave)
    job = build_defs({"changes": Changes(home=str(tmp_path))}).resolve_job_def("cdc_sync_job")
    seconds = 600.0 if told else 0.1
    config = {"ops": {SYNC_OP: {"config": {"seconds": seconds}}}}
    job.execute_in_process(run_config=config, instance=instance, raise_on_error=False)
    assert codes == [70]


@pytest.mark.usefixtures("nowhere")
def test_where_no_change_stream_was_set_up_there_are_no_dead_letters(instance: dg.DagsterInstance) -> None:
    result = defs.resolve_implicit_global_asset_job_def().execute_in_process(
        instance=instance, asset_selection=[dg.AssetKey("dead_letters")]
    )
    (event,) = result.asset_materializations_for_node("dead_letters")
    assert event.metadata["dagster/row_count"].value == 0
    assert "there is no Kafka here" in str(event.metadata["why"].value)


class Looked:
    """Stands for the change flow's parts: its source is looked at, or is away."""

    def __init__(self, problem: Problem | None, *, away: bool = False) -> None:
        self._problem = problem
        self._away = away

    def source(self) -> Finding:
        """The finding on the source."""
        if self._away:
            raise UnavailableError("MySQL is away.", way_out="Start it.")
        offenders = [{"effect": self._problem.effect.value}] if self._problem else []
        return Finding("source_settings", not offenders, "as it is", offenders=offenders)


@pytest.mark.parametrize("effect", Effect)
def test_a_drain_fails_on_a_source_that_loses_changes_and_on_no_less(effect: Effect) -> None:
    def gate(looked: Looked) -> list[Finding]:
        return jobs._on_source(dg.build_op_context(), cast("ChangesResource", looked))

    problem = Problem("any", effect, "wrong", "Correct it.")
    assert bool(gate(Looked(problem))) == (effect in (Effect.STOPS, Effect.LOSES, Effect.LOST))
    assert gate(Looked(None)) == gate(Looked(problem, away=True)) == []
