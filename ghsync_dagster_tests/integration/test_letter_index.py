"""The index of dead letters on a real broker and collection: what is open, what resolves it, and the commands."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from confluent_kafka import OFFSET_END, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from typer.testing import CliRunner

from ghsync_dagster.cdc.dead_letters import closing
from ghsync_dagster.cdc.dead_letters.index import catch_up, open_letters
from ghsync_dagster.cdc.dead_letters.record import DeadLetter
from ghsync_dagster.cdc.stream import letters as consumer_letters
from ghsync_dagster.cdc.stream.consume import ChangeConsumer
from ghsync_dagster.cli import app as cli
from ghsync_dagster.cli import common as cli_common
from ghsync_dagster.domain.errors import RefusedError
from ghsync_dagster.domain.letters import LetterState
from ghsync_dagster.stores.kafka.topics import RecordWriter, read_to_end
from ghsync_dagster.stores.mongo.letters import LetterIndex
from ghsync_dagster_tests.support.builders import row
from ghsync_dagster_tests.support.cdc_parts import GHSYNC, StrictStore, make_anew, make_strict, stored
from ghsync_dagster_tests.support.long_campaign import ROUNDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from typer.testing import Result

    from ghsync_dagster.domain.letters import Letter
    from ghsync_dagster.stores.mongo.users import UserStore
    from ghsync_dagster_tests.support.cdc_parts import Parts, Topic

pytestmark = [pytest.mark.integration, pytest.mark.servers("stream")]

MANY: Final = 100_000 if ROUNDS else 40_000
MORE_MEMORY: Final = 40 * 1024**2
"""How much more memory they may take than 1,000 letters do, in bytes; held whole they take at least twice as much."""
BROKEN: Final = b"{"
COUNT: Final = """
from ghsync_dagster.cdc.dead_letters.index import open_letters
from ghsync_dagster.settings import load_settings
from ghsync_dagster.wiring import existing_kafka, store_opener

settings = load_settings()
with store_opener(settings)() as store:
    found = open_letters(existing_kafka(settings), store)
