"""What `domain/replay.py` decides, and that its steps hold in every interleaving of replays, the stream and loads."""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING

import pytest
from precedence_model import DELETE, Store
from replay_model import Record, Scenario, Walk, loaded

from ghsync_dagster.domain.change import Position
from ghsync_dagster.domain.replay import Candidate, Outcome, Seen, Sighting, Stretch, judge

if TYPE_CHECKING:
    from interleavings import Counted

pytestmark = pytest.mark.usefixtures("without_gc")

# the decision

OWN = Stretch(low=0, committed=100)
HERE = Position(1, 500, server="1/bin")
LETTER = Candidate(0, 50, HERE, intact=True, keyed=True)
EARLIER, LATER = Position(1, 400, server="1/bin"), Position(1, 600, server="1/bin")


@pytest.mark.parametrize(
    ("sighting", "outcome"),
    [
        (Sighting(Seen.CHANGE, 0, 49), Outcome.APPLY),
        (Sighting(Seen.CHANGE, 0, 50, letter=True), Outcome.APPLY),
        (Sighting(Seen.CHANGE, 0, 51), Outcome.MOVED_ON),
        (Sighting(Seen.CHANGE, 0, 51, EARLIER), Outcome.MOVED_ON),
        (Sighting(Seen.CHANGE, 0, 51, letter=True), Outcome.SUPERSEDED),
        (Sighting(Seen.REPLAYED, 0, 51, letter=True), Outcome.SUPERSEDED),
        (Sighting(Seen.REPLAYED, 0, 49, letter=True), Outcome.APPLY),
        (Sighting(Seen.TRUNCATE, 0, 49), Outcome.APPLY),
        (Sighting(Seen.TRUNCATE, 0, 51), Outcome.MOVED_ON),
        (Sighting(Seen.UNREAD, 0, 49), Outcome.APPLY),
        (Sighting(Seen.UNREAD, 0, 51), Outcome.UNSURE),
    ],
    ids=str,
)
def test_in_its_own_partition_the_offset_decides(sighting: Sighting, outcome: Outcome) -> None:
    assert judge(LETTER, [sighting], {0: OWN}).outcome is outcome


@pytest.mark.parametrize(
    ("sighting", "outcome"),
    [
        (Sighting(Seen.CHANGE, 1, 99, EARLIER), Outcome.APPLY),
        (Sighting(Seen.CHANGE, 1, 101, EARLIER), Outcome.NOT_PASSED),
        (Sighting(Seen.TRUNCATE, 1, 101, EARLIER), Outcome.NOT_PASSED),
        (Sighting(Seen.CHANGE, 1, 5, LATER), Outcome.MOVED_ON),
        (Sighting(Seen.TRUNCATE, 1, 5, LATER), Outcome.MOVED_ON),
        (Sighting(Seen.CHANGE, 1, 5), Outcome.UNSURE),
        (Sighting(Seen.TRUNCATE, 1, 5), Outcome.UNSURE),
        (Sighting(Seen.UNREAD, 1, 5), Outcome.UNSURE),
    ],
    ids=str,
)
def test_between_partitions_the_place_in_the_binlog_decides(sighting: Sighting, outcome: Outcome) -> None:
    assert judge(LETTER, [sighting], {0: OWN, 1: OWN}).outcome is outcome


@pytest.mark.parametrize(
    ("letter", "stretches", "outcome"),
    [
        (LETTER, {0: OWN}, Outcome.APPLY),
        (LETTER._replace(intact=False), {0: OWN}, Outcome.UNSURE),
        (LETTER, {}, Outcome.UNSURE),
        (LETTER, {0: Stretch(0, None)}, Outcome.NOT_PASSED),
        (LETTER, {0: Stretch(0, 50)}, Outcome.NOT_PASSED),
        (LETTER, {0: Stretch(0, 51)}, Outcome.APPLY),
        (LETTER, {0: OWN._replace(last_gap=60)}, Outcome.APPLY),
        (LETTER._replace(keyed=False), {0: OWN._replace(last_gap=60)}, Outcome.UNSURE),
        (LETTER._replace(keyed=False), {0: OWN._replace(last_gap=40)}, Outcome.APPLY),
        (LETTER, {0: OWN, 1: Stretch(7, 100)}, Outcome.UNSURE),
        (LETTER, {0: OWN, 1: Stretch(7, 100, LATER)}, Outcome.UNSURE),
        (LETTER, {0: OWN, 1: Stretch(7, 100, EARLIER)}, Outcome.APPLY),
        (LETTER._replace(position=None), {0: OWN, 1: Stretch(7, 100, EARLIER)}, Outcome.UNSURE),
        (LETTER._replace(position=None), {0: OWN, 1: Stretch(0, 100, EARLIER)}, Outcome.APPLY),
        (LETTER, {0: OWN, 1: Stretch(0, 100, None, 60)}, Outcome.UNSURE),
        (LETTER, {0: OWN, 1: Stretch(0, 100, LATER, 60)}, Outcome.UNSURE),
        (LETTER, {0: OWN, 1: Stretch(0, 100, EARLIER, 60)}, Outcome.APPLY),
    ],
    ids=str,
)
def test_what_may_have_been_there_is_not_guessed(
    letter: Candidate, stretches: dict[int, Stretch], outcome: Outcome
) -> None:
    assert judge(letter, [], stretches).outcome is outcome


def test_a_newer_record_decides_whatever_else_is_in_doubt() -> None:
    newer = Sighting(Seen.CHANGE, 0, 60)
    doubts = [Sighting(Seen.UNREAD, 0, 70), Sighting(Seen.CHANGE, 1, 5)]
    judged = judge(LETTER._replace(intact=False), [*doubts, newer], {0: Stretch(55, None), 1: Stretch(9, None)})
    assert (judged.outcome, judged.by) == (Outcome.MOVED_ON, newer)


