"""The rehearsal behind ``make cdc``: the whole change path on local servers, under a workload, judged by the audit.

Belongs here: what runs at the same time, for how long, and that all of it ends. Not here: how any part works, or how
the outcome is shown.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ghsync_dagster.cdc.health.metrics import ChangeMetrics, Percentiles, percentiles
from ghsync_dagster.cdc.stream.listener import APPLIED, COALESCED, Listeners, SilentListener
from ghsync_dagster.dev.workload import KEY_CHANGE, Workload
from ghsync_dagster.domain.change import RecordKind
from ghsync_dagster.domain.errors import ConfigError, PermanentError, UnavailableError
from ghsync_dagster.local import stack
from ghsync_dagster.progress import repeating
from ghsync_dagster.settings import load_settings
from ghsync_dagster.stopping import uninterrupted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from ghsync_dagster.cdc.health.audit import AuditResult
    from ghsync_dagster.cdc.stream.consume import ConsumerReport
    from ghsync_dagster.cdc.stream.listener import AppliedBatch
    from ghsync_dagster.dev.workload import RowChange, WorkloadReport
    from ghsync_dagster.local.supervisor import ServiceStatus
    from ghsync_dagster.settings import Settings
    from ghsync_dagster.stores.kafka.client import KafkaSettings

_PROGRESS_SECONDS: Final = 1.0
_CATCH_UP_SECONDS: Final = 120.0
_JOIN_SECONDS: Final = 30.0
_END_SECONDS: Final = 60.0
_ROW_CHANGES: Final = frozenset({RecordKind.CREATE, RecordKind.UPDATE, RecordKind.DELETE})


@dataclass(frozen=True, slots=True)
class Limit:
    """One requirement of a rehearsal.

    Attributes:
        name: What it is about.
        words: What was found, and what is wanted.
        is_met: Whether the two agree.
        decides: Whether the rehearsal fails if they do not.
    """

    name: str
    words: str
    is_met: bool
    decides: bool = True


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """The outcome of a rehearsal.

    Attributes:
        workload: What was done to the table.
        latency: From the database's commit to the stored document, in ms, by this machine's clock.
        consumer: What the consumer did.
        audit: Whether collection and table are equal.
        load_exit: The exit code of the file load that ran meanwhile; None if none ran.
        seconds: From the first change to the end of the audit.
        max_latency_ms: The highest p99 that meets the limit.
    """

    workload: WorkloadReport
    latency: Percentiles
    consumer: ConsumerReport
    audit: AuditResult
    load_exit: int | None
    seconds: float
    max_latency_ms: float

    @property
    def ok(self) -> bool:
        """Whether every limit that decides is met."""
        return all(limit.is_met for limit in self.limits if limit.decides)

    @property
    def limits(self) -> list[Limit]:
        """The requirements, and whether each is met."""
        letters, p99 = sum(self.consumer.dead_letters.values()), self.latency.p99
        limits = [
            Limit("audit", f"{'equal' if self.audit.equal else 'not equal'}, equal wanted", self.audit.equal),
            Limit("dead letters", f"{letters:,}, none wanted", not letters),
        ]
        if self.load_exit is not None:
            limits.append(Limit("load", f"exit code {self.load_exit}, 0 wanted", not self.load_exit))
        # Latency also depends on what else uses the cores of this machine, so it does not decide.
        latency = f"p99 {p99} ms, at most {self.max_latency_ms:,.0f} wanted (GHSYNC_MAX_LATENCY_MS)"
        return [*limits, Limit("latency", latency, p99 <= self.max_latency_ms, decides=False)]


class CommitClock(SilentListener):
    """Measures from commit to stored document, without a server's clock.

    One connection commits, and one partition keeps the order. So the n-th committed record is acknowledged as the n-th.

    Args:
        on_latency: Called with each measurement: the commit time in ms since 1970 UTC, the latency in ms, and the
            number of records. Must return quickly.
    """

    def __init__(self, on_latency: Callable[[int, int, int], None] | None = None) -> None:
        self._on_latency = on_latency
        self._lock = threading.Lock()
        self._committed: deque[tuple[int, int]] = deque()
        self._acknowledged: deque[tuple[int, int]] = deque()
        self._latencies: dict[int, int] = {}

    def begin(self) -> None:
        """Discard earlier acknowledgements: their commits were not measured."""
        with self._lock:
            self._acknowledged.clear()

    def committed(self, changes: Sequence[RowChange], at_ms: int) -> None:
        """Record a transaction by its number of records: a key change makes two."""
        with self._lock:
            self._committed.append((sum(2 if change.kind == KEY_CHANGE else 1 for change in changes), at_ms))
            self._match()

    def batch_applied(self, batch: AppliedBatch) -> None:
        """Record the row changes of a batch."""
        records = sum(
            count
            for (kind, outcome), count in batch.counts.items()
            if kind in _ROW_CHANGES and outcome in (APPLIED, COALESCED)
        )
        with self._lock:
            self._acknowledged.append((records, batch.acknowledged_ms))
            self._match()

    def _match(self) -> None:
        while self._committed and self._acknowledged:
            (committed, began), (acknowledged, ended) = self._committed[0], self._acknowledged[0]
            both = min(committed, acknowledged)
            if both:
                latency = max(ended - began, 0)
                self._latencies[latency] = self._latencies.get(latency, 0) + both
                if self._on_latency is not None:
                    self._on_latency(began, latency, both)
            for queue, count, at in (
                (self._committed, committed, began),
                (self._acknowledged, acknowledged, ended),
            ):
                queue.popleft()
                if count > both:
                    queue.appendleft((count - both, at))

    @property
    def waiting(self) -> int:
        """Records that were committed and not yet acknowledged."""
        with self._lock:
            return sum(count for count, _ in self._committed)

    def latency(self) -> Percentiles:
        """Return the distribution so far."""
        with self._lock:
            return percentiles(self._latencies)


def rehearse(
    settings: Settings, *, rate: float, seconds: float, load: Sequence[str] | None, progress: Callable[[str], None]
) -> Rehearsal:
    """Start the local servers, change the table, consume, load files at the same time, and audit.

    Servers that already ran stay up; the others are stopped at the end.

    Args:
        settings: ``home_dir`` is where the local servers keep their state.
        rate: Changes a second.
        seconds: How long the table is changed.
        load: Events that are loaded meanwhile: files, folders or globs.
        progress: Gets a line of text now and then.

    Raises:
        UnavailableError: A server did not start or went away, or the consumer did not catch up.
        PermanentError: A server can't run here, or refuses.
        ConfigError: A setting names a server that is not local: a rehearsal leaves rows and documents there.
    """
    _assert_local(settings)
    from ghsync_dagster.cdc.health.audit import Patience, audit
    from ghsync_dagster.wiring import existing_kafka, open_mysql, store_opener

    with ExitStack() as around:
        own = around.enter_context(_stack(settings, progress))
        clock, metrics = CommitClock(), ChangeMetrics()
        kafka = existing_kafka(own)
        consumer = around.enter_context(_Consuming(own, kafka, Listeners(metrics, clock)))
        _await_partitions(metrics, kafka, consumer)
        _await(lambda: _is_caught_up(metrics, kafka), consumer, "the changes from before the rehearsal")
        mysql = around.enter_context(open_mysql(own))
        mysql.ensure_table()
        loading = around.enter_context(_loading(own, load)) if load else None
        clock.begin()
        workload = Workload(mysql, rate=rate, seed=time.time_ns() % 2**31, on_commit=clock.committed)
        began = time.monotonic()
        stop = around.enter_context(repeating(lambda: progress(_line(workload, metrics, clock)), _PROGRESS_SECONDS))
        report = workload.run(seconds=seconds, stop=consumer.failed)
        progress(f"workload done: {report.total:,} changes; waiting for the consumer")

        def applied() -> bool:
            return clock.waiting == 0 and _is_caught_up(metrics, kafka)

        if loading:
            # The load slows the consumer down, so its seconds do not count against the consumer.
            _wait_for(lambda: loading.poll() is not None or applied(), consumer, math.inf)
        _await(applied, consumer, "the workload's changes")
        stop.set()
        if loading and loading.poll() is None:
            progress("all changes are applied; waiting for the file load")
        load_exit = loading.wait() if loading else None
        progress("comparing MySQL with MongoDB")
        with store_opener(own)() as store:
            audited = audit(mysql, store, patience=Patience(seconds=30))
        return Rehearsal(
            workload=report,
            latency=clock.latency(),
            consumer=consumer.end(),
            audit=audited,
            load_exit=load_exit,
            seconds=round(time.monotonic() - began, 1),
            max_latency_ms=settings.max_latency_ms,
        )


def leftovers(settings: Settings) -> list[Path]:
    """Return the data folders of the local servers, which hold the rows and documents of a rehearsal too."""
    return [settings.home_dir / name for name in stack.SERVICES]


def _assert_local(settings: Settings) -> None:
    named = {
        "MONGODB_URI": settings.mongodb_uri,
        "MYSQL_URL": settings.mysql_url,
        "KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
        "CONNECT_URL": settings.connect_url,
    }
    if foreign := [name for name, value in named.items() if value]:
        raise ConfigError(
            f"A rehearsal writes into the servers that it uses, and {', '.join(foreign)} names one that is not local.",
            way_out="Unset it (also in .env) for the rehearsal.",
        )


@contextmanager
def _stack(settings: Settings, progress: Callable[[str], None]) -> Iterator[Settings]:
    """Start the servers that are down, yield settings with all addresses, and stop the started servers."""
    before = stack.status(settings)
    # A process that does not answer was started by somebody else, and may still be starting.
    started = [name for name, status in before.items() if status.pid is None and status.server != "external"]
    try:
        yield addresses(settings, stack.up(settings, progress=progress))
    finally:
        if started:
            with uninterrupted():
                stack.down(settings, started, progress=progress)


def addresses(settings: Settings, servers: Mapping[str, ServiceStatus]) -> Settings:
    """Return the settings with the addresses of the running servers."""
    named = {
        "MONGODB_URI": settings.mongodb_uri or servers["mongo"].uri,
        "KAFKA_BOOTSTRAP_SERVERS": servers["kafka"].uri,
        "MYSQL_URL": settings.mysql_url or servers["mysql"].login,
        "CONNECT_URL": servers["connect"].uri,
    }
    return load_settings(GHSYNC_HOME=settings.home_dir, **named)


class _Consuming:
    """A consumer in a thread of its own."""

    def __init__(self, settings: Settings, kafka: KafkaSettings, listener: Listeners) -> None:
        from ghsync_dagster.wiring import change_consumer

        self.failed = threading.Event()
        self._stop = threading.Event()
        self._consumer = change_consumer(settings, kafka, listener)
        self._thread = threading.Thread(target=self._run, name="rehearsal-consumer", daemon=True)
        self._report: ConsumerReport | None = None
        self._error: Exception | None = None

    def __enter__(self) -> _Consuming:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(_END_SECONDS)

    def _run(self) -> None:
        try:
            self._report = self._consumer.run(self._stop)
        except Exception as error:  # noqa: BLE001  the caller's thread raises it
            self._error = error
            self.failed.set()

    def raise_failure(self) -> None:
        """Raise the error that ended the consumer, if one did."""
        if self._error is not None:
            raise self._error

    def end(self) -> ConsumerReport:
        """Stop the consumer and return what it did."""
        self.__exit__()
        self.raise_failure()
        if self._report is None:
            raise UnavailableError(
                f"The consumer did not end within {_END_SECONDS:.0f} s.", way_out="Read its log above; run again."
            )
        return self._report


@contextmanager
def _loading(settings: Settings, events: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Load files of events in a process of its own, as a user would; end it with the caller."""
    if settings.mongodb_uri is None:
        raise AssertionError("the stack's addresses are set")
    environment = {
        **os.environ,
        "GHSYNC_HOME": str(settings.home_dir),
        "MONGODB_URI": settings.mongodb_uri.get_secret_value(),
    }
    command = [sys.executable, "-m", "ghsync_dagster.cli", "batch", *events]
    try:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    except OSError as error:
        raise PermanentError(f"The load can't be started: {error}.", way_out="Run make setup again.") from None
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _line(workload: Workload, metrics: ChangeMetrics, clock: CommitClock) -> str:
    sent, latency, found = workload.report(), clock.latency(), metrics.snapshot()
    return (
        f"{sent.seconds:5.0f} s  {sent.total:>9,} changes at {sent.rate:,.0f}/s  "
        f"waiting {clock.waiting:,}, lag {'-' if found.lag_records is None else f'{found.lag_records:,}'}  "
        f"commit to document p50 {latency.p50} p95 {latency.p95} p99 {latency.p99} max {latency.max} ms"
    )


