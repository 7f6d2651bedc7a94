"""One run's consumption: the change consumer alongside a main thread that observes it and hears when to stop.

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
from ghsync_dagster.cdc.health.metrics import ChangeMetrics, MetricsEndpoint
from ghsync_dagster.cdc.stream.listener import Listeners, SilentListener
from ghsync_dagster.defs.cdc import metadata
from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster.logging import get_logger
from ghsync_dagster.stopping import killed_when_frozen, stop_on_signals

if TYPE_CHECKING:
    from collections.abc import Collection
    from concurrent.futures import Future

    from ghsync_dagster.cdc.stream.consume import ConsumerReport
    from ghsync_dagster.defs.resources import ChangesResource
    from ghsync_dagster.settings import Settings

USERS_CHANGES: Final = "users_changes"

_SILENT_SECONDS: Final = 60.0
"""How long the consumer may say nothing of itself before its run is no longer observed: one look at its servers may
wait 10 s for each of some answers."""
_END_SECONDS: Final = 120.0
"""How long the consumer may take to end, besides its session time-out, which a command at work may use up: it waits for
answers of the store and the brokers, each for a limited time."""
_TOLD_TO_END: Final = (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED, dg.DagsterRunStatus.FAILURE)

log = get_logger("slice")


class Heartbeat(SilentListener):
    """Knows when the consumer was heard last: it tells how its servers are once a second."""

    def __init__(self) -> None:
        self._heard = time.monotonic()

    def connection(self, name: str, *, up: bool) -> None:
        """Hear of a server's state."""
        del name, up
        self._heard = time.monotonic()

    def assigned(self, partitions: Collection[int]) -> None:
        """Hear of an assignment."""
        del partitions
        self._heard = time.monotonic()

    @property
    def silence(self) -> float:
        """Seconds since it was heard."""
        return time.monotonic() - self._heard


def consume(
    context: dg.OpExecutionContext,
    changes: ChangesResource,
    *,
    until_end: bool = False,
    seconds: float | None = None,
) -> ConsumerReport:
    """Consume changes in this run until the end; observe ``users_changes`` meanwhile.

    On SIGTERM, Ctrl-C or the run's termination the batch at work is finished and committed, and the group is left.

    Args:
        context: The run's.
        changes: What is consumed, and how it is stored.
        until_end: Whether to end once all is applied that the topic held at the start.
        seconds: How long to go on at most.

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
        # Nobody tells it to end when its time is over, and it may hang then too.
        latest = time.monotonic() + ending + (math.inf if seconds is None else seconds)
        future = pool.submit(consumer.run, stop, until_end=until_end, seconds=seconds)
        try:
            observer.watch(future, stop, latest)
        finally:
            told = stop.is_set()
            stop.set()
            _await_end(future, max(min(ending, latest - time.monotonic()), 0))
            # The run ends: to go through all that Dagster holds would take a core from the slice that takes over.
            gc.freeze()
            observer.observe()
    report = future.result()
    if told and _told_to_end(context):
        raise dg.DagsterExecutionInterruptedError
    if told:
        context.log.info("stopped by a signal; the batch at work was finished and committed")
    return report


def _await_end(future: Future[ConsumerReport], seconds: float) -> None:
    """Wait until the consumer has ended; one that does not takes its process along, or it would live for ever."""
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
        self._heartbeat = Heartbeat()
        self._endpoint = _Endpoint(self._metrics, self._settings)
        self._last = time.monotonic()
        self.listener = Listeners(self._metrics, self._heartbeat)

    def __enter__(self) -> _Observer:
        return self

    def __exit__(self, *_: object) -> None:
        self._endpoint.close()

    def watch(self, future: Future[ConsumerReport], stop: threading.Event, latest: float) -> None:
        """Observe until the consumer has ended or was told to, or until ``latest``, by when it should have.

        Tells it to end where Dagster holds the run for ended.
        """
        self.observe()
        while not stop.is_set() and (left := latest - time.monotonic()) > 0:
            if wait([future], timeout=min(left, self._settings.cdc_report_seconds)).done:
                return
            self._endpoint.open()
            watch_connector(self._probe, self._metrics.connector)
            if self._heartbeat.silence < _SILENT_SECONDS:
                self.observe()
            else:
                log.warning("consumer silent", seconds=round(self._heartbeat.silence, 1))
            if _told_to_end(self._context):
                stop.set()

    def observe(self) -> None:
        """Log what is known now as an observation; the consumer goes on where Dagster's storage is away."""
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
    """The metrics endpoint, if one is wanted; at a hand-over, once the run before has left the port."""

    def __init__(self, metrics: ChangeMetrics, settings: Settings) -> None:
        self._metrics = metrics
        self._settings = settings
        self._server: MetricsEndpoint | None = None
        self.open()

    def open(self) -> None:
        """Serve, unless that is done or the port is taken."""
        port = self._settings.metrics_port
        if port is None or self._server is not None:
            return
        try:
            self._server = MetricsEndpoint(self._metrics, host=self._settings.metrics_host, port=port)
        except ConfigError as error:
            log.info("no metrics endpoint yet", reason=error.message)

    def close(self) -> None:
        """Serve no more."""
        if self._server is not None:
            self._server.close()


def _told_to_end(context: dg.OpExecutionContext) -> bool:
    """Return whether Dagster is ending this run, or holds it for ended."""
    try:
        run = context.instance.get_run_by_id(context.run_id)
    except SQLAlchemyError as error:
        log.warning("run state unknown", error=type(error).__name__)
        return False
    return run is None or run.status in _TOLD_TO_END
