"""What planning really does to each key, step by step, against the tables that the model enumerates; no servers."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from ghsync_dagster.batch.plan import LEFT_TO_SPARK, Plan, make_plan, plan_missing
from ghsync_dagster.domain.precedence import (
    INSERT_AGAIN_STEPS,
    PLAN_STEPS,
    READ_STEPS,
    WRITE_STEPS,
    Action,
    Incoming,
    LoadStep,
    Stored,
    Version,
    classify,
    classify_missing,
)
from ghsync_dagster.domain.user import MARKER_FIELD, USER_FIELDS
from ghsync_dagster.stores.mongo.users import StoredVersion
from ghsync_dagster_tests.support.traced import TracedLease

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ghsync_dagster.stores.mongo.writer import UserWriter

LOAD = "load"
AT = "2015-01-01T15:00:00Z"
INCOMING = "b"
EVENT = 2
READS = list(READ_STEPS)


class Key(NamedTuple):
    """What is stored of a key."""

    content: str | None = None
    marked: bool = False
    event: int | None = None
    load: str = "other"
    deleted: bool = False
    replaced: bool = False

    @property
    def is_late(self) -> bool:
        """Whether a dead load's executor wrote the document."""
        return self.marked and self.event is None

    @property
    def stored(self) -> Stored:
        """What a load reads of it."""
        content = None if self.content is None else content_of(self.content)
        return Stored(content, None if self.event is None else Version(AT, self.event), self.deleted)


