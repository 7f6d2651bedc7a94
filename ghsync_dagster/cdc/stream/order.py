"""Truncates in a topic of several partitions: up to which offset each other partition is from before the truncate.

Belongs here: finding these offsets by the binlog positions of records, and applying what comes before them. Not here:
consuming and writing.

The binlog of a server has one order, and each partition holds a part of it. A truncate at position P removes what every
partition holds from before P, and nothing from after it. So the first record from after P is searched in each other
partition, wherever the consumer is. The records before that one are applied, then the truncate. Then the partition is
consumed from that record on, again if need be.

The order is uncertain if a partition has no record from after P yet: it may still get one from before P. It is also
uncertain if a record has no position, or one in the binlog of another server. Such a record may be from either side,
unless a record from before P follows it in its partition. Several records may have one position: with MariaDB, all rows
of a transaction. A truncate is a transaction of its own, so they are all on one side of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from ghsync_dagster.cdc.stream.batch import Batch, Decoded, RecordDecoder
from ghsync_dagster.cdc.stream.group import next_offsets
from ghsync_dagster.domain.change import Change, Op, RecordKind
from ghsync_dagster.domain.errors import PermanentError

if TYPE_CHECKING:
    from confluent_kafka import Message

    from ghsync_dagster.domain.change import Position
    from ghsync_dagster.stores.kafka.client import KafkaSettings
    from ghsync_dagster.stores.kafka.consumer import TopicConsumer

_SCAN_BACK: Final = 1_000
"""How many records the first scan goes back from a partition's end; each further one goes ten times as far."""
_CHUNK: Final = 5_000
"""How many records are read at once."""
_POLL_SECONDS: Final = 0.5
_LAST_RECORDS: Final = 20
"""How many records at a partition's end are searched for one with a position."""

Chunks = Callable[[int, int, int], "Iterable[Sequence[Message]]"]
"""Reads the records of a partition from one offset to before another, in order and some at a time."""


class Truncate(NamedTuple):
    """A truncate of the table.

    Attributes:
        topic: Where it was read.
        partition: Its partition.
        offset: Its offset.
        position: Its position in the binlog, None where the record has none.
    """

    topic: str
    partition: int
    offset: int
    position: Position | None

    def refused(self, why: str) -> PermanentError:
        """Return the error that stops the consumer before this truncate."""
        return PermanentError(
            f"The truncate at {self.topic} partition {self.partition} offset {self.offset} can't be put in order with "
            f"the other partitions: {why}.",
            way_out="Have one consumer only, and a later change in every partition; or give the topic one partition "
            "and take a new snapshot. See docs/explain/changes.md.",
        )


class Scan(NamedTuple):
    """What a part of a partition holds, relative to a truncate.

    Attributes:
        before: Whether it holds a record from before the truncate.
        after: The offset of the first record from after it, None where there is none yet.
        doubt: Why it is uncertain on which side a record is that follows the last one from before; None where none is.
    """

    before: bool
    after: int | None
    doubt: str | None


def first_after(truncate: Truncate, partition: int, low: int, high: int, chunks: Chunks) -> Scan:
    """Find a partition's first record from after a truncate.

    No chunk is read after the one that holds it.

    Args:
        truncate: The truncate, in another partition.
        partition: The partition to search.
        low: The first offset that the partition holds.
        high: Its end.
        chunks: Reads a range of it.

    Raises:
        PermanentError: The positions of the records do not show the order.
    """
    back = _SCAN_BACK
    while True:
        start = max(low, high - back)
        scan = _scan(truncate, partition, chunks(partition, start, high))
        if scan.before or start == low:
            break
        back *= 10
    if scan.after is not None and scan.doubt is not None:
        raise truncate.refused(scan.doubt)
    return scan


def _scan(truncate: Truncate, partition: int, chunks: Iterable[Sequence[Message]]) -> Scan:
    if truncate.position is None:
        raise truncate.refused("it has no position in the binlog")
    before, doubt, last = False, None, None
    for at, (message, change) in enumerate(_decoded(chunks)):
        if not isinstance(change, Change) or change.op is Op.SKIP:
            continue
        name = f"partition {partition} offset {message.offset()}"
        if change.position is None:
            # A tombstone belongs to the delete before it.
            if not (change.kind is RecordKind.TOMBSTONE and at > 0):
                doubt = doubt or f"{name} has no position in the binlog"
            continue
        if last is not None and (change.position.compare(last) or 0) < 0:
            raise truncate.refused(f"{name} breaks the order of the binlog")
        last = change.position
        order = last.compare(truncate.position)
        if order is None:
            doubt = doubt or f"{name} is of {last.origin}, the truncate of {truncate.position.origin}"
        elif order > 0:
            return Scan(before, message.offset(), doubt)
        else:
            # Whatever comes before it in its partition is applied before it.
            before, doubt = True, None
    return Scan(before, None, doubt)


def _decoded(chunks: Iterable[Sequence[Message]]) -> Iterator[tuple[Message, Decoded]]:
    """Yield each record with its change; a chunk is read when the one before it is used up."""
    decoder = RecordDecoder()
    for messages in chunks:
        yield from zip(messages, decoder.decode(messages), strict=True)


def _is_earlier(one: Truncate, other: Truncate) -> bool:
    """Return whether one truncate is to be applied before another. One that was written twice has one position."""
    if one.position is None or other.position is None:
        raise one.refused("it has no position in the binlog")
    order = one.position.compare(other.position)
    if order is None:
        raise one.refused(f"it is of {one.position.origin}, another truncate of {other.position.origin}")
    return (order, one.partition, one.offset) < (0, other.partition, other.offset)


