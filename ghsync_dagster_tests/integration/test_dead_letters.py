"""Dead letters on a real broker: whole records with the reason, read back once each, and the commands for them."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import Consumer, KafkaError, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._config import ConfigResource
from confluent_kafka.cimpl import NewTopic

from ghsync_dagster.cdc.dead_letters.record import DeadLetter
from ghsync_dagster.cdc.dead_letters.topic import read_dead_letters
from ghsync_dagster.domain.errors import RefusedError, UnavailableError
from ghsync_dagster.stores.kafka import topics as kafka_topics
from ghsync_dagster.stores.kafka.client import KafkaSettings
from ghsync_dagster.stores.kafka.topics import RecordWriter, create_topic, location, ranges_of, read_to_end
from ghsync_dagster_tests.support.long_campaign import HANG_SECONDS

if TYPE_CHECKING:
    from ghsync_dagster_tests.support.cdc_parts import Parts, Topic

pytestmark = [pytest.mark.integration, pytest.mark.servers("stream")]

GHSYNC = str(Path(sys.executable).parent / "ghsync")


def letter(topic: Topic, offset: int = 7, **fields: Any) -> DeadLetter:
    given: dict[str, Any] = {
        "topic": topic.kafka.topic,
        "partition": 0,
        "offset": offset,
        "timestamp_ms": 1_700_000_000_123,
        "key": b'{"user_id":1}',
        "value": b"\x00\xff{",
        "headers": [("trace", b"\x01\x00"), ("trace", None), ("é", "ü".encode())],
        "kind": "not-json",
        "text": "The value is no JSON: é.",
        "failed_at": "2026-01-01T00:00:00.000+00:00",
    }
    return DeadLetter(**given | fields)


def written(topic: Topic, *letters: DeadLetter) -> list[DeadLetter]:
    writer = RecordWriter(topic.kafka, topic.kafka.dead_letter_topic)
    before = len(list(read_to_end(topic.kafka, writer.topic)))
    places = writer.write(letter.as_record() for letter in letters)
    assert places == [(0, before + at) for at in range(len(letters))]
    writer.close()
    return list(read_dead_letters(topic.kafka))


def ghsync(topic: Topic, parts: Parts, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "KAFKA_BOOTSTRAP_SERVERS": topic.kafka.bootstrap_servers,
        "KAFKA_TOPIC": topic.kafka.topic,
        "MONGODB_URI": parts.uri,
        "MONGODB_DATABASE": parts.database,
    }
    return subprocess.run(
        [GHSYNC, *arguments], env=environment, capture_output=True, text=True, timeout=HANG_SECONDS, cwd=Path.home()
    )


def test_without_a_dead_letter_there_is_no_topic_and_nothing_to_read(topic: Topic) -> None:
    assert list(read_dead_letters(topic.kafka)) == []
    assert (
        topic.kafka.dead_letter_topic
        not in AdminClient({"bootstrap.servers": topic.kafka.bootstrap_servers}).list_topics(timeout=10).topics
    )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"key": None, "value": None, "headers": []},
        {"key": b"", "value": b""},
        {"timestamp_ms": None},
        {"value": b"x" * 900_000},
    ],
)
def test_what_is_read_back_is_what_was_written(topic: Topic, fields: dict[str, Any]) -> None:
    one = letter(topic, **fields)
    [found] = written(topic, one)
    assert found.place == (0, 0)
    assert found == letter(topic, **fields, place=(0, 0))


def test_the_places_are_those_of_the_records_where_the_topic_has_two_partitions(topic: Topic) -> None:
    admin = AdminClient({"bootstrap.servers": topic.kafka.bootstrap_servers})
    [made] = admin.create_topics([NewTopic(topic.kafka.dead_letter_topic, 2, 1)]).values()
    made.result(10)
    writer = RecordWriter(topic.kafka, topic.kafka.dead_letter_topic)
    values = [b"v%d" % key for key in range(200)]
    places = writer.write((value, value, []) for value in values)
    writer.close()
    found = {location(message): message.value() for message in read_to_end(topic.kafka, writer.topic)}
    assert [found[at] for at in places] == values


def test_a_letter_that_was_written_twice_is_read_once(topic: Topic) -> None:
    found = written(topic, letter(topic, 7), letter(topic, 8), letter(topic, 7), letter(topic, 9))
    assert [one.offset for one in found] == [7, 8, 9]


def test_a_dead_letter_that_dies_again_has_the_new_reason_and_its_first_headers(topic: Topic) -> None:
    first = letter(topic)
    again = letter(topic, 8, headers=first.as_record()[2], kind="validator", text="code 121")
    found = written(topic, again)[0]
    assert (found.kind, found.offset) == ("validator", 8)
    assert found.headers == first.as_record()[2]


def test_strangers_among_the_dead_letters_are_passed_over(topic: Topic) -> None:
    written(topic, letter(topic))
    topic.producer.produce(topic.kafka.dead_letter_topic, value=b"hello", headers=[("ghsync.topic", b"x")])
    topic.flush()
    assert [one.offset for one in read_dead_letters(topic.kafka)] == [7]


def test_dead_letters_are_kept_for_good(topic: Topic) -> None:
    written(topic, letter(topic))
    admin = AdminClient({"bootstrap.servers": topic.kafka.bootstrap_servers})
    [future] = admin.describe_configs([ConfigResource("topic", topic.kafka.dead_letter_topic)]).values()
    assert future.result()["retention.ms"].value == "-1"


def test_a_record_that_is_too_large_for_a_topic_that_others_made_is_refused_with_the_way_out(topic: Topic) -> None:
    admin = AdminClient({"bootstrap.servers": topic.kafka.bootstrap_servers})
    [made] = admin.create_topics([NewTopic(topic.kafka.dead_letter_topic, 1, 1)]).values()
    made.result(10)
    with pytest.raises(RefusedError, match=r"max\.message\.bytes"):
        written(topic, letter(topic, value=b"x" * 3_000_000))


def test_where_the_brokers_allow_no_record_of_any_size_the_topic_takes_what_they_do(
    topic: Topic, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What no broker takes stands for what a hosted one does not allow.
    monkeypatch.setattr(kafka_topics, "_LARGE", {"max.message.bytes": "-7"})
    assert [one.offset for one in written(topic, letter(topic))] == [7]


def test_where_the_brokers_allow_no_topic_for_good_it_is_told_and_not_tried_for_ever(
    topic: Topic, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka_topics, "_RETAINED", {"retention.ms": "for ever"})
    topic.raw({"user_id": 1}, b"{")
    topic.flush()
    with pytest.raises(RefusedError, match=rf"Making {topic.kafka.dead_letter_topic}.*INVALID_CONFIG.*yourself"):
        parts.consumer(topic).run(threading.Event(), seconds=30)
    assert topic.committed() in (-1001, 0)


def test_without_the_right_to_make_the_topic_that_is_not_there_it_is_told_and_not_tried_for_ever(
    topic: Topic, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The local broker refuses nobody.
    refused = KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED)
    monkeypatch.setattr(kafka_topics, "_create_topic", lambda *_: refused)
    with pytest.raises(RefusedError, match=rf"Making {topic.kafka.dead_letter_topic}: .*user's rights"):
        written(topic, letter(topic))


def test_a_topic_is_created_once_with_its_partitions(topic: Topic) -> None:
    name = f"{topic.kafka.topic}-created"
    assert create_topic(topic.kafka, name, 3)
    assert not create_topic(topic.kafka, name, 5)
    assert len(ranges_of(topic.kafka, name)) == 3


def test_a_broker_that_is_away_is_a_transient_error() -> None:
    kafka = KafkaSettings("127.0.0.1:1", "changes", "group", timeout_seconds=0.5)
    with pytest.raises(UnavailableError):
        list(read_dead_letters(kafka))


def test_a_restart_before_the_commit_writes_the_same_letters_again(topic: Topic, parts: Parts) -> None:
    topic.raw({"user_id": 1}, b"{")
    parts.drain(topic)
    # As after a crash between the letters and the commit.
    consumer = Consumer({"bootstrap.servers": topic.kafka.bootstrap_servers, "group.id": topic.kafka.group_id})
    consumer.commit(offsets=[TopicPartition(topic.kafka.topic, 0, 0)], asynchronous=False)
    consumer.close()
    parts.drain(topic)
    assert len(list(read_to_end(topic.kafka, topic.kafka.dead_letter_topic))) == 2
    assert len(list(read_dead_letters(topic.kafka))) == 1


# the commands


def test_dlq_list_and_show(topic: Topic, parts: Parts) -> None:
    written(topic, letter(topic, 7), letter(topic, 8, kind="validator", text="code 121"))
    listed = ghsync(topic, parts, "dlq", "list", "--json")
    assert listed.returncode == 0, listed.stderr
    assert [(one["offset"], one["kind"]) for one in json.loads(listed.stdout)] == [(7, "not-json"), (8, "validator")]
    assert "value" not in json.loads(listed.stdout)[0]

    assert len(json.loads(ghsync(topic, parts, "dlq", "list", "--kind", "validator", "--json").stdout)) == 1
    assert len(json.loads(ghsync(topic, parts, "dlq", "list", "--limit", "1", "--json").stdout)) == 1
    assert f"{topic.kafka.topic}-0-8" in ghsync(topic, parts, "dlq", "list").stdout

    shown = ghsync(topic, parts, "dlq", "show", f"{topic.kafka.topic}-0-7", "--json")
    [one] = json.loads(shown.stdout)
    assert one["value"] == "\x00\\xff{"
    assert one["headers"][0] == ["trace", "\x01\x00"]

    missing = ghsync(topic, parts, "dlq", "show", "nothing-0-1", f"{topic.kafka.topic}-0-7")
    assert missing.returncode == 2
    assert "error: There is no dead letter nothing-0-1.\nway out: See: ghsync dlq list.\n" in missing.stderr
    assert missing.stdout.startswith("id ")

    typo = ghsync(topic, parts, "dlq", "list", "--kind", "validater")
    assert typo.returncode == 2
    assert "validater is none of not-utf8, " in typo.stderr


def test_cdc_drain_as_a_command(topic: Topic, parts: Parts) -> None:
    topic.upsert(1)
    topic.raw({"user_id": 2}, b"{")
    topic.flush()
    environment = {
        "KAFKA_BOOTSTRAP_SERVERS": topic.kafka.bootstrap_servers,
        "KAFKA_TOPIC": topic.kafka.topic,
        "KAFKA_GROUP_ID": topic.kafka.group_id,
        "MONGODB_URI": parts.uri,
        "MONGODB_DATABASE": parts.database,
    }
    done = subprocess.run(
        [GHSYNC, "cdc", "drain", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        cwd=Path.home(),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["records"] == {"applied": 1, "dead_letter": 1}
    assert report["dead_letters"] == {"not-json": 1}
    assert report["metrics"]["kafka"]["total"]["count"] == 2
    assert topic.committed() == 2
