"""What `domain/precedence.py` decides, and that its steps hold in every interleaving of loads and the stream."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import permutations, product
from typing import TypeVar

import pytest

from ghsync_dagster.domain.precedence import (
    DELETE_STEPS,
    INSERT_AGAIN_STEPS,
    READ_STEPS,
    SETTLE_STEPS,
    UPSERT_STEPS,
    WRITE_STEPS,
    Action,
    Found,
    Incoming,
    LoadState,
    LoadStep,
    Repair,
    SettleStep,
    Stored,
    StreamStep,
    Version,
    classify,
    classify_missing,
    settle,
)
from ghsync_dagster_tests.support.models.precedence import (
    DELETE,
    Doc,
    Entry,
    Protocol,
    Scenario,
    Store,
    Walk,
)

OLD = Version("2015-01-01T15:00:00Z", 100)
NEW = Version("2015-01-01T15:00:01Z", 7)

EMPTY = Store()
LOADED = Store(Doc("a", marked=False), Entry(2, 0))
STREAMED = Store(Doc("a", marked=False))
DELETED = Store(deleted=True)
STALE_VERSION = Store(entry=Entry(2, 0))
LATE = Store(Doc("a", marked=True))
"""A dead load's executor wrote the document after the recovery."""

OPS = ("a", "b", "s", DELETE)
"""What the stream may write: the start's content, a load's content, its own, and nothing."""

PROTOCOL = Protocol()

pytestmark = pytest.mark.usefixtures("without_gc")


# the decisions


def test_versions_order_by_time_then_by_event_number() -> None:
    assert Version("2015-01-01T15:59:59Z", 9) < Version("2015-01-01T16:00:00Z", 1)
    assert Version("2015-01-01T15:00:00Z", 9) < Version("2015-01-01T15:00:00Z", 10)


@pytest.mark.parametrize(
    ("stored", "action"),
    [
        (Stored(None, None, deleted=False), Action.INSERT),
        (Stored(None, NEW, deleted=False), Action.INSERT),
        (Stored(None, None, deleted=True), Action.DELETED_BY_STREAM),
        (Stored(None, OLD, deleted=True), Action.DELETED_BY_STREAM),
        (Stored("a", None, deleted=False), Action.OWNED_BY_STREAM),
        (Stored("b", None, deleted=True), Action.OWNED_BY_STREAM),
        (Stored("a", NEW, deleted=False), Action.ALREADY_STORED),
        (Stored("a", Version(NEW.created_at, 8), deleted=False), Action.NEWER_STORED),
        (Stored("b", OLD, deleted=False), Action.BUMP),
        (Stored("a", OLD, deleted=False), Action.REPLACE),
    ],
)
def test_a_load_decides_by_document_version_and_deletion(stored: Stored, action: Action) -> None:
    assert classify(stored, Incoming("b", NEW)) is action


def test_each_action_writes_or_is_a_reason_to_skip() -> None:
    assert {action for action in Action if action.writes_document} == {Action.INSERT, Action.REPLACE}
    assert {action for action in Action if not action.is_skip} == {Action.INSERT, Action.REPLACE, Action.BUMP}


RUNNING_REPAIRS = {
    # marked, replaced, versioned, deleted
    (0, 0, 0, 0): Repair.NOTHING,
    (0, 0, 1, 0): Repair.DROP_VERSION,
    (0, 1, 0, 0): Repair.NOTHING,
    (0, 1, 1, 0): Repair.DROP_VERSION,
    (1, 0, 0, 0): Repair.REMOVE,
    (1, 0, 1, 0): Repair.KEEP,
    (1, 1, 0, 0): Repair.PUT_BACK,
    (1, 1, 1, 0): Repair.KEEP,
    (0, 0, 0, 1): Repair.NOTHING,
    (0, 0, 1, 1): Repair.DROP_VERSION,
    (0, 1, 0, 1): Repair.NOTHING,
    (0, 1, 1, 1): Repair.DROP_VERSION,
    (1, 0, 0, 1): Repair.REMOVE,
    (1, 0, 1, 1): Repair.REMOVE,
    (1, 1, 0, 1): Repair.PUT_BACK,
    (1, 1, 1, 1): Repair.KEEP,
}


