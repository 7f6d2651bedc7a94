"""The code location as Dagster sees it: it loads fast and lightly, and holds the graph, checks and jobs it should."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import pyarrow as pa
import pytest
from dagster import serialize_value
from dagster._core.remote_representation.external_data import RepositorySnap, active_presets_from_job_def
from pyspark.sql.types import StructType

from ghsync_dagster.batch.decide import quarantine_schema
from ghsync_dagster.batch.versions import code_version
from ghsync_dagster.definitions import build_defs, defs
from ghsync_dagster.defs.batch.columns import TABLES
from ghsync_dagster.defs.cdc.checks import CDC_CHECKS
from ghsync_dagster.defs.links import guide
from ghsync_dagster.defs.resources import BatchResource, SparkResource, resources_of_environment
from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster.domain.user import USER_FIELDS, json_schema
from ghsync_dagster.settings import Settings, load_settings
from ghsync_dagster.stores.spark import EVENT_SCHEMA, VERSIONED_USER_SCHEMA
from ghsync_dagster_tests.support.long_campaign import HANG_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dagster._core.definitions.assets.graph.asset_graph import AssetGraph

ROOT = Path(__file__).parents[2]
HEAVY = {
    *("pyspark", "py4j", "pymongo", "bson", "pandas", "numpy", "matplotlib", "pyarrow", "httpx", "jgo"),
    *("confluent_kafka", "pymysql", "prometheus_client", "dagster_pyspark", "dagster_spark"),
}
CHECKS = {
    "quarantined_ratio": "raw_events",
    "users_valid": "users",
    "spark_temp_marked": "mongo_users",
    "users_complete": "mongo_users",
    "no_spark_temp_left": "mongo_users",
    "unique_user_id_index": "mongo_users",
    "documents_conform": "mongo_users",
}


@pytest.fixture(scope="module")
def graph() -> AssetGraph:
    """The graph of all assets and checks."""
    return defs.resolve_asset_graph()


def run_python(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Run this environment's Python with a Dagster home of its own."""
    environment = {**os.environ, "DAGSTER_HOME": str(home)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS)


def test_definitions_load_in_a_fresh_interpreter_without_heavy_libraries(tmp_path: Path) -> None:
    program = "import sys, json, ghsync_dagster.definitions; print(json.dumps(sorted(sys.modules)))"
    result = run_python("-c", program, home=tmp_path)
    assert result.returncode == 0, result.stderr
    loaded = {module.partition(".")[0] for module in json.loads(result.stdout)}
    assert "ghsync_dagster" in loaded
    assert not loaded & HEAVY


