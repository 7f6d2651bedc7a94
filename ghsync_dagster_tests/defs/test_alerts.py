"""The sensor alerts on real instances, real checks and runs, and a real webhook."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import dagster as dg
import pytest

from ghsync_dagster.defs.errors import as_failure
from ghsync_dagster.defs.ops import alerts
from ghsync_dagster.defs.ops.alerts import alerts_sensor
from ghsync_dagster.domain.errors import ConfigError, RefusedError, UnavailableError
from ghsync_dagster_tests.support.alert_parts import SECRET

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from ghsync_dagster_tests.support.alert_parts import Webhook

    Logged = Callable[[], list[dict[str, Any]]]

EVERY_STORAGE = pytest.mark.parametrize("world", ["on disk", "in memory"], indirect=True)


class World:
    """An instance, an asset with one check whose outcome can be set, and the sensor with its cursor."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self.instance = instance
        self.cursor: str | None = None

    def evaluate(self, *outcomes: bool, description: str = "2 of 9 rows are wrong") -> list[str]:
        """Run the asset and its check once for each outcome; return the run ids."""

        @dg.asset
        def numbers() -> None:
            """Hold the numbers."""

        def run(passed: bool) -> str:
            @dg.asset_check(asset=numbers, blocking=True)
            def numbers_right() -> dg.AssetCheckResult:
                metadata: dict[str, Any] = {
                    "wrong": 2,
                    "ratio": 0.22,
                    "way_out": "Count again.",
                    "offenders": [{"row": 7}],
                }
                return dg.AssetCheckResult(passed=passed, description=description, metadata=metadata)

            result = dg.materialize([numbers, numbers_right], instance=self.instance, raise_on_error=False)
            assert result.success == passed
            return result.run_id

        return [run(passed) for passed in outcomes]

    def fail(self, error: Exception) -> str:
        """Run a job whose step raises the error; return the run id."""

        def raising() -> None:
            with as_failure():
                raise error

        return self.run(raising)

    def run(self, work: Callable[[], None], set_up: Callable[[], None] = lambda: None) -> str:
        """Run a job whose one step does the work, after its resource was set up; return the run id."""

        @dg.op(required_resource_keys={"part"})
        def sync() -> None:
            work()

        @dg.job(resource_defs={"part": dg.ResourceDefinition(lambda _: set_up())})
        def sync_job() -> None:
            sync()

        return sync_job.execute_in_process(instance=self.instance, raise_on_error=False).run_id

    def tick(self) -> str:
        """Evaluate the sensor once, keep its cursor as the daemon does, and return what the tick says."""
        context = dg.build_sensor_context(instance=self.instance, cursor=self.cursor)
        data = alerts_sensor.evaluate_tick(context)
        self.cursor = data.cursor
        assert not data.run_requests
        return str(data.skip_message)


