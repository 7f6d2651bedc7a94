"""What probes and slices tell: latencies and gaps, steady, around each hand-over and around each kill.

Belongs here: arithmetic on times. Not here: where the times come from, or how the outcome is shown.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from benchmarks.cdc_latency import Second
from ghsync_dagster.cdc.health.metrics import Percentiles, percentiles
from ghsync_dagster.defs.cdc.supervisor import Phase

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from benchmarks.cdc_probes import Probe
    from ghsync_dagster.defs.cdc.supervisor import Slice

WARM_UP_MS = 15_000
AFTER_MS = 3_000
CAUGHT_UP_MS = 1_000
IN_FLIGHT_MS = 1_000
"""How long after a kill a command that the dead process sent may still reach the store."""
ALONE, STANDBY = "alone", "with a standby"

Gap = tuple[int, int]


@dataclass(frozen=True)
class Killing:
    """A kill -9 of the process of the slice at work.

    Attributes:
        run_id: The slice.
        at_ms: When it was killed, in ms since 1970 UTC.
        how: ``ALONE``: no other was in the group; ``STANDBY``: the next one was, as at a hand-over.
    """

    run_id: str
    at_ms: int
    how: str


@dataclass(frozen=True)
class Window:
    """A stretch of time, in ms since 1970 UTC."""

    begins_ms: int
    ends_ms: int

    def touches(self, gap: Gap) -> bool:
        """Return whether a gap, or a probe's way, lies in it at least in part."""
        return gap[0] < self.ends_ms and gap[1] > self.begins_ms


@dataclass(frozen=True)
class Stretch:
    """What was measured in a stretch of time.

    Attributes:
        latency: From commit to document, of the probes that were on their way in it at least in part, in ms.
        longest_gap_ms: The longest time between two sightings, of those that lie in it at least in part.
    """

    latency: Percentiles
    longest_gap_ms: int


@dataclass(frozen=True)
class HandOver:
    """A hand-over from one slice to the next that the supervisor made.

    Attributes:
        asked_at: When the supervisor asked for the second slice, in seconds since the first probe: its start costs
            the machine something.
        began_at: When it began to run.
        ended_at: When the first one had ended.
        around: From the one until ``AFTER_MS`` after the other.
    """

    asked_at: float
    began_at: float
    ended_at: float
    around: Stretch


@dataclass(frozen=True)
class Kill:
    """A slice that was killed, and what came of it; seconds are since the kill, None where there was nothing to come.

    Attributes:
        how: ``ALONE`` or ``STANDBY``.
        at: When, in seconds since the first probe.
        taken_over: Until another consumer was given the partition.
        next_applied: Until a probe was seen again: the end of the longest gap.
        caught_up: Until a probe was seen again within ``CAUGHT_UP_MS`` of its commit.
        noticed: Until Dagster held the run for failed.
        asked: Until the supervisor asked for the replacement.
        started: Until the replacement's run began.
        around: From the kill, or from when the standby was asked for, until ``AFTER_MS`` after all was caught up.
    """

    how: str
    at: float
    taken_over: float | None
    next_applied: float
    caught_up: float
    noticed: float | None
    asked: float | None
    started: float | None
    around: Stretch


@dataclass(frozen=True)
class Timeline:
    """A whole run.

    Attributes:
        all: Of all probes.
        steady: What was neither within ``WARM_UP_MS`` nor around a hand-over or a kill.
        hand_overs: In their order.
        kills: In their order.
        longest_commit_gap_ms: The longest time between two commits of probes: below it no gap is the consumer's.
        resolution: Of the sightings: the time from the poll before until each, in ms.
        seconds: Latency by the second of the commit.
    """

    all: Percentiles
    steady: Stretch
    hand_overs: tuple[HandOver, ...]
    kills: tuple[Kill, ...]
    longest_commit_gap_ms: int
    resolution: Percentiles
    seconds: tuple[Second, ...]


