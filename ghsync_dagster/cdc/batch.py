"""A batch: records that are decoded, to be applied together and then committed together.

Belongs here: what is known of a batch's records, and its segments. Not here: applying, or when a batch is full.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from ghsync_dagster.domain.change import Change
from ghsync_dagster.domain.coalesce import Segment, coalesce
from ghsync_dagster.domain.errors import UndecodableError

if TYPE_CHECKING:
    from confluent_kafka import Message

    from ghsync_dagster.domain.envelope import ChangeDecoder

TRUNCATE: Final = "t"
"""``Change.what`` of a truncate."""

Decoded = Change | UndecodableError


class Part(NamedTuple):
    """A segment, and where its records are in the batch.

    Attributes:
        segment: What is to be applied.
        start: The first of its records.
        stop: Behind the last one.
    """

    segment: Segment
    start: int
    stop: int


def decode(decoder: ChangeDecoder, messages: Sequence[Message]) -> list[Decoded]:
    """Decode records; each gives its change, or the error that refuses it."""
    decoded: list[Decoded] = []
    for message in messages:
        try:
            decoded.append(decoder.decode(message.key(), message.value()))
        except UndecodableError as error:
            decoded.append(error)
    return decoded


@dataclass(slots=True)
class Batch:
    """Records in the order in which they are applied.

    Attributes:
        messages: The records.
        changes: What each is, or why it can't be decoded.
        seen: How many there are of each kind, ``Change.what``; those that can't be decoded are left out.
        keys: The keys that are changed.
        size: Bytes of the values.
        offsets: Where to go on in each partition once the batch is applied.
        firsts: The first record of each partition.
        left_out: Places of the records that are not applied, since their users were repaired from a later place.
    """

    messages: list[Message] = field(default_factory=list)
    changes: list[Decoded] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    keys: set[str | None] = field(default_factory=set)
    size: int = 0
    offsets: dict[int, int] = field(default_factory=dict)
    firsts: dict[int, Message] = field(default_factory=dict)
    left_out: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.messages)

    def add(self, messages: Sequence[Message], changes: Sequence[Decoded]) -> None:
        """Append records, each partition's in the order of its offsets."""
        self.messages += messages
        self.changes += changes
        good = [change for change in changes if type(change) is Change]
        self.seen.update([change.what for change in good])
        self.keys.update([change.key for change in good])
        self.size += sum([len(message) for message in messages])
        last = {message.partition(): message.offset() for message in messages}
        first = {message.partition(): message for message in reversed(messages)}
        for partition, offset in last.items():
            if partition is None or offset is None:
                raise AssertionError("what was consumed has a place")
            self.offsets[partition] = offset + 1
            self.firsts.setdefault(partition, first[partition])

    @property
    def begins(self) -> dict[int, int]:
        """Where each partition begins in the batch."""
        return {partition: first.offset() or 0 for partition, first in self.firsts.items()}

    def without(self, partitions: Collection[int]) -> Batch:
        """Return a batch of the records of all other partitions."""
        kept = [at for at, message in enumerate(self.messages) if message.partition() not in partitions]
        rest = Batch()
        rest.add([self.messages[at] for at in kept], [self.changes[at] for at in kept])
        return rest

    def first_truncate(self) -> int | None:
        """Return which record is the first truncate, None where there is none."""
        if TRUNCATE not in self.seen:
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
        if TRUNCATE in self.seen:
            starts += [at for at, change in enumerate(self.changes) if at and _is_truncate(change)]
        parts = []
        for start, stop in zip(starts, [*starts[1:], len(self.changes)], strict=True):
            segments = coalesce([change for _, change in self._applicable(start, stop)])
            parts += [Part(segment, start, stop) for segment in segments]
        return parts

    def undecodable(self) -> list[tuple[Message, UndecodableError]]:
        """Return the records that can't be decoded, and why."""
        if self.seen.total() == len(self.changes):
            return []
        pairs = zip(self.messages, self.changes, strict=True)
        return [(message, error) for message, error in pairs if isinstance(error, UndecodableError)]

    def kinds(self, places: Collection[int]) -> list[str]:
        """Return ``Change.what`` of the changes at some places."""
        return [change.what for at in places if isinstance(change := self.changes[at], Change)]

    def history(self, part: Part, key: str) -> Iterator[tuple[Message, Change]]:
        """Yield the records of one key in a part, in order."""
        for at, change in self._applicable(part.start, part.stop):
            if change.key == key:
                yield self.messages[at], change

    def _applicable(self, start: int, stop: int) -> Iterator[tuple[int, Change]]:
        """Yield the changes of a part that are to be applied, with their places."""
        for at, change in enumerate(self.changes[start:stop], start):
            if type(change) is Change and at not in self.left_out:
                yield at, change


def _is_truncate(change: Decoded) -> bool:
    return type(change) is Change and change.what == TRUNCATE
