"""Records that were polled and wait for the writer.

Belongs here: polling and decoding, and when the records are enough for a batch. Not here: submitting them
(``cdc.stream.consume``), and what the client does (``stores.kafka.consumer``).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from ghsync_dagster.cdc.stream.batch import Batch, RecordDecoder, newest_positions
from ghsync_dagster.cdc.stream.group import next_offsets

if TYPE_CHECKING:
    from confluent_kafka import Message

    from ghsync_dagster.cdc.stream.in_flight import InFlight
    from ghsync_dagster.cdc.stream.source_reader import SourceReader
    from ghsync_dagster.cdc.stream.write import Writer
    from ghsync_dagster.stores.kafka.consumer import TopicConsumer

POLL_RECORDS: Final = 5_000
"""Records that are polled at once."""
_WRITE_SECONDS: Final = 3.0
"""How long the write of one batch should take at most."""
_LEAST_KEYS: Final = 500
_MOST_KEYS: Final = 50_000
_MOST_RECORDS: Final = 100_000
_MOST_BYTES: Final = 64_000_000


class PolledRecords:
    """The records that become the next batch.

    Args:
        consumer: The member of the group.
        writer: Its rate limits a batch.
        in_flight: The batch before.
        reader: Is informed of the newest positions, if this consumer can repair users.
    """

    def __init__(
        self, consumer: TopicConsumer, writer: Writer, in_flight: InFlight, reader: SourceReader | None
    ) -> None:
        self.batch = Batch()
        self.is_stale = False
        """Whether the records are dropped, and polling goes on from the committed offsets before anything else."""
        self._consumer, self._writer, self._in_flight, self._reader = consumer, writer, in_flight, reader
        self._decoder = RecordDecoder(consumer.kafka)
        self._has_more = False
        """Whether more records wait in this process to be polled."""

    def poll(self, limit: int, seconds: float) -> None:
        """Poll up to ``limit`` records, and decode them."""
        messages = self._consumer.poll(limit, seconds)
        self._has_more = len(messages) >= limit > 1
        if messages and not self.is_stale:
            changes = self._decoder.decode(messages)
            if self._reader is not None:
                self._reader.polled(newest_positions(messages, changes))
            self.batch.add(messages, changes)

    def go_to_committed(self) -> None:
        """Drop stale records, and go on from the committed offsets."""
        if self.is_stale:
            self.batch = Batch()
            if partitions := sorted(self._consumer.partitions):
                self._consumer.seek(next_offsets(self._consumer, partitions))
            self.is_stale = False

    @property
    def is_full(self) -> bool:
        """Whether the batch is not to grow further."""
        batch = self.batch
        most = min(max(self._writer.rate * _WRITE_SECONDS, _LEAST_KEYS), _MOST_KEYS)
        return len(batch.keys) >= most or len(batch) >= _MOST_RECORDS or batch.size >= _MOST_BYTES

    @property
    def is_ready(self) -> bool:
        """Whether the batch is to be written now: a larger batch means fewer writes."""
        records = len(self.batch)
        if records >= POLL_RECORDS or self.is_full:
            # The store is not to stand idle.
            return True
        return records > 0 and not self._has_more and time.monotonic() >= self._in_flight.next_batch_at

    def oldest(self, partition: int) -> Message | None:
        """Return the oldest record of a partition that was polled and is not acknowledged."""
        oldest = self.batch.firsts.get(partition)
        return self._in_flight.batch.firsts.get(partition, oldest) if self._in_flight.is_writing else oldest
