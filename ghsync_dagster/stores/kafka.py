"""Kafka: a consumer of one topic in a group, a writer, a reader from beginning to end, and how failures translate.

Belongs here: the client's configuration in one place, single operations, errors. Not here: what records mean, in what
batches they are applied, and when offsets are committed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from confluent_kafka import (
    OFFSET_BEGINNING,
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

from ghsync_dagster.domain.errors import (
    ConfigError,
    GhsyncError,
    PermanentError,
    RefusedError,
    UnavailableError,
)
from ghsync_dagster.observability.logging import redact

Headers = list[tuple[str, str | bytes | None]]

_REFUSED: Final = frozenset(
    {
        KafkaError._AUTHENTICATION,  # noqa: SLF001  the library's own names of its local errors
        KafkaError._SSL,  # noqa: SLF001
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
        KafkaError.SASL_AUTHENTICATION_FAILED,
        KafkaError.UNSUPPORTED_SASL_MECHANISM,
        KafkaError.ILLEGAL_SASL_STATE,
    }
)
_WRONG: Final = {
    KafkaError._INVALID_ARG: "Correct the KAFKA_ settings.",  # noqa: SLF001
    KafkaError._CONFLICT: "Correct the KAFKA_ settings.",  # noqa: SLF001
    KafkaError.INVALID_GROUP_ID: "Correct KAFKA_GROUP_ID.",
    KafkaError.TOPIC_EXCEPTION: "Correct KAFKA_TOPIC.",
    KafkaError.INVALID_SESSION_TIMEOUT: "Set GHSYNC_CDC_SESSION_TIMEOUT_SECONDS to what the brokers allow.",
    KafkaError.INCONSISTENT_GROUP_PROTOCOL: "Give KAFKA_GROUP_ID to ghsync alone: another program is in the group.",
}
_TOO_LARGE: Final = frozenset({KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE})
_NO_TOPIC: Final = frozenset(
    {
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError._UNKNOWN_TOPIC,  # noqa: SLF001
        KafkaError._UNKNOWN_PARTITION,  # noqa: SLF001
    }
)
_EOF: Final = KafkaError._PARTITION_EOF  # noqa: SLF001
_NO_OFFSET: Final = KafkaError._AUTO_OFFSET_RESET  # noqa: SLF001
_FENCED: Final = frozenset({KafkaError.ILLEGAL_GENERATION, KafkaError.UNKNOWN_MEMBER_ID, KafkaError.FENCED_INSTANCE_ID})

_NO_ID: Final = str(Uuid(0, 0))
_REQUEST_SECONDS: Final = 10.0
_LOOK_SECONDS: Final = 1.0
_DELIVERY_SECONDS: Final = 20.0
_LARGEST_BYTES: Final = 100_000_000
"""Just below what a broker takes in one request by default."""
_KEPT: Final = {"retention.ms": "-1", "cleanup.policy": "delete", "max.message.bytes": str(_LARGEST_BYTES)}
_POLL_LIMIT_SECONDS: Final = 120.0
"""How long a consumer may go without asking for records before the group takes it for hung."""


@dataclass(frozen=True, slots=True)
class KafkaSettings:
    """Which topic, as which group, and how to get there.

    Attributes:
        bootstrap_servers: Brokers, host:port, comma-separated.
        topic: The topic of changes.
        group_id: The consumer group.
        session_timeout_seconds: How long the group waits for a silent consumer.
        timeout_seconds: How long one request waits for a broker.
        security_protocol: PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL.
        sasl_mechanism: PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512.
        sasl_username: User for SASL.
        sasl_password: Password for SASL.
        ssl_ca_location: PEM file of the trusted authorities; the system's own where None.
        ssl_certificate_location: PEM file of the client's certificate.
        ssl_key_location: PEM file of the client's key.
        ssl_key_password: Password of that key.
    """

    bootstrap_servers: str
    topic: str
    group_id: str
    session_timeout_seconds: float = 10.0
    timeout_seconds: float = _REQUEST_SECONDS
    security_protocol: str = "PLAINTEXT"
    sasl_mechanism: str | None = None
    sasl_username: str | None = None
    sasl_password: str | None = field(default=None, repr=False)
    ssl_ca_location: Path | None = None
    ssl_certificate_location: Path | None = None
    ssl_key_location: Path | None = None
    ssl_key_password: str | None = field(default=None, repr=False)

    @property
    def dead_letter_topic(self) -> str:
        """The topic of dead letters."""
        return f"{self.topic}.dlq"


def client_config(kafka: KafkaSettings) -> dict[str, Any]:
    """Return what every client of ours is configured with: the way to the brokers. It holds secrets.

    Raises:
        ConfigError: SASL is asked for without mechanism, user or password.
    """
    config: dict[str, Any] = {
        "bootstrap.servers": kafka.bootstrap_servers,
        "client.id": "ghsync",
        "security.protocol": kafka.security_protocol,
        "reconnect.backoff.ms": 100,
        "reconnect.backoff.max.ms": 1_000,
        "socket.keepalive.enable": True,
        # The library would write to standard error itself; what matters comes as errors.
        "log_level": 2,
    }
    if kafka.security_protocol.startswith("SASL"):
        sasl = {
            "KAFKA_SASL_MECHANISM": kafka.sasl_mechanism,
            "KAFKA_SASL_USERNAME": kafka.sasl_username,
            "KAFKA_SASL_PASSWORD": kafka.sasl_password,
        }
        if missing := [name for name, value in sasl.items() if not value]:
            raise ConfigError(
                f"KAFKA_SECURITY_PROTOCOL is {kafka.security_protocol}, but {', '.join(missing)} is not set.",
                way_out=f"Set {', '.join(missing)}.",
            )
        config |= dict(zip(("sasl.mechanism", "sasl.username", "sasl.password"), sasl.values(), strict=True))
    ssl = {
        "ssl.ca.location": kafka.ssl_ca_location,
        "ssl.certificate.location": kafka.ssl_certificate_location,
        "ssl.key.location": kafka.ssl_key_location,
        "ssl.key.password": kafka.ssl_key_password,
    }
    return config | {name: str(value) for name, value in ssl.items() if value is not None}


def consumer_config(kafka: KafkaSettings) -> dict[str, Any]:
    """Return the configuration of the group's consumer: nothing is committed or reset unasked."""
    session_ms = int(kafka.session_timeout_seconds * 1000)
    return {
        **client_config(kafka),
        "group.id": kafka.group_id,
        "partition.assignment.strategy": "cooperative-sticky",
        "session.timeout.ms": session_ms,
        # How soon a consumer learns that partitions are free for it.
        "heartbeat.interval.ms": min(300, session_ms // 3),
        "max.poll.interval.ms": max(int(_POLL_LIMIT_SECONDS * 1000), 2 * session_ms),
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        # A place that is gone from the topic must be told, not skipped.
        "auto.offset.reset": "error",
        "enable.partition.eof": True,
        "isolation.level": "read_committed",
        "allow.auto.create.topics": False,
        "topic.metadata.refresh.interval.ms": 10_000,
        "fetch.wait.max.ms": 100,
        "fetch.queue.backoff.ms": 10,
        "fetch.message.max.bytes": 4_194_304,
        "queued.max.messages.kbytes": 65_536,
    }


def producer_config(kafka: KafkaSettings) -> dict[str, Any]:
    """Return the configuration of a producer that loses and doubles nothing while it lives."""
    return {
        **client_config(kafka),
        "enable.idempotence": True,
        "acks": "all",
        "linger.ms": 5,
        "delivery.timeout.ms": int(_DELIVERY_SECONDS * 1000),
        # The topic's own limit decides.
        "message.max.bytes": _LARGEST_BYTES,
    }


def kafka_error(error: KafkaError, what: str) -> GhsyncError:
    """Return our error for the client's.

    Args:
        error: The client's error.
        what: What was being done.
    """
    code, text = error.code(), redact(error.str())[:300].rstrip(".")
    if code in _REFUSED:
        return RefusedError(
            f"{what}: Kafka refused ({error.name()}: {text}).",
            way_out="Check KAFKA_SECURITY_PROTOCOL, the KAFKA_SASL_ and KAFKA_SSL_ settings, and the user's rights.",
        )
    if code in _WRONG:
        return ConfigError(f"{what}: {text} ({error.name()}).", way_out=_WRONG[code])
    if code in _TOO_LARGE:
        return RefusedError(
            f"{what}: a record is too large for its topic ({text}).", way_out="Raise the topic's max.message.bytes."
        )
    if code in _NO_TOPIC:
        return UnavailableError(
            f"{what}: the topic is not there ({text}).",
            way_out="Check KAFKA_TOPIC; start the connector, which makes the topic, or make the topic yourself.",
        )
    return UnavailableError(
        f"{what}: Kafka can't be reached or can't answer now ({error.name()}: {text}).",
        way_out="Check that the brokers are up (ghsync status) and that KAFKA_BOOTSTRAP_SERVERS names them.",
    )


@contextmanager
def kafka_errors(what: str) -> Iterator[None]:
    """Translate the client's failures to ours.

    Raises:
        UnavailableError: The brokers can't be reached or can't answer now.
        RefusedError: They refused the credentials or rights.
        ConfigError: A setting is wrong.
    """
    try:
        yield
    except KafkaException as error:
        raise kafka_error(error.args[0], what) from None
    except BufferError:
        raise UnavailableError(f"{what}: the client's queue is full.", way_out="Run again.") from None


class TopicConsumer:
    """One member of the group that consumes the topic.

    ``take`` is for one thread, in which the three callbacks are called too, with partition numbers; ``commit`` may be
    called in another one.

    Args:
        kafka: Topic, group and the way there.
        assigned: These partitions came in addition.
        revoked: These partitions go once this returns: the last moment to commit for them.
        lost: These partitions are gone, and may be another's already.

    Raises:
        ConfigError: A setting is wrong.
    """

    def __init__(
        self,
        kafka: KafkaSettings,
        *,
        assigned: Callable[[set[int]], None],
        revoked: Callable[[set[int]], None],
        lost: Callable[[set[int]], None],
    ) -> None:
        self.kafka = kafka
        self.partitions: set[int] = set()
        self.ends_met: dict[int, int] = {}
        """Offsets at which partitions were found to end: what was before them has been taken."""
        self.trouble: GhsyncError | None = None
        """What keeps the brokers away; None since they last answered."""
        self._to_begin: set[int] = set()
        self._gone: set[int] = set()
        """Partitions that went since this was last emptied."""
        self._paused = False
        self._assigned, self._revoked, self._lost = assigned, revoked, lost
        with kafka_errors("Opening the consumer"):
            self._consumer = Consumer({**consumer_config(kafka), "error_cb": self._on_error})
            self._consumer.subscribe(
                [kafka.topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
            )

    def _on_error(self, error: KafkaError) -> None:
        trouble = kafka_error(error, f"Consuming {self.kafka.topic}")
        # What is permanent must not be covered by what only follows from it.
        if not isinstance(self.trouble, PermanentError):
            self.trouble = trouble

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        consumer.incremental_assign(partitions)
        # A partition that comes back is as paused as it was when it went.
        (consumer.pause if self._paused else consumer.resume)(partitions)
        came = {partition.partition for partition in partitions}
        self.partitions |= came
        self.trouble = None
        self._assigned(came)

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._revoked({partition.partition for partition in partitions})
        self._forget(consumer, partitions)

    def _on_lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._lost({partition.partition for partition in partitions})
        self._forget(consumer, partitions)

    def _forget(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        for partition in partitions:
            self.partitions.discard(partition.partition)
            self._gone.add(partition.partition)
            self.ends_met.pop(partition.partition, None)
            self._to_begin.discard(partition.partition)
        consumer.incremental_unassign(partitions)

    def take(self, limit: int, seconds: float) -> list[Message]:
        """Return up to ``limit`` records as soon as there is one, or none after ``seconds``.

        Raises:
            UnavailableError: The topic is not there; asking again is safe.
            RefusedError: Credentials or rights.
            PermanentError: The place to go on from is gone from the topic.
        """
        for partition in sorted(self._to_begin):
            self._begin(partition)
        found: list[Message] = []
        with kafka_errors(f"Consuming {self.kafka.topic}"):
            if seconds > 0 and (first := self._consumer.poll(seconds)) is not None:
                found = [first]
            self._gone.clear()
            if seconds <= 0 or found:
                more = self._consumer.consume(limit, 0)
                # A partition that went meanwhile is another's, or is read anew from what is committed.
                found = [message for message in found if message.partition() not in self._gone] + more
        if isinstance(self.trouble, PermanentError):
            raise self.trouble
        records = [message for message in found if message.error() is None]
        if records:
            self.trouble = None
        if len(records) < len(found):
            for message in found:
                if (error := message.error()) is not None:
                    self._take_error(error, message)
        return records

    def _take_error(self, error: KafkaError, message: Message) -> None:
        if error.code() == _EOF:
            self.trouble = None
            partition, offset = place(message)
            self.ends_met[partition] = offset
        elif error.code() == _NO_OFFSET:
            self._to_begin.add(message.partition() or 0)
        else:
            failure = kafka_error(error, f"Consuming {self.kafka.topic}")
            if isinstance(failure, PermanentError):
                raise failure
            self.trouble = failure

    def _begin(self, partition: int) -> None:
        """Go to the beginning of a partition that the group has never committed; refuse to skip what is gone."""
        committed = self.committed([partition])[partition]
        if committed is not None:
            raise self._displaced(partition, committed, *self.offsets(partition))
        beginning = TopicPartition(self.kafka.topic, partition, OFFSET_BEGINNING)
        with kafka_errors(f"Beginning {self.kafka.topic}"):
            # A seek is refused in this state.
            self._consumer.incremental_unassign([beginning])
            self._consumer.incremental_assign([beginning])
        self._to_begin.discard(partition)

    def _displaced(self, partition: int, committed: int, low: int, high: int) -> PermanentError:
        return PermanentError(
            f"{self.kafka.topic} partition {partition}: group {self.kafka.group_id} is at offset {committed}, but "
            f"the topic holds {low} to {high}: changes were removed before they were applied, or the topic is new.",
            way_out="Take a new snapshot, and let a new group begin at the beginning; see docs/operations.md.",
        )

    def ends(self) -> dict[int, int]:
        """Return where each partition ends that holds anything.

        Raises:
            PermanentError: The group is to go on from a place that a partition does not have.
            UnavailableError: No broker can be reached, or there is no such topic.
        """
        # The commits first: the end may have moved on since, never the other way round.
        committed = self.committed(self.all_partitions())
        found = {partition: self.offsets(partition) for partition in committed}
        for partition, (low, high) in found.items():
            place = committed[partition]
            if place is not None and not low <= place <= high:
                raise self._displaced(partition, place, low, high)
        return {partition: high for partition, (low, high) in found.items() if high > low}

    def commit(self, offsets: Mapping[int, int]) -> None:
        """Commit the next offset of each partition, and return when the group has it.

        Success proves that this consumer is in the group.

        Raises:
            UnavailableError: Not now: no broker, a rebalance, or this consumer is out of the group.
            RefusedError: Credentials or rights.
        """
        places = [TopicPartition(self.kafka.topic, partition, offset) for partition, offset in offsets.items()]
        what = f"Committing {self.kafka.group_id}"
        with kafka_errors(what):
            for place in self._consumer.commit(offsets=places, asynchronous=False):
                if place.error is not None:
                    raise kafka_error(place.error, what)

    def committed(self, partitions: Iterable[int]) -> dict[int, int | None]:
        """Return what the group has committed of each partition, None for nothing."""
        places = [TopicPartition(self.kafka.topic, partition) for partition in partitions]
        with kafka_errors(f"Reading offsets of {self.kafka.group_id}"):
            found = self._consumer.committed(places, timeout=self.kafka.timeout_seconds)
        return {place.partition: place.offset if place.offset >= 0 else None for place in found}

    def all_partitions(self) -> list[int]:
        """Return the numbers of all partitions of the topic.

        Raises:
            UnavailableError: There is no such topic, or no broker.
        """
        what = f"Looking for {self.kafka.topic}"
        with kafka_errors(what):
            topic = self._consumer.list_topics(self.kafka.topic, timeout=self.kafka.timeout_seconds).topics[
                self.kafka.topic
            ]
        if topic.error is not None:
            raise kafka_error(topic.error, what)
        return sorted(topic.partitions)

    def look_again(self) -> None:
        """Ask whether the brokers answer, after ``trouble``."""
        if isinstance(self.trouble, UnavailableError):
            what = f"Looking for {self.kafka.topic}"
            try:
                with kafka_errors(what):
                    found = self._consumer.list_topics(self.kafka.topic, timeout=_LOOK_SECONDS)
            except UnavailableError as away:
                self.trouble = away
            else:
                error = found.topics[self.kafka.topic].error
                self.trouble = None if error is None else kafka_error(error, what)

    def offsets(self, partition: int) -> tuple[int, int]:
        """Ask where a partition begins and ends."""
        with kafka_errors(f"Reading offsets of {self.kafka.topic}"):
            low, high = self._consumer.get_watermark_offsets(
                TopicPartition(self.kafka.topic, partition), timeout=self.kafka.timeout_seconds
            )
        return low, high

    def known_end(self, partition: int) -> int | None:
        """Return where a partition ended at the last answer of its broker, None before there was one.

        While nothing is fetched no answer comes unasked, so the broker is asked, for a second at most.
        """
        place = TopicPartition(self.kafka.topic, partition)
        if self._paused and self.trouble is None:
            try:
                with kafka_errors(f"Reading offsets of {self.kafka.topic}"):
                    return self._consumer.get_watermark_offsets(place, timeout=_LOOK_SECONDS)[1]
            except UnavailableError as away:
                self.trouble = away
        end = self._consumer.get_watermark_offsets(place, cached=True)[1]
        return end if end >= 0 else None

    def pause(self) -> None:
        """Fetch nothing more, also of partitions that come; ``take`` is still to be called."""
        if not self._paused:
            self._paused = True
            self._consumer.pause(self._places())

    def resume(self) -> None:
        """Fetch again."""
        if self._paused:
            self._paused = False
            self._consumer.resume(self._places())

    def _places(self) -> list[TopicPartition]:
        return [TopicPartition(self.kafka.topic, partition) for partition in self.partitions]

    def go_to(self, offsets: Mapping[int, int]) -> None:
        """Go on from other offsets in some of the partitions that this consumer has; none is paused then."""
        self._paused = False
        places = [TopicPartition(self.kafka.topic, partition, offset) for partition, offset in offsets.items()]
        with kafka_errors(f"Moving in {self.kafka.topic}"):
            self._consumer.incremental_unassign(places)
            self._consumer.incremental_assign(places)
            # They are as paused as before.
            self._consumer.resume(self._places())
        for partition in offsets:
            self.ends_met.pop(partition, None)

    def close(self) -> None:
        """Give the partitions back, the ``revoked`` callback included, and leave the group."""
        with kafka_errors("Leaving the group"):
            if not self.partitions:
                # Without partitions the library's close tells the group nothing, which then waits for a dead member.
                self._consumer.unsubscribe()
            self._consumer.close()


class RecordWriter:
    """Writes records to one topic, all or an error, in one order: in its first partition. It makes a missing topic.

    Args:
        kafka: The way to the brokers.
        topic: Where to write.
    """

    def __init__(self, kafka: KafkaSettings, topic: str) -> None:
        self.topic = topic
        self._kafka = kafka
        self._producer: Producer | None = None

    def write(self, records: Iterable[tuple[bytes | None, bytes | None, Headers]]) -> None:
        """Write records ``(key, value, headers)``; return when all replicas in sync have them.

        Raises:
            UnavailableError: Not all are sure to be written: write all of them again.
            RefusedError: Rights are missing, or a record is too large for the topic.
        """
        what = f"Writing to {self.topic}"
        failed: list[KafkaError] = []
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
                        on_delivery=lambda error, _: failed.append(error) if error is not None else None,
                    )
                    producer.poll(0)
                left = producer.flush(_DELIVERY_SECONDS + 5)
            if failed:
                raise kafka_error(failed[0], what)
            if left:
                raise UnavailableError(f"{what}: {left} records were not confirmed in time.", way_out="Run again.")
        except GhsyncError:
            # What a failed producer still holds may be out of order: the next try begins with a new one.
            self.close()
            raise

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


def ensure_topic(kafka: KafkaSettings, topic: str) -> None:
    """Make a topic of one partition that keeps records of any size for good, unless it is there or we may not make it.

    Raises:
        UnavailableError: No broker can be reached.
        RefusedError: The credentials are refused.
    """
    admin = AdminClient(client_config(kafka))
    with kafka_errors(f"Looking for {topic}"):
        found = admin.list_topics(topic, timeout=kafka.timeout_seconds).topics[topic]
        if found.error is None:
            return
        wanted = NewTopic(topic, num_partitions=1, config=_KEPT)
        [made] = admin.create_topics([wanted], request_timeout=kafka.timeout_seconds).values()
        try:
            made.result()
        except KafkaException as error:
            # Without the right to make it, writing to it tells whether it is there.
            if error.args[0].code() not in (
                KafkaError.TOPIC_ALREADY_EXISTS,
                KafkaError.TOPIC_AUTHORIZATION_FAILED,
                KafkaError.CLUSTER_AUTHORIZATION_FAILED,
            ):
                raise


def topic_id(kafka: KafkaSettings, topic: str) -> str:
    """Return the id that a topic got when it was made: another one with the same name has another id (KIP-516).

    It is empty where the brokers, older than 2.8, give none.

    Raises:
        UnavailableError: No broker can be reached, or there is no such topic.
        RefusedError: The credentials or rights are refused.
    """
    with kafka_errors(f"Asking for the id of {topic}"):
        admin = AdminClient(client_config(kafka))
        [asked] = admin.describe_topics(TopicCollection([topic]), request_timeout=kafka.timeout_seconds).values()
        found = str(asked.result().topic_id)
    return "" if found == _NO_ID else found


def ends_of(kafka: KafkaSettings, topic: str) -> dict[int, int]:
    """Return where the partitions of a topic end that hold anything; none where there is no such topic.

    Raises:
        UnavailableError: No broker can be reached.
        RefusedError: The credentials or rights are refused.
    """
    with _reader(kafka) as consumer:
        return {partition: high for partition, (_, high) in _ranges(consumer, kafka, topic).items()}


def read_to_end(kafka: KafkaSettings, topic: str, since: Mapping[int, int] | None = None) -> Iterator[Message]:
    """Yield the records of a topic from its beginning to where it ends now; none where there is no such topic.

    No group is joined and nothing is committed.

    Args:
        kafka: The way to the brokers.
        topic: What to read.
        since: Offsets by partition to begin at instead; what is gone by now is left out.

    Raises:
        UnavailableError: No broker can be reached.
        RefusedError: The credentials or rights are refused.
    """
    with _reader(kafka) as consumer:
        ranges = {
            partition: (max(low, begin), high)
            for partition, (low, high) in _ranges(consumer, kafka, topic).items()
            if (begin := (since or {}).get(partition, low)) < high
        }
        yield from _read(consumer, kafka, topic, ranges)


def read_range(kafka: KafkaSettings, partition: int, start: int, stop: int) -> list[Message]:
    """Return the records of a partition of the topic of changes, from one offset to before another.

    Raises:
        UnavailableError: No broker can be reached.
        RefusedError: The credentials or rights are refused.
    """
    if start >= stop:
        return []
    with _reader(kafka) as consumer:
        return list(_read(consumer, kafka, kafka.topic, {partition: (start, stop)}))


@contextmanager
def _reader(kafka: KafkaSettings) -> Iterator[Consumer]:
    """Open a consumer that joins no group."""
    with kafka_errors("Opening a reader"):
        consumer = Consumer({**consumer_config(kafka), "group.id": "ghsync-reader"})
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
    last_news = time.monotonic()
    while left:
        with kafka_errors(what):
            found = consumer.consume(1_000, 0.05)
        if found:
            last_news = time.monotonic()
        elif time.monotonic() - last_news > 3 * kafka.timeout_seconds:
            raise UnavailableError(f"{what}: no answer.", way_out="Check that the brokers are up; run again.")
        for message in found:
            error = message.error()
            if error is not None and error.code() != _EOF:
                raise kafka_error(error, what)
            partition, offset = place(message)
            stop = ranges[partition][1]
            if error is None and offset < stop:
                yield message
            # At its end a range may hold what is never delivered, such as the mark of a transaction.
            if (offset if error else offset + 1) >= stop:
                left.pop(partition, None)


def _ranges(consumer: Consumer, kafka: KafkaSettings, topic: str) -> dict[int, tuple[int, int]]:
    """Return where the partitions of a topic begin and end, without the empty ones."""
    what = f"Looking for {topic}"
    with kafka_errors(what):
        found = consumer.list_topics(topic, timeout=kafka.timeout_seconds).topics[topic]
    if found.error is not None:
        if found.error.code() in _NO_TOPIC:
            return {}
        raise kafka_error(found.error, what)
    ends: dict[int, tuple[int, int]] = {}
    for partition in found.partitions:
        with kafka_errors(what):
            low, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=kafka.timeout_seconds)
        if high > low:
            ends[partition] = (low, high)
    return ends


def place(message: Message) -> tuple[int, int]:
    """Return a record's partition and offset."""
    partition, offset = message.partition(), message.offset()
    if partition is None or offset is None:
        raise AssertionError("what was consumed has a place")
    return partition, offset


def timestamp_ms(message: Message) -> int | None:
    """Return a record's Kafka timestamp in milliseconds since 1970 UTC, None where it has none."""
    kind, value = message.timestamp()
    return None if kind == TIMESTAMP_NOT_AVAILABLE else value
