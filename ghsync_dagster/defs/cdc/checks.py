"""The asset checks of the change flow, none blocking, judged by ``cdc/health/checks.py``.

Belongs here: names, config, and reading what a check judges. An error that is not about data raises.
"""

# No annotations from __future__: Dagster wants the types of context and config, not their names.
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TypeVar

import dagster as dg
from pydantic import Field

from ghsync_dagster.cdc.health import checks
from ghsync_dagster.cdc.health.checks import (
    CDC_LATENCY,
    CONNECTOR_RUNNING,
    DEAD_LETTERS_EMPTY,
    IN_STEP_WITH_MYSQL,
    KAFKA_LAG,
    SOURCE_SETTINGS,
    Measured,
)
from ghsync_dagster.defs.batch.checks import as_result
from ghsync_dagster.defs.batch.columns import MONGO_USERS, USERS_CHANGES
from ghsync_dagster.defs.cdc import metadata
from ghsync_dagster.defs.errors import as_failure
from ghsync_dagster.defs.resources import ChangesResource
from ghsync_dagster.domain.errors import UnavailableError
from ghsync_dagster.retry import retrying
from ghsync_dagster.settings import Settings

CDC_CHECKS = (CONNECTOR_RUNNING, KAFKA_LAG, CDC_LATENCY, DEAD_LETTERS_EMPTY, SOURCE_SETTINGS, IN_STEP_WITH_MYSQL)

_WINDOW_REPORTS = 6
_LEAST_WINDOW_SECONDS = 60.0
_MOST_OBSERVATIONS = 500

T = TypeVar("T")


class LagConfig(dg.Config):
    """What the launchpad may set for kafka_lag."""

    max_lag_records: int | None = Field(default=None, ge=0)
    """Records that may wait; empty: GHSYNC_MAX_LAG_RECORDS."""


class LatencyConfig(dg.Config):
    """What the launchpad may set for cdc_latency."""

    max_latency_ms: float | None = Field(default=None, gt=0)
    """The allowed p99 in milliseconds; empty: GHSYNC_MAX_LATENCY_MS."""
    window_seconds: float | None = Field(default=None, gt=0)
    """How far back to look; empty: six times GHSYNC_CDC_REPORT_SECONDS, at least a minute."""


class SourceConfig(dg.Config):
    """What the launchpad may set for source_settings."""

    statement_hours: float | None = Field(default=None, gt=0)
    """How far back Connect's log is searched for statements that came as text; empty: 24."""


class AuditConfig(dg.Config):
    """What the launchpad may set for in_step_with_mysql."""

    lag_wait_seconds: float = Field(default=60.0, ge=0)
    """How long to wait until no change waits for the consumer."""
    patience_seconds: float = Field(default=30.0, ge=0)
    """How long differences are read again, since changes may be in flight."""


def _retrying(changes: ChangesResource, action: Callable[[], T]) -> T:
    with as_failure():
        return retrying("check", action, attempts=changes.settings().retry_attempts)


@dg.asset_check(
    asset=USERS_CHANGES,
    name=CONNECTOR_RUNNING,
    description="The connector and its task are RUNNING, and its offset moves while MySQL writes. The sensor "
    "connector_watch reports it too, whenever it changes.",
)
def connector_running(changes: ChangesResource) -> dg.AssetCheckResult:
    """Judge the connector."""
    with as_failure():
        probe = changes.connector()
        if probe is None:
            return as_result(checks.connector_running(None, 0.0, limit_seconds=0.0))
        report, still = probe.watched()
        return as_result(checks.connector_running(report, still, limit_seconds=probe.still_seconds))


@dg.asset_check(asset=USERS_CHANGES, name=KAFKA_LAG, description="Consumer lag is within the limit.")
def kafka_lag(config: LagConfig, changes: ChangesResource) -> dg.AssetCheckResult:
    """Judge the group's lag."""
    from ghsync_dagster.cdc.stream.topic_guard import TopicGuard
    from ghsync_dagster.stores.kafka.backlog import read_backlog

    limit = changes.settings().max_lag_records if config.max_lag_records is None else config.max_lag_records

    def known() -> tuple[bool, frozenset[int]]:
        with changes.open_store() as store:
            topic = TopicGuard(changes.kafka(), store)
            return topic.is_another(), topic.committed_partitions()

    is_another, placed = _retrying(changes, known)
    backlog = _retrying(changes, lambda: read_backlog(changes.kafka()))
    return as_result(checks.kafka_lag(backlog, limit, is_another=is_another, placed=placed))


@dg.asset_check(
    asset=USERS_CHANGES,
    name=CDC_LATENCY,
    description="In the newest observations the p99 from database commit to stored document is within the limit.",
)
def cdc_latency(
    context: dg.AssetCheckExecutionContext, config: LatencyConfig, changes: ChangesResource
) -> dg.AssetCheckResult:
    """Judge the newest observations."""
    from ghsync_dagster.stores.kafka.backlog import read_backlog

    settings = changes.settings()
    window = config.window_seconds or latency_window(settings)
    found = measured_since(context.instance, time.time() - window)
    waiting = 0 if found else _retrying(changes, lambda: read_backlog(changes.kafka())).waiting
    limit = settings.max_latency_ms if config.max_latency_ms is None else config.max_latency_ms
    return as_result(checks.cdc_latency(found, waiting, limit_ms=limit, window_seconds=window))


