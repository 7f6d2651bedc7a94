"""What a worker tells of the connector, what is made of it, and how it reaches checks, metrics and the command line."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from ghsync_dagster import connector as connector_flow
from ghsync_dagster.cdc.health import checks
from ghsync_dagster.cdc.health import connector as cdc_connector
from ghsync_dagster.cdc.health.connector import (
    NOT_ASKED,
    ConnectorProbe,
    ConnectorReport,
    require_stream,
    watch_connector,
)
from ghsync_dagster.cdc.health.metrics import ChangeMetrics, PrometheusView
from ghsync_dagster.domain.connector import ConnectorState, Sample, base_of, cure_of
from ghsync_dagster.domain.errors import RefusedError, UnavailableError
from ghsync_dagster.local.connect import ConnectServer
from ghsync_dagster.local.supervisor import ServiceStatus
from ghsync_dagster.settings import load_settings
from ghsync_dagster.stores import connect
from ghsync_dagster.stores.connect import ConnectWorker, reason_of
from ghsync_dagster.wiring import connector_probe

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

URL = "http://u:s3cret@127.0.0.1:9"
CAUSE = "Error processing row in Users, internal schema size 5, but row size 1"
OFFSET = {"ts_sec": 1_796_000_016, "file": "binlog.000001", "pos": 780}
RUNS = ConnectorState("RUNNING")
FAILED = ConnectorState("FAILED", CAUSE)
STATES = ("RUNNING", "FAILED", "PAUSED", "STOPPED", "UNASSIGNED", "RESTARTING", "NONE")


class Worker:
    """A Connect worker in memory, which counts what it is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.state = "RUNNING"
        self.offset: dict[str, Any] | None = OFFSET
        self.config = {"heartbeat.interval.ms": "5000"}
        self.is_away = False

        def client(url: str, seconds: float = 1) -> httpx.Client:
            return httpx.Client(base_url=url, timeout=seconds, transport=httpx.MockTransport(self.answer))

        monkeypatch.setattr(connect, "client_of", client)

    def answer(self, request: httpx.Request) -> httpx.Response:
        """Answer as Connect does."""
        if self.is_away:
            raise httpx.ConnectError("refused")
        what = request.url.path.rpartition("/")[2]
        if what == "config":
            return httpx.Response(200, json=self.config)
        if what == "offsets":
            return (
                httpx.Response(200, json={"offsets": [{"partition": {"server": "m"}, "offset": self.offset}]})
                if self.offset
                else httpx.Response(404, json={"error_code": 404, "message": "HTTP 404 Not Found"})
            )
        trace = f"org.apache.Stopped: at u\nCaused by: io.debezium.X: {CAUSE}." if self.state == "FAILED" else ""
        task = {"id": 0, "state": self.state} | ({"trace": trace} if trace else {})
        return httpx.Response(200, json={"connector": {"state": "RUNNING"}, "tasks": [task]})

    def open(self) -> ConnectWorker:
        """Open it."""
        return ConnectWorker(URL, 1, 0)


class Table:
    """The end of a binlog."""

    def __init__(self) -> None:
        self.end: str | None = "binlog.000001:780"
        self.error: Exception | None = None

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def log_end(self) -> str | None:
        """Where it is."""
        if self.error:
            raise self.error
        return self.end


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    """A worker whose connector runs and is at the end of the binlog."""
    return Worker(monkeypatch)


@pytest.fixture
def table() -> Table:
    """The database that it follows."""
    return Table()


def probe_of(worker: Worker, table: Table | None, still_seconds: float = 0.3) -> ConnectorProbe:
    opened: Any = None if table is None else lambda: table
    return ConnectorProbe(worker.open, opened, still_seconds=still_seconds)