@pytest.mark.parametrize("flags", list(product((0, 1), repeat=4)), ids=str)
def test_settling_a_running_load_decides_by_what_is_found(flags: tuple[int, int, int, int]) -> None:
    assert settle(LoadState.RUNNING, Found(*map(bool, flags))) is RUNNING_REPAIRS[flags]


@pytest.mark.parametrize(
    ("stored", "marked", "action"),
    [
        (Stored(None, None, deleted=False), False, Action.INSERT),
        (Stored(None, OLD, deleted=True), False, Action.DELETED_BY_STREAM),
        (Stored("a", None, deleted=True), False, Action.STORED_MEANWHILE),
        (Stored("a", OLD, deleted=False), True, Action.INSERT),
    ],
)
def test_a_load_decides_what_becomes_of_a_key_that_it_finds_missing(
    stored: Stored, action: Action, *, marked: bool
) -> None:
    assert classify_missing(stored, marked=marked) is action


@pytest.mark.parametrize("state", [LoadState.CHECKED, LoadState.DONE, None])
@pytest.mark.parametrize("flags", list(product((0, 1), repeat=4)), ids=str)
def test_settling_any_other_load_only_removes_the_marker(
    state: LoadState | None, flags: tuple[int, int, int, int]
) -> None:
    found = Found(*map(bool, flags))
    assert settle(state, found) is (Repair.KEEP if found.marked else Repair.NOTHING)


# the protocol

STARTS_AND_LOADS = [
    (EMPTY, None, ((3, "b"), (4, "c"))),
    (EMPTY, None, ((4, "b"), (3, "c"))),
    (LOADED, None, ((3, "b"), (4, "c"))),
    (LOADED, None, ((3, "b"), (4, "a"))),
    (LOADED, None, ((3, "a"), (4, "b"))),
    (LOADED, None, ((4, "b"), (3, "c"))),
    (LOADED, None, ((2, "a"), (3, "a"))),
    (STREAMED, "a", ((3, "b"), (4, "a"))),
    (DELETED, DELETE, ((3, "b"), (4, "a"))),
    (STALE_VERSION, None, ((1, "b"),)),
]
ONE_LOAD = [
    (EMPTY, None, ((3, "b"),)),
    (LOADED, None, ((3, "b"),)),
    (LOADED, None, ((3, "a"),)),
]
SCENARIOS = [Scenario(*some, OPS, max_ops=2, load_crashes=2, stream_crashes=1) for some in STARTS_AND_LOADS]
SCENARIOS += [Scenario(*some, OPS, max_ops=3, load_crashes=1, stream_crashes=1) for some in ONE_LOAD[:2]]
SCENARIOS += [Scenario(*some, OPS, max_ops=2, load_crashes=2, stream_crashes=2) for some in ONE_LOAD[1:]]

# With one crash a load comes to its end after the late insert, and so sees to it.
SCENARIOS.append(Scenario(LATE, None, ((3, "b"), (4, "a")), OPS, max_ops=2, load_crashes=1, stream_crashes=1))


def named(scenario: Scenario) -> str:
    starts = {EMPTY: "empty", LOADED: "loaded", STREAMED: "streamed", DELETED: "deleted"}
    starts |= {STALE_VERSION: "stale", LATE: "late"}
    loads = "+".join(f"{event}{content}" for event, content in scenario.loads)
    crashes = f"{scenario.load_crashes}+{scenario.stream_crashes}"
    return f"{starts[scenario.start]}-{loads}-{scenario.max_ops}ops-{crashes}crashes"


