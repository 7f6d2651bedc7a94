"""MongoDB: the index of dead letters, one small document each; the topic of dead letters holds the records.

Belongs here: single operations. Not here: which letters are settled (``domain.letters``), and the order of writing
topic, index and offsets (``cdc.stream.letters``). Conditions are in the updates, see ``writer``.
"""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pymongo import ASCENDING, DESCENDING, UpdateOne

from ghsync_dagster.chunks import CHUNK, chunks
from ghsync_dagster.domain.letters import Letter, LetterState
from ghsync_dagster.stores.mongo.commands import KEYS, Commands, changed_where
from ghsync_dagster.stores.mongo.errors import mongo_errors
from ghsync_dagster.stores.mongo.guard import TimeLimit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from ghsync_dagster.stores.mongo.commands import Document
    from ghsync_dagster.stores.mongo.users import UserStore

_COMMAND_SECONDS: Final = 30.0
"""How long one command may take."""


class Indexed(NamedTuple):
    """How far the index has read the topic of dead letters.

    Attributes:
        topic_id: The id of that topic; empty if the brokers give none.
        lows: The low watermark of each partition.
        ends: The next offset to index, by partition.
    """

    topic_id: str
    lows: Mapping[int, int]
    ends: Mapping[int, int]


class LetterIndex:
    """The dead letters of one topic of changes.

    Args:
        store: The open store; its owner closes it.
        topic: The topic of changes.
    """

    def __init__(self, store: UserStore, topic: str) -> None:
        self.topic = topic
        self._commands = Commands(TimeLimit(_COMMAND_SECONDS))
        self._letters = self._commands.on(store.book("dead_letters"))
        self._indexed = f"indexed {topic}"

    # Writing

    def ensure(self) -> None:
        """Create the indexes that reading needs."""
        self._letters.ensure_index([("topic", ASCENDING), ("state", ASCENDING), *_in_order(ASCENDING)])
        self._letters.ensure_index([("user", ASCENDING)])

    def add_refused(self, letters: Iterable[Letter]) -> None:
        """Add letters that were refused just now: each is open, unless its record's letter was closed by hand.

        If a resolved record is refused again, the consumer read it again after older ones of its user.
        """
        self._add(letters, lambda letter: {"$and": [{"$eq": ["$state", LetterState.CLOSED]}, _is_same_record(letter)]})

    def add_found(self, letters: Iterable[Letter]) -> None:
        """Add letters from the topic of dead letters, unless the index has one that is as new."""

        def is_known(letter: Letter) -> Document:
            return {"$or": [{"$gte": ["$place.offset", letter.place[1]]}, _is_same_record(letter)]}

        self._add(letters, is_known)

    def _add(self, letters: Iterable[Letter], is_kept: Callable[[Letter], Document]) -> None:
        """Insert letters; replace existing ones, unless they are to be kept."""
        for part in chunks(letters):
            # The last one of a record counts.
            last = {letter.id: letter for letter in part}
            known = self._letters.insert_new([_document(letter) for letter in last.values()])
            self._letters.bulk(
                [
                    UpdateOne({"_id": found["_id"]}, _replace_unless(is_kept(last[found["_id"]]), found))
                    for found in known
                ]
            )

    def settle(self, settled: Iterable[tuple[Letter, str]], state: LetterState, *, at: str = "") -> int:
        """Set the state and reason of open letters, unless their records were refused again meanwhile.

        Args:
            settled: The letters and reasons.
            state: The new state.
            at: Since when, ISO 8601 in UTC; empty: now.

        Returns:
            How many were still open.
        """
        count = 0
        at = at or datetime.now(UTC).isoformat(timespec="milliseconds")
        for part in chunks(settled):
            writes = [
                UpdateOne({"_id": letter.id}, _replace_if_open(letter, {"state": state, "reason": reason, "at": at}))
                for letter, reason in part
            ]
            count += self._letters.bulk(writes)
        return count

    def resolve_repaired(self, keys: Iterable[str], reason: str) -> int:
        """Resolve the open letters of users that were repaired; return how many.

        Args:
            keys: The users.
            reason: What was done, such as ``repaired from MySQL at …``.
        """
        return self.settle(((letter, reason) for letter in self.open_of(keys)), LetterState.RESOLVED)

    # Reading

    def find(
        self,
        *,
        state: LetterState | None = None,
        kind: str | None = None,
        after: tuple[int, int] | None = None,
        limit: int = 0,
        newest: bool = False,
    ) -> Iterator[Letter]:
        """Yield letters in the order in which they were written.

        Args:
            state: Only those in this state.
            kind: Only those of this kind.
            after: Only those after the letter with this partition and offset.
            limit: The maximum number; 0 for all.
            newest: Whether to begin at the end.
        """
        query: Document = {"topic": self.topic, "state": state or {"$in": list(LetterState)}}
        if kind is not None:
            query["kind"] = kind
        if after is not None:
            partition, offset = after
            alongside = {"place.offset": offset, "place.partition": {"$gt": partition}}
            query |= {"place.offset": {"$gte": offset}, "$or": [{"place.offset": {"$gt": offset}}, alongside]}
        order = DESCENDING if newest else ASCENDING
        with mongo_errors("Reading the index of dead letters"):
            found = self._letters.reads.find(query, batch_size=CHUNK).sort(_in_order(order)).limit(limit)
            yield from map(_letter, found)

    def by_id(self, ids: Iterable[str]) -> dict[str, Letter]:
        """Return the letters that exist, by id."""
        found: dict[str, Letter] = {}
        for part in chunks(ids, KEYS):
            with self._commands.send("Reading the index of dead letters"):
                found |= {entry["_id"]: _letter(entry) for entry in self._letters.reads.find({"_id": {"$in": part}})}
        return found

    def of_users(self, keys: Iterable[str]) -> Iterator[Letter]:
        """Yield the letters of users, from other topics of changes too."""
        for part in chunks(keys, KEYS):
            with self._commands.send("Reading the dead letters of users"):
                found = [_letter(entry) for entry in self._letters.reads.find({"user": {"$in": part}})]
            yield from found

    def open_of(self, keys: Iterable[str]) -> Iterator[Letter]:
        """Yield the open letters of users, from other topics of changes too."""
        return (letter for letter in self.of_users(keys) if letter.state is LetterState.OPEN)

    def open_users(self) -> set[str | None]:
        """Return the users that have an open letter, with None if one names no user."""
        with mongo_errors("Reading the users of open dead letters"):
            query = {"topic": self.topic, "state": LetterState.OPEN}
            return {entry["user"] for entry in self._letters.reads.find(query, {"user": 1}, batch_size=10 * CHUNK)}

    def open_by_kind(self) -> Counter[str]:
        """Return how many letters are open, by kind."""
        match = {"topic": self.topic, "state": LetterState.OPEN}
        with mongo_errors("Counting open dead letters"):
            found = self._letters.reads.aggregate(
                [{"$match": match}, {"$group": {"_id": "$kind", "count": {"$sum": 1}}}]
            )
            return Counter({entry["_id"]: entry["count"] for entry in found})

    # The progress of indexing

    def indexed(self) -> Indexed | None:
        """Return how far the topic of dead letters is indexed; None if that is not recorded."""
        with self._commands.send("Reading the index of dead letters"):
            found = self._letters.reads.find_one({"_id": self._indexed})
        if found is None:
            return None
        lows, ends = ({int(number): int(at) for number, at in found[name].items()} for name in ("lows", "ends"))
        return Indexed(found["topic_id"], lows, ends)

    def keep_indexed(self, indexed: Indexed) -> None:
        """Record how far the topic of dead letters is indexed."""
        lows, ends = ({str(number): at for number, at in part.items()} for part in indexed[1:])
        document = {"topic_id": indexed.topic_id, "lows": lows, "ends": ends}
        self._letters.replace({"_id": self._indexed}, document, upsert=True)

    def remove(self, partition: int | None = None, *, before: int = 0) -> int:
        """Remove letters whose records are gone from the topic of dead letters.

        Args:
            partition: The partition there; None for every letter.
            before: The partition's low watermark.

        Returns:
            How many were open.
        """
        gone: Document = {"topic": self.topic, "state": {"$in": list(LetterState)}}
        if partition is not None:
            gone |= {"place.partition": partition, "place.offset": {"$lt": before}}
        with mongo_errors("Removing dead letters from their index"):
            still_open = self._letters.reads.count_documents({**gone, "state": LetterState.OPEN})
        self._letters.delete(gone)
        return still_open


