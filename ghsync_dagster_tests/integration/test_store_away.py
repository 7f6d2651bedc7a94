"""The store away: an infrastructure error after the retries, never a failed check, and a way back."""

from __future__ import annotations

import dataclasses
import socket
import threading
from typing import TYPE_CHECKING, Any

import dagster as dg
import psutil
import pytest
from pymongo.errors import BulkWriteError, OperationFailure, WriteConcernError, WTimeoutError
from pyspark.errors import PySparkException

from ghsync_dagster.batch.load import Step
from ghsync_dagster.definitions import build_defs
from ghsync_dagster.defs.resources import BatchResource, SparkResource
from ghsync_dagster.domain.errors import RefusedError, UnavailableError
from ghsync_dagster.local import stack
from ghsync_dagster.settings import Settings, load_settings
from ghsync_dagster.stores.mongo.errors import mongo_errors
from ghsync_dagster.stores.mongo.users import UserStore
from ghsync_dagster.stores.spark import spark_errors
from ghsync_dagster_tests.support.long_campaign import ONLY_LONG

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from ghsync_dagster.batch.flow import BatchFlow

pytestmark = [pytest.mark.integration, pytest.mark.servers("spark")]

USERS = 40


@pytest.fixture
def events(tmp_path: Path, event_line: Callable[..., str]) -> Path:
    path = tmp_path / "in.json"
    path.write_text("\n".join(event_line(number, f"user-{number}", number=number) for number in range(1, USERS + 1)))
    return path


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of this machine on which nobody listens, kept so by being bound."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])


@pytest.fixture
def away(flow: BatchFlow, closed_port: int) -> tuple[BatchFlow, list[int]]:
    """A flow whose store does not answer, with two tries; the list counts them."""
    tries: list[int] = []

    def open_store() -> UserStore:
        tries.append(closed_port)
        return UserStore(f"mongodb://127.0.0.1:{closed_port}", "away", "Users", timeout_seconds=0.3)

    return dataclasses.replace(flow, open_store=open_store, attempts=2), tries


def of_flow(flow: BatchFlow) -> BatchResource:
    """Return the resource that gives this very flow."""

    class TestBatch(BatchResource):
        def build(self, run_id: str | None = None) -> BatchFlow:
            del run_id
            return flow

    return TestBatch(spark=SparkResource())


