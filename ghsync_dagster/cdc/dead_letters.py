"""Dead letters: records that can't be applied, kept whole in a topic of their own, with the reason, and their index.

Belongs here: what a dead letter holds; writing, finding and settling them. Not here: which record becomes one, and
what supersedes one (``domain.letters``).

Key, value and headers are the record's own bytes; ours are further headers, all text in UTF-8, named ``ghsync.*``.
A record may be written twice, when a consumer dies before its offsets are committed: ``ghsync.id`` is the same then.

The order is: the users are written, the letters of the batch go to their topic, then to the index in MongoDB, then
letters that the batch supersedes are resolved, then offsets are committed. Whoever dies in between has the records
delivered again, and all of it is done again. What only the topic holds, such as letters of an older build, is added to
the index by ``catch_up``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from ghsync_dagster.cdc.batch import TRUNCATE
from ghsync_dagster.cdc.known_topic import group_name
from ghsync_dagster.domain.change import Change
from ghsync_dagster.domain.envelope import ChangeDecoder, Refusal
from ghsync_dagster.domain.errors import ConfigError, GhsyncError, PermanentError, UndecodableError
from ghsync_dagster.domain.letters import Applied, Letter, LetterState, Mark, letter_id
from ghsync_dagster.observability.logging import get_logger, redact

if TYPE_CHECKING:
    from confluent_kafka import Message

    from ghsync_dagster.cdc.batch import Batch
    from ghsync_dagster.stores.dead_letters import LetterIndex
    from ghsync_dagster.stores.kafka import KafkaSettings
    from ghsync_dagster.stores.kafka_topics import Headers
    from ghsync_dagster.stores.mongo import UserStore
    from ghsync_dagster.stores.stream import StreamStore

_OURS: Final = "ghsync."
_TEXT_LIMIT: Final = 1_000
"""Characters of the reason that are kept: the record itself is there to look at."""
_INDEX_TEXT: Final = 200
"""Characters of the reason that the index keeps."""
_OF_TWO_USERS: Final = frozenset({Refusal.KEY_MISMATCH.kind, Refusal.KEY_CHANGED.kind})
"""Kinds of records that name two users, of which either may be wrong now."""
_PAGE: Final = 50_000
"""How many open letters one reading of the topic of changes looks for."""
_SHOWN_OLDEST: Final = 20
_SHOWN_NEWEST: Final = 50

log = get_logger("dead_letters")


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record that could not be applied, and why.

    Attributes:
        topic: The topic that it came from.
        partition: Its partition there.
        offset: Its offset there.
        timestamp_ms: Its Kafka timestamp in milliseconds since 1970 UTC, None where it had none.
        key: Its key.
        value: Its value.
        headers: Its headers.
        kind: The slug of the reason.
        text: The reason in words.
        failed_at: When it was refused, ISO 8601 in UTC.
        place: Partition and offset of the dead letter itself; None before it is written.
    """

    topic: str
    partition: int
    offset: int
    timestamp_ms: int | None
    key: bytes | None
    value: bytes | None
    headers: Headers
    kind: str
    text: str
    failed_at: str
    place: tuple[int, int] | None = None

    @property
    def id(self) -> str:
        """What names the record: its topic, partition and offset."""
        return letter_id(self.topic, self.partition, self.offset)

    def as_record(self) -> tuple[bytes | None, bytes | None, Headers]:
        """Return key, value and headers as they are written."""
        ours = {
            "topic": self.topic,
            "partition": str(self.partition),
            "offset": str(self.offset),
            "timestamp": "" if self.timestamp_ms is None else str(self.timestamp_ms),
            "error.kind": self.kind,
            "error.text": self.text,
            "failed_at": self.failed_at,
            "id": self.id,
        }
        named: Headers = [(f"{_OURS}{name}", text.encode(errors="replace")) for name, text in ours.items()]
        return self.key, self.value, [*self.headers, *named]

    def as_json(self, *, whole: bool = False) -> dict[str, Any]:
        """Return it for a program to read: what is no UTF-8 shows as escapes; the record itself only if ``whole``."""
        fields: dict[str, Any] = {
            "id": self.id,
            "topic": self.topic,
            "partition": self.partition,
            "offset": self.offset,
            "timestamp_ms": self.timestamp_ms,
            "kind": self.kind,
            "text": self.text,
            "failed_at": self.failed_at,
            "key": _shown(self.key),
        }
        if whole:
            fields |= {"value": _shown(self.value), "headers": [[name, _shown(value)] for name, value in self.headers]}
        return fields


