"""The consumer on a real broker and a real collection: everything applied, in order, acknowledged, and nothing else."""

from __future__ import annotations

import gc
import itertools
import logging
import threading
import time
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import KafkaError, KafkaException, Producer, TopicPartition, Uuid
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewPartitions
from pymongo.collection import Collection
from pymongo.errors import AutoReconnect, OperationFailure

from ghsync_dagster import clock
from ghsync_dagster.cdc.dead_letters.topic import read_dead_letters
from ghsync_dagster.cdc.health.checks import kafka_lag
from ghsync_dagster.cdc.health.metrics import ChangeMetrics
from ghsync_dagster.cdc.stream import apply_batch, in_flight, polled, topic_guard, write
from ghsync_dagster.cdc.stream.apply import apply
from ghsync_dagster.cdc.stream.batch import Batch, RecordDecoder
from ghsync_dagster.cdc.stream.consume import ChangeConsumer
from ghsync_dagster.cdc.stream.group import GroupFence, GroupOffsets
from ghsync_dagster.cdc.stream.letters import DeadLetters
from ghsync_dagster.cdc.stream.listener import Listeners, SilentListener
from ghsync_dagster.cdc.stream.rewinds import RewindRequests
from ghsync_dagster.cdc.stream.topic_guard import TopicChecks, TopicGuard
from ghsync_dagster.dev import rehearsal
from ghsync_dagster.domain.errors import PermanentError, RefusedError, TransientError, UnavailableError
from ghsync_dagster.domain.user import BUILT_IN_RULES
from ghsync_dagster.settings import load_settings
from ghsync_dagster.stores.kafka import consumer as kafka_consumer
from ghsync_dagster.stores.kafka.backlog import read_backlog
from ghsync_dagster.stores.kafka.client import KafkaSettings, consumer_config
from ghsync_dagster.stores.kafka.consumer import TopicConsumer
from ghsync_dagster.stores.kafka.topics import TopicIds, read_to_end
from ghsync_dagster.stores.mongo.books import GroupBook
from ghsync_dagster.stores.mongo.repairs import RepairRequests
from ghsync_dagster.stores.mongo.users import UserStore
from ghsync_dagster.stores.mongo.writer import Refused, UserWriter
from ghsync_dagster_tests.support.builders import row
from ghsync_dagster_tests.support.cdc_parts import Parts, StrictStore, make_anew, make_strict, stored, until

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ghsync_dagster.cdc.stream.listener import AppliedBatch
    from ghsync_dagster_tests.support.cdc_parts import Topic

pytestmark = [pytest.mark.integration, pytest.mark.servers("stream")]


def test_a_drain_applies_what_is_there_commits_it_and_ends(topic: Topic, parts: Parts, store: UserStore) -> None:
    for number in range(3_000):
        key = number % 700
        topic.delete(key) if str(key) in topic.expected and number % 5 == 0 else topic.upsert(key, f"u{number}")
    report = parts.drain(topic)
    assert stored(store) == topic.expected
    assert report.records.keys() <= {"applied", "coalesced"}
    end = sum(report.records.values())
    assert topic.committed() == end
    assert {found["_id"] for found in store.book("deleted").find()}.isdisjoint(topic.expected)

    again = parts.drain(topic)
    assert again.records == {}


def test_a_drain_of_an_empty_topic_ends(topic: Topic, parts: Parts) -> None:
    assert parts.drain(topic).records == {}


def test_a_drain_without_topic_is_a_transient_error_with_a_way_out(topic: Topic, parts: Parts) -> None:
    kafka = KafkaSettings(topic.kafka.bootstrap_servers, "no-such-topic", "some-group")
    with pytest.raises(UnavailableError, match="KAFKA_TOPIC"):
        ChangeConsumer(kafka, parts.open_store).run(threading.Event(), until_end=True)


def test_changes_arrive_while_the_consumer_runs_and_it_stops_within_seconds(
    topic: Topic, parts: Parts, store: UserStore
) -> None:
    with parts.running(topic) as running:
        for number in range(20):
            topic.upsert(number)
            topic.flush()
            until(lambda: len(stored(store)) == len(topic.expected))
        asked = time.monotonic()
        running.end()
        assert time.monotonic() - asked < 3
    assert topic.committed() == 20
    assert running.metrics.snapshot().kafka.total.count == 20


def test_a_batch_follows_another_no_sooner_than_the_pace_allows_unless_it_is_large(
    topic: Topic, parts: Parts, store: UserStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_flight, "_PACE_SECONDS", 3_600)
    with parts.running(topic) as running:
        topic.upsert(0)
        topic.flush()
        until(lambda: topic.committed() == 1 and running.metrics.snapshot().lag_records == 0)
        topic.upsert(1)
        topic.flush()
        until(lambda: running.metrics.snapshot().lag_records == 1)
        assert set(stored(store)) == {"0"}
        for number in range(2, polled.POLL_RECORDS + 1):
            topic.upsert(number)
        topic.flush()
        until(lambda: topic.committed() > 1)
        assert len(stored(store)) == topic.committed()
        running.end()
    monkeypatch.undo()
    parts.drain(topic)
    assert stored(store) == topic.expected


def test_while_a_consumer_runs_the_garbage_collector_leaves_out_what_was_there_before(
    topic: Topic, parts: Parts
) -> None:
    with parts.running(topic) as running:
        until(lambda: gc.get_freeze_count() > 1_000)
        running.end()
    assert gc.get_freeze_count() == 0


def test_skipped_records_are_counted_and_committed(topic: Topic, parts: Parts) -> None:
    topic.raw({"serverName": "mysql-server"}, {"ts_ms": 1})
    topic.upsert(1)
    topic.raw({"serverName": "mysql-server"}, {"ts_ms": 2})
    assert parts.drain(topic).records == {"skipped": 2, "applied": 1}
    assert topic.committed() == 3


def test_a_truncate_is_a_barrier_within_a_batch(topic: Topic, parts: Parts, store: UserStore) -> None:
    topic.upsert(1)
    topic.upsert(2)
    topic.write(None, "t")
    topic.upsert(2, "after")
    topic.upsert(3)
    parts.drain(topic)
    assert stored(store) == topic.expected
    assert {found["_id"] for found in store.book("deleted").find()} == {"1"}


def test_broken_rules_are_counted_and_applied_all_the_same(topic: Topic, parts: Parts, store: UserStore) -> None:
    class Rules(SilentListener):
        broken: dict[str, int] = {}  # noqa: RUF012

        def batch_applied(self, batch: AppliedBatch) -> None:
            for name, count in batch.broken_rules.items():
                self.broken[name] = self.broken.get(name, 0) + count

    listener = Rules()
    topic.upsert(1, "not a login!")
    topic.upsert(2, None)
    parts.drain(topic, rules=BUILT_IN_RULES, listener=listener)
    assert listener.broken["login_format"] == 2
    assert stored(store) == topic.expected


# poison


POISON: dict[str, tuple[Any, Any]] = {
    "not-json": ({"user_id": 1}, b"{"),
    "not-utf8": ({"user_id": 1}, b"\xff\xfe"),
    "not-an-event": ({"user_id": 1}, {"hello": "world"}),
    "missing-key": (None, None),
    "bad-user-id": ({"user_id": 1}, {"op": "c", "after": {"user_id": 1.5, "login": "x"}}),
}


