"""Applying a truncate in the order of the binlog, in a topic of several partitions.

Belongs here: polling and acknowledging while a truncate is put in order, and what interrupts it. Not here: where the
other partitions stood (``cdc.stream.order``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ghsync_dagster.cdc.stream.order import OrderedTruncates, Truncate
from ghsync_dagster.domain.change import Change
from ghsync_dagster.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ghsync_dagster.cdc.stream.batch import Batch
    from ghsync_dagster.cdc.stream.in_flight import InFlight
    from ghsync_dagster.stores.kafka.consumer import TopicConsumer

_TURN_SECONDS: Final = 0.005

log = get_logger("cdc")


class _InterruptedError(Exception):
    """Partitions came or went, or the run ends, while all partitions are needed."""


class TruncateOrdering:
    """Applies what stands before a truncate in all partitions, and then the truncate.

    Args:
        consumer: The member of the group.
        in_flight: The work of its writer.
        record: Records the offset of a truncate that is about to be applied, and those of the other partitions.
        is_over: Returns whether the run is to end.
        wait_seconds: How long a truncate waits for the other partitions to pass it.
    """

    def __init__(
        self,
        consumer: TopicConsumer,
        in_flight: InFlight,
        record: Callable[[int, int, Mapping[int, int]], None],
        is_over: Callable[[], bool],
        wait_seconds: float,
    ) -> None:
        self._consumer, self._in_flight, self._is_over = consumer, in_flight, is_over
        self._ordered = OrderedTruncates(consumer, self._write, self._keep_polling, record, wait_seconds)
        self._is_interrupted = False

    def interrupt(self) -> None:
        """End the ordering, since partitions came or went."""
        self._is_interrupted = True

    def apply(self, pending: Batch, at: int) -> None:
        """Apply the records before a truncate, then the truncate in the order of the binlog.

        The consumer is then to go on from the committed offsets, also where this was interrupted.

        Args:
            pending: Records that were polled.
            at: Which of them is the truncate.
        """
        from ghsync_dagster.stores.kafka.topics import location

        message, change = pending.messages[at], pending.changes[at]
        position = change.position if isinstance(change, Change) else None
        truncate = Truncate(self._consumer.kafka.topic, *location(message), position)
        log.info("ordering a truncate", partition=truncate.partition, offset=truncate.offset)
        self._is_interrupted = False
        self._consumer.pause()
        try:
            self._write(pending.cut(at))
            self._ordered.apply(truncate)
        except _InterruptedError:
            log.info("truncate ordering interrupted", partition=truncate.partition)

    def _write(self, batch: Batch) -> None:
        if len(batch):
            self._in_flight.submit(batch)
            while self._in_flight.is_writing:
                self._in_flight.acknowledge()
                self._in_flight.wait(_TURN_SECONDS)
                self._keep_polling(_TURN_SECONDS)
            self._in_flight.raise_failure()

    def _keep_polling(self, seconds: float) -> None:
        self._in_flight.raise_failure()
        # These records are polled again afterwards, from the committed offsets.
        self._consumer.poll(1, seconds)
        if self._is_interrupted or self._is_over():
            raise _InterruptedError
