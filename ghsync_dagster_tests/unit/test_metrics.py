"""The consumer's metrics: counts, percentiles by window and in all, lag, and what Prometheus is served."""

from __future__ import annotations

import json
import random
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ghsync_dagster.cdc.health.connector import ConnectorReport
from ghsync_dagster.cdc.health.metrics import (
    SILENT_SECONDS,
    ChangeMetrics,
    MetricsEndpoint,
    MetricsSnapshot,
    PartitionLag,
    Percentiles,
)
from ghsync_dagster.cdc.stream.listener import (
    APPLIED,
    COALESCED,
    DEAD_LETTER,
    KAFKA,
    MONGO,
    AppliedBatch,
    ChangeListener,
    Listeners,
    SilentListener,
)
from ghsync_dagster.domain.connector import ConnectorState, Sample
from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster_tests.support.reference_pages import REFERENCE

if TYPE_CHECKING:
    from collections.abc import Iterable

ACK = 1_700_000_000_123


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """Return the time in seconds."""
        return self.now


def batch(
    commit: Iterable[int | None] = (), kafka: Iterable[int | None] = (), *, count: int = 1, at: int = ACK
) -> AppliedBatch:
    """A batch of ``count`` creations whose latencies are given, in ms; None where a record has no such time."""
    return AppliedBatch(
        counts={("c", APPLIED): count},
        acknowledged_ms=at,
        committed_ms=[None if latency is None else at - latency for latency in commit],
        appended_ms=[None if latency is None else at - latency for latency in kafka],
        write_seconds=0.25,
    )


def test_percentiles_are_those_of_every_record_and_exact_below_two_seconds() -> None:
    metrics = ChangeMetrics(Clock())
    latencies = list(range(1, 1001))
    random.Random(1).shuffle(latencies)  # noqa: S311  no secret
    for start in range(0, 1000, 100):
        metrics.batch_applied(batch(commit=latencies[start : start + 100], count=100))
    found = metrics.snapshot()
    assert found.commit.total == Percentiles(count=1000, p50=500, p95=950, p99=990, max=1000)
    assert found.commit.window == found.commit.total
    assert found.kafka.total == Percentiles()
    assert found.records == 1000


def test_long_latencies_keep_three_digits() -> None:
    metrics = ChangeMetrics(Clock())
    metrics.batch_applied(batch(commit=[600_000 + step * 1_000 for step in range(101)]))
    total = metrics.snapshot().commit.total
    assert total.p50 == pytest.approx(650_000, rel=0.002)
    assert total.p99 == pytest.approx(699_000, rel=0.002)
    assert total.max == 700_000


def test_records_without_a_time_are_counted_and_not_measured() -> None:
    metrics = ChangeMetrics(Clock())
    metrics.batch_applied(batch(commit=[None, 7, None], kafka=[None], count=3))
    found = metrics.snapshot()
    assert (found.records, found.commit.total.count, found.kafka.total.count) == (3, 1, 0)


def test_latency_before_zero_is_zero_and_counted() -> None:
    metrics = ChangeMetrics(Clock())
    metrics.batch_applied(batch(commit=[-40, -1, 0, 9], kafka=[5]))
    found = metrics.snapshot()
    assert found.commit.negative == 2
    assert found.commit.total == Percentiles(count=4, p50=0, p95=9, p99=9, max=9)
    assert found.kafka.negative == 0


def test_a_latency_of_years_is_measured() -> None:
    metrics = ChangeMetrics(Clock())
    years = 10 * 365 * 24 * 3_600_000
    metrics.batch_applied(batch(commit=[years]))
    total = metrics.snapshot().commit.total
    assert (total.count, total.max) == (1, years)
    assert total.p50 == pytest.approx(years, rel=0.001)


def test_the_total_stays_small_whatever_the_latencies() -> None:
    metrics = ChangeMetrics(Clock())
    for start in range(0, 1_000_000, 100_000):
        metrics.batch_applied(batch(commit=range(start, start + 100_000, 7)))
    metrics.snapshot()
    assert metrics.snapshot().commit.total.count == 142_860
    # 2,048 values of up to 11 bits, and 1,024 for each further bit.
    assert len(metrics.latencies("commit")) <= 2_048 + 1_024 * 9


