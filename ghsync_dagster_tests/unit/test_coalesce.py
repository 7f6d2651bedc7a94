"""Coalescing a batch ends as applying its changes one by one."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import permutations
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from ghsync_dagster.domain.change import Change, Op, Position, RecordKind
from ghsync_dagster.domain.coalesce import Segment, coalesce
from ghsync_dagster.domain.user import USER_FIELDS
from ghsync_dagster_tests.support.builders import change, upsert, user

if TYPE_CHECKING:
    from collections.abc import Iterable

User = dict[str, str | None]


def put(key: str, text: str = "a", **more: str | None) -> Change:
    return upsert(user(key, **dict.fromkeys(USER_FIELDS[1:], text) | more))


def part(key: str, **fields: str | None) -> Change:
    """An update that tells only some fields."""
    known: User = {name: fields[name] for name in USER_FIELDS if name in fields}
    return upsert({"user_id": key, **known})


def gone(key: str, what: str = "d", position: Position | None = None) -> Change:
    return change(key, RecordKind(what), position=position)


TRUNCATE = change(kind=RecordKind.TRUNCATE)
SKIP = change(kind=RecordKind.HEARTBEAT)


@dataclass
class Store:
    """What a collection holds, and which keys are recorded as deleted by the stream."""

    users: dict[str, User] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)

    def truncate(self) -> None:
        """Remove all users, and record that."""
        self.deleted |= self.users.keys()
        self.users.clear()

    def apply(self, change: Change) -> None:
        """Apply one operation on one key."""
        assert change.key is not None
        if change.op is Op.DELETE:
            self.users.pop(change.key, None)
            self.deleted.add(change.key)
            return
        self.deleted.discard(change.key)
        assert change.op is Op.UPSERT
        assert change.user is not None
        known = self.users.get(change.key, {})
        self.users[change.key] = {name: change.user.get(name, known.get(name)) for name in USER_FIELDS}

    def one_by_one(self, changes: Iterable[Change]) -> Store:
        """Apply changes in their order."""
        for each in changes:
            if each.op is Op.TRUNCATE:
                self.truncate()
            elif each.op is not Op.SKIP:
                self.apply(each)
        return self

    def at_once(self, segments: Iterable[Segment], *, backwards: bool = False) -> Store:
        """Apply segments, the operations of each in one order or the other."""
        for segment in segments:
            if segment.truncate:
                self.truncate()
            changes = list(segment.changes.values())
            for each in reversed(changes) if backwards else changes:
                self.apply(each)
        return self


def test_nothing_gives_nothing() -> None:
    assert coalesce([]) == []
    assert coalesce([SKIP, SKIP]) == []


def test_the_last_operation_of_a_key_stays() -> None:
    assert coalesce([put("1"), put("2"), gone("1"), put("2", "b"), SKIP]) == [
        Segment(truncate=False, changes={"1": gone("1"), "2": put("2", "b")})
    ]
    assert coalesce([gone("1"), put("1")]) == [Segment(truncate=False, changes={"1": put("1")})]


def test_keys_are_told_whose_first_change_creates_them() -> None:
    made = [change(key, RecordKind.CREATE, user=put(key).user) for key in "123"]
    changes = [made[0], gone("2"), made[1], put("3"), made[2], put("4"), TRUNCATE, made[1], gone("2")]
    assert [segment.created for segment in coalesce(changes)] == [{"1"}, {"2"}]


def test_an_operation_that_nothing_follows_is_passed_on_as_it_is() -> None:
    changes = [put("1"), part("2", login="b"), gone("3")]
    (segment,) = coalesce(changes)
    assert all(segment.changes[change.key or ""] is change for change in changes)


def test_a_truncate_is_a_barrier() -> None:
    assert coalesce([put("1"), TRUNCATE, put("2")]) == [
        Segment(truncate=False, changes={"1": put("1")}),
        Segment(truncate=True, changes={"2": put("2")}),
    ]
    assert coalesce([TRUNCATE]) == [Segment(truncate=True, changes={})]
    assert coalesce([put("1"), TRUNCATE, TRUNCATE, SKIP, TRUNCATE]) == [
        Segment(truncate=False, changes={"1": put("1")}),
        Segment(truncate=True, changes={}),
    ]


def test_what_a_truncate_wipes_out_is_kept_so_that_it_is_recorded_as_deleted() -> None:
    changes = [gone("1"), TRUNCATE]
    assert Store().at_once(coalesce(changes)).deleted == {"1"}
    assert Store().at_once(coalesce([put("1"), TRUNCATE])).deleted == {"1"}


def test_missing_fields_come_from_the_earlier_operation_of_the_key() -> None:
    (segment,) = coalesce([put("1", "a"), part("1", login="b"), part("1", url=None)])
    assert segment.changes["1"].user == put("1", "a", login="b", url=None).user
    assert list(segment.changes["1"].user or {}) == list(USER_FIELDS)


def test_parts_of_a_stored_user_stay_a_part_in_the_order_of_the_fields() -> None:
    (segment,) = coalesce([part("1", url="u", login="a"), part("1", login="b"), part("1", gravatar_id="g")])
    user = segment.changes["1"].user
    assert user == {"user_id": "1", "login": "b", "gravatar_id": "g", "url": "u"}
    assert list(user) == ["user_id", "login", "gravatar_id", "url"]


def test_missing_fields_are_null_after_a_delete_or_a_truncate() -> None:
    whole = put("1", login="b", gravatar_id=None, avatar_url=None, url=None).user
    (segment,) = coalesce([put("1"), gone("1"), part("1", login="b")])
    assert segment.changes["1"].user == whole
    (_, segment) = coalesce([put("1"), TRUNCATE, part("1", login="b")])
    assert segment.changes["1"].user == whole


def test_a_completed_update_keeps_its_own_time_place_and_kind() -> None:
    earlier = put("1")
    later = Change(Op.UPSERT, "1", {"user_id": "1", "login": "b"}, RecordKind.UPDATE, 7, Position(1, 2, 3), ("x",))
    (segment,) = coalesce([earlier, later])
    found = segment.changes["1"]
    assert (found.kind, found.committed_ms, found.position, found.unknown_columns) == (
        "u",
        7,
        Position(1, 2, 3),
        ("x",),
    )
    assert later.user == {"user_id": "1", "login": "b"}


def test_a_tombstone_leaves_the_delete_before_it_with_its_place() -> None:
    told = gone("1", position=Position(1, 2))
    (segment,) = coalesce([told, gone("1", "tombstone")])
    assert segment.changes["1"] is told
    (segment,) = coalesce([put("1"), gone("1", "tombstone")])
    assert segment.changes["1"].kind == "tombstone"


def test_a_key_change_and_back_in_one_batch_ends_right_in_any_order_of_writing() -> None:
    changes = [put("1"), gone("1"), gone("1", "tombstone"), put("2"), gone("2"), gone("2", "tombstone"), put("1", "b")]
    (segment,) = coalesce(changes)
    for order in permutations(segment.changes.values()):
        store = Store()
        for each in order:
            store.apply(each)
        assert store.users == {"1": put("1", "b").user}


KEYS = st.sampled_from(["1", "2", "3"])
TEXTS = st.sampled_from(["a", "b", None])
FIELDS = st.fixed_dictionaries({}, optional=dict.fromkeys(USER_FIELDS[1:], TEXTS))
CHANGES = (
    st.builds(put, KEYS, st.sampled_from("ab"))
    | st.builds(lambda key, fields: part(key, **fields), KEYS, FIELDS)
    | st.builds(
        gone, KEYS, st.sampled_from(["d", "tombstone"]), st.none() | st.builds(Position, st.just(1), st.just(2))
    )
    | st.just(TRUNCATE)
    | st.just(SKIP)
)


@settings(max_examples=1_000)
@given(st.lists(CHANGES, max_size=6), st.lists(CHANGES, max_size=14), st.booleans())
def test_coalescing_equals_one_by_one(before: list[Change], batch: list[Change], backwards: bool) -> None:
    start = Store().one_by_one(before)
    expected = Store(dict(start.users), set(start.deleted)).one_by_one(batch)
    assert start.at_once(coalesce(batch), backwards=backwards) == expected


@settings(max_examples=500)
@given(st.lists(CHANGES, max_size=14))
def test_coalescing_twice_changes_nothing(batch: list[Change]) -> None:
    segments = coalesce(batch)
    again = [change for one in segments for change in ([TRUNCATE] if one.truncate else []) + list(one.changes.values())]
    assert coalesce(again) == segments


@settings(max_examples=500)
@given(st.lists(CHANGES, max_size=14))
def test_segments_hold_one_applicable_operation_a_key(batch: list[Change]) -> None:
    segments = coalesce(batch)
    assert all(segment.truncate for segment in segments[1:])
    assert all(segment.changes or segment.truncate for segment in segments)
    for segment in segments:
        for key, each in segment.changes.items():
            assert each.key == key
            assert each.op in (Op.UPSERT, Op.DELETE)
            if segment.truncate and each.user is not None:
                assert len(each.user) == len(USER_FIELDS)
