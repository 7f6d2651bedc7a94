"""Sixty bad records among 100,000: each is kept alone with its reason, the others are applied, newer ones settle it.

Fifty can't be decoded, of ten kinds, as a broken producer might write them; ten are refused by the database. Of each
sort some are the newest of their users, and others have newer records after them.
"""

from __future__ import annotations

import json
import random
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pytest

from ghsync_dagster.cdc.dead_letters.closing import close_letters
from ghsync_dagster.cdc.dead_letters.index import open_letters
from ghsync_dagster.cdc.dead_letters.topic import read_dead_letters
from ghsync_dagster.cdc.stream.consume import ChangeConsumer, ConsumerReport
from ghsync_dagster.domain.letters import LetterState
from ghsync_dagster.domain.user import json_schema
from ghsync_dagster.stores.mongo.letters import LetterIndex
from ghsync_dagster_tests.support.builders import row
from ghsync_dagster_tests.support.cdc_parts import StrictStore, make_strict, stored

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ghsync_dagster.stores.mongo.users import UserStore
    from ghsync_dagster_tests.support.cdc_parts import Parts, Topic

pytestmark = [pytest.mark.faults, pytest.mark.servers("stream")]

RECORDS: Final = 100_000
USERS: Final = 5_000
"""The users of ordinary records; those of bad ones have keys above."""
REFUSED: Final = 10
"""Records that the database refuses."""
OVERTAKEN: Final = 4
"""So many of them get a newer record once the database takes them."""
OF_TWO_USERS: Final = "key-mismatch"
"""Records of this kind name two users, so that no record of one of them settles it."""

Value = dict[str, Any]
Record = tuple[bytes, bytes]


@dataclass(frozen=True)
class Bad:
    """A bad record.

    Attributes:
        kind: The kind of its dead letter.
        words: What the reason says.
        user_id: Its user.
        meant: The change that was meant.
        record: Key and value as they are written.
        later: What is written of the user afterwards: ``update``, ``delete``, or nothing.
    """

    kind: str
    words: str
    user_id: int
    meant: Value
    record: Record
    later: str = ""

    @property
    def state(self) -> LetterState:
        """The state of its letter once the topic is applied."""
        return LetterState.RESOLVED if self.later and self.kind != OF_TWO_USERS else LetterState.OPEN


def event(user_id: int, login: str, op: str = "u") -> Value:
    """Return an event in Debezium's form, without its place in the binlog."""
    image = row(user_id, login)
    return {"before": image, "after": None if op == "d" else image, "op": op}


def record(user_id: int, value: Value) -> Record:
    return json.dumps({"user_id": user_id}).encode(), json.dumps(value).encode()


def with_row(value: Value, **columns: Any) -> Value:
    return value | {"after": value["after"] | columns}


def without(value: Value, name: str) -> Value:
    return {other: part for other, part in value.items() if other != name}


def latin1(user_id: int, value: Value) -> Record:
    key, text = record(user_id, value)
    return key, text.replace(b"octo", b"\xe9cto")


def cut(user_id: int, value: Value) -> Record:
    key, text = record(user_id, value)
    return key, text[:-1]


BREAKS: Final[dict[str, tuple[Callable[[int, Value], Record], str]]] = {
    "not-utf8": (latin1, "The value is not UTF-8 from byte"),
    "not-json": (cut, "The value is no JSON"),
    "bad-text": (lambda key, value: record(key, with_row(value, url="\ud800")), "half of a surrogate pair"),
    "not-an-event": (lambda key, value: record(key, {"data": value}), 'neither op nor user_id, but "data"'),
    "unknown-op": (lambda key, value: record(key, value | {"op": "x"}), 'got "x"'),
    "missing-row": (lambda key, value: record(key, without(value, "after")), "after must be the row that op u leaves"),
    "missing-column": (
        lambda key, value: record(key, value | {"after": without(value["after"], "url")}),
        "after lacks url",
    ),
    "bad-column": (lambda key, value: record(key, with_row(value, login=7)), "after.login must be a string or null"),
    "bad-user-id": (lambda key, value: record(key, with_row(value, user_id=1.5)), "after.user_id must be a whole"),
    OF_TWO_USERS: (lambda key, value: record(-key, value), "The record's key names user -"),
}
"""How each kind is made of a good change, and what its refusal says."""


def poison() -> list[Bad]:
    """Return five records of each kind that can't be decoded: two overtaken by good ones, and two of one user."""
    found = []
    for number, (kind, (make, words)) in enumerate(BREAKS.items()):
        base = USERS + 10 * number
        cases = [(base + 1, "update"), (base + 2, "delete"), (base + 3, ""), (base + 4, ""), (base + 4, "")]
        for at, (user_id, later) in enumerate(cases):
            # One kind was meant as deletes.
            meant = event(user_id, f"octo-{at}", "d" if kind == "unknown-op" else "u")
            found.append(Bad(kind, words, user_id, meant, make(user_id, meant), later))
    return found


