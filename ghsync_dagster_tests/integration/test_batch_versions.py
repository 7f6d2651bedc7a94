"""What Dagster shows as in sync is what files and code give, on real parts; what it does not know of is not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dagster as dg
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest

from ghsync_dagster.batch.versions import code_version
from ghsync_dagster.definitions import build_defs
from ghsync_dagster.defs.resources import BatchResource, SparkResource
from ghsync_dagster.settings import load_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from ghsync_dagster.batch.flow import BatchFlow
    from ghsync_dagster.stores.mongo.users import UserStore
    from ghsync_dagster.stores.spark import SparkHandle

pytestmark = [pytest.mark.integration, pytest.mark.servers("spark")]

MADE = ("raw_events", "quarantined_events", "users", "mongo_users")
QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


class Platform:
    """Dagster's definitions on the test's own files, folder and database, with an instance that remembers."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self.instance = instance
        self.settings = load_settings()
        self.defs = build_defs()

    def flow(self) -> BatchFlow:
        """The flow as a run has it."""
        return BatchResource(spark=SparkResource()).build()

    def run(self, **config: Any) -> dg.ExecuteInProcessResult:
        """Run the batch job."""
        ops = {"ops": {"read_events": {"config": config}}} if config else {}
        definition = self.defs.resolve_job_def("users_batch_job")
        return definition.execute_in_process(instance=self.instance, run_config={**ops, **QUIET})

    def materialize(self, *assets: str) -> dg.ExecuteInProcessResult:
        """Materialize or observe assets alone."""
        job = self.defs.resolve_implicit_global_asset_job_def()
        return job.execute_in_process(
            instance=self.instance, asset_selection=[dg.AssetKey(asset) for asset in assets], run_config=QUIET
        )

    def stale(self) -> set[str]:
        """The assets that the UI does not show as in sync."""
        graph = self.defs.resolve_asset_graph()
        resolver = CachingStaleStatusResolver(self.instance, graph, LoadingContextForTest(self.instance))
        return {asset for asset in MADE if resolver.get_status(dg.AssetKey(asset)) is not StaleStatus.FRESH}

    def version(self, asset: str) -> str:
        """The version of an asset's data."""
        event = self.instance.get_latest_data_version_record(dg.AssetKey(asset), is_source=asset == "event_files")
        assert event
        tags = event.event_log_entry.tags
        assert tags
        return tags["dagster/data_version"]

    def shown(self, asset: str) -> dict[str, Any]:
        """The metadata of an asset's newest materialization."""
        event = self.instance.get_latest_materialization_event(dg.AssetKey(asset))
        assert event
        assert event.asset_materialization
        return dict(event.asset_materialization.metadata)


@pytest.fixture
def events(tmp_path: Path, event_line: Callable[..., str]) -> Path:
    """Ten users in one file, and a line that is none."""
    path = tmp_path / "in" / "events.json"
    path.parent.mkdir()
    lines = [event_line(number, f"user-{number}", number=number, actor_gravatar_id=None) for number in range(1, 11)]
    path.write_text("\n".join([*lines, "no event"]))
    return path


@pytest.fixture
def platform(
    tmp_path: Path, events: Path, mongo_uri: str, database: str, spark: SparkHandle, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Platform]:
    """The platform on the test's own parts, sharing the session's Spark."""
    # A process has one session, and this one's home outlives the test.
    spark.session()
    monkeypatch.setenv("GHSYNC_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GHSYNC_EVENTS_PATH", str(events.parent))
    monkeypatch.setenv("GHSYNC_MAX_QUARANTINED_RATIO", "0.5")
    monkeypatch.setenv("MONGODB_URI", mongo_uri)
    monkeypatch.setenv("MONGODB_DATABASE", database)
    with dg.DagsterInstance.ephemeral() as instance:
        yield Platform(instance)