def topic_ends(kafka: KafkaSettings) -> tuple[list[Change | None], dict[int, Position | None]]:
    """Return the oldest record in each partition of the topic, and the position of the newest one.

    Returns:
        The oldest ones, None where there is no record or it cannot be decoded. The newest positions by partition; None
        where none of the last records has a position.

    Raises:
        UnavailableError: No broker can be reached, or there is no such topic.
        RefusedError: The credentials or rights are refused.
    """
    from ghsync_dagster.stores.kafka.backlog import read_backlog
    from ghsync_dagster.stores.kafka.topics import read_range

    oldest: list[Change | None] = []
    newest: dict[int, Position | None] = {}
    for found in read_backlog(kafka).partitions:
        partition, low, end = found.partition, found.low, found.end
        oldest += _changes(read_range(kafka, partition, low, min(low + 1, end))) or [None]
        last = _changes(read_range(kafka, partition, max(low, end - _LAST_RECORDS), end))
        positions = (change.position for change in reversed(last) if change is not None)
        newest[partition] = next((position for position in positions if position is not None), None)
    return oldest, newest


def _changes(messages: Iterable[Message]) -> list[Change | None]:
    return [change if isinstance(change, Change) else None for _, change in _decoded([list(messages)])]


class OrderedTruncates:
    """Applies a truncate, and before it what is from before it in all partitions.

    Args:
        consumer: The member of the group; it must have all partitions.
        write: Applies and acknowledges a batch, or raises.
        keep_polling: Polls for so many seconds, and raises when the work must not go on.
        record: Records the offset of a truncate that is about to be applied, and those of the other partitions.
        wait_seconds: How long to wait for a record from after the truncate in each other partition.
    """

    def __init__(
        self,
        consumer: TopicConsumer,
        write: Callable[[Batch], None],
        keep_polling: Callable[[float], None],
        record: Callable[[int, int, Mapping[int, int]], None],
        wait_seconds: float,
    ) -> None:
        self._consumer = consumer
        self._write = write
        self._keep_polling = keep_polling
        self._record = record
        self._wait_seconds = wait_seconds

    def apply(self, truncate: Truncate) -> None:
        """Apply the earliest truncate, this one or one of another partition, and what comes before it.

        All of it is committed; the consumer is then to go on from the committed offsets.

        Raises:
            PermanentError: The order is uncertain.
        """
        while True:
            stops = self._stops(truncate)
            starts = next_offsets(self._consumer, stops)
            earlier = self._earlier(truncate, starts, stops)
            if earlier is None:
                break
            truncate = earlier
        decoder = RecordDecoder(self._consumer.kafka)

        def batch_of(messages: list[Message]) -> Batch:
            batch = Batch()
            batch.add(messages, decoder.decode(messages))
            return batch

        for partition, stop in stops.items():
            for messages in self._chunks(partition, starts[partition], stop):
                self._write(batch_of(messages))
        batch = batch_of(self._read(truncate.partition, truncate.offset, truncate.offset + 1))
        self._record(truncate.partition, truncate.offset, stops)
        # Partitions that are past the truncate already are rewound in the same commit.
        batch.offsets = {**stops, **batch.offsets}
        self._write(batch)

    def _stops(self, truncate: Truncate) -> dict[int, int]:
        """Return the first offset of each partition that is not from before the truncate."""
        partitions = self._consumer.all_partitions()
        if others := set(partitions) - self._consumer.partitions:
            named = ", ".join(map(str, sorted(others)))
            raise truncate.refused(f"other consumers of group {self._consumer.kafka.group_id} have partitions {named}")
        stops = {truncate.partition: truncate.offset}
        for partition in partitions:
            if partition != truncate.partition:
                stops[partition] = self._after(truncate, partition)
        return stops

    def _after(self, truncate: Truncate, partition: int) -> int:
        deadline = time.monotonic() + self._wait_seconds
        while True:
            low, high = self._consumer.offsets(partition)
            scan = first_after(truncate, partition, low, high, self._chunks)
            if scan.after is not None:
                return scan.after
            if time.monotonic() > deadline:
                why = f"partition {partition} holds no change from after it yet"
                raise truncate.refused(f"{why}, and {scan.doubt}" if scan.doubt else why)
            self._keep_polling(_POLL_SECONDS)

    def _earlier(self, truncate: Truncate, starts: Mapping[int, int], stops: Mapping[int, int]) -> Truncate | None:
        """Return the earliest truncate among what is to be applied before this one."""
        earliest = truncate
        for partition, stop in stops.items():
            for message, change in _decoded(self._chunks(partition, starts[partition], stop)):
                if isinstance(change, Change) and change.op is Op.TRUNCATE:
                    other = Truncate(truncate.topic, partition, message.offset() or 0, change.position)
                    if _is_earlier(other, earliest):
                        earliest = other
        return None if earliest is truncate else earliest

    def _chunks(self, partition: int, start: int, stop: int) -> Iterator[list[Message]]:
        for at in range(start, stop, _CHUNK):
            self._keep_polling(0)
            if messages := self._read(partition, at, min(at + _CHUNK, stop)):
                yield messages

    def _read(self, partition: int, start: int, stop: int) -> list[Message]:
        from ghsync_dagster.stores.kafka.topics import read_range

        return read_range(self._consumer.kafka, partition, start, stop)