def test_poison_goes_to_the_dead_letters_alone(topic: Topic, parts: Parts, store: UserStore) -> None:
    for number, (key, value) in enumerate(POISON.values()):
        topic.upsert(100 + number)
        topic.raw(key, value, headers=[("trace", b"\x00\x01")])
        topic.upsert(200 + number)
    report = parts.drain(topic)
    assert stored(store) == topic.expected
    assert report.records == {"applied": 10, "dead_letter": 5}
    letters = list(read_dead_letters(topic.kafka))
    assert [letter.offset for letter in letters] == [1, 4, 7, 10, 13]
    kinds = {"not-json", "other-format", "not-an-event", "missing-key", "missing-column"}
    assert {letter.kind for letter in letters} == kinds
    assert [letter.value for letter in letters][:2] == [b"{", b"\xff\xfe"]
    assert letters[0].headers == [("trace", b"\x00\x01")]
    assert topic.committed() == 15


def test_poison_as_large_as_its_topic_takes_has_room_among_the_dead_letters(
    make_topic: Callable[..., Topic], parts: Parts, store: UserStore
) -> None:
    topic = make_topic(largest_bytes=6_000_000)
    poison = b"{" * 5_999_000
    topic.raw({"user_id": 1}, poison)
    topic.upsert(2)
    assert parts.drain(topic).records == {"dead_letter": 1, "applied": 1}
    assert stored(store) == topic.expected
    assert [letter.value for letter in read_dead_letters(topic.kafka)] == [poison]


def test_the_states_before_a_refused_one_are_applied_in_order(topic: Topic, parts: Parts, store: UserStore) -> None:
    make_strict(store)
    topic.upsert(1, "good")
    topic.upsert(1, "much too long")
    topic.upsert(2, "much too long")
    topic.upsert(2, "good")
    topic.upsert(3, "good")
    topic.upsert(3, "better")
    topic.upsert(3, "much too long")
    topic.upsert(4, "much too long")
    topic.upsert(5, "good")
    topic.flush()
    consumer = ChangeConsumer(topic.kafka, lambda: StrictStore(parts.uri, parts.database, "Users"))
    report = consumer.run(threading.Event(), until_end=True, seconds=60)
    assert {key: row["login"] for key, row in stored(store).items()} == {
        "1": "good",
        "2": "good",
        "3": "better",
        "5": "good",
    }
    # The second record of user 2 is the last word, so that nobody asked the database about the first one.
    assert report.records == {"applied": 5, "coalesced": 1, "dead_letter": 3}
    assert [(letter.kind, letter.offset) for letter in read_dead_letters(topic.kafka)] == [
        ("validator", 1),
        ("validator", 6),
        ("validator", 7),
    ]


# places in the topic


def test_changes_that_were_removed_before_they_were_applied_are_told_and_nothing_is_skipped(
    topic: Topic, parts: Parts
) -> None:
    topic.upsert(1)
    topic.flush()
    topic.commit(500)
    with pytest.raises(PermanentError, match=r"at offset 500, but the topic holds 0 to 1.*snapshot"):
        parts.consumer(topic).run(threading.Event(), seconds=20)


def test_a_refused_write_stops_with_nothing_committed(topic: Topic, parts: Parts, mongo_uri: str) -> None:
    topic.upsert(1)
    topic.flush()
    wrong = mongo_uri.replace("://", "://nobody:wrong@")
    with pytest.raises(RefusedError, match="MONGODB_URI"):
        ChangeConsumer(topic.kafka, lambda: UserStore(wrong, parts.database, "Users")).run(
            threading.Event(), seconds=20
        )
    assert topic.committed() == -1001