def test_a_window_holds_what_is_young_enough_and_the_total_holds_all() -> None:
    clock = Clock()
    metrics = ChangeMetrics(clock)
    metrics.batch_applied(batch(commit=[500], count=10))
    clock.now += 30
    metrics.batch_applied(batch(commit=[20], count=5))
    clock.now += 5
    near, far = metrics.snapshot(10), metrics.snapshot(60)
    assert near.commit.window == Percentiles(count=1, p50=20, p95=20, p99=20, max=20)
    assert near.commit.total.max == far.commit.window.max == 500
    assert near.records_a_minute == pytest.approx(5 * 60 / 10)
    assert far.records_a_minute == pytest.approx(15 * 60 / 35, abs=0.05)
    clock.now += 1_000
    assert metrics.snapshot(60).commit.window == Percentiles()
    assert metrics.snapshot(60).records_a_minute == 0
    assert metrics.snapshot(60).commit.total.count == 2


def test_reading_does_not_change_what_others_read() -> None:
    clock = Clock()
    metrics = ChangeMetrics(clock)
    metrics.batch_applied(batch(commit=[5, 6], count=2))
    clock.now += 2
    first = metrics.snapshot(10)
    assert metrics.snapshot(10) == first


def test_old_slots_are_forgotten() -> None:
    clock = Clock()
    metrics = ChangeMetrics(clock)
    for _ in range(2_000):
        metrics.batch_applied(batch(commit=[5]))
        clock.now += 1
    assert len(metrics._slots) <= 303
    assert metrics.snapshot().commit.total.count == 2_000


def test_whole_second_clocks_are_told() -> None:
    coarse, fine = ChangeMetrics(Clock()), ChangeMetrics(Clock())
    coarse.batch_applied(batch(commit=[123, 1_123, 2_123]))
    fine.batch_applied(batch(commit=[123, 1_124]))
    assert coarse.snapshot().commit.grain_ms == 1_000
    assert fine.snapshot().commit.grain_ms == 1
    assert ChangeMetrics(Clock()).snapshot().commit.grain_ms == 1


def test_everything_the_loop_tells_is_in_the_snapshot_and_the_snapshot_is_json() -> None:
    clock = Clock()
    metrics = ChangeMetrics(clock)
    tell(metrics)
    clock.now += 3
    found = metrics.snapshot()
    assert found.counts == {"c": {APPLIED: 3, COALESCED: 1}, "d": {APPLIED: 2}, "u": {DEAD_LETTER: 1}}
    assert found.outcomes == {APPLIED: 5, COALESCED: 1, DEAD_LETTER: 1}
    assert (found.batches, found.write_seconds, found.seconds_since_write) == (1, 0.5, 3.0)
    assert (found.lag_records, found.lag_seconds) == (12, 4.5)
    assert found.retries == {"UnavailableError": 2}
    assert found.errors == {"RefusedError": 1}
    assert found.dead_letters == {"not-json": 3}
    assert found.broken_rules == {"login_format": 2}
    assert found.unknown_columns == {"bio": 1}
    assert found.connections == {MONGO: False, KAFKA: True}
    assert found.disconnections == {MONGO: 1, KAFKA: 1}
    assert json.loads(json.dumps(found.as_dict()))["lag"]["1"] == {"records": 2, "seconds": 0.5}


def tell(listener: ChangeListener) -> None:
    """Tell a listener one of everything."""
    listener.assigned([0, 1, 2])
    listener.batch_applied(
        AppliedBatch(
            counts={("c", APPLIED): 3, ("c", COALESCED): 1, ("d", APPLIED): 2, ("u", DEAD_LETTER): 1},
            acknowledged_ms=ACK,
            committed_ms=[ACK - 80, ACK - 4_000],
            appended_ms=[ACK - 40],
            write_seconds=0.5,
            broken_rules={"login_format": 2},
            unknown_columns={"bio": 1},
        )
    )
    listener.connection(KAFKA, up=False)
    listener.connection(KAFKA, up=True)
    listener.lag(0, 10, 4.5)
    listener.lag(1, 2, 0.5)
    listener.lag(2, 0, 0.0)
    listener.retried("UnavailableError")
    listener.retried("UnavailableError")
    listener.failed("RefusedError")
    listener.dead_letter("not-json")
    listener.dead_letter("not-json", 2)
    listener.connection(MONGO, up=True)
    listener.connection(MONGO, up=False)
    listener.connection(MONGO, up=False)


