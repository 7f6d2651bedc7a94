"""The pure decisions of the supervisor of the consuming runs.

Belongs here: when a slice starts, when one is dead or stuck, how long to pause after failures. Not here: how runs are
read, started and ended, see ``defs.cdc.sensors``.

A slice is one run that consumes changes for some time. The next one starts before it ends, so that it is in the
consumer group already when the partitions are revoked. Decisions depend on the runs only, so a repeated tick, or one
that lost its cursor, decides the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

AT_ONCE: Final = 2
"""Slices that may live at the same time."""


class Phase(Enum):
    """The phase of a slice."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    ENDING = "ending"
    SUCCEEDED = "succeeded"
    STOPPED = "stopped"
    FAILED = "failed"

    @property
    def lives(self) -> bool:
        """Whether the slice has, or will have, a process."""
        return self in (Phase.QUEUED, Phase.STARTING, Phase.RUNNING, Phase.ENDING)


@dataclass(frozen=True, slots=True)
class Slice:
    """One run as read from Dagster. All times are seconds since 1970.

    Attributes:
        run_id: The run.
        phase: Its phase.
        created: When it was requested.
        changed: When its phase changed last.
        seconds: How long it is to consume.
        started: When it began to run.
        observed: The time of its newest observation.
        ended: When it ended.
        replaced: Whether the supervisor ended it.
    """

    run_id: str
    phase: Phase
    created: float
    changed: float
    seconds: float
    started: float | None = None
    observed: float | None = None
    ended: float | None = None
    replaced: bool = False


@dataclass(frozen=True, slots=True)
class Rules:
    """The supervisor's limits, in seconds.

    Attributes:
        report: How often a slice is to be observed.
        overlap: How long before the end of a slice the next one starts; at most half a slice.
        first_observation: How long after its start, in addition to two reports, a slice may be without observation.
        silent_reports: Reports that a slice may miss while changes wait.
        silent_reports_idle: Reports that a slice may miss in any case.
        grace: How long a slice may run on after its end.
        to_start: How long a slice may take to start, once it has left the queue.
        to_end: How long a slice may take to end, once it was terminated.
        healthy: A slice that ran for so long, or for half of its time, ends a series of failures.
        pause: The pause after the second failure in a row; it doubles with each further one.
        longest_pause: The longest pause.
    """

    report: float = 10.0
    overlap: float = 30.0
    first_observation: float = 60.0
    silent_reports: int = 6
    silent_reports_idle: int = 18
    grace: float = 120.0
    to_start: float = 300.0
    to_end: float = 60.0
    healthy: float = 300.0
    pause: float = 15.0
    longest_pause: float = 600.0


@dataclass(frozen=True, slots=True)
class Start:
    """Start a slice.

    Attributes:
        after: The newest run, None where there is none. It identifies the start, so that it is requested only once.
        why: In words.
    """

    after: str | None
    why: str


@dataclass(frozen=True, slots=True)
class Replace:
    """End a slice, and decide again without it.

    Attributes:
        run_id: Its run.
        why: What is wrong with it, in words.
    """

    run_id: str
    why: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Do nothing now.

    Attributes:
        why: In words.
    """

    why: str


Decision = Start | Replace | Wait


def decide(slices: Sequence[Slice], now: float, rules: Rules, waiting: int | None = None) -> Decision:
    """Decide what to do now.

    Args:
        slices: All living ones, and the newest of the ended ones, in any order.
        now: Seconds since 1970.
        rules: The limits.
        waiting: Changes that wait for the group; None where not known. It matters only if a slice ``is_silent``.
    """
    living = sorted((one for one in slices if one.phase.lives), key=lambda one: one.created)
    for one in living:
        if fault := fault_of(one, now, rules, waiting):
            return Replace(one.run_id, fault)
    if len(living) >= AT_ONCE:
        return Wait(f"{len(living)} slices live, as at a hand-over.")
    going = [one for one in living if one.phase is not Phase.ENDING]
    if going:
        left = time_left(going[0], now)
        if left is None:
            return Wait(f"A slice is {going[0].phase.value}.")
        if left > min(rules.overlap, going[0].seconds / 2):
            return Wait(f"A slice runs for {left:.0f} s more.")
    failures, last = failures_in_a_row(slices, now, rules)
    pause = last + pause_after(failures, rules) - now
    if pause > 0:
        return Wait(f"{failures} slices failed in a row: the next one starts in {pause:.0f} s.")
    newest = max(slices, key=lambda one: one.created, default=None)
    why = f"the slice at work ends in {max(time_left(going[0], now) or 0, 0):.0f} s" if going else "no slice is at work"
    return Start(newest.run_id if newest else None, why)


def time_left(one: Slice, now: float) -> float | None:
    """Return how long a slice is still to consume, None before it runs."""
    return None if one.started is None else one.started + one.seconds - now


def is_silent(one: Slice, now: float, rules: Rules) -> bool:
    """Return whether a slice missed so many reports that it is stuck if changes wait."""
    return (
        one.phase is Phase.RUNNING
        and one.observed is not None
        and now - one.observed > rules.silent_reports * rules.report
    )


def fault_of(one: Slice, now: float, rules: Rules, waiting: int | None) -> str | None:
    """Return the fault of a living slice, None where none is known."""
    if one.phase is Phase.STARTING and now - one.changed > rules.to_start:
        return f"it has not started for {now - one.changed:.0f} s"
    if one.phase is Phase.ENDING and now - one.changed > rules.to_end:
        return f"it has not ended for {now - one.changed:.0f} s"
    if one.phase is not Phase.RUNNING or one.started is None:
        return None
    if now - one.started > one.seconds + rules.grace:
        return f"it runs {now - one.started - one.seconds:.0f} s longer than it should"
    if one.observed is None:
        missed = now - one.started
        return (
            f"it was never observed in {missed:.0f} s" if missed > rules.first_observation + 2 * rules.report else None
        )
    silence = now - one.observed
    if silence > rules.silent_reports_idle * rules.report:
        return f"it was not observed for {silence:.0f} s"
    if is_silent(one, now, rules) and waiting:
        return f"it was not observed for {silence:.0f} s, while {waiting} changes wait"
    return None


def failures_in_a_row(slices: Sequence[Slice], now: float, rules: Rules) -> tuple[int, float]:
    """Return how many slices failed since one was healthy, and when the last of them ended."""
    healthy = max((at for one in slices if (at := _healthy_at(one, now, rules)) is not None), default=float("-inf"))
    bad = [
        one.ended
        for one in slices
        if one.ended is not None and (one.phase is Phase.FAILED or one.replaced) and one.ended > healthy
    ]
    return len(bad), max(bad, default=float("-inf"))


def _healthy_at(one: Slice, now: float, rules: Rules) -> float | None:
    """Return when a slice was last known healthy: at its successful end, or after it ran for long enough."""
    if one.phase is Phase.SUCCEEDED and not one.replaced:
        return one.ended
    if one.started is None:
        return None
    proven = one.started + min(rules.healthy, one.seconds / 2)
    return proven if proven <= (now if one.ended is None else one.ended) else None


def pause_after(failures: int, rules: Rules) -> float:
    """Return how long to pause after so many failures in a row; the first one costs no time."""
    if failures < 2:
        return 0.0
    # The exponent is capped, since the power would leave the range of floats.
    return min(rules.pause * 2.0 ** min(failures - 2, 30), rules.longest_pause)
