"""Metrics of the change consumer: counts, latency percentiles, lag, and the Prometheus endpoint.

Belongs here: the listener that measures (`ChangeMetrics`), its snapshot, and the Prometheus format. Not here: what is
applied, or which value is too high.

Values that only grow are counters of the Prometheus client. For values that may be unknown, a collector yields gauges
at each scrape, and omits unknown ones.

Latency is measured per record, from the database's commit and from Kafka's timestamp to the store's acknowledgement of
the batch. A ``Counter`` per second gathers it and is later added to the total, so a record costs a fraction of a
microsecond. The total keeps the 11 leading bits of a latency: exact below 2.048 s, to 0.1 % above. Percentiles and
histograms are computed from these counts, since the client's own histogram takes one record at a time.
"""

from __future__ import annotations

import socket
import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from ghsync_dagster.cdc.stream import listener
from ghsync_dagster.domain.connector import UNKNOWN
from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster.logging import get_logger

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

    import prometheus_client
    from prometheus_client.metrics_core import Metric
    from prometheus_client.samples import Sample

    from ghsync_dagster.cdc.health.connector import ConnectorReport
    from ghsync_dagster.cdc.stream.listener import AppliedBatch

WINDOW_SECONDS: Final = 60.0
"""The window of the percentiles that Prometheus sees, and of the rate."""
LONGEST_WINDOW_SECONDS: Final = 300.0
SILENT_SECONDS: Final = 60.0
"""How long a healthy consumer may report nothing: one check of its servers may wait 10 s for each of some answers."""
_SLOT_SECONDS: Final = 1.0

BUCKETS_MS: Final = (5, 10, 25, 50, 75, 100, 150, 250, 500, 750, 1_000, 2_500, 5_000, 10_000, 30_000, 60_000, 300_000)
"""Upper bounds of the Prometheus histograms, in ms."""
_PERCENTS: Final = (50, 95, 99)
_BITS: Final = 11
_MS: Final = 1_000
_COARSE_GRAIN_MS: Final = 1_000

_SERVERS: Final = {listener.KAFKA: "Kafka", listener.MONGO: "MongoDB"}
_CONNECTOR_STATES: Final = ("RUNNING", "FAILED", "PAUSED", "STOPPED", "UNASSIGNED", "RESTARTING", "NONE")

COMMIT: Final = "commit"
KAFKA: Final = "kafka"

log = get_logger("metrics")


@dataclass(frozen=True, slots=True)
class Percentiles:
    """A distribution of latencies, in ms; all 0 where nothing was recorded.

    Attributes:
        count: Records in it.
        p50: The median.
        p95: The 95th percentile.
        p99: The 99th percentile.
        max: The slowest.
    """

    count: int = 0
    p50: int = 0
    p95: int = 0
    p99: int = 0
    max: int = 0


@dataclass(frozen=True, slots=True)
class Latency:
    """Latency up to the store's acknowledgement.

    Attributes:
        window: In the requested window.
        total: Since the start.
        negative: Records whose time was in the future, as clocks differ; they count as 0 ms.
        grain_ms: 1000 if all times came in whole seconds, as from some servers, else 1. With 1000 a latency is up to a
            second too high.
    """

    window: Percentiles
    total: Percentiles
    negative: int
    grain_ms: int


@dataclass(frozen=True, slots=True)
class PartitionLag:
    """The lag of one partition.

    Attributes:
        records: How many records wait.
        seconds: Time since the oldest of them was appended.
    """

    records: int
    seconds: float