def test_a_refused_batch_at_the_end_of_a_drain_is_not_committed(
    topic: Topic, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> dict[str, Refused]:
        # By then the drain has seen that the topic ends, and looks whether all is applied.
        time.sleep(1)
        raise RefusedError("The database refuses.", way_out="Ask it.")

    topic.upsert(1)
    topic.flush()
    monkeypatch.setattr(UserWriter, "upsert", refuse)
    with pytest.raises(RefusedError, match="The database refuses"):
        parts.consumer(topic).run(threading.Event(), until_end=True, seconds=20)
    # Where the batch begins may be committed, as a sign of life.
    assert topic.committed() in (-1001, 0)


@pytest.mark.parametrize("records", [0, 3])
def test_a_drain_of_a_topic_that_was_made_anew_is_no_success(topic: Topic, parts: Parts, records: int) -> None:
    for key in range(records):
        topic.upsert(key)
    topic.flush()
    topic.commit(1_000)
    with pytest.raises(PermanentError, match=rf"at offset 1000, but the topic holds 0 to {records}.*snapshot"):
        parts.consumer(topic).run(threading.Event(), until_end=True, seconds=20)
    assert topic.committed() == 1_000
    backlog = read_backlog(topic.kafka)
    assert (backlog.recreated, backlog.waiting) == (1, records)
    found = kafka_lag(backlog, limit=10)
    assert not found.passed
    assert "recreated" in found.summary
    assert "snapshot" in found.way_out


@pytest.mark.parametrize("place", [None, 1])
def test_a_topic_that_was_deleted_and_made_anew_is_refused_wherever_the_group_is_in_it(
    topic: Topic, parts: Parts, store: UserStore, place: int | None
) -> None:
    topic.upsert(1)
    parts.drain(topic)
    assert not TopicGuard(topic.kafka, store).is_another()
    again = make_anew(topic)
    for key in (2, 3):
        again.upsert(key)
    again.flush()
    until(lambda: again.committed() == -1001)
    if place is not None:
        # What a consumer may commit that has not noticed.
        again.commit(place)
    for until_end in (True, False):
        with pytest.raises(PermanentError, match=r"another topic .*snapshot"):
            parts.consumer(again).run(threading.Event(), until_end=until_end, seconds=20)
    assert set(stored(store)) == {"1"}
    found = kafka_lag(read_backlog(again.kafka), 10, is_another=TopicGuard(again.kafka, store).is_another())
    assert not found.passed
    assert "recreated" in found.summary
    assert "snapshot" in found.way_out
    new_group = replace(again, kafka=replace(again.kafka, group_id=f"{again.kafka.group_id}-2"))
    parts.drain(new_group)
    assert set(stored(store)) == {"1", "2", "3"}


def add_partitions(topic: Topic, number: int) -> None:
    """Give the topic so many partitions, and have its producer know."""
    admin = AdminClient({"bootstrap.servers": topic.kafka.bootstrap_servers})
    [added] = admin.create_partitions([NewPartitions(topic.kafka.topic, number)]).values()
    added.result()
    name = topic.kafka.topic
    until(lambda: len(topic.producer.list_topics(name, timeout=20).topics[name].partitions) == number)


@pytest.mark.parametrize("consumers", [1, 2])
def test_what_partitions_hold_that_were_added_behind_a_backlog_is_applied_after_it(
    topic: Topic, parts: Parts, store: UserStore, consumers: int
) -> None:
    topic.upsert(0)
    parts.drain(topic)
    for round_ in range(400):
        for key in range(50):
            topic.upsert(key, f"old-{round_}")
    topic.flush()
    add_partitions(topic, 2)
    for key in range(50):
        topic.upsert(key, "new", partition=1)
    topic.flush()
    with ExitStack() as stack:
        running = [stack.enter_context(parts.running(topic)) for _ in range(consumers)]
        until(lambda: read_backlog(topic.kafka).waiting == 0, seconds=60)
        for one in running:
            one.end()
    assert stored(store) == topic.expected
    assert {found["login"] for found in stored(store).values()} == {"new"}
    # From then on all partitions are alike, and a drain ends.
    topic.upsert(1, "newer", partition=1)
    topic.upsert(2, "newer", partition=0)
    parts.drain(topic)
    assert stored(store) == topic.expected
    assert TopicGuard(topic.kafka, store).committed_partitions() == {0, 1}


def test_a_drain_applies_added_partitions_after_the_others(topic: Topic, parts: Parts, store: UserStore) -> None:
    topic.upsert(0)
    parts.drain(topic)
    for round_ in range(100):
        for key in range(50):
            topic.upsert(key, f"old-{round_}")
    topic.flush()
    add_partitions(topic, 3)
    for key in range(50):
        topic.upsert(key, "new", partition=1 + key % 2)
    parts.drain(topic)
    assert stored(store) == topic.expected


@pytest.mark.parametrize("until_end", [True, False], ids=["drain", "run"])
def test_added_partitions_are_not_held_for_the_mark_of_a_transaction(
    topic: Topic, parts: Parts, store: UserStore, *, until_end: bool
) -> None:
    topic.upsert(0)
    parts.drain(topic)
    # The last thing in the first partition is the mark, whose offset nobody commits who only applies records.
    settings = {"bootstrap.servers": topic.kafka.bootstrap_servers, "transactional.id": topic.kafka.topic}
    plain, topic.producer = topic.producer, Producer(settings)
    topic.producer.init_transactions(30)
    topic.producer.begin_transaction()
    topic.upsert(1, "old")
    topic.producer.commit_transaction(30)
    topic.producer = plain
    add_partitions(topic, 2)
    topic.upsert(1, "new", partition=1)
    if until_end:
        parts.drain(topic)
    else:
        topic.flush()
        with parts.running(topic) as running:
            until(lambda: stored(store) == topic.expected)
            running.end()
    assert stored(store) == topic.expected
    assert topic.committed() == 3
    parts.drain(topic)
    assert TopicGuard(topic.kafka, store).committed_partitions() == {0, 1}


@pytest.mark.parametrize("removed", [False, True])
def test_a_place_that_the_brokers_have_forgotten_is_told_and_nothing_is_skipped_or_begun_anew(
    topic: Topic, parts: Parts, store: UserStore, *, removed: bool
) -> None:
    topic.upsert(1)
    parts.drain(topic)
    topic.upsert(2)
    topic.flush()
    admin = AdminClient({"bootstrap.servers": topic.kafka.bootstrap_servers})
    # As brokers do once a group had no member for long, and with records that are too old.
    admin.delete_consumer_groups([topic.kafka.group_id])[topic.kafka.group_id].result()
    if removed:
        [gone] = admin.delete_records([TopicPartition(topic.kafka.topic, 0, 2)]).values()
        assert gone.result().low_watermark == 2
    assert topic.committed() == -1001
    told = r"forgotten where group .* was.*snapshot"
    with pytest.raises(PermanentError, match=told):
        parts.consumer(topic).run(threading.Event(), until_end=True, seconds=20)
    topic.upsert(3)
    topic.flush()
    with pytest.raises(PermanentError, match=told):
        parts.consumer(topic).run(threading.Event(), seconds=20)
    assert set(stored(store)) == {"1"}
    assert topic.committed() == -1001
    found = kafka_lag(read_backlog(topic.kafka), 10, placed=TopicGuard(topic.kafka, store).committed_partitions())
    assert not found.passed
    assert found.counts["forgotten"] == 1
    assert "committed offsets of 1 partitions are gone" in found.summary
    assert "snapshot" in found.way_out
    new_group = replace(topic, kafka=replace(topic.kafka, group_id=f"{topic.kafka.group_id}-2"))
    parts.drain(new_group)
    assert set(stored(store)) == ({"1", "3"} if removed else {"1", "2", "3"})


def test_a_place_of_which_another_consumer_learns_meanwhile_is_not_taken_for_forgotten(
    topic: Topic, store: UserStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, others = TopicGuard(topic.kafka, store), TopicGuard(topic.kafka, store)

    def asked_before_the_other_began() -> dict[int, int | None]:
        others.check(lambda: {0: 1})
        return {0: None}

    with closing(mine), closing(others):
        mine.check(asked_before_the_other_began)
        with pytest.raises(PermanentError, match="forgotten"):
            mine.check(lambda: {0: None})
        # A broker that gives no ids, as while brokers are replaced one by one.
        monkeypatch.setattr(TopicIds, "describe", lambda *_: ("", 1))
        with pytest.raises(PermanentError, match="forgotten"):
            mine.check(lambda: {0: None})


@pytest.mark.parametrize("between_looks", [0.1, 6])
def test_a_consumer_that_runs_notices_that_its_topic_was_made_anew(
    topic: Topic, parts: Parts, monkeypatch: pytest.MonkeyPatch, between_looks: float
) -> None:
    monkeypatch.setattr(topic_guard, "_TOPIC_SECONDS", between_looks)
    topic.upsert(1)
    topic.flush()
    with parts.running(topic) as running:
        until(lambda: topic.committed() == 1)
        again = make_anew(topic)
        for key in range(2, 12):
            again.upsert(key)
        again.flush()
        running.thread.join(30)
        with pytest.raises(PermanentError, match=r"another topic|the topic is new"):
            running.end()


def test_brokers_that_give_topics_no_ids_can_be_replaced_by_some_that_do(
    topic: Topic, parts: Parts, store: UserStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    described: Future[Any] = Future()
    described.set_result(SimpleNamespace(topic_id=Uuid(0, 0), partitions=[None]))
    with monkeypatch.context() as old_brokers:
        old_brokers.setattr(AdminClient, "describe_topics", lambda *_, **__: {topic.kafka.topic: described})
        topic.upsert(1)
        parts.drain(topic)
        assert not TopicGuard(topic.kafka, store).is_another()
    topic.upsert(2)
    parts.drain(topic)
    assert set(stored(store)) == {"1", "2"}
    with monkeypatch.context() as old_brokers:
        old_brokers.setattr(AdminClient, "describe_topics", lambda *_, **__: {topic.kafka.topic: described})
        assert not TopicGuard(topic.kafka, store).is_another()


# the group


class Client:
    """A consumer's client, of which a test answers some calls itself."""

    def __init__(self, inner: Any, **answers: Callable[..., Any]) -> None:
        self._inner = inner
        vars(self).update(answers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def failing(code: int) -> Callable[..., Any]:
    """Return a call of the client's that fails."""

    def fail(*_: Any, **__: Any) -> Any:
        raise KafkaException(KafkaError(code))

    return fail


def joined(topic: Topic) -> TopicConsumer:
    """Return a consumer that has its partitions."""
    consumer = TopicConsumer(topic.kafka, assigned=lambda _: None, revoked=lambda _: None, lost=lambda _: None)
    until(lambda: consumer.poll(1, 0.05) == [] and bool(consumer.partitions))
    return consumer


def test_a_consumer_without_records_tells_the_group_that_it_lives_as_often_as_is_set(
    topic: Topic, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats: list[str] = []
    heard = logging.getLogger("heard")
    heard.setLevel(logging.DEBUG)

    def hear(record: logging.LogRecord) -> bool:
        if "Heartbeat for group" in (text := record.getMessage()):
            beats.append(text)
        return False

    heard.addFilter(hear)
    spoken = {**consumer_config(topic.kafka), "debug": "cgrp", "log_level": 7, "logger": heard}
    monkeypatch.setattr(kafka_consumer, "consumer_config", lambda _: spoken)
    looks = 30
    with closing(joined(topic)) as consumer:
        beats.clear()
        # As long as the interval: at the latest every second look finds it over.
        for _ in range(looks):
            assert consumer.poll(1, 0.1) == []
    # Unasked, one comes every half a second.
    assert len(beats) > looks // 3


@pytest.mark.parametrize("pause", ["of its own", "of a rebalance"])
def test_records_are_fetched_at_once_when_a_pause_ends(pause: str, topic: Topic) -> None:
    def member(given: Callable[[set[int]], None]) -> TopicConsumer:
        return TopicConsumer(topic.kafka, assigned=given, revoked=lambda _: None, lost=lambda _: None)

    def append() -> int:
        topic.upsert(1)
        topic.flush()
        return topic.written - 1

    def comes_soon() -> bool:
        last, deadline = append(), time.monotonic() + 0.3
        until(lambda: any(message.offset() == last for message in consumer.poll(100, 0.05)))
        return time.monotonic() < deadline

    def soon_after_pause() -> bool:
        consumer.pause()
        append()
        # Its end is told to the library's thread, which then sees that nothing is to be fetched.
        until(lambda: consumer.poll(1, 0.05) == [])
        consumer.resume()
        return comes_soon()

    def soon_after_rebalance() -> bool:
        """Go on when another has come, which ends a pause that only the library knows of."""
        came, before = threading.Event(), len(given)
        with closing(member(lambda _: came.set())) as other:
            until(lambda: other.poll(1, 0.05) == [] and came.is_set())
            append()
            other.poll(1, 0.05)
            soon = comes_soon()
        # The next one can come only when this consumer has been told that this one went.
        until(lambda: consumer.poll(1, 0.05) == [] and len(given) >= before + 2)
        return soon

    given: list[set[int]] = []
    with closing(member(given.append)) as consumer:
        until(lambda: consumer.poll(1, 0.05) == [] and bool(consumer.partitions))
        soon = [soon_after_pause() if pause == "of its own" else soon_after_rebalance() for _ in range(6)]
    # Unasked, the thread looks once a second.
    assert sum(soon) >= 5, soon


@pytest.mark.parametrize("asked", [KafkaError._TIMED_OUT, KafkaError.TOPIC_AUTHORIZATION_FAILED])
def test_what_is_refused_in_a_rebalance_is_raised_when_records_are_taken_whatever_else_is_wrong(
    asked: int, topic: Topic, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(joined(topic)) as consumer:
        inner = consumer._consumer
        monkeypatch.setattr(consumer, "_consumer", Client(inner, offsets_for_times=failing(asked)))
        if asked == KafkaError._TIMED_OUT:
            consumer._on_error(KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED))
        consumer._on_revoke(inner, [])
        consumer._on_assign(inner, [])
        with pytest.raises(RefusedError):
            consumer.poll(1, 0.05)


def test_a_record_of_a_partition_that_goes_before_it_is_returned_is_not_returned(
    topic: Topic, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = joined(topic)
    inner = consumer._consumer

    def rebalance_first(limit: int, seconds: float) -> list[Any]:
        consumer._on_revoke(inner, [TopicPartition(topic.kafka.topic, 0)])
        return inner.consume(limit, seconds)

    topic.upsert(1)
    topic.flush()
    monkeypatch.setattr(consumer, "_consumer", Client(inner, consume=rebalance_first))
    assert consumer.poll(10, 10) == []
    assert consumer.partitions == set()
    consumer.close()


def test_a_record_in_hand_is_not_lost_where_taking_more_fails(topic: Topic, monkeypatch: pytest.MonkeyPatch) -> None:
    consumer = joined(topic)
    topic.upsert(1)
    topic.upsert(2)
    topic.flush()
    with monkeypatch.context() as patched:
        patched.setattr(consumer, "_consumer", Client(consumer._consumer, consume=failing(KafkaError._STATE)))
        taken = consumer.poll(10, 10)
        with pytest.raises(UnavailableError):
            consumer.poll(10, 0)

    def both_taken() -> bool:
        taken.extend(consumer.poll(10, 1))
        return len(taken) == 2

    until(both_taken)
    assert [message.offset() for message in taken] == [0, 1]
    consumer.close()


def test_two_consumers_share_partitions_and_hand_over_without_loss(
    make_topic: Callable[..., Topic], parts: Parts, store: UserStore
) -> None:
    topic = make_topic(partitions=2)
    stopped = threading.Event()

    def write() -> None:
        number = 0
        while not stopped.is_set():
            number += 1
            key = number % 97
            topic.upsert(key, f"u{number}", partition=key % 2)
            stopped.wait(0.002)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        with parts.running(topic) as first:
            until(lambda: len(stored(store)) > 50)
            with parts.running(topic) as second:
                until(lambda: second.metrics.snapshot().records > 100)
                first.end()
                seen = second.metrics.snapshot().records
                until(lambda: second.metrics.snapshot().records > seen + 300)
                with parts.running(topic) as third:
                    until(lambda: third.metrics.snapshot().records > 100)
                    second.end()
                    stopped.set()
                    writer.join()
                    topic.flush()
                    until(lambda: stored(store) == topic.expected)
                    third.end()
    finally:
        stopped.set()
        writer.join()
    assert list(read_dead_letters(topic.kafka)) == []


def members(topic: Topic) -> int:
    """How many consumers the group has."""
    admin = AdminClient({"bootstrap.servers": topic.kafka.bootstrap_servers})
    [described] = admin.describe_consumer_groups([topic.kafka.group_id]).values()
    return len(described.result(20).members)


def test_a_member_without_partitions_leaves_at_once_so_that_nobody_waits_for_it(topic: Topic) -> None:
    def member(came: list[set[int]]) -> TopicConsumer:
        return TopicConsumer(topic.kafka, assigned=came.append, revoked=lambda _: None, lost=lambda _: None)

    came_first: list[set[int]] = []
    came_second: list[set[int]] = []
    first = member(came_first)
    until(lambda: not first.poll(1, 0.05) and bool(came_first))
    second = member(came_second)
    until(lambda: not first.poll(1, 0.05) and not second.poll(1, 0.05) and bool(came_second))
    assert (first.partitions, second.partitions, members(topic)) == ({0}, set(), 2)
    second.close()
    until(lambda: members(topic) == 1, topic.kafka.session_timeout_seconds / 3)
    first.close()
    assert members(topic) == 0


def test_a_rehearsal_beside_another_consumer_says_what_is_in_its_way(
    topic: Topic, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "_JOIN_SECONDS", 3 - topic.kafka.session_timeout_seconds)
    settings = load_settings(MONGODB_URI=parts.uri, MONGODB_DATABASE=parts.database)
    metrics = ChangeMetrics()
    with parts.running(topic) as other:
        until(lambda: bool(other.metrics.snapshot().lag))
        with (
            rehearsal._Consuming(settings, topic.kafka, Listeners(metrics)) as own,
            pytest.raises(UnavailableError, match=r"got no partition.*cdc_supervisor"),
        ):
            rehearsal._await_partitions(metrics, topic.kafka, own)
        other.end()
        with rehearsal._Consuming(settings, topic.kafka, Listeners(metrics)) as own:
            rehearsal._await_partitions(metrics, topic.kafka, own)


# a truncate in several partitions


def test_a_truncate_is_put_in_the_order_of_the_binlog(
    make_topic: Callable[..., Topic], parts: Parts, store: UserStore
) -> None:
    topic = make_topic(partitions=3)
    topic.upsert(1, "old", partition=1, pos=10)
    topic.delete(7, partition=1, pos=15)
    topic.upsert(2, "old", partition=2, pos=20)
    topic.upsert(3, "old", partition=0, pos=25)
    topic.write(None, "t", partition=0, pos=100)
    topic.upsert(4, "new", partition=1, pos=110)
    topic.upsert(5, "new", partition=2, pos=120)
    topic.upsert(3, "new", partition=0, pos=130)
    for number in range(40):
        topic.upsert(10 + number, f"u{number}", partition=number % 3)
    parts.drain(topic)
    assert stored(store) == topic.expected
    assert {found["_id"] for found in store.book("deleted").find()} == {"1", "2", "7"}


@pytest.mark.parametrize("failing", range(1, 6))
def test_a_fault_while_a_truncate_is_put_in_order_loses_nothing(
    make_topic: Callable[..., Topic], parts: Parts, store: UserStore, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    topic = make_topic(partitions=2)
    topic.upsert(1, "old", partition=0, pos=10)
    topic.upsert(2, "old", partition=1, pos=20)
    topic.write(None, "t", partition=0, pos=100)
    topic.upsert(3, "new", partition=0, pos=110)
    topic.upsert(4, "new", partition=1, pos=120)
    commits = itertools.count(1)
    commit = TopicConsumer.commit

    def fail_once(consumer: TopicConsumer, offsets: dict[int, int]) -> None:
        if next(commits) == failing:
            raise UnavailableError("The group is in a rebalance.", way_out="Try again.")
        commit(consumer, offsets)

    monkeypatch.setattr(TopicConsumer, "commit", fail_once)
    assert parts.drain(topic).retries == {"UnavailableError": 1}
    assert stored(store) == topic.expected
    assert set(topic.expected) == {"3", "4"}
    assert (topic.committed(0), topic.committed(1)) == (3, 2)


def with_a_truncate_that_waits(make_topic: Callable[..., Topic]) -> Topic:
    """Make a topic with a truncate from behind which the other partition has no change yet."""
    topic = make_topic(partitions=2)
    topic.upsert(1, partition=0, pos=10)
    topic.upsert(2, partition=1, pos=20)
    topic.write(None, "t", partition=0, pos=100)
    return topic


def test_a_drain_that_is_stopped_while_a_truncate_waits_has_not_reached_the_end(
    make_topic: Callable[..., Topic], parts: Parts, store: UserStore
) -> None:
    topic = with_a_truncate_that_waits(make_topic)
    topic.upsert(3, partition=0, pos=110)
    topic.flush()
    report = parts.consumer(topic).run(threading.Event(), until_end=True, seconds=6)
    assert not report.reached_end
    assert topic.committed(0) == 1
    topic.upsert(4, partition=1, pos=120)
    parts.drain(topic)
    assert set(stored(store)) == {"3", "4"}


def test_who_goes_back_behind_a_truncate_of_another_partition_applies_it_again(
    make_topic: Callable[..., Topic], parts: Parts, store: UserStore
) -> None:
    topic = make_topic(partitions=2)
    topic.upsert(3, "old", partition=1, pos=10)
    topic.write(None, "t", partition=0, pos=100)
    topic.upsert(5, "new", partition=0, pos=110)
    topic.upsert(4, "new", partition=1, pos=120)
    parts.drain(topic)
    assert stored(store) == topic.expected
    request_rewind(topic, store, partition=1, offset=0)
    with parts.running(topic) as running:
        until(lambda: running.metrics.snapshot().records >= 4 and rewinds(store) == 0)
        until(lambda: (topic.committed(0), topic.committed(1)) == (2, 2))
    assert stored(store) == topic.expected
    assert set(topic.expected) == {"4", "5"}


def request_rewind(topic: Topic, store: UserStore, *, partition: int, offset: int) -> None:
    """Leave the request that a consumer leaves when it is in doubt of a command."""
    GroupBook(store).request_rewind({f"{topic.kafka.group_name}/{partition}": offset})


def let_a_command_come_late(topic: Topic, parts: Parts, store: UserStore) -> None:
    """Apply four users, leave an older state of one as a late command does, and the request that is left then."""
    for key in range(4):
        topic.upsert(key, "right")
    parts.drain(topic)
    store.users.update_one({"user_id": "2"}, {"$set": {"login": "what a late command left"}})
    request_rewind(topic, store, partition=0, offset=1)


def rewinds(store: UserStore) -> int:
    """How many rewind requests there are."""
    return store.database["_ghsync_rewinds"].count_documents({})


@pytest.mark.parametrize("answered", [True, False])
def test_a_rewind_is_carried_out_also_where_the_commit_s_answer_is_lost(
    topic: Topic, parts: Parts, store: UserStore, monkeypatch: pytest.MonkeyPatch, answered: bool
) -> None:
    let_a_command_come_late(topic, parts, store)
    commit = TopicConsumer.commit
    lost: list[dict[int, int]] = []

    def lose_answer(consumer: TopicConsumer, offsets: dict[int, int]) -> None:
        commit(consumer, offsets)
        if offsets == {0: 1} and not answered and not lost:
            lost.append(offsets)
            raise UnavailableError("The answer is lost.", way_out="Try again.")

    monkeypatch.setattr(TopicConsumer, "commit", lose_answer)
    with parts.running(topic) as running:
        until(lambda: running.metrics.snapshot().records >= 3 and rewinds(store) == 0)
        until(lambda: topic.committed() == 4)
    assert bool(lost) is not answered
    assert stored(store) == topic.expected


def test_a_drain_carries_a_rewind_out_before_it_says_that_all_is_applied(
    topic: Topic, parts: Parts, store: UserStore
) -> None:
    let_a_command_come_late(topic, parts, store)
    parts.drain(topic)
    assert stored(store) == topic.expected
    assert rewinds(store) == 0


def test_a_drain_looks_again_where_the_group_is_once_no_rewind_is_pending(
    topic: Topic, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic.upsert(1)
    parts.drain(topic)
    is_any_before, committed = RewindRequests.is_any_before, TopicConsumer.committed
    heeded: list[str] = []

    def heed(rewinds: RewindRequests, offsets: dict[int, int]) -> bool:
        heeded.append("no rewind is pending")
        return is_any_before(rewinds, offsets)

    def went_back(consumer: TopicConsumer, partitions: Any) -> dict[int, int | None]:
        if heeded == ["no rewind is pending"]:
            heeded.append("the group is rewound")
            return {0: 0}
        return committed(consumer, partitions)

    monkeypatch.setattr(RewindRequests, "is_any_before", heed)
    monkeypatch.setattr(TopicConsumer, "committed", went_back)
    parts.drain(topic)
    assert heeded == ["no rewind is pending", "the group is rewound", "no rewind is pending"]


def test_of_a_rewind_and_one_that_is_to_be_requested_the_earlier_counts(
    topic: Topic, store: UserStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    request_rewind(topic, store, partition=0, offset=5)

    def fail(*_: Any) -> None:
        raise UnavailableError("away", way_out="wait")

    monkeypatch.setattr(GroupBook, "request_rewind", fail)
    rewinds = RewindRequests(GroupBook(store), RepairRequests(store), topic.kafka.group_name)
    assert rewinds.is_any_before({0: 6})
    assert not rewinds.is_any_before({0: 5})
    rewinds.request({0: 100}, ())
    assert rewinds.is_unfinished
    assert rewinds.is_any_before({0: 100})
    assert not rewinds.is_any_before({0: 5})


def test_a_batch_whose_partitions_were_given_up_while_its_letters_are_written_is_not_written(
    topic: Topic, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, stop_batch = write.Writer._write_batch, write.Writer.stop_batch
    at_work, stopped = threading.Event(), threading.Event()
    became: list[str] = []

    def wait(*_: Any) -> list[Any]:
        at_work.set()
        assert stopped.wait(30)
        return []

    def stop(writer: write.Writer) -> None:
        stop_batch(writer)
        stopped.set()

    def watched(writer: write.Writer, batch: Any) -> Any:
        try:
            written = work(writer, batch)
        except Exception as error:
            became.append(type(error).__name__)
            raise
        became.append("written")
        return written

    monkeypatch.setattr(DeadLetters, "write", wait)
    monkeypatch.setattr(write.Writer, "stop_batch", stop)
    monkeypatch.setattr(write.Writer, "_write_batch", watched)
    monkeypatch.setattr(in_flight, "_GIVE_UP_SECONDS", 0.5)
    topic.raw({"user_id": 1}, b"no JSON")
    topic.flush()
    with parts.running(topic) as running:
        assert at_work.wait(30)
        running.end()
    assert became == ["_StoppedError"]
    assert topic.committed() in (-1001, 0)


def test_a_renewed_fence_sets_back_no_partition_that_has_gone(
    make_topic: Callable[..., Topic], store: UserStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = make_topic(2)
    for partition in (0, 1):
        topic.upsert(partition, partition=partition)
    topic.flush()
    committed: list[dict[int, int]] = []
    monkeypatch.setattr(TopicConsumer, "commit", lambda _, offsets: committed.append(dict(offsets)))
    messages = list(read_to_end(topic.kafka, topic.kafka.topic))
    batch = Batch()
    batch.add(messages, RecordDecoder().decode(messages))
    member = TopicConsumer(topic.kafka, assigned=print, revoked=print, lost=print)
    with closing(TopicGuard(topic.kafka, store)) as guard, closing(member):
        for partitions in ({0, 1}, {0}, set[int]()):
            member.partitions = partitions
            fence = GroupFence(topic.kafka.session_timeout_seconds)
            GroupOffsets(member, fence, TopicChecks(guard, member)).renew_fence(batch.starts)
    assert committed == [{0: 0, 1: 0}, {0: 0}]


def test_the_last_command_of_a_batch_that_came_late_requests_a_rewind(
    topic: Topic, parts: Parts, store: UserStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic.upsert(1)
    parts.drain(topic)
    topic.delete(1)
    topic.flush()
    delete_many, now, commit = Collection.delete_many, clock.now, TopicConsumer.commit
    slept = [0.0]

    def late(collection: Any, *args: Any, **more: Any) -> Any:
        # As a process that was frozen, or a machine that slept, between the look and the sending.
        slept[0] += 60 * (collection.name == "Users")
        return delete_many(collection, *args, **more)

    def out_of_the_group(consumer: TopicConsumer, offsets: dict[int, int]) -> None:
        if slept[0]:
            raise UnavailableError("This consumer is out of the group.", way_out="Join.")
        commit(consumer, offsets)

    with monkeypatch.context() as patched:
        patched.setattr(Collection, "delete_many", late)
        patched.setattr(clock, "now", lambda: now() + slept[0])
        patched.setattr(TopicConsumer, "commit", out_of_the_group)
        with parts.running(topic) as running:
            until(lambda: slept[0] > 0)
            running.end()
    assert [note["offset"] for note in store.database["_ghsync_rewinds"].find()] == [1]
    parts.drain(topic)
    assert stored(store) == topic.expected == {}
    assert rewinds(store) == 0


def test_a_batch_that_is_refused_after_a_command_that_may_come_late_requests_a_rewind(
    topic: Topic, parts: Parts, store: UserStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic.upsert(1)
    topic.flush()
    answers = [AutoReconnect("connection closed"), OperationFailure("not authorized", 13)]

    def fail(*_: Any, **__: Any) -> None:
        raise answers.pop(0)

    with monkeypatch.context() as patched:
        patched.setattr(Collection, "bulk_write", fail)
        with pytest.raises(RefusedError, match="Writing Users"):
            parts.consumer(topic).run(threading.Event(), seconds=20)
    assert answers == []
    assert rewinds(store) == 1
    parts.drain(topic)
    assert stored(store) == topic.expected


@pytest.mark.parametrize("back", [True, False])
def test_a_rewind_is_requested_though_the_store_comes_back_only_after_the_end_or_the_run_fails(
    topic: Topic, parts: Parts, store: UserStore, monkeypatch: pytest.MonkeyPatch, back: bool
) -> None:
    proxy = Proxy(parts.uri)
    tries = threading.Semaphore(0)
    ask_again = GroupBook.request_rewind

    def ask(stream: GroupBook, names: dict[str, int]) -> None:
        try:
            ask_again(stream, names)
        finally:
            tries.release()

    # That the batch meets the store that is away: an acknowledgement may meet it before.
    met = threading.Event()

    def tell(*arguments: Any) -> Any:
        try:
            return apply(*arguments)
        except TransientError:
            met.set()
            raise

    monkeypatch.setattr(GroupBook, "request_rewind", ask)
    monkeypatch.setattr(apply_batch, "apply", tell)
    monkeypatch.setattr(write, "_LAST_ATTEMPTS", 7 if back else 2)
    topic.upsert(1)
    topic.flush()
    try:
        with Parts(proxy.uri, parts.database).running(topic) as running:
            until(lambda: topic.committed() == 1)
            # From then on nothing but a batch needs the store.
            until(lambda: TopicGuard(topic.kafka, store).committed_partitions() == {0})
            proxy.cut()
            topic.upsert(2)
            topic.flush()
            assert met.wait(20)
            running.stop.set()
            for _ in range(3):
                assert tries.acquire(timeout=20)
            if back:
                proxy.join()
                running.end()
                assert rewinds(store) == 1
            else:
                with pytest.raises(UnavailableError, match=r"partition 0 from offset 1 .*runbook\.md"):
                    running.end()
                assert rewinds(store) == 0
    finally:
        proxy.cut()


def test_two_truncates_in_two_partitions_are_put_in_order(
    make_topic: Callable[..., Topic], parts: Parts, store: UserStore
) -> None:
    topic = make_topic(partitions=2)
    topic.upsert(1, partition=0, pos=10)
    topic.write(None, "t", partition=1, pos=50)
    topic.upsert(2, partition=0, pos=60)
    topic.upsert(3, partition=1, pos=70)
    topic.write(None, "t", partition=0, pos=80)
    topic.upsert(4, partition=0, pos=90)
    topic.upsert(5, partition=1, pos=100)
    parts.drain(topic)
    assert stored(store) == topic.expected
    assert set(topic.expected) == {"4", "5"}


def test_a_truncate_whose_order_is_not_sure_is_refused_with_its_place(
    make_topic: Callable[..., Topic], parts: Parts, store: UserStore
) -> None:
    topic = with_a_truncate_that_waits(make_topic)
    topic.flush()
    with pytest.raises(PermanentError, match=r"partition 0 offset 1 .* partition 1 holds no change from after it"):
        parts.consumer(topic, truncate_wait_seconds=1).run(threading.Event(), seconds=30)
    assert "1" in stored(store)
    assert topic.committed(0) == 1

    topic.upsert(3, partition=1, pos=110)
    topic.upsert(4, partition=0, pos=120)
    parts.drain(topic)
    assert set(stored(store)) == {"3", "4"}


def test_a_truncate_is_refused_where_a_record_does_not_tell_its_place(
    make_topic: Callable[..., Topic], parts: Parts
) -> None:
    topic = make_topic(partitions=2)
    topic.upsert(2, partition=1, pos=20)
    # As of an incremental snapshot: from either side of the truncate.
    topic.raw(
        {"user_id": 5},
        {"op": "r", "after": row(5), "source": {"snapshot": "incremental"}},
        partition=1,
    )
    topic.write(None, "t", partition=0, pos=100)
    topic.upsert(3, partition=1, pos=110)
    topic.flush()
    with pytest.raises(PermanentError, match=r"partition 0 offset 0 .* partition 1 offset 1 has no position"):
        parts.consumer(topic).run(threading.Event(), seconds=30)


def test_a_truncate_is_refused_where_the_order_of_the_binlog_is_broken(
    make_topic: Callable[..., Topic], parts: Parts
) -> None:
    topic = make_topic(partitions=2)
    topic.upsert(1, partition=1, pos=90)
    topic.upsert(2, partition=1, pos=20)
    topic.write(None, "t", partition=0, pos=100)
    topic.upsert(3, partition=1, pos=110)
    topic.flush()
    with pytest.raises(PermanentError, match="partition 1 offset 1 breaks the order"):
        parts.consumer(topic).run(threading.Event(), seconds=30)


GTIDS = "3e11fa47-71ca-11e1-9e33-c80aa9429562", "4e11fa47-71ca-11e1-9e33-c80aa9429562"
SERVERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "server_id": ({"server_id": 1, "file": "bin.000010"}, {"server_id": 2, "file": "bin.000001"}),
    "base name": ({"server_id": 1, "file": "old.000010"}, {"server_id": 1, "file": "new.000001"}),
    "none is named": ({"file": "mysql-bin.000010"}, {"file": "mysql-bin.000001"}),
    "one has GTIDs": ({"server_id": 1, "file": "bin.000010"}, {"server_id": 1, "file": "bin.000001", "gtid": "0-1-7"}),
    "relayed": (
        {"server_id": 1, "file": "bin.000001", "gtid": f"{GTIDS[0]}:7"},
        {"server_id": 1, "file": "bin.000001", "gtid": f"{GTIDS[1]}:7"},
    ),
}


def write_across_a_failover(
    topic: Topic, old: dict[str, Any], new: dict[str, Any], partitions: Sequence[int] = (0, 1)
) -> None:
    """Write changes of an old server, then a truncate and changes of a new one, in these two partitions."""

    def write(key: int | None, op: str, at: dict[str, Any], pos: int, partition: int) -> None:
        after = None if key is None else row(key)
        value = {"op": op, "before": None, "after": after, "source": {"snapshot": "false", "pos": pos, "row": 0} | at}
        topic.raw(None if key is None else {"user_id": key}, value, partition=partition)

    first, second = partitions
    write(1, "c", old, 100, second)
    write(10, "c", old, 101, first)
    write(None, "t", new, 4, first)
    write(3, "c", new, 300, first)
    write(2, "c", new, 200, second)
    topic.flush()


@pytest.mark.parametrize("case", SERVERS)
def test_a_truncate_is_refused_where_other_partitions_hold_changes_of_another_server(
    make_topic: Callable[..., Topic], parts: Parts, store: UserStore, case: str
) -> None:
    topic = make_topic(partitions=2)
    old, new = SERVERS[case]
    write_across_a_failover(topic, old, new)
    with pytest.raises(PermanentError) as caught:
        parts.consumer(topic, truncate_wait_seconds=1).run(threading.Event(), seconds=30)
    error = caught.value
    assert "partition 1 offset 0 is of " in error.message
    for told in (old, new):
        name = f"server {told['server_id']}/{told['file'].partition('.')[0]}" if "server_id" in told else "not name"
        assert name in error.message
        assert told.get("gtid", "") in error.message
    assert "one partition" in error.way_out
    # The truncate, and what comes after it in its partition, waits.
    assert topic.committed(0) <= 1
    assert stored(store).keys() <= {"1", "10", "2"}


def test_a_failover_in_a_topic_of_one_partition_keeps_the_order_of_the_offsets(
    make_topic: Callable[..., Topic], parts: Parts, store: UserStore
) -> None:
    for nth, (old, new) in enumerate(SERVERS.values(), 1):
        topic = make_topic()
        write_across_a_failover(topic, old, new, (0, 0))
        parts.drain(topic)
        assert (nth, set(stored(store))) == (nth, {"2", "3"})


def test_a_truncate_is_put_in_order_where_transactions_are_relayed_by_another_server(
    make_topic: Callable[..., Topic], parts: Parts, store: UserStore
) -> None:
    topic = make_topic(partitions=2)
    for number, (key, partition, file, pos) in enumerate(
        [(1, 1, "old.000010", 100), (2, 0, "old.000010", 200), (None, 0, "new.000001", 4), (3, 1, "new.000001", 9)], 1
    ):
        source = {"snapshot": "false", "server_id": 1, "file": file, "pos": pos, "gtid": f"{GTIDS[0]}:{number}"}
        if key is None:
            topic.raw(None, {"op": "t", "source": source}, partition=partition)
        else:
            value = {"op": "c", "after": row(key), "source": source}
            topic.raw({"user_id": key}, value, partition=partition)
    parts.drain(topic)
    assert set(stored(store)) == {"3"}


def test_many_rows_of_one_position_stay_on_their_side_of_a_truncate(
    make_topic: Callable[..., Topic], parts: Parts, store: UserStore
) -> None:
    # As MariaDB tells them: one position a transaction, and the number of the row begins again in each event.
    topic = make_topic(partitions=2)
    for number, first in ((1, 0), (3, 100)):
        for key in range(first, first + 40):
            position = {
                "server_id": 1,
                "file": "bin.000001",
                "pos": number * 100,
                "row": key % 7,
                "gtid": f"0-1-{number}",
            }
            value = {"op": "c", "after": row(key), "source": {"snapshot": "false"} | position}
            topic.raw({"user_id": key}, value, partition=key % 2)
        if number == 1:
            truncated = {"server_id": 1, "file": "bin.000001", "pos": 200, "row": 0, "gtid": "0-1-2"}
            topic.raw(None, {"op": "t", "source": {"snapshot": "false"} | truncated})
    parts.drain(topic)
    assert set(stored(store)) == {str(key) for key in range(100, 140)}


def test_a_truncate_that_was_written_twice_is_applied(
    make_topic: Callable[..., Topic], parts: Parts, store: UserStore
) -> None:
    # Connect writes again what it has not committed, and a record without a key may go to another partition.
    topic = make_topic(partitions=2)
    topic.upsert(1, partition=0, pos=10)
    topic.upsert(2, partition=1, pos=20)
    for partition in (0, 1):
        topic.write(None, "t", partition=partition, pos=100)
    topic.upsert(3, partition=0, pos=110)
    topic.upsert(4, partition=1, pos=120)
    parts.drain(topic)
    assert set(stored(store)) == {"3", "4"}


@pytest.mark.parametrize("at_once", [True, False])
def test_deletes_of_a_table_without_a_key_leave_no_dead_letter(
    topic: Topic, parts: Parts, store: UserStore, *, at_once: bool
) -> None:
    image = row(1)
    for value in (
        {"op": "c", "before": None, "after": image},
        {"op": "d", "before": image, "after": None},
        None,
    ):
        topic.raw(None, value)
        if not at_once:
            # A consumer of its own for each record: what came before is known from the topic alone.
            parts.drain(topic)
    parts.drain(topic)
    assert stored(store) == {}
    assert list(read_dead_letters(topic.kafka)) == []
    topic.raw(None, None)
    parts.drain(topic)
    [letter] = read_dead_letters(topic.kafka)
    assert letter.kind == "missing-key"


def test_a_truncate_is_refused_while_another_consumer_has_a_partition(
    make_topic: Callable[..., Topic], parts: Parts
) -> None:
    topic = make_topic(partitions=2)
    topic.upsert(1, partition=0, pos=10)
    topic.upsert(2, partition=1, pos=20)
    topic.flush()
    with parts.running(topic) as one, parts.running(topic) as two:
        until(lambda: len(one.metrics.snapshot().lag) == len(two.metrics.snapshot().lag) == 1)
        topic.write(None, "t", partition=0, pos=100)
        topic.upsert(3, partition=1, pos=110)
        topic.flush()
        until(lambda: bool(one.errors or two.errors))
        [error] = one.errors + two.errors
        assert isinstance(error, PermanentError)
        assert "other consumers of group" in str(error)
        # The one that is left has both partitions then, and knows the order.
        left = two if one.errors else one
        until(lambda: not left.thread.is_alive() or topic.committed(0) == 2)
        left.end()


# servers that are away


def test_a_broker_that_is_not_there_is_waited_for(parts: Parts) -> None:
    class Heard(SilentListener):
        down = threading.Event()

        def connection(self, name: str, *, up: bool) -> None:
            if name == "kafka" and not up:
                self.down.set()

    kafka = KafkaSettings("127.0.0.1:1", "changes", "some-group", timeout_seconds=1)
    heard = Heard()
    report = ChangeConsumer(kafka, parts.open_store, listener=heard).run(threading.Event(), seconds=3)
    assert heard.down.is_set()
    assert report.records == {}


def test_a_store_that_is_away_is_waited_for_and_nothing_becomes_a_dead_letter(
    topic: Topic, parts: Parts, store: UserStore
) -> None:
    proxy = Proxy(parts.uri)
    topic.upsert(1)
    topic.flush()
    metrics = ChangeMetrics()
    consumer = ChangeConsumer(
        topic.kafka,
        lambda: UserStore(proxy.uri, parts.database, "Users", timeout_seconds=0.5),
        listener=metrics,
    )
    stop = threading.Event()
    thread = threading.Thread(target=lambda: consumer.run(stop), daemon=True)
    thread.start()
    try:
        until(lambda: metrics.snapshot().kafka.total.count == 1)
        assert "1" in stored(store)
        proxy.cut()
        topic.upsert(2)
        topic.flush()
        until(lambda: bool(metrics.snapshot().retries))
        # Nothing is fetched meanwhile; the lag grows all the same.
        for key in range(3, 13):
            topic.upsert(key)
        topic.flush()
        until(lambda: metrics.snapshot().lag_records == 11)
        time.sleep(topic.kafka.session_timeout_seconds + 2)
        assert "2" not in stored(store)
        proxy.join()
        until(lambda: stored(store) == topic.expected, 30)
    finally:
        stop.set()
        thread.join(20)
        proxy.cut()
    assert list(read_dead_letters(topic.kafka)) == []
    until(lambda: topic.committed() == 12)


def test_a_slow_store_is_given_its_time_while_more_waits_than_the_next_batch_may_hold(
    topic: Topic, parts: Parts, database: str
) -> None:
    for key in range(20_000):
        topic.upsert(key)
    topic.flush()
    proxy = Proxy(parts.uri, answer_seconds=0.5)
    try:
        with Parts(proxy.uri, database).running(topic) as running:
            until(lambda: bool(running.metrics.snapshot().lag))
            # The first batch is at work for longer than a session.
            end = running.metrics.snapshot().seconds + topic.kafka.session_timeout_seconds + 2
            until(lambda: running.metrics.snapshot().seconds > end)
            assert running.metrics.snapshot().retries == {}
    finally:
        proxy.cut()


class Proxy:
    """A way to a server that can be cut; on it each answer takes its time."""

    def __init__(self, uri: str, answer_seconds: float = 0) -> None:
        import socket

        host, port = uri.rpartition("/")[2].split(":")
        self._target = (host, int(port))
        self._open = True
        self._answer_seconds = answer_seconds
        self._sockets: list[Any] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"mongodb://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        import socket

        while True:
            here, _ = self._listener.accept()
            if not self._open:
                here.close()
                continue
            there = socket.create_connection(self._target)
            self._sockets += [here, there]
            for one, other, seconds in ((here, there, 0.0), (there, here, self._answer_seconds)):
                threading.Thread(target=self._pump, args=(one, other, seconds), daemon=True).start()

    def _pump(self, one: Any, other: Any, seconds: float) -> None:
        try:
            while data := one.recv(65_536):
                time.sleep(seconds)
                other.sendall(data)
        except OSError:
            pass
        finally:
            one.close()
            other.close()

    def cut(self) -> None:
        """Cut every connection and refuse new ones."""
        import contextlib
        import socket

        self._open = False
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def join(self) -> None:
        """Let connections through again."""
        self._open = True