class _TracedStore:
    """Notes which step each command is, by key; what it answers is given."""

    def __init__(self, keys: dict[str, Key], lease: TracedLease) -> None:
        self.keys, self.lease = keys, lease
        self.trace: dict[str, list[LoadStep]] = defaultdict(list)
        self.is_again = False
        self.store = self
        """What is read: a writer and its store in one."""

    def _wrote(self, step: LoadStep, keys: Iterable[str]) -> None:
        self.lease.allow()
        for key in keys:
            self.trace[key].append(step)

    def _read(self, step: LoadStep, keys: Sequence[str]) -> list[tuple[str, Key]]:
        for key in keys:
            self.trace[key].append(step)
        return [(key, self.keys[key]) for key in keys]

    def is_empty(self) -> bool:
        return False

    def any_deleted(self) -> bool:
        return True

    def users_by_id(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        found = self._read(LoadStep.READ_DOCUMENT, keys)
        return {
            name: user(name, key.content) | ({MARKER_FIELD: "x"} if key.marked else {})
            for name, key in found
            if key.content is not None
        }

    def versions_by_id(self, keys: Sequence[str]) -> dict[str, StoredVersion]:
        found = self._read(LoadStep.READ_VERSION, keys)
        return {name: StoredVersion(AT, key.event, key.load) for name, key in found if key.event is not None}

    def deleted_among(self, keys: Sequence[str]) -> set[str]:
        return {name for name, key in self._read(LoadStep.READ_DELETED, keys) if key.deleted}

    def undo_by_id(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        return {name: user(name, "old") for name in keys if self.keys[name].replaced}

    def delete_marked(self, keys: Iterable[str]) -> int:
        keys = list(keys)
        if self.is_again:
            self._wrote(LoadStep.REMOVE_WRONG, keys)
        else:
            self._wrote(LoadStep.REMOVE_LATE, keys)
        return len(keys)

    def drop_versions(self, keys: Iterable[str]) -> set[str]:
        self._wrote(LoadStep.DROP_STALE, keys)
        return set(keys)

    def forget_undo(self, keys: Iterable[str]) -> None:
        self._wrote(LoadStep.FORGET_LOGGED, keys)

    def write_undo(self, old: Iterable[dict[str, Any]], load: str) -> None:
        assert load == LOAD
        self._wrote(LoadStep.LOG_OLD, [found["user_id"] for found in old])

    def replace_unchanged(self, changes: Iterable[tuple[dict[str, Any], dict[str, Any]]]) -> None:
        changes = list(changes)
        for old, new in changes:
            assert (old["login"], new) == (self.keys[new["user_id"]].content, user(new["user_id"], INCOMING))
        self._wrote(LoadStep.WRITE_DOCUMENT, [new["user_id"] for _, new in changes])

    def move_versions(self, entries: Iterable[tuple[str, str, int]], load: str | None) -> None:
        entries = list(entries)
        for key, *version in entries:
            is_bump = self.keys[key].content == INCOMING
            assert (version, load) == ([AT, EVENT], None if is_bump else LOAD)
        self._wrote(LoadStep.WRITE_VERSION, [key for key, *_ in entries])


def user(key: str, content: str | None) -> dict[str, Any]:
    return dict.fromkeys(USER_FIELDS, content) | {"user_id": key}


def content_of(content: str) -> tuple[str, ...]:
    return (content,) * len(USER_FIELDS[1:])


def planned(store: _TracedStore, *, again: bool) -> Plan:
    """Plan the users of all keys, from a Parquet folder as ``flatten`` leaves it."""
    store.is_again = again
    with TemporaryDirectory() as folder:
        users, target = Path(folder, "users"), Path(folder, "plan")
        users.mkdir()
        rows = [user(key, INCOMING) | {"created_at": AT, "event_id": EVENT} for key in store.keys]
        fields = [(name, pa.string()) for name in (*USER_FIELDS, "created_at")]
        schema = pa.schema([*fields, ("event_id", pa.int64())])
        pq.write_table(pa.Table.from_pylist(rows, schema), users / "part-0.parquet")
        make = plan_missing if again else make_plan
        plan = make(cast("UserWriter", store), users, target, LOAD)
        plan.insert_path = Path("-".join(pq.read_table(plan.insert_path).column("user_id").to_pylist()))
    return plan


a_key = st.builds(
    Key,
    st.sampled_from([None, "a", INCOMING]),
    st.booleans(),
    st.sampled_from([None, 1, EVENT, 3]),
    st.sampled_from(["other", LOAD]),
    st.booleans(),
    st.booleans(),
).map(lambda key: key._replace(marked=key.marked and key.content is not None))
some_keys = st.dictionaries(st.integers(1, 99).map(str), a_key, min_size=1, max_size=30)


def steps_of(key: Key, action: Action) -> list[LoadStep]:
    """Return the steps that planning takes for a key, from the tables."""
    steps = [step for step in WRITE_STEPS.get(action, ()) if action is not Action.INSERT or step not in LEFT_TO_SPARK]
    begins = [step for step in PLAN_STEPS if step is not LoadStep.REMOVE_LATE or key.is_late]
    return begins + [step for step in steps if step is not LoadStep.DROP_STALE or key.event is not None]


@given(some_keys)
def test_each_key_takes_the_steps_of_its_action_in_their_order(keys: dict[str, Key]) -> None:
    store = _TracedStore(keys, TracedLease())
    plan = planned(store, again=False)
    found = {name: key.stored._replace(content=None) if key.is_late else key.stored for name, key in keys.items()}
    incoming = Incoming(content_of(INCOMING), Version(AT, EVENT))
    # Their own id is one of the fields.
    actions = {name: classify(stored, incoming) for name, stored in found.items()}
    assert {name: store.trace[name] for name in keys} == {
        name: steps_of(key, actions[name]) for name, key in keys.items()
    }
    assert [name for name in keys if LoadStep.REMOVE_LATE in store.trace[name]] == [
        name for name, key in keys.items() if key.is_late
    ]
    taken = list(actions.values())
    assert (plan.inserts, plan.replaced, plan.confirmed) == tuple(map(taken.count, WRITE_ORDER))
    assert plan.insert_path.name == "-".join(name for name, action in actions.items() if action is Action.INSERT)
    assert plan.left == {action.value: taken.count(action) for action in taken if action.is_skip}


WRITE_ORDER = (Action.INSERT, Action.REPLACE, Action.BUMP)


@given(some_keys)
def test_each_key_that_is_missing_takes_the_steps_of_a_second_insert(keys: dict[str, Key]) -> None:
    store = _TracedStore(keys, TracedLease())
    plan = planned(store, again=True)
    actions = {name: classify_missing(key.stored, marked=key.marked) for name, key in keys.items()}
    conditions = {LoadStep.REMOVE_WRONG: "content", LoadStep.DROP_STALE: "event"}
    for name, key in keys.items():
        steps = [step for step in INSERT_AGAIN_STEPS if step not in LEFT_TO_SPARK]
        due = [step for step in steps if getattr(key, conditions.get(step, "marked")) is not None]
        assert store.trace[name] == READS + (due if actions[name] is Action.INSERT else [])
    again = [name for name, action in actions.items() if action is Action.INSERT]
    assert plan.insert_path.name == "-".join(again)
    given_up = {name: key for name, key in keys.items() if name not in again}
    assert plan.given_up_replaced == sum(key.replaced for key in given_up.values())
    assert plan.given_up_inserts == len(given_up) - plan.given_up_replaced
    assert plan.marker_lost == [
        name
        for name, key in given_up.items()
        if key.replaced and key.content == INCOMING and (key.load, key.event is None) == (LOAD, False)
    ]
