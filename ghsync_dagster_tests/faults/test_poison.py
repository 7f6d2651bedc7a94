"""Sixty bad records among 100,000: each is kept alone with its reason, all others are applied, and a fix settles them.

Fifty can't be decoded, of ten kinds, as a broken producer might write them; ten are refused by the database. Of each
sort some are still the newest of their users when the fix comes, and others have newer records behind them.
"""

from __future__ import annotations

import json
import random
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pytest
from cdc_parts import StrictStore, assert_nothing_half_done, fates, make_strict, replayed, stored, user

from ghsync_dagster.cdc import consume, look
from ghsync_dagster.cdc import replay as replaying
from ghsync_dagster.cdc.consume import ChangeConsumer, ConsumerReport
from ghsync_dagster.cdc.dead_letters import read_dead_letters
from ghsync_dagster.cdc.replay import Edit, Fate, Selection, open_dead_letters
from ghsync_dagster.domain.envelope import ChangeDecoder
from ghsync_dagster.domain.user import json_schema

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from cdc_parts import Parts, Topic

    from ghsync_dagster.domain.change import Change
    from ghsync_dagster.stores.mongo import UserStore

pytestmark = pytest.mark.faults

RECORDS: Final = 100_000
USERS: Final = 5_000
"""The users of ordinary records; those of bad ones have keys above."""
REFUSED: Final = 10
"""Records that the database refuses."""
OVERTAKEN: Final = 4
"""So many of them get a newer record before the replay."""
BY_EDIT: Final = "key-mismatch"
"""This kind is mended letter by letter, the others by code that can read them."""

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
        due: What becomes of its letter once it can be applied.
        later: What is written of the user afterwards: ``update``, ``delete``, or nothing.
    """

    kind: str
    words: str
    user_id: int
    meant: Value
    record: Record
    due: Fate
    later: str = ""

    def apply(self, users: dict[str, Value]) -> None:
        """Do what was meant."""
        if self.meant["op"] == "d":
            users.pop(str(self.user_id), None)
        else:
            users[str(self.user_id)] = self.meant["after"] | {"user_id": str(self.user_id)}


def change(user_id: int, login: str, op: str = "u") -> Value:
    """Return an event in Debezium's form, without its place in the binlog."""
    row = user(user_id, login) | {"user_id": user_id}
    return {"before": row, "after": None if op == "d" else row, "op": op}


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
    BY_EDIT: (lambda key, value: record(-key, value), "The record's key names user -"),
}
"""How each kind is made of a good change, and what its refusal says."""


def poison() -> list[Bad]:
    """Return five records of each kind that can't be decoded: two overtaken by good ones, and one by the last one."""
    found = []
    for number, (kind, (make, words)) in enumerate(BREAKS.items()):
        base = USERS + 10 * number
        cases = [
            (base + 1, Fate.MOVED_ON, "update"),
            (base + 2, Fate.MOVED_ON, "delete"),
            (base + 3, Fate.REPLAYED, ""),
            (base + 4, Fate.SUPERSEDED, ""),
            (base + 4, Fate.REPLAYED, ""),
        ]
        for at, (user_id, due, later) in enumerate(cases):
            # One kind was meant as deletes.
            meant = change(user_id, f"octo-{at}", "d" if kind == "unknown-op" else "u")
            found.append(Bad(kind, words, user_id, meant, make(user_id, meant), due, later))
    return found


def refused() -> list[Bad]:
    """Return records that can be decoded, with a login that is too long for the stricter database."""
    found = []
    for number in range(REFUSED):
        user_id = USERS + 1_000 + number
        meant = change(user_id, "much too long")
        due = Fate.MOVED_ON if number < OVERTAKEN else Fate.REPLAYED
        found.append(Bad("validator", "code 121", user_id, meant, record(user_id, meant), due))
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


def mended_decoder(bad: Iterable[Bad]) -> type[ChangeDecoder]:
    """Return the decoder after the fix, which knows what the broken producer meant."""
    meant = {each.record: record(each.user_id, each.meant) for each in bad}

    class MendedDecoder(ChangeDecoder):
        __slots__ = ()

        def decode(self, key: bytes | None, value: bytes | None) -> Change:
            if key is not None and value is not None:
                key, value = meant.get((key, value), (key, value))
            return super().decode(key, value)

    return MendedDecoder


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


def replay_one_by_one(topic: Topic, store: UserStore, bad: Mapping[int, Bad]) -> None:
    """Replay the letters whose keys must be mended by hand; the newest first, so that no older one shows meanwhile."""
    for offset, each in sorted(bad.items(), reverse=True):
        selection = Selection(ids=frozenset({f"{topic.kafka.topic}-0-{offset}"}))
        [found] = replayed(topic, store, selection, Edit(key=record(each.user_id, each.meant)[0])).letters
        assert (found.fate, found.resolved) == (each.due, True)


def test_bad_records_are_kept_alone_all_others_are_applied_and_a_replay_after_the_fix_applies_what_is_newest(
    topic: Topic, parts: Parts, store: UserStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = random.SystemRandom().randrange(10**6)
    sys.stdout.write(f"seed {seed}\n")
    chance = random.Random(seed)  # noqa: S311
    every = [*poison(), *refused()]
    chance.shuffle(every)
    # The older one of a user's two letters comes first.
    every.sort(key=lambda each: each.due is not Fate.SUPERSEDED)
    bad = write_all(topic, chance, every)

    make_strict(store)
    consumer = ChangeConsumer(topic.kafka, lambda: StrictStore(parts.uri, parts.database, "Users"))
    report = consumer.run(threading.Event(), until_end=True, seconds=60)
    assert_only_the_bad_ones_were_left_out(topic, report, bad)
    assert stored(store) == topic.expected

    # Before the fix a replay changes nothing.
    with StrictStore(parts.uri, parts.database, "Users") as strict:
        early = replayed(topic, strict)
    assert (set(fates(early).values()), early.left_open) == ({Fate.REFUSED}, len(bad))
    assert stored(store) == topic.expected

    # The fix: code that can read what the producer broke, a database that takes long logins; and life has gone on.
    for module in (consume, look, replaying):
        monkeypatch.setattr(module, "ChangeDecoder", mended_decoder(each for each in every if each.kind != BY_EDIT))
    store.database.command({"collMod": "Users", "validator": {"$jsonSchema": json_schema()}})
    for each in refused()[:OVERTAKEN]:
        topic.upsert(each.user_id, "newer, and much longer")
    parts.drain(topic)

    by_edit = {offset: each for offset, each in bad.items() if each.kind == BY_EDIT}
    done = replayed(topic, store)
    assert fates(done) == {offset: Fate.REFUSED if offset in by_edit else each.due for offset, each in bad.items()}
    skipped = [found for found in done.letters if found.fate in (Fate.MOVED_ON, Fate.SUPERSEDED)]
    assert [found.reason for found in skipped if "a newer" not in found.reason] == []
    assert done.left_open == len(by_edit)
    replay_one_by_one(topic, store, by_edit)

    for each in every:
        if each.due is Fate.REPLAYED:
            each.apply(topic.expected)
    assert stored(store) == topic.expected
    assert_nothing_half_done(store)
    assert list(open_dead_letters(topic.kafka, store)) == []
    assert replayed(topic, store).letters == ()
