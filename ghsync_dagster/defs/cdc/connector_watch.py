"""The sensor connector_watch: reports the check connector_running whenever its outcome changes, without a run.

Belongs here: the sensor's cursor. Not here: the probe (``cdc.health.connector``), the judgement
(``cdc.health.checks``), and whether the outcome has changed (``watching``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import dagster as dg
import msgspec

from ghsync_dagster.cdc.health import checks
from ghsync_dagster.cdc.health.connector import NOT_ASKED
from ghsync_dagster.defs.cdc.watching import report
from ghsync_dagster.domain.connector import UNKNOWN, Sample, base_of
from ghsync_dagster.logging import configure_logging, get_logger
from ghsync_dagster.settings import load_settings
from ghsync_dagster.wiring import connector_probe

if TYPE_CHECKING:
    from ghsync_dagster.cdc.health.connector import ConnectorProbe, ConnectorReport
    from ghsync_dagster.domain.finding import Finding

INTERVAL_SECONDS: Final = 15
_DOUBTFUL_TICKS: Final = 2
"""A worker or task that restarts is back within moments, so only the second tick in a row counts."""

log = get_logger("connector")


class Memory(msgspec.Struct, frozen=True):
    """The sensor's cursor.

    Attributes:
        base: Since when the offset stands still while MySQL writes, see ``domain.connector.base_of``.
        doubtful: How many ticks in a row found a state that may be transient.
    """

    base: Sample | None = None
    doubtful: int = 0


@dg.sensor(
    name="connector_watch",
    minimum_interval_seconds=INTERVAL_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Asks the Connect worker for the connector, and MySQL for the end of its binlog. Reports the check "
    "connector_running whenever its outcome changes, so that the sensor alerts reports it. Starts no run.",
)
def connector_watch(context: dg.SensorEvaluationContext) -> dg.SensorResult:
    """Check once; report a changed outcome."""
    settings = load_settings()
    configure_logging(settings)
    memory = _memory(context.cursor)
    probe = connector_probe(settings)
    if probe is None:
        return dg.SensorResult(skip_reason=dg.SkipReason(NOT_ASKED), cursor=_as_cursor(Memory()))
    finding, after = check(probe, memory)
    if finding is None:
        reason = "the connector's state may be transient; it is checked again"
        return dg.SensorResult(skip_reason=dg.SkipReason(reason), cursor=_as_cursor(after))
    return report(context.instance, finding, log, _as_cursor(after))


def check(probe: ConnectorProbe, memory: Memory) -> tuple[Finding | None, Memory]:
    """Probe once.

    Returns:
        The finding, or None where the state may be transient; the new cursor.
    """
    found = probe.report()
    base = base_of(memory.base, found.sample)
    doubtful = memory.doubtful + 1 if _is_doubtful(found) else 0
    after = msgspec.structs.replace(memory, base=base, doubtful=doubtful)
    if 0 < doubtful < _DOUBTFUL_TICKS:
        return None, after
    still = found.sample.at - base.at
    return checks.connector_running(found, still, limit_seconds=probe.still_seconds), after


def _is_doubtful(found: ConnectorReport) -> bool:
    state = found.state
    return state.state == UNKNOWN or not (state.is_running or state.is_stopped)


def _memory(cursor: str | None) -> Memory:
    """Read the cursor; an invalid one counts as none."""
    try:
        return msgspec.json.decode(cursor or "{}", type=Memory)
    except msgspec.DecodeError:
        return Memory()


def _as_cursor(memory: Memory) -> str:
    return msgspec.json.encode(memory).decode()


SENSORS = [connector_watch]
