"""A batch: records that are decoded, to be applied together and then committed together.

Belongs here: what is known of a batch's records, and its segments. Not here: applying, or when a batch is full.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from ghsync_dagster.domain.change import Change, Op, Position, RecordKind
from ghsync_dagster.domain.coalesce import Segment, coalesce
from ghsync_dagster.domain.envelope import ChangeDecoder, Refusal
from ghsync_dagster.domain.errors import TransientError, UndecodableError
from ghsync_dagster.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from confluent_kafka import Message

    from ghsync_dagster.stores.kafka.client import KafkaSettings

log = get_logger("cdc")

Decoded = Change | UndecodableError


class Part(NamedTuple):
    """A segment, and where its records are in the batch.

    Attributes:
        segment: What is to be applied.
        start: The index of the first of its records.
        stop: The index after the last one.
    """

    segment: Segment
    start: int
    stop: int


class RecordDecoder:
    """Decodes records, each partition's in the order of its offsets.

    A table without a key gives deletes without a key, and after each of them a tombstone without content. The delete
    is applied by its row. So such a tombstone is skipped if it comes right after one in its partition.

    Args:
        kafka: The topic, to read the record before such a tombstone from: at a border of batches, or after a restart.
            None to do without.
    """

    def __init__(self, kafka: KafkaSettings | None = None) -> None:
        self._decoder = ChangeDecoder()
        self._kafka = kafka
        self._last: Message | None = None

    def decode(self, messages: Sequence[Message]) -> list[Decoded]:
        """Decode records; each gives its change, or the error that refuses it."""
        decoded: list[Decoded] = []
        decode = self._decoder.decode
        for at, message in enumerate(messages):
            try:
                decoded.append(decode(message.key(), message.value()))
            except UndecodableError as error:
                nothing = error.kind == Refusal.MISSING_KEY.kind and self._follows_its_delete(messages, at)
                decoded.append(_KEYLESS_TOMBSTONE if nothing else error)
        if messages:
            self._last = messages[-1]
        return decoded

    def _follows_its_delete(self, messages: Sequence[Message], at: int) -> bool:
        """Return whether a record without a key is a tombstone right after a delete without a key."""
        if self._kind(_ANY_KEY, messages[at].value()) is not RecordKind.TOMBSTONE:
            return False
        before = self._before(messages, at)
        if before is None or not self._decoder.is_keyless(_raw(before.key())):
            return False
        return self._kind(None, before.value()) is RecordKind.DELETE

    def _before(self, messages: Sequence[Message], at: int) -> Message | None:
        """Return the record right before one in its partition, None where it is gone or can't be read now."""
        partition, offset = messages[at].partition() or 0, (messages[at].offset() or 0) - 1
        earlier = (message for message in reversed(messages[:at]) if message.partition() == partition)
        known = next(earlier, self._last)
        if known is not None and (known.partition(), known.offset()) == (partition, offset):
            return known
        if self._kafka is None or offset < 0:
            return None
        from ghsync_dagster.stores.kafka.topics import read_range

        try:
            return next(iter(read_range(self._kafka, partition, offset, offset + 1)), None)
        except TransientError as error:
            # What was polled must not be lost. A dead letter too many is no harm.
            log.warning("record before a tombstone not read", partition=partition, reason=error.message)
            return None

    def _kind(self, key: bytes | None, value: str | bytes | None) -> RecordKind | None:
        try:
            return self._decoder.decode(key, _raw(value)).kind
        except UndecodableError:
            return None


_ANY_KEY: Final = b"0"
_KEYLESS_TOMBSTONE: Final = Change(Op.SKIP, None, None, RecordKind.KEYLESS_TOMBSTONE)


def _raw(value: str | bytes | None) -> bytes | None:
    return value.encode() if isinstance(value, str) else value


