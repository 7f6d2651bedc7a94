"""Reports a sensor's finding as a check evaluation, if its outcome differs from the newest one in Dagster.

Belongs here: the comparison with the newest evaluation, of whatever origin, and the result of a tick. Not here: when a
sensor checks, and what.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import dagster as dg
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecordStatus

from ghsync_dagster.defs.batch.checks import as_result
from ghsync_dagster.defs.batch.columns import USERS_CHANGES

if TYPE_CHECKING:
    from structlog.stdlib import BoundLogger

    from ghsync_dagster.domain.finding import Finding

_EVALUATED: Final = {AssetCheckExecutionRecordStatus.SUCCEEDED, AssetCheckExecutionRecordStatus.FAILED}
_LATEST: Final = 10
"""How many records are read. They are ordered by the planning of their runs, and a long run may evaluate last."""


def report(
    instance: dg.DagsterInstance, finding: Finding, log: BoundLogger, cursor: str | None = None
) -> dg.SensorResult:
    """Return a tick's result: the evaluation if the outcome has changed, else a skip reason.

    Args:
        instance: Holds the evaluations, those of jobs too.
        finding: On ``users_changes``.
        log: The sensor's.
        cursor: The sensor's new cursor.
    """
    events = _changed(instance, finding)
    if not events:
        return dg.SensorResult(skip_reason=dg.SkipReason(finding.summary), cursor=cursor)
    write = log.info if finding.passed else log.error
    write("outcome changed", check=finding.check, passed=finding.passed, summary=finding.summary)
    return dg.SensorResult(asset_events=events, cursor=cursor)


def _changed(instance: dg.DagsterInstance, finding: Finding) -> list[dg.AssetCheckEvaluation]:
    """Return the evaluation to report; none where the newest one has the same outcome.

    An outcome is whether the check passed, and the way out. The summary may differ each time.
    """
    result = as_result(finding)
    made = dg.AssetCheckEvaluation(
        asset_key=dg.AssetKey(USERS_CHANGES),
        check_name=finding.check,
        passed=finding.passed,
        metadata=result.metadata,
        description=finding.summary,
    )
    records = instance.event_log_storage.get_asset_check_execution_history(
        made.asset_check_key, limit=_LATEST, status=_EVALUATED
    )
    known = [(record.event.timestamp, record.evaluation) for record in records if record.event and record.evaluation]
    newest = max(known, key=lambda one: one[0])[1] if known else None
    return [made] if newest is None or _outcome(newest) != _outcome(made) else []


def _outcome(found: dg.AssetCheckEvaluation) -> tuple[bool, object]:
    way_out = found.metadata.get("way_out")
    return found.passed, None if way_out is None else way_out.value
