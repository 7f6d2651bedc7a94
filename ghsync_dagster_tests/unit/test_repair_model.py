"""Every interleaving of a repair with its source, the stream, a load, deaths and commands that come late."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ghsync_dagster.domain.change import Op
from ghsync_dagster.domain.precedence import UPSERT_STEPS, StreamStep
from ghsync_dagster.domain.repair import (
    REPAIR_STEPS,
    Cure,
    Disposition,
    Outcome,
    Overtaken,
    RepairStep,
    cure,
    disposition,
    overtaken,
)
from ghsync_dagster_tests.support.models.precedence import Doc, Store
from ghsync_dagster_tests.support.models.repair import FILES, Event, RepairProtocol, Row, Scenario, Walk

if TYPE_CHECKING:
    from ghsync_dagster.domain.change import Position
    from ghsync_dagster.domain.repair import Fence, Reading

OLD = Row(0, there=True)
STREAMED = Store(doc=Doc("s0", marked=False))
WRONG = Store(doc=Doc("wrong", marked=False))
LOAD = ((7, "loaded"),)

SCENARIOS = {
    "a document that is right": Scenario(STREAMED),
    "a document that is wrong": Scenario(WRONG),
    "no document": Scenario(),
    "no row, a document of the stream": Scenario(WRONG, row=Row(0, there=False)),
    "no row, a document of a file": Scenario(FILES, row=Row(0, there=False), owned=False),
    "no row, nothing stored, older records wait": Scenario(
        row=Row(2, there=False), transactions=1, backlog=(Event(Row(1, there=True)), Event(Row(2, there=False)))
    ),
    "older records wait": Scenario(
        STREAMED, row=Row(2, there=True), transactions=1, backlog=(Event(Row(1, there=True)), Event(Row(2, there=True)))
    ),
    "older records wait, the newest change is silent": Scenario(
        STREAMED, row=Row(2, there=True), transactions=1, backlog=(Event(Row(1, there=True)),)
    ),
    "older records wait, the newest change is a silent delete": Scenario(
        STREAMED, row=Row(2, there=False), transactions=1, backlog=(Event(Row(1, there=True)),)
    ),
    "records without a place": Scenario(STREAMED, kinds=("u?", "d?", "u-")),
    "a record that cannot be decoded": Scenario(STREAMED, transactions=2, kinds=("u!", "u", "d!")),
    "a record that cannot be decoded, the owner dies": Scenario(
        WRONG, transactions=1, kinds=("u!",), crashes=1, backlog=(Event(Row(0, there=True)),)
    ),
    "a truncate": Scenario(STREAMED, transactions=2, kinds=("t", "u")),
    "no row, nothing stored, a truncate waits": Scenario(
        row=Row(2, there=False),
        transactions=1,
        kinds=("u", "t"),
        backlog=(Event(Row(1, there=True)), Event(Row(2, there=False), truncates=True)),
    ),
    "no row, a document of a file, a truncate waits": Scenario(
        FILES,
        row=Row(1, there=False),
        owned=False,
        transactions=1,
        kinds=("u",),
        backlog=(Event(Row(1, there=False), truncates=True),),
    ),
    "a truncate without a place": Scenario(STREAMED, transactions=2, kinds=("t?", "u?", "u")),
    "the owner dies": Scenario(
        STREAMED, row=Row(1, there=True), transactions=1, crashes=1, backlog=(Event(Row(1, there=True)),)
    ),
    "the owner dies twice": Scenario(WRONG, transactions=1, kinds=("u", "d-"), crashes=2),
    "the owner dies, records without a place": Scenario(STREAMED, transactions=1, kinds=("u?", "d?"), crashes=1),
    "a command comes late": Scenario(WRONG, transactions=2, kinds=("u", "d"), lates=1),
    "a command comes late, the row is gone": Scenario(
        STREAMED,
        row=Row(1, there=False),
        transactions=1,
        kinds=("u", "u-"),
        lates=1,
        backlog=(Event(Row(1, there=False)),),
    ),
    "the server that is read is behind": Scenario(
        STREAMED, transactions=1, kinds=("u", "d"), backlog=(Event(Row(0, there=True)),), is_replica=True
    ),
    "the user is requested again": Scenario(WRONG, transactions=1, kinds=("u", "u-"), requests=1),
    "the user is requested again, the owner dies": Scenario(
        STREAMED,
        row=Row(1, there=True),
        transactions=1,
        kinds=("u-",),
        crashes=1,
        requests=1,
        backlog=(Event(Row(1, there=True)),),
    ),
    "a load alongside": Scenario(WRONG, transactions=1, kinds=("u", "d"), loads=LOAD),
    "a load alongside, the row is gone": Scenario(
        WRONG, row=Row(0, there=False), transactions=1, kinds=("u",), loads=LOAD
    ),
    "a load alongside, a file's user": Scenario(
        FILES, row=Row(0, there=False), owned=False, transactions=1, kinds=("u", "d-"), loads=LOAD
    ),
    "a load alongside, nothing stored": Scenario(
        row=Row(0, there=False), owned=False, transactions=1, kinds=("u", "d"), loads=LOAD
    ),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_order_of_the_steps_breaks_an_invariant(name: str, without_gc: None) -> None:
    del without_gc
    walk = Walk(RepairProtocol(), SCENARIOS[name])
    counted = walk.count()
    assert counted.broken is None, walk.shortest_break()
    assert counted.interleavings > 1


def without(step: RepairStep) -> RepairProtocol:
    return RepairProtocol(steps=tuple(one for one in REPAIR_STEPS if one is not step))


def ordered(*steps: RepairStep) -> RepairProtocol:
    return RepairProtocol(steps=steps)


def deviating(name: str) -> RepairProtocol:
    return RepairProtocol(deviations=frozenset({name}))


def _pos(at: Position) -> int:
    return at.pos


def _end(fence: Fence) -> int:
    return fence.reading.position.pos


def _of(is_included: bool) -> Disposition:
    return Disposition.LEAVE_OUT if is_included else Disposition.APPLY


def _not_deleted(what: Disposition) -> Disposition:
    return Disposition.LEAVE_OUT if what.deletes else what


def _if_certain(reading: Reading, applied: Position | None) -> Overtaken:
    found = overtaken(reading, applied)
    return Overtaken.NO if found is Overtaken.UNKNOWN else found


C, N, S, T, F, W, R = REPAIR_STEPS

MUTATIONS: dict[str, tuple[RepairProtocol, str]] = {
    "no fence": (without(F), "older records wait, the newest change is silent"),
    "the fence after the write": (ordered(C, N, S, T, W, F, R), "the owner dies"),
    "the fence after the outcome": (ordered(C, N, S, T, W, R, F), "older records wait"),
    "the outcome before the write": (ordered(C, N, S, T, F, R, W), "the owner dies twice"),
    "the outcome before the fence": (ordered(C, N, S, T, R, F, W), "a document that is wrong"),
    "nothing is written": (without(W), "a document that is wrong"),
    "the source is read before the claim": (ordered(S, C, N, T, F, W, R), "a document that is right"),
    "what is stored is not read": (without(T), "no row, a document of a file"),
    "the outcome twice, the first before the write": (ordered(C, N, S, T, F, R, W, R), "the owner dies twice"),
    "the claim twice, the second after the source is read": (
        ordered(C, N, S, C, T, F, W, R),
        "the user is requested again",
    ),
    "noting begins twice, the second time after the source is read": (
        ordered(C, N, S, N, T, F, W, R),
        "a document that is right",
    ),
    "nothing is noted": (without(N), "a document that is right"),
    "noting begins after the source is read": (ordered(C, S, N, T, F, W, R), "a document that is right"),
    "what was taken is kept before noting begins": (
        deviating("what was taken is kept before noting begins"),
        "the server that is read is behind",
    ),
    "a dead letter is not noted": (deviating("a dead letter is not noted"), "a record that cannot be decoded"),
    "a truncate spares a user without a row": (
        RepairProtocol(
            disposition=lambda fence, op, at: disposition(
                fence._replace(has_row=fence.has_row or op is Op.TRUNCATE), op, at
            )
        ),
        "no row, a document of a file, a truncate waits",
    ),
    "what a user without a row had is left out": (
        RepairProtocol(disposition=lambda fence, op, at: _not_deleted(disposition(fence, op, at))),
        "no row, nothing stored, a truncate waits",
    ),
    "the source is read without locks": (deviating("reads without locks"), "a document that is right"),
    "the place is read before the rows": (deviating("reads the place before the row"), "a document that is right"),
    "the outcome closes a newer request": (deviating("closes whatever is open"), "the user is requested again"),
    "the fence is lost with the process": (deviating("the fence is kept in memory"), "the owner dies"),
    "a late command is not healed": (
        deviating("a late command is not healed"),
        "a command comes late, the row is gone",
    ),
    "a record at the place counts as included": (
        RepairProtocol(disposition=lambda fence, _op, at: _of(at is None or _pos(at) <= _end(fence))),
        "a document that is right",
    ),
    "places are compared the wrong way round": (
        RepairProtocol(
            disposition=lambda fence, _op, at: _of(at is not None and _pos(at) >= fence.reading.position.pos)
        ),
        "older records wait",
    ),
    "a record without a place is applied": (
        RepairProtocol(disposition=lambda fence, _op, at: _of(at is not None and _pos(at) < _end(fence))),
        "records without a place",
    ),
    "a record without a place is left out permanently": (
        RepairProtocol(disposition=lambda fence, _op, at: _of(at is None or _pos(at) < _end(fence))),
        "records without a place",
    ),
    "a deletion from before the reading is left out": (
        RepairProtocol(disposition=lambda fence, _op, at: disposition(fence._replace(has_row=True), Op.DELETE, at)),
        "no row, nothing stored, older records wait",
    ),
    "a server that is behind is believed": (
        RepairProtocol(is_current=lambda _reading, _seen: True),
        "the server that is read is behind",
    ),
    "a user that was requested again is written without a fence": (
        deviating("writes without a fence"),
        "the user is requested again, the owner dies",
    ),
    "what was applied meanwhile is not looked at": (
        RepairProtocol(overtaken=lambda _reading, _applied: Overtaken.NO),
        "a document that is right",
    ),
    "what cannot be compared counts as included": (
        RepairProtocol(overtaken=_if_certain),
        "records without a place",
    ),
    "a file's user is removed": (
        RepairProtocol(
            cure=lambda _stored, *, has_row: (
                Cure(Op.UPSERT, Outcome.WRITTEN) if has_row else Cure(Op.DELETE, Outcome.REMOVED)
            )
        ),
        "no row, a document of a file",
    ),
    "what the stream left over is taken for a file's": (
        RepairProtocol(
            cure=lambda stored, *, has_row: (
                cure(stored, has_row=True) if has_row else Cure(Op.SKIP, Outcome.LEFT_TO_FILES)
            )
        ),
        "no row, a document of the stream",
    ),
    "a removed user is not recorded as deleted": (
        RepairProtocol(delete=(StreamStep.DROP_VERSION, StreamStep.REMOVE_DOCUMENT)),
        "a load alongside, the row is gone",
    ),
    "the version entry is not dropped again": (
        RepairProtocol(upsert=tuple(step for step in UPSERT_STEPS if step is not StreamStep.DROP_VERSION_AGAIN)),
        "a load alongside, nothing stored",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_single_deviation_breaks_an_invariant(name: str, without_gc: None) -> None:
    del without_gc
    protocol, scenario = MUTATIONS[name]
    assert Walk(protocol, SCENARIOS[scenario]).count().broken is not None


def test_every_step_is_taken_in_some_scenario() -> None:
    walk = Walk(RepairProtocol(), SCENARIOS["a document that is wrong"])
    walk.count()
    assert {f"repair: {step.name}" for step in REPAIR_STEPS} <= walk.labels
