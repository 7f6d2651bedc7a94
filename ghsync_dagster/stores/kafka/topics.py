"""Topics and their records: partitions, watermarks and offsets; reading without joining a group; writing.

Not here: the member of the group that consumes the changes (``stores.kafka.consumer``), and what records mean.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from confluent_kafka import (
    TIMESTAMP_NOT_AVAILABLE,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicCollection,
    TopicPartition,
    Uuid,
)
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from ghsync_dagster.domain.errors import GhsyncError, UnavailableError
from ghsync_dagster.stores.kafka.client import (
    DELIVERY_SECONDS,
    DENIED,
    LARGEST_BYTES,
    KafkaSettings,
    client_config,
    committed_offset,
    consumer_config,
    is_no_topic,
    kafka_error,
    kafka_errors,
    producer_config,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

Headers = list[tuple[str, str | bytes | None]]

PARTITION_EOF: Final = KafkaError._PARTITION_EOF  # noqa: SLF001  the library's own name of its local error
"""The code of the event that a partition has ended."""
_NO_ID: Final = str(Uuid(0, 0))
_RETAINED: Final = {"retention.ms": "-1", "cleanup.policy": "delete"}
_LARGE: Final = {"max.message.bytes": str(LARGEST_BYTES)}
_SMALL_QUEUE: Final = {"queued.max.messages.kbytes": 8_192, "queued.min.messages": 5_000}
"""How much a reader's client fetches ahead: more makes no reader faster."""
_NO_RIGHT: Final = frozenset({KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.CLUSTER_AUTHORIZATION_FAILED})


def partitions_of(client: Consumer | AdminClient, topic: str, seconds: float) -> list[int]:
    """Return the numbers of all partitions of a topic.

    Args:
        client: Sends the request.
        topic: Its name.
        seconds: How long to wait for an answer.

    Raises:
        UnavailableError: There is no such topic, or no broker.
        RefusedError: The credentials or rights are refused.
        ConfigError: No topic can have this name.
    """
    found, error = _topic_metadata(client, topic, seconds)
    if error is not None:
        raise kafka_error(error, f"Looking for {topic}")
    return found


def watermarks(consumer: Consumer, topic: str, partition: int, seconds: float) -> tuple[int, int]:
    """Return a partition's low and high watermark: its first offset, and the offset of the next record to come.

    Raises:
        UnavailableError: There is no such partition, or no broker answers in time.
        RefusedError: The credentials or rights are refused.
    """
    with kafka_errors(f"Reading offsets of {topic}"):
        low, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=seconds)
    return low, high


def committed_offsets(
    consumer: Consumer, kafka: KafkaSettings, partitions: Iterable[int], what: str
) -> dict[int, int | None]:
    """Return the group's committed offset by partition of the topic of changes, None where it has none.

    Raises:
        UnavailableError: The brokers can't answer now.
        RefusedError: The credentials or rights are refused.
    """
    with kafka_errors(what):
        found = consumer.committed(
            [TopicPartition(kafka.topic, partition) for partition in partitions], timeout=kafka.timeout_seconds
        )
    return {answer.partition: committed_offset(answer, what) for answer in found}


def _topic_metadata(client: Consumer | AdminClient, topic: str, seconds: float) -> tuple[list[int], KafkaError | None]:
    """Return the partitions of a topic, and the error where it is not there or we may not see it."""
    with kafka_errors(f"Looking for {topic}"):
        found = client.list_topics(topic, timeout=seconds).topics[topic]
    return sorted(found.partitions), found.error


def group_members(kafka: KafkaSettings) -> int:
    """Return how many consumers are in the group.

    Raises:
        UnavailableError: No broker can be reached.
        RefusedError: The credentials or rights are refused.
    """
    what = f"Asking who is in {kafka.group_id}"
    with kafka_errors(what):
        # In a variable until the answer is there: the library cancels a request with its client.
        admin = AdminClient(client_config(kafka))
        [group] = admin.describe_consumer_groups([kafka.group_id], request_timeout=kafka.timeout_seconds).values()
        try:
            return len(group.result(kafka.timeout_seconds).members)
        except KafkaException as error:
            if error.args[0].code() == KafkaError.GROUP_ID_NOT_FOUND:
                return 0
            raise


def ensure_topic(kafka: KafkaSettings, topic: str) -> None:
    """Create a topic of one partition that keeps records of any size permanently, unless it is there.

    If the brokers refuse such a maximum size, the topic gets their default.

    Raises:
        UnavailableError: No broker can be reached.
        RefusedError: The credentials are refused, the brokers allow no topic that keeps records permanently, or it is
            not there and we may not create it.
    """
    admin = AdminClient(client_config(kafka))
    _, missing = _topic_metadata(admin, topic, kafka.timeout_seconds)
    if missing is None:
        return
    failed = _create_topic(admin, topic, _RETAINED | _LARGE, kafka.timeout_seconds)
    if failed is not None and failed.code() in DENIED:
        failed = _create_topic(admin, topic, _RETAINED, kafka.timeout_seconds)
    if failed is None or failed.code() == KafkaError.TOPIC_ALREADY_EXISTS:
        return
    # If we may not even see the topic, it may be there all the same: writing to it shows.
    if failed.code() not in _NO_RIGHT or is_no_topic(missing):
        raise kafka_error(failed, f"Making {topic}")