def dead_letter(message: Message, kind: str, text: str) -> DeadLetter:
    """Return the dead letter of a record that was refused.

    Args:
        message: The record.
        kind: The slug of the reason.
        text: The reason in words.
    """
    from ghsync_dagster.stores.kafka_topics import place, timestamp_ms

    partition, offset = place(message)
    return DeadLetter(
        topic=str(message.topic()),
        partition=partition,
        offset=offset,
        timestamp_ms=timestamp_ms(message),
        key=_bytes(message.key()),
        value=_bytes(message.value()),
        headers=_headers(message),
        kind=kind,
        text=redact(text)[:_TEXT_LIMIT],
        failed_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
    )


def parse(message: Message) -> DeadLetter | None:
    """Return the dead letter that a record of the dead-letter topic is; None where it is none of ours."""
    from ghsync_dagster.stores.kafka_topics import place

    headers = _headers(message)
    # Ours are the last ones: a record that was a dead letter before brought those of that time.
    first = max((at for at, (name, _) in enumerate(headers) if name == f"{_OURS}topic"), default=len(headers))
    ours = {name.removeprefix(_OURS): _text(value) for name, value in headers[first:]}
    try:
        return DeadLetter(
            topic=ours["topic"],
            partition=int(ours["partition"]),
            offset=int(ours["offset"]),
            timestamp_ms=int(ours["timestamp"]) if ours["timestamp"] else None,
            key=_bytes(message.key()),
            value=_bytes(message.value()),
            headers=headers[:first],
            kind=ours["error.kind"],
            text=ours["error.text"],
            failed_at=ours["failed_at"],
            place=place(message),
        )
    except (KeyError, ValueError):
        return None


