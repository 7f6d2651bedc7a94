"""The sensor connector_watch reports the check connector_running when its outcome changes, and alerts tell of it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import dagster as dg
import pytest

from ghsync_dagster.cdc.health.checks import connector_running
from ghsync_dagster.cdc.health.connector import NOT_ASKED, ConnectorReport
from ghsync_dagster.definitions import defs
from ghsync_dagster.defs.batch.checks import as_result
from ghsync_dagster.defs.batch.columns import USERS_CHANGES
from ghsync_dagster.defs.cdc import connector_watch as watch
from ghsync_dagster.defs.cdc.source_watch import source_watch
from ghsync_dagster.defs.ops.alerts import alerts_sensor
from ghsync_dagster.defs.resources import ChangesResource
from ghsync_dagster.domain.connector import ConnectorState, Sample
from ghsync_dagster.domain.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RUNS = ConnectorState("RUNNING")
FAILED = ConnectorState("FAILED", "internal schema size 5, but row size 1")
UNKNOWN = ConnectorState("UNKNOWN", "the Connect worker at http://h does not answer")


class Probe:
    """Gives the reports that a test puts in."""

    still_seconds = 60.0

    def __init__(self) -> None:
        self.now = ConnectorReport(RUNS, Sample(0))

    def report(self) -> ConnectorReport:
        """The report now."""
        return self.now


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Probe:
    """What the sensor asks; the working folder has no settings."""
    monkeypatch.chdir(tmp_path)
    made = Probe()
    monkeypatch.setattr(watch, "connector_probe", lambda _: made)
    return made


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    """An instance in memory."""
    with dg.DagsterInstance.ephemeral() as opened:
        yield opened


class Daemon:
    """Ticks as Dagster's daemon does: it keeps the cursor and the events."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self.instance = instance
        self.cursor: str | None = None

    def tick(self) -> list[dg.AssetCheckEvaluation]:
        """Tick connector_watch; return what it reported."""
        context = dg.build_sensor_context(instance=self.instance, cursor=self.cursor, definitions=defs)
        data = watch.connector_watch.evaluate_tick(context)
        self.cursor = data.cursor
        assert not data.run_requests
        for event in data.asset_events:
            self.instance.report_runless_asset_event(event)
        return [event for event in data.asset_events if isinstance(event, dg.AssetCheckEvaluation)]


@pytest.fixture
def daemon(instance: dg.DagsterInstance) -> Daemon:
    """The one who ticks."""
    return Daemon(instance)


def test_it_is_on_by_default_and_looks_every_15_seconds() -> None:
    sensor = defs.resolve_sensor_def("connector_watch")
    assert (sensor.default_status, sensor.minimum_interval_seconds) == (dg.DefaultSensorStatus.RUNNING, 15)


def test_a_failure_is_reported_once_and_so_is_its_end(probe: Probe, daemon: Daemon) -> None:
    assert [found.passed for found in daemon.tick()] == [True]
    assert daemon.tick() == []
    probe.now = ConnectorReport(FAILED, Sample(15))
    [found] = daemon.tick()
    assert (found.check_name, found.asset_key, found.passed) == (
        "connector_running",
        dg.AssetKey("users_changes"),
        False,
    )
    assert found.description == FAILED.words()
    assert "take a new snapshot" in str(found.metadata["way_out"].value)
    assert daemon.tick() == []
    probe.now = ConnectorReport(RUNS, Sample(45))
    assert [found.passed for found in daemon.tick()] == [True]


def evaluate(instance: dg.DagsterInstance, finding: Finding) -> None:
    """Evaluate a check of ``users_changes`` in a run, as a job does."""

    @dg.asset_check(asset=USERS_CHANGES, name=finding.check)
    def check() -> dg.AssetCheckResult:
        return as_result(finding)

    made = dg.Definitions(asset_checks=[check]).resolve_implicit_global_asset_job_def()
    assert made.execute_in_process(instance=instance).success


def test_what_a_job_evaluated_meanwhile_is_known(probe: Probe, daemon: Daemon) -> None:
    assert [found.passed for found in daemon.tick()] == [True]
    failed = connector_running(ConnectorReport(FAILED, Sample(0)), 0, limit_seconds=60)
    evaluate(daemon.instance, failed)
    assert [found.passed for found in daemon.tick()] == [True]
    assert daemon.tick() == []
    evaluate(daemon.instance, failed)
    probe.now = ConnectorReport(FAILED, Sample(30))
    assert daemon.tick() == []
    evaluate(daemon.instance, connector_running(ConnectorReport(RUNS, Sample(0)), 0, limit_seconds=60))
    assert [found.passed for found in daemon.tick()] == [False]


