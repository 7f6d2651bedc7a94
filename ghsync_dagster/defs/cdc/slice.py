"""One run's consumption: a thread consumes changes, and the main thread observes it and stops it.

Belongs here: observations, the end on a signal or on the run's termination, the metrics endpoint. Not here: how changes
are consumed (``cdc.stream.consume``), and when a run starts (``defs.cdc.supervisor``).
"""

from __future__ import annotations

import gc
import math
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Final

import dagster as dg
from sqlalchemy.exc import SQLAlchemyError

from ghsync_dagster.cdc.health.connector import watch_connector
from ghsync_dagster.cdc.health.metrics import SILENT_SECONDS, ChangeMetrics, MetricsEndpoint
from ghsync_dagster.defs.batch.columns import USERS_CHANGES
from ghsync_dagster.defs.cdc import metadata
from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster.logging import get_logger
from ghsync_dagster.stopping import killed_when_frozen, stop_on_signals

if TYPE_CHECKING:
    from concurrent.futures import Future

    from ghsync_dagster.cdc.stream.consume import ConsumerReport
    from ghsync_dagster.defs.resources import ChangesResource
    from ghsync_dagster.settings import Settings

_END_SECONDS: Final = 120.0
"""How long the consumer may take to end, in addition to its session time-out, which a running command may use up. It
waits for answers of the store and the brokers, each for a limited time."""
_ENDING_STATUSES: Final = (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED, dg.DagsterRunStatus.FAILURE)

log = get_logger("slice")


def consume(
    context: dg.OpExecutionContext,
    changes: ChangesResource,
    *,
    until_end: bool = False,
    seconds: float | None = None,
) -> ConsumerReport:
    """Consume changes in this run until the end; observe ``users_changes`` meanwhile.

    On SIGTERM, Ctrl-C or the run's termination the running batch is finished and committed, and the consumer leaves the
    group.

    Args:
        context: The run's.
        changes: The topic and the store.
        until_end: Whether to end once all records that the topic held at the start are applied.
        seconds: The longest time to consume.

    Raises:
        GhsyncError: As ``ChangeConsumer.run`` does.
        DagsterExecutionInterruptedError: The run was terminated; it is stopped cleanly.
    """
    stop = threading.Event()
    with (
        _Observer(context, changes) as observer,
        killed_when_frozen(),
        stop_on_signals(stop),
        ThreadPoolExecutor(1, thread_name_prefix="cdc") as pool,
    ):
        consumer = changes.consumer(observer.listener)
        ending = _END_SECONDS + changes.settings().cdc_session_timeout_seconds
        # At the end of its time it stops by itself, unless it hangs.
        latest = time.monotonic() + ending + (math.inf if seconds is None else seconds)
        future = pool.submit(consumer.run, stop, until_end=until_end, seconds=seconds)
        try:
            observer.watch(future, stop, latest)
        finally:
            stopped = stop.is_set()
            stop.set()
            _await_end(future, max(min(ending, latest - time.monotonic()), 0))
            # The process ends soon. A collection over all of Dagster's objects would slow the next slice down.
            gc.freeze()
            observer.observe()
    report = future.result()
    if stopped and _is_ending(context):
        raise dg.DagsterExecutionInterruptedError
    if stopped:
        context.log.info("stopped by a signal; the batch at work was finished and committed")
    return report


def _await_end(future: Future[ConsumerReport], seconds: float) -> None:
    """Wait until the consumer has ended. If it does not end, exit the process, which would otherwise never end."""
    if not wait([future], timeout=seconds).done:
        log.error("consumer does not end; ending its process")
        os._exit(os.EX_SOFTWARE)


class _Observer:
    """Observes the consumer of one run."""

    def __init__(self, context: dg.OpExecutionContext, changes: ChangesResource) -> None:
        self._context = context
        self._settings = changes.settings()
        self._probe = changes.connector()
        self._kafka = changes.kafka()
        self._metrics = ChangeMetrics()
        self._endpoint = _Endpoint(self._metrics, self._settings)
        self._last = time.monotonic()
        self.listener = self._metrics

    def __enter__(self) -> _Observer:
        return self

    def __exit__(self, *_: object) -> None:
        self._endpoint.close()

    def watch(self, future: Future[ConsumerReport], stop: threading.Event, latest: float) -> None:
        """Observe until the consumer has ended or is stopped, or until ``latest``.

        If Dagster is ending the run, or has marked it ended, the consumer is stopped.
        """
        self.observe()
        while not stop.is_set() and (left := latest - time.monotonic()) > 0:
            if wait([future], timeout=min(left, self._settings.cdc_report_seconds)).done:
                return
            self._endpoint.open()
            watch_connector(self._probe, self._metrics.connector)
            if self._metrics.silence < SILENT_SECONDS:
                self.observe()
            else:
                log.warning("consumer silent", seconds=round(self._metrics.silence, 1))
            if _is_ending(self._context):
                stop.set()

    def observe(self) -> None:
        """Log the present metrics as an observation; the consumer goes on if Dagster's storage is unavailable."""
        now = time.monotonic()
        found = self._metrics.snapshot(now - self._last)
        observation = dg.AssetObservation(USERS_CHANGES, metadata=metadata.of_observation(found, self._kafka))
        try:
            self._context.log_event(observation)
        except SQLAlchemyError as error:
            log.warning("observation not recorded", error=type(error).__name__)
        else:
            self._last = now


class _Endpoint:
    """The metrics endpoint, if a port is set. It opens once the run before has freed the port."""

    def __init__(self, metrics: ChangeMetrics, settings: Settings) -> None:
        self._metrics = metrics
        self._settings = settings
        self._server: MetricsEndpoint | None = None
        self.open()

    def open(self) -> None:
        """Start serving, unless it serves already or the port is in use."""
        port = self._settings.metrics_port
        if port is None or self._server is not None:
            return
        try:
            self._server = MetricsEndpoint(self._metrics, host=self._settings.metrics_host, port=port)
        except ConfigError as error:
            log.info("no metrics endpoint yet", reason=error.message)

    def close(self) -> None:
        """Stop serving."""
        if self._server is not None:
            self._server.close()


def _is_ending(context: dg.OpExecutionContext) -> bool:
    """Return whether Dagster is ending this run, or has marked it ended."""
    try:
        run = context.instance.get_run_by_id(context.run_id)
    except SQLAlchemyError as error:
        log.warning("run state unknown", error=type(error).__name__)
        return False
    return run is None or run.status in _ENDING_STATUSES
