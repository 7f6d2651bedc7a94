"""What the real code does to each user, step by step, against the tables that the models enumerate; no servers."""

from __future__ import annotations

import threading
from itertools import repeat
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghsync_dagster.cdc.stream import source_reader
from ghsync_dagster.cdc.stream.batch import Batch
from ghsync_dagster.cdc.stream.fences import left_out
from ghsync_dagster.cdc.stream.repair import carry_out
from ghsync_dagster.cdc.stream.source_reader import Claim, RepairWork, SourceReader
from ghsync_dagster.domain.change import Change, Op, Position, RecordKind
from ghsync_dagster.domain.precedence import DELETE_STEPS, UPSERT_STEPS, StreamStep
from ghsync_dagster.domain.repair import (
    READING_STEPS,
    Fence,
    Outcome,
    Reading,
    RepairStep,
    StoredUser,
    cure,
    is_current,
    resolves_letters,
)
from ghsync_dagster.stores.mysql import LockedRows
from ghsync_dagster_tests.support.builders import change, delete, user
from ghsync_dagster_tests.support.cdc_parts import until
from ghsync_dagster_tests.support.traced import Traced

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from ghsync_dagster.stores.mongo.repairs import RepairRequests, RepairWriter
    from ghsync_dagster.stores.mysql import MySqlStore

Step = RepairStep | StreamStep
SERVER = "7/bin"


class _TracedStore(Traced[RepairStep]):
    """The store of repairs; what it answers is given."""

    def __init__(self, stored: Mapping[str, StoredUser] | None = None) -> None:
        super().__init__()
        self.users = self
        """What writes users: all of it in one."""
        self.outcomes: dict[str, Outcome] = {}
        self.problem = ""
        self.was_told = threading.Event()
        self.is_any_known = True
        self.while_asked: Callable[[], None] = lambda: None
        self.requested_again: set[str] = set()
        self.requests: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.kept: dict[str, Fence | None] = {}
        self._stored = stored or {}

    def open_requests(self, limit: int, leave_out: Iterable[str] = ()) -> dict[str, str]:
        found = {key: token for key, token in self.requests.items() if key not in set(leave_out)}
        found = dict(list(found.items())[:limit])
        self.while_asked()
        self.note(RepairStep.CLAIM, found)
        return found

    def has_fences(self) -> bool:
        return False

    def is_any_open(self) -> bool:
        return self.is_any_known and bool(self.requests)

    def record_problem(self, keys: Iterable[str], problem: str) -> None:
        assert list(keys) == ["1"]
        self.problem = problem
        self.was_told.set()

    def stored_users(self, keys: Iterable[str]) -> dict[str, StoredUser]:
        keys = list(keys)
        self.note(RepairStep.READ_STORED, keys)
        return {key: self._stored[key] for key in keys}

    def record_fence(self, requests: Mapping[str, str], reading: Reading, rows: Mapping[str, Any]) -> set[str]:
        assert reading.position.server == SERVER
        del rows
        self.note(RepairStep.RECORD_FENCE, requests)
        return {key for key in requests if key not in self.requested_again}

    def record_outcomes(
        self, requests: Mapping[str, str], outcome: Outcome, fences: Mapping[str, Fence | None]
    ) -> None:
        assert fences.keys() == (set() if outcome is Outcome.OVERTAKEN else requests.keys())
        self.kept |= fences
        self.note(RepairStep.RECORD_OUTCOME, requests)
        self.outcomes |= dict.fromkeys(requests, outcome)

    def record_reasons(self, reasons: Mapping[str, str]) -> None:
        self.reasons |= reasons


def expected(stored: StoredUser, *, has_row: bool) -> list[Step]:
    """The steps of one user from the tables."""
    op = cure(stored, has_row=has_row).op
    write: tuple[Step, ...] = {Op.UPSERT: UPSERT_STEPS, Op.DELETE: DELETE_STEPS}.get(op, ())
    steps: list[Step] = []
    for step in RepairStep:
        if step not in READING_STEPS:
            steps += write if step is RepairStep.WRITE else [step]
    return steps


def at(pos: int) -> Position:
    return Position(3, pos, 0, SERVER)


users = st.dictionaries(
    st.integers(1, 50).map(str),
    st.tuples(st.builds(StoredUser, st.booleans(), st.booleans(), st.booleans(), st.booleans()), st.booleans()),
    min_size=1,
)


