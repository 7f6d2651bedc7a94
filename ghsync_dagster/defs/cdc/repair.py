"""The repair of users in Dagster: a job with launchpad config, and a sensor that starts it after an audit.

Belongs here: config, what fails a run, and which failed audits start one. Not here: which users are repaired, and how
(``cdc.health.repair_requests``).
"""

# No annotations from __future__: Dagster wants the types of context and config, not their names.
import threading
from itertools import islice
from typing import Final

import dagster as dg
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecordStatus
from pydantic import Field

from ghsync_dagster.cdc.health.repair_requests import (
    SHOWN,
    Chosen,
    RepairReport,
    Selection,
    plan,
    refuse_too_many,
    repair,
    select,
)
from ghsync_dagster.defs.cdc.checks import in_step_with_mysql
from ghsync_dagster.defs.cdc.jobs import FLOW_TAG
from ghsync_dagster.defs.errors import as_failure
from ghsync_dagster.defs.presets import preset
from ghsync_dagster.defs.resources import ChangesResource
from ghsync_dagster.domain.errors import WAY_OUT, ConfigError
from ghsync_dagster.logging import configure_logging, get_logger
from ghsync_dagster.retry import retrying
from ghsync_dagster.settings import load_settings

REPAIR_JOB: Final = "cdc_repair_job"
REPAIR_OP: Final = "repair_users"
_DIFFERENCES: Final = ("missing", "extra", "different")
_CHECK: Final = in_step_with_mysql.check_key
_INTERVAL_SECONDS: Final = 30

log = get_logger("repair")


class RepairConfig(dg.Config):
    """What the launchpad may set for cdc_repair_job: which users are repaired, the union of what is chosen."""

    user_ids: list[str] = Field(default_factory=list)
    """These users."""
    from_audit: bool = False
    """The users that an audit finds to differ."""
    dead_letters: bool = False
    """The users with an open dead letter."""
    everyone: bool = False
    """Every user in which the two sides differ now, without waiting for changes in flight."""
    patience_seconds: float = Field(default=10.0, ge=0)
    """For how long the audit reads differences again."""
    dry_run: bool = False
    """Only report what would be done. With dead_letters their index is updated; nothing else is written."""
    yes: bool = False
    """Repair also more users than GHSYNC_REPAIR_MAX_USERS."""


@dg.op(
    name=REPAIR_OP, out=dg.Out(dg.Nothing), description="Repairs users from MySQL, and waits until they are in sync."
)
def repair_users(context: dg.OpExecutionContext, config: RepairConfig, changes: ChangesResource) -> None:
    """Repair the chosen users; fail if one is not repaired, or something is left to do by hand."""
    with as_failure():
        report = _repaired(config, changes)
    context.log.info(report.summary())
    counts = {"asked": report.asked, "open": report.open, "unrepairable": report.unrepairable}
    planned = dict(islice(report.planned.items(), SHOWN))
    context.add_output_metadata({**counts, "seconds": report.seconds, **report.outcomes, "planned": planned})
    if not report.is_carried_out and not report.dry_run:
        reason = f": {report.problem}" if report.problem else ""
        way_out = f"{WAY_OUT}{report.way_out}" if report.way_out else ""
        raise dg.Failure(
            description=f"{report.summary()}{reason}{way_out}",
            metadata={
                "kind": "data",
                "refused": dg.MetadataValue.json([user.user_id for user in report.refused]),
                "by_hand": dg.MetadataValue.json(list(report.by_hand)),
            },
            allow_retries=False,
        )


def _repaired(config: RepairConfig, changes: ChangesResource) -> RepairReport:
    from ghsync_dagster.cdc.stream.listener import SilentListener
    from ghsync_dagster.stores.mongo.repairs import RepairRequests

    settings = changes.settings()
    selection = Selection(tuple(config.user_ids), config.from_audit, config.everyone, config.dead_letters)
    if selection.is_empty:
        raise ConfigError(
            "No user is chosen.", way_out="Set user_ids, from_audit, dead_letters or everyone in the launchpad."
        )
    with changes.open_store() as store:
        if not config.dry_run:
            store.ensure_collection()
        repairs = RepairRequests(store)

        def chosen() -> Chosen:
            with changes.open_mysql() as mysql:
                return select(selection, mysql, store, changes.kafka(), config.patience_seconds)

        keys, unrepairable = retrying("Choosing users", chosen, attempts=settings.retry_attempts)
        if config.dry_run:
            with changes.open_mysql() as mysql:
                return plan(mysql, store, repairs, keys).with_unrepairable(unrepairable)
        if not config.yes:
            refuse_too_many(len(keys), settings.repair_max_users)
        own_consumer = lambda: changes.consumer(SilentListener())  # noqa: E731
        report = repair(changes.kafka(), repairs, keys, own_consumer, stop=threading.Event())
        return report.with_unrepairable(unrepairable)


@dg.job(
    name=REPAIR_JOB,
    config=preset(repair_users=RepairConfig()),
    executor_def=dg.in_process_executor,
    description="Repairs users from MySQL, while changes go on: by ids, from an audit, from dead "
    "letters, or everyone who differs. Fails where a user is not repaired.",
    tags={FLOW_TAG: "repair"},
)
def cdc_repair_job() -> None:
    """Repair the users that the launchpad chooses."""
    repair_users()


@dg.sensor(
    name="cdc_repair_sensor",
    job=cdc_repair_job,
    minimum_interval_seconds=_INTERVAL_SECONDS,
    default_status=dg.DefaultSensorStatus.STOPPED,
    description="After an audit that found up to GHSYNC_REPAIR_MAX_USERS differences, repairs them. More are left to a "
    "person, whom the failed check alerts.",
)
def cdc_repair_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
    """Start a repair once for each failed audit."""
    settings = load_settings()
    configure_logging(settings)
    found = context.instance.event_log_storage.get_asset_check_execution_history(_CHECK, limit=1)
    newest = found[0] if found else None
    if newest is None or newest.status is not AssetCheckExecutionRecordStatus.FAILED:
        return dg.SkipReason("The newest audit found no difference, or there was none.")
    if context.cursor and int(context.cursor) >= newest.id:
        return dg.SkipReason("The newest failed audit was handled already.")
    evaluation = newest.evaluation
    metadata = {} if evaluation is None else evaluation.metadata
    count = sum(int(str(metadata[name].value)) for name in _DIFFERENCES if name in metadata)
    cursor = str(newest.id)
    if not count:
        return dg.SensorResult(skip_reason="The newest audit compared nothing.", cursor=cursor)
    if count > settings.repair_max_users:
        log.error("too many differences to repair unattended", differences=count, limit=settings.repair_max_users)
        reason = (
            f"{count} differences are more than GHSYNC_REPAIR_MAX_USERS={settings.repair_max_users}: see the check."
        )
        return dg.SensorResult(skip_reason=reason, cursor=cursor)
    config = {"ops": {REPAIR_OP: {"config": {"from_audit": True}}}}
    request = dg.RunRequest(run_key=f"audit-{newest.id}", run_config=config, tags={FLOW_TAG: "repair"})
    return dg.SensorResult(run_requests=[request], cursor=cursor)


JOBS = [cdc_repair_job]
SENSORS = [cdc_repair_sensor]