@dataclass(slots=True)
class Batch:
    """Records in the order in which they are applied.

    Attributes:
        messages: The records.
        changes: The change of each, or why it can't be decoded.
        kinds: How many there are of each kind; those that can't be decoded are left out.
        keys: The keys that are changed.
        size: Bytes of the values.
        offsets: The offset to commit for each partition once the batch is applied.
        firsts: The first record of each partition.
        left_out: Indexes of the records that are not applied, since their users were read later in the binlog.
        as_deletes: Indexes of the records that are applied as deletes, since their users had no row then.
    """

    messages: list[Message] = field(default_factory=list)
    changes: list[Decoded] = field(default_factory=list)
    kinds: Counter[RecordKind] = field(default_factory=Counter)
    keys: set[str | None] = field(default_factory=set)
    size: int = 0
    offsets: dict[int, int] = field(default_factory=dict)
    firsts: dict[int, Message] = field(default_factory=dict)
    left_out: frozenset[int] = frozenset()
    as_deletes: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.messages)

    def add(self, messages: Sequence[Message], changes: Sequence[Decoded]) -> None:
        """Append records, each partition's in the order of its offsets."""
        self.messages += messages
        self.changes += changes
        good = [change for change in changes if type(change) is Change]
        self.kinds.update([change.kind for change in good])
        self.keys.update([change.key for change in good])
        self.size += sum([len(message) for message in messages])
        last = {message.partition(): message.offset() for message in messages}
        first = {message.partition(): message for message in reversed(messages)}
        for partition, offset in last.items():
            if partition is None or offset is None:
                raise AssertionError("what was consumed has an offset")
            self.offsets[partition] = offset + 1
            self.firsts.setdefault(partition, first[partition])

    @property
    def starts(self) -> dict[int, int]:
        """The first offset of each partition."""
        return {partition: first.offset() or 0 for partition, first in self.firsts.items()}

    def joined(self, later: Batch) -> Batch:
        """Return a batch of these records and later ones."""
        both = Batch()
        both.add(self.messages, self.changes)
        both.add(later.messages, later.changes)
        return both

    def without(self, partitions: Collection[int]) -> Batch:
        """Return a batch of the records of all other partitions."""
        kept = [at for at, message in enumerate(self.messages) if message.partition() not in partitions]
        rest = Batch()
        rest.add([self.messages[at] for at in kept], [self.changes[at] for at in kept])
        return rest

    def first_truncate(self) -> int | None:
        """Return the index of the first truncate, None where there is none."""
        if RecordKind.TRUNCATE not in self.kinds:
            return None
        return next(at for at, change in enumerate(self.changes) if _is_truncate(change))

    def cut(self, stop: int) -> Batch:
        """Return a batch of the records before ``stop``."""
        head = Batch()
        head.add(self.messages[:stop], self.changes[:stop])
        return head

    def parts(self) -> list[Part]:
        """Return what is to be applied, in order; a truncate begins a part."""
        starts = [0]
        if RecordKind.TRUNCATE in self.kinds:
            starts += [at for at, change in enumerate(self.changes) if at and _is_truncate(change)]
        parts = []
        for start, stop in zip(starts, [*starts[1:], len(self.changes)], strict=True):
            segments = coalesce([change for _, change in self._applicable(start, stop)])
            parts += [Part(segment, start, stop) for segment in segments]
        return parts

    def undecodable(self) -> list[tuple[Message, UndecodableError]]:
        """Return the records that can't be decoded, and why."""
        if self.kinds.total() == len(self.changes):
            return []
        pairs = zip(self.messages, self.changes, strict=True)
        return [(message, error) for message, error in pairs if isinstance(error, UndecodableError)]

    def history(self, part: Part, key: str) -> Iterator[tuple[Message, Change]]:
        """Yield the records of one key in a part, in order."""
        for at, change in self._applicable(part.start, part.stop):
            if change.key == key:
                yield self.messages[at], change

    def _applicable(self, start: int, stop: int) -> Iterator[tuple[int, Change]]:
        """Yield the changes of a part that are to be applied, with their indexes."""
        for at, change in enumerate(self.changes[start:stop], start):
            if type(change) is Change and at not in self.left_out:
                is_delete = at in self.as_deletes
                yield at, msgspec.structs.replace(change, op=Op.DELETE, user=None) if is_delete else change


def newest_positions(messages: Sequence[Message], changes: Sequence[Decoded]) -> dict[int, Position]:
    """Return the position of the last record of each partition that has one.

    Args:
        messages: Records in the order of their partitions.
        changes: The change of each.
    """
    partitions = {message.partition() for message in messages}
    found: dict[int, Position] = {}
    for message, change in zip(reversed(messages), reversed(changes), strict=True):
        if type(change) is Change and change.position is not None:
            found.setdefault(message.partition() or 0, change.position)
            if len(found) == len(partitions):
                break
    return found


def _is_truncate(change: Decoded) -> bool:
    return type(change) is Change and change.kind is RecordKind.TRUNCATE