@dataclass(frozen=True, slots=True)
class MetricsSnapshot:
    """All metrics at one moment; ``as_dict`` returns them for JSON.

    Attributes:
        seconds: Since the start.
        window_seconds: The window of the percentiles and the rate: as requested, or shorter at the start.
        records: All records so far, of any outcome.
        records_a_minute: In the window.
        counts: Records by kind and outcome: ``{"c": {"applied": 3}}``.
        outcomes: Records by outcome.
        batches: So far.
        write_seconds: Spent in writes so far.
        commit: Latency from the database's commit.
        kafka: Latency from Kafka's timestamp.
        lag: By partition of this consumer; None where it is not known: just assigned, or Kafka does not answer.
        lag_records: Of all partitions; None if one is not known, or there is none.
        lag_seconds: Of the partition with the highest lag; None as above.
        retries: Retried steps, by the error's class.
        errors: Errors that ended the loop, by class.
        dead_letters: By kind.
        repaired: Users that were repaired, by outcome.
        broken_rules: Applied records that break a rule, by rule.
        unknown_columns: Records with an unknown column, by column.
        connections: Whether each server answers.
        disconnections: How often each server stopped answering.
        seconds_since_write: Since the last acknowledged batch; None where there was none.
        connector: The connector's state; None where it is not known.
        connector_event_age: Seconds since the database wrote the last event that the connector has handled; None where
            it is not known.
        connector_fault: Why the connector sends no new changes, in words; None where it runs or is not known.
    """

    seconds: float
    window_seconds: float
    records: int
    records_a_minute: float
    counts: dict[str, dict[str, int]]
    outcomes: dict[str, int]
    batches: int
    write_seconds: float
    commit: Latency
    kafka: Latency
    lag: dict[int, PartitionLag | None]
    lag_records: int | None
    lag_seconds: float | None
    retries: dict[str, int]
    errors: dict[str, int]
    dead_letters: dict[str, int]
    repaired: dict[str, int]
    broken_rules: dict[str, int]
    unknown_columns: dict[str, int]
    connections: dict[str, bool]
    disconnections: dict[str, int]
    seconds_since_write: float | None
    connector: str | None = None
    connector_event_age: float | None = None
    connector_fault: str | None = None

    @property
    def away(self) -> str | None:
        """Which server does not answer, in words; None where all do."""
        away = (name for server, name in _SERVERS.items() if self.connections.get(server) is False)
        return next((f"{name} does not answer" for name in away), None)

    @property
    def held_up(self) -> str | None:
        """Why nothing can be consumed now, in words; None where no reason is known."""
        if away := self.away:
            return away
        if not self.lag:
            return "this consumer has no partition"
        # Without the connector, records that the topic still holds are consumed all the same.
        return None if self.records_a_minute or self.lag_records else self.connector_fault

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values, for JSON."""
        return asdict(self)


@dataclass(slots=True)
class _Slot:
    """The records of one second, and how often each latency in ms occurred."""

    began: float
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    commit: Counter[int] = field(default_factory=Counter)
    kafka: Counter[int] = field(default_factory=Counter)


def percentiles(latencies: Mapping[int, int], slowest: int = 0) -> Percentiles:
    """Return the distribution of latencies.

    Args:
        latencies: How many records took so many ms.
        slowest: The exact maximum in ms, if ``latencies`` are rounded.
    """
    if not latencies:
        return Percentiles()
    ordered = sorted(latencies)
    up_to = list(accumulate(latencies[latency] for latency in ordered))
    ranks = (max((up_to[-1] * percent + 50) // 100, 1) for percent in _PERCENTS)
    p50, p95, p99 = (ordered[bisect_left(up_to, rank)] for rank in ranks)
    return Percentiles(up_to[-1], p50, p95, p99, max(slowest, ordered[-1]))


class _LatencyTotals:
    """The latencies from one kind of timestamp since the start, in bounded memory."""

    def __init__(self) -> None:
        self.latencies: Counter[int] = Counter()
        self.negative = 0
        self.slowest = 0
        self.whole_seconds = True

    def observe(self, times: Iterable[int | None], until_ms: int, into: Counter[int]) -> None:
        """Count the latencies of one batch into a slot."""
        moments = [at for at in times if at is not None]
        if not moments:
            return
        self.whole_seconds = self.whole_seconds and not any(at % _COARSE_GRAIN_MS for at in moments)
        latencies = [until_ms - at for at in moments]
        fastest, slowest = min(latencies), max(latencies)
        if fastest < 0:
            self.negative += sum(latency < 0 for latency in latencies)
            latencies = [max(latency, 0) for latency in latencies]
        self.slowest = max(self.slowest, slowest)
        # If even the fastest has more bits than are kept, rounding here keeps the slot small.
        drop = max(fastest.bit_length() - _BITS, 0)
        into.update([latency >> drop << drop for latency in latencies] if drop else latencies)

    def add(self, latencies: Mapping[int, int]) -> None:
        """Add a finished slot's latencies to those since the start."""
        for latency, count in latencies.items():
            drop = max(latency.bit_length() - _BITS, 0)
            self.latencies[latency >> drop << drop] += count

    def latency(self, window: Mapping[int, int]) -> Latency:
        """Return the latency; ``window`` holds the latencies of the window."""
        return Latency(
            window=percentiles(window),
            total=percentiles(self.latencies, self.slowest),
            negative=self.negative,
            grain_ms=_COARSE_GRAIN_MS if self.latencies and self.whole_seconds else 1,
        )