def test_other_words_for_the_same_state_and_cure_are_no_news(probe: Probe, daemon: Daemon) -> None:
    probe.now = ConnectorReport(UNKNOWN, Sample(0))
    assert daemon.tick() == []
    assert [found.passed for found in daemon.tick()] == [False]
    for words in ("ConnectTimeout", "ConnectError"):
        probe.now = ConnectorReport(replace(UNKNOWN, reason=f"the worker does not answer: {words}"), Sample(15))
        assert daemon.tick() == []
    for reason, reported in (("row size 1", [False]), ("row size 2", []), ("Access denied", [False])):
        probe.now = ConnectorReport(replace(FAILED, reason=reason), Sample(30))
        assert [found.passed for found in daemon.tick()] == reported


def test_what_is_wrong_with_the_source_is_reported_once_and_so_is_its_end(
    instance: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bad = Finding("source_settings", passed=False, summary="3 statements", way_out="End it.")
    good = Finding("source_settings", passed=True, summary="good")
    now = good
    monkeypatch.setattr(ChangesResource, "source", lambda _: now)

    def tick() -> list[bool]:
        data = source_watch.evaluate_tick(dg.build_sensor_context(instance=instance, definitions=defs))
        events = [event for event in data.asset_events if isinstance(event, dg.AssetCheckEvaluation)]
        for event in events:
            instance.report_runless_asset_event(event)
        return [event.passed for event in events]

    assert (tick(), tick()) == ([True], [])
    now = bad
    assert tick() == [False]
    now = replace(bad, summary="4 statements")
    assert tick() == []
    now = good
    assert (tick(), tick()) == ([True], [])
    evaluate(instance, bad)
    assert (tick(), tick()) == ([True], [])


def test_an_alert_tells_of_it(probe: Probe, daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.tick()
    context = dg.build_sensor_context(instance=daemon.instance, definitions=defs)
    cursor = alerts_sensor.evaluate_tick(context).cursor
    probe.now = ConnectorReport(FAILED, Sample(15))
    daemon.tick()
    context = dg.build_sensor_context(instance=daemon.instance, cursor=cursor, definitions=defs)
    assert "1 alerts since the last tick" in str(alerts_sensor.evaluate_tick(context).skip_message)
    told = capsys.readouterr().err
    assert "asset check did not pass" in told
    assert FAILED.words() in told


@pytest.mark.parametrize("state", [UNKNOWN, ConnectorState("UNASSIGNED"), ConnectorState("RESTARTING")])
def test_what_may_pass_by_itself_counts_on_the_second_look_in_a_row(
    probe: Probe, daemon: Daemon, state: ConnectorState
) -> None:
    daemon.tick()
    probe.now = ConnectorReport(state, Sample(15))
    assert daemon.tick() == []
    probe.now = ConnectorReport(RUNS, Sample(30))
    assert daemon.tick() == []
    probe.now = ConnectorReport(state, Sample(45))
    assert daemon.tick() == []
    probe.now = ConnectorReport(state, Sample(60))
    assert [found.passed for found in daemon.tick()] == [False]


def test_an_offset_that_stands_still_while_the_database_writes_is_reported_once(probe: Probe, daemon: Daemon) -> None:
    for at in range(0, 300, 15):
        probe.now = ConnectorReport(RUNS, Sample(at, "a", f"f:{at}"))
        reported = daemon.tick()
        expected = {0: [True], 75: [False]}.get(at, [])
        assert [found.passed for found in reported] == expected, at
    probe.now = ConnectorReport(RUNS, Sample(315, "b", "f:315"))
    assert [found.passed for found in daemon.tick()] == [True]


def test_an_idle_database_is_no_failure_however_long(probe: Probe, daemon: Daemon) -> None:
    for at in range(0, 3_600, 15):
        probe.now = ConnectorReport(RUNS, Sample(at, "a", "f:1"))
        assert all(found.passed for found in daemon.tick())


def test_where_no_worker_is_known_nothing_is_reported(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    context = dg.build_sensor_context(instance=daemon.instance, definitions=defs)
    data = watch.connector_watch.evaluate_tick(context)
    assert (data.asset_events, data.skip_message) == ([], NOT_ASKED)


def test_a_cursor_that_is_not_its_own_counts_as_none() -> None:
    assert watch._memory("{}") == watch._memory("no") == watch._memory(None) == watch.Memory()
