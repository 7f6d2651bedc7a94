"""The benchmark of slices under the supervisor: probes are seen, a hand-over and a kill measured, nothing is left."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from benchmarks import cdc_probes, harness
from benchmarks.cdc_probes import FIRST_KEY, paired
from benchmarks.contenders import inherited_environment
from benchmarks.tellers import Teller, now_ms
from ghsync_dagster.domain.user import USER_FIELDS
from ghsync_dagster.stores.mongo.users import UserStore
from ghsync_dagster_tests.support.long_campaign import LONG
from ghsync_dagster_tests.support.process_parts import left_by_a_signal, words

if TYPE_CHECKING:
    from pathlib import Path

    from ghsync_dagster.settings import Settings

pytestmark = pytest.mark.integration


def bench_command(*options: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.cdc_supervised", *options]


def test_the_watch_sees_every_probe_once(server_settings: Settings, mongo_uri: str, tmp_path: Path) -> None:
    database = f"test_probes_{now_ms()}"
    own = {"GHSYNC_HOME": str(server_settings.home_dir), "MONGODB_URI": mongo_uri, "MONGODB_DATABASE": database}
    commits = []
    with UserStore(mongo_uri, database, "Users") as store:
        store.ensure_collection()
        with Teller("watch", cdc_probes.MODULE, ["watch"], inherited_environment() | own, tmp_path) as watch:
            watch.wait(lambda: watch.ready, "watch", 60)
            # Not in their order, as in an unordered bulk; a user alongside that is no probe.
            for number in (1, 0, 2, 5, 4, 3):
                store.users.insert_one({**dict.fromkeys(USER_FIELDS), "user_id": str(FIRST_KEY + number)})
                commits.append({"first": number, "records": 1, "at": now_ms()})
            store.users.insert_one({**dict.fromkeys(USER_FIELDS), "user_id": "7"})
            watch.wait(lambda: watch.records >= len(commits), "see all", 30)
            watch.end(0)
        store.client.drop_database(database)
    assert watch.report == {"seen": 6}
    assert len(paired(commits, watch.lines)) == len(commits)


@pytest.mark.faults
@LONG
def test_a_hand_over_and_a_kill_are_measured(tmp_path: Path) -> None:
    options = ("--rate", "100", "--hand-overs", "1", "--kills", "alone", "--slice-seconds", "40")
    command = bench_command(*options, "--out", str(tmp_path))
    done = subprocess.run(command, cwd=harness.PROJECT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr

    run = json.loads((tmp_path / "cdc-supervised.json").read_text())["run"]
    assert run["equal"] is True
    found = run["timeline"]
    (hand_over,), (kill,) = found["hand_overs"], found["kills"]
    for stretch in (found["steady"], hand_over["around"], kill["around"]):
        spread = stretch["latency"]
        assert 0 < spread["p50"] <= spread["p95"] <= spread["p99"] <= spread["max"]
        assert stretch["longest_gap_ms"] > 0
    assert hand_over["asked_at"] < hand_over["began_at"] < hand_over["ended_at"] < kill["at"]
    assert 0 <= kill["noticed"] <= kill["asked"] + 1
    assert kill["asked"] < kill["started"] < kill["next_applied"] + 1
    assert kill["taken_over"] < kill["next_applied"] <= kill["caught_up"]
    assert kill["around"]["longest_gap_ms"] > hand_over["around"]["longest_gap_ms"]
    assert sum(second["latency"]["count"] for second in found["seconds"]) == found["all"]["count"]
    assert (tmp_path / "cdc-supervised.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.faults
@LONG
def test_a_signal_ends_servers_dagster_and_slices(tmp_path: Path) -> None:
    command = bench_command("--rate", "100", "--out", str(tmp_path))
    # The workload begins once a slice is at work.
    code, output, left = left_by_a_signal(
        command, harness.PROJECT, lambda family: any("change" in words(process) for process in family), 180
    )
    assert code == 130, output
    assert left == []
    assert list(tmp_path.iterdir()) == []
