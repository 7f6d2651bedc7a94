"""How far this consumer lags, and whether Kafka answers, reported once a second."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from ghsync_dagster.cdc.stream.listener import KAFKA

if TYPE_CHECKING:
    from collections.abc import Callable

    from confluent_kafka import Message

    from ghsync_dagster.cdc.stream.group import GroupOffsets
    from ghsync_dagster.cdc.stream.lasting_fault import LastingFault
    from ghsync_dagster.cdc.stream.listener import ChangeListener
    from ghsync_dagster.stores.kafka.consumer import TopicConsumer

_LAG_SECONDS: Final = 1.0


class LagReporter:
    """Reports the lag of each partition.

    Args:
        consumer: The member of the group.
        offsets: The committed offsets of its partitions.
        listener: Hears of the lag.
        fault: Logs that Kafka is away.
        oldest: Returns the oldest record of a partition that was polled and is not applied; None where there is none.
    """

    def __init__(
        self,
        consumer: TopicConsumer,
        offsets: GroupOffsets,
        listener: ChangeListener,
        fault: LastingFault,
        oldest: Callable[[int], Message | None],
    ) -> None:
        self._consumer, self._offsets, self._listener, self._fault = consumer, offsets, listener, fault
        self._oldest = oldest
        self._next_at = 0.0

    def report(self) -> None:
        """Report the lag and the state of Kafka, unless that was done within the last second.

        Raises:
            TransientError: Kafka does not answer.
            PermanentError: Kafka refuses.
        """
        now = time.monotonic()
        if now < self._next_at:
            return
        self._next_at = now + _LAG_SECONDS
        self._consumer.check_brokers()
        if (fault := self._consumer.fault) is not None:
            self._fault.failed(fault)
        else:
            self._fault.recovered()
        self._listener.connection(KAFKA, up=fault is None)
        for partition in sorted(self._consumer.partitions if fault is None else ()):
            self._report_partition(partition)

    def _report_partition(self, partition: int) -> None:
        from ghsync_dagster.stores.kafka.topics import timestamp_ms

        end = self._consumer.known_end(partition)
        if end is None:
            return
        oldest = self._oldest(partition)
        if oldest is None:
            # What waits, if anything, has only just come.
            self._listener.lag(partition, max(end - self._offsets.current()[partition], 0), 0.0)
        else:
            appended = timestamp_ms(oldest)
            seconds = 0.0 if appended is None else max(time.time() - appended / 1000, 0.0)
            self._listener.lag(partition, max(end - (oldest.offset() or 0), 0), seconds)
