"""What the supervisor decides, without Dagster: when a slice starts, when one is replaced, and how long it pauses."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from ghsync_dagster.defs.cdc.supervisor import (
    AT_ONCE,
    Phase,
    Replace,
    Rules,
    Slice,
    Start,
    Wait,
    decide,
    failures_in_a_row,
    is_silent,
    pause_after,
)

NOW = 1_000_000.0
RULES = Rules()
HOUR = 3600.0


def running(run_id: str = "r", *, for_seconds: float = 600, seconds: float = HOUR, **more: Any) -> Slice:
    """A slice that runs since some seconds, observed a moment ago."""
    started = NOW - for_seconds
    fields = {"observed": NOW - 5} | more
    return Slice(
        run_id, Phase.RUNNING, created=started - 10, changed=started, seconds=seconds, started=started, **fields
    )


def early(phase: Phase, *, for_seconds: float = 5, run_id: str = "e") -> Slice:
    """A slice that does not run yet."""
    return Slice(run_id, phase, created=NOW - for_seconds, changed=NOW - for_seconds, seconds=HOUR)


def ended(phase: Phase, *, ago: float, lived: float = HOUR, run_id: str | None = None, replaced: bool = False) -> Slice:
    """A slice that ended some time ago."""
    at = NOW - ago
    return Slice(
        run_id or f"{phase.value}-{ago:.0f}",
        phase,
        created=at - lived - 10,
        changed=at,
        seconds=HOUR,
        started=at - lived,
        ended=at,
        replaced=replaced,
    )


def ending(*, for_seconds: float, run_id: str = "c") -> Slice:
    """A slice that was told to end some seconds ago."""
    return Slice(
        run_id,
        Phase.ENDING,
        created=NOW - 700,
        changed=NOW - for_seconds,
        seconds=HOUR,
        started=NOW - 600,
        observed=NOW - 5,
    )


def test_the_first_slice_starts_at_once() -> None:
    assert decide([], NOW, RULES) == Start(None, "no slice is at work")


@pytest.mark.parametrize("phase", [Phase.QUEUED, Phase.STARTING])
def test_a_slice_that_is_about_to_run_is_waited_for(phase: Phase) -> None:
    assert decide([early(phase)], NOW, RULES) == Wait(f"A slice is {phase.value}.")


def test_a_slice_that_waits_in_the_queue_is_never_replaced() -> None:
    assert isinstance(decide([early(Phase.QUEUED, for_seconds=10 * HOUR)], NOW, RULES), Wait)


def test_a_slice_that_does_not_start_is_replaced() -> None:
    assert isinstance(decide([early(Phase.STARTING, for_seconds=300)], NOW, RULES), Wait)
    assert decide([early(Phase.STARTING, for_seconds=301)], NOW, RULES) == Replace("e", "it has not started for 301 s")


@pytest.mark.parametrize(
    ("for_seconds", "starts"), [(0, False), (3569, False), (3570, True), (3599, True), (3630, True)]
)
def test_the_next_slice_starts_thirty_seconds_before_the_end(for_seconds: float, starts: bool) -> None:
    decision = decide([running(for_seconds=for_seconds)], NOW, RULES)
    assert isinstance(decision, Start if starts else Wait)


@pytest.mark.parametrize(("seconds", "at"), [(20, 10), (40, 20), (60, 30), (61, 31), (120, 90)])
def test_short_slices_overlap_by_half_at_most(seconds: float, at: float) -> None:
    assert isinstance(decide([running(for_seconds=at - 1, seconds=seconds)], NOW, RULES), Wait)
    assert isinstance(decide([running(for_seconds=at, seconds=seconds)], NOW, RULES), Start)


def test_a_start_names_the_newest_run_so_that_it_is_asked_for_once() -> None:
    seen = [ended(Phase.SUCCEEDED, ago=9_000, run_id="old"), running("present", for_seconds=3580)]
    for order in itertools.permutations(seen):
        decision = decide(order, NOW, RULES)
        assert isinstance(decision, Start)
        assert decision.after == "present"
    # The request of the tick before came through after all: the same decision is not taken twice.
    assert isinstance(decide([*seen, early(Phase.QUEUED)], NOW, RULES), Wait)


@pytest.mark.parametrize(
    "second", [early(Phase.QUEUED), early(Phase.STARTING), running("s", for_seconds=5), ending(for_seconds=3)]
)
def test_no_more_than_two_live_at_once(second: Slice) -> None:
    first = running(for_seconds=3590)
    decision = decide([first, second], NOW, RULES)
    assert decision == Wait(f"{AT_ONCE} slices live, as at a hand-over.")


def test_whatever_lives_no_third_one_starts() -> None:
    phases = [
        early(Phase.QUEUED, run_id="q"),
        early(Phase.STARTING, run_id="s"),
        running("r", for_seconds=3590),
        ending(for_seconds=3),
    ]
    for count in (2, 3, 4):
        for living in itertools.combinations(phases, count):
            assert not isinstance(decide(living, NOW, RULES), Start)


def test_while_a_slice_ends_the_next_one_starts() -> None:
    assert isinstance(decide([ending(for_seconds=3)], NOW, RULES), Start)


def test_a_slice_that_does_not_end_when_told_is_replaced() -> None:
    assert decide([ending(for_seconds=61)], NOW, RULES) == Replace("c", "it has not ended for 61 s")


def test_a_slice_that_runs_on_past_its_end_is_replaced() -> None:
    assert not isinstance(decide([running(for_seconds=HOUR + 120)], NOW, RULES), Replace)
    decision = decide([running(for_seconds=HOUR + 121)], NOW, RULES)
    assert decision == Replace("r", "it runs 121 s longer than it should")


def test_a_slice_that_was_never_observed_is_replaced_after_a_while() -> None:
    assert isinstance(decide([running(for_seconds=80, observed=None)], NOW, RULES), Wait)
    decision = decide([running(for_seconds=81, observed=None)], NOW, RULES)
    assert decision == Replace("r", "it was never observed in 81 s")


@pytest.mark.parametrize(
    ("silence", "waiting", "replaced"),
    [
        (60, 5, False),
        (61, 5, True),
        (61, 0, False),
        (61, None, False),
        (180, 0, False),
        (181, 0, True),
        (181, None, True),
    ],
)
def test_a_silent_slice_is_replaced_soon_if_changes_wait_else_later(
    silence: float, waiting: int | None, replaced: bool
) -> None:
    decision = decide([running(observed=NOW - silence)], NOW, RULES, waiting)
    assert isinstance(decision, Replace if replaced else Wait)


def test_silence_goes_by_the_interval_of_reports() -> None:
    slow = Rules(report=60)
    assert isinstance(decide([running(observed=NOW - 300)], NOW, slow, 5), Wait)
    assert isinstance(decide([running(observed=NOW - 361)], NOW, slow, 5), Replace)


def test_the_lag_is_asked_for_only_where_it_matters() -> None:
    assert is_silent(running(observed=NOW - 61), NOW, RULES)
    assert not is_silent(running(), NOW, RULES)
    assert not is_silent(running(observed=None), NOW, RULES)
    assert not is_silent(ending(for_seconds=500), NOW, RULES)


def test_the_oldest_faulty_slice_is_replaced_first() -> None:
    slices = [running("new", for_seconds=400, observed=NOW - 200), running("old", for_seconds=900, observed=NOW - 200)]
    decision = decide(slices, NOW, RULES)
    assert isinstance(decision, Replace)
    assert decision.run_id == "old"


def test_a_healthy_slice_goes_on_beside_a_faulty_one() -> None:
    slices = [running("good", for_seconds=100), running("bad", for_seconds=900, observed=NOW - 200)]
    decision = decide(slices, NOW, RULES)
    assert isinstance(decision, Replace)
    assert decision.run_id == "bad"
    assert isinstance(decide(slices[:1], NOW, RULES), Wait)


def test_the_first_failure_costs_no_time() -> None:
    assert isinstance(decide([ended(Phase.FAILED, ago=0, lived=5)], NOW, RULES), Start)
    assert isinstance(decide([ended(Phase.FAILED, ago=0, lived=2_000)], NOW, RULES), Start)


@pytest.mark.parametrize(
    ("failures", "pause"),
    [(0, 0), (1, 0), (2, 15), (3, 30), (4, 60), (5, 120), (6, 240), (7, 480), (8, 600), (500, 600)],
)
def test_the_pause_doubles_with_each_failure_up_to_a_limit(failures: int, pause: float) -> None:
    assert pause_after(failures, RULES) == pause


@pytest.mark.parametrize("failures", range(2, 8))
def test_after_failures_in_a_row_the_pause_is_kept_from_the_last_one_on(failures: int) -> None:
    pause = pause_after(failures, RULES)

    def seen(ago: float) -> list[Slice]:
        return [ended(Phase.FAILED, ago=ago + 20 * number, lived=5) for number in range(failures)]

    decision = decide(seen(pause - 1), NOW, RULES)
    assert decision == Wait(f"{failures} slices failed in a row: the next one starts in 1 s.")
    assert isinstance(decide(seen(pause), NOW, RULES), Start)


def test_a_replaced_slice_counts_as_failed_however_it_ended() -> None:
    for phase in (Phase.STOPPED, Phase.FAILED, Phase.SUCCEEDED):
        slices = [ended(phase, ago=1, lived=90, replaced=True), ended(Phase.FAILED, ago=100, lived=5)]
        assert failures_in_a_row(slices, NOW, RULES) == (2, NOW - 1)


def test_a_slice_that_a_person_stopped_is_no_failure_and_no_proof_of_health() -> None:
    failed = [ended(Phase.FAILED, ago=ago, lived=5) for ago in (100, 200)]
    assert failures_in_a_row([ended(Phase.STOPPED, ago=1, lived=5)], NOW, RULES)[0] == 0
    assert failures_in_a_row([ended(Phase.STOPPED, ago=1, lived=5), *failed], NOW, RULES)[0] == 2


def test_a_good_end_ends_the_row() -> None:
    failed = [ended(Phase.FAILED, ago=ago, lived=5) for ago in (400, 420, 440)]
    good = ended(Phase.SUCCEEDED, ago=100, lived=30)
    assert failures_in_a_row([good, *failed], NOW, RULES)[0] == 0
    assert failures_in_a_row([good, *failed, ended(Phase.FAILED, ago=50, lived=5)], NOW, RULES) == (1, NOW - 50)


def test_a_long_life_ends_the_row_even_if_the_slice_failed_then() -> None:
    failed = [ended(Phase.FAILED, ago=ago, lived=5) for ago in (1_000, 1_020, 1_040)]
    assert failures_in_a_row([ended(Phase.FAILED, ago=1, lived=400), *failed], NOW, RULES) == (1, NOW - 1)
    assert failures_in_a_row([ended(Phase.FAILED, ago=1, lived=200), *failed], NOW, RULES) == (4, NOW - 1)


def test_a_slice_that_lives_long_enough_ends_the_row() -> None:
    failed = [ended(Phase.FAILED, ago=ago, lived=5) for ago in (700, 720)]
    assert failures_in_a_row([running(for_seconds=299), *failed], NOW, RULES)[0] == 2
    assert failures_in_a_row([running(for_seconds=301), *failed], NOW, RULES)[0] == 0
    # Short slices prove themselves in half of their time.
    assert failures_in_a_row([running(for_seconds=31, seconds=60), *failed], NOW, RULES)[0] == 0


def test_the_pause_also_holds_for_the_next_slice_beside_a_running_one() -> None:
    failed = [ended(Phase.FAILED, ago=ago, lived=2) for ago in (1, 4)]
    slices = [running(for_seconds=3590), *failed]
    decision = decide(slices, NOW, RULES)
    assert isinstance(decision, Wait)
    assert "2 slices failed in a row" in decision.why


def test_a_decision_depends_on_what_is_seen_not_on_its_order() -> None:
    slices = [
        running(for_seconds=3590),
        ended(Phase.FAILED, ago=900, lived=5),
        ended(Phase.FAILED, ago=10, lived=5),
        ended(Phase.STOPPED, ago=50, lived=5),
    ]
    assert len({decide(order, NOW, RULES) for order in itertools.permutations(slices)}) == 1


def test_a_life_of_slices_is_kept_without_a_gap_and_never_three_at_once() -> None:
    """Ticks of five seconds over three hours, a start taking 15 s, one kill and one hang on the way."""
    slices: list[Slice] = []
    rules, start_takes, gaps, most = Rules(report=10), 15.0, [], 0
    hung, killed = "run-2", "run-3"
    for tick in range(3 * 720):
        now = NOW + 5 * tick
        slices = [_aged(one, now, start_takes, hung=hung, killed=killed) for one in slices]
        decision = decide(slices, now, rules, waiting=100)
        while isinstance(decision, Replace):
            slices = [_stopped(one, now) if one.run_id == decision.run_id else one for one in slices]
            decision = decide(slices, now, rules, waiting=100)
        if isinstance(decision, Start):
            slices.append(Slice(f"run-{len(slices)}", Phase.STARTING, created=now, changed=now, seconds=900))
        most = max(most, sum(one.phase.lives for one in slices))
        if not any(_at_work(one, now, hung=hung) for one in slices):
            gaps.append(now - NOW)
    assert most == AT_ONCE
    assert {one.run_id for one in slices if one.replaced} == {hung}
    assert [one.run_id for one in slices if one.phase is Phase.FAILED] == [killed]
    # Nobody worked at the beginning, while the hung one was not known to hang, and while the killed one was replaced.
    assert gaps[0] == 0
    assert len(gaps) * 5 < 15 + (60 + 5 + 15 + 15) + (5 + 15 + 10)
    assert 11 <= len(slices) <= 15


def _aged(one: Slice, now: float, start_takes: float, *, hung: str, killed: str) -> Slice:
    """A slice five seconds later: it starts, is observed, and ends, unless it hangs or is killed on the way."""
    if one.phase is Phase.STARTING and now - one.created >= start_takes:
        return _with(one, phase=Phase.RUNNING, started=now, observed=now)
    if one.phase is not Phase.RUNNING or one.started is None:
        return one
    age = now - one.started
    if one.run_id == killed and age > 300:
        return _with(one, phase=Phase.FAILED, ended=now)
    if one.run_id == hung and age > 300:
        return one
    if age >= one.seconds:
        return _with(one, phase=Phase.SUCCEEDED, ended=now)
    return _with(one, observed=now)


def _at_work(one: Slice, now: float, *, hung: str) -> bool:
    stuck = one.run_id == hung and one.started is not None and now - one.started > 300
    return one.phase is Phase.RUNNING and not stuck


def _stopped(one: Slice, now: float) -> Slice:
    return _with(one, phase=Phase.STOPPED, ended=now, replaced=True)


def _with(one: Slice, **changes: Any) -> Slice:
    from dataclasses import replace

    return replace(one, **changes)
