"""Dead letters as a consumer writes them, and resolves those that its batches supersede.

Belongs here: the order of writing. Not here: what a letter holds (``cdc.dead_letters``), and what supersedes one
(``domain.letters``).

The order is: the users are written, the letters of the batch go to their topic, then to the index in MongoDB. Then
letters that the batch supersedes are resolved, and offsets are committed. If the process dies in between, the records
are delivered again, and all of it is done again. ``catch_up`` adds to the index what only the topic holds, such as
letters of an older build.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ghsync_dagster.cdc.dead_letters.closing import add_other_partitions
from ghsync_dagster.cdc.dead_letters.index import catch_up, indexed_letter, user_of
from ghsync_dagster.domain.change import Change, RecordKind
from ghsync_dagster.domain.envelope import ChangeDecoder
from ghsync_dagster.domain.errors import GhsyncError, PermanentError
from ghsync_dagster.domain.letters import Applied, LetterState, Mark
from ghsync_dagster.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ghsync_dagster.cdc.dead_letters.record import DeadLetter
    from ghsync_dagster.cdc.stream.batch import Batch
    from ghsync_dagster.stores.kafka.client import KafkaSettings
    from ghsync_dagster.stores.mongo.users import UserStore

log = get_logger("dead_letters")


class DeadLetters:
    """Writes the dead letters of a consumer, and resolves those that its batches supersede.

    Only one thread at a time uses it, but for ``reload``.

    Args:
        kafka: The topic of changes, the group and the way to the brokers.
        store: Where the index is; its owner closes it.
    """

    def __init__(self, kafka: KafkaSettings, store: UserStore) -> None:
        from ghsync_dagster.stores.kafka.topics import RecordWriter
        from ghsync_dagster.stores.mongo.books import GroupBook
        from ghsync_dagster.stores.mongo.letters import LetterIndex

        self._kafka = kafka
        self._writer = RecordWriter(kafka, kafka.dead_letter_topic)
        self._index = LetterIndex(store, kafka.topic)
        self._book = GroupBook(store)
        self._decoder = ChangeDecoder()
        self._users: set[str | None] = set()
        """The users that have open letters; None among them where a letter names no user."""
        self._to_load = True
        self._has_begun = False

    def begin(self) -> None:
        """Add to the index what only the topic of dead letters holds; log where that can't be done."""
        try:
            self._has_begun = catch_up(self._kafka, self._index)
        except GhsyncError as error:
            # Nothing is lost: listing the letters catches up. A consumer may have no right to read them.
            self._has_begun = isinstance(error, PermanentError)
            log.warning("earlier dead letters not read", reason=error.message)

    def reload(self) -> None:
        """Have the users with open letters read again, since partitions came. Any thread may call this."""
        self._to_load = True

    def write(self, letters: Iterable[DeadLetter]) -> list[DeadLetter]:
        """Write dead letters to their topic, except those that have an offset there.

        Returns:
            All of them, with their partitions and offsets, once all replicas in sync have them.

        Raises:
            UnavailableError: Some may not be written: write all of them again.
            RefusedError: Rights are missing, or a record is too large for the topic.
        """
        letters = list(letters)
        new = [letter for letter in letters if letter.place is None]
        places = iter(self._writer.write(letter.as_record() for letter in new))
        return [letter if letter.place is not None else replace(letter, place=next(places)) for letter in letters]

    def settle(self, batch: Batch, refused: Sequence[DeadLetter]) -> None:
        """Add a batch's letters to the index, and resolve those that it supersedes; call it once all are written.

        Args:
            batch: What was applied.
            refused: The letters of its records that were refused, with their own partitions and offsets.

        Raises:
            UnavailableError: The store is away: call it again.
        """
        if refused:
            self._add(refused)
        if self._to_load:
            self._to_load = False
            try:
                self._users |= self._index.open_users()
            except GhsyncError:
                self._to_load = True
                raise
        truncated = RecordKind.TRUNCATE in batch.kinds
        users = {key for key in self._users & batch.keys if key is not None}
        if self._users and (users or truncated):
            self._resolve(self._applied(batch, users, refused), users, truncated=truncated)

    def resolve_repaired(self, keys: Iterable[str]) -> None:
        """Resolve the letters of users that were repaired.

        Raises:
            UnavailableError: The store is away: call it again.
        """
        # Other consumers may have added letters, so the index counts and not the users that this one knows.
        if any(self._index.find(state=LetterState.OPEN, limit=1)):
            self._index.resolve_repaired(keys, "its user was repaired")

    def user_of(self, letter: DeadLetter) -> str | None:
        """Return the user that a refused record is about, None where it names none or two."""
        return user_of(self._decoder, letter.key, letter.value, letter.kind)

    def _add(self, letters: Iterable[DeadLetter]) -> None:
        if not self._has_begun:
            # The topic is there only now, and may have been recreated.
            self.begin()
        indexed = [indexed_letter(letter, self._decoder) for letter in letters]
        self._index.add_refused(indexed)
        self._users.update(letter.user for letter in indexed)

    def _resolve(self, applied: Applied, users: set[str], *, truncated: bool) -> None:
        found = self._index.find(state=LetterState.OPEN) if truncated else self._index.open_of(users)
        resolved = ((letter, reason) for letter in found if (reason := applied.supersedes(letter)) is not None)
        if count := self._index.settle(resolved, LetterState.RESOLVED):
            log.info("dead letters superseded", letters=count)
        if truncated:
            self._users = self._index.open_users()
        else:
            self._users -= users - {letter.user for letter in self._index.open_of(users)}

    def _applied(self, batch: Batch, users: set[str], refused: Iterable[DeadLetter]) -> Applied:
        from ghsync_dagster.stores.kafka.topics import location, timestamp_ms

        dead = {(letter.partition, letter.offset) for letter in refused}
        applied = Applied(self._kafka.topic)
        for message, change in zip(batch.messages, batch.changes, strict=True):
            if type(change) is not Change or not (change.key in users or change.kind is RecordKind.TRUNCATE):
                continue
            partition, offset = location(message)
            if (partition, offset) not in dead:
                applied.add(change, partition, Mark(offset, timestamp_ms(message)))
        add_other_partitions(applied, self._book, self._kafka.group_name)
        return applied

    def close(self) -> None:
        """Drop the connection."""
        self._writer.close()
