"""MongoDB as the change stream writes it: whole sets of keys, one command a step.

Belongs here: single operations, and which of the server's answers are about one user. Not here: the order of
operations, which is ``domain.precedence``'s and ``cdc.stream.apply``'s. Filters name one indexed field only.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence, Set
from collections.abc import Collection as Collected
from contextlib import contextmanager, suppress
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pymongo
from bson.errors import BSONError
from pymongo import InsertOne, ReplaceOne, UpdateOne
from pymongo.errors import (
    BulkWriteError,
    ConnectionFailure,
    DuplicateKeyError,
    ExecutionTimeout,
    NetworkTimeout,
    PyMongoError,
)

from ghsync_dagster import clock
from ghsync_dagster.domain.errors import RefusedError, UnavailableError
from ghsync_dagster.domain.user import MARKER_FIELD, USER_FIELDS
from ghsync_dagster.logging import redact
from ghsync_dagster.stores.mongo.errors import DUPLICATE_KEY, PASSING, mongo_errors
from ghsync_dagster.stores.mongo.users import CHUNK, NAMELESS, chunks

if TYPE_CHECKING:
    from pymongo.collection import Collection

    from ghsync_dagster.stores.mongo.schema import Document
    from ghsync_dagster.stores.mongo.users import UserStore

_KEYS: Final = 200
"""How many keys one ``$in`` carries: some servers compare each document with the whole list."""
_MANY_TIMES: Final = 4
"""How many times more keys there must be than entries for all entries to be read."""
_REST: Final = 100
"""How many times longer than it took to find too many entries their collection is not read whole again."""
_LEAST: Final = 100
_MOST: Final = 5_000
"""The least and the most writes that one command carries, and between how many seconds it should take."""
_QUICK_SECONDS: Final = 0.25
_SLOW_SECONDS: Final = 1.0
_RACES: Final = 10
"""How often an upsert that lost a race against another insert of its key is tried again."""
_TEXT: Final = 500
_ASIDE_SECONDS: Final = 3.0
"""How long a command beside the batches may take."""

_OWN_KEYS: Final = frozenset({"user_id", "_id"})
"""Fields of unique indexes on which another write of the same user, or the same write sent twice, may be met."""
_KINDS: Final = {
    121: "validator",
    10334: "too-large",
    17280: "index-key-too-long",
    17419: "too-large",
    17420: "too-large",
    2: "bad-value",
    9: "bad-value",
    14: "bad-value",
    52: "bad-value",
    DUPLICATE_KEY: "unique-index",
}
"""The error codes of one write that are about the user in it: another user can be stored all the same."""
_UNENCODABLE: Final = "unencodable"
KINDS_OF_REFUSED: Final = frozenset({*_KINDS.values(), _UNENCODABLE})
"""The kinds of all that the database does not take."""

_Write = tuple[str, InsertOne[dict[str, Any]] | ReplaceOne[dict[str, Any]] | UpdateOne]
"""A key and how its document is written."""


class Refused(NamedTuple):
    """Why the database does not take a user.

    Attributes:
        kind: A slug, one of ``KINDS_OF_REFUSED``.
        text: The database's own words, cut to size. They may hold values of the user: for dead letters, not for logs.
    """

    kind: str
    text: str


class Note(NamedTuple):
    """What was left for whoever has a partition.

    Attributes:
        offset: Where it is to go back to.
        asking: Names the last one of those who asked.
    """

    offset: int
    asking: str | None


class KeptTopic(NamedTuple):
    """What is kept of the topic that a group consumes.

    Attributes:
        topic_id: The topic's id.
        placed: The partitions in which the group has had a place.
        partitions: How many partitions the group consumes; None where that was not kept yet.
    """

    topic_id: str
    placed: frozenset[int]
    partitions: int | None = None


class Truncated(NamedTuple):
    """Where a truncate stands in a topic of several partitions.

    Attributes:
        partition: Its partition.
        offset: Its offset.
        stops: The first offset of each partition that is from behind it.
    """

    partition: int
    offset: int
    stops: Mapping[int, int]


@contextmanager
def limited(what: str, seconds: float) -> Iterator[None]:
    """Give commands so much time, and translate their failures."""
    with mongo_errors(what):
        try:
            with pymongo.timeout(seconds):
                yield
        except PyMongoError as error:
            if error.timeout and not isinstance(error, ConnectionFailure | ExecutionTimeout):
                raise NetworkTimeout(str(error)) from error
            raise


def _half_a_minute() -> float:
    return 30.0


class StreamStore:
    """The users' collection and its companions, as the stream writes them.

    Args:
        store: The open store; its owner closes it.
        may_write: Called before each command. Returns how many seconds the command may take, and raises when this
            process must write no more.
    """

    def __init__(self, store: UserStore, *, may_write: Callable[[], float] = _half_a_minute) -> None:
        self.store = store
        self.unsure = False
        """Whether a command may still reach the server, or reached it after its time; the owner sets it back."""
        self._again = store.companion("again")
        self._truncates = store.companion("truncates")
        self._topics = store.companion("topics")
        self._size = CHUNK
        self._large_until: dict[str, float] = {}
        """Until when a collection, by name, is taken to hold too many entries to be read whole."""
        self._may_write = may_write

    @contextmanager
    def _command(self, what: str) -> Iterator[None]:
        """Allow one command to be sent, for a limited time, and translate its failures."""
        seconds = self._may_write()
        deadline = clock.now() + seconds
        try:
            with limited(what, seconds):
                yield
        except UnavailableError:
            self.unsure = True
            raise
        finally:
            if clock.now() > deadline:
                self.unsure = True

    @contextmanager
    def _timed(self, writes: int) -> Iterator[None]:
        """Learn from a command's time how many writes the next one may carry."""
        started = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - started
            if seconds > _SLOW_SECONDS:
                self._size = max(writes // 2, _LEAST)
            elif seconds < _QUICK_SECONDS and writes >= self._size:
                self._size = min(2 * self._size, _MOST)

    def drop_versions(self, keys: Collected[str]) -> set[str]:
        """Drop the version entries of ``keys``; return which keys had one.

        A key that is not returned had none at some moment of this call.
        """
        return self._drop(self.store.versions, keys, "versions")

    def forget_deleted(self, keys: Collected[str]) -> None:
        """Forget that the stream ever deleted ``keys``."""
        self._drop(self.store.deleted, keys, "deletions")

    # Places in the topic to go back to

    def ask_again(self, names: Mapping[str, int]) -> None:
        """Ask whoever has a partition, by name, to go back to an offset; of several askings the earliest counts."""
        with limited("Asking for changes again", _ASIDE_SECONDS):
            for name, offset in names.items():
                asking = {"$min": {"offset": offset}, "$set": {"asking": uuid.uuid4().hex}}
                self._again.update_one({"_id": name}, asking, upsert=True)

    def asked_again(self, names: Sequence[str]) -> dict[str, Note]:
        """Return where partitions are to go back to, by name."""
        with limited("Reading what is asked again", _ASIDE_SECONDS):
            found = self._again.find({"_id": {"$in": list(names)}})
            return {asked["_id"]: Note(asked["offset"], asked.get("asking")) for asked in found}

    def went_back(self, name: str, note: Note) -> None:
        """Forget that a partition is to go back, unless somebody asked for it again meanwhile."""
        with limited("Forgetting what was asked again", _ASIDE_SECONDS):
            # None stands for a note that does not tell.
            self._again.delete_one({"_id": name, "offset": note.offset, "asking": note.asking})

    def keep_truncate(self, name: str, truncated: Truncated) -> None:
        """Keep the place of a truncate in a topic of several partitions, in place of the one before."""
        stops = {str(partition): stop for partition, stop in truncated.stops.items()}
        fields = {"partition": truncated.partition, "offset": truncated.offset, "stops": stops}
        with limited("Keeping a truncate's place", _ASIDE_SECONDS):
            self._truncates.replace_one({"_id": name}, fields, upsert=True)

    def last_truncate(self, name: str) -> Truncated | None:
        """Return the place of the last truncate that was kept."""
        with limited("Reading a truncate's place", _ASIDE_SECONDS):
            found = self._truncates.find_one({"_id": name})
        if found is None:
            return None
        stops = {int(partition): stop for partition, stop in found["stops"].items()}
        return Truncated(found["partition"], found["offset"], stops)

    def topic_of(self, name: str) -> KeptTopic | None:
        """Return the topic that a group, by name, consumes; None where none is kept."""
        with limited("Reading a group's topic", _ASIDE_SECONDS):
            found = self._topics.find_one({"_id": name})
        if found is None:
            return None
        return KeptTopic(found["topic_id"], frozenset(map(int, found.get("placed", ()))), found.get("partitions"))

    def keep_topic(self, name: str, topic_id: str) -> KeptTopic:
        """Keep the id of the topic that a group consumes, unless there is one; return what is kept."""
        known = self.topic_of(name)
        if known is None:
            with limited("Keeping a group's topic", _ASIDE_SECONDS), suppress(DuplicateKeyError):
                self._topics.insert_one({"_id": name, "topic_id": topic_id})
            known = self.topic_of(name)
        return known or KeptTopic(topic_id, frozenset())

    def keep_places(self, name: str, partitions: Iterable[int]) -> None:
        """Keep that a group, whose topic is kept, has a place in these partitions."""
        with limited("Keeping a group's topic", _ASIDE_SECONDS):
            self._topics.update_one({"_id": name}, {"$set": {f"placed.{partition}": True for partition in partitions}})

    def keep_partitions(self, name: str, number: int) -> None:
        """Keep how many partitions a group, whose topic is kept, consumes."""
        with limited("Keeping a group's topic", _ASIDE_SECONDS):
            self._topics.update_one({"_id": name}, {"$max": {"partitions": number}})

    def _drop(self, collection: Collection[Document], keys: Collected[str], what: str) -> set[str]:
        found = self._among(collection, keys, what)
        for part in chunks(found, _KEYS):
            with self._command(f"Dropping {what}"):
                collection.delete_many({"_id": {"$in": part}})
        return found

    def _among(self, collection: Collection[Document], keys: Collected[str], what: str) -> set[str]:
        """Return those of ``keys`` that are an ``_id`` in a collection."""
        if len(keys) > _KEYS and time.monotonic() >= self._large_until.get(collection.name, 0.0):
            all_of_it = self._if_few(collection, len(keys) // _MANY_TIMES, what)
            if all_of_it is not None:
                return all_of_it.intersection(keys)
        found: set[str] = set()
        for part in chunks(keys, _KEYS):
            with self._command(f"Reading {what}"):
                found.update([entry["_id"] for entry in collection.find({"_id": {"$in": part}}, {"_id": 1})])
        return found

    def _if_few(self, collection: Collection[Document], few: int, what: str) -> set[str] | None:
        """Return every ``_id`` of a collection that holds less than ``few``, as it mostly does; else None, for a while.

        To look many keys up costs more. But some servers read all that there is, however few are asked for.
        """
        started = time.monotonic()
        with self._command(f"Reading {what}"):
            # One that is dropped and comes anew meanwhile may be read twice: what is read counts against the limit.
            found = [entry["_id"] for entry in collection.find({}, {"_id": 1}).limit(few)]
        if len(found) < few:
            return set(found)
        now = time.monotonic()
        self._large_until[collection.name] = now + _REST * (now - started)
        return None

    def record_deleted(self, keys: Iterable[str]) -> None:
        """Record that the stream deleted ``keys``."""
        for part in chunks(keys):
            with self._command("Recording deletions"):
                try:
                    self.store.deleted.insert_many([{"_id": key} for key in part], ordered=False)
                except BulkWriteError as error:
                    # What is recorded already is as it should be.
                    _raise_unless(error, {DUPLICATE_KEY})

    def write(
        self, upserts: Mapping[str, dict[str, str | None]], *, created: Set[str] = frozenset()
    ) -> dict[str, Refused]:
        """Replace or insert users, unmarked.

        Args:
            upserts: Users by key. One that lacks fields keeps what is stored of them; they are null where nothing is.
            created: Keys that are most likely not stored: to insert them is tried first, since it costs less.

        Returns:
            Why the database refused a user, by key, in the order of the upserts; it kept what it had of that user.

        Raises:
            UnavailableError: The server went away; any part may be written.
            RefusedError: The server refuses the writes as such.
        """
        refused: dict[str, Refused] = {}
        # One kind a bulk: PyMongo 4.20 keeps only the first kind of one that it tries again after a refused connection.
        new = {key: user for key, user in upserts.items() if key in created and len(user) == len(USER_FIELDS)}
        stored = set(self._insert([(key, InsertOne(dict(user))) for key, user in new.items()], refused))
        others = {key: user for key, user in upserts.items() if key not in new or key in stored}
        self._replace([(key, _upsert(key, user)) for key, user in others.items()], refused)
        return {key: refused[key] for key in upserts if key in refused}

    def remove(self, keys: Iterable[str]) -> int:
        """Delete users, marked or not; return how many documents there were."""
        return sum(self._delete({"user_id": {"$in": part}}) for part in chunks(keys, _KEYS))

    def remove_nameless(self) -> int:
        """Delete the documents whose ``user_id`` is no text, which break the contract; return how many.

        At the end a majority confirms what came before it, also what a try that failed had done already.
        """
        removed = 0
        while True:
            with self._command("Reading users"):
                found = [user["_id"] for user in self.store.users.find(NAMELESS, {"_id": 1}).limit(CHUNK)]
            removed += self._delete({"_id": {"$in": found}})
            if not found:
                return removed

    def _delete(self, query: Document) -> int:
        with self._command("Deleting users"):
            return self.store.users.delete_many(query).deleted_count

    def _insert(self, writes: list[_Write], refused: dict[str, Refused]) -> list[str]:
        """Insert users; return the keys that are stored already, and add what the database refuses."""
        return [key for part in self._commands(writes) for key, _ in self._write_once(part, refused)]

    def _replace(self, writes: list[_Write], refused: dict[str, Refused]) -> None:
        """Replace or insert users, and add what the database refuses."""
        for part in self._commands(writes):
            lost = part
            for _ in range(_RACES):
                lost = self._write_once(lost, refused)
                if not lost:
                    break
            else:
                raise UnavailableError(
                    f"Writing users: {len(lost)} upserts lost against other inserts of their keys {_RACES} times.",
                    way_out="Run again; look for another program that inserts and deletes the same users.",
                )

    def _commands(self, writes: list[_Write]) -> Iterator[list[_Write]]:
        """Yield what the next command carries: it must end before this process may no longer write."""
        while writes:
            part, writes = writes[: self._size], writes[self._size :]
            yield part

    def _write_once(self, part: list[_Write], refused: dict[str, Refused]) -> list[_Write]:
        """Send writes in one command; return those that lost a race, and add what the database refuses."""
        with self._command("Writing users"), self._timed(len(part)):
            try:
                self.store.users.bulk_write([write for _, write in part], ordered=False)
            except BulkWriteError as error:
                return _judge(error, part, refused)
            except (BSONError, UnicodeError) as error:
                unencodable = type(error).__name__
            else:
                return []
        # Nothing tells which one it is, and others may have been sent: to write them again changes nothing.
        if len(part) == 1:
            refused[part[0][0]] = Refused(_UNENCODABLE, f"The user can't be put into BSON ({unencodable}).")
            return []
        middle = len(part) // 2
        return self._write_once(part[:middle], refused) + self._write_once(part[middle:], refused)

    def everyone(self, keep: Set[str]) -> Iterator[list[str]]:
        """Yield the keys of all users and then of all version entries, until none but what is kept is there.

        Args:
            keep: Users that are not told. All others have to be gone before the next ones are asked for.
        """
        for collection, field in ((self.store.users, "user_id"), (self.store.versions, "_id")):
            is_found = True
            while is_found:
                is_found = False
                cursor = collection.find({}, {field: 1}, batch_size=CHUNK)
                while True:
                    with self._command(f"Reading {collection.name}"):
                        read = list(islice(cursor, CHUNK))
                    if not read:
                        break
                    names = [name for entry in read if isinstance(name := entry.get(field), str) and name not in keep]
                    if names:
                        is_found = True
                        yield names


def _upsert(key: str, user: dict[str, str | None]) -> ReplaceOne[Document] | UpdateOne:
    if len(user) == len(USER_FIELDS):
        return ReplaceOne({"user_id": key}, user, upsert=True)
    known = {field: value for field, value in user.items() if field != "user_id"}
    nulls = dict.fromkeys(field for field in USER_FIELDS if field not in user and field != "user_id")
    update = {"$set": known, "$setOnInsert": nulls, "$unset": {MARKER_FIELD: ""}}
    # Some servers refuse an operator without fields.
    return UpdateOne({"user_id": key}, {name: fields for name, fields in update.items() if fields}, upsert=True)


def _judge(error: BulkWriteError, part: Sequence[_Write], refused: dict[str, Refused]) -> list[_Write]:
    """Return the writes of a bulk that lost a race, and add those that the database refuses for what is in them."""
    _raise_unless(error, _KINDS.keys())
    lost = []
    for item in error.details["writeErrors"]:
        key, write = part[item["index"]]
        if item["code"] == DUPLICATE_KEY and _OWN_KEYS.issuperset(item.get("keyPattern", _OWN_KEYS)):
            lost.append((key, write))
        else:
            refused[key] = Refused(_KINDS[item["code"]], f"code {item['code']}: {str(item.get('errmsg'))[:_TEXT]}")
    return lost


def _raise_unless(error: BulkWriteError, expected: Container[int]) -> None:
    """Raise for what went wrong in a bulk beside writes that failed with one of the ``expected`` codes."""
    if unsure := error.details.get("writeConcernErrors"):
        raise UnavailableError(
            f"Writing: MongoDB did not confirm ({redact(str(unsure[0].get('errmsg')))[:_TEXT]}).", way_out="Run again."
        )
    for item in error.details["writeErrors"]:
        if (code := item["code"]) in expected:
            continue
        # Its text may hold values of the user.
        if code in PASSING:
            raise UnavailableError(f"Writing: MongoDB could not write now (code {code}).", way_out="Run again.")
        raise RefusedError(
            f"Writing: MongoDB refused (code {code}).",
            way_out="Look the code up among MongoDB's error codes; check the roles behind MONGODB_URI.",
        )
