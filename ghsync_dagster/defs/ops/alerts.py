"""Alerts: logs asset checks that did not pass and runs that failed, and posts them to a webhook where one is set.

Belongs here: which events are alerts, their content, and which events are dealt with. Not here: what a check judges.
"""

from __future__ import annotations

import logging
import re
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import dagster as dg
import msgspec

from ghsync_dagster.defs.errors import ChecksFailedError, kind_of, own_class, root_cause
from ghsync_dagster.domain.errors import WAY_OUT, ConfigError, GhsyncError, RefusedError, UnavailableError
from ghsync_dagster.domain.text import shortened
from ghsync_dagster.logging import configure_logging, get_logger, redact
from ghsync_dagster.settings import load_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    import httpx
    from pydantic import SecretStr

_INTERVAL_SECONDS: Final = 30
_EVENTS: Final = (dg.DagsterEventType.ASSET_CHECK_EVALUATION, dg.DagsterEventType.RUN_FAILURE)
_CHECK_FAILED: Final = "DagsterAssetCheckFailedError"
_MODULE: Final = re.compile(r"^(?:\w+\.)+(?=\w+: )")
_TEXT_LIMIT: Final = 2_000
_EVENTS_A_TICK: Final = 500
_POST_TIMEOUT_SECONDS: Final = 5.0
# Dagster ends a tick after 60 seconds without saving its cursor, so its alerts would be delivered again.
_READING_SECONDS: Final = 10.0
_POSTING_SECONDS: Final = 40.0

log = get_logger("alerts")


class Alert(msgspec.Struct, frozen=True, kw_only=True):
    """One asset check that did not pass, or one run that failed: the JSON document that a webhook gets.

    Attributes:
        text: The whole alert in one line: the field that chat webhooks show.
        kind: ``check``, or why a run failed: ``infrastructure`` (a server is unavailable, another load is running),
            ``permanent`` (something must change first), ``data`` (a drain has not reached the end, or its gate
            refused), or ``unforeseen`` (no error of ghsync's own: its process was killed, the disk is full).
        check: The check's name; empty for a run.
        asset: The asset's key, its parts joined by slashes; empty for a run.
        run_id: The run; empty where a check was reported from outside.
        job: The job of that run.
        severity: ERROR or WARN.
        blocking: Whether the check stops what depends on the asset; false for a run.
        time: When the check was evaluated or the run ended, ISO 8601, UTC.
        description: What the check found or why the run failed, in words.
        counts: The check's counts.
        way_out: How to recover.
        event_id: Number of the event in Dagster's log: the same when an alert arrives twice.
    """

    text: str
    kind: str
    check: str = ""
    asset: str = ""
    run_id: str
    job: str
    severity: str = dg.AssetCheckSeverity.ERROR.value
    blocking: bool = False
    time: str
    description: str
    counts: dict[str, int | float] = {}
    way_out: str
    event_id: int


class Progress(msgspec.Struct, frozen=True):
    """The sensor's cursor: the numbers of the last events of Dagster's log that were logged, and posted."""

    logged: int
    posted: int


def _alert(instance: dg.DagsterInstance, event_id: int, entry: dg.EventLogEntry) -> Alert | None:
    """Return the alert for an event of Dagster's log, or None where it is none."""
    if evaluation := entry.asset_check_evaluation:
        return None if evaluation.passed else _of_check(event_id, entry, evaluation)
    failures = instance.get_records_for_run(entry.run_id, of_type=dg.DagsterEventType.STEP_FAILURE).records
    steps = [record.event_log_entry.get_dagster_event() for record in failures]
    return _of_run(event_id, entry, entry.get_dagster_event(), steps)


def _of_check(event_id: int, entry: dg.EventLogEntry, evaluation: dg.AssetCheckEvaluation) -> Alert:
    values = {key: value.value for key, value in evaluation.metadata.items()}
    asset, description = evaluation.asset_key.to_user_string(), _shown(evaluation.description or "")
    way_out = _shown(str(values.get("way_out", "")))
    return Alert(
        text=" ".join(
            filter(
                None, (f"Check {evaluation.check_name} of {asset} did not pass: {description.rstrip('.')}.", way_out)
            )
        ),
        kind="check",
        check=evaluation.check_name,
        asset=asset,
        run_id=entry.run_id,
        job=entry.job_name or "",
        severity=evaluation.severity.value,
        blocking=bool(evaluation.blocking),
        time=_time(entry),
        description=description,
        counts={key: value for key, value in values.items() if isinstance(value, int | float)},
        way_out=way_out,
        event_id=event_id,
    )