def _in_order(order: int) -> list[tuple[str, int]]:
    # Offsets of two partitions may be equal.
    return [("place.offset", order), ("place.partition", order)]


def _document(letter: Letter) -> Document:
    partition, offset = letter.place
    return {"_id": letter.id, **letter._asdict(), "place": {"partition": partition, "offset": offset}}


def _letter(found: Document) -> Letter:
    fields = {name: _plain(found[name]) for name in Letter._fields}
    place = (int(found["place"]["partition"]), int(found["place"]["offset"]))
    return Letter(**fields | {"place": place, "state": LetterState(found["state"])})


def _plain(value: Any) -> Any:  # noqa: ANN401
    # The driver's own type for large numbers can't be encoded as JSON.
    return int(value) if isinstance(value, int) else value


def _is_same_record(letter: Letter) -> Document:
    # If the topic was recreated, another record may have the same offset.
    return {"$eq": ["$timestamp_ms", {"$literal": letter.timestamp_ms}]}


def _replace_unless(condition: Document, document: Document) -> list[Document]:
    # $literal, because a text that starts with $ would be read as a field path.
    return [{"$replaceWith": {"$cond": [condition, "$$ROOT", {"$literal": document}]}}]


def _replace_if_open(letter: Letter, fields: Document) -> list[Document]:
    condition = {
        "$and": [{"$eq": ["$state", LetterState.OPEN]}, {"$eq": ["$failed_at", {"$literal": letter.failed_at}]}]
    }
    return changed_where(condition, fields)