def create_topic(kafka: KafkaSettings, topic: str, partitions: int) -> bool:
    """Create a topic with the brokers' own settings; return whether there was none.

    Args:
        kafka: The brokers.
        topic: Its name.
        partitions: How many it gets.

    Raises:
        UnavailableError: No broker is available.
        RefusedError: The brokers refuse.
    """
    failed = _create_topic(AdminClient(client_config(kafka)), topic, {}, kafka.timeout_seconds, partitions)
    if failed is not None and failed.code() != KafkaError.TOPIC_ALREADY_EXISTS:
        raise kafka_error(failed, f"Making {topic}")
    return failed is None


def _create_topic(
    admin: AdminClient, topic: str, config: dict[str, str], seconds: float, partitions: int = 1
) -> KafkaError | None:
    """Create a topic; return the error if that fails."""
    wanted = NewTopic(topic, num_partitions=partitions, config=config)
    with kafka_errors(f"Making {topic}"):
        [created] = admin.create_topics([wanted], request_timeout=seconds).values()
    try:
        created.result()
    except KafkaException as error:
        failed: KafkaError = error.args[0]
        return failed
    return None


class TopicIds:
    """The ids that topics got when they were created: a recreated topic has another id (KIP-516).

    One connection serves all requests, until ``close``.

    Args:
        kafka: The way to the brokers.
    """

    def __init__(self, kafka: KafkaSettings) -> None:
        self._kafka = kafka
        self._admin: AdminClient | None = None

    def of(self, topic: str) -> str:
        """Return the id of a topic, as ``describe`` does."""
        return self.describe(topic)[0]

    def describe(self, topic: str) -> tuple[str, int]:
        """Return the id of a topic and its number of partitions; the id is empty where brokers before 2.8 give none.

        Raises:
            UnavailableError: No broker can be reached, or there is no such topic.
            RefusedError: The credentials or rights are refused.
        """
        with kafka_errors(f"Asking for the id of {topic}"):
            self._admin = self._admin or AdminClient(client_config(self._kafka))
            seconds = self._kafka.timeout_seconds
            [topics] = self._admin.describe_topics(TopicCollection([topic]), request_timeout=seconds).values()
            description = topics.result()
        found = str(description.topic_id)
        return "" if found == _NO_ID else found, len(description.partitions)

    def close(self) -> None:
        """Drop the connection; the next request opens a new one."""
        self._admin = None


def ranges_of(kafka: KafkaSettings, topic: str) -> dict[int, tuple[int, int]]:
    """Return the watermarks of all partitions of a topic, empty ones too; none where there is no such topic.

    Raises:
        UnavailableError: No broker can be reached.
        RefusedError: The credentials or rights are refused.
    """
    with _reader(kafka) as consumer:
        return _ranges(consumer, kafka, topic)


def read_to_end(kafka: KafkaSettings, topic: str, since: Mapping[int, int] | None = None) -> Iterator[Message]:
    """Yield the records of a topic from its beginning to where it ends now; none where there is no such topic.

    No group is joined and nothing is committed.

    Args:
        kafka: The way to the brokers.
        topic: What to read.
        since: Offsets by partition to begin at instead; removed records are left out.

    Raises:
        UnavailableError: No broker can be reached.
        RefusedError: The credentials or rights are refused.
    """
    with _reader(kafka) as consumer:
        ranges = {
            partition: (max(low, begin), high)
            for partition, (low, high) in _ranges(consumer, kafka, topic).items()
            if low < high and (begin := (since or {}).get(partition, low)) < high
        }
        yield from _read(consumer, kafka, topic, ranges)


def read_ranges(kafka: KafkaSettings, topic: str, ranges: Mapping[int, tuple[int, int]]) -> Iterator[Message]:
    """Yield the records of a topic from one offset to before another, by partition, as they come.

    Raises:
        UnavailableError: No broker can be reached.
        RefusedError: The credentials or rights are refused, or a partition begins later by now.
    """
    ranges = {partition: (start, stop) for partition, (start, stop) in ranges.items() if start < stop}
    if ranges:
        with _reader(kafka) as consumer:
            yield from _read(consumer, kafka, topic, ranges)


def read_range(kafka: KafkaSettings, partition: int, start: int, stop: int) -> list[Message]:
    """Return the records of a partition of the topic of changes, from one offset to before another.

    Raises:
        UnavailableError: No broker can be reached.
        RefusedError: The credentials or rights are refused, or the partition begins later by now.
    """
    return list(read_ranges(kafka, kafka.topic, {partition: (start, stop)}))