class DeadLetters:
    """What a consumer does with dead letters: it writes its own, and resolves those that its batches supersede.

    Only one thread at a time uses it, but for ``reload``.

    Args:
        kafka: The topic of changes, the group and the way to the brokers.
        store: Where the index is; its owner closes it.
    """

    def __init__(self, kafka: KafkaSettings, store: UserStore) -> None:
        from ghsync_dagster.stores.dead_letters import LetterIndex
        from ghsync_dagster.stores.kafka_topics import RecordWriter
        from ghsync_dagster.stores.stream import StreamStore

        self._kafka = kafka
        self._writer = RecordWriter(kafka, kafka.dead_letter_topic)
        self._index = LetterIndex(store, kafka.topic)
        self._stream = StreamStore(store)
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
            # Nothing is lost: whoever lists the letters catches up. A consumer may have no right to read them.
            self._has_begun = isinstance(error, PermanentError)
            log.warning("dead letters of before can't be read", reason=error.message)

    def reload(self) -> None:
        """Have the users with open letters read again, since partitions came. Any thread may call this."""
        self._to_load = True

    def write(self, letters: Iterable[DeadLetter]) -> list[DeadLetter]:
        """Write dead letters to their topic, but for those that have a place there.

        Returns:
            All of them, with their places, once all replicas in sync have them.

        Raises:
            UnavailableError: Not all are sure to be written: write all of them again.
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
            refused: The letters of those of its records that were not, with their places.

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
        truncated = TRUNCATE in batch.seen
        users = {key for key in self._users & batch.keys if key is not None}
        if self._users and (users or truncated):
            self._resolve(self._applied(batch, users, refused), users, truncated=truncated)

    def resolve_repaired(self, keys: Iterable[str]) -> None:
        """Resolve the letters of users that were repaired.

        Raises:
            UnavailableError: The store is away: call it again.
        """
        # Others may have added letters of before, so that the index is asked and not this consumer's memory.
        if any(self._index.find(state=LetterState.OPEN, limit=1)):
            self._index.resolve_repaired(keys, "its user was repaired")

    def user_of(self, letter: DeadLetter) -> str | None:
        """Return the user that a refused record is about, None where it names none or two."""
        return user_of(self._decoder, letter.key, letter.value, letter.kind)

    def _add(self, letters: Iterable[DeadLetter]) -> None:
        if not self._has_begun:
            # The topic is there only now, and may have been recreated.
            self.begin()
        indexed = [_indexed(letter, self._decoder) for letter in letters]
        self._index.add_refused(indexed)
        self._users.update(letter.user for letter in indexed)

    def _resolve(self, applied: Applied, users: set[str], *, truncated: bool) -> None:
        found = self._index.find(state=LetterState.OPEN) if truncated else self._index.open_of(users)
        resolved = ((letter, reason) for letter in found if (reason := applied.supersedes(letter)) is not None)
        if count := self._index.settle(resolved, LetterState.RESOLVED):
            log.info("dead letters are superseded", letters=count)
        if truncated:
            self._users = self._index.open_users()
        else:
            self._users -= users - {letter.user for letter in self._index.open_of(users)}

    def _applied(self, batch: Batch, users: set[str], refused: Iterable[DeadLetter]) -> Applied:
        from ghsync_dagster.stores.kafka_topics import place, timestamp_ms

        dead = {(letter.partition, letter.offset) for letter in refused}
        applied = Applied(self._kafka.topic)
        for message, change in zip(batch.messages, batch.changes, strict=True):
            if type(change) is not Change or not (change.key in users or change.what == TRUNCATE):
                continue
            partition, offset = place(message)
            if (partition, offset) not in dead:
                applied.add(change, partition, Mark(offset, timestamp_ms(message)))
        add_other_partitions(applied, self._stream, group_name(self._kafka))
        return applied

    def close(self) -> None:
        """Drop the connection."""
        self._writer.close()


def dead_letter_ends(kafka: KafkaSettings) -> dict[int, int]:
    """Return up to where there are dead letters now, by partition.

    Raises:
        UnavailableError: No broker can be reached.
        RefusedError: The credentials or rights are refused.
    """
    from ghsync_dagster.stores.kafka_topics import ranges_of

    return {partition: end for partition, (_, end) in ranges_of(kafka, kafka.dead_letter_topic).items()}


def read_dead_letters(kafka: KafkaSettings, since: Mapping[int, int] | None = None) -> Iterator[DeadLetter]:
    """Yield the dead letters that there are now, oldest first; of those of one record only the first.

    Args:
        kafka: The topic of changes and the way to the brokers.
        since: Only those written behind these offsets, by partition, as ``dead_letter_ends`` gave them earlier.

    Raises:
        UnavailableError: No broker can be reached.
        RefusedError: The credentials or rights are refused.
    """
    from ghsync_dagster.stores.kafka_topics import read_to_end

    seen: set[str] = set()
    strangers = 0
    for message in read_to_end(kafka, kafka.dead_letter_topic, since):
        letter = parse(message)
        if letter is None:
            strangers += 1
        elif letter.id not in seen:
            seen.add(letter.id)
            yield letter
    if strangers:
        log.warning("records among the dead letters that are none", topic=kafka.dead_letter_topic, records=strangers)


# The index


def catch_up(kafka: KafkaSettings, index: LetterIndex) -> bool:
    """Add to the index what only the topic of dead letters holds, and remove what that no longer holds.

    Reads from where it ended the last time; letters of which nothing is known are open. Safe to run in several
    processes at once.

    Args:
        kafka: The topic of changes and the way to the brokers.
        index: The index of that topic's dead letters.

    Returns:
        Whether there is a topic of dead letters.

    Raises:
        UnavailableError: Kafka or MongoDB can't be reached.
        RefusedError: Credentials or rights are refused.
    """
    from ghsync_dagster.stores.dead_letters import Indexed
    from ghsync_dagster.stores.kafka_topics import TopicIds, ranges_of, read_ranges

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
        log.warning("the topic of dead letters was recreated", topic=topic, open_letters_gone=index.remove())
        known = Indexed(topic_id, {}, {})
    for partition, (low, _) in ranges.items():
        if low > known.lows.get(partition, 0) and (gone := index.remove(partition, before=low)):
            log.warning("open dead letters were removed from their topic", topic=topic, letters=gone)
    starts = {partition: max(low, known.ends.get(partition, low)) for partition, (low, _) in ranges.items()}
    unread = {partition: (start, ranges[partition][1]) for partition, start in starts.items()}
    decoder = ChangeDecoder()
    found = (parse(message) for message in read_ranges(kafka, topic, unread))
    index.add_found(_indexed(letter, decoder) for letter in found if letter is not None and letter.topic == kafka.topic)
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


def _indexed(letter: DeadLetter, decoder: ChangeDecoder) -> Letter:
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
    from ghsync_dagster.stores.dead_letters import LetterIndex

    index = LetterIndex(store, kafka.topic)
    catch_up(kafka, index)
    return index


def users_with_letters(kafka: KafkaSettings, store: UserStore) -> set[str]:
    """Return the users that have open letters, to name a cause; none where the letters can't be read."""
    try:
        found = caught_up_index(kafka, store).open_users()
    except GhsyncError as error:
        log.warning("the dead letters can't be read", reason=error.message)
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


