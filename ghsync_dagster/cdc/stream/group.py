"""The offsets of the group in the partitions that this consumer has, and the fence that each commit renews.

Belongs here: committing, and for how long a commit proves that this consumer owns its partitions. Not here: when a
batch is committed (``cdc.stream.in_flight``), and the client (``stores.kafka.consumer``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ghsync_dagster import clock

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from ghsync_dagster.cdc.stream.topic_guard import TopicChecks
    from ghsync_dagster.stores.kafka.consumer import TopicConsumer


class GroupFence:
    """How long the group certainly counts this consumer as the owner of its partitions.

    Args:
        session_seconds: How long the group waits for a silent consumer.
    """

    def __init__(self, session_seconds: float) -> None:
        self.session_seconds = session_seconds
        self._until = float("-inf")

    def renewed(self, requested_at: float) -> None:
        """Renew the fence: the group accepted a commit that was sent at this time of ``clock.now``."""
        self._until = requested_at + self.session_seconds

    @property
    def remaining(self) -> float:
        """Seconds that remain of the last renewal."""
        return self._until - clock.now()

    @property
    def is_recent(self) -> bool:
        """Whether most of the time remains."""
        return self.remaining > self.session_seconds * 2 / 3


class GroupOffsets:
    """The committed offsets of the group in the partitions that this consumer has.

    Args:
        consumer: The member of the group.
        fence: Each commit renews it.
        topic: Records in which partitions the group has an offset.
    """

    def __init__(self, consumer: TopicConsumer, fence: GroupFence, topic: TopicChecks) -> None:
        self._consumer, self._topic = consumer, topic
        self.fence = fence
        self._known: dict[int, int] = {}

    def commit(self, offsets: Mapping[int, int]) -> None:
        """Commit the next offset of each partition, and renew the fence.

        Raises:
            UnavailableError: Not now: no broker, a rebalance, or this consumer is out of the group.
            RefusedError: Credentials or rights.
        """
        requested_at = clock.now()
        self._consumer.commit(offsets)
        self._known |= offsets
        self._topic.committed(offsets)
        self.fence.renewed(requested_at)

    def current(self) -> dict[int, int]:
        """Return the next offset of each partition that this consumer has."""
        if unknown := sorted(self._consumer.partitions - self._known.keys()):
            self._known |= next_offsets(self._consumer, unknown)
        return {partition: self._known[partition] for partition in self._consumer.partitions}

    def renew_fence(self, starts: Mapping[int, int]) -> None:
        """Renew the fence where it is not recent, by committing offsets that change nothing.

        Args:
            starts: Where the work at hand starts. Everything before it is committed already.
        """
        if self.fence.is_recent:
            return
        # Partitions that went meanwhile are another consumer's to commit.
        if offsets := {partition: starts[partition] for partition in starts.keys() & self._consumer.partitions}:
            self.commit(offsets)

    def forget(self, partitions: Collection[int]) -> None:
        """Forget the offsets of partitions that went."""
        for partition in partitions:
            self._known.pop(partition, None)


def next_offsets(consumer: TopicConsumer, partitions: Iterable[int]) -> dict[int, int]:
    """Return the next offset of the group in each partition: the first one where nothing is committed."""
    committed = consumer.committed(partitions)
    return {
        partition: consumer.offsets(partition)[0] if offset is None else offset
        for partition, offset in committed.items()
    }