def test_the_reason_of_a_failure_is_its_first_line_and_its_innermost_cause() -> None:
    trace = (
        "a.B: stopped\n\tat x\nCaused by: c.D: mysql://u:s3cret@h refused\n\tat y\nCaused by: e.F: timed out\n\tat z\n"
    )
    assert reason_of(trace) == "a.B: stopped; e.F: timed out"
    assert reason_of("c.D: at mysql://u:s3cret@h\n") == "c.D: at mysql://***@h"
    assert reason_of("") == "no reason is given"
    parsing = "a.B: stopped\nCaused by: e.P: not parsed: CREATE USER u IDENTIFIED BY 's3cret'\nCaused by: g.H\n"
    assert reason_of(parsing) == "a.B: stopped; e.P: not parsed: CREATE USER u IDENTIFIED ***"


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE USER u IDENTIFIED BY 's3cret'",
        'ALTER USER u@h identified by "s3cret" REPLACE "s3cret"',
        "CREATE USER u IDENTIFIED WITH mysql_native_password AS 's3cret', v IDENTIFIED BY 's3cret'",
        "CREATE USER u IDENTIFIED BY PASSWORD '*s3cret'",
        "CREATE USER u IDENTIFIED VIA ed25519 USING PASSWORD('s3cret') OR x USING 's3cret'",
        "SET PASSWORD FOR u = PASSWORD('it''s s3cret')",
        "GRANT ALL ON *.* TO u IDENTIFIED/* x */BY's3cret",
        "CHANGE MASTER TO MASTER_USER='u', MASTER_PASSWORD = 's3cret'",
        "CREATE SERVER s FOREIGN DATA WRAPPER mysql OPTIONS (USER 'u', PASSWORD `s3cret`)",
    ],
)
@pytest.mark.parametrize("trace", ["{}", "a.B: not parsed: {}\n\tat x", "a.B: no\nCaused by: e.P: not parsed: {}.\n"])
def test_no_password_of_a_statement_is_told_however_it_is_quoted(statement: str, trace: str) -> None:
    told = reason_of(trace.format(statement))
    assert "s3cret" not in told
    assert "***" in told
    parsing = reason_of(f"a.ParsingException: {statement}\nCaused by: e.F: mismatched input")
    assert parsing.endswith("; e.F: mismatched input")


@pytest.mark.parametrize(
    ("reason", "helps"),
    [
        (CAUSE, "take a new snapshot"),
        ("Encountered change event for table new_data.Users whose schema isn't known to this connector", "snapshot"),
        ("The connector is trying to read binlog at x, but this is no longer available on the server", "snapshot"),
        ("Could not find first log file name in binary log index file Error code: 1236", "snapshot"),
        ("io.debezium.text.ParsingException: mismatched input 'url'", "ddl.parser.type=legacy"),
        ("Access denied; you need the REPLICATION SLAVE privilege", "REPLICATION CLIENT"),
        ("Connection reset", "Fix what it names, then run ghsync up connect"),
    ],
)
def test_each_known_cause_has_its_way_out(reason: str, helps: str) -> None:
    assert helps in cure_of(reason)
    assert helps in ConnectorState("FAILED", reason).way_out()


@pytest.mark.parametrize("state", [*STATES, "UNKNOWN"])
def test_every_state_but_running_has_words_and_a_way_out(state: str) -> None:
    found = ConnectorState(state, "it is gone" if state in ("FAILED", "UNKNOWN") else None, where="http://h")
    assert bool(found.way_out()) == (state != "RUNNING")
    assert found.is_stopped == (state in ("FAILED", "PAUSED", "STOPPED", "NONE", "UNKNOWN"))
    assert state in ("NONE", "UNKNOWN") or f"is {state}" in found.words()


@pytest.mark.parametrize(
    ("status", "message"), [(409, "no leader"), (500, "Request cannot be completed because a rebalance is expected")]
)
def test_a_worker_that_is_about_to_rebalance_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, status: int, message: str
) -> None:
    answers: list[httpx.Response] = []

    def client(url: str, seconds: float = 1) -> httpx.Client:
        return httpx.Client(base_url=url, timeout=seconds, transport=httpx.MockTransport(lambda _: answers.pop(0)))

    monkeypatch.setattr(connect, "client_of", client)
    monkeypatch.setattr(connect, "_POLL_SECONDS", 0)
    busy = httpx.Response(status, json={"error_code": status, "message": message})
    with ConnectWorker(URL) as opened:
        answers[:] = [busy, busy, httpx.Response(200, json={"name": "ghsync-users"})]
        assert opened.config() == {"name": "ghsync-users"}
        answers[:] = [httpx.Response(500, json={"message": "Request timed out"})]
        with pytest.raises(UnavailableError, match="Request timed out"):
            opened.config()