@pytest.mark.parametrize("scenario", SCENARIOS, ids=named)
def test_every_interleaving_with_crashes_and_recovery_ends_right(scenario: Scenario) -> None:
    counted = Walk(PROTOCOL, scenario).count()
    sys.stdout.write(f"{counted.interleavings:,} interleavings in {counted.states:,} states\n")
    assert counted.broken is None
    assert counted.interleavings > 10**10


def test_the_walks_meet_every_action_and_every_repair() -> None:
    labels: set[str] = set()
    for start, owner, loads in STARTS_AND_LOADS:
        walk = Walk(PROTOCOL, Scenario(start, owner, loads, OPS, max_ops=1, load_crashes=1, stream_crashes=0))
        walk.count()
        labels |= {label.rsplit(": ", 1)[-1] for label in walk.labels}
    assert {action.name for action in Action} | {repair.name for repair in Repair} <= labels


# the protocol with one thing wrong


Step = TypeVar("Step")


def without(steps: tuple[Step, ...], step: Step) -> tuple[Step, ...]:
    return tuple(other for other in steps if other is not step)


def moved(steps: tuple[Step, ...], step: Step, *, before: Step) -> tuple[Step, ...]:
    at = steps.index(before)
    return (*without(steps[:at], step), step, *without(steps[at:], step))


def deviating(name: str) -> Protocol:
    return replace(PROTOCOL, deviations=frozenset({name}))


def writing(action: Action, steps: tuple[LoadStep, ...]) -> Protocol:
    return replace(PROTOCOL, writes={**WRITE_STEPS, action: steps})


def deletion_first(state: LoadState | None, found: Found) -> Repair:
    return Repair.REMOVE if found.marked and found.deleted else settle(state, found)


def scenario(start: Store, *loads: tuple[int, str], ops: int = 1, load_crashes: int = 0) -> Scenario:
    return Scenario(start, None, loads, OPS, max_ops=ops, load_crashes=load_crashes, stream_crashes=0)


INSERT = scenario(EMPTY, (3, "b"))
REPLACE = scenario(LOADED, (3, "b"))
INSERT_DIES = scenario(EMPTY, (3, "b"), load_crashes=1)
REPLACE_DIES = scenario(LOADED, (3, "b"), load_crashes=1)
BUMP_DIES = scenario(LOADED, (3, "a"), load_crashes=1)
LATE_INSERT = scenario(LATE, (3, "b"))
INSERT_REPLACE = scenario(EMPTY, (3, "b"), (4, "c"))
TWO_OPS = scenario(LOADED, (3, "b"), ops=2)

OVERWRITTEN = "the stream's document is overwritten"
LOST = "the stream's document is lost"
BACK = "a deleted user is back"
UNVERSIONED = "a loaded document has no version"