class ChangeMetrics(listener.ChangeListener):
    """The ``ChangeListener`` that measures. All methods may be called from any thread.

    Args:
        clock: Seconds of a clock that never goes back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        import prometheus_client

        # The timestamp of its creation, as a series for each counter, is of no use here.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = prometheus_client.CollectorRegistry(auto_describe=False)
        # It is the first collector in a scrape, as it adds the open slot to the counters.
        self.registry.register(PrometheusView(self))

        def counter(name: str, words: str, *labels: str) -> prometheus_client.Counter:
            return prometheus_client.Counter(f"ghsync_cdc_{name}", words, labels, registry=self.registry)

        self._records = counter("records", "Change records, by kind and outcome.", "what", "outcome")
        self._batches = counter("batches", "Batches written and acknowledged.")
        self._write_seconds = counter("write_seconds", "Seconds spent in writes.")
        self._retries = counter("retries", "Retried steps after a transient fault, by the error's class.", "error")
        self._errors = counter("errors", "Errors that ended the loop, by class.", "error")
        self._dead_letters = counter("dead_letters", "Records that went to the dead letters, by kind.", "kind")
        self._repaired = counter("repaired_users", "Users that were repaired from MySQL, by outcome.", "outcome")
        self._broken_rules = counter("broken_rules", "Applied records that break a business rule.", "rule")
        self._unknown_columns = counter("unknown_columns", "Records with an unknown column.", "column")
        self._disconnections = counter("disconnections", "How often a server stopped answering.", "server")
        prometheus_client.ProcessCollector(registry=self.registry)
        self._clock = clock
        self._lock = threading.Lock()
        self._started = clock()
        self._last_write: float | None = None
        self._last_report = self._started
        self._commit = _LatencyTotals()
        self._kafka = _LatencyTotals()
        self._slots: deque[_Slot] = deque()
        self._slot = _Slot(self._started)
        self._lag: dict[int, PartitionLag | None] = {}
        self._connections: dict[str, bool] = {}
        self._connector: ConnectorReport | None = None

    # Reports of the consumer

    def batch_applied(self, batch: AppliedBatch) -> None:
        """Count a batch and its latencies."""
        with self._lock:
            now = self._clock()
            if now - self._slot.began >= _SLOT_SECONDS:
                self._finish_slot(now)
            self._slot.counts.update(batch.counts)
            self._commit.observe(batch.committed_ms, batch.acknowledged_ms, self._slot.commit)
            self._kafka.observe(batch.appended_ms, batch.acknowledged_ms, self._slot.kafka)
            self._batches.inc()
            self._write_seconds.inc(batch.write_seconds)
            self._last_write = now
            for rule, count in batch.broken_rules.items():
                self._broken_rules.labels(rule).inc(count)
            for column, count in batch.unknown_columns.items():
                self._unknown_columns.labels(column).inc(count)

    def lag(self, partition: int, records: int, seconds: float) -> None:
        """Record the lag of a partition."""
        with self._lock:
            self._lag[partition] = PartitionLag(records, seconds)

    def assigned(self, partitions: Collection[int]) -> None:
        """Drop the lag of revoked partitions; that of a new one is not known until it is reported."""
        with self._lock:
            self._last_report = self._clock()
            self._lag = {number: self._lag.get(number) for number in sorted(partitions)}

    def retried(self, kind: str) -> None:
        """Count a retried step."""
        self._retries.labels(kind).inc()

    def failed(self, kind: str) -> None:
        """Count an error that ended the loop."""
        self._errors.labels(kind).inc()

    def dead_letter(self, kind: str, count: int = 1) -> None:
        """Count dead letters."""
        self._dead_letters.labels(kind).inc(count)

    def repaired(self, outcome: str, count: int = 1) -> None:
        """Count repaired users."""
        self._repaired.labels(outcome).inc(count)

    def connection(self, name: str, *, up: bool) -> None:
        """Record whether a server answers; without Kafka the lag is not known."""
        with self._lock:
            self._last_report = self._clock()
            if name == listener.KAFKA and not up:
                self._lag = dict.fromkeys(self._lag)
            if self._connections.get(name, True) and not up:
                self._disconnections.labels(name).inc()
            self._connections[name] = up

    def connector(self, report: ConnectorReport) -> None:
        """Record the connector's report."""
        self.connection(listener.CONNECT, up=report.state.state != UNKNOWN)
        with self._lock:
            self._connector = report

    # Reading the metrics

    def snapshot(self, window_seconds: float = WINDOW_SECONDS) -> MetricsSnapshot:
        """Return all metrics now.

        Args:
            window_seconds: The window of the percentiles and the rate, to a second; at most 300.
        """
        with self._lock:
            now = self._clock()
            self._finish_slot(now)
            window = min(window_seconds, LONGEST_WINDOW_SECONDS, now - self._started)
            recent = [slot for slot in self._slots if slot.began >= now - window - _SLOT_SECONDS / 2]
            covered = max(window, now - recent[0].began if recent else 0.0)
            in_window = sum(slot.counts.total() for slot in recent)
            lag = self._total_lag()
            counts = _by_labels(self._records)
            outcomes: Counter[str] = Counter()
            for by_outcome in counts.values():
                outcomes.update(by_outcome)
            return MetricsSnapshot(
                seconds=round(now - self._started, 3),
                window_seconds=round(covered, 3),
                records=outcomes.total(),
                records_a_minute=round(60 * in_window / covered, 1) if covered else 0.0,
                counts=counts,
                outcomes=dict(outcomes),
                batches=int(_samples(self._batches)[0].value),
                write_seconds=round(_samples(self._write_seconds)[0].value, 3),
                commit=self._commit.latency(sum((slot.commit for slot in recent), Counter())),
                kafka=self._kafka.latency(sum((slot.kafka for slot in recent), Counter())),
                lag=dict(self._lag),
                lag_records=lag.records if lag else None,
                lag_seconds=lag.seconds if lag else None,
                retries=_by_label(self._retries),
                errors=_by_label(self._errors),
                dead_letters=_by_label(self._dead_letters),
                repaired=_by_label(self._repaired),
                broken_rules=_by_label(self._broken_rules),
                unknown_columns=_by_label(self._unknown_columns),
                connections=dict(self._connections),
                disconnections=_by_label(self._disconnections),
                seconds_since_write=None if self._last_write is None else round(now - self._last_write, 3),
                **self._of_connector(),
            )

    @property
    def silence(self) -> float:
        """Seconds since the consumer last reported its servers or its assignment, as it does every second."""
        with self._lock:
            return self._clock() - self._last_report

    def fault(self) -> str | None:
        """Return why the consumer is not healthy, in words; None where it is, be it without a partition."""
        if (silence := self.silence) >= SILENT_SECONDS:
            return f"the consumer has not reported for {silence:.0f} s"
        return self.snapshot(WINDOW_SECONDS).away

    def _of_connector(self) -> dict[str, Any]:
        if (report := self._connector) is None:
            return {}
        at = report.event_at
        return {
            "connector": None if report.state.state == UNKNOWN else report.state.state,
            "connector_event_age": None if at is None else round(max(time.time() - at, 0.0), 3),
            "connector_fault": report.state.words() if report.state.is_stopped else None,
        }

    def _total_lag(self) -> PartitionLag | None:
        """Return the lag of all partitions; None if one is not known, or there is none."""
        known = [lag for lag in self._lag.values() if lag is not None]
        if not known or len(known) < len(self._lag):
            return None
        return PartitionLag(sum(lag.records for lag in known), max(lag.seconds for lag in known))

    def _finish_slot(self, now: float) -> None:
        """Add the open slot to the totals and open another; drop slots that no window reaches."""
        if self._slot.counts:
            for (what, outcome), count in self._slot.counts.items():
                self._records.labels(what, outcome).inc(count)
            self._commit.add(self._slot.commit)
            self._kafka.add(self._slot.kafka)
            self._slots.append(self._slot)
        self._slot = _Slot(now)
        while self._slots and self._slots[0].began < now - LONGEST_WINDOW_SECONDS - _SLOT_SECONDS:
            self._slots.popleft()

    def latencies(self, since: str) -> dict[int, int]:
        """Return how many records took so many ms since the start, from ``COMMIT`` or ``KAFKA``."""
        with self._lock:
            self._finish_slot(self._clock())
            return dict((self._commit if since == COMMIT else self._kafka).latencies)