def test_partitions_that_others_have_now_are_forgotten() -> None:
    metrics = ChangeMetrics(Clock())
    metrics.assigned([0, 1])
    metrics.lag(0, 5, 1.0)
    metrics.lag(1, 6, 2.0)
    metrics.assigned([1, 2])
    assert metrics.snapshot().lag == {1: PartitionLag(6, 2.0), 2: None}
    metrics.assigned([])
    assert metrics.snapshot().lag == {}


def test_the_lag_is_told_only_where_that_of_every_partition_is_known() -> None:
    metrics = ChangeMetrics(Clock())

    def told() -> tuple[int | None, float | None]:
        found = metrics.snapshot()
        return found.lag_records, found.lag_seconds

    assert told() == (None, None), "no partition came"
    metrics.assigned([0, 1])
    metrics.lag(0, 5, 1.0)
    assert told() == (None, None), "nobody knows of the other one"
    metrics.lag(1, 6, 2.0)
    assert told() == (11, 2.0)
    metrics.connection(MONGO, up=False)
    assert told() == (11, 2.0)
    metrics.connection(KAFKA, up=False)
    assert told() == (None, None), "what comes to Kafka now is not seen"
    metrics.connection(KAFKA, up=True)
    assert told() == (None, None)
    with MetricsEndpoint(metrics) as endpoint:
        found = scrape(endpoint)
    assert found["ghsync_cdc_assigned_partitions", ()] == 2
    assert not any(name.startswith("ghsync_cdc_lag") for name, _ in found)


def test_listeners_pass_everything_on_to_each() -> None:
    one, other = ChangeMetrics(Clock()), ChangeMetrics(Clock())
    tell(Listeners(one, SilentListener(), other))
    assert one.snapshot() == other.snapshot()
    assert one.snapshot().records == 7


def test_no_record_is_lost_between_threads() -> None:
    metrics = ChangeMetrics()
    done = threading.Event()

    def read() -> None:
        # Reading without a pause would only keep the writers from the lock.
        while not done.wait(0.002):
            metrics.snapshot(1)

    def write() -> None:
        for _ in range(500):
            metrics.batch_applied(batch(commit=[1, 2, 3], kafka=[1], count=3))

    writers = [threading.Thread(target=write) for _ in range(4)]
    reader = threading.Thread(target=read)
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    found = metrics.snapshot()
    assert (found.records, found.commit.total.count, found.kafka.total.count) == (6_000, 6_000, 2_000)


def test_a_record_costs_less_than_a_microsecond() -> None:
    metrics = ChangeMetrics()
    chance = random.Random(3)  # noqa: S311  no secret
    batches = [
        batch(
            commit=[chance.randrange(20, 60) for _ in range(5_000)], kafka=[chance.randrange(20) for _ in range(5_000)]
        )
        for _ in range(20)
    ]
    began = time.process_time()
    for one in batches:
        metrics.batch_applied(one)
    # 5 % of a core at 50,000 records a second.
    assert (time.process_time() - began) / 100_000 < 1e-6