MUTATIONS = {
    "upsert drops no version before its write": (
        replace(PROTOCOL, upsert=without(UPSERT_STEPS, StreamStep.DROP_VERSION)),
        REPLACE,
        OVERWRITTEN,
    ),
    "upsert drops no version after its write": (
        replace(PROTOCOL, upsert=without(UPSERT_STEPS, StreamStep.DROP_VERSION_AGAIN)),
        INSERT,
        "the stream's document has a version",
    ),
    "upsert does not write again": (deviating("no repeat"), INSERT_REPLACE, OVERWRITTEN),
    "upsert forgets the deletion first": (
        replace(PROTOCOL, upsert=moved(UPSERT_STEPS, StreamStep.FORGET_DELETED, before=UPSERT_STEPS[0])),
        replace(INSERT, start=DELETED, owner=DELETE),
        BACK,
    ),
    "upsert never forgets the deletion": (
        replace(PROTOCOL, upsert=without(UPSERT_STEPS, StreamStep.FORGET_DELETED)),
        replace(INSERT, start=DELETED, owner=DELETE),
        "untidy: a deletion is left recorded",
    ),
    "delete records nothing": (
        replace(PROTOCOL, delete=without(DELETE_STEPS, StreamStep.RECORD_DELETED)),
        INSERT,
        BACK,
    ),
    "delete records last": (
        replace(PROTOCOL, delete=(*without(DELETE_STEPS, StreamStep.RECORD_DELETED), StreamStep.RECORD_DELETED)),
        INSERT,
        BACK,
    ),
    "a load leaves late inserts": (replace(PROTOCOL, late=()), LATE_INSERT, UNVERSIONED),
    "delete drops no version": (
        replace(PROTOCOL, delete=without(DELETE_STEPS, StreamStep.DROP_VERSION)),
        INSERT,
        "untidy: a version is left without document",
    ),
    "old content is not logged": (
        writing(Action.REPLACE, without(WRITE_STEPS[Action.REPLACE], LoadStep.LOG_OLD)),
        REPLACE,
        LOST,
    ),
    "old content is logged after the write": (
        writing(Action.REPLACE, moved(WRITE_STEPS[Action.REPLACE], LoadStep.WRITE_DOCUMENT, before=LoadStep.LOG_OLD)),
        REPLACE_DIES,
        "a loaded document is lost",
    ),
    "version is written before the replaced document": (
        writing(
            Action.REPLACE, moved(WRITE_STEPS[Action.REPLACE], LoadStep.WRITE_VERSION, before=LoadStep.WRITE_DOCUMENT)
        ),
        REPLACE_DIES,
        "content and version do not belong together",
    ),
    "an insert leaves the entry of no document": (
        writing(Action.INSERT, without(WRITE_STEPS[Action.INSERT], LoadStep.DROP_STALE)),
        scenario(STALE_VERSION, (3, "b")),
        "a loaded document is lost",
    ),
    "an insert drops its own entry": (
        writing(Action.INSERT, (LoadStep.WRITE_DOCUMENT, LoadStep.WRITE_VERSION, LoadStep.DROP_STALE)),
        INSERT,
        "a loaded document is lost",
    ),
    "an insert writes no version": (
        writing(Action.INSERT, without(WRITE_STEPS[Action.INSERT], LoadStep.WRITE_VERSION)),
        INSERT,
        "a loaded document is lost",
    ),
    "what is inserted again stays in the log": (
        replace(PROTOCOL, again=without(INSERT_AGAIN_STEPS, LoadStep.FORGET_LOGGED)),
        scenario(LOADED, (3, "b"), ops=3),
        BACK,
    ),
    "what is inserted again leaves the log late": (
        replace(PROTOCOL, again=moved(INSERT_AGAIN_STEPS, LoadStep.WRITE_DOCUMENT, before=LoadStep.FORGET_LOGGED)),
        scenario(LOADED, (3, "b"), ops=3, load_crashes=1),
        BACK,
    ),
    "version is written after settling found what is there": (
        deviating("version is written late"),
        INSERT,
        "the stream's document has a version",
    ),
    "version is upserted": (deviating("version is upserted"), REPLACE, OVERWRITTEN),
    "bump names its own load": (deviating("bump names its load"), BUMP_DIES, UNVERSIONED),
    "replaces whatever is there": (deviating("replaces whatever is there"), REPLACE, OVERWRITTEN),
    "settling looks for no deletion": (
        replace(PROTOCOL, settle=without(SETTLE_STEPS, SettleStep.FIND_DELETED)),
        INSERT,
        BACK,
    ),
    "settling looks for no version": (
        replace(PROTOCOL, settle=without(SETTLE_STEPS, SettleStep.FIND_VERSION)),
        INSERT,
        "a loaded document is lost",
    ),
    "settling looks for no marker": (
        replace(PROTOCOL, settle=without(SETTLE_STEPS, SettleStep.FIND_MARKED)),
        INSERT,
        UNVERSIONED,
    ),
    "settling repairs no document": (
        replace(PROTOCOL, settle=without(SETTLE_STEPS, SettleStep.REPAIR_DOCUMENT)),
        INSERT,
        BACK,
    ),
    "settling repairs no version": (
        replace(PROTOCOL, settle=without(SETTLE_STEPS, SettleStep.REPAIR_VERSION)),
        replace(INSERT, alphabet=("s",)),
        "the stream's document has a version",
    ),
    "settling repairs what is unmarked": (deviating("repairs what is unmarked"), INSERT, LOST),
    "settling looks at the deletion before the log": (replace(PROTOCOL, decide=deletion_first), TWO_OPS, LOST),
    "settling records no check": (
        replace(PROTOCOL, settle=without(SETTLE_STEPS, SettleStep.RECORD_CHECKED)),
        INSERT_DIES,
        UNVERSIONED,
    ),
    "marker goes before the check is recorded": (
        replace(PROTOCOL, settle=moved(SETTLE_STEPS, SettleStep.UNMARK, before=SettleStep.RECORD_CHECKED)),
        INSERT_DIES,
        UNVERSIONED,
    ),
    "log goes before the repair": (
        replace(PROTOCOL, settle=moved(SETTLE_STEPS, SettleStep.FORGET_OLD, before=SettleStep.REPAIR_DOCUMENT)),
        REPLACE,
        OVERWRITTEN,
    ),
    "load is done before the marker goes": (
        replace(PROTOCOL, settle=moved(SETTLE_STEPS, SettleStep.RECORD_DONE, before=SettleStep.UNMARK)),
        INSERT_DIES,
        "a marker is left",
    ),
    "nobody recovers a dead load": (deviating("no recovery"), INSERT_DIES, "a load is left open"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_one_thing_wrong_breaks_an_invariant(name: str) -> None:
    protocol, scenario, broken = MUTATIONS[name]
    assert Walk(PROTOCOL, scenario).count().broken is None
    trace = Walk(protocol, scenario).shortest_break()
    assert trace is not None
    sys.stdout.write("\n  ".join([f"{name}: {len(trace) - 2} steps", *trace]) + "\n")
    assert trace[-1] == broken


# what the real code may do in another way

FINDS = (SettleStep.FIND_MARKED, SettleStep.FIND_VERSION, SettleStep.FIND_DELETED)
FREEDOMS = {
    "inserts write the version first": replace(
        writing(
            Action.INSERT, moved(WRITE_STEPS[Action.INSERT], LoadStep.WRITE_VERSION, before=LoadStep.WRITE_DOCUMENT)
        ),
        again=moved(INSERT_AGAIN_STEPS, LoadStep.WRITE_VERSION, before=LoadStep.WRITE_DOCUMENT),
    ),
    "a load takes its inserts as versioned": deviating("inserts are taken as versioned"),
    "delete drops the version last": replace(
        PROTOCOL, delete=(StreamStep.RECORD_DELETED, StreamStep.REMOVE_DOCUMENT, StreamStep.DROP_VERSION)
    ),
    "no read of the deletion before inserting": replace(PROTOCOL, reads=without(READ_STEPS, LoadStep.READ_DELETED)),
    "version is repaired first": replace(
        PROTOCOL, settle=moved(SETTLE_STEPS, SettleStep.REPAIR_VERSION, before=SettleStep.REPAIR_DOCUMENT)
    ),
    **{
        "reads " + ", ".join(step.value for step in order): replace(PROTOCOL, reads=order)
        for order in permutations(READ_STEPS)
        if order != READ_STEPS
    },
    **{
        "finds " + ", ".join(step.value for step in order): replace(PROTOCOL, settle=(*order, *SETTLE_STEPS[3:]))
        for order in permutations(FINDS)
        if order != FINDS
    },
}


@pytest.mark.parametrize("name", FREEDOMS)
def test_what_may_be_done_otherwise_ends_right_too(name: str) -> None:
    for start, loads in product((EMPTY, LOADED), (((3, "b"),), ((3, "b"), (4, "c")))):
        twice = int(len(loads) == 1)
        some = Scenario(start, None, loads, ("a", "b", DELETE), max_ops=1 + twice, load_crashes=1, stream_crashes=twice)
        assert Walk(FREEDOMS[name], some).count().broken is None