def refused() -> list[Bad]:
    """Return records that can be decoded, with a login that is too long for the stricter database."""
    found = []
    for number in range(REFUSED):
        user_id = USERS + 1_000 + number
        meant = event(user_id, "much too long")
        found.append(Bad("validator", "code 121", user_id, meant, record(user_id, meant)))
    return found


def write_traffic(topic: Topic, chance: random.Random, stop: int) -> None:
    """Write ordinary changes until the topic holds so many records."""
    while topic.written < stop:
        user_id = chance.randint(1, USERS)
        # A delete is two records.
        if chance.random() < 0.1 and str(user_id) in topic.expected and topic.written + 2 <= stop:
            topic.delete(user_id)
        else:
            topic.upsert(user_id, f"u{topic.written}")


def write_all(topic: Topic, chance: random.Random, bad: Sequence[Bad]) -> dict[int, Bad]:
    """Write all records, bad ones at random places; return these by their offsets."""
    for user_id in dict.fromkeys(each.user_id for each in bad):
        topic.upsert(user_id, "before")
    offsets = {}
    for each, place in zip(bad, sorted(chance.sample(range(1_000, RECORDS - 1_000), len(bad))), strict=True):
        write_traffic(topic, chance, place)
        offsets[topic.written] = each
        topic.raw(*each.record)
    for each in bad:
        if each.later == "update":
            topic.upsert(each.user_id, "newer")
        elif each.later == "delete":
            topic.delete(each.user_id)
    write_traffic(topic, chance, RECORDS)
    topic.flush()
    return offsets


def assert_only_the_bad_ones_were_left_out(topic: Topic, report: ConsumerReport, bad: Mapping[int, Bad]) -> None:
    assert report.reached_end
    assert report.records.keys() == {"applied", "coalesced", "dead_letter"}
    assert report.records["applied"] + report.records["coalesced"] == RECORDS - len(bad) == 99_940
    assert report.dead_letters == dict.fromkeys(BREAKS, 5) | {"validator": REFUSED}
    letters = {letter.offset: letter for letter in read_dead_letters(topic.kafka)}
    assert {offset: (letter.kind, (letter.key, letter.value)) for offset, letter in letters.items()} == {
        offset: (each.kind, each.record) for offset, each in bad.items()
    }
    assert [letter.text for offset, letter in letters.items() if bad[offset].words not in letter.text] == []
    assert topic.committed() == RECORDS


def states(topic: Topic, store: UserStore) -> dict[int, LetterState]:
    """The state of each letter, by the offset of its record."""
    return {letter.offset: letter.state for letter in LetterIndex(store, topic.kafka.topic).find()}


def test_bad_records_are_kept_alone_all_others_are_applied_and_newer_ones_resolve_them(
    topic: Topic, parts: Parts, store: UserStore
) -> None:
    seed = random.SystemRandom().randrange(10**6)
    sys.stdout.write(f"seed {seed}\n")
    chance = random.Random(seed)  # noqa: S311
    every = [*poison(), *refused()]
    chance.shuffle(every)
    bad = write_all(topic, chance, every)

    make_strict(store)
    consumer = ChangeConsumer(topic.kafka, lambda: StrictStore(parts.uri, parts.database, "Users"))
    report = consumer.run(threading.Event(), until_end=True, seconds=60)
    assert_only_the_bad_ones_were_left_out(topic, report, bad)
    assert stored(store) == topic.expected
    assert states(topic, store) == {offset: each.state for offset, each in bad.items()}

    # The fix: a database that takes long logins; and life has gone on.
    store.database.command({"collMod": "Users", "validator": {"$jsonSchema": json_schema()}})
    overtaken = [each.user_id for each in refused()[:OVERTAKEN]]
    for user_id in overtaken:
        topic.upsert(user_id, "newer, and much longer")
    parts.drain(topic)
    assert stored(store) == topic.expected
    left = {
        offset: each for offset, each in bad.items() if each.state is LetterState.OPEN and each.user_id not in overtaken
    }
    assert {offset for offset, state in states(topic, store).items() if state is LetterState.OPEN} == left.keys()

    # What is left a repair settles, by user; what names no user or two, somebody closes by kind.
    index = LetterIndex(store, topic.kafka.topic)
    users = {str(each.user_id) for each in left.values() if each.kind != OF_TWO_USERS}
    assert index.open_users() == {*users, None}
    assert index.resolve_repaired(users, "repaired") == len(left) - 5
    of_kind = index.find(state=LetterState.OPEN, kind=OF_TWO_USERS)
    assert len(list(close_letters(index, of_kind, "looked at"))) == 5
    assert open_letters(topic.kafka, store).kinds == {}