CALLS: dict[str, Callable[[ConnectWorker], object]] = {
    "status": ConnectWorker.read_state,
    "config": ConnectWorker.config,
    "heartbeats": ConnectWorker.sends_heartbeats,
    "offset": ConnectWorker.offset,
    "any offset": ConnectWorker.has_offset,
    "configure": lambda worker: worker.configure({}),
}
ODD_ANSWERS = {
    "a page": httpx.Response(200, html="<h1>Welcome</h1>"),
    "nothing": httpx.Response(200),
    "no text": httpx.Response(200, content=b'"\xff"'),
    "deep": httpx.Response(200, content=b"[" * 100_000),
    "null": httpx.Response(200, json=None),
    "a list": httpx.Response(200, json=["connector", "tasks", "offsets"]),
    "other members": httpx.Response(200, json={"status": {"up": True}}),
    "members of other kinds": httpx.Response(200, json={"connector": "x", "tasks": 3, "offsets": {}, "name": 5}),
    "half of them": httpx.Response(200, json={"connector": {}, "tasks": [{}], "offsets": [{}]}),
    "no such path": httpx.Response(404, html="<h1>Not found</h1>"),
    "elsewhere": httpx.Response(302, headers={"Location": "http://h/login"}),
    "a failure that is no object": httpx.Response(500, json=[1]),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("odd", ODD_ANSWERS)
def test_what_answers_in_another_way_than_a_worker_is_not_available(
    monkeypatch: pytest.MonkeyPatch, odd: str, call: str
) -> None:
    transport = httpx.MockTransport(lambda _: ODD_ANSWERS[odd])
    monkeypatch.setattr(connect, "client_of", lambda url, _: httpx.Client(base_url=url, transport=transport))
    with ConnectWorker(URL, 1, 0) as opened:
        with pytest.raises(UnavailableError) as caught:
            CALLS[call](opened)
        assert opened.state().state == "UNKNOWN"
        assert not opened.serves()
    assert caught.value.way_out
    assert "s3cret" not in str(caught.value)


def test_a_report_that_fails_is_logged_and_what_watches_goes_on(worker: Worker, table: Table) -> None:
    found: list[ConnectorReport] = []
    probe = probe_of(worker, table)
    watch_connector(probe, found.append)
    watch_connector(None, found.append)

    class Refusing(ConnectorProbe):
        def report(self, *, with_log: bool = True) -> ConnectorReport:
            del with_log
            raise RefusedError("No.", way_out="Ask.")

    watch_connector(Refusing(worker.open, None, still_seconds=1), found.append)
    assert [report.state.state for report in found] == ["RUNNING"]


def test_a_report_has_the_state_the_offset_and_the_end_of_the_binlog(worker: Worker, table: Table) -> None:
    report = probe_of(worker, table).report()
    assert (report.state.state, report.blind, report.event_at) == ("RUNNING", "", 1_796_000_016.0)
    assert report.sample.log == report.sample.position == "binlog.000001:780"


def test_what_could_not_be_looked_at_is_said(worker: Worker, table: Table) -> None:
    assert probe_of(worker, None).report().blind == "MYSQL_URL is not set"
    table.error = RefusedError("Asking where the binlog ends: MySQL refused.", way_out="")
    assert "MySQL refused" in probe_of(worker, table).report().blind
    worker.config = {}
    assert "heartbeat.interval.ms" in probe_of(worker, table).report().blind
    worker.offset = None
    report = probe_of(worker, table).report()
    assert report.blind == "the worker reports no committed offset"
    found = checks.connector_running(report, 0, limit_seconds=1)
    assert found.passed
    assert found.summary.endswith("whether its offset moves was not checked: the worker reports no committed offset")


def test_a_worker_that_is_away_is_named_without_credentials(worker: Worker, table: Table) -> None:
    worker.is_away = True
    state = probe_of(worker, table).state()
    assert (state.state, state.is_stopped) == ("UNKNOWN", True)
    assert state.words() == "the Connect worker at http://***@127.0.0.1:9 does not answer: ConnectError"


def test_only_an_offset_that_stands_still_while_the_database_writes_counts() -> None:
    first = Sample(0, "a", "f:1", "f:1")
    assert base_of(None, first) is first
    idle = replaced(first, at=10)
    assert base_of(first, idle) is idle
    wrote = replaced(first, at=20, log="f:2")
    assert base_of(idle, wrote) == replaced(idle, seen=20)
    assert base_of(idle, replaced(wrote, at=30, offset="b")).at == 30
    assert base_of(idle, replaced(wrote, at=30, position="f:2")).at == 30
    assert base_of(idle, replaced(wrote, at=30, log=None)).at == 30


def test_who_was_away_does_not_take_the_time_for_one_that_stood_still() -> None:
    base = base_of(Sample(0, "a", "f:1"), Sample(15, "a", "f:2"))
    for at in range(30, 300, 15):
        base = base_of(base, Sample(at, "a", f"f:{at}"))
        assert base.at == 0
    # A daemon that comes back an hour later begins anew.
    back = Sample(3_900, "a", "f:9")
    assert base_of(base, back) is back
    assert base_of(back, Sample(3_915, "a", "f:10")).at == 3_900


def replaced(sample: Sample, **fields: Any) -> Sample:
    return Sample(**{name: getattr(sample, name) for name in sample.__struct_fields__} | fields)


def test_a_connector_whose_offset_stands_still_while_the_database_writes_fails(
    worker: Worker, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cdc_connector, "_POLL_SECONDS", 0.02)
    ends = iter(range(781, 10_000))
    monkeypatch.setattr(table, "log_end", lambda: f"binlog.000001:{next(ends)}")
    probe = probe_of(worker, table)
    report, still = probe.watched()
    finding = checks.connector_running(report, still, limit_seconds=probe.still_seconds)
    assert not finding.passed
    assert "its offset has stood still for" in finding.summary
    assert finding.counts["still_seconds"] >= 0.3
    assert "GHSYNC_CONNECTOR_STILL_SECONDS" in finding.way_out


@pytest.mark.parametrize("wrote", [False, True])
def test_an_idle_database_or_an_offset_at_its_end_is_no_fault(worker: Worker, table: Table, *, wrote: bool) -> None:
    worker.offset = OFFSET | {"pos": 700}
    table.end = "binlog.000001:700" if wrote else "binlog.000001:999"
    report, still = probe_of(worker, table).watched()
    assert checks.connector_running(report, still, limit_seconds=0.3).passed


@pytest.mark.parametrize("state", ["FAILED", "PAUSED", "STOPPED", "UNASSIGNED", "NONE", "UNKNOWN"])
def test_a_connector_that_does_not_run_fails_the_check_and_a_drain(state: str) -> None:
    found = ConnectorState(state, CAUSE if state in ("FAILED", "UNKNOWN") else None, where="http://h")
    finding = checks.connector_running(ConnectorReport(found, Sample(0)), 0, limit_seconds=1)
    assert (finding.passed, finding.summary, finding.way_out) == (False, found.words(), found.way_out())
    with pytest.raises(UnavailableError, match="the stream is stopped: ") as caught:
        require_stream(found)
    assert found.words() in caught.value.message


def test_nothing_is_claimed_where_no_worker_is_known(tmp_path: Path) -> None:
    assert connector_probe(load_settings(GHSYNC_HOME=tmp_path)) is None
    require_stream(None)
    found = checks.connector_running(None, 0, limit_seconds=1)
    assert (found.passed, found.summary) == (True, NOT_ASKED)
    assert list(tmp_path.iterdir()) == []


def test_a_local_worker_counts_only_where_the_brokers_are_local_too(tmp_path: Path) -> None:
    (tmp_path / "connect" / "data").mkdir(parents=True)
    probe = connector_probe(load_settings(GHSYNC_HOME=tmp_path))
    assert probe is not None
    state = probe.state()
    assert (state.state, state.words()) == (
        "UNKNOWN",
        "there is no Connect worker: CONNECT_URL is not set, and the local one is not up",
    )
    assert connector_probe(load_settings(GHSYNC_HOME=tmp_path, KAFKA_BOOTSTRAP_SERVERS="h:9")) is None


def test_a_local_worker_is_found_where_it_is_at_each_question(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ServiceStatus("connect", "up", login="http://127.0.0.1:9")
    monkeypatch.setattr(ConnectServer, "local_status", lambda _: found)
    probe = connector_probe(load_settings(GHSYNC_HOME=tmp_path))
    assert probe is not None
    assert probe.state() == ConnectorState("RUNNING", where="http://127.0.0.1:9")
    found = replace(found, login="http://127.0.0.1:10")
    assert probe.state().where == "http://127.0.0.1:10"
    found = replace(found, state="down")
    assert probe.state().state == probe.report().state.state == "UNKNOWN"
    assert worker.state == "RUNNING"


@pytest.mark.parametrize("started", [True, False])
def test_a_connector_is_watched_where_its_worker_has_just_begun(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, *, started: bool
) -> None:
    monkeypatch.setattr(connector_flow, "_POLL_SECONDS", 0)
    worker.config |= {"name": "ghsync-users"}

    def fails() -> str:
        # It is called RUNNING until it has come to what it can't read.
        worker.state = "FAILED"
        return "binlog.000001:900"

    def ensure() -> ConnectorState:
        config = {"heartbeat.interval.ms": "5000"}
        gone = frozenset[int]() if started else None
        with worker.open() as opened:
            return connector_flow.ensure(opened, config, lambda: frozenset({7}), gone, fails, print)

    if started:
        with pytest.raises(UnavailableError, match=r"is FAILED, .*row size 1"):
            ensure()
    else:
        assert ensure().state == "RUNNING"


# Metrics


def shown(metrics: ChangeMetrics) -> list[str]:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(PrometheusView(metrics))
    lines = generate_latest(registry).decode().splitlines()
    return [line for line in lines if "connector" in line and not line.startswith("#")]


def test_the_connectors_state_is_a_gauge_by_state_and_its_last_event_has_an_age() -> None:
    metrics = ChangeMetrics()
    metrics.connector(ConnectorReport(RUNS, Sample(0), time.time() - 30))
    lines = shown(metrics)
    assert 'ghsync_cdc_connector_state{state="RUNNING"} 1.0' in lines
    assert [line for line in lines if line.startswith("ghsync_cdc_connector_state") and line.endswith(" 1.0")] == [
        'ghsync_cdc_connector_state{state="RUNNING"} 1.0'
    ]
    [age] = [float(line.split()[1]) for line in lines if line.startswith("ghsync_cdc_connector_last_event_age_seconds")]
    assert 30 <= age < 40
    metrics.connector(ConnectorReport(FAILED, Sample(0)))
    assert 'ghsync_cdc_connector_state{state="FAILED"} 1.0' in shown(metrics)
    assert not [line for line in shown(metrics) if "age" in line]


def test_what_is_not_known_of_the_connector_is_absent_and_never_zero() -> None:
    metrics = ChangeMetrics()
    assert shown(metrics) == []
    metrics.connector(ConnectorReport(ConnectorState("UNKNOWN", "no answer"), Sample(0)))
    assert shown(metrics) == []
    assert metrics.snapshot().connections == {"connect": False}


def assigned() -> ChangeMetrics:
    metrics = ChangeMetrics()
    metrics.assigned({0})
    metrics.lag(0, 0, 0.0)
    return metrics


HOLDS_UP: dict[str, tuple[Callable[[ChangeMetrics], None], str | None]] = {
    "nothing": (lambda _: None, None),
    "a connector that runs": (lambda at: at.connector(ConnectorReport(RUNS, Sample(0))), None),
    "a failed connector": (lambda at: at.connector(ConnectorReport(FAILED, Sample(0))), FAILED.words()),
    "Kafka": (lambda at: at.connection("kafka", up=False), "Kafka does not answer"),
    "MongoDB": (lambda at: at.connection("mongo", up=False), "MongoDB does not answer"),
    "no partition": (lambda at: at.assigned(set()), "this consumer has no partition"),
}


@pytest.mark.parametrize("what", HOLDS_UP)
def test_what_is_in_the_way_of_consuming_is_said(what: str) -> None:
    happens, words = HOLDS_UP[what]
    metrics = assigned()
    happens(metrics)
    assert metrics.snapshot().held_up == words


def test_what_the_topic_still_holds_is_consumed_though_the_connector_failed() -> None:
    metrics = assigned()
    metrics.connector(ConnectorReport(FAILED, Sample(0)))
    metrics.lag(0, 7, 1.0)
    assert metrics.snapshot().held_up is None
    assert replace(metrics.snapshot(), lag_records=0, records_a_minute=60.0).held_up is None
