"""The backlog: how many changes wait for the group, asked from the brokers without joining it.

Belongs here: where partitions end and what the group has committed. Not here: how much is too much, and the lag that a
running consumer tells of itself (``cdc.stream.listener``).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ghsync_dagster.stores.kafka.client import KafkaSettings

_POLL_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True)
class PartitionBacklog:
    """One partition as the brokers know it.

    Attributes:
        partition: Its number.
        low: The first offset that it holds.
        end: The offset of the next record to come.
        committed: The offset that the group goes on from; None where it has never committed.
    """

    partition: int
    low: int
    end: int
    committed: int | None

    @property
    def is_anew(self) -> bool:
        """Whether the group's place is beyond the end: it is one of a topic that is gone, recreated since."""
        return self.committed is not None and self.committed > self.end

    @property
    def waiting(self) -> int:
        """Records that the group has not applied."""
        begin = self.low if self.committed is None or self.is_anew else max(self.committed, self.low)
        return self.end - begin

    @property
    def lost(self) -> int:
        """Records that were removed from the topic before the group had applied them."""
        return 0 if self.committed is None else max(self.low - self.committed, 0)


@dataclass(frozen=True, slots=True)
class Backlog:
    """All partitions of the topic at one moment.

    Attributes:
        topic: The topic.
        group: The consumer group.
        partitions: In the order of their numbers.
    """

    topic: str
    group: str
    partitions: tuple[PartitionBacklog, ...]

    @property
    def waiting(self) -> int:
        """Records that the group has not applied."""
        return sum(partition.waiting for partition in self.partitions)

    @property
    def lost(self) -> int:
        """Records that were removed from the topic before the group had applied them."""
        return sum(partition.lost for partition in self.partitions)

    @property
    def anew(self) -> int:
        """How many partitions are of a topic that was recreated, which the group does not know."""
        return sum(partition.is_anew for partition in self.partitions)

    @property
    def unplaced(self) -> set[int]:
        """The partitions in which the brokers know no place of the group."""
        return {partition.partition for partition in self.partitions if partition.committed is None}

    def ends(self) -> dict[int, int]:
        """Return where those partitions end that hold anything."""
        return {found.partition: found.end for found in self.partitions if found.end > found.low}

    def before(self, ends: Mapping[int, int]) -> int:
        """Return how many records before ``ends``, by partition, the group has not applied."""
        at = {found.partition: found.end - found.waiting for found in self.partitions}
        return sum(max(end - at.get(partition, end), 0) for partition, end in ends.items())


def read_backlog(kafka: KafkaSettings) -> Backlog:
    """Ask how far the group is.

    Raises:
        UnavailableError: No broker can be reached, or there is no such topic.
        RefusedError: The credentials or rights are refused.
        ConfigError: A setting is wrong.
    """
    from confluent_kafka import Consumer, TopicPartition

    from ghsync_dagster.stores.kafka.client import client_config, committed_offset, kafka_errors
    from ghsync_dagster.stores.kafka.topics import bounds_of, partitions_of

    what = f"Asking how far {kafka.group_id} is in {kafka.topic}"
    with kafka_errors(what):
        # It neither subscribes nor commits, so the group does not notice.
        consumer = Consumer({**client_config(kafka), "group.id": kafka.group_id, "enable.auto.commit": False})
        try:
            partitions = partitions_of(consumer, kafka.topic, kafka.timeout_seconds)
            places = [TopicPartition(kafka.topic, number) for number in partitions]
            # The commits first: what is committed meanwhile may count as waiting, never the other way round.
            committed = consumer.committed(places, timeout=kafka.timeout_seconds)
            found = []
            for place in committed:
                low, end = bounds_of(consumer, kafka.topic, place.partition, kafka.timeout_seconds)
                found.append(PartitionBacklog(place.partition, low, end, committed_offset(place, what)))
        finally:
            consumer.close()
    return Backlog(kafka.topic, kafka.group_id, tuple(found))


def await_no_lag(kafka: KafkaSettings, seconds: float) -> int:
    """Wait until no change waits for the group, at most so long; return how many wait then.

    Raises:
        GhsyncError: As ``read_backlog`` does.
    """
    deadline = time.monotonic() + seconds
    while (waiting := read_backlog(kafka).waiting) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return waiting


def ask_for_topic(kafka: KafkaSettings, *, seconds: float) -> None:
    """Ask the brokers for the topic.

    Args:
        kafka: Which topic, and how to get there.
        seconds: How long to wait for an answer.

    Raises:
        UnavailableError: No broker can be reached in time, or there is no such topic.
        RefusedError: The credentials or rights are refused.
        ConfigError: A setting is wrong.
    """
    from confluent_kafka.admin import AdminClient

    from ghsync_dagster.stores.kafka.client import client_config, kafka_errors
    from ghsync_dagster.stores.kafka.topics import partitions_of

    with kafka_errors(f"Asking for {kafka.topic}"):
        admin = AdminClient(client_config(kafka))
    partitions_of(admin, kafka.topic, seconds)
