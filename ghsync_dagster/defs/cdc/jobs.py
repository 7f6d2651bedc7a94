"""The jobs of the change flow: a slice of consumption, a drain to the end of the topic, and the checks.

Belongs here: ops, their config, and what fails a drain. Not here: how changes are consumed or judged.
"""

# No annotations from __future__: Dagster wants the types of context and config, not their names.
from collections import Counter
from collections.abc import Mapping

import dagster as dg
from pydantic import Field

from ghsync_dagster.batch import checks
from ghsync_dagster.cdc.health.checks import loses_changes
from ghsync_dagster.cdc.health.connector import require_stream
from ghsync_dagster.defs.batch.checks import as_result
from ghsync_dagster.defs.cdc.checks import CHECKS, AuditConfig, LagConfig, LatencyConfig, SourceConfig
from ghsync_dagster.defs.cdc.slice import consume
from ghsync_dagster.defs.errors import as_failure
from ghsync_dagster.defs.gated import gated_executor
from ghsync_dagster.defs.presets import preset
from ghsync_dagster.defs.resources import ChangesResource
from ghsync_dagster.domain.errors import WAY_OUT, GhsyncError
from ghsync_dagster.domain.finding import Finding
from ghsync_dagster.retry import retrying

FLOW_TAG = "ghsync/flow"
SYNC_JOB = "cdc_sync_job"
SYNC_OP = "consume_changes"
DRAIN_JOB = "cdc_drain_job"
NEW_DEAD_LETTERS = "new_dead_letters"


class SliceConfig(dg.Config):
    """What the launchpad may set for cdc_sync_job."""

    seconds: float | None = Field(default=None, gt=0)
    """How long to consume; empty: GHSYNC_CDC_SLICE_SECONDS."""


class DrainConfig(dg.Config):
    """What the launchpad may set for draining in cdc_drain_job."""

    timeout_seconds: float | None = Field(default=None, gt=0)
    """The longest time to consume. The run fails if the end was not reached by then; empty: no limit."""


class GateConfig(dg.Config):
    """What the launchpad may set for the gate of cdc_drain_job."""

    max_new_dead_letters: int = Field(default=0, ge=0)
    """How many dead letters the drain may write: 0, since each is a change that is not applied."""


@dg.op(name=SYNC_OP, out=dg.Out(dg.Nothing), description="Consumes changes until the slice ends; observes them.")
def consume_changes(context: dg.OpExecutionContext, config: SliceConfig, changes: ChangesResource) -> None:
    """Consume for one slice."""
    seconds = config.seconds or changes.settings().cdc_slice_seconds
    with as_failure():
        report = consume(context, changes, seconds=seconds)
    context.log.info(f"consumed for {report.seconds:.0f} s: {report.records}, dead letters: {report.dead_letters}")


@dg.job(
    name=SYNC_JOB,
    config=preset(consume_changes=SliceConfig()),
    executor_def=dg.in_process_executor,
    description="Consumes changes for GHSYNC_CDC_SLICE_SECONDS. The sensor cdc_supervisor keeps one running.",
    tags={FLOW_TAG: "cdc"},
)
def cdc_sync_job() -> None:
    """One slice of consumption."""
    consume_changes()


@dg.op(description="Consumes changes up to the offsets at which the topic ended at the start.")
def drain_changes(context: dg.OpExecutionContext, config: DrainConfig, changes: ChangesResource) -> dict[str, int]:
    """Consume to the end.

    Returns:
        How many dead letters were written meanwhile, by kind: by this run, or by another consumer of the group.

    Raises:
        Failure: The end was not reached, or the connector does not run, so that later changes never come.
    """
    from ghsync_dagster.cdc.dead_letters.topic import dead_letter_ends, read_dead_letters
    from ghsync_dagster.stores.kafka.backlog import read_backlog

    with as_failure():
        attempts = changes.settings().retry_attempts
        letters = retrying("drain", lambda: dead_letter_ends(changes.kafka()), attempts=attempts)
        ends = retrying("drain", lambda: read_backlog(changes.kafka()), attempts=attempts).ends()
        report = consume(context, changes, until_end=True, seconds=config.timeout_seconds)
        left = retrying("drain", lambda: read_backlog(changes.kafka()), attempts=attempts).before(ends)
        new = retrying(
            "drain", lambda: Counter(one.kind for one in read_dead_letters(changes.kafka(), letters)), attempts=attempts
        )
        probe = changes.connector()
        connector = None if probe is None else probe.settled()
    context.add_output_metadata({"seconds": report.seconds, "records": sum(report.records.values()), "left": left})
    if left or not report.reached_end:
        why = (
            f"{left} changes that were there at the start are not applied"
            if left
            else "whether changes are to be applied again was not checked, or they are not applied yet"
        )
        raise dg.Failure(
            description=f"Stopped before the end: {why}.",
            metadata={"left": left, "kind": "data", "way_out": "Run it again; raise timeout_seconds if it is set."},
            allow_retries=False,
        )
    with as_failure():
        require_stream(connector)
    return dict(new)