def run(job: str, flow: BatchFlow, **ops: Any) -> dg.ExecuteInProcessResult:
    with dg.DagsterInstance.ephemeral() as instance:
        return (
            build_defs(resource_overrides={"batch": of_flow(flow)})
            .resolve_job_def(job)
            .execute_in_process(
                run_config={"ops": ops, "loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
                instance=instance,
                raise_on_error=False,
            )
        )


def failures(result: dg.ExecuteInProcessResult) -> dict[str, dict[str, Any]]:
    """Return the metadata of each step that failed, with the description, by step."""
    found = {}
    for event in result.all_events:
        if event.is_step_failure and (failure := event.step_failure_data.user_failure_data):
            metadata = {key: value.value for key, value in failure.metadata.items()}
            found[str(event.step_key)] = {**metadata, "description": failure.description}
    return found


def test_a_job_fails_as_infrastructure_before_any_work(away: tuple[BatchFlow, list[int]], events: Path) -> None:
    flow, tries = away
    result = run("users_batch_job", flow, read_events={"config": {"events_path": str(events)}})
    assert not result.success
    found = failures(result)
    assert set(found) == {"read_events"}
    assert (found["read_events"]["kind"], found["read_events"]["error"]) == ("infrastructure", "UnavailableError")
    assert "ghsync status" in found["read_events"]["way_out"]
    assert len(tries) == 1
    assert result.get_asset_check_evaluations() == []
    assert list((flow.artifacts.root / "events").glob("*")) == []


def test_what_needs_no_store_is_materialized_without_one(away: tuple[BatchFlow, list[int]], events: Path) -> None:
    flow, tries = away
    only = (
        build_defs(resource_overrides={"batch": of_flow(flow)}).get_repository_def().get_implicit_global_asset_job_def()
    )
    selected = only.get_subset(asset_selection={dg.AssetKey("raw_events"), dg.AssetKey("quarantined_events")})
    with dg.DagsterInstance.ephemeral() as instance:
        config = {"ops": {"read_events": {"config": {"events_path": str(events)}}}}
        assert selected.execute_in_process(run_config=config, instance=instance).success
    assert tries == []


def test_a_store_that_goes_away_under_way_is_tried_again_and_no_check_says_failed(
    away: tuple[BatchFlow, list[int]], flow: BatchFlow, events: Path
) -> None:
    gone, tries = away
    stores = iter([flow.open_store])

    def open_store() -> UserStore:
        return next(stores, gone.open_store)()

    result = run(
        "users_batch_job",
        dataclasses.replace(gone, open_store=open_store),
        read_events={"config": {"events_path": str(events)}},
    )
    assert not result.success
    found = failures(result)
    assert set(found) == {"mongo_users"}
    assert (found["mongo_users"]["kind"], found["mongo_users"]["error"]) == ("infrastructure", "UnavailableError")
    assert "MongoDB can't be reached" in found["mongo_users"]["description"]
    assert "ghsync status" in found["mongo_users"]["way_out"]
    assert len(tries) == 2
    evaluations = result.get_asset_check_evaluations()
    assert {evaluation.check_name for evaluation in evaluations} == {"quarantined_ratio", "users_valid"}
    assert all(evaluation.passed for evaluation in evaluations)


def test_an_audit_fails_as_infrastructure_and_no_check_says_failed(
    away: tuple[BatchFlow, list[int]], flow: BatchFlow, events: Path
) -> None:
    assert run("users_batch_job", flow, read_events={"config": {"events_path": str(events)}}).success
    result = run("users_audit_job", away[0])
    assert not result.success
    on_store = {"users_complete", "no_spark_temp_left", "unique_user_id_index", "documents_conform"}
    found = failures(result)
    assert set(found) == {f"mongo_users_{check}" for check in on_store}
    assert {failure["kind"] for failure in found.values()} == {"infrastructure"}
    evaluations = result.get_asset_check_evaluations()
    assert {evaluation.check_name for evaluation in evaluations} & on_store == set()
    assert all(evaluation.passed for evaluation in evaluations)


@pytest.mark.parametrize(
    "error",
    [
        WTimeoutError("waiting for replication timed out", 64, {"code": 64}),
        WriteConcernError("primary stepped down while waiting for replication", 189, {"code": 189}),
        BulkWriteError({"writeErrors": [], "writeConcernErrors": [{"code": 91, "errmsg": "shutdown in progress"}]}),
    ],
    ids=["time-out", "step-down", "bulk"],
)
def test_a_write_that_no_majority_confirms_is_tried_again(error: OperationFailure) -> None:
    with pytest.raises(UnavailableError, match="could not finish now"), mongo_errors("Writing"):
        raise error


@pytest.mark.parametrize("code", [6, 43, 133, 262])
def test_a_command_s_answer_that_passes_is_tried_again_and_any_other_is_not(code: int) -> None:
    with pytest.raises(UnavailableError, match="could not finish now"), mongo_errors("Reading"):
        raise OperationFailure("not now", code)
    with pytest.raises(UnavailableError, match="could not finish now"), mongo_errors("Writing"):
        raise BulkWriteError({"writeErrors": [{"code": code, "errmsg": "not now"}], "writeConcernErrors": []})
    with pytest.raises(RefusedError, match="code 65"), mongo_errors("Writing"):
        raise BulkWriteError({"writeErrors": [{"code": 121, "errmsg": "no"}], "writeConcernErrors": []})
    with pytest.raises(RefusedError, match="code 9"), mongo_errors("Reading"):
        raise OperationFailure("cannot parse", 9)


def test_what_spark_writes_and_no_majority_confirms_is_tried_again() -> None:
    text = "com.mongodb.MongoBulkWriteException: Bulk write error. Write concern error: code=91, shutting down"
    with pytest.raises(UnavailableError), spark_errors("Writing"):
        raise PySparkException(text)


class Server:
    """A server of the test's own, which may be killed."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.uri = stack.ensure(settings, "mongo")

    def kill(self) -> None:
        """Kill it hard, as a crash would."""
        pid = stack.status(self.settings)["mongo"].pid
        assert pid is not None
        process = psutil.Process(pid)
        process.kill()
        # Until it is gone its port is taken.
        process.wait(10)

    def start(self) -> None:
        """Start it again, where it was."""
        assert stack.ensure(self.settings, "mongo") == self.uri


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    settings = load_settings(GHSYNC_HOME=tmp_path / "server")
    yield Server(settings)
    stack.down(settings, progress=lambda _: None)


@pytest.fixture
def flattened(flow: BatchFlow, events: Path, server: Server) -> BatchFlow:
    """A flow on the test's own server that has everything but its load behind it."""
    own = dataclasses.replace(
        flow, open_store=lambda: UserStore(server.uri, "new_data", "Users", timeout_seconds=2), lease_wait_seconds=60
    )
    own.read([str(events)])
    own.flatten()
    return own


def assert_complete(flow: BatchFlow) -> None:
    with flow.open_store() as store:
        assert sorted(int(found["user_id"]) for found in store.users.find()) == list(range(1, USERS + 1))
        assert store.count_marked() == 0
        assert store.book("versions").count_documents({}) == USERS
        assert store.unfinished_loads() == []


@pytest.mark.parametrize(
    "last",
    [
        *(Step.PLANNED, Step.VERSIONED),
        *(pytest.param(step, marks=ONLY_LONG) for step in (Step.RECORDED, Step.COMPARED, Step.CHECKED)),
    ],
)
def test_a_load_whose_server_dies_raises_and_the_next_one_completes(
    flattened: BatchFlow, server: Server, last: Step
) -> None:
    steps: list[Step] = []

    def kill(step: Step) -> None:
        steps.append(step)
        if step is last:
            server.kill()

    with pytest.raises(UnavailableError) as caught:
        flattened.load("first", on_step=kill)
    assert caught.value.way_out
    assert steps[-1] is last
    server.start()
    with flattened.open_store() as store:
        # As when its time is over: the holder, this very process, still lives.
        store.database["_ghsync_leases"].delete_many({})
    report = flattened.load("second")
    assert report.unresolved == 0
    assert bool(report.recovered) == (last in {Step.VERSIONED, Step.COMPARED, Step.CHECKED})
    assert_complete(flattened)


def test_a_load_whose_server_comes_back_completes_by_its_own_retries(flattened: BatchFlow, server: Server) -> None:
    starts: list[threading.Thread] = []

    def kill_once(step: Step) -> None:
        if step is Step.VERSIONED and not starts:
            server.kill()
            starts.append(threading.Thread(target=server.start))
            starts[0].start()

    report = dataclasses.replace(flattened, attempts=8).load("only", on_step=kill_once)
    starts[0].join()
    assert report.unresolved == 0
    assert_complete(flattened)
