"""Replaying dead letters on a real broker and a real collection: what is still the newest is applied, nothing else.

Run as a program it replays all letters and kills itself after the step that it is told, see ``main``.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cdc_parts import ALL, StrictStore, assert_nothing_half_done, fates, make_anew, make_strict, replayed, stored, until
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient
from typer.testing import CliRunner

from ghsync_dagster import cli
from ghsync_dagster.batch.reports import FlattenReport
from ghsync_dagster.cdc import consume
from ghsync_dagster.cdc.consume import ChangeConsumer
from ghsync_dagster.cdc.replay import (
    Edit,
    Fate,
    Selection,
    letter_states,
    open_dead_letters,
    plan_replay,
    replay,
)
from ghsync_dagster.domain.envelope import ChangeDecoder
from ghsync_dagster.domain.errors import ConfigError, LeaseHeldError, UndecodableError
from ghsync_dagster.domain.replay import ReplayStep
from ghsync_dagster.domain.user import json_schema
from ghsync_dagster.stores.kafka import KafkaSettings
from ghsync_dagster.stores.mongo import UserStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from cdc_parts import Parts, Topic

    from ghsync_dagster.batch.flow import BatchFlow
    from ghsync_dagster.domain.change import Change

pytestmark = pytest.mark.integration

FIELDS = ("user_id", "login", "gravatar_id", "avatar_url", "url")


class OldDecoder(ChangeDecoder):
    """The decoder before the fix: it can't read records with `poison` in them."""

    __slots__ = ()

    def decode(self, key: bytes | None, value: bytes | None) -> Change:
        """Refuse what the old code could not read."""
        if value and b"poison" in value:
            raise UndecodableError("not-json", "The old code can't read it.", way_out="Mend the code.")
        return super().decode(key, value)


