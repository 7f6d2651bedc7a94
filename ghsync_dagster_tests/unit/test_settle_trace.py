"""What settling really does to each key, step by step, against the table that the model enumerates; no servers."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghsync_dagster.batch.settle import recover, settle_load
from ghsync_dagster.domain.errors import LeaseLostError
from ghsync_dagster.domain.precedence import (
    OF_EACH_KEY,
    SETTLE_STEPS,
    Found,
    LoadState,
    Repair,
    SettleStep,
    settle,
    steps_left,
)
from ghsync_dagster.domain.user import MARKER_FIELD
from ghsync_dagster.stores.mongo.users import StoredVersion
from ghsync_dagster_tests.support.traced import TracedLease

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ghsync_dagster.stores.mongo.writer import UserWriter

LOAD = "load"
RUNNING = LoadState.RUNNING
FINDS_BY_KEY = [SettleStep.FIND_VERSION, SettleStep.FIND_DELETED]
ENDINGS = [step for step in SETTLE_STEPS if step not in OF_EACH_KEY]


class Key(NamedTuple):
    """What is stored of a key: its document's content and marker, whose entry it has, its deletion, its old content."""

    content: str | None = None
    marked: bool = False
    load: str | None = None
    deleted: bool = False
    old: str | None = None

    @property
    def found(self) -> Found:
        """What a load finds of it."""
        return Found(self.marked, self.old is not None and self.marked, self.load == LOAD, self.deleted)