print(found.kinds.total(), len(found.oldest), len(found.newest))
"""
"""What the check does, as a program."""


def index_of(topic: Topic, store: UserStore) -> LetterIndex:
    return LetterIndex(store, topic.kafka.topic)


def states(topic: Topic, store: UserStore) -> dict[int, str]:
    """The state of each letter, by the offset of its record."""
    return {letter.offset: letter.state.value for letter in index_of(topic, store).find()}


def whole(topic: Topic, offset: int, key: bytes | None = b'{"user_id":1}', kind: str = "not-json") -> DeadLetter:
    failed_at = "2026-01-01T00:00:00.000+00:00"
    return DeadLetter(topic.kafka.topic, 0, offset, 1_700_000_000_000, key, BROKEN, [], kind, "why", failed_at)


def write_without_index(topic: Topic, letters: Iterable[DeadLetter]) -> None:
    """Write letters as builds without an index did."""
    writer = RecordWriter(topic.kafka, topic.kafka.dead_letter_topic)
    writer.write(letter.as_record() for letter in letters)
    writer.close()


def caught_up(topic: Topic, store: UserStore) -> dict[int, str]:
    catch_up(topic.kafka, index_of(topic, store))
    return states(topic, store)


# What resolves a letter


def test_a_letter_is_resolved_by_a_newer_record_of_its_user_and_by_no_other(
    topic: Topic, parts: Parts, store: UserStore
) -> None:
    for key in (1, 2, 3, 4):
        topic.upsert(key, "old")
        topic.raw({"user_id": key}, BROKEN)
    topic.upsert(1, "newer")
    parts.drain(topic)
    assert states(topic, store) == {1: "resolved", 3: "open", 5: "open", 7: "open"}
    # Others come later than the batch, to a consumer that knows the letters from the index only.
    topic.delete(2)
    partial = row(3, url="__debezium_unavailable_value")
    topic.raw({"user_id": 3}, {"op": "u", "after": partial})
    parts.drain(topic)
    assert states(topic, store) == {1: "resolved", 3: "resolved", 5: "open", 7: "open"}
    found = {letter.offset: letter for letter in index_of(topic, store).find()}
    assert [found[offset].user for offset in (1, 3, 5, 7)] == ["1", "2", "3", "4"]
    assert "offset 8" in found[1].reason
    assert found[1].at > found[1].failed_at


def test_an_older_record_that_is_delivered_again_resolves_nothing(topic: Topic, parts: Parts, store: UserStore) -> None:
    topic.upsert(1, "old")
    topic.raw({"user_id": 1}, BROKEN)
    parts.drain(topic)
    topic.commit(0)
    parts.drain(topic)
    assert states(topic, store) == {1: "open"}
    assert len(list(read_to_end(topic.kafka, topic.kafka.dead_letter_topic))) == 2


def test_a_record_that_the_database_refuses_resolves_nothing_and_what_it_takes_does(
    topic: Topic, parts: Parts, store: UserStore
) -> None:
    make_strict(store)
    topic.raw({"user_id": 1}, BROKEN)
    topic.upsert(1, "much too long")
    topic.raw({"user_id": 2}, BROKEN)
    topic.upsert(2, "good")
    topic.upsert(2, "much too long")
    topic.flush()
    consumer = ChangeConsumer(topic.kafka, lambda: StrictStore(parts.uri, parts.database, "Users"))
    assert consumer.run(threading.Event(), until_end=True, seconds=60).reached_end
    assert states(topic, store) == {0: "open", 1: "open", 2: "resolved", 4: "open"}
    users = {letter.offset: letter.user for letter in index_of(topic, store).find()}
    assert users == {0: "1", 1: "1", 2: "2", 4: "2"}


def test_a_running_consumer_resolves_letters_of_before_and_its_own(
    topic: Topic, parts: Parts, store: UserStore
) -> None:
    topic.raw({"user_id": 1}, BROKEN)
    parts.drain(topic)
    with parts.running(topic) as running:
        topic.raw({"user_id": 2}, BROKEN)
        topic.flush()
        await_states(topic, store, {0: "open", 1: "open"})
        topic.upsert(1)
        topic.flush()
        await_states(topic, store, {0: "resolved", 1: "open"})
        topic.upsert(2)
        topic.flush()
        await_states(topic, store, {0: "resolved", 1: "resolved"})
        running.end()


def await_states(topic: Topic, store: UserStore, expected: dict[int, str]) -> None:
    deadline = time.monotonic() + 30
    while (found := states(topic, store)) != expected:
        assert time.monotonic() < deadline, f"{found}, not {expected}"
        time.sleep(0.02)


def test_a_truncate_resolves_every_letter_before_it_and_none_after_it(
    topic: Topic, parts: Parts, store: UserStore
) -> None:
    topic.raw({"user_id": 1}, BROKEN)
    topic.raw(None, BROKEN)
    topic.raw({"user_id": 7}, {"op": "u", "after": row(8)})
    parts.drain(topic)
    topic.write(None, "t")
    topic.raw({"user_id": 1}, BROKEN)
    parts.drain(topic)
    assert states(topic, store) == {0: "resolved", 1: "resolved", 2: "resolved", 4: "open"}


def test_with_two_partitions_a_record_counts_in_its_own_and_a_truncate_where_it_stands_in_each(
    make_topic: Callable[..., Topic], parts: Parts, store: UserStore
) -> None:
    topic = make_topic(2)
    topic.upsert(9, partition=0)
    topic.raw({"user_id": 1}, BROKEN, partition=0)
    topic.raw({"user_id": 1}, BROKEN, partition=1)
    topic.upsert(1, partition=1)
    parts.drain(topic)
    assert by_place(topic, store) == {(0, 1): "open", (1, 0): "resolved"}

    topic.write(None, "t", partition=1)
    topic.upsert(2, partition=0)
    topic.raw({"user_id": 2}, BROKEN, partition=0)
    topic.upsert(3, partition=1)
    parts.drain(topic)
    assert stored(store) == topic.expected
    assert by_place(topic, store) == {(0, 1): "resolved", (0, 3): "open", (1, 0): "resolved"}


def by_place(topic: Topic, store: UserStore) -> dict[tuple[int, int], str]:
    return {(letter.partition, letter.offset): letter.state.value for letter in index_of(topic, store).find()}


def test_a_repaired_user_s_letters_are_resolved_and_open_again_if_the_stream_refuses_them_again(
    topic: Topic, parts: Parts, store: UserStore
) -> None:
    topic.upsert(1, "old")
    for key in (1, 2, 3):
        topic.raw({"user_id": key}, BROKEN)
    parts.drain(topic)
    index = index_of(topic, store)
    assert index.open_users() == {"1", "2", "3"}
    assert index.resolve_repaired(["1", "2", "99"], "repaired from MySQL") == 2
    assert index.resolve_repaired(["1"], "repaired from MySQL") == 0
    assert states(topic, store) == {1: "resolved", 2: "resolved", 3: "open"}
    assert [letter.user for letter in index.open_of(["1", "3"])] == ["3"]
    # The records before the letters are applied over the repaired state.
    topic.commit(0)
    parts.drain(topic)
    assert states(topic, store) == {1: "open", 2: "open", 3: "open"}


def test_a_letter_that_was_closed_stays_closed_if_the_group_merely_goes_back(
    topic: Topic, parts: Parts, store: UserStore
) -> None:
    topic.raw({"user_id": 1}, BROKEN)
    topic.raw(None, BROKEN)
    parts.drain(topic)
    index = index_of(topic, store)
    assert len(list(closing.close_letters(index, index.find(), "by hand"))) == 2
    topic.commit(0)
    parts.drain(topic)
    assert states(topic, store) == {0: "closed", 1: "closed"}


@pytest.mark.parametrize("letters_too", [True, False], ids=["letters-recreated", "letters-kept"])
def test_a_letter_of_a_recreated_topic_is_open_whatever_became_of_the_one_with_its_id(
    topic: Topic, parts: Parts, store: UserStore, *, letters_too: bool
) -> None:
    topic.raw({"user_id": 1}, BROKEN)
    topic.raw({"user_id": 3}, BROKEN)
    topic.upsert(2)
    parts.drain(topic)
    index = index_of(topic, store)
    assert len(list(closing.close_letters(index, index.find(), "by hand"))) == 2
    again = make_anew(topic, letters_too=letters_too, group="anew")
    again.raw({"user_id": 2}, BROKEN)
    parts.drain(again)
    assert caught_up(again, store) == ({0: "open"} if letters_too else {0: "open", 1: "closed"})
    [letter] = index_of(again, store).open_of(["1", "2"])
    assert letter.user == "2"


# Who dies in between


@pytest.mark.parametrize(
    ("owner", "step"),
    [(RecordWriter, "write"), (LetterIndex, "add_refused"), (LetterIndex, "settle")],
    ids=["after the topic", "after the index", "after the resolving"],
)
def test_after_a_death_at_any_moment_the_redelivery_ends_right(
    topic: Topic, parts: Parts, store: UserStore, monkeypatch: pytest.MonkeyPatch, owner: type, step: str
) -> None:
    topic.raw({"user_id": 2}, BROKEN)
    topic.raw({"user_id": 1}, BROKEN)
    topic.upsert(1)
    topic.flush()
    method = getattr(owner, step)

    def die(*arguments: Any) -> None:
        method(*arguments)
        raise RefusedError("dead", way_out="none")

    with monkeypatch.context() as patched:
        patched.setattr(owner, step, die)
        with pytest.raises(RefusedError, match="dead"):
            parts.consumer(topic).run(threading.Event(), seconds=30)
    assert topic.committed() in (-1001, 0)
    assert len(list(read_to_end(topic.kafka, topic.kafka.dead_letter_topic))) == 2
    if owner is RecordWriter:
        assert states(topic, store) == {}
        assert caught_up(topic, store) == {0: "open", 1: "open"}
    parts.drain(topic)
    assert states(topic, store) == {0: "open", 1: "resolved"}
    assert caught_up(topic, store) == {0: "open", 1: "resolved"}
    assert len(list(read_to_end(topic.kafka, topic.kafka.dead_letter_topic))) == 4


def test_an_index_that_is_away_for_a_moment_is_waited_for_before_anything_is_committed(
    topic: Topic, parts: Parts, store: UserStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ghsync_dagster.domain.errors import UnavailableError

    settle, tries = LetterIndex.settle, []

    def fail_twice(index: LetterIndex, *arguments: Any) -> int:
        tries.append(topic.committed())
        if len(tries) <= 2:
            raise UnavailableError("away", way_out="wait")
        return settle(index, *arguments)

    monkeypatch.setattr(LetterIndex, "settle", fail_twice)
    topic.raw({"user_id": 1}, BROKEN)
    topic.upsert(1)
    assert parts.drain(topic).retries == {"UnavailableError": 2}
    assert set(tries) <= {-1001, 0}
    # Its letter is written once.
    assert len(list(read_to_end(topic.kafka, topic.kafka.dead_letter_topic))) == 1
    assert states(topic, store) == {0: "resolved"}
    assert topic.committed() == 2


# Catching up with the topic of dead letters


def test_letters_that_only_the_topic_holds_are_added_as_open_and_resolved_by_the_stream(
    topic: Topic, parts: Parts, store: UserStore
) -> None:
    topic.upsert(5)
    for key in (1, 2):
        topic.raw({"user_id": key}, BROKEN)
    parts.drain(topic)
    store.database.drop_collection("_ghsync_dead_letters")
    topic.upsert(1)
    parts.drain(topic)
    assert states(topic, store) == {1: "resolved", 2: "open"}


def test_each_letter_is_read_from_the_topic_once_and_two_readers_do_no_harm(
    topic: Topic, store: UserStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ghsync_dagster.stores.kafka import topics as kafka_topics

    write_without_index(topic, [whole(topic, 3), whole(topic, 4, None), whole(topic, 3)])
    read: list[int | None] = []
    read_ranges = kafka_topics.read_ranges

    def watched(*arguments: Any) -> Any:
        for message in read_ranges(*arguments):
            read.append(message.offset())
            yield message

    monkeypatch.setattr(kafka_topics, "read_ranges", watched)
    threads = [threading.Thread(target=lambda: caught_up(topic, store)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert states(topic, store) == {3: "open", 4: "open"}
    read.clear()
    write_without_index(topic, [whole(topic, 9)])
    assert caught_up(topic, store) == {3: "open", 4: "open", 9: "open"}
    assert read == [3]


def test_a_lost_watermark_opens_nothing_that_is_settled(topic: Topic, parts: Parts, store: UserStore) -> None:
    for key in (1, 2, 3):
        topic.raw({"user_id": key}, BROKEN)
    topic.upsert(1)
    parts.drain(topic)
    index = index_of(topic, store)
    [second] = index.open_of(["2"])
    assert [letter.id for letter in closing.close_letters(index, [second], "by hand")] == [second.id]
    expected = {0: "resolved", 1: "closed", 2: "open"}
    assert states(topic, store) == expected
    store.database["_ghsync_dead_letters"].delete_one({"_id": f"indexed {topic.kafka.topic}"})
    assert caught_up(topic, store) == expected


def test_letters_whose_records_were_removed_are_no_letters_any_more(topic: Topic, store: UserStore) -> None:
    write_without_index(topic, [whole(topic, offset) for offset in range(5)])
    assert len(caught_up(topic, store)) == 5
    admin = AdminClient({"bootstrap.servers": topic.kafka.bootstrap_servers})

    def remove_before(offset: int) -> None:
        for future in admin.delete_records([TopicPartition(topic.kafka.dead_letter_topic, 0, offset)]).values():
            future.result(30)

    remove_before(3)
    assert caught_up(topic, store) == {3: "open", 4: "open"}
    remove_before(OFFSET_END)
    assert caught_up(topic, store) == {}
    write_without_index(topic, [whole(topic, 7)])
    assert caught_up(topic, store) == {7: "open"}


def test_letters_of_another_topic_of_changes_are_not_listed_but_resolved_by_a_repair(
    make_topic: Callable[..., Topic], store: UserStore
) -> None:
    one, other = make_topic(), make_topic()
    for topic in (one, other):
        write_without_index(topic, [whole(topic, 1)])
        assert caught_up(topic, store) == {1: "open"}
    assert index_of(one, store).resolve_repaired(["1"], "repaired") == 2
    assert (states(one, store), states(other, store)) == ({1: "resolved"}, {1: "resolved"})


def test_a_consumer_that_may_not_read_the_letters_consumes_all_the_same(
    topic: Topic, parts: Parts, store: UserStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise RefusedError("no right to read", way_out="grant it")

    monkeypatch.setattr(consumer_letters, "catch_up", refuse)
    topic.raw({"user_id": 1}, BROKEN)
    topic.upsert(2)
    parts.drain(topic)
    assert stored(store) == topic.expected
    assert states(topic, store) == {0: "open"}


# The commands


def settings_of(topic: Topic, parts: Parts) -> dict[str, str]:
    return {
        "KAFKA_BOOTSTRAP_SERVERS": topic.kafka.bootstrap_servers,
        "KAFKA_TOPIC": topic.kafka.topic,
        "KAFKA_GROUP_ID": topic.kafka.group_id,
        "MONGODB_URI": parts.uri,
        "MONGODB_DATABASE": parts.database,
    }


@pytest.fixture
def run(topic: Topic, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Return a function that runs ``ghsync dlq`` on the test's own topic and database."""
    for name, value in settings_of(topic, parts).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cli_common, "configure_logging", lambda _: None)
    return lambda *arguments: CliRunner().invoke(cli.app, ["dlq", *arguments])