def latency_window(settings: Settings) -> float:
    """Return the window of observed latencies, in seconds."""
    return max(_WINDOW_REPORTS * settings.cdc_report_seconds, _LEAST_WINDOW_SECONDS)


def measured_since(instance: dg.DagsterInstance, since: float) -> list[Measured]:
    """Return the latencies that were observed after a moment, in seconds since 1970; newest first."""
    records = instance.fetch_observations(
        dg.AssetRecordsFilter(dg.AssetKey(USERS_CHANGES), after_timestamp=since), limit=_MOST_OBSERVATIONS
    ).records
    found = (
        metadata.measured(record.asset_observation.metadata, at=record.timestamp, run_id=record.run_id)
        for record in records
        if record.asset_observation
    )
    return [one for one in found if one is not None]


@dg.asset_check(asset=USERS_CHANGES, name=DEAD_LETTERS_EMPTY, description="No dead letter is open.")
def dead_letters_empty(changes: ChangesResource) -> dg.AssetCheckResult:
    """Judge the dead letters."""
    return as_result(_retrying(changes, lambda: checks.dead_letters_empty(changes.dead_letters())))


@dg.asset_check(
    asset=USERS_CHANGES,
    name=SOURCE_SETTINGS,
    description="Debezium can follow the table, and the server logs each change of it as a whole row.",
)
def source_settings(config: SourceConfig, changes: ChangesResource) -> dg.AssetCheckResult:
    """Judge the table's shape, the server's settings, and the statements in Connect's log."""
    with as_failure():
        no_kafka, no_mysql = changes.no_kafka(), changes.no_mysql()
    if no_mysql:
        return as_result(checks.no_source(no_mysql, passed=no_kafka is not None))
    found = _retrying(changes, lambda: changes.source(config.statement_hours))
    assert found is not None  # noqa: S101  there is a MySQL
    return as_result(found)


@dg.asset_check(
    asset=MONGO_USERS,
    name=IN_STEP_WITH_MYSQL,
    additional_deps=["mysql_users"],
    description="The collection holds what MySQL's table holds, key by key, but for users that only files brought.",
)
def in_step_with_mysql(
    context: dg.AssetCheckExecutionContext, config: AuditConfig, changes: ChangesResource
) -> dg.AssetCheckResult:
    """Compare the collection with MySQL's table, once no change waits."""
    # Deployments without changes have the asset of this check too.
    with as_failure():
        no_kafka, no_mysql = changes.no_kafka(), changes.no_mysql()
    if no_kafka:
        return as_result(checks.nothing_to_compare(no_kafka))
    if no_mysql:
        return as_result(checks.nothing_to_compare_with(no_mysql))
    with as_failure():
        if not _is_of_load(context):
            return _compared(config, changes, changes.settings().retry_attempts)
        try:
            return _compared(config, changes, attempts=1)
        except UnavailableError as error:
            # A load of files needs none of the stream's servers. Other checks report which is unavailable.
            return as_result(checks.nothing_to_compare(error.message, error.way_out))


def _is_of_load(context: dg.AssetCheckExecutionContext) -> bool:
    """Return whether the check's run materializes the collection."""
    return dg.AssetKey(MONGO_USERS) in context.job_def.asset_layer.selected_asset_keys


def _compared(config: AuditConfig, changes: ChangesResource, attempts: int) -> dg.AssetCheckResult:
    from ghsync_dagster.cdc.dead_letters.index import users_with_letters
    from ghsync_dagster.cdc.health.audit import AuditResult, Patience, audit
    from ghsync_dagster.cdc.health.causes import Circumstances
    from ghsync_dagster.domain.connector import stopped_words
    from ghsync_dagster.stores.kafka.backlog import await_no_lag

    def again(action: Callable[[], T]) -> T:
        return retrying("check", action, attempts=attempts)

    waiting = again(lambda: await_no_lag(changes.kafka(), config.lag_wait_seconds))
    source, began = again(changes.source), datetime.now(UTC)

    def compare() -> tuple[AuditResult, set[str]]:
        with changes.open_mysql() as mysql, changes.open_store() as store:
            result = audit(mysql, store, patience=Patience(seconds=config.patience_seconds))
            return result, set() if result.equal else users_with_letters(changes.kafka(), store)

    probe = changes.connector()
    stopped = stopped_words(None if probe is None else probe.settled())
    result, lettered = again(compare)
    known = Circumstances(connector=stopped, settings=checks.causes_in(source), with_letters=lettered)
    finding = checks.in_step_with_mysql(result, waiting, known)
    if finding.passed:
        changes.close_statements(began)
    return as_result(finding)


CHECKS = [connector_running, kafka_lag, cdc_latency, dead_letters_empty, source_settings, in_step_with_mysql]
