"""The asset checks of the batch flow: all blocking, judged by ``batch.checks``, with the way out.

A check fails on data only. If a server can't be reached it raises, and the run fails as infrastructure.
"""

# No annotations from __future__: Dagster wants the types of context and config, not their names.
from collections.abc import Callable

import dagster as dg
from pydantic import Field

from ghsync_dagster.batch.flow import STORE_CHECKS
from ghsync_dagster.defs.errors import as_failure
from ghsync_dagster.defs.resources import BatchResource
from ghsync_dagster.domain.finding import Finding


class QuarantineConfig(dg.Config):
    """What the launchpad may set for quarantined_ratio."""

    max_quarantined_ratio: float | None = Field(default=None, ge=0, le=1)
    """Allowed share of bad lines, 0 to 1; empty: GHSYNC_MAX_QUARANTINED_RATIO."""


def as_result(finding: Finding) -> dg.AssetCheckResult:
    """Return a finding as Dagster's result: exact counts, a limited number of offenders, the way out."""
    shown: dict[str, dg.MetadataValue | int | float | str] = {**finding.counts}
    if finding.offenders:
        shown["offenders"] = dg.MetadataValue.json(finding.offenders)
    if finding.way_out:
        shown["way_out"] = finding.way_out
    return dg.AssetCheckResult(passed=finding.passed, description=finding.summary, metadata=shown)


@dg.asset_check(asset="raw_events", blocking=True, description="Not too many bad lines, and at least one event.")
def quarantined_ratio(config: QuarantineConfig, batch: BatchResource) -> dg.AssetCheckResult:
    """Gate the events."""
    with as_failure():
        return as_result(batch.flow.check_read(config.max_quarantined_ratio))


@dg.asset_check(asset="users", blocking=True, description="Every user keeps schema and rules; one row a user.")
def users_valid(batch: BatchResource) -> dg.AssetCheckResult:
    """Gate the users."""
    with as_failure():
        return as_result(batch.flow.check_users())


@dg.asset_check(
    asset="mongo_users", blocking=True, description="Rows of the load carried the marker before verification."
)
def spark_temp_marked(batch: BatchResource) -> dg.AssetCheckResult:
    """Judge the markers of the newest load."""
    with as_failure():
        return as_result(batch.flow.check_marked())


@dg.asset_check(
    asset="mongo_users",
    blocking=True,
    description="exceptAll between what was to be written and what is stored finds nothing, after reconciliation; "
    "outside the load's run the stored users are read again.",
)
def users_complete(context: dg.AssetCheckExecutionContext, batch: BatchResource) -> dg.AssetCheckResult:
    """Judge the verification of this run's load, or audit what is stored."""
    with as_failure():
        return as_result(batch.flow.check_complete(context.op_execution_context.run_id))


_STORE_CHECK_WORDS = {
    "no_spark_temp_left": "No document carries the marker.",
    "unique_user_id_index": "user_id has a unique index over every document.",
    "documents_conform": "Every stored document keeps the contract: exactly a user's fields, of their types.",
}


def _store_check(name: str, check: Callable[..., Finding]) -> dg.AssetChecksDefinition:
    @dg.asset_check(name=name, asset="mongo_users", blocking=True, description=_STORE_CHECK_WORDS[name])
    def on_store(batch: BatchResource) -> dg.AssetCheckResult:
        with as_failure():
            return as_result(batch.flow.on_store(check))

    return on_store


CHECKS = [
    quarantined_ratio,
    users_valid,
    spark_temp_marked,
    users_complete,
    *(_store_check(name, check) for name, check in STORE_CHECKS.items()),
]