@given(users)
def test_each_user_takes_the_steps_of_the_tables_in_their_order(found: dict[str, tuple[StoredUser, bool]]) -> None:
    store = _TracedStore({key: stored for key, (stored, _) in found.items()})
    rows = {key: user(key) for key, (_, has_row) in found.items() if has_row}
    fences: dict[str, Fence] = {}
    resolved: list[str] = []
    reading = Reading("r", at(100))
    work = RepairWork(Claim(dict.fromkeys(found, "token")), reading, rows)
    outcomes = carry_out(cast("RepairWriter", store), work, fences, resolved.extend)
    for key, (stored, has_row) in found.items():
        assert store.trace[key] == expected(stored, has_row=has_row)
        assert store.outcomes[key] is cure(stored, has_row=has_row).outcome
    assert fences == {key: Fence(reading, has_row) for key, (_, has_row) in found.items()}
    assert set(resolved) == set(found)
    assert outcomes.total() == len(found)


def test_a_row_that_the_database_refuses_leaves_the_fence_that_was_there_before() -> None:
    absent = StoredUser(document=False, marked=False, versioned=False, deleted=False)
    store = _TracedStore(dict.fromkeys("123", absent))
    store.refused = {"1", "2"}
    before = Fence(Reading("before", at(50)), True)
    fences, resolved = {"1": before}, list[str]()
    reading = Reading("r", at(100))
    work = RepairWork(Claim(dict.fromkeys("123", "token")), reading, {key: user(key) for key in "123"})
    outcomes = carry_out(cast("RepairWriter", store), work, fences, resolved.extend)
    assert fences == {"1": before, "3": Fence(reading, True)}
    assert store.kept == {"1": before, "2": None, "3": Fence(reading, True)}
    assert outcomes == {Outcome.REFUSED: 2, Outcome.WRITTEN: 1}
    assert store.reasons == dict.fromkeys("12", "validator: code 121")
    assert resolved == ["3"]


class _TracedSource:
    """A source whose rows are given, which notes that it was read."""

    def __init__(self, store: _TracedStore, locked: set[str]) -> None:
        self._store, self._locked = store, locked
        self.reads = 0
        self.reader: SourceReader | None = None

    def read_locked(self, keys: Iterable[str]) -> LockedRows | None:
        keys = list(keys)
        self.reads += 1
        if self._locked & set(keys):
            return None
        if self.reader is not None:
            # Whoever applies a record from here on notes it.
            noting = {key for claim in self.reader._claims for key in claim.requests}
            self._store.note(RepairStep.WATCH, noting & set(keys))
        self._store.note(RepairStep.READ_SOURCE, keys)
        return LockedRows({}, 7, "bin.000003", 100 + self.reads, "", 1_000)

    def close(self) -> None:
        """Nothing is open."""


def test_the_reader_claims_before_it_reads_and_leaves_locked_users_open() -> None:
    store = _TracedStore()
    store.requests = {str(key): "token" for key in range(1, 9)}
    source = _TracedSource(store, {"3"})
    reader = SourceReader(cast("RepairRequests", store), lambda: cast("MySqlStore", source), float("inf"))
    source.reader = reader
    try:
        reader.assigned({0, 1}, {0, 1})
        seen: dict[str, Position] = {}
        while len(seen) < 7:
            work = reader.next_work()
            if work is not None:
                seen |= dict.fromkeys(work.claim.requests, work.reading.position)
                for key in work.claim.requests:
                    del store.requests[key]
                reader.finished(work)
    finally:
        reader.close()
    assert "3" not in seen
    for key in seen:
        taken = store.trace[key]
        assert taken[-3:] == list(READING_STEPS)


def test_a_record_that_is_taken_while_the_store_is_asked_for_requests_has_to_be_in_the_reading() -> None:
    store = _TracedStore()
    store.requests = {"1": "token"}
    source = _TracedSource(store, set())
    reader = SourceReader(cast("RepairRequests", store), lambda: cast("MySqlStore", source))
    store.while_asked = lambda: reader.polled({0: at(500)})
    reader.assigned({0}, {0})
    assert store.was_told.wait(10)
    assert "MYSQL_URL names a server that is behind" in store.problem
    assert source.reads == 1
    assert reader.next_work() is None
    reader.close()