class _TracedStore:
    """Keeps keys, and notes which step each command is."""

    def __init__(self, keys: dict[str, Key], state: LoadState, lease: TracedLease) -> None:
        self.keys, self.state, self.lease = dict(keys), state, lease
        self.trace: dict[str, list[SettleStep]] = defaultdict(list)
        self.endings: list[SettleStep] = []
        self.store = self
        """What is read: a writer and its store in one."""

    def _wrote(self, step: SettleStep, keys: Iterable[str]) -> None:
        self.lease.allow()
        assert not (self.endings and step in OF_EACH_KEY)
        for key in keys:
            self.trace[key].append(step)

    def _ended(self, step: SettleStep) -> None:
        self.lease.allow()
        self.endings.append(step)

    def marked(self) -> Iterator[dict[str, Any]]:
        for name, key in list(self.keys.items()):
            if key.marked:
                self.trace[name].append(SettleStep.FIND_MARKED)
                yield {"user_id": name}

    def versions_of_load(self, load: str) -> Iterator[str]:
        yield from [name for name, key in self.keys.items() if key.load == load]

    def users_by_id(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        for name in keys:
            if not self.keys[name].marked:
                self.trace[name].append(SettleStep.FIND_MARKED)
        stored = {name: self.keys[name] for name in keys if self.keys[name].content is not None}
        return {name: {MARKER_FIELD: "x"} if key.marked else {} for name, key in stored.items()}

    def undo_by_id(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        old = {name: self.keys[name].old for name in keys}
        return {name: {"user_id": name, "content": content} for name, content in old.items() if content is not None}

    def versions_by_id(self, keys: Sequence[str]) -> dict[str, StoredVersion]:
        for name in keys:
            self.trace[name].append(SettleStep.FIND_VERSION)
        loads = {name: self.keys[name].load for name in keys}
        return {name: StoredVersion("", 1, load) for name, load in loads.items() if load is not None}

    def deleted_among(self, keys: Sequence[str]) -> set[str]:
        for name in keys:
            self.trace[name].append(SettleStep.FIND_DELETED)
        return {name for name in keys if self.keys[name].deleted}

    def any_deleted(self) -> bool:
        return any(key.deleted for key in self.keys.values())

    def count_marked(self) -> int:
        return sum(key.marked for key in self.keys.values())

    def put_back(self, old: Iterable[dict[str, Any]]) -> None:
        for user in old:
            self._wrote(SettleStep.REPAIR_DOCUMENT, [user["user_id"]])
            key = self.keys[user["user_id"]]
            if key.marked:
                self.keys[user["user_id"]] = key._replace(content=user["content"], marked=False)

    def delete_marked(self, keys: Iterable[str]) -> int:
        for name in keys:
            self._wrote(SettleStep.REPAIR_DOCUMENT, [name])
            if self.keys[name].marked:
                self.keys[name] = self.keys[name]._replace(content=None, marked=False)
        return 0

    def drop_versions(self, keys: Iterable[str]) -> set[str]:
        for name in keys:
            self._wrote(SettleStep.REPAIR_VERSION, [name])
            self.keys[name] = self.keys[name]._replace(load=None)
        return set(keys)

    def record_load(self, load: str, *, state: str, **_: object) -> None:
        assert load == LOAD
        ends = {LoadState.CHECKED: SettleStep.RECORD_CHECKED, LoadState.DONE: SettleStep.RECORD_DONE}
        self._ended(ends[LoadState(state)])
        self.state = LoadState(state)

    def unmark_all(self) -> int:
        self._ended(SettleStep.UNMARK)
        marked = [name for name, key in self.keys.items() if key.marked]
        self.keys |= {name: self.keys[name]._replace(marked=False) for name in marked}
        return len(marked)

    def clear_undo(self) -> None:
        # A recovery forgets once more at its end, what came too late.
        if self.state is not LoadState.DONE:
            self._ended(SettleStep.FORGET_OLD)
        self.keys = {name: key._replace(old=None) for name, key in self.keys.items()}

    def unfinished_loads(self) -> list[dict[str, Any]]:
        return [] if self.state is LoadState.DONE else [{"_id": LOAD, "state": self.state.value}]


def settled(key: Key) -> Key:
    """Return what is stored of a key afterwards, by the decision alone."""
    repair = settle(RUNNING, key.found)
    if repair is Repair.PUT_BACK:
        key = key._replace(content=key.old)
    if repair is Repair.REMOVE:
        key = key._replace(content=None)
    if repair is Repair.DROP_VERSION or (repair is Repair.REMOVE and key.load == LOAD):
        key = key._replace(load=None)
    return key._replace(marked=False, old=None)


def steps_of(key: Key) -> list[SettleStep]:
    """Return the steps that a key takes, from the table."""
    if not key.marked and key.load != LOAD:
        return []
    repair = settle(RUNNING, key.found)
    taken = {SettleStep.FIND_MARKED, *FINDS_BY_KEY}
    if repair in (Repair.PUT_BACK, Repair.REMOVE):
        taken.add(SettleStep.REPAIR_DOCUMENT)
    if key.load == LOAD and repair in (Repair.REMOVE, Repair.DROP_VERSION):
        taken.add(SettleStep.REPAIR_VERSION)
    return [step for step in SETTLE_STEPS if step in taken]


def possible(key: Key) -> bool:
    return not (key.marked and key.content is None)


a_key = st.builds(
    Key,
    st.sampled_from([None, "a", "b"]),
    st.booleans(),
    st.sampled_from([None, LOAD, "other"]),
    st.booleans(),
    st.sampled_from([None, "old"]),
).filter(possible)
some_keys = st.dictionaries(st.integers(1, 2_500).map(str), a_key, max_size=40)


@given(some_keys)
def test_each_key_takes_the_steps_of_the_table_and_ends_as_decided(keys: dict[str, Key]) -> None:
    lease = TracedLease()
    store = _TracedStore(keys, RUNNING, lease)
    told: list[SettleStep] = []
    settle_load(cast("UserWriter", store), LOAD, expected_marked=None, on_step=told.append)
    assert {name: store.trace[name] for name in keys} == {name: steps_of(key) for name, key in keys.items()}
    assert store.keys == {name: settled(key) for name, key in keys.items()}
    assert store.endings == told == ENDINGS


@given(some_keys, st.sampled_from([LoadState.RUNNING, LoadState.CHECKED]), st.integers(0, 12))
def test_a_load_that_dies_anywhere_is_settled_by_the_next_to_the_same_end(
    keys: dict[str, Key], state: LoadState, asks: int
) -> None:
    lease = TracedLease(asks)
    store = _TracedStore(keys, state, lease)
    try:
        recover(cast("UserWriter", store))
    except LeaseLostError:
        store.endings, store.lease = [], TracedLease()
        left = steps_left(store.state)
        recover(cast("UserWriter", store))
        assert store.endings == [step for step in left if step not in OF_EACH_KEY]
    kept = state is LoadState.CHECKED
    as_is = {name: key._replace(marked=False, old=None) for name, key in keys.items()}
    assert store.keys == (as_is if kept else {name: settled(key) for name, key in keys.items()})
    assert store.state is LoadState.DONE


@pytest.mark.parametrize(("expected", "deleted", "looks"), [(2, False, False), (3, False, True), (2, True, True)])
def test_keys_are_looked_at_unless_all_are_marked_and_nothing_was_deleted(
    expected: int, *, deleted: bool, looks: bool
) -> None:
    lease = TracedLease()
    keys = {"1": Key("a", marked=True, load=LOAD), "2": Key("b", marked=True, load=LOAD)}
    store = _TracedStore(keys | {"3": Key(deleted=deleted)}, RUNNING, lease)
    unmarked = settle_load(cast("UserWriter", store), LOAD, expected_marked=expected, on_step=print)
    assert unmarked == 2
    assert bool(store.trace) == looks
    assert store.endings == ENDINGS
