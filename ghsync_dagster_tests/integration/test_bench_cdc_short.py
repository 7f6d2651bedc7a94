"""The benchmark of the change path works: right states count, wrong ones and failures are told, nothing outlives it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks import cdc, cdc_results, harness, results
from benchmarks.cdc_contenders import OURS, RAW, SINK, Bench
from benchmarks.cdc_events import Case, Event, History, Records, Row, User, users
from benchmarks.contenders import Content, Digest
from benchmarks.peers.kafka_sink import Worker
from ghsync_dagster.domain.change import Op
from ghsync_dagster.domain.coalesce import coalesce
from ghsync_dagster.domain.envelope import ChangeDecoder
from ghsync_dagster.jvm.jars import ensure_jars, locked_set
from ghsync_dagster.jvm.java import find_java
from ghsync_dagster.local.kafka import KafkaServer
from ghsync_dagster_tests.support.process_parts import is_java, left_by_a_signal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ghsync_dagster.settings import Settings

pytestmark = pytest.mark.integration

CASE = Case(events=2_000, keys=240, schemas=False)
PEOPLE = [User(number, f"user-{number}") for number in range(1, 2_000)]


def bench_command(*options: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.cdc", *options]


@pytest.fixture
def bench(server_settings: Settings, tmp_path: Path) -> Bench:
    broker = KafkaServer(server_settings).up(lambda _: None)
    assert broker.uri is not None
    assert broker.pid is not None
    jars = {name: ensure_jars(server_settings, lambda _: None, locked_set(name)) for name in ("kafka", "bench")}
    worker = Worker(find_java(server_settings).command, jars["kafka"], jars["bench"][0])
    return Bench(tmp_path, tmp_path, broker.uri, broker.pid, worker, timeout_seconds=60)


def test_every_contender_ends_in_the_state_that_is_due(tmp_path: Path) -> None:
    options = ("--sizes", "2000", "--rounds", "1", "--keys", "0.12", "--rates", "200", "--seconds", "24")
    # Without schemas the test of a wrong end state runs them.
    command = bench_command(*options, "--schemas", "on", "--out", str(tmp_path))
    done = subprocess.run(command, cwd=harness.PROJECT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr

    document = json.loads((tmp_path / "cdc.json").read_text())
    assert document["failures"] == []
    runs = document["runs"]
    assert [run["contender"] for run in runs] == [OURS, SINK, RAW]
    assert {run["case"] for run in runs} == {"240 keys, schemas on"}
    assert len({run["documents"] for run in runs}) == 1
    for run in runs:
        assert run["seconds"] > 0
        assert run["peak_mb"] > 10
    assert all((run["peak_java_mb"] > 100) == (run["contender"] == SINK) for run in runs)
    told = {ratio["words"]: ratio for ratio in document["ratios"]}
    assert told["events/s, ours / sink: 2,000 events, 240 keys, schemas on"]["target"] == "at least 2.5"
    assert told["events/s, ours / raw: 2,000 events, 240 keys, schemas on"]["target"] == "at least 0.9"

    (latency,) = document["latency"]
    assert latency["equal"] is True
    assert latency["changes"] >= 3_000
    seconds = [second["latency"]["count"] for second in latency["seconds"]]
    assert len(seconds) >= 23
    assert sum(seconds) == latency["all"]["count"] >= latency["changes"]
    for spread in (latency["all"], latency["steady"], latency["around"]):
        assert 0 < spread["p50"] <= spread["p95"] <= spread["p99"] <= spread["max"]
    assert latency["longest_gap_ms"] > 0
    assert (tmp_path / "cdc.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_end_state_is_told_and_is_in_no_median(bench: Bench) -> None:
    unordered = dataclasses.replace(bench, worker=dataclasses.replace(bench.worker, ordered=False))
    # Many deletes and creates of one key fall into one batch, which the connector regroups.
    runs, failures = cdc.measure(unordered, [CASE], 1, [OURS, SINK, RAW])
    assert [run.contender for run in runs] == [OURS, RAW]
    assert len(failures) == 1
    assert "round 1, sink: sink left " in failures[0]


class Forgetful(History):
    """A history whose coalesced operations lack the last one."""

    def batches(self, size: int) -> Iterator[dict[int, Row | None]]:
        """Yield all but one."""
        *first, last = super().batches(size)
        last.popitem()
        yield from [*first, last]


def test_a_lost_operation_is_a_wrong_end_state(bench: Bench) -> None:
    history = Forgetful(CASE, PEOPLE)
    with pytest.raises(harness.BenchmarkError, match=rf"raw left .* documents; {history.due.documents} are due"):
        bench.run(RAW, history, 1, None)


def test_a_contender_that_fails_is_told_with_its_last_words(bench: Bench) -> None:
    broken = dataclasses.replace(bench.worker, sink_jar=bench.worker.kafka_jars[0])
    runs, failures = cdc.measure(dataclasses.replace(bench, worker=broken), [CASE], 1, [SINK])
    assert runs == []
    assert len(failures) == 1
    assert "MongoSinkConnector" in failures[0]


def test_a_signal_ends_everything_that_was_started(tmp_path: Path) -> None:
    options = ("--sizes", "100000", "--contenders", SINK, "--rates", "", "--out", str(tmp_path))
    # The broker's and the worker's.
    code, output, left = left_by_a_signal(
        bench_command(*options), harness.PROJECT, lambda family: sum(map(is_java, family)) >= 2, 120
    )
    assert code == 130, output
    assert left == []
    assert list(tmp_path.iterdir()) == []


# --- the events -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [240, 1_800])
@pytest.mark.parametrize("schemas", [False, True])
def test_the_records_are_those_of_the_table(keys: int, schemas: bool) -> None:
    history = History(Case(2_000, keys, schemas), PEOPLE)
    decoder, records = ChangeDecoder(), Records(schemas=schemas)
    table: dict[int, Row] = {}
    changes = []
    events = [*history.snapshot(), *history.changes()]
    for number, event in enumerate(events):
        assert fits(event, table.get(event.user_id))
        if event.after is None:
            del table[event.user_id]
        else:
            table[event.user_id] = event.after
        made = records.of(event, number)
        changes += [decoder.decode(key.encode(), None if value is None else value.encode()) for key, value in made]
        assert [change.kind for change in changes[-len(made) :]] == [event.op, *["tombstone"][: event.op == "d"]]
    assert len(events) == history.snapshot_size + 2_000
    assert {event.op for event in events} == {"r", "c", "u", "d"}

    (segment,) = coalesce(changes)
    users_left = Digest()
    for change in segment.changes.values():
        if change.op is Op.UPSERT:
            assert change.user is not None
            users_left.add(change.user)
    assert users_left.content() == history.due == content(table)
    last = events[-1]
    assert (last.op, str(last.user_id)) == ("d", history.last_key)
    assert [event.op for event in events if str(event.user_id) == history.last_key] == ["r", "d"]


def fits(event: Event, stored: Row | None) -> bool:
    return event.before == stored and (event.op in "rc") == (stored is None)


def content(table: dict[int, Row]) -> Content:
    digest = Digest()
    for row in table.values():
        digest.add(row.document())
    return digest.content()


def test_coalesced_operations_are_as_many_as_asked_for(tmp_path: Path) -> None:
    history = History(CASE, PEOPLE)
    for wanted in (400, 1_000, 1_900):
        size = history.batch_size(wanted)
        operations = history.write_operations(tmp_path / "operations.json", size)
        assert operations <= wanted
        assert operations >= 0.75 * wanted
    lines = (tmp_path / "operations.json").read_text().splitlines()
    table: dict[str, Any] = {}
    for line in lines:
        table |= dict(json.loads(line))
    digest = Digest()
    for user in table.values():
        if user is not None:
            digest.add(user)
    assert digest.content() == history.due


def test_users_are_those_of_the_sample(tmp_path: Path) -> None:
    found = users(500, tmp_path)
    assert len({user.user_id for user in found}) == len(found) == 500
    assert all(user.login for user in found)
    assert list(tmp_path.iterdir()) == []


# --- the ratios -----------------------------------------------------------------------------------------------------


def test_ratios_compare_medians_and_know_their_targets() -> None:
    def run(contender: str, seconds: float, *, events: int = 100_000, peak_mb: float = 100.0) -> results.Run:
        return results.Run(
            contender=contender,
            events=events,
            round=1,
            seconds=seconds,
            phases={},
            counts={},
            cpu_seconds=seconds,
            peak_mb=peak_mb,
            peak_java_mb=0.0,
            peak_other_mb=peak_mb,
            store_cpu_seconds=None,
            store_peak_mb=None,
            stored_mb=None,
            documents=1,
            foreign_cores=0.0,
            load_average=0.0,
            case=Case(events, events * 12 // 100, schemas=False).words,
        )

    runs = [
        *(run(OURS, seconds) for seconds in (2.0, 2.5, 9.0)),
        run(SINK, 10.0),
        run(RAW, 2.0),
        run(OURS, 25.0, events=1_000_000, peak_mb=130.0),
    ]
    found = {ratio.words: ratio for ratio in cdc_results.ratios(results.summarize(runs))}
    faster = found["events/s, ours / sink: 100,000 events, 12,000 keys, schemas off"]
    assert (faster.value, faster.target, faster.met) == (4.0, "at least 3", True)
    raw = found["events/s, ours / raw: 100,000 events, 12,000 keys, schemas off"]
    assert (raw.value, raw.met) == (0.8, False)
    memory = found["ours, peak memory: 1,000,000 events, 120,000 keys, schemas off, against 100,000"]
    assert (memory.value, memory.met) == (1.3, False)