def test_the_end_of_the_topic_is_asked_for_again_after_a_reading_that_seemed_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(source_reader, "waits", lambda: repeat(0.01))
    store = _TracedStore()
    store.requests = {"1": "token"}
    source = _TracedSource(store, set())
    # The server has begun its binlog anew: what was taken before is no position of the new one.
    ends = iter([at(900), at(90)])
    reader = SourceReader(
        cast("RepairRequests", store), lambda: cast("MySqlStore", source), ends=lambda: ((), {0: next(ends)})
    )
    reader.assigned({0}, {0})
    until(lambda: reader.is_ready)
    reader.close()
    assert source.reads == 2


def test_nothing_is_claimed_before_the_end_of_the_topic_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_reader, "_POLL_SECONDS", 0.01)
    store = _TracedStore()
    # The request comes right after nobody was found to ask.
    store.requests, store.is_any_known = {"1": "token"}, False
    source = _TracedSource(store, set())
    reader = SourceReader(cast("RepairRequests", store), lambda: cast("MySqlStore", source))
    reader.assigned({0}, {0})
    until(lambda: store.trace["1"].count(RepairStep.CLAIM) > 2)
    assert source.reads == 0
    store.is_any_known = True
    until(lambda: reader.is_ready)
    reader.close()


def test_who_is_no_owner_reads_nothing_and_says_so() -> None:
    store = _TracedStore()
    store.requests = {"1": "token"}
    reader = SourceReader(
        cast("RepairRequests", store), lambda: cast("MySqlStore", _TracedSource(store, set())), float("inf")
    )
    reader.assigned({0}, {0, 1})
    assert store.was_told.wait(10)
    reader.close()
    assert "partitions [0] of [0, 1]" in store.problem
    assert RepairStep.READ_SOURCE not in store.trace["1"]
    assert reader.next_work() is None


class _FakeMessage:
    """A record's place; its content is decoded already."""

    def __init__(self, offset: int) -> None:
        self._offset = offset

    def partition(self) -> int:
        return 0

    def offset(self) -> int:
        return self._offset

    def __len__(self) -> int:
        return 1


def batch_of(*changes: Change) -> Batch:
    batch = Batch()
    messages: list[Any] = [_FakeMessage(offset) for offset in range(len(changes))]
    batch.add(messages, changes)
    return batch


FENCES = {"1": Fence(Reading("r", at(100), read_ms=1_000), True), "2": Fence(Reading("s", at(200)), True)}
GONE = {key: fence._replace(has_row=False) for key, fence in FENCES.items()}


def test_records_from_before_the_fence_are_left_out_and_later_ones_are_applied() -> None:
    found = left_out(
        batch_of(
            change(1, position=at(99)),
            change(1, position=at(100)),
            change(2, position=at(150)),
            change(3, position=at(1)),
        ),
        FENCES,
    )
    assert found.records == {0, 2}
    assert not found.request_again


def test_a_record_that_cannot_be_compared_is_left_out_and_asked_for_again() -> None:
    other = change(2, position=Position(3, 500, 0, "8/bin"))
    found = left_out(batch_of(change(1), other), FENCES)
    assert found.records == {0, 1}
    assert found.request_again == {"1", "2"}


def test_a_tombstone_goes_with_its_delete() -> None:
    found = left_out(
        batch_of(
            delete(1, position=at(50)),
            change(1, RecordKind.TOMBSTONE),
            delete(2, position=at(250)),
            change(2, RecordKind.TOMBSTONE),
        ),
        FENCES,
    )
    assert found.records == {0, 1}
    assert not found.request_again
    assert left_out(batch_of(change(1, RecordKind.TOMBSTONE)), FENCES).request_again == {"1"}


def test_a_truncate_keeps_the_users_that_were_read_after_it() -> None:
    truncate = change(kind=RecordKind.TRUNCATE, position=at(150))
    found = left_out(batch_of(change(3, position=at(1)), truncate), FENCES)
    assert found.keep == {1: frozenset({"2"})}
    nowhere = change(kind=RecordKind.TRUNCATE)
    found = left_out(batch_of(nowhere), FENCES)
    assert found.keep == {0: {"1", "2"}}
    assert found.request_again == {"1", "2"}


def test_a_reading_that_the_stream_has_overtaken_is_not_written() -> None:
    claim = Claim({"1": "token", "2": "token", "4": "token"})
    batch = batch_of(change(1, position=at(120)), change(2, position=at(90)), change(4))
    claim.record(batch, left_out(batch, {}))
    absent = StoredUser(document=False, marked=False, versioned=False, deleted=False)
    store = _TracedStore(dict.fromkeys(claim.requests, absent))
    outcomes = carry_out(
        cast("RepairWriter", store),
        RepairWork(claim, Reading("r", at(100)), {key: user(key) for key in claim.requests}),
        {},
        lambda _: None,
    )
    # Of user 4 nobody knows: its request stays, and the source is read again.
    assert store.outcomes == {"1": Outcome.OVERTAKEN, "2": Outcome.WRITTEN}
    assert "4" not in store.trace
    assert outcomes == {Outcome.OVERTAKEN: 1, Outcome.WRITTEN: 1}


