"""Probes the stream's source: the connector's state, its committed offset, and the end of the database's binlog.

Belongs here: what is read, and in which order. Not here: the requests (``stores.connect``, ``stores.mysql``), what a
state means (``domain.connector``), and the judgement (``cdc.health.checks``).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ghsync_dagster.domain.connector import UNKNOWN, ConnectorState, Sample, base_of
from ghsync_dagster.domain.errors import GhsyncError, UnavailableError
from ghsync_dagster.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from ghsync_dagster.stores.connect import ConnectWorker
    from ghsync_dagster.stores.mysql import MySqlStore

NOT_ASKED: Final = "the connector was not asked: CONNECT_URL is not set, and there is no local worker here"
_SETTLE_SECONDS: Final = 10.0
"""How long to wait for a connector that is starting."""
_POLL_SECONDS: Final = 0.5

log = get_logger("cdc")


def require_stream(state: ConnectorState | None) -> None:
    """Check that the connector runs, once all records of the topic are applied.

    Args:
        state: The connector's; None where no worker is known, which is no error.

    Raises:
        UnavailableError: It does not run.
    """
    if state is not None and not state.is_running:
        raise UnavailableError(
            f"What the topic held is applied, but the stream is stopped: {state.words()}.", way_out=state.way_out()
        )


@dataclass(frozen=True, slots=True)
class ConnectorReport:
    """What is known of the connector at one moment.

    Attributes:
        state: Its state.
        sample: Its offset and the end of the binlog.
        event_at: When the database wrote the last event that its offset covers, in seconds since 1970; None where that
            is not known.
        blind: Why the offset or the binlog could not be read, in words; empty where both were.
    """

    state: ConnectorState
    sample: Sample
    event_at: float | None = None
    blind: str = ""


class ConnectorProbe:
    """Reads the state of the connector and of its database.

    Args:
        open_worker: Opens a connection to its worker.
        open_mysql: Opens a connection to the database that it follows; None where none is known.
        still_seconds: How long its offset may stand still while the database writes.
    """

    def __init__(
        self,
        open_worker: Callable[[], ConnectWorker],
        open_mysql: Callable[[], MySqlStore] | None,
        *,
        still_seconds: float,
    ) -> None:
        self._open_worker = open_worker
        self._open_mysql = open_mysql
        self.still_seconds = still_seconds

    def state(self) -> ConnectorState:
        """Return the connector's state now; ``UNKNOWN`` where the worker does not answer."""
        from ghsync_dagster.stores.connect import unreachable

        try:
            with self._open_worker() as worker:
                return worker.state()
        except UnavailableError as error:
            return unreachable(error)

    def settled(self, seconds: float = _SETTLE_SECONDS) -> ConnectorState:
        """Return the connector's state, once it is no longer starting or the time is over."""
        deadline = time.monotonic() + seconds
        while True:
            state = self.state()
            # A worker that restarts is UNKNOWN for a moment only.
            if state.is_running or (state.is_stopped and state.state != UNKNOWN) or time.monotonic() > deadline:
                return state
            time.sleep(_POLL_SECONDS)

    def report(self, *, with_log: bool = True) -> ConnectorReport:
        """Return what is known now.

        Args:
            with_log: Whether to read the end of the binlog too.
        """
        from ghsync_dagster.stores.connect import unreachable

        now = time.time()
        try:
            with self._open_worker() as worker:
                state = worker.state()
                if not state.is_running:
                    return ConnectorReport(state, Sample(now))
                offset = worker.offset()
                beats = worker.sends_heartbeats()
        except UnavailableError as error:
            return ConnectorReport(unreachable(error), Sample(now))
        if offset is None:
            return ConnectorReport(state, Sample(now), blind="the worker reports no committed offset")
        log_end, blind = None, "the connector has no heartbeat.interval.ms"
        if beats:
            log_end, blind = self._log_end() if with_log else (None, "")
        return ConnectorReport(state, Sample(now, offset.text, log_end, offset.position), offset.event_at, blind)

    def _log_end(self) -> tuple[str | None, str]:
        if self._open_mysql is None:
            return None, "MYSQL_URL is not set"
        try:
            with self._open_mysql() as mysql:
                log_end = mysql.log_end()
        except GhsyncError as error:
            return None, error.message.rstrip(".")
        return log_end, "" if log_end else "MySQL writes no binlog"

    def watched(self) -> tuple[ConnectorReport, float]:
        """Return the connector's report, and for how many seconds its offset has stood still while the database wrote.

        It returns once the offset moves, or has stood still for longer than allowed.
        """
        self.settled()
        report = self.report()
        base = report.sample
        still = 0.0
        while report.sample.is_known and still <= self.still_seconds:
            time.sleep(_POLL_SECONDS)
            report = self.report()
            base = base_of(base, report.sample)
            still = report.sample.at - base.at
            if still == 0:
                break
        return report, still


def watch_connector(probe: ConnectorProbe | None, receive: Callable[[ConnectorReport], None]) -> None:
    """Pass on the connector's report. A failure is only logged, since a consumer goes on without it.

    Args:
        probe: Reads the state; None where no worker is known.
        receive: Called with the report.
    """
    if probe is None:
        return
    try:
        report = probe.report(with_log=False)
    except GhsyncError as error:
        log.warning("connector not asked", reason=error.message)
    else:
        receive(report)