def _of_run(
    event_id: int, entry: dg.EventLogEntry, event: dg.DagsterEvent, steps: Sequence[dg.DagsterEvent]
) -> Alert | None:
    """Return the alert of a run that failed, or None where only checks failed, which have their own alerts.

    Args:
        event_id: Number of the event in Dagster's log.
        entry: The event as it stands there.
        event: The event itself.
        steps: The failures of the run's steps.
    """
    failures = [step for step in steps if not _is_of_check(step)]
    if (steps or _ended_by_checks(event)) and not failures:
        return None
    failed = failures[0] if failures else None
    kind, words, way_out = _reason(event, failed)
    description, way_out = _shown(words), _shown(way_out or "See the run in Dagster.")
    job, at = entry.job_name or "", f" in {failed.step_key}" if failed else ""
    return Alert(
        text=f"Run of {job} failed{at}: {description.rstrip('.')}. {way_out}",
        kind=kind,
        run_id=entry.run_id,
        job=job,
        time=_time(entry),
        description=description,
        way_out=way_out,
        event_id=event_id,
    )


def _ended_by_checks(run: dg.DagsterEvent) -> bool:
    data = run.job_failure_data if run.event_specific_data else None
    error = root_cause(data.error if data else None)
    return error is not None and error.cls_name == ChecksFailedError.__name__


def _is_of_check(step: dg.DagsterEvent) -> bool:
    error = root_cause(step.step_failure_data.error)
    return error is not None and error.cls_name == _CHECK_FAILED


def _reason(run: dg.DagsterEvent, step: dg.DagsterEvent | None) -> tuple[str, str, str]:
    """Return the kind of a run's failure, the reason, and the way out where there is one."""
    own = step.step_failure_data.user_failure_data if step else None
    if own:
        given = {key: str(value.value) for key, value in own.metadata.items()}
        words, _, way_out = (own.description or "").partition(WAY_OUT)
        return given.get("kind", "unforeseen"), words, given.get("way_out", way_out)
    # If the daemon marks a run failed, as its process is gone, there is no failure data.
    data = run.job_failure_data if run.event_specific_data else None
    error = root_cause(step.step_failure_data.error if step else data.error if data else None)
    if error is None:
        return "unforeseen", run.message or "", ""
    words, _, way_out = error.message.partition(WAY_OUT)
    return kind_of(own_class(error)), _MODULE.sub("", words), way_out


def _shown(text: str) -> str:
    """Return a text for an alert: without credentials, of limited length, and encodable."""
    return shortened(redact(text.strip()).encode(errors="backslashreplace").decode(), _TEXT_LIMIT)


def _time(entry: dg.EventLogEntry) -> str:
    return datetime.fromtimestamp(entry.timestamp, UTC).isoformat(timespec="milliseconds")


def _as_cursor(progress: Progress) -> str:
    return msgspec.json.encode(progress).decode()


def _progress(cursor: str, newest: int) -> Progress:
    """Read the cursor; after Dagster's log was emptied, event numbers start again."""
    try:
        progress = msgspec.json.decode(cursor, type=Progress)
    except msgspec.DecodeError:
        raise ConfigError(
            "The cursor of the sensor alerts is not one of its own.",
            way_out="Clear the cursor on the sensor's page: it then starts from now.",
        ) from None
    return Progress(min(progress.logged, newest), min(progress.posted, newest))