def test_letters_are_listed_shown_and_closed_by_commands(
    topic: Topic, parts: Parts, store: UserStore, run: Callable[..., Result]
) -> None:
    assert json.loads(run("list", "--json").stdout) == []
    partial = {name: value for name, value in row(1).items() if name != "url"}
    topic.raw({"user_id": 1}, {"op": "u", "after": partial})
    topic.raw(None, BROKEN)
    topic.raw({"user_id": 2}, BROKEN)
    parts.drain(topic)
    names = [f"{topic.kafka.topic}-0-{offset}" for offset in range(3)]

    listed = json.loads(run("list", "--json").stdout)
    assert [(one["id"], one["user_id"], one["kind"], one["state"]) for one in listed] == [
        (names[0], "1", "missing-column", "open"),
        (names[1], None, "not-json", "open"),
        (names[2], "2", "not-json", "open"),
    ]
    assert [one["offset"] for one in json.loads(run("list", "--limit", "2", "--json").stdout)] == [1, 2]
    text = run("list", "--kind", "missing-column")
    assert (text.exit_code, len(text.stdout.splitlines())) == (0, 1)
    assert "listed: 1, of which open: 1" in text.stderr

    [shown] = json.loads(run("show", names[0], "--json").stdout)
    assert (shown["user_id"], shown["state"], json.loads(shown["value"])["op"]) == ("1", "open", "u")
    assert "ghsync cdc repair" in shown["way_out"]

    for wrong in (["close"], ["close", names[0], "--superseded"], ["close", "--kind", "x"], ["list", "--state", "x"]):
        assert run(*wrong).exit_code == 2, wrong
    unknown = run("close", names[1], "nothing-0-1")
    assert (unknown.exit_code, unknown.stdout) == (2, "")
    assert "There is no dead letter nothing-0-1." in unknown.stderr
    assert set(states(topic, store).values()) == {"open"}

    by_id = run("close", names[1], "--json")
    assert (by_id.exit_code, [one["id"] for one in json.loads(by_id.stdout)]) == (0, [names[1]])
    assert json.loads(run("close", names[1], "--json").stdout) == []
    by_kind = run("close", "--kind", "not-json")
    assert names[2] in by_kind.stdout
    assert "closed: 1" in by_kind.stderr
    assert states(topic, store) == {0: "open", 1: "closed", 2: "closed"}
    found = json.loads(run("list", "--state", "closed", "--json").stdout)
    assert [one["state_reason"] for one in found] == ["closed by id", "closed by kind not-json"]


