"""Random histories of a table, through records and a topic, to a collection: in the end it equals the table.

A model of the whole half, without servers: the table, the connector that writes records of any form to one or more
partitions, a consumer that cuts batches anywhere, dies before it commits, loses partitions and begins again from what
was committed, and a store. Only the middle is the real code: decoding and coalescing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ghsync_dagster.domain.change import Change, Op
from ghsync_dagster.domain.coalesce import Segment, coalesce
from ghsync_dagster.domain.envelope import UNAVAILABLE, ChangeDecoder
from ghsync_dagster.domain.user import USER_FIELDS
from ghsync_dagster_tests.support.builders import row
from ghsync_dagster_tests.support.envelopes import KEY_FORMS, TOMBSTONES, WRAPPERS, dump, envelope, flattened, key

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Record = tuple[bytes | None, bytes | None]
User = dict[str, str | None]

TEXT_FIELDS = USER_FIELDS[1:]
HEARTBEAT: Record = (b'{"serverName":"mysql-server"}', b'{"ts_ms":1}')


@dataclass(frozen=True)
class Do:
    """One thing that happens to the table.

    Attributes:
        what: insert, update, delete, rekey, truncate, snapshot or heartbeat.
        user_id: Whose, where it is about one row.
        text: What is written to the fields.
        other: The new user_id of a rekey.
        fields: Which fields an update changes; the others may be unavailable in its record.
        told: Whether the record of an update tells unchanged fields.
        form: How the records are written: a wrapper, or `flattened`.
        key_form: How keys are written.
        tombstone: Which tombstone follows a delete, None for none.
        told_by: What tells of a delete: `d` and its tombstone, or only one of them.
    """

    what: str
    user_id: int = 1
    text: str | None = "a"
    other: int = 2
    fields: tuple[str, ...] = TEXT_FIELDS
    told: bool = True
    form: str = "bare"
    key_form: str = "struct"
    tombstone: int = 0
    told_by: str = "both"


@dataclass
class Source:
    """The table and the topic that the connector fills."""

    partitions: list[list[Record]]
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    ever: set[int] = field(default_factory=set)

    def do(self, act: Do) -> None:
        """Change the table and write the records of it. What the database would refuse does not happen."""
        if act.what == "heartbeat":
            self.partitions[-1].append(HEARTBEAT)
        elif act.what == "snapshot":
            for user_id, found in self.rows.items():
                self._write(act, user_id, "r", None, found)
        elif act.what == "truncate":
            self._truncate(act)
        elif act.what == "insert" and act.user_id not in self.rows:
            self._insert(act, act.user_id, row(act.user_id, act.text, url=act.text))
        elif act.what != "insert" and act.user_id in self.rows:
            self._change(act)

    def _change(self, act: Do) -> None:
        old = self.rows[act.user_id]
        if act.what == "delete":
            self._delete(act)
        elif act.what == "update":
            new = old | dict.fromkeys(act.fields, act.text)
            self.rows[act.user_id] = new
            hidden = () if act.told else [name for name in TEXT_FIELDS if name not in act.fields]
            self._write(act, act.user_id, "u", old, new | dict.fromkeys(hidden, UNAVAILABLE))
        elif act.what == "rekey" and act.other not in self.rows:
            self._delete(replace(act, told_by="both"))
            self._insert(act, act.other, old | {"user_id": act.other})

    def _insert(self, act: Do, user_id: int, new: dict[str, Any]) -> None:
        self.rows[user_id] = new
        self.ever.add(user_id)
        self._write(act, user_id, "c", None, new)

    def _delete(self, act: Do) -> None:
        old = self.rows.pop(act.user_id)
        if act.told_by != "tombstone":
            self._write(act, act.user_id, "d", old, None)
        if act.told_by != "d":
            self._append(act.user_id, (key(act.user_id, act.key_form), TOMBSTONES[act.tombstone]))

    def _truncate(self, act: Do) -> None:
        """Write a truncate, which only one partition can order and ExtractNewRecordState drops."""
        if len(self.partitions) == 1 and act.form != "flattened":
            self.rows.clear()
            self.partitions[0].append((None, envelope("t", None, None, wrap=act.form)))

    def _write(self, act: Do, user_id: int, op: str, before: Any, after: Any) -> None:
        if act.form == "flattened":
            value = flattened(before if op == "d" else after, op=op, deleted=str(op == "d").lower())
        else:
            value = envelope(op, before, after, wrap=act.form)
        self._append(user_id, (key(user_id, act.key_form), value))

    def _append(self, user_id: int, record: Record) -> None:
        self.partitions[user_id % len(self.partitions)].append(record)

    def users(self) -> dict[str, User]:
        """Return the table as the collection should hold it."""
        return {str(user_id): found | {"user_id": str(user_id)} for user_id, found in self.rows.items()}


@dataclass
class Store:
    """The collection, and the keys that the stream took away and did not bring back."""

    users: dict[str, User] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)

    def apply(self, segment: Segment) -> None:
        """Apply a segment, record what is deleted, forget what came back."""
        if segment.truncate:
            self.deleted |= self.users.keys()
            self.users.clear()
        for user_id, change in segment.changes.items():
            if change.user is None:
                self.users.pop(user_id, None)
                self.deleted.add(user_id)
                continue
            known = self.users.get(user_id, {})
            self.users[user_id] = {name: change.user.get(name, known.get(name)) for name in USER_FIELDS}
            self.deleted.discard(user_id)


@dataclass(frozen=True)
class Turn:
    """One thing that the consumer does.

    Attributes:
        takes: How many records it takes from each partition, in order of the partitions.
        ends: How it ends: `commit`; `die` after all is applied, or `die early` after a part of the segments, and
            begin again from what was committed; `go back`, as `die`, and to an earlier commit of each partition.
        back: How many commits it goes back.
    """

    takes: tuple[int, ...]
    ends: str = "commit"
    back: int = 1


class Consumer:
    """Consumes the partitions into a store: the records of a turn are one batch."""

    def __init__(self, partitions: Sequence[Sequence[Record]], store: Store) -> None:
        self.partitions = partitions
        self.store = store
        self.decoder = ChangeDecoder()
        self.offsets = [0] * len(partitions)
        self.committed = [[0] for _ in partitions]

    def take(self, turn: Turn) -> None:
        """Consume one batch."""
        segments = coalesce(self._changes(turn.takes))
        kept = len(segments) // 2 if turn.ends == "die early" else len(segments)
        for segment in segments[:kept]:
            self.store.apply(segment)
        if turn.ends == "commit":
            for commits, offset in zip(self.committed, self.offsets, strict=True):
                commits.append(offset)
            return
        if turn.ends == "go back":
            self.committed = [commits[: -turn.back] or [0] for commits in self.committed]
        self.offsets = [commits[-1] for commits in self.committed]
        self.decoder = ChangeDecoder()

    def _changes(self, takes: Iterable[int]) -> list[Change]:
        found: list[Change] = []
        for place, (count, records) in enumerate(zip(takes, self.partitions, strict=False)):
            start = self.offsets[place]
            found += [self.decoder.decode(*record) for record in records[start : start + count]]
            self.offsets[place] = min(start + count, len(records))
        return found

    def finish(self) -> None:
        """Consume what is left in one batch."""
        self.take(Turn(tuple(len(records) for records in self.partitions)))


def run(acts: Sequence[Do], turns: Sequence[Turn], partitions: int) -> tuple[Source, Store]:
    source = Source([[] for _ in range(partitions)])
    for act in acts:
        source.do(act)
    store = Store()
    consumer = Consumer(source.partitions, store)
    for turn in turns:
        consumer.take(turn)
    consumer.finish()
    return source, store


USER_IDS = st.integers(1, 3)
FIELD_SETS = st.lists(st.sampled_from(TEXT_FIELDS), min_size=1, unique=True).map(tuple)
ACTS = st.builds(
    Do,
    what=st.sampled_from(
        ["insert", "insert", "update", "update", "delete", "rekey", "truncate", "snapshot", "heartbeat"]
    ),
    user_id=USER_IDS,
    text=st.sampled_from(["a", "b", None, ""]),
    other=USER_IDS,
    fields=FIELD_SETS,
    told=st.booleans(),
    form=st.sampled_from([*WRAPPERS, "flattened"]),
    key_form=st.sampled_from(KEY_FORMS),
    tombstone=st.integers(0, len(TOMBSTONES) - 1),
    told_by=st.sampled_from(["both", "d", "tombstone"]),
)
TURNS = st.builds(
    Turn,
    takes=st.tuples(*[st.integers(0, 6)] * 3),
    ends=st.sampled_from(["commit", "commit", "die", "die early", "go back"]),
    back=st.integers(1, 4),
)

BORN = Do("insert", text="a")
HIDDEN = Do("update", text="b", fields=("login",), told=False)


@settings(max_examples=2_500)
@given(st.lists(ACTS, max_size=12), st.lists(TURNS, max_size=8), st.sampled_from([1, 1, 2, 3]))
@example([BORN, HIDDEN, Do("delete"), BORN], [Turn((1,)), Turn((2,), "die")], 1)
@example([BORN, HIDDEN], [Turn((1,)), Turn((1,)), Turn((0,), "go back", 4)], 1)
@example([BORN, Do("delete"), Do("rekey"), BORN, HIDDEN, Do("truncate"), BORN, HIDDEN], [Turn((5,), "die early")], 1)
@example([BORN, Do("rekey"), Do("rekey", user_id=2, other=1), HIDDEN], [Turn((2, 0)), Turn((0, 2), "go back", 2)], 2)
@example([BORN, Do("truncate"), Do("snapshot"), BORN], [Turn((1,)), Turn((2,), "die early"), Turn((2,), "die")], 1)
def test_the_collection_ends_as_the_table(acts: list[Do], turns: list[Turn], partitions: int) -> None:
    source, store = run(acts, turns, partitions)
    assert store.users == source.users()
    assert store.deleted == {str(user_id) for user_id in source.ever - source.rows.keys()}


# what the model must be able to find


class Careless(Consumer):
    """Coalesces in a wrong way: the last operation a key, whatever it lacks."""

    def take(self, turn: Turn) -> None:
        """Consume one batch, carelessly."""
        last = {change.key: change for change in self._changes(turn.takes) if change.op is not Op.SKIP}
        truncate = last.pop(None, None) is not None
        self.store.apply(Segment(truncate, {key: change for key, change in last.items() if key is not None}))


@pytest.mark.parametrize(
    "acts",
    [
        [BORN, HIDDEN],
        [BORN, HIDDEN, replace(HIDDEN, text="c", fields=("url",))],
        [BORN, Do("truncate")],
    ],
    ids=["a part hides the whole", "a part hides a part", "a row before a truncate is written after it"],
)
def test_the_model_finds_careless_coalescing(acts: list[Do]) -> None:
    source = Source([[]])
    for act in acts:
        source.do(act)
    careful, careless = Store(), Store()
    Consumer(source.partitions, careful).finish()
    Careless(source.partitions, careless).finish()
    assert careful.users == source.users()
    assert careless.users != source.users()


def test_the_connector_of_the_model_writes_what_debezium_writes() -> None:
    source = Source([[]])
    for act in [BORN, Do("rekey"), Do("delete", user_id=2, form="flattened"), Do("truncate"), Do("heartbeat")]:
        source.do(act)
    gone = row(1, "a", url="a")
    assert source.partitions == [
        [
            (key(1), envelope("c", None, gone)),
            (key(1), envelope("d", gone, None)),
            (key(1), None),
            (key(2), envelope("c", None, gone | {"user_id": 2})),
            (key(2), dump(gone | {"user_id": 2, "__op": "d", "__deleted": "true"})),
            (key(2), None),
            (None, envelope("t", None, None)),
            HEARTBEAT,
        ]
    ]
