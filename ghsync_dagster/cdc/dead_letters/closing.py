"""Closing dead letters that no longer matter.

Belongs here: letters that a person closes, and those that the topic of changes shows to be superseded. Not here: what
supersedes a letter (``domain.letters``), and what a consumer resolves by itself (``cdc.stream.letters``).
"""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Final

from ghsync_dagster.cdc.dead_letters.record import as_bytes
from ghsync_dagster.domain.change import RecordKind
from ghsync_dagster.domain.envelope import ChangeDecoder
from ghsync_dagster.domain.errors import UndecodableError
from ghsync_dagster.domain.letters import Applied, Letter, LetterState, Mark

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ghsync_dagster.stores.kafka.client import KafkaSettings
    from ghsync_dagster.stores.mongo.books import GroupBook
    from ghsync_dagster.stores.mongo.letters import LetterIndex
    from ghsync_dagster.stores.mongo.users import UserStore

_PAGE: Final = 50_000
"""How many open letters are checked in one pass over the topic of changes."""


def close_letters(index: LetterIndex, letters: Iterable[Letter], reason: str) -> Iterator[Letter]:
    """Close open letters and yield them, some at a time."""
    yield from _closed(index, ((letter, reason) for letter in letters if letter.state is LetterState.OPEN))


def close_superseded(kafka: KafkaSettings, store: UserStore, index: LetterIndex) -> Iterator[Letter]:
    """Close the open letters that no longer matter, and yield them.

    A letter no longer matters if a newer record of its user, or a later truncate, is in the topic of changes before the
    group's committed offset, and is no dead letter. The topic is read from the lowest open letter on, once for each
    ``_PAGE`` of open letters.

    Raises:
        UnavailableError: Kafka or MongoDB can't be reached.
        RefusedError: Credentials or rights are refused.
    """
    after: tuple[int, int] | None = None
    while page := list(islice(index.find(state=LetterState.OPEN, after=after), _PAGE)):
        after = page[-1].place
        applied = _applied_after(kafka, store, index, page)
        reasons = ((letter, applied.supersedes(letter)) for letter in page)
        yield from _closed(index, ((letter, reason) for letter, reason in reasons if reason is not None))


def _closed(index: LetterIndex, letters: Iterable[tuple[Letter, str]]) -> Iterator[Letter]:
    from ghsync_dagster.chunks import chunks

    for part in chunks(letters):
        at = datetime.now(UTC).isoformat()
        closed = [letter._replace(state=LetterState.CLOSED, reason=reason, at=at) for letter, reason in part]
        if index.settle(part, LetterState.CLOSED, at=at) < len(closed):
            # Other processes settled some first, or their records were refused again.
            now = index.by_id(letter.id for letter in closed)
            closed = [letter for letter in closed if now.get(letter.id) == letter]
        yield from closed


def _applied_after(kafka: KafkaSettings, store: UserStore, index: LetterIndex, letters: list[Letter]) -> Applied:
    """Return what the group has applied since the first of some letters, as far as it concerns their users."""
    from ghsync_dagster.stores.kafka.backlog import read_backlog
    from ghsync_dagster.stores.kafka.topics import location, read_ranges, timestamp_ms
    from ghsync_dagster.stores.mongo.books import GroupBook

    starts: dict[int, int] = {}
    for letter in letters:
        starts[letter.partition] = min(starts.get(letter.partition, letter.offset), letter.offset)
    ranges = {
        found.partition: (max(found.low, starts[found.partition]), found.committed)
        for found in read_backlog(kafka).partitions
        if found.partition in starts and found.committed is not None and not found.is_recreated
    }
    users = {letter.user for letter in letters if letter.user is not None}
    dead = {(letter.partition, letter.offset) for letter in index.of_users(users) if letter.topic == kafka.topic}
    applied, decoder = Applied(kafka.topic), ChangeDecoder()
    for message in read_ranges(kafka, kafka.topic, ranges):
        if location(message) in dead:
            continue
        try:
            change = decoder.decode(as_bytes(message.key()), as_bytes(message.value()))
        except UndecodableError:
            continue
        if change.key in users or change.kind is RecordKind.TRUNCATE:
            partition, offset = location(message)
            applied.add(change, partition, Mark(offset, timestamp_ms(message)))
    add_other_partitions(applied, GroupBook(store), kafka.group_name)
    return applied


def add_other_partitions(applied: Applied, book: GroupBook, group: str) -> None:
    """Add the offsets of the last truncate that was applied in the other partitions."""
    if not applied.truncates:
        return
    last = book.last_truncate(group)
    mark = None if last is None else applied.truncates.get(last.partition)
    if last is None or mark is None or mark.offset != last.offset:
        return
    for partition, stop in last.stops.items():
        if partition != last.partition and stop > applied.truncates.get(partition, Mark(0, None)).offset:
            applied.truncates[partition] = Mark(stop, mark.timestamp_ms)