def _is_caught_up(metrics: ChangeMetrics, kafka: KafkaSettings) -> bool:
    """Return whether the consumer has partitions, and the brokers report no lag in them."""
    from ghsync_dagster.stores.kafka.backlog import read_backlog

    return bool(metrics.snapshot().lag) and read_backlog(kafka).waiting == 0


def _await_partitions(metrics: ChangeMetrics, kafka: KafkaSettings, consumer: _Consuming) -> None:
    """Wait until the consumer has partitions; those of a dead consumer are free once its session has timed out."""
    seconds = kafka.session_timeout_seconds + _JOIN_SECONDS
    if not _wait_for(lambda: bool(metrics.snapshot().lag), consumer, seconds):
        raise UnavailableError(
            f"The consumer got no partition of {kafka.topic} within {seconds:.0f} s: another one of the group "
            f"{kafka.group_id} seems to be at work.",
            way_out="Stop it for the rehearsal: ghsync cdc run, or the sensor cdc_supervisor and its slices.",
        )


def _await(done: Callable[[], bool], consumer: _Consuming, what: str) -> None:
    if not _wait_for(done, consumer, _CATCH_UP_SECONDS):
        raise UnavailableError(
            f"The consumer did not apply {what} within {_CATCH_UP_SECONDS:.0f} s.",
            way_out="Look at ghsync status and at the logs that it names; see docs/operate/monitor.md.",
        )


def _wait_for(done: Callable[[], bool], consumer: _Consuming, seconds: float) -> bool:
    """Wait until ``done`` returns True, for so many seconds at most; return whether it did.

    Raises:
        Exception: The consumer failed.
    """
    deadline = time.monotonic() + seconds
    while not done():
        consumer.raise_failure()
        if time.monotonic() > deadline:
            return False
        consumer.failed.wait(0.1)
    return True