def test_close_superseded_closes_what_newer_applied_records_or_a_truncate_make_needless(
    topic: Topic, parts: Parts, store: UserStore, run: Callable[..., Result]
) -> None:
    topic.raw(None, BROKEN)
    topic.write(None, "t")
    for key in (1, 2, 3, 4, 5):
        topic.raw({"user_id": key}, BROKEN)
    topic.upsert(1, "newer")
    topic.delete(2)
    topic.raw({"user_id": 3}, BROKEN)
    topic.raw({"user_id": 4}, {"op": "u", "after": row(4, url="__debezium_unavailable_value")})
    parts.drain(topic)
    # As after an older build, which kept no index.
    store.database.drop_collection("_ghsync_dead_letters")
    # Not applied yet.
    topic.upsert(5, "newer")
    topic.flush()
    closed = run("close", "--superseded", "--json")
    assert closed.exit_code == 0, closed.stderr
    assert {one["offset"]: one["state_reason"] for one in json.loads(closed.stdout)} == {
        0: "a later truncate was applied (offset 1)",
        2: "a newer record of its user was applied (offset 7)",
        3: "a newer record of its user was applied (offset 9)",
    }
    assert states(topic, store) == dict.fromkeys((0, 2, 3), "closed") | dict.fromkeys((4, 5, 6, 10), "open")
    assert json.loads(run("close", "--superseded", "--json").stdout) == []


