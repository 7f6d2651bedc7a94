"""The benchmark's harness works: every contender ends in the state that is due, and nothing outlives a run.

``TEST_FAULT_ROUNDS=N`` (any N) runs every contender.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import contenders, harness, results
from ghsync_dagster_tests.support.long_campaign import ROUNDS
from ghsync_dagster_tests.support.process_parts import children_of, is_java, left_by_a_signal, words

pytestmark = pytest.mark.integration

EVENTS = 400
NAMES = ("ours", "before", "ours-dagster", "plain", "floor", "floor-versions") if ROUNDS else ("ours", "floor-versions")


def bench_command(*options: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.batch", *options]


@pytest.mark.faults
def test_every_contender_ends_in_the_state_that_is_due(tmp_path: Path) -> None:
    options = ("--sizes", str(EVENTS), "--rounds", "1", "--contenders", ",".join(NAMES), "--out", str(tmp_path))
    done = subprocess.run(bench_command(*options), cwd=harness.PROJECT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr

    document = json.loads((tmp_path / "batch.json").read_text())
    assert document["failures"] == []
    runs = {run["contender"]: run for run in document["runs"]}
    assert tuple(runs) == NAMES
    users = {name: runs[name]["documents"] for name in NAMES}
    assert len(set(users.values())) == 1, users
    assert 0 < users["ours"] < EVENTS
    for run in runs.values():
        assert run["seconds"] > 0
        assert run["cpu_seconds"] > 0
        assert run["peak_mb"] > 10
        assert run["store_peak_mb"] > 10
    assert all((run["peak_java_mb"] > 100) == ("floor" not in name) for name, run in runs.items())
    assert runs["ours"]["phases"]["jvm_start"] > 0
    told = {ratio["words"].partition(",")[0] for ratio in document["ratios"]}
    assert "(ours - JVM start) / floor-versions" in told
    assert not ROUNDS or told >= {
        *("ours / before", "plain / ours", "plain / ours-dagster", "(ours - JVM start) / floor"),
    }
    assert (tmp_path / "batch.png").read_bytes().startswith(b"\x89PNG")


def test_a_signal_ends_everything_that_was_started(tmp_path: Path) -> None:
    options = ("--sizes", "28600", "--contenders", "plain", "--out", str(tmp_path))
    code, output, left = left_by_a_signal(
        bench_command(*options), harness.PROJECT, lambda family: any(map(is_java, family)), 120
    )
    assert code == 130, output
    assert left == []
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    with pytest.raises(harness.BenchmarkError, match="slow did not end within 1 s"):
        harness.run_watched([sys.executable, "-c", script], os.environ, tmp_path, name="slow", timeout_seconds=1)
    assert not any("time.sleep(600)" in " ".join(words(process)) for process in children_of(os.getpid()))


def test_a_failed_contender_is_an_error_that_carries_its_last_lines(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such thing')"]
    with pytest.raises(harness.BenchmarkError, match=r"(?s)broken exited with 1.*no such thing"):
        harness.run_watched(command, os.environ, tmp_path, name="broken", timeout_seconds=30)


def event(number: int, user: int, login: str, created_at: str) -> str:
    actor = {"id": user, "login": login, "gravatar_id": "", "url": f"u/{user}", "avatar_url": f"a/{user}"}
    return json.dumps({"id": str(number), "created_at": created_at, "actor": actor})


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        ({"login": "other"}, "not the right content"),
        ({"spark_temp": "spark_write"}, "with the marker"),
        (None, "left 1 documents; 2 are due"),
    ],
)
def test_a_wrong_end_state_is_an_error(tmp_path: Path, spoil: dict[str, str] | None, complaint: str) -> None:
    from pymongo import MongoClient

    events = tmp_path / "events.json"
    lines = [
        event(11, 1, "new", "2015-01-01T10:00:01Z"),
        event(9, 1, "old", "2015-01-01T10:00:01Z"),
        event(10, 2, "b", "2015-01-01T10:00:00Z"),
    ]
    events.write_text("\n".join(lines) + "\n")
    expected = contenders.expected_content(events)
    assert (expected.events, expected.users.documents) == (3, 2)
    floor = contenders.CONTENDERS["floor"]
    with harness.embedded_store(tmp_path) as store:
        environment = contenders.environment(store, events, tmp_path / "home", Path("unused"))
        command = floor.command(events, Path("unused"))
        harness.run_watched(command, environment, tmp_path, name="floor", timeout_seconds=60)
        assert contenders.check_end_state(floor, store, expected) == expected.users
        with MongoClient[dict[str, object]](store.uri) as client:
            users = client[store.database][contenders.COLLECTION]
            stored = users.find_one({"user_id": "1"}, {"_id": False})
            assert stored is not None
            assert stored["login"] == "new"
            if spoil is None:
                users.delete_one({"user_id": "2"})
            else:
                users.update_one({"user_id": "2"}, {"$set": spoil})
        with pytest.raises(harness.BenchmarkError, match=complaint):
            contenders.check_end_state(floor, store, expected)


def test_ratios_compare_medians_and_know_their_targets() -> None:
    def run(contender: str, seconds: float, jvm_start: float = 0.0, events: int = results.MIDDLE) -> results.Run:
        return results.Run(
            contender=contender,
            events=events,
            round=1,
            seconds=seconds,
            phases={"jvm_start": jvm_start} if jvm_start else {},
            counts={},
            cpu_seconds=seconds,
            peak_mb=100.0,
            peak_java_mb=0.0,
            peak_other_mb=100.0,
            store_cpu_seconds=None,
            store_peak_mb=None,
            stored_mb=None,
            documents=1,
            foreign_cores=0.0,
            load_average=0.0,
        )

    runs = [
        *(run("ours", seconds, jvm_start=10.0) for seconds in (20.0, 25.0, 90.0)),
        run("plain", 100.0),
        run("floor", 10.0),
        run("ours", 160.0, jvm_start=10.0, events=results.LARGE),
    ]
    found = {ratio.words: ratio for ratio in results.ratios(results.summarize(runs))}
    assert found["plain / ours, 286,000 events"].value == 4.0
    assert found["plain / ours, 286,000 events"].met is True
    assert found["(ours - JVM start) / floor, 286,000 events"].value == 1.5
    assert found["(ours - JVM start) / floor, 286,000 events"].met is False
    linear = found["ours: seconds an event without JVM start, 2,860,000 against 286,000 events"]
    assert (linear.value, linear.met) == (1.0, True)
