"""The index of dead letters, kept in sync with their topic.

Belongs here: adding to the index what only the topic holds, and finding letters. Not here: settling them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ghsync_dagster.cdc.dead_letters.record import DeadLetter, parse
from ghsync_dagster.domain.envelope import ChangeDecoder, Refusal
from ghsync_dagster.domain.errors import ConfigError, GhsyncError, UndecodableError
from ghsync_dagster.domain.letters import Letter, LetterState
from ghsync_dagster.logging import get_logger

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterable

    from ghsync_dagster.stores.kafka.client import KafkaSettings
    from ghsync_dagster.stores.mongo.letters import LetterIndex
    from ghsync_dagster.stores.mongo.users import UserStore

_INDEX_TEXT: Final = 200
"""Characters of the reason that the index keeps."""

_OF_TWO_USERS: Final = frozenset({Refusal.KEY_MISMATCH.kind, Refusal.KEY_CHANGED.kind})
"""Kinds of records that name two users, of which either may be wrong in the collection."""

_SHOWN_OLDEST: Final = 20

_SHOWN_NEWEST: Final = 50

log = get_logger("dead_letters")


def catch_up(kafka: KafkaSettings, index: LetterIndex) -> bool:
    """Add to the index what only the topic of dead letters holds, and remove what the topic no longer holds.

    Reads on from the offsets where the last call ended. Letters that are new to the index are open. Safe to run in
    several processes at once.

    Args:
        kafka: The topic of changes and the way to the brokers.
        index: The index of that topic's dead letters.

    Returns:
        Whether there is a topic of dead letters.

    Raises:
        UnavailableError: Kafka or MongoDB can't be reached.
        RefusedError: Credentials or rights are refused.
    """
    from ghsync_dagster.stores.kafka.topics import TopicIds, ranges_of, read_ranges
    from ghsync_dagster.stores.mongo.letters import Indexed

    topic = kafka.dead_letter_topic
    ranges = ranges_of(kafka, topic)
    if not ranges:
        return False
    ids = TopicIds(kafka)
    topic_id = ids.of(topic)
    ids.close()
    known = index.indexed()
    if known is None:
        index.ensure()
        known = Indexed(topic_id, {}, {})
    elif known.topic_id != topic_id or any(at > ranges.get(number, (0, 0))[1] for number, at in known.ends.items()):
        log.warning("dead-letter topic recreated", topic=topic, open_letters_gone=index.remove())
        known = Indexed(topic_id, {}, {})
    for partition, (low, _) in ranges.items():
        if low > known.lows.get(partition, 0) and (gone := index.remove(partition, before=low)):
            log.warning("open dead letters gone from their topic", topic=topic, letters=gone)
    starts = {partition: max(low, known.ends.get(partition, low)) for partition, (low, _) in ranges.items()}
    unread = {partition: (start, ranges[partition][1]) for partition, start in starts.items()}
    decoder = ChangeDecoder()
    found = (parse(message) for message in read_ranges(kafka, topic, unread))
    index.add_found(
        indexed_letter(letter, decoder) for letter in found if letter is not None and letter.topic == kafka.topic
    )
    now = Indexed(
        topic_id,
        {partition: low for partition, (low, _) in ranges.items()},
        {partition: end for partition, (_, end) in ranges.items()},
    )
    if now != known:
        index.keep_indexed(now)
    return True


def user_of(decoder: ChangeDecoder, key: bytes | None, value: bytes | None, kind: str) -> str | None:
    """Return the user that a refused record is about, None where it names none or two.

    Args:
        decoder: Decodes.
        key: The record's key.
        value: The record's value.
        kind: Why it was refused.
    """
    if kind in _OF_TWO_USERS:
        return None
    # A tombstone is decoded by its key alone.
    by_key = _user(decoder, key, None)
    return by_key if by_key is not None else _user(decoder, key, value)


def _user(decoder: ChangeDecoder, key: bytes | None, value: bytes | None) -> str | None:
    try:
        return decoder.decode(key, value).key
    except UndecodableError:
        return None


def indexed_letter(letter: DeadLetter, decoder: ChangeDecoder) -> Letter:
    """Return what the index keeps of a letter that is written."""
    if letter.place is None:
        raise AssertionError("a letter is written before it is indexed")
    return Letter(
        topic=letter.topic,
        partition=letter.partition,
        offset=letter.offset,
        timestamp_ms=letter.timestamp_ms,
        user=user_of(decoder, letter.key, letter.value, letter.kind),
        kind=letter.kind,
        text=letter.text[:_INDEX_TEXT],
        failed_at=letter.failed_at,
        place=letter.place,
    )


@dataclass(frozen=True, slots=True)
class OpenLetters:
    """The open dead letters.

    Attributes:
        kinds: How many there are, by kind.
        oldest: A few of them, oldest first.
        newest: Some of them, newest first.
    """

    kinds: Counter[str]
    oldest: list[Letter]
    newest: list[Letter]


def caught_up_index(kafka: KafkaSettings, store: UserStore) -> LetterIndex:
    """Return the index, with all that the topic of dead letters holds now.

    Raises:
        UnavailableError: Kafka or MongoDB can't be reached.
        RefusedError: Credentials or rights are refused.
    """
    from ghsync_dagster.stores.mongo.letters import LetterIndex

    index = LetterIndex(store, kafka.topic)
    catch_up(kafka, index)
    return index


def users_with_letters(kafka: KafkaSettings, store: UserStore) -> set[str]:
    """Return the users that have open letters, to name a cause; none where the letters can't be read."""
    try:
        found = caught_up_index(kafka, store).open_users()
    except GhsyncError as error:
        log.warning("dead letters not read", reason=error.message)
        return set()
    return {user for user in found if user is not None}


def open_letters(kafka: KafkaSettings, store: UserStore) -> OpenLetters:
    """Return the open dead letters: all counted, some shown.

    Raises:
        UnavailableError: Kafka or MongoDB can't be reached.
        RefusedError: Credentials or rights are refused.
    """
    index = caught_up_index(kafka, store)
    return OpenLetters(
        index.open_by_kind(),
        list(index.find(state=LetterState.OPEN, limit=_SHOWN_OLDEST)),
        list(index.find(state=LetterState.OPEN, limit=_SHOWN_NEWEST, newest=True)),
    )


def letters_by_id(index: LetterIndex, ids: Iterable[str]) -> list[Letter]:
    """Return letters in the order of their ids; each counts once.

    Raises:
        ConfigError: There is none with one of the ids.
    """
    wanted = dict.fromkeys(ids)
    found = index.by_id(wanted)
    if missing := wanted.keys() - found.keys():
        raise no_such_letter(missing)
    return [found[name] for name in wanted]


def no_such_letter(missing: Iterable[str]) -> ConfigError:
    """Return the error of ids that no dead letter has."""
    return ConfigError(f"There is no dead letter {', '.join(sorted(missing))}.", way_out="See: ghsync dlq list.")
