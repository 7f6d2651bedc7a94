"""MongoDB: writes of users by a load and by the stream, under one guard.

Belongs here: single writes of users and of the books that record their origin. Not here: the order of writes, which is
``domain.precedence``'s.

Conditions on other fields than the key are in the update itself (``$cond``). So it is atomic for one document on every
deployment, and every server uses the index.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from bson.errors import BSONError
from pymongo import InsertOne, ReplaceOne, UpdateOne

from ghsync_dagster.chunks import CHUNK, chunks
from ghsync_dagster.domain.errors import UnavailableError
from ghsync_dagster.domain.user import MARKER_FIELD, MARKER_VALUE, USER_FIELDS
from ghsync_dagster.stores.mongo.commands import KEYS, TEXT, Commands, Document, GuardedCollection, replaced_where
from ghsync_dagster.stores.mongo.errors import DUPLICATE_KEY
from ghsync_dagster.stores.mongo.users import NAMELESS

if TYPE_CHECKING:
    from collections.abc import Collection as Collected
    from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

    from pymongo.collection import Collection

    from ghsync_dagster.stores.mongo.guard import WriterGuard
    from ghsync_dagster.stores.mongo.users import UserStore

_MANY_TIMES: Final = 4
"""All entries are read if there are this many times more keys than entries."""
_REST: Final = 100
"""If a collection has too many entries to be read whole, that is tried again after this many times its duration."""
_LEAST: Final = 100
_MOST: Final = 5_000
"""The fewest and the most writes of one command. The next two limit the seconds that it should take."""
_QUICK_SECONDS: Final = 0.25
_SLOW_SECONDS: Final = 1.0
_RACES: Final = 10
"""How often an upsert that lost a race against another insert of its key is tried again."""
_MARKED: Final = {MARKER_FIELD: MARKER_VALUE}

_OWN_KEYS: Final = frozenset({"user_id", "_id"})
"""Fields of unique indexes that another write of the same user, or the same write sent twice, may violate."""
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
"""Error codes that concern the user of one write only: other users can still be stored."""
_UNENCODABLE: Final = "unencodable"
KINDS_OF_REFUSED: Final = frozenset({*_KINDS.values(), _UNENCODABLE})
"""The kinds of users that the database refuses."""

_Write = tuple[str, InsertOne[dict[str, Any]] | ReplaceOne[dict[str, Any]] | UpdateOne]
"""A key and the write of its document."""


class Refused(NamedTuple):
    """Why the database refuses a user.

    Attributes:
        kind: A slug, one of ``KINDS_OF_REFUSED``.
        text: The database's own message, shortened. It may hold values of the user: for dead letters, not for logs.
    """

    kind: str
    text: str


class UserWriter:
    """The users' collection and its books, for writing under a guard.

    Args:
        store: The open store; its owner closes it.
        guard: Called before each command.
    """

    def __init__(self, store: UserStore, guard: WriterGuard) -> None:
        self.store = store
        self.commands = Commands(guard)
        on = self.commands.on
        self._users = on(store.users)
        self._versions, self._deleted = on(store.book("versions")), on(store.book("deleted"))
        self._undo, self._loads = on(store.book("undo")), on(store.book("loads"))
        self._size = CHUNK
        self._large_until: dict[str, float] = {}
        """Until when a collection, by name, counts as too large to be read whole."""

    # The books of versions and deletions

    def insert_versions(self, entries: Iterable[tuple[str, str, int]], load: str) -> int:
        """Write version entries ``(user_id, created_at, event id)``; return how many.

        An existing entry is kept. It is this load's own, since the load dropped what was there before.
        """
        written = 0
        for part in chunks(entries, 5 * CHUNK):
            documents = [{"_id": key, "created_at": at, "id": number, "load": load} for key, at, number in part]
            written += len(part) - len(self._versions.insert_new(documents))
        return written

    def move_versions(self, entries: Iterable[tuple[str, str, int]], load: str | None) -> None:
        """Move version entries to newer events; an entry that is gone stays gone.

        Args:
            entries: ``(user_id, created_at, event id)`` of the newer events.
            load: The load that replaces the documents too; None if only the versions move.
        """
        writer = {} if load is None else {"load": load}
        for part in chunks(entries):
            self._versions.bulk(
                [
                    UpdateOne({"_id": key}, {"$set": {"created_at": at, "id": number, **writer}})
                    for key, at, number in part
                ]
            )

    def drop_versions(self, keys: Collected[str]) -> set[str]:
        """Drop the version entries of ``keys``; return which keys had one.

        A key that is not returned had no entry at some moment of this call.
        """
        return self._drop(self._versions, keys)

    def drop_all_versions(self) -> None:
        """Drop every version entry."""
        self._versions.delete({})

    def record_deleted(self, keys: Iterable[str]) -> None:
        """Record that the stream deleted ``keys``; existing records stay."""
        for part in chunks(keys):
            self._deleted.insert_new([{"_id": key} for key in part])

    def forget_deleted(self, keys: Collected[str]) -> None:
        """Remove the record that the stream deleted ``keys``."""
        self._drop(self._deleted, keys)

    def _drop(self, book: GuardedCollection, keys: Collected[str]) -> set[str]:
        found = self._among(book.reads, keys)
        for part in chunks(found, KEYS):
            book.delete({"_id": {"$in": part}})
        return found

    def _among(self, book: Collection[Document], keys: Collected[str]) -> set[str]:
        """Return those of ``keys`` that are an ``_id`` in a book."""
        if len(keys) > KEYS and time.monotonic() >= self._large_until.get(book.name, 0.0):
            all_of_it = self._all_if_few(book, len(keys) // _MANY_TIMES)
            if all_of_it is not None:
                return all_of_it.intersection(keys)
        return self.commands.among(book, keys)

    def _all_if_few(self, book: Collection[Document], few: int) -> set[str] | None:
        """Return every ``_id`` of a book that has fewer than ``few`` entries, as is usual; else None, for a while.

        Finding many keys one by one costs more. But some servers read the whole collection, whatever the limit.
        """
        started = time.monotonic()
        with self.commands.send(f"Reading {book.name}"):
            # An entry that is deleted and inserted again meanwhile may be read twice: each read counts.
            found = [entry["_id"] for entry in book.find({}, {"_id": 1}).limit(few)]
        if len(found) < few:
            return set(found)
        now = time.monotonic()
        self._large_until[book.name] = now + _REST * (now - started)
        return None

    # Users

    def upsert(
        self, upserts: Mapping[str, dict[str, str | None]], *, created: Set[str] = frozenset()
    ) -> dict[str, Refused]:
        """Replace or insert users, unmarked.

        Args:
            upserts: Users by key. If one lacks fields, the stored values stay, or are null for a new user.
            created: Keys that are most likely not stored. They are inserted first, since that costs less.

        Returns:
            Why the database refused a user, by key, in the order of the upserts. That user's document is unchanged.

        Raises:
            UnavailableError: The server became unavailable; any part may be written.
            RefusedError: The server refuses the writes as such.
        """
        refused: dict[str, Refused] = {}
        # One kind a bulk: after a refused connection PyMongo 4.20 retries a bulk with its first kind only.
        new = {key: user for key, user in upserts.items() if key in created and len(user) == len(USER_FIELDS)}
        stored = set(self._insert([(key, InsertOne(dict(user))) for key, user in new.items()], refused))
        others = {key: user for key, user in upserts.items() if key not in new or key in stored}
        self._replace([(key, _upsert(key, user)) for key, user in others.items()], refused)
        return {key: refused[key] for key in upserts if key in refused}

    def remove(self, keys: Iterable[str]) -> int:
        """Delete users, marked or not; return how many documents there were."""
        return sum(self._users.delete({"user_id": {"$in": part}}) for part in chunks(keys, KEYS))

    def remove_nameless(self) -> int:
        """Delete the documents whose ``user_id`` is no text, which break the contract; return how many.

        The last command deletes nothing. By it a majority confirms all deletions, also those of a failed try.
        """
        removed = 0
        while True:
            with self.commands.send("Reading users"):
                found = [user["_id"] for user in self.store.users.find(NAMELESS, {"_id": 1}).limit(CHUNK)]
            removed += self._users.delete({"_id": {"$in": found}})
            if not found:
                return removed

    def _insert(self, writes: list[_Write], refused: dict[str, Refused]) -> list[str]:
        """Insert users; return the keys that are stored already, and add refusals to ``refused``."""
        return [key for part in self._parts(writes) for key, _ in self._write_once(part, refused)]

    def _replace(self, writes: list[_Write], refused: dict[str, Refused]) -> None:
        """Replace or insert users, and add refusals to ``refused``."""
        for part in self._parts(writes):
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

    def _parts(self, writes: list[_Write]) -> Iterator[list[_Write]]:
        """Yield the writes of the next command: it must end before the guard expires."""
        while writes:
            part, writes = writes[: self._size], writes[self._size :]
            yield part

    def _write_once(self, part: list[_Write], refused: dict[str, Refused]) -> list[_Write]:
        """Send writes in one command; return those that lost a race, and add refusals to ``refused``."""
        try:
            with self._timed(len(part)):
                failed = self._users.try_bulk([write for _, write in part], _KINDS.keys())
        except (BSONError, UnicodeError) as error:
            unencodable = type(error).__name__
        else:
            return _lost(failed, part, refused)
        # The error does not name the write, and others may have been sent: writing them again changes nothing.
        if len(part) == 1:
            refused[part[0][0]] = Refused(_UNENCODABLE, f"The user can't be put into BSON ({unencodable}).")
            return []
        middle = len(part) // 2
        return self._write_once(part[:middle], refused) + self._write_once(part[middle:], refused)

    @contextmanager
    def _timed(self, writes: int) -> Iterator[None]:
        """Adapt the number of writes of the next command to the duration of this one."""
        started = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - started
            if seconds > _SLOW_SECONDS:
                self._size = max(writes // 2, _LEAST)
            elif seconds < _QUICK_SECONDS and writes >= self._size:
                self._size = min(2 * self._size, _MOST)

    def everyone(self, keep: Set[str]) -> Iterator[list[str]]:
        """Yield the keys of all users and then of all version entries, until only those to keep are left.

        Args:
            keep: Users that are not yielded. The caller must remove all others before it requests the next ones.
        """
        for collection, field in ((self.store.users, "user_id"), (self.store.book("versions"), "_id")):
            is_found = True
            while is_found:
                is_found = False
                cursor = collection.find({}, {field: 1}, batch_size=CHUNK)
                while True:
                    with self.commands.send(f"Reading {collection.name}"):
                        read = list(islice(cursor, CHUNK))
                    if not read:
                        break
                    names = [name for entry in read if isinstance(name := entry.get(field), str) and name not in keep]
                    if names:
                        is_found = True
                        yield names

    def replace_unchanged(self, changes: Iterable[tuple[Document, Document]]) -> None:
        """For each ``(old, new)``, if the user is still exactly ``old``, replace it by ``new``, marked."""
        for part in chunks(changes):
            self._users.bulk([_replace_if(_is_exactly(old), old["user_id"], {**new, **_MARKED}) for old, new in part])

    # What a load has marked

    def put_back(self, old: Iterable[Document]) -> None:
        """Restore users as they were, if the document still carries the marker."""
        marked = {"$eq": [f"${MARKER_FIELD}", MARKER_VALUE]}
        for part in chunks(old):
            self._users.bulk([_replace_if(marked, user["user_id"], user) for user in part])

    def delete_marked(self, keys: Iterable[str]) -> int:
        """Delete those of the users ``keys`` that still carry the marker; return how many."""
        return sum(self._users.delete({"user_id": {"$in": part}, **_MARKED}) for part in chunks(keys))

    def unmark_all(self) -> int:
        """Remove the marker from all documents; return from how many."""
        return self._users.update_all({MARKER_FIELD: {"$exists": True}}, {"$unset": {MARKER_FIELD: ""}})

    def write_undo(self, old: Iterable[Document], load: str) -> None:
        """Store the documents that ``load`` is about to replace, so that recovery can restore them.

        The log is empty when a load begins, so a second entry of a user is refused.
        """
        for part in chunks(old):
            self._undo.bulk([InsertOne({"_id": user["user_id"], "user": user, "load": load}) for user in part])

    def forget_undo(self, keys: Iterable[str]) -> None:
        """Delete the undo entries of ``keys``."""
        for part in chunks(keys):
            self._undo.delete({"_id": {"$in": part}})

    def clear_undo(self) -> None:
        """Delete every undo entry."""
        self._undo.delete({})

    def record_load(self, load: str, **fields: object) -> None:
        """Create or update the record of one load."""
        self._loads.update({"_id": load}, {"$set": fields}, upsert=True)


def _upsert(key: str, user: dict[str, str | None]) -> ReplaceOne[Document] | UpdateOne:
    if len(user) == len(USER_FIELDS):
        return ReplaceOne({"user_id": key}, user, upsert=True)
    known = {field: value for field, value in user.items() if field != "user_id"}
    nulls = dict.fromkeys(field for field in USER_FIELDS if field not in user and field != "user_id")
    update = {"$set": known, "$setOnInsert": nulls, "$unset": {MARKER_FIELD: ""}}
    # Some servers refuse an operator without fields.
    return UpdateOne({"user_id": key}, {name: fields for name, fields in update.items() if fields}, upsert=True)


def _lost(failed: Sequence[Document], part: Sequence[_Write], refused: dict[str, Refused]) -> list[_Write]:
    """Return the writes of a bulk that lost a race, and add refusals to ``refused``."""
    lost = []
    for item in failed:
        key, write = part[item["index"]]
        if item["code"] == DUPLICATE_KEY and _OWN_KEYS.issuperset(item.get("keyPattern", _OWN_KEYS)):
            lost.append((key, write))
        else:
            refused[key] = Refused(_KINDS[item["code"]], f"code {item['code']}: {str(item.get('errmsg'))[:TEXT]}")
    return lost


def _is_exactly(user: Document) -> Document:
    """Return the condition that a document holds exactly these five fields, unmarked."""
    fields = [{"$eq": [f"${field}", {"$literal": user.get(field)}]} for field in USER_FIELDS]
    return {"$and": [*fields, {"$eq": [{"$type": f"${MARKER_FIELD}"}, "missing"]}]}


def _replace_if(condition: Document, key: str, new: Document) -> UpdateOne:
    body = {"_id": "$_id", **{field: {"$literal": value} for field, value in new.items()}}
    return UpdateOne({"user_id": key}, replaced_where(condition, body))
