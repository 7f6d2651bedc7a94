"""Alerts: asset checks that did not pass are logged, and posted to a webhook where one is set.

Belongs here: which events are alerts, what an alert says, and how far each has got. Not here: what a check holds.
"""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import dagster as dg
import msgspec

from ghsync_dagster.domain.errors import ConfigError, GhsyncError, RefusedError, UnavailableError
from ghsync_dagster.observability.logging import configure_logging, get_logger, redact
from ghsync_dagster.settings import load_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    import httpx
    from pydantic import SecretStr

_INTERVAL_SECONDS: Final = 30
_EVENTS_A_TICK: Final = 500
_POST_TIMEOUT_SECONDS: Final = 5.0
# Dagster ends a tick after 60 seconds, and what it had delivered would be forgotten.
_POSTING_SECONDS: Final = 40.0

log = get_logger("alerts")


class Alert(msgspec.Struct, frozen=True):
    """One asset check that did not pass: the JSON document that a webhook gets.

    Attributes:
        text: All of it in one line, the field that chat webhooks show.
        check: The check's name.
        asset: The asset's key, its parts joined by slashes.
        run_id: The run that evaluated the check; empty where it was reported from outside.
        job: The job of that run.
        severity: ERROR or WARN.
        blocking: Whether the check stops what depends on the asset.
        time: When it was evaluated, ISO 8601, UTC.
        description: What the check found, in words.
        counts: The numbers behind it.
        way_out: How to recover.
        event_id: Number of the event in Dagster's log: the same when an alert arrives twice.
    """

    text: str
    check: str
    asset: str
    run_id: str
    job: str
    severity: str
    blocking: bool
    time: str
    description: str
    counts: dict[str, int | float]
    way_out: str
    event_id: int


class Progress(msgspec.Struct, frozen=True):
    """The sensor's cursor: numbers of the last event of Dagster's log that each way of alerting has dealt with."""

    logged: int
    posted: int


def _alert(event_id: int, entry: dg.EventLogEntry, evaluation: dg.AssetCheckEvaluation) -> Alert:
    values = {key: value.value for key, value in evaluation.metadata.items()}
    asset, description = evaluation.asset_key.to_user_string(), redact(evaluation.description or "")
    way_out = redact(str(values.get("way_out", "")))
    return Alert(
        text=" ".join(
            filter(
                None, (f"Check {evaluation.check_name} of {asset} did not pass: {description.rstrip('.')}.", way_out)
            )
        ),
        check=evaluation.check_name,
        asset=asset,
        run_id=entry.run_id,
        job=entry.job_name or "",
        severity=evaluation.severity.value,
        blocking=bool(evaluation.blocking),
        time=datetime.fromtimestamp(entry.timestamp, UTC).isoformat(timespec="milliseconds"),
        description=description,
        counts={key: value for key, value in values.items() if isinstance(value, int | float)},
        way_out=way_out,
        event_id=event_id,
    )


def _as_cursor(progress: Progress) -> str:
    return msgspec.json.encode(progress).decode()


def _progress(cursor: str, newest: int) -> Progress:
    """Read the cursor; a log that was emptied since counts from the beginning again."""
    try:
        progress = msgspec.json.decode(cursor, type=Progress)
    except msgspec.DecodeError:
        raise ConfigError(
            "The cursor of the sensor asset_check_failed is not one of its own.",
            way_out="Clear the cursor on the sensor's page: it then starts from now.",
        ) from None
    return Progress(min(progress.logged, newest), min(progress.posted, newest))


def _failures_after(context: dg.SensorEvaluationContext, event_id: int) -> tuple[list[Alert], int]:
    """Return the failed checks after an event, oldest first, and the last event that was looked at."""
    entries = context.instance.event_log_storage.get_logs_for_all_runs_by_log_id(
        event_id, dg.DagsterEventType.ASSET_CHECK_EVALUATION, _EVENTS_A_TICK
    )
    alerts = [
        _alert(number, entry, evaluation)
        for number, entry in entries.items()
        if (evaluation := entry.asset_check_evaluation) and not evaluation.passed
    ]
    return alerts, max(entries, default=event_id)


def _log(context: dg.SensorEvaluationContext, alerts: Sequence[Alert]) -> None:
    for alert in alerts:
        fields = msgspec.structs.asdict(alert)
        log.error("asset check did not pass", **{name: fields[name] for name in fields if name != "text"})
        context.log.error(f"{alert.text} Run {alert.run_id}, {alert.counts}.")


def _post_all(url: SecretStr | None, alerts: Sequence[Alert]) -> tuple[int, GhsyncError | None]:
    """Post alerts in order until one fails or the time is over; return how many are dealt with, and the failure."""
    if not url or not alerts:
        return len(alerts), None
    import httpx

    # At INFO these log each request's URL, which is a secret.
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    deadline = time.monotonic() + _POSTING_SECONDS
    with httpx.Client(timeout=_POST_TIMEOUT_SECONDS) as client:
        for arrived, alert in enumerate(alerts):
            if time.monotonic() > deadline:
                return arrived, None
            if problem := _post(client, url, alert):
                return arrived, problem
    return len(alerts), None


def _post(client: httpx.Client, url: SecretStr, alert: Alert) -> GhsyncError | None:
    """Post one alert; return what went wrong, in words without the URL."""
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
            way_out="Correct GHSYNC_ALERT_WEBHOOK_URL or bring its server back; the alert is kept and tried again.",
        )
    if not answer.is_success:
        return RefusedError(
            f"The alert webhook answered with status {answer.status_code}.",
            way_out="Correct GHSYNC_ALERT_WEBHOOK_URL or mend its server; the alert is kept and tried again.",
        )
    return None


@dg.sensor(
    name="asset_check_failed",
    minimum_interval_seconds=_INTERVAL_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Logs every asset check that did not pass, and posts it to GHSYNC_ALERT_WEBHOOK_URL if that is set. "
    "Starts with the checks that are evaluated after its first tick.",
)
def asset_check_failed(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    """Report each failed check once.

    The cursor never passes an alert that the webhook did not take. Only a tick that ends well can keep its cursor, so
    one that got anything done ends with the failure as its reason, and one that got nothing done fails.

    Raises:
        GhsyncError: The webhook did not take the oldest alert that waits for it.
    """
    settings = load_settings()
    configure_logging(settings)
    newest = context.instance.event_log_storage.get_maximum_record_id() or 0
    if context.cursor is None:
        context.update_cursor(_as_cursor(Progress(newest, newest)))
        return dg.SkipReason("Watching the asset checks from now on.")
    before = _progress(context.cursor, newest)
    alerts, seen = _failures_after(context, before.posted)
    fresh = [alert for alert in alerts if alert.event_id > before.logged]
    _log(context, fresh)
    arrived, problem = _post_all(settings.alert_webhook_url, alerts)
    posted = seen if arrived == len(alerts) else alerts[arrived].event_id - 1
    after = Progress(max(before.logged, seen), posted)
    if problem:
        log.error("alert not delivered", waiting=len(alerts) - arrived, problem=str(problem))
        if after == before:
            raise problem
    context.update_cursor(_as_cursor(after))
    counted = f"{len(fresh)} checks did not pass since the last tick."
    return dg.SkipReason(f"{counted} {problem}" if problem else counted)


SENSORS = [asset_check_failed]