def test_a_flow_of_the_command_line_is_wired_without_dagster(tmp_path: Path) -> None:
    program = """
import sys, ghsync_dagster.cli.app
from ghsync_dagster.settings import load_settings
from ghsync_dagster.stores.spark import session_of
from ghsync_dagster.wiring import batch_flow
assert batch_flow(load_settings()).spark.get is session_of
print([name for name in sys.modules if name.startswith("dagster")])
"""
    result = run_python("-c", program, home=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_definitions_cost_less_to_load_than_dagster_itself(tmp_path: Path) -> None:
    seconds: dict[str, list[float]] = {"dagster": [], "ghsync_dagster.definitions": []}
    for module in [*seconds, *seconds]:
        # Processor time, since a busy machine stretches the clock's.
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = run_python("-c", f"import {module}", home=tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds[module].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert result.returncode == 0, result.stderr
    sys.stdout.write(f"seconds of processor time: {seconds}\n")
    dagster, ours = (min(each) for each in seconds.values())
    assert ours < 2 * dagster


@pytest.mark.parametrize("source", [["-w", "workspace.yaml"], ["-m", "ghsync_dagster.definitions"]])
def test_dagster_finds_the_definitions_valid(tmp_path: Path, source: list[str]) -> None:
    result = run_python("-m", "dagster", "definitions", "validate", *source, home=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "All code locations passed validation" in result.stderr + result.stdout


def in_group(graph: AssetGraph, *groups: str) -> set[dg.AssetKey]:
    """The assets of groups."""
    return {key for key in graph.get_all_asset_keys() if graph.get(key).group_name in groups}


def test_the_assets_are_in_their_groups_and_depend_as_designed(graph: AssetGraph) -> None:
    dependencies = {
        key.to_user_string(): {parent.to_user_string() for parent in graph.get(key).parent_keys}
        for key in in_group(graph, "batch", "target")
    }
    assert dependencies == {
        "event_files": set(),
        "raw_events": {"event_files"},
        "quarantined_events": {"event_files"},
        "users": {"raw_events"},
        "mongo_users": {"users", "users_changes"},
    }
    assert in_group(graph, "target") == {dg.AssetKey("mongo_users")}
    assert {key for key in in_group(graph, "batch") if graph.get(key).is_external} == {dg.AssetKey("event_files")}
    assert graph.get(dg.AssetKey("event_files")).is_observable


def columns(graph: AssetGraph, asset: str) -> dict[str, dg.TableColumn]:
    """The columns that the UI shows of an asset before it was ever materialized."""
    schema = graph.get(dg.AssetKey(asset)).metadata["dagster/column_schema"]
    assert isinstance(schema, dg.TableSchema)
    return {column.name: column for column in schema.columns}


def test_every_column_of_every_table_says_what_it_is(graph: AssetGraph) -> None:
    tables = {key.to_user_string() for key in in_group(graph, "batch", "target")}
    assert tables == set(TABLES)
    for table in tables:
        for column in columns(graph, table).values():
            assert column.description, (table, column)


def test_the_columns_are_those_of_what_is_written(graph: AssetGraph) -> None:
    def types(asset: str) -> dict[str, str]:
        return {name: column.type for name, column in columns(graph, asset).items()}

    assert types("raw_events") == dict(flat(EVENT_SCHEMA))
    assert types("users") == dict(flat(VERSIONED_USER_SCHEMA))
    names = {"string": pa.string(), "bigint": pa.int64()}
    assert pa.schema([(name, names[kind]) for name, kind in types("quarantined_events").items()]) == (
        quarantine_schema()
    )
    contract = json_schema()["properties"]
    assert types("mongo_users") == {"_id": "objectId", **dict.fromkeys(USER_FIELDS, "string")}
    for name in USER_FIELDS:
        nullable = "null" in contract[name]["bsonType"]
        assert columns(graph, "mongo_users")[name].constraints.nullable is nullable


def flat(schema: StructType, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the type of each value, as Spark names them."""
    for field in schema.fields:
        if isinstance(field.dataType, StructType):
            yield from flat(field.dataType, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field.dataType.simpleString()


def test_each_column_of_the_users_leads_back_to_the_files(graph: AssetGraph) -> None:
    for asset in ("raw_events", "users", "users_changes", "mongo_users"):
        lineage = graph.get(dg.AssetKey(asset)).metadata["dagster/column_lineage"]
        assert isinstance(lineage, dg.TableColumnLineage)
        assert set(lineage.deps_by_column) == set(columns(graph, asset)) - {"_id"}
        for origins in lineage.deps_by_column.values():
            for origin in origins:
                assert origin.asset_key in graph.get(dg.AssetKey(asset)).parent_keys
                assert origin.column_name in columns(graph, origin.asset_key.to_user_string())


def test_what_is_materialized_has_a_code_version_and_says_how_fresh_it_has_to_be(graph: AssetGraph) -> None:
    for key in in_group(graph, "batch", "target") - {dg.AssetKey("event_files")}:
        assert (graph.get(key).code_version == code_version(None)) is (key != dg.AssetKey("mongo_users"))
        assert graph.get(key).freshness_policy_or_from_metadata


def test_every_asset_says_what_it_is_and_who_owns_it(graph: AssetGraph) -> None:
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert node.description
        assert node.owners
        assert node.kinds


def references(key: dg.AssetKey, definitions: dg.Definitions) -> list[Any]:
    """Where the UI leads from an asset to its code."""
    return list(definitions.resolve_asset_graph().get(key).metadata["dagster/code_references"].code_references)


def test_an_asset_leads_to_its_code_and_its_guide(monkeypatch: pytest.MonkeyPatch) -> None:
    key = dg.AssetKey("users")
    (local,) = references(key, defs)
    source = Path(local.file_path).read_text(encoding="utf-8").splitlines()
    assert "def users(" in "".join(source[local.line_number - 1 :][:20])
    guided = defs.resolve_asset_graph().get(key).metadata["guide"]
    assert guided == dg.MetadataValue.path(str(ROOT / "docs/explain/files.md"))
    monkeypatch.setenv("GHSYNC_GIT_URL", "https://github.com/acme/ghsync")
    monkeypatch.setenv("GHSYNC_GIT_REVISION", "v1")
    (there,) = references(key, build_defs())
    assert there.url.startswith("https://github.com/acme/ghsync/tree/v1/ghsync_dagster/defs/batch/assets.py#L")
    address = "https://github.com/acme/ghsync/blob/v1/docs/explain/files.md"
    assert guide("docs/explain/files.md") == {"guide": dg.MetadataValue.url(address)}


@pytest.mark.parametrize("url", ["https://user:token@github.com/a/b", "http://github.com/a/b", "git@github.com:a/b"])
def test_a_repository_without_a_plain_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="GHSYNC_GIT_URL"):
        load_settings(GHSYNC_GIT_URL=url)


def shown(definitions: dg.Definitions) -> dict[str, dict[str, str]]:
    """The configuration of each resource as the UI has it."""
    resources = RepositorySnap.from_def(definitions.get_repository_def()).resources or ()
    return {
        resource.name: {name: str(value) for name, value in resource.configured_values.items()}
        for resource in resources
    }


def test_the_resources_show_their_settings_and_no_secret(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = tmp_path / "uri"
    secret.write_text("mysql://app:hidden-1@127.0.0.1:1/new_data")
    monkeypatch.setenv("SPARK_MASTER", "local[1]")
    monkeypatch.setenv("MONGODB_URI", "mongodb://app:hidden-2@127.0.0.1:1")
    monkeypatch.setenv("MYSQL_URL_FILE", str(secret))
    (tmp_path / "options").write_text("-Djavax.net.ssl.trustStorePassword=hidden-3")
    monkeypatch.setenv("SPARK_DRIVER_JAVA_OPTIONS_FILE", str(tmp_path / "options"))
    (tmp_path / "connect").write_text("http://app:hidden-4@127.0.0.1:1")
    monkeypatch.setenv("CONNECT_URL_FILE", str(tmp_path / "connect"))
    definitions = build_defs()
    found = shown(definitions)
    assert "SPARK_MASTER" in found["spark"]["spark_master"]
    assert found["spark"]["spark_driver_memory"] == '"1g"'
    assert "MONGODB_URI" in found["batch"]["mongodb_uri"]
    assert found["batch"]["mongodb_database"] == '"new_data"'
    assert "hidden" not in serialize_value(RepositorySnap.from_def(definitions.get_repository_def())) + caplog.text


def settings_of_a_run(resources: dict[str, Any]) -> Settings:
    """Return the settings that a run with this config of resources has."""
    found: list[Settings] = []

    @dg.op
    def look(batch: BatchResource) -> None:
        found.append(batch.settings())

    @dg.job
    def looks() -> None:
        look()

    resolved = dg.Definitions(jobs=[looks], resources=resources_of_environment()).resolve_job_def("looks")
    assert resolved.execute_in_process(run_config={"resources": resources}).success
    return found[0]


def test_what_the_launchpad_gives_a_resource_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARK_MASTER", "spark://elsewhere:7077")
    monkeypatch.setenv("MONGODB_DATABASE", "one")
    given = {
        "spark": {"config": {"spark_master": "local[1]"}},
        "batch": {"config": {"mongodb_collection": "People"}},
    }
    settings = settings_of_a_run(given)
    assert (settings.spark_master, settings.mongodb_collection) == ("local[1]", "People")
    assert (settings.mongodb_database, settings_of_a_run({}).spark_master) == ("one", "spark://elsewhere:7077")


def test_an_empty_text_in_the_launchpad_is_as_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARK_MASTER", "spark://elsewhere:7077")
    monkeypatch.setenv("MONGODB_DATABASE", "one")
    given = {
        "spark": {"config": dict.fromkeys(("spark_master", "spark_driver_memory", "spark_driver_java_options"), "")},
        "batch": {"config": dict.fromkeys(("mongodb_uri", "mongodb_database", "mongodb_collection"), "")},
    }
    assert settings_of_a_run(given) == load_settings()


@pytest.mark.parametrize("setting", ["mongodb_uri", "rules_module"])
def test_a_secret_that_is_typed_into_the_launchpad_is_refused(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    secret = "mongodb://app:hunter2@127.0.0.1:1"
    with pytest.raises(dg.DagsterResourceFunctionError) as caught:
        settings_of_a_run({"batch": {"config": {setting: secret}}})
    assert "resources.batch.config." in str(caught.value.__cause__)
    assert "hunter2" not in str(caught.value.__cause__)
    monkeypatch.setenv("OTHER_MONGODB", secret)
    assert settings_of_a_run({"batch": {"config": {"mongodb_uri": {"env": "OTHER_MONGODB"}}}}).mongodb_uri


def test_wrong_settings_leave_the_code_location_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GHSYNC_MAX_QUARANTINED_RATIO", "many")
    assert "spark" in shown(build_defs())


def test_events_and_quarantine_come_from_one_step(graph: AssetGraph) -> None:
    assert graph.get(dg.AssetKey("raw_events")).execution_set_entity_keys == {
        dg.AssetKey("raw_events"),
        dg.AssetKey("quarantined_events"),
    }


def test_the_checks_are_on_their_assets_blocking_and_described(graph: AssetGraph) -> None:
    nodes = {key.name: graph.get(key) for key in graph.asset_check_keys if key.name not in CDC_CHECKS}
    assert {name: node.key.asset_key.to_user_string() for name, node in nodes.items()} == CHECKS
    assert all(node.blocking for node in nodes.values())
    assert all(node.description for node in nodes.values())


PRESETS = {
    "users_batch_job": (None, None),
    "users_sample_job": ("data/sample_data.json", None),
    "users_strict_job": (None, 0.0),
}


@pytest.mark.parametrize("name", PRESETS)
def test_the_batch_job_and_its_presets_run_every_asset_and_every_check(graph: AssetGraph, name: str) -> None:
    layer = defs.resolve_job_def(name).asset_layer
    assert layer.selected_asset_keys == in_group(graph, "batch", "target") - {dg.AssetKey("event_files")}
    assert {key.name for key in layer.asset_graph.asset_check_keys} == set(CHECKS)


@pytest.mark.parametrize("name", PRESETS)
def test_the_launchpad_opens_with_what_may_be_set(name: str) -> None:
    (preset,) = active_presets_from_job_def(defs.resolve_job_def(name))
    config: Any = preset.run_config["ops"]
    assert PRESETS[name] == (
        config["read_events"]["config"]["events_path"],
        config["raw_events_quarantined_ratio"]["config"]["max_quarantined_ratio"],
    )


def config_type(node: Any) -> object:
    return node.definition.config_schema.config_type


@pytest.mark.parametrize("job", [job.name for job in defs.resolve_all_job_defs() if not job.name.startswith("__")])
def test_every_launchpad_opens_with_all_that_the_ops_of_its_job_may_be_given(job: str) -> None:
    resolved = defs.resolve_job_def(job)
    (preset,) = active_presets_from_job_def(resolved)
    fields = {node.name: getattr(config_type(node), "fields", {}) for node in resolved.nodes}
    given = {name: part["config"] for name, part in dict[str, Any](preset.run_config)["ops"].items()}
    assert {name: set(config) for name, config in given.items()} == {
        name: set(found) for name, found in fields.items() if found
    }
    # With nothing changed it is a run that Dagster takes.
    assert dg.validate_run_config(resolved, preset.run_config)


def test_what_the_ui_tells_of_resources_and_config_is_plain_text() -> None:
    resources = RepositorySnap.from_def(defs.get_repository_def()).resources or ()
    told = {resource.name: resource.resource_snapshot.description for resource in resources}
    for job in defs.resolve_all_job_defs():
        for node in job.nodes:
            told[node.name] = getattr(config_type(node), "description", None) or "it takes no config"
    assert {"spark", "batch", "changes", "read_events", "repair_users"} <= set(told)
    assert {name: text for name, text in told.items() if not text or set(text) & set("`\n")} == {}


def test_the_audit_job_runs_every_check_and_materializes_nothing() -> None:
    job = defs.resolve_job_def("users_audit_job")
    assert job.asset_layer.selected_asset_keys == set()
    assert {node.name for node in job.nodes} == {f"{asset}_{check}" for check, asset in CHECKS.items()}


@pytest.mark.parametrize("name", ["users_batch_job", "users_audit_job", "__ASSET_JOB"])
def test_steps_run_in_the_process_of_the_run(name: str) -> None:
    job = defs.resolve_implicit_global_asset_job_def() if name == "__ASSET_JOB" else defs.resolve_job_def(name)
    assert job.executor_def is dg.in_process_executor


def test_a_load_is_in_a_pool_of_its_own() -> None:
    assert {asset.op.pool for asset in defs.assets or [] if isinstance(asset, dg.AssetsDefinition)} == {
        None,
        "mongo_users",
    }


def test_the_alerts_are_a_sensor() -> None:
    assert defs.resolve_sensor_def("alerts").default_status == dg.DefaultSensorStatus.RUNNING


def test_a_resource_can_be_replaced(tmp_path: Path) -> None:
    class Elsewhere(BatchResource):
        """The batch flow of an empty home."""

        def settings(self) -> Settings:
            return load_settings(GHSYNC_HOME=tmp_path)

    job = build_defs({"batch": Elsewhere(spark=SparkResource())}).resolve_job_def("users_audit_job")
    with dg.DagsterInstance.ephemeral() as instance:
        result = job.execute_in_process(
            instance=instance, op_selection=["raw_events_quarantined_ratio"], raise_on_error=False
        )
    failure = result.failure_data_for_node("raw_events_quarantined_ratio")
    assert failure
    assert failure.user_failure_data
    assert str(tmp_path) in str(failure.user_failure_data.description)
    assert failure.user_failure_data.metadata["kind"].value == "permanent"
    assert result.get_asset_check_evaluations() == []