# the protocol

EMPTY = Store()
MORE = ("s", DELETE, "r")
"""What comes later: another content, nothing, the letter's own content."""


def letter(what: str) -> Record:
    return Record(what, letter=True)


AFTER_A = (Record("a"), letter("r"))
AFTER_A_DELETE = (Record("a"), letter(DELETE))
STARTS: dict[str, tuple[Store, tuple[Record, ...]]] = {
    "empty": (EMPTY, ()),
    "after an upsert": (EMPTY, (Record("a"),)),
    "after a delete": (Store(deleted=True), (Record(DELETE),)),
    "loaded": (loaded("f"), ()),
}
SCENARIOS = {
    f"{name}, {what}": Scenario(start, (*records, letter(what)), MORE, replay_crashes=1, stream_crashes=1)
    for name, (start, records) in STARTS.items()
    for what in ("r", DELETE)
}
LOAD = ((3, "g"),)
SCENARIOS |= {
    f"{name}, {what}, a load": Scenario(
        start, (*records, letter(what)), ("s",), loads=LOAD, replay_crashes=1, load_crashes=1
    )
    for name, (start, records) in STARTS.items()
    for what in ("r", DELETE)
}
SCENARIOS |= {
    "two more records": Scenario(EMPTY, AFTER_A, ("s", DELETE), appended=2),
    "two letters": Scenario(EMPTY, (Record("a"), letter("r"), letter("q")), MORE, replays=2, replay_crashes=1),
    "two letters, one deletes": Scenario(
        EMPTY, (Record("a"), letter(DELETE), letter("q")), (DELETE,), replays=2, replay_crashes=2
    ),
    "a record between letters": Scenario(
        EMPTY, (letter("r"), Record("a"), letter("q")), ("s",), replays=2, replay_crashes=1
    ),
    "the group goes back": Scenario(EMPTY, AFTER_A, ("s",), replays=2, stream_crashes=1, stream_backs=1),
    "the group goes back, a delete": Scenario(
        EMPTY, AFTER_A_DELETE, ("s",), replays=2, replay_crashes=1, stream_backs=1
    ),
    "the group goes back, two letters": Scenario(
        EMPTY, (Record("a"), letter("r"), letter("q")), appended=0, replays=3, stream_backs=1
    ),
    "killed twice": Scenario(EMPTY, (Record("a"), letter("r")), ("s",), replay_crashes=2, stream_crashes=1),
}


@cache
def walked(name: str) -> tuple[Counted, set[str]]:
    walk = Walk(SCENARIOS[name])
    return walk.count(), walk.labels


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_interleaving_with_crashes_and_recovery_ends_right(name: str) -> None:
    counted, _ = walked(name)
    sys.stdout.write(f"{counted.interleavings:,} interleavings in {counted.states:,} states\n")
    assert counted.broken is None
    assert counted.interleavings > 10**10


def test_the_walks_meet_every_outcome_of_a_look_and_of_a_write() -> None:
    labels = {label for name in ("two letters", "empty, r", "two letters, one deletes") for label in walked(name)[1]}
    wanted = {f"replay: LOOK: {outcome.name}" for outcome in Outcome}
    wanted |= {f"replay: {step}: {taken}" for step in ("ADOPT", "WRITE") for taken in (True, False)}
    wanted |= {"replay: REPAIR_DOCUMENT: PUT_BACK", "replay: REPAIR_DOCUMENT: REMOVE"}
    assert wanted <= labels


# the protocol with one thing wrong
BROKEN = {
    "asks for no commit": Scenario(EMPTY, AFTER_A, stream_crashes=1, appended=0),
    "looks before it adopts": Scenario(EMPTY, AFTER_A, ("s",)),
    "looks at nothing": Scenario(EMPTY, AFTER_A, ("s",)),
    "marks whatever is there": Scenario(EMPTY, AFTER_A, ("s",)),
    "writes whatever is there": Scenario(EMPTY, AFTER_A, ("s",)),
    "inserts unmarked": Scenario(EMPTY, (letter("r"),), ("s",)),
    "logs nothing": Scenario(EMPTY, AFTER_A, replay_crashes=1, appended=0),
    "keeps the version": Scenario(loaded("f"), (letter("r"),), appended=0),
    "drops the version last": Scenario(loaded("f"), (letter("r"),), loads=LOAD, replay_crashes=1, appended=0),
    "records no deletion": Scenario(EMPTY, AFTER_A_DELETE, appended=0),
    "records the deletion last": Scenario(EMPTY, AFTER_A_DELETE, loads=LOAD, replay_crashes=1, appended=0),
    "forgets the deletion": Scenario(EMPTY, AFTER_A, (DELETE,)),
    "records no intent": Scenario(EMPTY, (letter("r"), letter("q")), replays=2, replay_crashes=1, appended=0),
    "forgets that it is refused again": Scenario(EMPTY, AFTER_A, replays=2, appended=0, stream_backs=1),
    "ignores the lease": Scenario(EMPTY, (letter("r"),), loads=LOAD, appended=0),
}


@pytest.mark.parametrize("deviation", BROKEN)
def test_with_one_thing_wrong_an_interleaving_breaks_it(deviation: str) -> None:
    scenario = BROKEN[deviation]
    assert Walk(scenario).count().broken is None, "the scenario itself must hold"
    trace = Walk(scenario, frozenset({deviation})).shortest_break()
    assert trace is not None
    sys.stdout.write("\n".join(trace) + "\n")
