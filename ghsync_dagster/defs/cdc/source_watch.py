"""The sensor source_watch: reports the check source_settings whenever its outcome changes, without a run.

Belongs here: when a tick reports. Not here: what is asked (``wiring``), and the judgement (``domain.source``).
"""

from __future__ import annotations

from typing import Final

import dagster as dg

from ghsync_dagster.cdc.checks import SOURCE_SETTINGS
from ghsync_dagster.defs.batch.checks import as_result
from ghsync_dagster.defs.cdc.slice import USERS_CHANGES
from ghsync_dagster.defs.resources import ChangesResource
from ghsync_dagster.domain.errors import GhsyncError
from ghsync_dagster.observability.logging import configure_logging, get_logger

INTERVAL_SECONDS: Final = 60
_GOOD: Final = "good"

log = get_logger("source")


@dg.sensor(
    name="source_watch",
    minimum_interval_seconds=INTERVAL_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Looks at the shape of MySQL's table, at the server's settings and at Connect's log. Reports the check "
    "source_settings whenever its outcome changes, so that the sensor alerts tells of it. Starts no run.",
)
def source_watch(context: dg.SensorEvaluationContext) -> dg.SensorResult:
    """Look once; report what has changed."""
    changes = ChangesResource()
    configure_logging(changes.settings())
    try:
        found = changes.source()
    except GhsyncError as error:
        return dg.SensorResult(skip_reason=dg.SkipReason(f"not looked at: {error}"), cursor=context.cursor)
    if found is None:
        return dg.SensorResult(skip_reason=dg.SkipReason("there is no MySQL here"), cursor=context.cursor)
    outcome = _GOOD if found.passed else ", ".join(sorted(problem["problem"] for problem in found.offenders))
    if outcome == context.cursor:
        return dg.SensorResult(skip_reason=dg.SkipReason(found.summary), cursor=outcome)
    (log.info if found.passed else log.error)("source watched", passed=found.passed, summary=found.summary)
    result = as_result(found)
    evaluation = dg.AssetCheckEvaluation(
        asset_key=dg.AssetKey(USERS_CHANGES),
        check_name=SOURCE_SETTINGS,
        passed=found.passed,
        metadata=result.metadata,
        description=found.summary,
    )
    return dg.SensorResult(asset_events=[evaluation], cursor=outcome)


SENSORS = [source_watch]