def _samples(counter: prometheus_client.Counter) -> Sequence[Sample]:
    [family] = counter.collect()
    return family.samples


def _by_label(counter: prometheus_client.Counter) -> dict[str, int]:
    return {value: int(sample.value) for sample in _samples(counter) for value in sample.labels.values()}


def _by_labels(counter: prometheus_client.Counter) -> dict[str, dict[str, int]]:
    """Return the values of a counter with two labels, in order."""
    found: dict[str, dict[str, int]] = {}
    for (first, second), count in sorted((tuple(one.labels.values()), int(one.value)) for one in _samples(counter)):
        found.setdefault(first, {})[second] = count
    return found


class PrometheusView:
    """A collector that yields the values of one ``ChangeMetrics`` at a scrape."""

    def __init__(self, metrics: ChangeMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Yield the values that are known."""
        now = self._metrics.snapshot(WINDOW_SECONDS)
        yield from _gauges(now)
        yield from self._latencies(now)

    def _latencies(self, now: MetricsSnapshot) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily

        negative = CounterMetricFamily(
            "ghsync_cdc_negative_latencies", "Records whose time was in the future: clocks differ.", labels=["since"]
        )
        recent = {}
        for since, words, latency in (
            (COMMIT, "the database's commit", now.commit),
            (KAFKA, "Kafka's timestamp", now.kafka),
        ):
            yield _histogram(
                f"{since}_to_write_seconds",
                f"Seconds from {words} to the store's acknowledgement.",
                self._metrics.latencies(since),
            )
            negative.add_metric([since], latency.negative)
            window = latency.window
            for quantile, value in (("0.5", window.p50), ("0.95", window.p95), ("0.99", window.p99), ("1", window.max)):
                recent[since, quantile] = value / _MS
        yield negative
        yield _gauge(
            "recent_latency_seconds",
            f"Percentiles of the last {WINDOW_SECONDS:.0f} s, up to the store's acknowledgement.",
            recent,
            "since",
            "quantile",
        )


def _histogram(name: str, words: str, latencies: Mapping[int, int]) -> Metric:
    from prometheus_client.core import HistogramMetricFamily

    counts: Counter[int] = Counter()
    for latency, count in latencies.items():
        counts[bisect_left(BUCKETS_MS, latency)] += count
    bounds = [*(str(bound / _MS) for bound in BUCKETS_MS), "+Inf"]
    up_to = accumulate(counts[bucket] for bucket in range(len(bounds)))
    return HistogramMetricFamily(
        f"ghsync_cdc_{name}",
        words,
        buckets=list(zip(bounds, up_to, strict=True)),
        sum_value=sum(latency * count for latency, count in latencies.items()) / _MS,
    )


def _gauge(name: str, words: str, values: Mapping[Any, float], *labels: str) -> Metric:
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(f"ghsync_cdc_{name}", words, labels=labels)
    for label, value in values.items():
        family.add_metric(label, value)
    return family


def _gauges(now: MetricsSnapshot) -> Iterator[Metric]:
    known = {(str(partition),): lag for partition, lag in now.lag.items() if lag is not None}
    records = {partition: lag.records for partition, lag in known.items()}
    seconds = {partition: lag.seconds for partition, lag in known.items()}
    up = {(server,): float(answers) for server, answers in now.connections.items()}
    yield _gauge("lag_records", "Records that wait in a partition.", records, "partition")
    yield _gauge("lag_seconds", "Seconds since the oldest waiting record was appended.", seconds, "partition")
    yield _gauge("assigned_partitions", "Partitions of this consumer.", {(): len(now.lag)})
    yield _gauge("connection_up", "1 where a server answers, 0 where not.", up, "server")
    yield _gauge("records_per_minute", f"Over the last {WINDOW_SECONDS:.0f} s.", {(): now.records_a_minute})
    if now.connector is not None:
        states = {(state,): float(state == now.connector) for state in (*_CONNECTOR_STATES, now.connector)}
        yield _gauge("connector_state", "1 for the state that the connector is in.", states, "state")
    for name, words, age in (
        (
            "connector_last_event_age_seconds",
            "Since the database wrote the last event that the connector has handled.",
            now.connector_event_age,
        ),
        ("seconds_since_write", "Since the last acknowledged batch.", now.seconds_since_write),
    ):
        if age is not None:
            yield _gauge(name, words, {(): age})


class _Server(ThreadingMixIn, WSGIServer):
    """Answers each request in a thread of its own."""

    daemon_threads = True


class _ServerV6(_Server):
    """The same on an IPv6 address."""

    address_family = socket.AF_INET6


class _QuietHandler(WSGIRequestHandler):
    """Logs no request."""

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def _server_class(host: str) -> type[_Server]:
    return _ServerV6 if ":" in host else _Server


class MetricsEndpoint:
    """The Prometheus endpoint ``http://host:port/metrics`` of one ``ChangeMetrics``, from a registry of its own.

    ``/healthz`` next to it answers 200 while the consumer is healthy, and 503 with the reason else.
    It has no authentication: bind it to loopback, or to a network that only the scraper reaches. Use as a context
    manager, or call ``close``.

    Args:
        metrics: Its values are exposed, with the process's CPU and memory.
        host: Address to bind to.
        port: Port to bind to; 0 takes a free one.

    Raises:
        ConfigError: The address can't be bound.
    """

    def __init__(self, metrics: ChangeMetrics, *, host: str = "127.0.0.1", port: int = 0) -> None:
        from prometheus_client import make_wsgi_app

        serve_metrics: Callable[[WSGIEnvironment, StartResponse], Iterable[bytes]] = make_wsgi_app(metrics.registry)

        def serve(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            if environ["PATH_INFO"] != "/healthz":
                return serve_metrics(environ, start_response)
            fault = metrics.fault()
            start_response("503 Service Unavailable" if fault else "200 OK", [("Content-Type", "text/plain")])
            return [f"{fault or 'healthy'}\n".encode()]

        try:
            self._server = make_server(host, port, serve, _server_class(host), _QuietHandler)
        except OSError as error:
            raise ConfigError(
                f"The metrics endpoint can't listen on {host}:{port} ({error.strerror or error}).",
                way_out="Set GHSYNC_METRICS_PORT to a free port, or to 0; GHSYNC_METRICS_HOST to an own address.",
            ) from None
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()
        self.port = int(self._server.server_address[1])
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}/metrics"
        log.info("metrics endpoint", url=self.url)

    def __enter__(self) -> MetricsEndpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
