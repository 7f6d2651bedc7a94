"""The supervisor of cdc_sync_job: reads its runs, and starts and ends slices as ``defs.cdc.supervisor`` decides.

Belongs here: reading runs and observations, and carrying out a decision. Not here: the decision.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import dagster as dg

from ghsync_dagster.defs.cdc.jobs import FLOW_TAG, SYNC_JOB, SYNC_OP, cdc_sync_job
from ghsync_dagster.defs.cdc.supervisor import Phase, Replace, Rules, Slice, Start, Wait, decide, is_silent
from ghsync_dagster.domain.errors import TransientError
from ghsync_dagster.logging import configure_logging, get_logger
from ghsync_dagster.settings import load_settings
from ghsync_dagster.wiring import existing_kafka

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ghsync_dagster.settings import Settings

REPLACED_TAG: Final = "ghsync/replaced"
MAX_RUNTIME_TAG: Final = "dagster/max_runtime"

# Less than the 5 s of the daemon's loop: with 5 a tick is at times a few ms early, and waits for the next loop.
_INTERVAL_SECONDS: Final = 1
_WATCH_SECONDS: Final = 3.0
"""How long a tick watches for a failing slice, else noticed only in the daemon's next loop. Other sensors wait."""
_POLL_SECONDS: Final = 0.25
_ENDED_LIMIT: Final = 20
_PROBE_SECONDS: Final = 3.0
_PHASES: Final = {
    dg.DagsterRunStatus.QUEUED: Phase.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED: Phase.STARTING,
    dg.DagsterRunStatus.MANAGED: Phase.STARTING,
    dg.DagsterRunStatus.STARTING: Phase.STARTING,
    dg.DagsterRunStatus.STARTED: Phase.RUNNING,
    dg.DagsterRunStatus.CANCELING: Phase.ENDING,
    dg.DagsterRunStatus.SUCCESS: Phase.SUCCEEDED,
    dg.DagsterRunStatus.CANCELED: Phase.STOPPED,
    dg.DagsterRunStatus.FAILURE: Phase.FAILED,
}
_LIVING: Final = [status for status, phase in _PHASES.items() if phase.lives]
_ENDED: Final = [status for status, phase in _PHASES.items() if not phase.lives]

log = get_logger("supervisor")