@dg.op(out=dg.Out(dg.Nothing), description="Fails on what must not be after a drain.")
def gate_drain(
    context: dg.OpExecutionContext, config: GateConfig, changes: ChangesResource, dead_letters: dict[str, int]
) -> None:
    """Judge the collection, and the dead letters that were written meanwhile."""
    with as_failure():
        findings = [
            _new_dead_letters(dead_letters, config.max_new_dead_letters),
            *retrying("check", lambda: _on_store(changes), attempts=changes.settings().retry_attempts),
            *_on_source(context, changes),
        ]
    for finding in findings:
        context.log.info(f"{finding.check}: {'passed' if finding.passed else 'FAILED'}: {finding.summary}")
    if failed := [finding for finding in findings if not finding.passed]:
        summary = "; ".join(f"{finding.check}: {finding.summary}" for finding in failed)
        way_out = " ".join(finding.way_out for finding in failed)
        raise dg.Failure(
            description=f"{summary}.{WAY_OUT}{way_out}",
            metadata={"kind": "data", "way_out": way_out, **_as_metadata(failed)},
            allow_retries=False,
        )


def _new_dead_letters(made: Mapping[str, int], limit: int) -> Finding:
    count = sum(made.values())
    return Finding(
        NEW_DEAD_LETTERS,
        count <= limit,
        f"{count} new dead letters (at most {limit} may be)",
        {"dead_letters": count, "limit": limit},
        [{"kind": kind, "dead_letters": number} for kind, number in sorted(made.items())],
        "" if count <= limit else "Look at them: ghsync dlq list.",
    )


def _on_store(changes: ChangesResource) -> list[Finding]:
    with changes.open_store() as store:
        return [checks.unique_user_id_index(store), checks.documents_conform(store)]


def _on_source(context: dg.OpExecutionContext, changes: ChangesResource) -> list[Finding]:
    """Return the finding on MySQL if the connector can't run or changes are lost."""
    try:
        source = changes.source()
    except GhsyncError as error:
        # The topic is drained all the same.
        context.log.warning(f"source: not read: {error}")
        return []
    return [source] if source is not None and loses_changes(source) else []


def _as_metadata(findings: list[Finding]) -> dict[str, dg.MetadataValue]:
    return {
        f"{finding.check} {name}": value for finding in findings for name, value in as_result(finding).metadata.items()
    }


@dg.job(
    name=DRAIN_JOB,
    config=preset(drain_changes=DrainConfig(), gate_drain=GateConfig()),
    executor_def=dg.in_process_executor,
    description="Consumes changes up to where the topic ended at the start, then judges the collection: fails without "
    "the unique index, on a document that breaks the contract, and on new dead letters.",
    tags={FLOW_TAG: "drain"},
)
def cdc_drain_job() -> None:
    """Drain, then judge."""
    gate_drain(drain_changes())


cdc_audit_job = dg.define_asset_job(
    "cdc_audit_job",
    selection=dg.AssetSelection.checks(*CHECKS),
    config=preset(
        users_changes_kafka_lag=LagConfig(),
        users_changes_cdc_latency=LatencyConfig(),
        users_changes_source_settings=SourceConfig(),
        mongo_users_in_step_with_mysql=AuditConfig(),
    ),
    executor_def=gated_executor,
    description="Every check of the change flow: lag, latency, dead letters, MySQL's table and settings, and the "
    "comparison with MySQL. Fails where one does not pass, though none blocks. Writes no user.",
    tags={FLOW_TAG: "audit"},
)

cdc_audit_schedule = dg.ScheduleDefinition(
    name="cdc_audit_schedule",
    job=cdc_audit_job,
    cron_schedule="*/15 * * * *",
    default_status=dg.DefaultScheduleStatus.STOPPED,
    description="Runs cdc_audit_job, so that the sensor alerts reports failures. Turn it on where servers are.",
)

JOBS = [cdc_sync_job, cdc_drain_job]
ASSET_JOBS = [cdc_audit_job]
SCHEDULES = [cdc_audit_schedule]