def test_unchanged_files_are_in_sync_and_a_change_of_any_kind_is_not(
    platform: Platform, events: Path, event_line: Callable[..., str]
) -> None:
    assert platform.run().success
    assert platform.stale() == set()
    first = {asset: platform.version(asset) for asset in (*MADE, "event_files")}
    platform.materialize("event_files")
    assert platform.version("event_files") == first["event_files"]
    assert platform.stale() == set()

    assert platform.run().success
    again = {asset: platform.version(asset) for asset in (*MADE, "event_files")}
    # The stream may have changed the collection between two loads, so no load claims to have left the same.
    assert {asset for asset in again if again[asset] != first[asset]} == {"mongo_users"}
    assert platform.stale() == set()

    (events.parent / "more.json").write_text(event_line(11, "user-11", number=11))
    assert platform.stale() == set()
    platform.materialize("event_files")
    assert platform.stale() == {"raw_events", "quarantined_events"}


def test_what_the_clock_refuses_is_of_another_version_with_each_read(
    platform: Platform, events: Path, event_line: Callable[..., str]
) -> None:
    flow = platform.flow()
    assert flow.read([str(events)]).data_version == flow.read([str(events)]).data_version
    with events.open("a") as end:
        end.write(f"\n{event_line(11, 'later', number=11, created_at='2999-01-01T00:00:00Z')}")
    first, second = flow.read([str(events)]), flow.read([str(events)])
    assert first.input_version == second.input_version
    assert first.data_version != second.data_version


def test_what_dagster_does_not_know_of_is_never_shown_as_in_sync(
    platform: Platform, tmp_path: Path, event_line: Callable[..., str]
) -> None:
    assert platform.run().success
    first = platform.version("users")
    other = tmp_path / "other.json"
    other.write_text(event_line(50, "fifty", number=50))

    # Read from the command line: users, made alone, come from events that Dagster has never heard of.
    platform.flow().read([str(other)])
    platform.materialize("users")
    assert platform.version("users") != first
    assert platform.stale() == {"users", "mongo_users"}

    # Read as the launchpad says: the files of the settings are others.
    assert platform.run(events_path=str(other)).success
    assert platform.stale() == set()
    platform.materialize("event_files")
    assert platform.stale() == {"raw_events", "quarantined_events"}


def test_the_counts_are_of_what_their_names_say_and_of_one_target(
    platform: Platform, store: UserStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = {**dict.fromkeys(("login", "gravatar_id", "avatar_url", "url")), "user_id": "-7"}
    store.ensure_collection()
    store.users.insert_one(stranger)
    assert platform.run().success
    assert platform.stale() == set()
    shown = platform.shown("mongo_users")
    assert (shown["dagster/row_count"].value, shown["users_in_files"].value) == (11, 10)
    assert shown["dagster/table_name"].value == f"{platform.settings.mongodb_database}.Users"
    for asset, rows in {"raw_events": 10, "quarantined_events": 1, "users": 10, "mongo_users": 11}.items():
        found = platform.shown(asset)
        assert found["dagster/row_count"].value == rows
        tables = [value for value in found.values() if isinstance(value, dg.TableMetadataValue)]
        assert tables
        assert not any(isinstance(value, dg.TextMetadataValue) and value.value == "none" for value in found.values())
    sample = platform.shown("users")["sample"]
    assert {record.data["gravatar_id"] for record in sample.records} == {""}
    assert {type(record.data["event_id"]) for record in sample.records} == {int}
    monkeypatch.setenv("MONGODB_COLLECTION", "Others")
    assert Platform(platform.instance).stale() == {"mongo_users"}


def test_the_session_is_one_of_dagster_pyspark(
    platform: Platform, spark: SparkHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dagster_pyspark

    asked: list[dict[str, str]] = []

    class Watched(dagster_pyspark.LazyPySparkResource):
        def __init__(self, **fields: Any) -> None:
            asked.append(fields["spark_config"])
            super().__init__(**fields)

    monkeypatch.setattr(dagster_pyspark, "LazyPySparkResource", Watched)
    session = platform.flow().spark.session()
    (configuration,) = asked
    assert configuration["spark.master"] == platform.settings.spark_master
    assert session.sparkContext.applicationId == spark.session().sparkContext.applicationId


def test_the_flow_knows_the_code_that_the_assets_name(platform: Platform) -> None:
    graph = platform.defs.resolve_asset_graph()
    assert {graph.get(dg.AssetKey(asset)).code_version for asset in MADE[:-1]} == {code_version(None)}
    assert platform.flow().code_version == code_version(None)
