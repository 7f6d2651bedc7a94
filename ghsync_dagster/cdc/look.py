"""Look: what the topic of changes holds that is newer than a dead letter, or may be.

Belongs here: reading the topic beside the group, and noting what bears on the letters. Not here: what it means for a
letter, which ``domain.replay`` judges.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Final

from ghsync_dagster.cdc.backlog import read_backlog
from ghsync_dagster.domain.change import Op, Position
from ghsync_dagster.domain.envelope import ChangeDecoder
from ghsync_dagster.domain.errors import UndecodableError
from ghsync_dagster.domain.replay import Seen, Sighting, Stretch

if TYPE_CHECKING:
    from confluent_kafka import Message

    from ghsync_dagster.cdc.dead_letters import DeadLetter
    from ghsync_dagster.stores.kafka import KafkaSettings

_READ: Final = 20_000
"""How many records are read at once."""


def user_of_key(decoder: ChangeDecoder, key: bytes | None) -> str | None:
    """Return the user that a record's key names, None where it names none."""
    try:
        # A tombstone is decoded by its key alone.
        return decoder.decode(key, None).key
    except UndecodableError:
        return None


class TopicLook:
    """What the topic holds that bears on some letters, read on and on to where it ends.

    Args:
        kafka: Topic, group, and the way to the brokers.
        letters: The letters that may be applied.
        keys: Their users.
        dead: The places of all records that are dead letters, partition and offset.
    """

    def __init__(
        self,
        kafka: KafkaSettings,
        letters: Iterable[DeadLetter],
        keys: Collection[str],
        dead: Collection[tuple[int, int]],
    ) -> None:
        self.stretches: dict[int, Stretch] = {}
        self.intact: set[tuple[int, int]] = set()
        """The places of letters whose records the topic still holds, as they are."""
        self._kafka = kafka
        self._dead = dead
        self._letters = {(letter.partition, letter.offset): letter for letter in letters}
        self._keys = keys
        self._decoder = ChangeDecoder()
        self._nexts: dict[int, int] = {}
        self._by_key: dict[str, dict[int, Sighting]] = {}
        self._unread: dict[str, dict[int, Sighting]] = {}
        self._of_all: dict[tuple[Seen, int], Sighting] = {}

    def sightings(self, key: str) -> list[Sighting]:
        """Return what bears on a user: of each partition the last change, truncate and record that can't be read."""
        of_user = [*self._by_key.get(key, {}).values(), *self._unread.get(key, {}).values()]
        return [*of_user, *self._of_all.values()]

    def go_on(self) -> None:
        """Read from where the last look ended to where the topic ends now.

        Raises:
            UnavailableError: No broker can be reached.
            RefusedError: The credentials or rights are refused.
        """
        if not self._letters:
            return
        backlog = read_backlog(self._kafka)
        for found in backlog.partitions:
            known = self.stretches.get(found.partition, Stretch(found.low, None))
            self.stretches[found.partition] = known._replace(low=found.low, committed=found.committed)
        alone = len(backlog.partitions) == 1
        for found in backlog.partitions:
            first = min((offset for _, offset in self._letters), default=found.low) if alone else found.low
            start = self._nexts.get(found.partition, max(first, found.low))
            for at in range(start, found.end, _READ):
                self._read(found.partition, at, min(at + _READ, found.end))

    def _read(self, partition: int, start: int, stop: int) -> None:
        from ghsync_dagster.stores.kafka_topics import read_range

        awaited = start
        for message in read_range(self._kafka, partition, start, stop):
            offset = message.offset() or 0
            if offset > awaited:
                self._note_gap(partition, offset - 1)
            awaited = offset + 1
            self._see(partition, offset, message)
        if stop > awaited:
            self._note_gap(partition, stop - 1)
        self._nexts[partition] = stop

    def _note_gap(self, partition: int, offset: int) -> None:
        self.stretches[partition] = self.stretches[partition]._replace(last_gap=offset, first=None)

    def _see(self, partition: int, offset: int, message: Message) -> None:
        letter = self._letters.get((partition, offset))
        if letter is not None and (letter.key, letter.value) == (message.key(), message.value()):
            self.intact.add((partition, offset))
        dead = (partition, offset) in self._dead
        try:
            change = self._decoder.decode(_raw(message.key()), _raw(message.value()))
        except UndecodableError:
            if not dead:
                self._see_unread(Sighting(Seen.UNREAD, partition, offset), _raw(message.key()))
            return
        self._note_first(partition, change.position)
        if change.op is Op.TRUNCATE:
            self._of_all[Seen.TRUNCATE, partition] = Sighting(Seen.TRUNCATE, partition, offset, change.position)
        elif change.key in self._keys:
            sighting = Sighting(Seen.CHANGE, partition, offset, change.position, letter=dead)
            self._by_key.setdefault(change.key or "", {})[partition] = sighting

    def _see_unread(self, sighting: Sighting, key: bytes | None) -> None:
        user = user_of_key(self._decoder, key)
        if user is None:
            self._of_all[sighting.seen, sighting.partition] = sighting
        elif user in self._keys:
            self._unread.setdefault(user, {})[sighting.partition] = sighting

    def _note_first(self, partition: int, position: Position | None) -> None:
        stretch = self.stretches[partition]
        if stretch.first is None and position is not None:
            self.stretches[partition] = stretch._replace(first=position)


def _raw(value: str | bytes | None) -> bytes | None:
    return value.encode() if isinstance(value, str) else value