@dg.sensor(
    name="cdc_supervisor",
    job=cdc_sync_job,
    minimum_interval_seconds=_INTERVAL_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Keeps a slice of consumption running: starts the next one before the present one ends, replaces one "
    "that is dead or stuck, pauses longer and longer after failures, and starts nothing while Kafka can't be reached.",
)
def cdc_supervisor(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
    """Decide, and carry the decision out.

    Raises:
        PermanentError: Kafka refuses, or a setting is wrong.
    """
    settings = load_settings()
    configure_logging(settings)
    if settings.consumer == "service":
        return dg.SkipReason("Nothing is started: the consumer is a service of its own (GHSYNC_CONSUMER).")
    rules = Rules(report=settings.cdc_report_seconds)
    slices = read_slices(context.instance, settings)
    decision, done = _settle(context.instance, slices, settings, rules)
    if isinstance(decision, Wait) and not done and _observes_failure(context.instance, slices):
        decision, done = _settle(context.instance, read_slices(context.instance, settings), settings, rules)
    if isinstance(decision, Wait):
        return dg.SkipReason(" ".join([*done, decision.why]))
    if missing := _kafka_is_missing(settings):
        return dg.SkipReason(" ".join([*done, f"Nothing is started: {missing}"]))
    log.info("slice started", why=decision.why, after=decision.after)
    return run_request(settings, decision.after, rules)


def _settle(
    instance: dg.DagsterInstance, slices: Sequence[Slice], settings: Settings, rules: Rules
) -> tuple[Start | Wait, list[str]]:
    """End the slices that are to be replaced; return the last decision, and what was done, in words."""
    now = time.time()
    waiting = _waiting(settings) if any(is_silent(one, now, rules) for one in slices) else None
    done = []
    while isinstance(decision := decide(slices, now, rules, waiting), Replace):
        end_slice(instance, decision)
        done.append(f"Ended {decision.run_id}: {decision.why}.")
        slices = [_ended(one, now) if one.run_id == decision.run_id else one for one in slices]
    return decision, done


def _observes_failure(instance: dg.DagsterInstance, slices: Sequence[Slice]) -> bool:
    """Watch the living slices for a while; return whether one of them failed.

    A cancelled run is no failure, as a person may stop the sensor and its runs during this tick.
    """
    living = [one.run_id for one in slices if one.phase.lives]
    if not living:
        return False
    failed = dg.RunsFilter(run_ids=living, statuses=[dg.DagsterRunStatus.FAILURE])
    until = time.monotonic() + _WATCH_SECONDS
    while time.monotonic() < until:
        if instance.get_runs_count(failed):
            return True
        time.sleep(_POLL_SECONDS)
    return False


def run_request(settings: Settings, after: str | None, rules: Rules) -> dg.RunRequest:
    """Return the request for a slice; its key is the run before it, so that it is started only once."""
    seconds = settings.cdc_slice_seconds
    # If the supervisor is off, Dagster's run monitoring ends a slice that hangs.
    longest = seconds + 2 * rules.grace
    return dg.RunRequest(
        run_key=f"after-{after or 'nothing'}",
        run_config={"ops": {SYNC_OP: {"config": {"seconds": seconds}}}},
        tags={FLOW_TAG: "cdc", MAX_RUNTIME_TAG: str(int(longest))},
    )


def read_slices(instance: dg.DagsterInstance, settings: Settings) -> list[Slice]:
    """Return the living slices and the newest of the ended ones."""
    living = instance.get_run_records(dg.RunsFilter(job_name=SYNC_JOB, statuses=_LIVING))
    ended = instance.get_run_records(dg.RunsFilter(job_name=SYNC_JOB, statuses=_ENDED), limit=_ENDED_LIMIT)
    return [_as_slice(instance, record, settings) for record in (*living, *ended)]


def _as_slice(instance: dg.DagsterInstance, record: dg.RunRecord, settings: Settings) -> Slice:
    run = record.dagster_run
    phase = _PHASES[run.status]
    return Slice(
        run_id=run.run_id,
        phase=phase,
        created=record.create_timestamp.timestamp(),
        changed=record.update_timestamp.timestamp(),
        seconds=_seconds(run, settings),
        started=record.start_time,
        observed=_observed(instance, run.run_id) if phase is Phase.RUNNING else None,
        ended=record.end_time,
        replaced=REPLACED_TAG in run.tags,
    )


def _seconds(run: dg.DagsterRun, settings: Settings) -> float:
    """Return how long a run is to consume: by its config, which a person may have written."""
    found: object = run.run_config
    for name in ("ops", SYNC_OP, "config", "seconds"):
        found = found.get(name) if isinstance(found, dict) else None
    return float(found) if isinstance(found, int | float) and found > 0 else settings.cdc_slice_seconds


def _observed(instance: dg.DagsterInstance, run_id: str) -> float | None:
    records = instance.get_records_for_run(
        run_id, of_type=dg.DagsterEventType.ASSET_OBSERVATION, limit=1, ascending=False
    ).records
    return records[0].timestamp if records else None


def _waiting(settings: Settings) -> int | None:
    """Return how many changes wait; None if Kafka is unavailable, as another slice could not consume either."""
    from ghsync_dagster.stores.kafka.backlog import read_backlog

    try:
        return read_backlog(replace(existing_kafka(settings), timeout_seconds=_PROBE_SECONDS)).waiting
    except TransientError as error:
        log.warning("lag unknown", reason=error.message)
        return None


def _kafka_is_missing(settings: Settings) -> str | None:
    """Return why Kafka can't be used now, None where it can."""
    from ghsync_dagster.stores.kafka.backlog import require_topic

    try:
        require_topic(existing_kafka(settings), seconds=_PROBE_SECONDS)
    except TransientError as error:
        return str(error)
    return None


def end_slice(instance: dg.DagsterInstance, decision: Replace) -> None:
    """End a slice: terminate its run; if its process can't be reached or does not react, mark the run failed."""
    run_id = decision.run_id
    run = instance.get_run_by_id(run_id)
    if run is None or run.is_finished:
        return
    log.warning("slice ended", run=run_id, why=decision.why)
    instance.add_run_tags(run_id, {REPLACED_TAG: decision.why[:200]})
    was_terminated = run.status == dg.DagsterRunStatus.CANCELING
    if was_terminated or not _terminate(instance, run_id):
        reloaded = instance.get_run_by_id(run_id)
        if reloaded and not reloaded.is_finished:
            instance.report_run_failed(reloaded, f"Ended by cdc_supervisor: {decision.why}.")


def _terminate(instance: dg.DagsterInstance, run_id: str) -> bool:
    """Terminate the run; return whether its process was reached."""
    try:
        return bool(instance.run_coordinator.cancel_run(run_id))
    except Exception as error:  # noqa: BLE001  launchers raise any error of their platform; the run is marked failed
        log.warning("run's process not reached", run=run_id, error=type(error).__name__)
        return False


def _ended(one: Slice, now: float) -> Slice:
    """Return a slice as ended, though its process may live on for a while."""
    return replace(one, phase=Phase.STOPPED, ended=now, replaced=True)


SENSORS: Sequence[dg.SensorDefinition] = [cdc_supervisor]
