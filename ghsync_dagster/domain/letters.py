"""Dead letters as their index keeps them: the states, and which records supersede a letter.

Belongs here: pure decisions. Not here: the records themselves, and where letters are stored.

A letter means that one change of one user is not in the collection. It no longer matters once a newer record wrote the
whole state of its user, or once the table was truncated after it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from ghsync_dagster.domain.change import Change, Op
from ghsync_dagster.domain.user import USER_FIELDS


class LetterState(StrEnum):
    """Whether a dead letter still needs an action."""

    OPEN = "open"
    """The change is missing."""

    RESOLVED = "resolved"
    """A newer record of its user was applied, or its user was repaired."""

    CLOSED = "closed"
    """A person closed it."""


class Letter(NamedTuple):
    """The entry of one dead letter in the index.

    Attributes:
        topic: The topic of its record.
        partition: The partition of its record.
        offset: The offset of its record.
        timestamp_ms: The Kafka timestamp of its record, in ms since 1970 UTC; None where it had none.
        user: The user_id that its record names, None where it names none or two.
        kind: The slug of the reason.
        text: The reason in words, short.
        failed_at: When it was refused, ISO 8601 in UTC.
        place: Partition and offset of the letter itself in the topic of dead letters.
        state: Whether it is open.
        reason: Why it is not open any more.
        at: When it was resolved or closed, ISO 8601 in UTC; empty where it is open.
    """

    topic: str
    partition: int
    offset: int
    timestamp_ms: int | None
    user: str | None
    kind: str
    text: str
    failed_at: str
    place: tuple[int, int]
    state: LetterState = LetterState.OPEN
    reason: str = ""
    at: str = ""

    @property
    def id(self) -> str:
        """The name of the letter and its record."""
        return letter_id(self.topic, self.partition, self.offset)


def letter_id(topic: str, partition: int, offset: int) -> str:
    """Return the id of the letter of a record."""
    return f"{topic}-{partition}-{offset}"


class Mark(NamedTuple):
    """A record that was applied.

    Attributes:
        offset: Its offset; for a record of another partition, the offset of the first record after it.
        timestamp_ms: Its Kafka timestamp in ms since 1970 UTC, None where it has none.
    """

    offset: int
    timestamp_ms: int | None

    def is_after(self, letter: Letter) -> bool:
        """Return whether it came after a letter of its partition.

        Timestamps count too, since the topic may have been recreated, or copied from another one.
        """
        if self.offset <= letter.offset:
            return False
        return self.timestamp_ms is None or letter.timestamp_ms is None or self.timestamp_ms >= letter.timestamp_ms


@dataclass(slots=True)
class Applied:
    """What was applied of a topic, as far as it may supersede letters.

    Attributes:
        topic: The topic.
        newest: The newest record of each user and partition that holds the user's whole state.
        truncates: The newest truncate, by partition.
    """

    topic: str
    newest: dict[tuple[str, int], Mark] = field(default_factory=dict)
    truncates: dict[int, Mark] = field(default_factory=dict)

    def add(self, change: Change, partition: int, mark: Mark) -> None:
        """Add a record, later ones of a partition after earlier ones."""
        if change.op is Op.TRUNCATE:
            self.truncates[partition] = mark
        elif change.key is not None and _holds_whole_state(change):
            self.newest[change.key, partition] = mark

    def supersedes(self, letter: Letter) -> str | None:
        """Return why a letter no longer matters; None where nothing that was applied supersedes it."""
        if letter.topic != self.topic:
            return None
        truncate = self.truncates.get(letter.partition)
        if truncate is not None and truncate.is_after(letter):
            return f"a later truncate was applied (offset {truncate.offset})"
        newer = None if letter.user is None else self.newest.get((letter.user, letter.partition))
        if newer is not None and newer.is_after(letter):
            return f"a newer record of its user was applied (offset {newer.offset})"
        return None


def _holds_whole_state(change: Change) -> bool:
    # An update without some fields keeps what is stored of them, which may be what the letter was to change.
    return change.op is Op.DELETE or (change.user is not None and len(change.user) == len(USER_FIELDS))
