"""The code location as Dagster sees it: it loads fast and lightly, and holds the graph, checks and jobs it should."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
import pytest

from ghsync_dagster.definitions import build_defs, defs
from ghsync_dagster.defs.cdc.checks import CDC_CHECKS
from ghsync_dagster.defs.resources import BatchResource
from ghsync_dagster.settings import Settings, load_settings

if TYPE_CHECKING:
    from dagster._core.definitions.assets.graph.asset_graph import AssetGraph

ROOT = Path(__file__).parents[2]
HEAVY = {
    *("pyspark", "py4j", "pymongo", "bson", "pandas", "numpy", "matplotlib", "pyarrow", "httpx", "jgo"),
    *("confluent_kafka", "pymysql", "hdrh", "prometheus_client"),
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
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_definitions_load_in_a_fresh_interpreter_without_heavy_libraries(tmp_path: Path) -> None:
    program = "import sys, json, ghsync_dagster.definitions; print(json.dumps(sorted(sys.modules)))"
    result = run_python("-c", program, home=tmp_path)
    assert result.returncode == 0, result.stderr
    loaded = {module.partition(".")[0] for module in json.loads(result.stdout)}
    assert "ghsync_dagster" in loaded
    assert not loaded & HEAVY


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


def test_the_assets_are_in_one_group_and_depend_as_designed(graph: AssetGraph) -> None:
    dependencies = {
        key.to_user_string(): {parent.to_user_string() for parent in graph.get(key).parent_keys}
        for key in graph.get_all_asset_keys()
        if graph.get(key).group_name == "batch"
    }
    assert dependencies == {
        "raw_events": set(),
        "quarantined_events": set(),
        "users": {"raw_events"},
        "mongo_users": {"users", "users_changes"},
    }


def test_every_asset_says_what_it_is_and_who_owns_it(graph: AssetGraph) -> None:
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert node.description
        assert node.owners
        assert node.kinds


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


def test_the_batch_job_runs_every_asset_and_every_check(graph: AssetGraph) -> None:
    layer = defs.resolve_job_def("users_batch_job").asset_layer
    assert layer.selected_asset_keys == {
        key for key in graph.get_all_asset_keys() if graph.get(key).group_name == "batch"
    }
    assert {key.name for key in layer.asset_graph.asset_check_keys} == set(CHECKS)


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

    job = build_defs({"batch": Elsewhere()}).resolve_job_def("users_audit_job")
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
