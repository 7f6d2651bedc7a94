"""Latency from the database's commit to the stored document, through MariaDB, Debezium, Kafka and ghsync's consumer.

Belongs here: a run at a rate, with a hand-over to a second consumer in the middle. Not here: throughput, or how the
outcome is shown.

Who changes the table and who consumes are processes of their own, ``python -m benchmarks.cdc_latency change`` and
``consume``, which tell by lines of JSON what they committed and acknowledged, and when. The n-th record that was
committed is the n-th that was acknowledged, and all of them share one clock.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from benchmarks.harness import BenchmarkError
from benchmarks.tellers import Teller, now_ms, pause_until, say
from ghsync_dagster.cdc.health.metrics import Percentiles, percentiles
from ghsync_dagster.cdc.stream.listener import AppliedBatch, SilentListener
from ghsync_dagster.dev.rehearsal import CommitClock
from ghsync_dagster.dev.workload import RowChange

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.stack import Stack

WARM_UP_SECONDS = 5.0
START_AHEAD_SECONDS = 6.0
OVERLAP_SECONDS = 3.0
AFTER_SECONDS = 3.0
START_SECONDS = 60.0
CATCH_UP_SECONDS = 180.0
SEED = 20_150_301
MODULE = "benchmarks.cdc_latency"
ROW_CHANGES = frozenset({"c", "u", "d"})


@dataclass(frozen=True)
class Second:
    """The changes that were committed within one second.

    Attributes:
        at: Seconds from the first change to the second's beginning.
        latency: Of these changes, in ms.
    """

    at: int
    latency: Percentiles


@dataclass(frozen=True)
class LatencyRun:
    """One run at one rate.

    Attributes:
        wanted_rate: Changes a second that were asked for.
        rate: Changes a second that the database took.
        changes: How many there were.
        longest_behind_seconds: How late a change was sent, at worst.
        all: Latency of all changes, in ms.
        steady: Of those after ``WARM_UP_SECONDS`` that are not around the hand-over.
        around: Of those from the second consumer's start until ``AFTER_SECONDS`` after the first one's end.
        from_kafka: Of all records, tombstones too: from their Kafka timestamp only, which leaves Debezium out.
        writing_share: The share of the time, 0 to 1, in which the consumers had a write at the store.
        longest_gap_ms: The longest time, after ``WARM_UP_SECONDS``, between two acknowledgements of the store.
        hand_over_at: When the first consumer was told to end, in seconds since the first change.
        equal: Whether table and collection were equal at the end.
        seconds: Latency second by second.
    """

    wanted_rate: float
    rate: float
    changes: int
    longest_behind_seconds: float
    all: Percentiles
    steady: Percentiles
    around: Percentiles
    from_kafka: Percentiles
    writing_share: float
    longest_gap_ms: int
    hand_over_at: float
    equal: bool
    seconds: tuple[Second, ...]


def run(stack: Stack, rate: float, seconds: float) -> LatencyRun:
    """Change the table at a rate, consume, and hand over to a second consumer in the middle.

    Raises:
        BenchmarkError: A process failed, the changes were not all applied in time, or none was steady.
    """
    admin = stack.admin()
    # One group for all runs: it has applied what was there before.
    environment = stack.environment()
    with ExitStack() as around:

        def start(name: str, *arguments: str) -> Teller:
            return around.enter_context(Teller(name, MODULE, arguments, environment, stack.logs))

        first = start("first consumer", "consume")
        first.wait(lambda: first.ready, "consume", START_SECONDS)
        workload = start("workload", "change", str(rate), str(seconds))
        workload.wait(lambda: workload.records > 0, "change the table", START_SECONDS)
        began_ms = workload.lines[0]["at"]
        pause_until(began_ms, seconds / 2 - START_AHEAD_SECONDS, workload)
        second_began_ms = now_ms()
        second = start("second consumer", "consume")
        second.wait(lambda: stack.members(admin) > 1, "join the group", START_SECONDS)
        # Kafka's client joins a group once a second at most: who has just joined takes over up to a second later.
        pause_until(began_ms, max(seconds / 2, (now_ms() - began_ms) / 1000 + OVERLAP_SECONDS), workload)
        hand_over_ms = now_ms()
        first.end(128 + signal.SIGTERM)
        first_ended_ms = now_ms()
        workload.wait(lambda: workload.report is not None, "end", seconds + START_SECONDS)
        workload.end(0)
        second.wait(lambda: first.records + second.records >= workload.records, "apply all changes", CATCH_UP_SECONDS)
        second.end(128 + signal.SIGTERM)
    return latency_run(
        Observed(rate, workload.lines, first.lines + second.lines, (second_began_ms, hand_over_ms, first_ended_ms)),
        workload.report or {},
        equal=stack.is_equal(),
    )


# --- what was observed ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Observed:
    """What the processes told.

    Attributes:
        rate: Changes a second that were asked for.
        commits: Lines of the workload, in order.
        acknowledgements: Lines of the consumers, in order.
        times_ms: When the second consumer was started, the first one told to end, and had ended.
    """

    rate: float
    commits: Sequence[dict[str, Any]]
    acknowledgements: Sequence[dict[str, Any]]
    times_ms: tuple[int, int, int]


@dataclass
class _Spread:
    """Latencies, by the second of their commit and by what happened then."""

    began_ms: int
    around_ms: tuple[float, float]
    steady: Counter[int] = field(default_factory=Counter)
    around: Counter[int] = field(default_factory=Counter)
    seconds: dict[int, Counter[int]] = field(default_factory=dict)

    def add(self, committed_ms: int, latency_ms: int, records: int) -> None:
        """Add records that were committed together."""
        since = committed_ms - self.began_ms
        self.seconds.setdefault(since // 1000, Counter())[latency_ms] += records
        if self.around_ms[0] <= committed_ms <= self.around_ms[1]:
            self.around[latency_ms] += records
        elif since >= WARM_UP_SECONDS * 1000:
            self.steady[latency_ms] += records


def latency_run(observed: Observed, report: Mapping[str, Any], *, equal: bool) -> LatencyRun:
    """Pair commits and acknowledgements, and tell what is steady from what is around the hand-over.

    Raises:
        BenchmarkError: There are no pairs, or no change was steady.
    """
    began_ms = observed.commits[0]["at"]
    second_began_ms, hand_over_ms, first_ended_ms = observed.times_ms
    committed, acknowledged = (
        sum(line["records"] for line in lines) for lines in (observed.commits, observed.acknowledgements)
    )
    if committed != acknowledged:
        raise BenchmarkError(
            f"{committed:,} records were committed, but {acknowledged:,} acknowledged: no pairs of them."
        )
    spread = _Spread(began_ms, (second_began_ms, first_ended_ms + AFTER_SECONDS * 1000))
    clock = CommitClock(spread.add)
    for line in observed.commits:
        clock.committed([RowChange(kind, 0) for kind in line["kinds"]], line["at"])
    for line in observed.acknowledgements:
        counts = {(what, outcome): count for what, outcome, count in line["counts"]}
        clock.batch_applied(AppliedBatch(counts=counts, acknowledged_ms=line["at"]))
    if not spread.steady:
        raise BenchmarkError(
            f"The hand-over lasted until {(first_ended_ms - began_ms) / 1000:.0f} s, so no change was steady: "
            "let the run take longer (--seconds)."
        )
    from_kafka: Counter[int] = Counter()
    for line in observed.acknowledgements:
        from_kafka.update(dict(line["from_kafka"]))
    lasted_ms = max(observed.acknowledgements[-1]["at"] - began_ms, 1)
    times = [line["at"] for line in observed.acknowledgements if line["at"] >= began_ms + WARM_UP_SECONDS * 1000]
    return LatencyRun(
        wanted_rate=observed.rate,
        rate=report["rate"],
        changes=sum(report["changes"].values()),
        longest_behind_seconds=report["longest_behind_seconds"],
        all=clock.latency(),
        steady=percentiles(spread.steady),
        around=percentiles(spread.around),
        from_kafka=percentiles(from_kafka),
        writing_share=round(sum(line["write_seconds"] for line in observed.acknowledgements) * 1000 / lasted_ms, 3),
        longest_gap_ms=max((later - earlier for earlier, later in pairwise(times)), default=0),
        hand_over_at=round((hand_over_ms - began_ms) / 1000, 1),
        equal=equal,
        seconds=tuple(Second(at, percentiles(found)) for at, found in sorted(spread.seconds.items())),
    )


# --- the processes --------------------------------------------------------------------------------------------------


class _Told(SilentListener):
    """Tells of each batch, and once that there are partitions whose end is known."""

    def __init__(self) -> None:
        self._is_ready = False

    def lag(self, partition: int, records: int, seconds: float) -> None:
        """Tell that the consumer is at work."""
        del partition, records, seconds
        if not self._is_ready:
            self._is_ready = True
            say({"ready": True})

    def batch_applied(self, batch: AppliedBatch) -> None:
        """Tell of a batch."""
        counts = [
            (what, outcome, count)
            for (what, outcome), count in batch.counts.items()
            if what in ROW_CHANGES and outcome in ("applied", "coalesced")
        ]
        if counts:
            records = sum(count for _, _, count in counts)
            at = batch.acknowledged_ms
            from_kafka = Counter([max(at - appended, 0) for appended in batch.appended_ms if appended is not None])
            say(
                {
                    "records": records,
                    "counts": counts,
                    "at": at,
                    "from_kafka": list(from_kafka.items()),
                    "write_seconds": batch.write_seconds,
                }
            )


def _consume() -> int:
    from ghsync_dagster.logging import configure_logging
    from ghsync_dagster.settings import load_settings
    from ghsync_dagster.stopping import stop_on_signals
    from ghsync_dagster.wiring import change_consumer, existing_kafka

    settings = load_settings()
    configure_logging(settings)
    stop = threading.Event()
    with stop_on_signals(stop):
        change_consumer(settings, existing_kafka(settings), _Told()).run(stop)
    return 128 + signal.SIGTERM


def _change(rate: float, seconds: float) -> int:
    from ghsync_dagster.dev.workload import KEY_CHANGE, Workload
    from ghsync_dagster.logging import configure_logging
    from ghsync_dagster.settings import load_settings
    from ghsync_dagster.stores.mysql import MySqlStore

    settings = load_settings()
    # Onto standard error: standard output is for the lines.
    configure_logging(settings)
    url = settings.mysql_url
    if url is None:
        raise AssertionError("MYSQL_URL is set for this process")

    def committed(changes: Sequence[RowChange], at_ms: int) -> None:
        kinds = [change.kind for change in changes]
        say({"records": len(kinds) + kinds.count(KEY_CHANGE), "kinds": kinds, "at": at_ms})

    with MySqlStore(url.get_secret_value()) as table:
        table.ensure_table()
        report = Workload(table, rate=rate, seed=SEED, on_commit=committed).run(seconds=seconds)
    say({"report": asdict(report)})
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run one of the processes, and return its exit code."""
    match arguments:
        case ["consume"]:
            return _consume()
        case ["change", rate, seconds]:
            return _change(float(rate), float(seconds))
        case _:
            sys.stderr.write("usage: python -m benchmarks.cdc_latency consume | change RATE SECONDS\n")
            return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