def test_close_superseded_reads_the_topic_page_by_page_in_two_partitions(
    make_topic: Callable[..., Topic], parts: Parts, store: UserStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = make_topic(2)
    for partition in (0, 1):
        for key in range(10):
            topic.raw({"user_id": key}, BROKEN, partition=partition)
    for key in range(0, 10, 2):
        topic.upsert(key, partition=0)
    parts.drain(topic)
    store.database.drop_collection("_ghsync_dead_letters")
    index = index_of(topic, store)
    catch_up(topic.kafka, index)
    monkeypatch.setattr(closing, "_PAGE", 3)
    closed = list(closing.close_superseded(topic.kafka, store, index))
    assert sorted((letter.partition, letter.offset) for letter in closed) == [(0, key) for key in range(0, 10, 2)]


def test_letters_in_two_partitions_are_found_in_one_order_page_by_page(topic: Topic, store: UserStore) -> None:
    admin = AdminClient({"bootstrap.servers": topic.kafka.bootstrap_servers})
    [made] = admin.create_topics([NewTopic(topic.kafka.dead_letter_topic, 2, 1)]).values()
    made.result(30)
    producer = Producer({"bootstrap.servers": topic.kafka.bootstrap_servers})
    for offset in range(8):
        key, value, headers = whole(topic, offset).as_record()
        producer.produce(topic.kafka.dead_letter_topic, value, key, offset % 2, headers=headers)
    assert producer.flush(20) == 0
    assert len(caught_up(topic, store)) == 8
    index = index_of(topic, store)
    in_order = [letter.place for letter in index.find()]
    assert in_order == [(partition, offset) for offset in range(4) for partition in (0, 1)]
    assert [letter.place for letter in index.find(newest=True)] == in_order[::-1]
    for at, place in enumerate(in_order):
        assert [letter.place for letter in index.find(after=place, limit=3)] == in_order[at + 1 : at + 4]


def test_what_others_settle_meanwhile_is_not_told_as_closed(topic: Topic, parts: Parts, store: UserStore) -> None:
    for key in range(6):
        topic.raw({"user_id": key}, BROKEN)
    parts.drain(topic)
    index = index_of(topic, store)

    def meanwhile() -> Iterator[Letter]:
        found = list(index.find())
        # One is repaired, one closed by another command, one refused again.
        assert index.resolve_repaired(["1"], "repaired") == 1
        assert index.settle([(found[2], "by hand")], LetterState.CLOSED) == 1
        index.add_refused([found[3]._replace(failed_at="2027-01-01T00:00:00.000+00:00")])
        yield from found

    closed = list(closing.close_letters(index, meanwhile(), "by hand"))
    assert [letter.offset for letter in closed] == [0, 4, 5]
    assert {letter.state for letter in closed} == {LetterState.CLOSED}
    expected = dict.fromkeys((0, 2, 4, 5), "closed") | {1: "resolved", 3: "open"}
    assert states(topic, store) == expected


def test_close_superseded_takes_no_record_of_a_recreated_topic_for_a_newer_one_by_its_offset(
    topic: Topic, parts: Parts, store: UserStore
) -> None:
    topic.upsert(9)
    topic.raw({"user_id": 1}, BROKEN)
    parts.drain(topic)
    again = make_anew(topic, group="anew")
    # Copied records keep their times: this one is older than the letter's.
    value = json.dumps({"op": "c", "after": row(1)}).encode()
    for _ in range(3):
        again.producer.produce(again.kafka.topic, key=b'{"user_id": 1}', value=value, timestamp=1_600_000_000_000)
    parts.drain(again)
    index = index_of(again, store)
    assert states(again, store) == {1: "open"}
    assert list(closing.close_superseded(again.kafka, store, index)) == []
    again.upsert(1)
    parts.drain(again)
    assert states(again, store) == {1: "resolved"}


# Very many


MEASURE: Final = """
import resource, subprocess, sys

subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
"""
"""Runs a command and tells its peak. It is small itself: what is forked counts as large as who forks it."""


def peak_bytes(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Run a command; return the most memory that it held, and what it printed."""
    measured = [sys.executable, "-c", MEASURE, *command]
    done = subprocess.run(measured, env=environment, capture_output=True, text=True, timeout=300, cwd=Path.home())
    assert done.returncode == 0, done.stderr
    return int(done.stderr.splitlines()[-1]) * 1024, done.stdout


@pytest.mark.faults
def test_very_many_letters_are_found_listed_and_counted_in_little_memory(
    topic: Topic, parts: Parts, store: UserStore
) -> None:
    environment = settings_of(topic, parts)
    count = [sys.executable, "-c", COUNT]
    write_without_index(topic, [whole(topic, offset, b'{"user_id":%d}' % offset) for offset in range(1_000)])
    catch_up(topic.kafka, index_of(topic, store))
    few, _ = peak_bytes([GHSYNC, "dlq", "list", "--json"], environment)
    few_counted, told = peak_bytes(count, environment)
    assert told == "1000 20 50\n"

    write_without_index(topic, (whole(topic, offset, b'{"user_id":%d}' % offset) for offset in range(1_000, MANY)))
    started = time.monotonic()
    # The first one finds them, too.
    found, printed = peak_bytes([GHSYNC, "dlq", "list", "--json"], environment)
    assert len(json.loads(printed)) == MANY
    seconds_found = time.monotonic() - started
    started = time.monotonic()
    listed, printed = peak_bytes([GHSYNC, "dlq", "list"], environment)
    seconds_listed = time.monotonic() - started
    assert printed.count("\n") == MANY
    counted, told = peak_bytes(count, environment)
    assert told == f"{MANY} 20 50\n"
    more = {"found": found - few, "listed": listed - few, "counted": counted - few_counted}
    shown = {name: f"{size / 1024**2:.1f} MiB" for name, size in more.items()}
    took = f"found in {seconds_found:.1f} s, listed in {seconds_listed:.1f} s"
    sys.stdout.write(f"{MANY:,} letters {took}; more memory than for 1,000: {shown}\n")
    assert [name for name, size in more.items() if size > MORE_MEMORY] == []


def test_what_the_check_is_told_are_the_open_ones_only(topic: Topic, parts: Parts, store: UserStore) -> None:
    for key in range(60):
        topic.raw({"user_id": key}, BROKEN)
    topic.raw({"user_id": 1}, {"hello": "world"})
    for key in range(5):
        topic.upsert(key)
    parts.drain(topic)

    def users(letters: list[Letter]) -> list[str | None]:
        return [letter.user for letter in letters]

    told = open_letters(topic.kafka, store)
    assert told.kinds == {"not-json": 55}
    assert users(told.oldest) == [str(key) for key in range(5, 25)]
    assert users(told.newest) == [str(key) for key in range(59, 9, -1)]