def whole_letter(kafka: KafkaSettings, letter: Letter) -> DeadLetter | None:
    """Read the record of a letter; None where the topic of dead letters no longer holds it.

    Raises:
        UnavailableError: No broker can be reached.
        RefusedError: The credentials or rights are refused.
    """
    from ghsync_dagster.stores.kafka_topics import ranges_of, read_ranges

    topic = f"{letter.topic}{kafka.dead_letter_topic.removeprefix(kafka.topic)}"
    partition, offset = letter.place
    low, high = ranges_of(kafka, topic).get(partition, (0, 0))
    if not low <= offset < high:
        return None
    found = [parse(message) for message in read_ranges(kafka, topic, {partition: (offset, offset + 1)})]
    return next((whole for whole in found if whole is not None and whole.id == letter.id), None)


# Closing


def close_letters(index: LetterIndex, letters: Iterable[Letter], reason: str) -> Iterator[Letter]:
    """Close open letters and yield them, some at a time."""
    yield from _closed(index, ((letter, reason) for letter in letters if letter.state is LetterState.OPEN))


def close_superseded(kafka: KafkaSettings, store: UserStore, index: LetterIndex) -> Iterator[Letter]:
    """Close the open letters that no longer matter, and yield them.

    A newer record of the user, or a later truncate, stands in the topic of changes before the group's committed offset,
    and is no dead letter. The topic is read from the lowest open letter on, once for each ``_PAGE`` of open letters.

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
    from ghsync_dagster.stores.mongo import chunks

    for part in chunks(letters):
        at = datetime.now(UTC).isoformat()
        closed = [letter._replace(state=LetterState.CLOSED, reason=reason, at=at) for letter, reason in part]
        if index.settle(part, LetterState.CLOSED, at=at) < len(closed):
            # Others settled some first, or their records were refused again.
            now = index.by_id(letter.id for letter in closed)
            closed = [letter for letter in closed if now.get(letter.id) == letter]
        yield from closed


def _applied_after(kafka: KafkaSettings, store: UserStore, index: LetterIndex, letters: list[Letter]) -> Applied:
    """Return what the group has applied since the first of some letters, as far as it is about their users."""
    from ghsync_dagster.cdc.backlog import read_backlog
    from ghsync_dagster.stores.kafka_topics import place, read_ranges, timestamp_ms
    from ghsync_dagster.stores.stream import StreamStore

    starts: dict[int, int] = {}
    for letter in letters:
        starts[letter.partition] = min(starts.get(letter.partition, letter.offset), letter.offset)
    ranges = {
        found.partition: (max(found.low, starts[found.partition]), found.committed)
        for found in read_backlog(kafka).partitions
        if found.partition in starts and found.committed is not None and not found.is_anew
    }
    users = {letter.user for letter in letters if letter.user is not None}
    dead = {(letter.partition, letter.offset) for letter in index.of_users(users) if letter.topic == kafka.topic}
    applied, decoder = Applied(kafka.topic), ChangeDecoder()
    for message in read_ranges(kafka, kafka.topic, ranges):
        if place(message) in dead:
            continue
        try:
            change = decoder.decode(_bytes(message.key()), _bytes(message.value()))
        except UndecodableError:
            continue
        if change.key in users or change.what == TRUNCATE:
            partition, offset = place(message)
            applied.add(change, partition, Mark(offset, timestamp_ms(message)))
    add_other_partitions(applied, StreamStore(store), group_name(kafka))
    return applied


def add_other_partitions(applied: Applied, stream: StreamStore, group: str) -> None:
    """Add where the last truncate that was applied stands in the other partitions."""
    if not applied.truncates:
        return
    last = stream.last_truncate(group)
    mark = None if last is None else applied.truncates.get(last.partition)
    if last is None or mark is None or mark.offset != last.offset:
        return
    for partition, stop in last.stops.items():
        if partition != last.partition and stop > applied.truncates.get(partition, Mark(0, None)).offset:
            applied.truncates[partition] = Mark(stop, mark.timestamp_ms)


def _headers(message: Message) -> Headers:
    found = message.headers() or []
    return list(found.items() if isinstance(found, dict) else found)


def _bytes(value: str | bytes | None) -> bytes | None:
    return value.encode() if isinstance(value, str) else value


def _text(value: str | bytes | None) -> str:
    return (_bytes(value) or b"").decode(errors="replace")


def _shown(value: str | bytes | None) -> str | None:
    return None if value is None else (_bytes(value) or b"").decode(errors="backslashreplace")