def timeline(
    probes: Sequence[Probe], slices: Sequence[Slice], killings: Sequence[Killing], taken_over_ms: Sequence[int]
) -> Timeline:
    """Return what happened.

    Args:
        probes: In the order of their commits; at least one.
        slices: All that ran, in any order.
        killings: In their order.
        taken_over_ms: When consumers were given the partition, in ms since 1970 UTC.
    """
    found = _Probes(probes)
    began_ms = found.began_ms
    handed = [(second, hand_over_window(first, second)) for first, second in hand_overs(slices, began_ms)]
    outages = [(killing, outage(found.gaps, probes, killing.at_ms)) for killing in killings]
    killed = [(killing, each, kill_window(killing, each, slices)) for killing, each in outages]
    seconds: dict[int, list[Probe]] = {}
    for probe in probes:
        seconds.setdefault((probe.committed_ms - began_ms) // 1000, []).append(probe)
    apart = [Window(began_ms, began_ms + WARM_UP_MS), *(window for _, window in handed)]
    apart += [window for _, _, window in killed]
    return Timeline(
        all=latency(probes),
        steady=found.outside(apart),
        hand_overs=tuple(
            HandOver(
                asked_at=_seconds(began_ms, window.begins_ms),
                began_at=_seconds(began_ms, (second.started or 0.0) * 1000),
                ended_at=_seconds(began_ms, window.ends_ms - AFTER_MS),
                around=found.within(window),
            )
            for second, window in handed
        ),
        kills=tuple(
            _kill(killing, each, slices, taken_over_ms, began_ms, found.within(window))
            for killing, each, window in killed
        ),
        longest_commit_gap_ms=longest(gaps(probe.committed_ms for probe in probes)),
        resolution=percentiles(Counter(probe.within_ms for probe in probes)),
        seconds=tuple(Second(at, latency(some)) for at, some in sorted(seconds.items())),
    )


def latency(probes: Iterable[Probe]) -> Percentiles:
    """Return the distribution of latencies, in ms."""
    return percentiles(Counter(probe.latency_ms for probe in probes))


def gaps(times_ms: Iterable[int]) -> list[Gap]:
    """Return the stretches between moments that follow each other, given in any order."""
    return list(pairwise(sorted(set(times_ms))))


def longest(found: Iterable[Gap]) -> int:
    """Return how long the longest gap is, in ms; 0 where there is none."""
    return max((ends - begins for begins, ends in found), default=0)


def hand_overs(slices: Iterable[Slice], from_ms: int) -> list[tuple[Slice, Slice]]:
    """Return slices that ended well while the next one ran already, each with that one, which began after a moment."""
    ran = sorted((one for one in slices if one.started is not None), key=lambda one: one.started or 0.0)
    return [
        (first, second)
        for first, second in pairwise(ran)
        if first.phase is Phase.SUCCEEDED
        and first.ended is not None
        and second.started is not None
        and from_ms / 1000 <= second.started < first.ended
    ]


def no_hand_over_at(now_ms: int, slices: Sequence[Slice]) -> bool:
    """Return whether one slice is at work alone, and what happens to it now is in the time of no hand-over."""
    living = [one.phase for one in slices if one.phase.lives]
    return living == [Phase.RUNNING] and not any(one.ended and now_ms < one.ended * 1000 + AFTER_MS for one in slices)


def hand_over_window(first: Slice, second: Slice) -> Window:
    """Return the time from when the second slice was asked for until a little after the end of the first one."""
    if first.ended is None:
        raise AssertionError("a slice that handed over has ended")
    return Window(round(second.created * 1000), round(first.ended * 1000) + AFTER_MS)


@dataclass(frozen=True)
class Outage:
    """The time after a kill, in ms since 1970 UTC: when a probe was seen again, and when all was caught up."""

    applied_ms: int
    caught_up_ms: int


def outage(sightings: Iterable[Gap], probes: Sequence[Probe], killed_ms: int) -> Outage:
    """Return when probes were seen again after a kill: the end of the longest gap that began by then, or just after."""
    begun = [gap for gap in sightings if gap[0] <= killed_ms + IN_FLIGHT_MS and gap[1] > killed_ms]
    _, applied_ms = max(begun, key=lambda gap: gap[1] - gap[0], default=(killed_ms, killed_ms))
    quick = [probe.seen_ms for probe in probes if probe.seen_ms >= applied_ms and probe.latency_ms <= CAUGHT_UP_MS]
    caught_up_ms = min(quick, default=max(probe.seen_ms for probe in probes))
    return Outage(applied_ms, max(caught_up_ms, applied_ms))


def kill_window(killing: Killing, found: Outage, slices: Iterable[Slice]) -> Window:
    """Return the time from a kill until a little after all was caught up, the start of a standby before it included."""
    begins_ms = killing.at_ms
    if killing.how == STANDBY:
        asked = [round(one.created * 1000) for one in slices if one.run_id != killing.run_id]
        begins_ms = max((at for at in asked if at <= killing.at_ms), default=begins_ms)
    return Window(begins_ms, found.caught_up_ms + AFTER_MS)


def replacement(slices: Iterable[Slice], killed_ms: int) -> Slice | None:
    """Return the first slice that began to run after a kill."""
    later = [one for one in slices if one.started is not None and one.started * 1000 > killed_ms]
    return min(later, key=lambda one: one.started or 0.0, default=None)


class _Probes:
    """Probes, and the gaps between their sightings."""

    def __init__(self, probes: Sequence[Probe]) -> None:
        self._probes = probes
        self.began_ms = probes[0].committed_ms
        self.gaps = gaps(probe.seen_ms for probe in probes)

    def within(self, window: Window) -> Stretch:
        """Return what lies in a window."""
        return Stretch(
            latency(probe for probe in self._probes if window.touches(probe.way)),
            longest(gap for gap in self.gaps if window.touches(gap)),
        )

    def outside(self, windows: Collection[Window]) -> Stretch:
        """Return what lies in none of some windows."""

        def is_outside(gap: Gap) -> bool:
            return not any(window.touches(gap) for window in windows)

        return Stretch(
            latency(probe for probe in self._probes if is_outside(probe.way)),
            longest(gap for gap in self.gaps if is_outside(gap)),
        )


def _seconds(from_ms: float, at_ms: float) -> float:
    return round((at_ms - from_ms) / 1000, 2)


def _kill(
    killing: Killing,
    found: Outage,
    slices: Sequence[Slice],
    taken_over_ms: Sequence[int],
    began_ms: int,
    around: Stretch,
) -> Kill:
    dead = next((one for one in slices if one.run_id == killing.run_id), None)
    # Where a standby takes over there is nothing to start.
    new = replacement(slices, killing.at_ms) if killing.how == ALONE else None

    taken = min((at for at in taken_over_ms if at > killing.at_ms), default=None)

    def since(at: float | None) -> float | None:
        # Dagster knows some times in whole seconds only.
        return None if at is None else max(_seconds(killing.at_ms, at * 1000), 0.0)

    return Kill(
        how=killing.how,
        at=_seconds(began_ms, killing.at_ms),
        taken_over=since(None if taken is None else taken / 1000),
        next_applied=_seconds(killing.at_ms, found.applied_ms),
        caught_up=_seconds(killing.at_ms, found.caught_up_ms),
        noticed=since(dead.ended if dead else None),
        asked=since(new.created if new else None),
        started=since(new.started if new else None),
        around=around,
    )
