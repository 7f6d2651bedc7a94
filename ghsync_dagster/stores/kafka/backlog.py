"""The backlog: how many changes wait for the group, read from the brokers without joining it.

Belongs here: where partitions end and what the group has committed. Not here: which lag is too high, and the lag that
a running consumer reports (``cdc.stream.listener``).
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
        committed: The group's committed offset; None where there is none.
    """

    partition: int
    low: int
    end: int
    committed: int | None

    @property
    def is_recreated(self) -> bool:
        """Whether the committed offset is beyond the end: it belongs to a deleted topic of the same name."""
        return self.committed is not None and self.committed > self.end

    @property
    def waiting(self) -> int:
        """Records that the group has not applied."""
        begin = self.low if self.committed is None or self.is_recreated else max(self.committed, self.low)
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
    def recreated(self) -> int:
        """How many partitions have a committed offset beyond their end, as the topic was recreated."""
        return sum(partition.is_recreated for partition in self.partitions)

    @property
    def uncommitted(self) -> set[int]:
        """The partitions without a committed offset."""
        return {partition.partition for partition in self.partitions if partition.committed is None}

    def ends(self) -> dict[int, int]:
        """Return where those partitions end that hold anything."""
        return {found.partition: found.end for found in self.partitions if found.end > found.low}

    def before(self, ends: Mapping[int, int]) -> int:
        """Return how many records before ``ends``, by partition, the group has not applied."""
        at = {found.partition: found.end - found.waiting for found in self.partitions}
        return sum(max(end - at.get(partition, end), 0) for partition, end in ends.items())


def read_backlog(kafka: KafkaSettings) -> Backlog:
    """Read the watermarks and the group's committed offsets.

    Raises:
        UnavailableError: No broker can be reached, or there is no such topic.
        RefusedError: The credentials or rights are refused.
        ConfigError: A setting is wrong.
    """
    from confluent_kafka import Consumer

    from ghsync_dagster.stores.kafka.client import client_config, kafka_errors
    from ghsync_dagster.stores.kafka.topics import committed_offsets, partitions_of, watermarks

    what = f"Asking how far {kafka.group_id} is in {kafka.topic}"
    with kafka_errors(what):
        # It neither subscribes nor commits, so the group does not notice.
        consumer = Consumer({**client_config(kafka), "group.id": kafka.group_id, "enable.auto.commit": False})
        try:
            partitions = partitions_of(consumer, kafka.topic, kafka.timeout_seconds)
            # Committed offsets first: a record that is committed meanwhile counts as waiting, none is left out.
            committed = committed_offsets(consumer, kafka, partitions, what)
            found = tuple(
                PartitionBacklog(number, *watermarks(consumer, kafka.topic, number, kafka.timeout_seconds), offset)
                for number, offset in committed.items()
            )
        finally:
            consumer.close()
    return Backlog(kafka.topic, kafka.group_id, found)


def await_no_lag(kafka: KafkaSettings, seconds: float) -> int:
    """Wait at most ``seconds`` until no change waits for the group; return how many wait then.

    Raises:
        GhsyncError: As ``read_backlog`` does.
    """
    deadline = time.monotonic() + seconds
    while (waiting := read_backlog(kafka).waiting) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return waiting


def require_topic(kafka: KafkaSettings, *, seconds: float) -> None:
    """Check that the brokers answer and have the topic.

    Args:
        kafka: The topic and the connection settings.
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
