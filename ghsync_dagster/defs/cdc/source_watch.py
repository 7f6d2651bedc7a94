"""The sensor source_watch: reports the check source_settings whenever its outcome changes, without a run.

Not here: the queries (``wiring``), the judgement (``domain.source``), and whether the outcome has changed
(``watching``).
"""

from __future__ import annotations

from typing import Final

import dagster as dg

from ghsync_dagster.defs.cdc.watching import report
from ghsync_dagster.defs.resources import ChangesResource
from ghsync_dagster.domain.errors import GhsyncError
from ghsync_dagster.logging import configure_logging, get_logger

INTERVAL_SECONDS: Final = 60

log = get_logger("source")


@dg.sensor(
    name="source_watch",
    minimum_interval_seconds=INTERVAL_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Reads the shape of MySQL's table, the server's settings and Connect's log. Reports the check "
    "source_settings whenever its outcome changes, so that the sensor alerts reports it. Starts no run.",
)
def source_watch(context: dg.SensorEvaluationContext) -> dg.SensorResult:
    """Check once; report a changed outcome."""
    changes = ChangesResource()
    configure_logging(changes.settings())
    try:
        found = changes.source()
    except GhsyncError as error:
        return dg.SensorResult(skip_reason=dg.SkipReason(f"not read: {error}"))
    if found is None:
        return dg.SensorResult(skip_reason=dg.SkipReason("there is no MySQL here"))
    return report(context.instance, found, log)


SENSORS = [source_watch]
