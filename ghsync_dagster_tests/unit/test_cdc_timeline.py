"""What probes and slices tell: pairs, gaps, hand-overs, outages, and what is steady between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.cdc_probes import EVERY, FIRST_KEY, Probe, ProbedTable, paired
from benchmarks.cdc_timeline import (
    AFTER_MS,
    ALONE,
    STANDBY,
    Killing,
    Window,
    gaps,
    hand_overs,
    kill_window,
    longest,
    no_hand_over_at,
    outage,
    replacement,
    timeline,
)
from benchmarks.harness import BenchmarkError
from ghsync_dagster.defs.cdc.supervisor import Phase, Slice
from ghsync_dagster.dev.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ghsync_dagster.stores.mysql import Statement

BEGAN_MS = 1_700_000_000_000
LATENCY_MS = 40


def probes(seconds: float, *holes: tuple[int, int], every_ms: int = 10) -> list[Probe]:
    """Probes that are seen ``LATENCY_MS`` after their commit, or else at the end of the hole which that falls into."""
    found = []
    for at in range(0, round(seconds * 1000), every_ms):
        seen = at + LATENCY_MS
        seen = next((ends for begins, ends in holes if begins < seen < ends), seen)
        found.append(Probe(BEGAN_MS + at, BEGAN_MS + seen, within_ms=5))
    return found


def a_slice(run_id: str, started: float, ended: float | None, phase: Phase = Phase.SUCCEEDED, **more: Any) -> Slice:
    """A slice; times since the start."""
    began = BEGAN_MS / 1000
    at = None if ended is None else began + ended
    fields = {"created": began + started - 12, "changed": at or began + started, "seconds": 60.0} | more
    return Slice(run_id=run_id, phase=phase, started=began + started, ended=at, **fields)


class Recorded:
    """A table that keeps what it is sent."""

    table = "`Users`"

    def __init__(self) -> None:
        self.sent: list[Sequence[Statement]] = []

    def execute(self, statements: Sequence[Statement]) -> int:
        """Keep them; say that each touched its row."""
        self.sent.append(statements)
        return len(statements)


def test_every_tenth_change_is_a_probe_of_its_own() -> None:
    kept = Recorded()
    probed = ProbedTable(kept)
    report = Workload(probed, rate=1_000_000, base_id=1, longest_transaction=25).run(changes=900)
    statements = [statement for transaction in kept.sent for statement in transaction]
    keys = [values[0] for _, values in statements]
    places = [place for place, key in enumerate(keys) if isinstance(key, int) and key >= FIRST_KEY]
    assert places == list(range(EVERY - 1, len(keys), EVERY))
    assert [keys[place] for place in places] == [FIRST_KEY + number for number in range(len(places))]
    assert probed.sent == len(places) == report.total // (EVERY - 1)
    # The workload is told of its own rows only.
    assert report.missed == 0


def test_probes_are_paired_by_their_numbers() -> None:
    commits = [{"first": 0, "records": 2, "at": 100}, {"first": 2, "records": 1, "at": 110}]
    sightings = [{"seen": [2, 0], "at": 140, "within": 5}, {"seen": [1], "at": 150, "within": 6}]
    found = paired(commits, sightings)
    assert found == [Probe(100, 140, 5), Probe(100, 150, 6), Probe(110, 140, 5)]
    assert [probe.latency_ms for probe in found] == [40, 50, 30]


@pytest.mark.parametrize("seen", [[0], [0, 1, 2]])
def test_probes_that_have_no_pair_are_an_error(seen: list[int]) -> None:
    with pytest.raises(BenchmarkError, match=f"2 probes were committed, but {len(seen)} seen"):
        paired([{"first": 0, "records": 2, "at": 100}], [{"seen": seen, "at": 140, "within": 5}])


def test_a_probe_that_is_seen_before_its_commit_is_answered_took_no_time() -> None:
    assert Probe(100, 98).latency_ms == 0


def test_gaps_are_between_moments_that_follow_each_other() -> None:
    assert gaps([30, 10, 10, 20, 90]) == [(10, 20), (20, 30), (30, 90)]
    assert longest(gaps([30, 10, 10, 20, 90])) == 60
    assert longest(gaps([7])) == longest([]) == 0


def test_a_hand_over_is_a_good_end_while_the_next_one_runs() -> None:
    before = a_slice("before", -70, -10)
    first, second = a_slice("first", -25, 35), a_slice("second", 20, 80)
    late, killed = a_slice("late", 90, 130), a_slice("killed", 120, 140, Phase.FAILED)
    last = a_slice("last", 135, None, Phase.RUNNING)
    queued = Slice("queued", Phase.QUEUED, created=0, changed=0, seconds=60)
    found = hand_overs([last, queued, killed, late, second, first, before], BEGAN_MS)
    # `before` handed over too early to count, after `second` nobody ran, and `killed` ended badly.
    assert [(one.run_id, other.run_id) for one, other in found] == [("first", "second"), ("late", "killed")]


def test_a_slice_is_alone_once_the_time_of_the_hand_over_before_it_is_over() -> None:
    before, at_work = a_slice("before", 0, 60), a_slice("at work", 50, None, Phase.RUNNING)
    (ended_ms,) = (round(one.ended * 1000) for one in (before, at_work) if one.ended)
    assert not no_hand_over_at(ended_ms + AFTER_MS - 1, [before, at_work])
    assert no_hand_over_at(ended_ms + AFTER_MS, [before, at_work])
    assert no_hand_over_at(ended_ms, [at_work])
    assert not no_hand_over_at(ended_ms + AFTER_MS, [at_work, a_slice("next", 90, None, Phase.STARTING)])
    assert not no_hand_over_at(ended_ms + AFTER_MS, [a_slice("next", 90, None, Phase.STARTING)])


def test_an_outage_ends_with_the_longest_gap_that_the_kill_began() -> None:
    # A later and longer gap is none of it.
    found = probes(60, (10_000, 22_000), (40_000, 55_000))
    after = outage(gaps(probe.seen_ms for probe in found), found, BEGAN_MS + 10_010)
    assert (after.applied_ms, after.caught_up_ms) == (BEGAN_MS + 22_000, BEGAN_MS + 22_000)
    window = kill_window(Killing("dead", BEGAN_MS + 10_010, ALONE), after, [])
    assert window == Window(BEGAN_MS + 10_010, BEGAN_MS + 22_000 + AFTER_MS)


def test_the_start_of_a_standby_is_around_the_kill_as_it_is_around_a_hand_over() -> None:
    slices = [a_slice("before", -70, -10), a_slice("dead", -20, 40, Phase.FAILED), a_slice("next", 20, None)]
    slices += [a_slice("later", 60, None)]
    found = probes(60, (40_000, 50_000))
    after = outage(gaps(probe.seen_ms for probe in found), found, BEGAN_MS + 40_000)
    window = kill_window(Killing("dead", BEGAN_MS + 40_000, STANDBY), after, slices)
    assert window == Window(round(slices[2].created * 1000), BEGAN_MS + 50_000 + AFTER_MS)


def test_a_command_that_was_in_flight_does_not_end_an_outage() -> None:
    found = [Probe(1_000 + at, 1_000 + at + LATENCY_MS) for at in range(0, 5_000, 10)]
    found += [Probe(6_000, 6_300), *(Probe(at, 15_000) for at in range(6_010, 15_000, 10)), Probe(15_000, 15_040)]
    after = outage(gaps(probe.seen_ms for probe in found), found, 6_005)
    assert after.applied_ms == 15_000
    # What waited is applied late, what is committed now is not.
    assert after.caught_up_ms == 15_000


def test_what_is_applied_again_late_is_not_caught_up() -> None:
    found = [Probe(at, at + LATENCY_MS) for at in range(0, 10_000, 10)]
    found += [Probe(at, max(at + 2_000, 20_000)) for at in range(10_000, 25_000, 10)]
    found += [Probe(at, max(at + LATENCY_MS, 27_000)) for at in range(25_000, 30_000, 10)]
    after = outage(gaps(probe.seen_ms for probe in found), found, 10_000)
    assert (after.applied_ms, after.caught_up_ms) == (20_000, 27_000)


def test_the_replacement_is_the_first_to_run_after_the_kill() -> None:
    slices = [a_slice("old", 1, 10, Phase.FAILED), a_slice("newer", 30, None), a_slice("new", 20, None)]
    found = replacement(slices, BEGAN_MS + 10_000)
    assert found is not None
    assert found.run_id == "new"
    assert replacement(slices, BEGAN_MS + 40_000) is None


def test_a_timeline_tells_the_steady_the_hand_over_and_the_kills_apart() -> None:
    found = probes(120, (30_000, 30_700), (60_000, 77_000), (100_000, 110_000))
    slices = [
        a_slice("first", -30, 30.2),
        a_slice("second", 15, 61, Phase.FAILED),
        a_slice("third", 76, 101, Phase.FAILED, created=BEGAN_MS / 1000 + 64),
        a_slice("fourth", 95, None, Phase.RUNNING),
    ]
    killings = [Killing("second", BEGAN_MS + 60_000, ALONE), Killing("third", BEGAN_MS + 100_000, STANDBY)]
    seen = timeline(found, slices, killings, [BEGAN_MS + at for at in (-20_000, 30_100, 76_800, 109_900)])

    assert seen.all.count == len(found)
    assert (seen.steady.latency.p50, seen.steady.latency.max) == (LATENCY_MS, LATENCY_MS)
    assert seen.steady.longest_gap_ms == seen.longest_commit_gap_ms == 10
    (hand_over,) = seen.hand_overs
    assert (hand_over.asked_at, hand_over.began_at, hand_over.ended_at) == (3.0, 15.0, 30.2)
    assert hand_over.around.longest_gap_ms == 700
    # Also those that were on their way when it began.
    assert hand_over.around.latency.count == (30_200 + AFTER_MS - 3_000 + LATENCY_MS) // 10 - 1
    assert 690 < hand_over.around.latency.max <= 740

    alone, standby = seen.kills
    assert (alone.how, alone.at, alone.next_applied, alone.caught_up) == (ALONE, 60.0, 17.0, 17.0)
    assert (alone.noticed, alone.asked, alone.started) == (1.0, 4.0, 16.0)
    assert alone.taken_over == 16.8
    assert alone.around.longest_gap_ms == 17_000
    assert 17_000 < alone.around.latency.max < 17_000 + LATENCY_MS
    assert (standby.how, standby.taken_over, standby.next_applied, standby.noticed) == (STANDBY, 9.9, 10.0, 1.0)
    # From when the fourth was asked for, with those that were on their way then.
    assert standby.around.latency.count == (110_000 + AFTER_MS - 83_000 + LATENCY_MS) // 10 - 1
    # The one alongside took over: there was nothing to start.
    assert (standby.asked, standby.started) == (None, None)
    assert seen.resolution.max == 5
    assert [second.at for second in seen.seconds] == list(range(120))