def test_what_was_left_out_does_not_count_as_applied() -> None:
    claim = Claim({"1": "token"})
    batch = batch_of(change(1, position=at(50)))
    claim.record(batch, left_out(batch, FENCES))
    assert claim.applied == {}


def test_a_user_that_was_requested_again_gets_no_fence_and_no_write() -> None:
    stored = StoredUser(document=True, marked=False, versioned=False, deleted=False)
    store = _TracedStore({"1": stored, "2": stored})
    store.requested_again = {"1"}
    fences: dict[str, Fence] = {}
    work = RepairWork(Claim({"1": "token", "2": "token"}), Reading("r", at(100)), {"1": user("1"), "2": user("2")})
    carry_out(cast("RepairWriter", store), work, fences, lambda _: None)
    assert store.trace["1"] == [RepairStep.READ_STORED, RepairStep.RECORD_FENCE]
    assert store.outcomes == {"2": Outcome.WRITTEN}
    assert fences.keys() == {"2"}


def test_records_of_a_user_without_a_row_are_applied_as_deletes() -> None:
    batch = batch_of(
        change(1, position=at(50)),
        delete(1, position=at(60)),
        change(1, RecordKind.TOMBSTONE),
        change(1),
        change(1, position=at(150)),
    )
    found = left_out(batch, GONE)
    assert not found.records
    assert found.deletes == {0, 3}
    assert found.request_again == {"1"}
    batch.as_deletes = found.deletes
    applied = [change.op for part in batch.parts() for _, change in batch.history(part, "1")]
    assert applied == [Op.DELETE] * 4 + [Op.UPSERT]


def test_a_truncate_removes_a_user_without_a_row() -> None:
    truncate = change(kind=RecordKind.TRUNCATE, position=at(50))
    assert left_out(batch_of(truncate), GONE).keep == {0: frozenset()}
    assert left_out(batch_of(truncate), FENCES).keep == {0: {"1", "2"}}


RELAYED = Reading("r", Position(3, 100, 0, "8/bin"), "0-1-100", read_ms=1_000_000)


@pytest.mark.parametrize(
    ("gtid", "committed_ms", "included"),
    [
        ("0-1-99", 990_000, True),
        ("0-1-101", 1_000_000, None),
        # The replica would have it by then.
        ("0-1-101", 1_060_000, False),
        ("0-1-101", None, None),
        # A clock that is ahead proves nothing against a GTID.
        ("0-1-99", 1_060_000, None),
        (None, 1_060_000, None),
    ],
)
def test_a_reading_of_a_replica_goes_by_gtids_and_for_new_ones_by_time(
    gtid: str | None, committed_ms: int | None, included: bool | None
) -> None:
    assert RELAYED.includes(Position(9, 4, 0, "7/bin", gtid), committed_ms) is included


def test_a_position_without_server_and_gtid_proves_nothing_against_a_server() -> None:
    nowhere = Position(9, 9_999)
    assert is_current(RELAYED, [nowhere, None])
    assert not is_current(RELAYED, [nowhere, at(1)])


def test_letters_are_resolved_by_the_server_that_the_connector_follows() -> None:
    assert resolves_letters(Reading("r", at(100)), [None, at(90)])
    assert resolves_letters(RELAYED, [])
    assert not resolves_letters(RELAYED, [Position(3, 90, 0, SERVER, "0-1-90")])


def test_a_record_that_was_committed_after_the_reading_is_of_another_binlog() -> None:
    late = change(1, committed_ms=60_000, position=at(50))
    found = left_out(batch_of(late), FENCES)
    assert found.records == {0}
    assert found.request_again == {"1"}


def test_a_refused_record_makes_the_source_be_read_again() -> None:
    store = _TracedStore()
    reader = SourceReader(cast("RepairRequests", store), lambda: cast("MySqlStore", _TracedSource(store, set())))
    claim = Claim({"1": "token"})
    reader._claims = [claim]
    reader.record_applied(batch_of(change(1, position=at(120))), left_out(batch_of(), {}))
    reader.record_refused("1")
    reader.close()
    assert claim.applied == {"1": None}