def location(message: Message) -> tuple[int, int]:
    """Return a record's partition and offset."""
    partition, offset = message.partition(), message.offset()
    if partition is None or offset is None:
        raise AssertionError("a consumed record has a partition and an offset")
    return partition, offset


def timestamp_ms(message: Message) -> int | None:
    """Return a record's Kafka timestamp in milliseconds since 1970 UTC, None where it has none."""
    kind, value = message.timestamp()
    return None if kind == TIMESTAMP_NOT_AVAILABLE else value


class RecordWriter:
    """Writes records to one topic, all or an error, in one order: in its first partition. It creates a missing topic.

    Args:
        kafka: The way to the brokers.
        topic: Where to write.
    """

    def __init__(self, kafka: KafkaSettings, topic: str) -> None:
        self.topic = topic
        self._kafka = kafka
        self._producer: Producer | None = None

    def write(self, records: Iterable[tuple[bytes | None, bytes | None, Headers]]) -> list[tuple[int, int]]:
        """Write records ``(key, value, headers)``; return when all replicas in sync have them.

        Returns:
            The partition and offset of each.

        Raises:
            UnavailableError: Not all are sure to be written: write all of them again.
            RefusedError: Rights are missing, or a record is too large for the topic.
        """
        what = f"Writing to {self.topic}"
        failed: list[KafkaError] = []
        locations: list[tuple[int, int]] = []

        def delivered(error: KafkaError | None, message: Message) -> None:
            # Deliveries are in order: there is one partition and an idempotent producer.
            if error is None:
                locations.append(location(message))
            else:
                failed.append(error)

        try:
            with kafka_errors(what):
                producer = self._ready()
                for key, value, headers in records:
                    producer.produce(
                        self.topic,
                        partition=0,
                        key=key,
                        value=value,
                        headers=headers,
                        on_delivery=delivered,
                    )
                    producer.poll(0)
                left = producer.flush(DELIVERY_SECONDS + 5)
            if failed:
                raise kafka_error(failed[0], what)
            if left:
                raise UnavailableError(f"{what}: {left} records were not confirmed in time.", way_out="Run again.")
        except GhsyncError:
            # A failed producer may deliver what it still holds out of order, so the next try gets a new one.
            self.close()
            raise
        return locations

    def _ready(self) -> Producer:
        if self._producer is None:
            ensure_topic(self._kafka, self.topic)
            self._producer = Producer(producer_config(self._kafka))
        return self._producer

    def close(self) -> None:
        """Drop the connection, and what is not written yet."""
        if self._producer is not None:
            self._producer.purge()
            self._producer.flush(1)
            self._producer = None


@contextmanager
def _reader(kafka: KafkaSettings) -> Iterator[Consumer]:
    """Open a consumer that joins no group."""
    with kafka_errors("Opening a reader"):
        consumer = Consumer({**consumer_config(kafka), "group.id": "ghsync-reader", **_SMALL_QUEUE})
    try:
        yield consumer
    finally:
        consumer.close()


def _read(
    consumer: Consumer, kafka: KafkaSettings, topic: str, ranges: Mapping[int, tuple[int, int]]
) -> Iterator[Message]:
    """Yield the records of ranges ``(start, stop)`` by partition, none of them empty."""
    what = f"Reading {topic}"
    left = {partition: stop for partition, (_, stop) in ranges.items()}
    with kafka_errors(what):
        consumer.assign([TopicPartition(topic, partition, start) for partition, (start, _) in ranges.items()])
    last_answer = time.monotonic()
    while left:
        with kafka_errors(what):
            found = consumer.consume(1_000, 0.05)
        if found:
            last_answer = time.monotonic()
        elif time.monotonic() - last_answer > 3 * kafka.timeout_seconds:
            raise UnavailableError(f"{what}: no answer.", way_out="Check that the brokers are up; run again.")
        for message in found:
            error = message.error()
            if error is not None and error.code() != PARTITION_EOF:
                raise kafka_error(error, what)
            partition, offset = location(message)
            stop = ranges[partition][1]
            if error is None and offset < stop:
                yield message
            # The last offsets of a range may hold no record, such as the marker of a transaction.
            if (offset if error else offset + 1) >= stop:
                left.pop(partition, None)


def _ranges(consumer: Consumer, kafka: KafkaSettings, topic: str) -> dict[int, tuple[int, int]]:
    """Return the watermarks by partition; none where there is no topic."""
    partitions, error = _topic_metadata(consumer, topic, kafka.timeout_seconds)
    if error is not None and not is_no_topic(error):
        raise kafka_error(error, f"Looking for {topic}")
    return {partition: watermarks(consumer, topic, partition, kafka.timeout_seconds) for partition in partitions}