@pytest.fixture(autouse=True)
def old_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have consumers run the old code; replays run the new one."""
    monkeypatch.setattr(consume, "ChangeDecoder", OldDecoder)


def row(key: int, login: str) -> dict[str, Any]:
    return {"user_id": str(key), "login": login, "gravatar_id": "", "avatar_url": None, "url": "http://u"}


def poison(topic: Topic, key: int, what: str = "poison") -> dict[str, Any]:
    """Write a record that only the new code can read: a delete, or an upsert with such a login; return the user."""
    image = row(key, what) | {"user_id": key}
    value = {"op": "d", "before": image, "after": None} if what == "delete" else {"op": "u", "after": image}
    value["only"] = "poison"
    topic.raw({"user_id": key}, value)
    return row(key, what)


def logins(store: UserStore) -> dict[str, str]:
    return {key: found["login"] for key, found in stored(store).items()}


def states(topic: Topic, store: UserStore) -> dict[int, str]:
    return {letter.offset: state.value for letter, state, _ in letter_states(topic.kafka, store)}


def everything(store: UserStore) -> dict[str, list[Any]]:
    return {name: list(store.database[name].find().sort("_id", 1)) for name in store.database.list_collection_names()}


# What is applied, and what is not


def test_after_a_fix_letters_are_applied_a_dry_run_writes_nothing_and_a_second_replay_changes_nothing(
    topic: Topic, parts: Parts, store: UserStore
) -> None:
    for key in (1, 2, 4):
        topic.upsert(key, "old")
    topic.delete(5)
    changed, inserted = poison(topic, 1, "poison-1"), poison(topic, 3, "poison-3")
    for key in (2, 6):
        poison(topic, key, "delete")
    back = poison(topic, 5, "poison-5")
    parts.drain(topic)
    assert logins(store) == {"1": "old", "2": "old", "4": "old"}

    before = everything(store)
    planned = plan_replay(topic.kafka, store, ALL)
    assert everything(store) == before
    assert set(fates(planned).values()) == {Fate.APPLY}
    assert len(planned.letters) == 5

    report = replayed(topic, store)
    assert set(fates(report).values()) == {Fate.REPLAYED}
    assert report.left_open == 0
    assert stored(store) == {"1": changed, "3": inserted, "4": row(4, "old"), "5": back}
    assert {found["_id"] for found in store.deleted.find()} >= {"2", "6"}
    assert_nothing_half_done(store)
    assert set(states(topic, store).values()) == {"replayed"}
    assert list(open_dead_letters(topic.kafka, store)) == []

    assert replayed(topic, store).letters == ()
    again = replayed(topic, store, Selection(ids=frozenset(found.letter.id for found in report.letters)))
    assert set(fates(again).values()) == {Fate.REPLAYED}
    assert stored(store) == {"1": changed, "3": inserted, "4": row(4, "old"), "5": back}


def test_a_user_that_has_moved_on_is_left_alone_and_the_letter_is_skipped_for_good(
    topic: Topic, parts: Parts, store: UserStore
) -> None:
    for key in (1, 2, 3):
        poison(topic, key)
    topic.upsert(1, "newer")
    topic.upsert(2, "newer")
    topic.delete(2)
    poison(topic, 3, "poison-newer")
    parts.drain(topic)
    before = stored(store)
    planned = plan_replay(topic.kafka, store, ALL)
    report = replayed(topic, store)
    assert fates(report) == {0: Fate.MOVED_ON, 1: Fate.MOVED_ON, 2: Fate.SUPERSEDED, 7: Fate.REPLAYED}
    assert [found.fate for found in planned.letters][:3] == [found.fate for found in report.letters][:3]
    assert planned.to_resolve == 4
    assert "offset 3" in report.letters[0].reason
    assert stored(store) == before | {"3": row(3, "poison-newer")}
    assert states(topic, store) == {0: "skipped", 1: "skipped", 2: "skipped", 7: "replayed"}
    assert report.left_open == 0


def test_a_letter_stays_open_as_long_as_the_newer_one_that_supersedes_it(
    topic: Topic, parts: Parts, store: UserStore
) -> None:
    poison(topic, 1, "poison-1")
    poison(topic, 1, "poison-2")
    parts.drain(topic)
    only_older = Selection(ids=frozenset({f"{topic.kafka.topic}-0-0"}))
    assert plan_replay(topic.kafka, store, only_older).to_resolve == 0
    older = replayed(topic, store, only_older)
    assert (fates(older), older.left_open) == ({0: Fate.SUPERSEDED}, 1)
    assert stored(store) == {}
    assert plan_replay(topic.kafka, store, ALL).to_resolve == 2
    both = replayed(topic, store)
    assert (fates(both), both.left_open) == ({0: Fate.SUPERSEDED, 1: Fate.REPLAYED}, 0)
    assert logins(store) == {"1": "poison-2"}


def test_a_truncate_ends_the_letters_before_it_and_none_is_replayed_itself(
    topic: Topic, parts: Parts, store: UserStore
) -> None:
    poison(topic, 1)
    topic.write(None, "t")
    topic.raw(None, {"op": "t", "source": {"name": "poison"}})
    poison(topic, 2)
    parts.drain(topic)
    report = replayed(topic, store)
    assert fates(report) == {0: Fate.MOVED_ON, 2: Fate.REFUSED, 3: Fate.REPLAYED}
    assert "snapshot" in report.letters[1].reason
    assert logins(store) == {"2": "poison"}
    assert report.left_open == 1


def test_letters_that_the_database_refused_are_applied_once_it_takes_them(
    topic: Topic, parts: Parts, store: UserStore
) -> None:
    make_strict(store)
    for key in (1, 2):
        topic.upsert(key, "good")
    topic.upsert(1, "much too long")
    topic.upsert(3, "much too long")
    topic.flush()
    with StrictStore(parts.uri, parts.database, "Users") as opened:
        consumer = ChangeConsumer(topic.kafka, lambda: StrictStore(parts.uri, parts.database, "Users"))
        consumer.run(threading.Event(), until_end=True, seconds=60)
        refused = replayed(topic, opened)
    assert set(fates(refused).values()) == {Fate.REFUSED}
    assert refused.left_open == 2
    assert all("validator" in found.reason for found in refused.letters)
    assert logins(store) == {"1": "good", "2": "good"}
    assert_nothing_half_done(store)

    store.database.command({"collMod": "Users", "validator": {"$jsonSchema": json_schema()}})
    assert set(fates(replayed(topic, store)).values()) == {Fate.REPLAYED}
    assert logins(store) == {"1": "much too long", "2": "good", "3": "much too long"}


def test_an_edited_value_is_applied_and_no_older_letter_of_its_user_after_it(
    topic: Topic, parts: Parts, store: UserStore
) -> None:
    topic.upsert(1, "old")
    poison(topic, 1)
    topic.raw({"user_id": 1}, b"{ broken")
    topic.raw(b"?", b"[]")
    parts.drain(topic)
    names = {letter.offset: letter.id for letter, _, _ in letter_states(topic.kafka, store)}
    [broken] = replayed(topic, store, Selection(ids=frozenset({names[2]}))).letters
    assert broken.fate is Fate.REFUSED
    assert "not-json" in broken.reason

    value = msgspec.json.encode({"op": "u", "after": row(1, "edited")})
    assert fates(replayed(topic, store, Selection(ids=frozenset({names[2]})), Edit(value=value))) == {2: Fate.REPLAYED}
    assert logins(store) == {"1": "edited"}

    [older] = replayed(topic, store, Selection(ids=frozenset({names[1]}))).letters
    assert (older.fate, older.by, older.resolved) == (Fate.SUPERSEDED, names[2], True)
    assert logins(store) == {"1": "edited"}

    # The key is part of what may be wrong.
    edit = Edit(key=b'{"user_id": 9}', value=msgspec.json.encode({"op": "c", "after": row(9, "nine")}))
    assert fates(replayed(topic, store, Selection(ids=frozenset({names[3]})), edit)) == {3: Fate.REPLAYED}
    assert logins(store) == {"1": "edited", "9": "nine"}


def test_a_letter_that_is_no_change_of_a_user_is_skipped_for_good(topic: Topic, parts: Parts, store: UserStore) -> None:
    topic.raw({"serverName": "mysql-server"}, b"{ broken")
    parts.drain(topic)
    [(letter, _, _)] = letter_states(topic.kafka, store)
    report = replayed(topic, store, Selection(ids=frozenset({letter.id})), Edit(value=b'{"ts_ms": 1700000000000}'))
    assert (fates(report), report.left_open) == ({0: Fate.NO_CHANGE}, 0)
    assert states(topic, store) == {0: "skipped"}
    assert stored(store) == {}


@pytest.mark.parametrize("at", [ReplayStep.LOG_OLD, ReplayStep.RECORD_INTENT], ids=lambda step: step.name)
def test_a_letter_whose_user_is_written_by_somebody_else_meanwhile_stays_open_and_is_applied_by_the_next_replay(
    topic: Topic, parts: Parts, store: UserStore, at: ReplayStep
) -> None:
    topic.upsert(1, "old")
    wanted = poison(topic, 1, "poison-1")
    parts.drain(topic)

    def interfere(done: ReplayStep) -> None:
        if done is at:
            store.users.replace_one({"user_id": "1"}, row(1, "somebody's"))

    report = replay(topic.kafka, store, ALL, lease_wait_seconds=60, lease_quiet_seconds=1, on_step=interfere)
    assert (fates(report), report.left_open) == ({1: Fate.BUSY}, 1)
    assert logins(store) == {"1": "somebody's"}
    assert fates(replayed(topic, store)) == {1: Fate.REPLAYED}
    assert stored(store) == {"1": wanted}
    assert_nothing_half_done(store)


def test_an_edit_is_for_one_letter_and_an_unknown_id_is_told(topic: Topic, parts: Parts, store: UserStore) -> None:
    poison(topic, 1)
    parts.drain(topic)
    with pytest.raises(ConfigError, match="one letter"):
        plan_replay(topic.kafka, store, ALL, Edit(value=b"{}"))
    with pytest.raises(ConfigError, match="no dead letter nobody-0-1"):
        plan_replay(topic.kafka, store, Selection(ids=frozenset({"nobody-0-1"})))


def test_a_letter_takes_what_an_unavailable_field_has_stored(topic: Topic, parts: Parts, store: UserStore) -> None:
    topic.upsert(1, "old", pos=10)
    for key in (1, 2):
        image = row(key, "poison") | {"user_id": key, "url": "__debezium_unavailable_value"}
        topic.raw({"user_id": key}, {"op": "u", "after": image})
    parts.drain(topic)
    assert replayed(topic, store).left_open == 0
    assert stored(store) == {"1": row(1, "poison"), "2": row(2, "poison") | {"url": None}}


def test_filters_choose_the_letters(topic: Topic, parts: Parts, store: UserStore) -> None:
    poison(topic, 1)
    topic.raw({"user_id": 2}, b"{")
    topic.raw({"user_id": 2}, {"hello": "world"})
    parts.drain(topic)

    def offsets(**fields: Any) -> list[int]:
        return [found.letter.offset for found in plan_replay(topic.kafka, store, Selection(**fields)).letters]

    from datetime import UTC, datetime, timedelta

    assert offsets(key="1") == [0]
    assert offsets(key="2") == [1, 2]
    assert offsets(kind="not-an-event") == [2]
    assert offsets(since=datetime.now(UTC) + timedelta(hours=1)) == []
    assert offsets(since=datetime.now(UTC) - timedelta(hours=1)) == [0, 1, 2]


# What can't be known is not guessed


def test_a_letter_waits_until_the_group_has_committed_past_it(topic: Topic, parts: Parts, store: UserStore) -> None:
    topic.upsert(1, "old")
    poison(topic, 1)
    parts.drain(topic)
    topic.commit(0)
    report = replayed(topic, store)
    assert fates(report) == {1: Fate.NOT_PASSED}
    assert report.left_open == 1
    assert logins(store) == {"1": "old"}
    parts.drain(topic)
    assert fates(replayed(topic, store)) == {1: Fate.REPLAYED}


def test_a_record_that_is_refused_again_is_open_again(topic: Topic, parts: Parts, store: UserStore) -> None:
    topic.upsert(1, "old")
    poison(topic, 1)
    parts.drain(topic)
    assert replayed(topic, store).left_open == 0
    topic.commit(0)
    parts.drain(topic)
    assert logins(store) == {"1": "old"}
    assert states(topic, store) == {1: "open"}
    assert fates(replayed(topic, store)) == {1: Fate.REPLAYED}
    assert logins(store) == {"1": "poison"}
    topic.commit(0)
    topic.upsert(1, "newer")
    parts.drain(topic)
    assert fates(replayed(topic, store)) == {1: Fate.MOVED_ON}
    assert states(topic, store) == {1: "skipped"}


@pytest.mark.parametrize("letters_too", [True, False], ids=["letters-anew", "letters-kept"])
@pytest.mark.parametrize(("before", "key"), [(0, 1), (1, 2)], ids=["lower-offset", "same-offset"])
def test_what_was_replayed_of_a_topic_says_nothing_of_one_that_was_made_anew(
    topic: Topic, parts: Parts, store: UserStore, before: int, key: int, *, letters_too: bool
) -> None:
    topic.upsert(1, "old")
    poison(topic, 1)
    parts.drain(topic)
    assert fates(replayed(topic, store)) == {1: Fate.REPLAYED}
    again = make_anew(topic, letters_too=letters_too, group="anew")
    for number in range(before):
        again.upsert(9, f"nine-{number}")
    poison(again, key, "poison-anew")
    parts.drain(again)
    assert [letter.offset for letter in open_dead_letters(again.kafka, store)] == [before]
    report = replayed(again, store)
    assert (fates(report), report.left_open) == ({before: Fate.REPLAYED}, 0)
    assert logins(store)[str(key)] == "poison-anew"
    assert list(open_dead_letters(again.kafka, store)) == []


def test_a_letter_of_a_new_topic_is_replayed_for_its_own_user_only(
    topic: Topic, parts: Parts, store: UserStore
) -> None:
    topic.upsert(9)
    poison(topic, 1)
    parts.drain(topic)
    assert replayed(topic, store).left_open == 0
    again = make_anew(topic, group="anew")
    poison(again, 1, "poison-of-1")
    poison(again, 2, "poison-of-2")
    parts.drain(again)
    # Of user 2, and at the place at which the old topic had one of user 1.
    assert fates(replayed(again, store, Selection(key="2"))) == {1: Fate.REPLAYED}
    assert fates(replayed(again, store)) == {0: Fate.REPLAYED}
    assert logins(store) == {"9": "octo", "1": "poison-of-1", "2": "poison-of-2"}


def test_where_the_topic_no_longer_holds_the_record_nothing_is_guessed(
    topic: Topic, parts: Parts, store: UserStore
) -> None:
    topic.upsert(1, "old")
    poison(topic, 1)
    poison(topic, 2)
    parts.drain(topic)
    admin = AdminClient({"bootstrap.servers": topic.kafka.bootstrap_servers})
    for future in admin.delete_records([TopicPartition(topic.kafka.topic, 0, 2)]).values():
        future.result(30)
    report = replayed(topic, store)
    assert fates(report) == {1: Fate.UNSURE, 2: Fate.REPLAYED}
    assert "no longer holds" in report.letters[0].reason
    assert logins(store) == {"1": "old", "2": "poison"}


def test_a_newer_record_that_nobody_can_read_yet_stands_in_the_way(
    topic: Topic, parts: Parts, store: UserStore
) -> None:
    poison(topic, 1)
    poison(topic, 2)
    parts.drain(topic)
    topic.raw({"user_id": 1}, b"{")
    topic.flush()
    report = replayed(topic, store)
    assert fates(report) == {0: Fate.UNSURE, 1: Fate.REPLAYED}
    # As a dead letter it is known not to be applied.
    parts.drain(topic)
    assert fates(replayed(topic, store))[0] is Fate.REPLAYED


def test_with_several_partitions_a_later_truncate_elsewhere_counts(
    make_topic: Callable[..., Topic], parts: Parts, store: UserStore
) -> None:
    topic = make_topic(2)

    def change(key: int, login: str, pos: int, partition: int) -> None:
        source = {"snapshot": "false", "server_id": 1, "file": "bin.000001", "pos": pos, "row": 0}
        image = row(key, login) | {"user_id": key}
        topic.raw({"user_id": key}, {"op": "c", "after": image, "source": source}, partition=partition)

    change(1, "poison-1", 10, 0)
    change(2, "x", 20, 1)
    parts.drain(topic)
    truncated = {"snapshot": "false", "server_id": 1, "file": "bin.000001", "pos": 30}
    topic.raw(None, {"op": "t", "source": truncated}, partition=1)
    change(3, "poison-3", 40, 0)
    change(4, "x", 50, 1)
    parts.drain(topic)
    report = replayed(topic, store)
    assert {found.key: found.fate for found in report.letters} == {"1": Fate.MOVED_ON, "3": Fate.REPLAYED}
    assert logins(store) == {"3": "poison-3", "4": "x"}


# Beside the stream and loads


ROUNDS = int(os.environ.get("GHSYNC_FAULT_ROUNDS", "6"))


def test_beside_a_live_consumer_no_user_goes_back_in_any_round(topic: Topic, parts: Parts, store: UserStore) -> None:
    seed = random.SystemRandom().randrange(10**6)
    chance = random.Random(seed)  # noqa: S311
    keys = range(1, 301)
    met: set[Fate] = set()
    expected: dict[str, str] = {}
    with parts.running(topic) as running:
        for number in range(ROUNDS):
            for key in keys:
                kind = chance.random()
                if kind < 0.2:
                    expected.pop(str(key), None)
                    topic.delete(key)
                elif kind < 0.6:
                    topic.upsert(key, f"old-{number}")
                    expected[str(key)] = f"old-{number}"
            letters = {key: chance.choice(["delete", f"poison-{number}"]) for key in keys}
            for key, what in letters.items():
                poison(topic, key, what)
            topic.flush()
            until(lambda: topic.committed() == end_of(topic))
            newer = {key: f"new-{number}" for key in keys if chance.random() < 0.4}
            expected |= {str(key): what for key, what in letters.items() if what != "delete"}
            for key, what in letters.items():
                if what == "delete":
                    expected.pop(str(key), None)

            def write_newer(newer: dict[int, str] = newer) -> None:
                for key, login in newer.items():
                    topic.upsert(key, login)
                    topic.producer.flush()

            writer = threading.Thread(target=write_newer)
            writer.start()
            report = replayed(topic, store)
            writer.join()
            met |= set(fates(report).values())
            expected |= {str(key): login for key, login in newer.items()}
            until(lambda: topic.committed() == end_of(topic))
            last = replayed(topic, store)
            assert last.left_open == 0, f"seed {seed}"
            assert logins(store) == expected, f"seed {seed}, round {number}"
            assert_nothing_half_done(store)
        running.end()
    assert {Fate.REPLAYED, Fate.MOVED_ON} <= met


CASES = ("replace", "insert", "delete", "delete what is not there")
CHANGES = ("upsert", "upsert the same", "delete", "upsert and delete")


@pytest.mark.parametrize("step", list(ReplayStep), ids=lambda step: step.name)
def test_a_change_of_the_stream_stands_at_whatever_step_of_a_replay_it_comes(
    topic: Topic, parts: Parts, store: UserStore, step: ReplayStep
) -> None:
    users = dict(enumerate(itertools.product(CASES, (*CHANGES, "none")), start=1))
    for key, (case, _) in users.items():
        if case in ("replace", "delete"):
            topic.upsert(key, "old")
        poison(topic, key, "delete" if case.startswith("delete") else "same")
    expected = {str(key): "same" for key, (case, what) in users.items() if case in CASES[:2] and what == "none"}
    with parts.running(topic) as running:
        until(lambda: topic.committed() == end_of(topic))

        def change(done: ReplayStep) -> None:
            if done is not step:
                return
            for key, (_, what) in users.items():
                if what.startswith("upsert"):
                    login = "same" if what.endswith("same") else "newer"
                    topic.raw({"user_id": key}, {"op": "u", "after": row(key, login)})
                    expected[str(key)] = login
                if what.endswith("delete"):
                    topic.delete(key)
                    expected.pop(str(key), None)
            topic.flush()
            until(lambda: topic.committed() == end_of(topic))

        report = replay(topic.kafka, store, ALL, lease_wait_seconds=60, lease_quiet_seconds=1, on_step=change)
        assert logins(store) == expected
        assert_nothing_half_done(store)
        assert {found.fate for found in report.letters if users[int(found.key)][1] == "none"} == {Fate.REPLAYED}
        running.end()
    assert replayed(topic, store).left_open == 0
    assert logins(store) == expected
    # What the stream deleted, and what a letter deleted, no file brings back.
    gone = {str(key) for key in users} - expected.keys()
    assert store.deleted_among(sorted(gone)) == gone
    assert store.versions_by_id(sorted(expected)) == {}


def end_of(topic: Topic) -> int:
    consumer = Consumer({"bootstrap.servers": topic.kafka.bootstrap_servers, "group.id": "nobody"})
    try:
        return int(consumer.get_watermark_offsets(TopicPartition(topic.kafka.topic, 0), timeout=10)[1])
    finally:
        consumer.close()


def load(flow: BatchFlow, number: int, users: dict[int, str]) -> None:
    """Load users by key and login, with events newer than those of loads with lower numbers."""
    at = f"2015-01-01T15:00:{number:02}Z"
    rows = [{**row(key, login), "created_at": at, "event_id": 1} for key, login in users.items()]
    schema = pa.schema([*((name, pa.string()) for name in (*FIELDS, "created_at")), ("event_id", pa.int64())])
    folder = flow.artifacts.new_folder("users")
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "part-0.parquet")
    flow.artifacts.publish(FlattenReport(str(folder), len(rows), 0.0))
    assert flow.load(f"run-{number}").unresolved == 0


def test_beside_loads_of_the_same_users_the_letters_have_the_last_word(
    topic: Topic, parts: Parts, store: UserStore, flow: BatchFlow
) -> None:
    keys = range(1, 201)
    load(flow, 1, {key: "file-1" for key in keys if key % 2})
    letters = {key: "delete" if key % 3 == 0 else f"poison-{key}" for key in keys if key % 5}
    for key, what in letters.items():
        poison(topic, key, what)
    parts.drain(topic)
    errors: list[BaseException] = []

    def keep_loading() -> None:
        try:
            for number in (2, 3, 4):
                load(flow, number, dict.fromkeys(keys, f"file-{number}"))
        except BaseException as error:  # noqa: BLE001  the test raises it
            errors.append(error)

    flow = dataclasses.replace(flow, lease_wait_seconds=60)
    loader = threading.Thread(target=keep_loading)
    loader.start()
    report = replayed(topic, store)
    loader.join()
    if errors:
        raise errors[0]
    assert set(fates(report).values()) == {Fate.REPLAYED}
    load(flow, 5, dict.fromkeys(keys, "file-5"))
    expected = {str(key): letters.get(key, "file-5") for key in keys if letters.get(key) != "delete"}
    assert logins(store) == expected
    assert_nothing_half_done(store)


def test_a_replay_waits_for_a_load_and_says_who_holds_it(topic: Topic, parts: Parts, store: UserStore) -> None:
    from ghsync_dagster.batch.lease import hold_lease

    poison(topic, 1)
    parts.drain(topic)
    with hold_lease(store, wait_seconds=0), pytest.raises(LeaseHeldError):
        replay(topic.kafka, store, ALL, lease_wait_seconds=0)
    assert replayed(topic, store).left_open == 0


# Killed


@pytest.mark.faults
@pytest.mark.parametrize("step", list(ReplayStep), ids=lambda step: step.name)
def test_killed_after_any_step_nothing_is_wrong_and_the_next_replay_ends_it(
    topic: Topic, parts: Parts, store: UserStore, step: ReplayStep
) -> None:
    for key in (1, 2, 4):
        topic.upsert(key, "old")
    for key, what in ((1, "poison-1"), (2, "delete"), (3, "poison-3")):
        poison(topic, key, what)
    parts.drain(topic)
    order = [step.value, parts.uri, parts.database, topic.kafka.bootstrap_servers, topic.kafka.topic]
    # The child finds helpers by the name that pytest gives them, as this process does.
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    child = subprocess.run([sys.executable, __file__, *order], timeout=120, env=environment)
    assert child.returncode == -signal.SIGKILL
    visible = {key: found["login"] for key, found in stored(store).items() if "spark_temp" not in found}
    assert visible.get("1", "old") in ("old", "poison-1")
    assert visible.get("2", "old") == "old"
    assert visible["4"] == "old"

    # A newer record comes before anybody cleans up.
    topic.upsert(1, "newer")
    parts.drain(topic)
    report = replayed(topic, store)
    # Killed at the very end, all was recorded, and nothing is open.
    assert report.left_open == 0
    assert logins(store) == {"1": "newer", "3": "poison-3", "4": "old"}
    assert_nothing_half_done(store)
    assert set(states(topic, store).values()) <= {"replayed", "skipped"}


def main() -> None:
    """Replay all letters, and die after a step: ``step uri database brokers topic``."""
    step, uri, database, brokers, topic = sys.argv[1:]
    kafka = KafkaSettings(brokers, topic, f"group-{topic}")

    def die(done: ReplayStep) -> None:
        if done.value == step:
            os.kill(os.getpid(), signal.SIGKILL)

    with UserStore(uri, database, "Users") as store:
        replay(kafka, store, ALL, lease_wait_seconds=60, lease_quiet_seconds=1, on_step=die)


# The command


def test_the_command_plans_applies_and_tells_what_is_left(
    topic: Topic, parts: Parts, store: UserStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(topic, 1, "poison-1")
    topic.raw({"user_id": 2}, b"{")
    parts.drain(topic)
    for name, value in {
        "MONGODB_URI": parts.uri,
        "MONGODB_DATABASE": parts.database,
        "KAFKA_BOOTSTRAP_SERVERS": topic.kafka.bootstrap_servers,
        "KAFKA_TOPIC": topic.kafka.topic,
        "KAFKA_GROUP_ID": topic.kafka.group_id,
    }.items():
        monkeypatch.setenv(name, value)

    def run(*arguments: str) -> tuple[int, Any]:
        result = CliRunner().invoke(cli.app, ["dlq", *arguments, "--json"])
        return result.exit_code, msgspec.json.decode(result.stdout)

    code, plan = run("replay")
    assert code == 0
    assert plan["counts"] == {"to be applied": 1, "refused": 1}
    assert not plan["applied"]
    assert stored(store) == {}

    code, done = run("replay", "--apply")
    assert code == 1, "one letter is left open"
    assert done["counts"] == {"replayed": 1, "refused": 1}
    assert logins(store) == {"1": "poison-1"}
    listed = run("list")[1]
    assert [found["state"] for found in listed] == ["replayed", "open"]
    assert [found["id"] for found in run("list", "--state", "open")[1]] == [listed[1]["id"]]

    value = msgspec.json.encode({"op": "c", "after": row(2, "two")}).decode()
    code, done = run("replay", "--id", listed[1]["id"], "--with-value", value, "--apply")
    assert (code, done["counts"]) == (0, {"replayed": 1})
    assert logins(store) == {"1": "poison-1", "2": "two"}
    assert run("show", listed[1]["id"])[1][0]["state"] == "replayed"
    again = CliRunner().invoke(cli.app, ["dlq", "replay", "--id", listed[1]["id"], "--with-value", value])
    assert "to be applied: upsert of user 2: " in again.stdout
    assert "(it was replayed before)" in again.stdout
    assert run("replay", "--apply") == (
        0,
        {"applied": True, "counts": {}, "left_open": 0, "recovered": {}, "letters": []},
    )
    assert CliRunner().invoke(cli.app, ["dlq", "replay", "--since", "yesterday"]).exit_code == 2
    assert CliRunner().invoke(cli.app, ["dlq", "list", "--state", "Open"]).exit_code == 2
    assert CliRunner().invoke(cli.app, ["dlq", "replay", "--id", "x-0-0"]).exit_code == 2


if __name__ == "__main__":
    main()