def scrape(endpoint: MetricsEndpoint) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return every sample that the endpoint serves."""
    with urllib.request.urlopen(endpoint.url, timeout=5) as answer:
        text = answer.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_prometheus_is_served_what_the_snapshot_holds() -> None:
    metrics = ChangeMetrics()
    tell(metrics)
    with MetricsEndpoint(metrics) as endpoint:
        found = scrape(endpoint)
    assert found["ghsync_cdc_records_total", (("outcome", APPLIED), ("what", "c"))] == 3
    assert found["ghsync_cdc_batches_total", ()] == 1
    assert found["ghsync_cdc_lag_records", (("partition", "0"),)] == 10
    assert found["ghsync_cdc_lag_seconds", (("partition", "0"),)] == 4.5
    assert found["ghsync_cdc_assigned_partitions", ()] == 3
    assert found["ghsync_cdc_retries_total", (("error", "UnavailableError"),)] == 2
    assert found["ghsync_cdc_errors_total", (("error", "RefusedError"),)] == 1
    assert found["ghsync_cdc_dead_letters_total", (("kind", "not-json"),)] == 3
    assert found["ghsync_cdc_broken_rules_total", (("rule", "login_format"),)] == 2
    assert found["ghsync_cdc_connection_up", (("server", MONGO),)] == 0
    assert found["ghsync_cdc_connection_up", (("server", KAFKA),)] == 1
    assert found["ghsync_cdc_commit_to_write_seconds_bucket", (("le", "0.075"),)] == 0
    assert found["ghsync_cdc_commit_to_write_seconds_bucket", (("le", "0.1"),)] == 1
    assert found["ghsync_cdc_commit_to_write_seconds_bucket", (("le", "+Inf"),)] == 2
    assert found["ghsync_cdc_commit_to_write_seconds_count", ()] == 2
    assert found["ghsync_cdc_commit_to_write_seconds_sum", ()] == pytest.approx(4.08, rel=0.001)
    assert found["ghsync_cdc_kafka_to_write_seconds_bucket", (("le", "0.05"),)] == 1
    assert found["ghsync_cdc_recent_latency_seconds", (("quantile", "0.5"), ("since", "kafka"))] == 0.04
    assert found["process_resident_memory_bytes", ()] > 0


def test_the_reference_lists_each_metric_that_is_served_with_its_labels() -> None:
    metrics = ChangeMetrics()
    tell(metrics)
    metrics.repaired("written")
    metrics.connector(ConnectorReport(ConnectorState("RUNNING", ""), Sample(0), event_at=0))
    page = (REFERENCE / "metrics.md").read_text(encoding="utf-8")
    listed = {
        name: set(re.findall(r"\w+", labels))
        for name, labels in re.findall(r"(?m)^\| `(\w+)` \| \w+ \| ([^|]*)\|", page)
    }
    served: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        if not family.name.startswith("process_"):
            assert family.samples, family.name
            name = f"{family.name}_total" if family.type == "counter" else family.name
            served[name] = {label for sample in family.samples for label in sample.labels} - {"le"}
    assert served == listed


def test_a_listener_that_heard_nothing_can_be_scraped() -> None:
    with MetricsEndpoint(ChangeMetrics()) as endpoint:
        found = scrape(endpoint)
    assert found["ghsync_cdc_batches_total", ()] == 0
    assert found["ghsync_cdc_commit_to_write_seconds_bucket", (("le", "+Inf"),)] == 0


def test_two_endpoints_share_nothing_and_a_closed_one_frees_its_port() -> None:
    one, other = ChangeMetrics(), ChangeMetrics()
    tell(one)
    with MetricsEndpoint(one) as first, MetricsEndpoint(other) as second:
        assert first.port != second.port
        assert scrape(first)["ghsync_cdc_batches_total", ()] == 1
        assert scrape(second)["ghsync_cdc_batches_total", ()] == 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", first.port)) != 0
    with MetricsEndpoint(one, port=first.port) as again:
        assert again.port == first.port


def test_a_taken_port_is_one_clear_error() -> None:
    with (
        MetricsEndpoint(ChangeMetrics()) as endpoint,
        pytest.raises(ConfigError, match=f"can't listen on 127.0.0.1:{endpoint.port}"),
    ):
        MetricsEndpoint(ChangeMetrics(), port=endpoint.port)


def test_a_snapshot_of_nothing_is_zero_or_unknown() -> None:
    found: MetricsSnapshot = ChangeMetrics(Clock()).snapshot()
    assert (found.records, found.records_a_minute, found.lag_records, found.lag_seconds) == (0, 0.0, None, None)
    assert found.seconds_since_write is None


def health(endpoint: MetricsEndpoint) -> tuple[int, str]:
    """Return the code and the words of ``/healthz``."""
    url = endpoint.url.replace("/metrics", "/healthz")
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status, answer.read().decode().strip()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode().strip()


def test_health_fails_while_a_server_is_away_or_the_consumer_is_silent() -> None:
    clock = Clock()
    metrics = ChangeMetrics(clock)
    with MetricsEndpoint(metrics) as endpoint:
        metrics.assigned([])
        metrics.connection(KAFKA, up=True)
        metrics.connection(MONGO, up=True)
        assert health(endpoint) == (200, "healthy")
        metrics.connection(MONGO, up=False)
        assert health(endpoint) == (503, "MongoDB does not answer")
        metrics.connection(MONGO, up=True)
        assert health(endpoint) == (200, "healthy")
        clock.now += SILENT_SECONDS
        assert health(endpoint) == (503, "the consumer has not reported for 60 s")
        metrics.assigned([0])
        assert health(endpoint) == (200, "healthy")