def _alerts_after(instance: dg.DagsterInstance, event_id: int, newest: int) -> tuple[list[Alert], int]:
    """Return the alerts after an event, oldest first, and the last event that was read.

    The first event is read however long it takes; the others while there is time.

    Args:
        instance: The Dagster instance.
        event_id: The event.
        newest: The last event to read: of later ones this might read one kind and miss the other.
    """
    events = instance.event_log_storage
    found: dict[int, dg.EventLogEntry] = {}
    for kind in _EVENTS:
        found.update(events.get_logs_for_all_runs_by_log_id(event_id, kind, _EVENTS_A_TICK))
    # There may be more events of each kind, but only later ones.
    numbers = sorted(number for number in found if number <= newest)[:_EVENTS_A_TICK]
    alerts: list[Alert] = []
    last, deadline = event_id, time.monotonic() + _READING_SECONDS
    for number in numbers:
        if alert := _alert(instance, number, found[number]):
            alerts.append(alert)
        last = number
        if time.monotonic() > deadline:
            break
    return alerts, last


def _log(context: dg.SensorEvaluationContext, alerts: Sequence[Alert]) -> None:
    for alert in alerts:
        fields = msgspec.structs.asdict(alert)
        what = "asset check did not pass" if alert.check else "run failed"
        log.error(what, **{name: fields[name] for name in fields if name != "text"})
        context.log.error(f"{alert.text} Run {alert.run_id}, {alert.counts}.")


def _post_all(url: SecretStr | None, alerts: Sequence[Alert]) -> tuple[int, GhsyncError | None]:
    """Post alerts in order until one fails or the time is over; return how many are done, and the failure."""
    if not url or not alerts:
        return len(alerts), None
    import httpx

    # At INFO they log each request's URL, which is a secret.
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    deadline = time.monotonic() + _POSTING_SECONDS
    with httpx.Client(timeout=_POST_TIMEOUT_SECONDS) as client:
        for done, alert in enumerate(alerts):
            if time.monotonic() > deadline:
                return done, None
            if fault := _post(client, url, alert):
                return done, fault
    return len(alerts), None


def _post(client: httpx.Client, url: SecretStr, alert: Alert) -> GhsyncError | None:
    """Post one alert; return the error if it fails, without the URL."""
    import httpx

    try:
        answer = client.post(
            url.get_secret_value(),
            content=msgspec.json.encode(alert),
            headers={"content-type": "application/json"},
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return UnavailableError(
            f"The alert webhook could not be reached ({type(error).__name__}).",
            way_out="Correct GHSYNC_ALERT_WEBHOOK_URL or bring its server back; the alert is kept and posted again.",
        )
    if not answer.is_success:
        return RefusedError(
            f"The alert webhook answered with status {answer.status_code}.",
            way_out="Correct GHSYNC_ALERT_WEBHOOK_URL or fix its server; the alert is kept and posted again.",
        )
    return None


@dg.sensor(
    name="alerts",
    minimum_interval_seconds=_INTERVAL_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Logs every asset check that did not pass and every run that failed by anything else, and posts it to "
    "GHSYNC_ALERT_WEBHOOK_URL if that is set. Starts with what happens after its first tick.",
)
def alerts_sensor(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    """Report each failed check and each failed run once.

    The cursor never passes an alert that the webhook did not accept. Dagster saves the cursor only of a tick that does
    not raise. So a tick that made progress returns the failure as its skip reason, and one without progress raises.

    Raises:
        GhsyncError: The webhook did not accept the oldest alert.
    """
    settings = load_settings()
    configure_logging(settings)
    newest = context.instance.event_log_storage.get_maximum_record_id() or 0
    if context.cursor is None:
        context.update_cursor(_as_cursor(Progress(newest, newest)))
        return dg.SkipReason("Watching checks and runs from now on.")
    before = _progress(context.cursor, newest)
    alerts, last = _alerts_after(context.instance, before.posted, newest)
    new = [alert for alert in alerts if alert.event_id > before.logged]
    _log(context, new)
    done, fault = _post_all(settings.alert_webhook_url, alerts)
    posted = last if done == len(alerts) else alerts[done].event_id - 1
    after = Progress(max(before.logged, last), posted)
    if fault:
        log.error("alert not delivered", waiting=len(alerts) - done, problem=str(fault))
        if after == before:
            raise fault
    context.update_cursor(_as_cursor(after))
    counted = f"{len(new)} alerts since the last tick."
    return dg.SkipReason(f"{counted} {fault}" if fault else counted)


SENSORS = [alerts_sensor]