@pytest.fixture(params=["in memory"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    """A world whose sensor has had its first tick."""
    on_disk = request.param == "on disk"
    with dg.DagsterInstance.local_temp(str(tmp_path)) if on_disk else dg.DagsterInstance.ephemeral() as instance:
        started = World(instance)
        started.tick()
        yield started


@pytest.fixture
def logged(capsys: pytest.CaptureFixture[str]) -> Logged:
    """Return a function that gives the alerts in the log since its last call."""

    def lines() -> list[dict[str, Any]]:
        found = [json.loads(line) for line in capsys.readouterr().err.splitlines() if '"ghsync.alerts"' in line]
        return [line for line in found if line["event"] in ("asset check did not pass", "run failed")]

    return lines


def test_a_failed_check_is_logged_once_with_what_is_needed(world: World, logged: Logged) -> None:
    (run_id,) = world.evaluate(False)
    assert "1 alerts" in world.tick()
    (line,) = logged()
    assert line["level"] == "error"
    assert (line["check"], line["asset"], line["run_id"]) == ("numbers_right", "numbers", run_id)
    assert (line["description"], line["way_out"]) == ("2 of 9 rows are wrong", "Count again.")
    assert line["counts"] == {"wrong": 2, "ratio": 0.22}
    for _ in range(2):
        assert "0 alerts" in world.tick()
    assert logged() == []


@EVERY_STORAGE
def test_each_failure_is_reported_once_though_passes_surround_it(world: World, logged: Logged) -> None:
    runs = world.evaluate(True, False, True)
    world.tick()
    runs += world.evaluate(True, False, False)
    world.tick()
    assert [line["run_id"] for line in logged()] == [runs[1], runs[4], runs[5]]


def test_checks_that_pass_are_not_reported(world: World, webhook: Webhook, logged: Logged) -> None:
    world.evaluate(True, True)
    world.tick()
    assert logged() == []
    assert webhook.requests == 0


@EVERY_STORAGE
def test_the_first_tick_replays_no_history(world: World, webhook: Webhook, logged: Logged) -> None:
    world.evaluate(False)
    world.cursor = None
    world.tick()
    (run_id,) = world.evaluate(False)
    world.tick()
    assert [line["run_id"] for line in logged()] == [run_id]
    assert [alert["run_id"] for alert in webhook.taken] == [run_id]


def test_more_failures_than_a_tick_takes_arrive_in_order(
    world: World, webhook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alerts, "_EVENTS_A_TICK", 2)
    runs = [*world.evaluate(False, False, True), world.fail(RefusedError("No right.", way_out="Ask."))]
    for taken in (1, 2, 3):
        world.tick()
        assert len(webhook.taken) == taken
    assert [alert["run_id"] for alert in webhook.taken] == [runs[0], runs[1], runs[3]]


def test_failures_that_take_long_to_read_are_left_to_the_next_ticks(
    world: World, webhook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alerts, "_READING_SECONDS", -1.0)
    runs = [world.fail(RefusedError("No right.", way_out="Ask.")) for _ in range(3)]
    for taken in (1, 2, 3):
        world.tick()
        assert len(webhook.taken) == taken
    assert [alert["run_id"] for alert in webhook.taken] == runs


def test_the_webhook_gets_one_document_a_failure(world: World, webhook: Webhook) -> None:
    (run_id,) = world.evaluate(False, description="can't read mongodb://app:s3cret@db/x")
    world.tick()
    world.tick()
    (document,) = webhook.taken
    assert document.pop("time").endswith("+00:00")
    assert document.pop("event_id") > 0
    assert document == {
        "text": "Check numbers_right of numbers did not pass: can't read mongodb://***@db/x. Count again.",
        "kind": "check",
        "check": "numbers_right",
        "asset": "numbers",
        "run_id": run_id,
        "job": "__ephemeral_asset_job__",
        "severity": "ERROR",
        "blocking": True,
        "description": "can't read mongodb://***@db/x",
        "counts": {"wrong": 2, "ratio": 0.22},
        "way_out": "Count again.",
    }


def test_a_run_that_fails_on_a_server_is_an_alert_with_its_way_out(
    world: World, webhook: Webhook, logged: Logged
) -> None:
    run_id = world.fail(UnavailableError("mongodb://app:s3cret@db is away.", way_out="Bring it back."))
    for _ in range(2):
        world.tick()
    (document,) = webhook.taken
    (line,) = logged()
    assert (line["event"], line["level"], line["run_id"]) == ("run failed", "error", run_id)
    assert document.pop("time").endswith("+00:00")
    assert document.pop("event_id") > 0
    assert document == {
        "text": "Run of sync_job failed in sync: UnavailableError: mongodb://***@db is away. Bring it back.",
        "kind": "infrastructure",
        "check": "",
        "asset": "",
        "run_id": run_id,
        "job": "sync_job",
        "severity": "ERROR",
        "blocking": False,
        "description": "UnavailableError: mongodb://***@db is away.",
        "counts": {},
        "way_out": "Bring it back.",
    }


@pytest.mark.parametrize(
    ("error", "kind", "description", "way_out"),
    [
        (RefusedError("No right.", way_out="Ask."), "permanent", "RefusedError: No right.", "Ask."),
        (OSError(28, "No space left"), "unforeseen", "OSError: [Errno 28] No space left", "See the run in Dagster."),
    ],
)
def test_a_run_that_fails_for_good_is_an_alert_with_the_reason(
    world: World, webhook: Webhook, error: Exception, kind: str, description: str, way_out: str
) -> None:
    world.fail(error)
    world.tick()
    (document,) = webhook.taken
    assert (document["kind"], document["description"], document["way_out"]) == (kind, description, way_out)


def test_an_error_outside_of_the_flows_tells_its_kind_and_way_out_too(world: World, webhook: Webhook) -> None:
    def misread() -> None:
        cause = ValueError("invalid literal")
        raise ConfigError("GHSYNC_CDC_SLICE_SECONDS is no number.", way_out="Set one.") from cause

    def unreached() -> None:
        raise UnavailableError("Kafka is away.", way_out="Wait.")

    world.run(lambda: None, set_up=misread)
    world.run(unreached)
    world.tick()
    assert [(alert["kind"], alert["text"]) for alert in webhook.taken] == [
        ("permanent", "Run of sync_job failed: ConfigError: GHSYNC_CDC_SLICE_SECONDS is no number. Set one."),
        ("infrastructure", "Run of sync_job failed in sync: UnavailableError: Kafka is away. Wait."),
    ]


def test_a_gate_of_the_drain_is_an_alert_with_its_way_out(world: World, webhook: Webhook) -> None:
    def refuse() -> None:
        raise dg.Failure("new_dead_letters: 1 new. Way out: Look.", metadata={"kind": "data", "way_out": "Look."})

    world.run(refuse)
    world.tick()
    (document,) = webhook.taken
    assert (document["kind"], document["text"]) == (
        "data",
        "Run of sync_job failed in sync: new_dead_letters: 1 new. Look.",
    )


@pytest.mark.parametrize("odd", ["no text: \udcff", "x" * 300_000], ids=["half a surrogate pair", "very long"])
def test_a_text_that_no_webhook_takes_is_made_bearable_and_holds_up_no_other(
    world: World, webhook: Webhook, odd: str
) -> None:
    runs = [world.fail(RefusedError(odd, way_out=odd)), world.fail(RefusedError("No right.", way_out="Ask."))]
    world.tick()
    assert [alert["run_id"] for alert in webhook.taken] == runs
    assert len(webhook.taken[0]["text"]) < 4_100
    assert len(webhook.taken[0]["description"]) < 2_010
    assert webhook.taken[0]["description"].startswith(f"RefusedError: {odd[:9]}")


def test_a_server_that_is_away_is_told_though_a_check_of_the_same_run_did_not_pass(
    world: World, webhook: Webhook
) -> None:
    @dg.asset
    def numbers() -> None:
        """Hold the numbers."""

    @dg.asset_check(asset=numbers, blocking=True)
    def first() -> dg.AssetCheckResult:
        return dg.AssetCheckResult(passed=False)

    @dg.asset_check(asset=numbers, blocking=True)
    def second() -> dg.AssetCheckResult:
        with as_failure():
            raise UnavailableError("MongoDB is away.", way_out="Wait.")

    dg.materialize([numbers, first, second], instance=world.instance, raise_on_error=False)
    world.tick()
    assert [(alert["kind"], alert["check"]) for alert in webhook.taken] == [("check", "first"), ("infrastructure", "")]


def test_what_fails_while_a_tick_reads_is_told_by_the_next(
    world: World, webhook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = world.instance.event_log_storage
    read = storage.get_logs_for_all_runs_by_log_id
    runs: list[str] = []

    def slow(*given: Any) -> Any:
        found = read(*given)
        if not runs:
            runs.extend(world.evaluate(False))
        return found

    monkeypatch.setattr(storage, "get_logs_for_all_runs_by_log_id", slow)
    world.tick()
    assert webhook.taken == []
    world.tick()
    assert [alert["run_id"] for alert in webhook.taken] == runs


def test_a_run_whose_process_died_is_an_alert_and_one_that_was_canceled_is_none(
    world: World, webhook: Webhook, logged: Logged
) -> None:
    died, canceled = (dg.DagsterRun(job_name="sync_job") for _ in range(2))
    for run in (died, canceled):
        world.instance.add_run(run)
    world.instance.report_run_failed(died, message="Its process has gone.")
    world.instance.report_run_canceled(canceled)
    world.tick()
    assert [line["run_id"] for line in logged()] == [died.run_id]
    (document,) = webhook.taken
    assert document["text"] == "Run of sync_job failed: Its process has gone. See the run in Dagster."
    assert document["kind"] == "unforeseen"


@EVERY_STORAGE
def test_checks_and_runs_arrive_in_the_order_they_failed(world: World, webhook: Webhook) -> None:
    away = UnavailableError("Away.", way_out="Wait.")
    runs = [world.fail(away), *world.evaluate(False), world.fail(away), *world.evaluate(True)]
    world.tick()
    assert [alert["run_id"] for alert in webhook.taken] == runs[:3]


@EVERY_STORAGE
def test_a_refused_alert_is_kept_fails_the_tick_and_arrives_later(
    world: World, webhook: Webhook, logged: Logged
) -> None:
    webhook.statuses = [500, 500, 500]
    world.evaluate(False)
    assert "status 500" in world.tick()
    held = world.cursor
    for _ in range(2):
        with pytest.raises(RefusedError, match="status 500"):
            world.tick()
    assert world.cursor == held
    assert webhook.taken == []
    world.tick()
    world.tick()
    assert len(webhook.taken) == 1
    assert len(logged()) == 1


def test_an_alert_that_arrived_is_not_posted_again_when_the_next_is_refused(world: World, webhook: Webhook) -> None:
    runs = world.evaluate(False, False, False)
    webhook.statuses = [200, 503, 503]
    world.tick()
    with pytest.raises(RefusedError):
        world.tick()
    world.tick()
    assert [alert["run_id"] for alert in webhook.taken] == runs


def test_new_failures_are_logged_while_the_webhook_is_away(world: World, webhook: Webhook, logged: Logged) -> None:
    webhook.statuses = [500, 500]
    runs = world.evaluate(False)
    world.tick()
    runs += world.evaluate(False)
    world.tick()
    assert [line["run_id"] for line in logged()] == runs
    world.tick()
    assert [alert["run_id"] for alert in webhook.taken] == runs


@pytest.mark.parametrize("case", ["taken", "refused", "nobody there", "too slow", "no scheme", "no URL"])
def test_the_url_is_in_no_log_and_no_error(
    world: World,
    webhook: Webhook,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    urls = {"nobody there": f"http://127.0.0.1:1/{SECRET}", "no scheme": SECRET, "no URL": f"http://[{SECRET}"}
    monkeypatch.setenv("GHSYNC_ALERT_WEBHOOK_URL", urls.get(case, webhook.url))
    webhook.statuses = [404, 404] if case == "refused" else []
    webhook.slow = case == "too slow"
    monkeypatch.setattr(alerts, "_POST_TIMEOUT_SECONDS", 0.5)
    world.evaluate(False)
    said = world.tick()
    if case != "taken":
        with pytest.raises((UnavailableError, RefusedError)) as failure:
            world.tick()
        said += f"{failure.getrepr(style='long', chain=True)}"
        assert "the alert is kept" in said
    output = capsys.readouterr()
    assert '"ghsync.alerts"' in output.err
    for text in (said, output.err, output.out, caplog.text, str(world.cursor)):
        assert SECRET not in text
        assert webhook.url not in text


def test_a_log_that_was_emptied_is_watched_from_its_new_beginning(world: World, logged: Logged) -> None:
    world.evaluate(True)
    world.tick()
    world.instance.wipe()
    world.tick()
    (run_id,) = world.evaluate(False)
    world.tick()
    assert [line["run_id"] for line in logged()] == [run_id]


def test_a_cursor_of_something_else_is_refused_with_the_way_out(world: World) -> None:
    world.cursor = "2015-01-01"
    with pytest.raises(ConfigError, match="Clear the cursor"):
        world.tick()


def test_the_sensor_runs_by_default_every_thirty_seconds() -> None:
    assert alerts_sensor.default_status == dg.DefaultSensorStatus.RUNNING
    assert alerts_sensor.minimum_interval_seconds == 30
