"""MongoDB: the users' collection and the platform's own ``_ghsync_*`` collections beside it.

Belongs here: single operations and how the driver's failures translate to ours. Not here: the order of operations,
which is the load's protocol.

Filters name one indexed field only, and conditions on other fields stand in the update itself (an aggregation
pipeline with ``$cond``): atomic for one document on every deployment, and an index look-up on every server.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Final, TypeVar

from pymongo import MongoClient, ReadPreference, UpdateOne, WriteConcern
from pymongo.errors import BulkWriteError, DuplicateKeyError, InvalidURI

from ghsync_dagster.domain.user import MARKER_FIELD, MARKER_VALUE, USER_FIELDS, json_schema
from ghsync_dagster.logging import redact
from ghsync_dagster.stores.mongo.errors import DUPLICATE_KEY, mongo_errors
from ghsync_dagster.stores.mongo.schema import LOOK_SECONDS, Document, UsersCollection
from ghsync_dagster.stores.mongo.uri import tls_files

if TYPE_CHECKING:
    from pymongo.collection import Collection
    from pymongo.database import Database

T = TypeVar("T")

CHUNK: Final = 1_000
"""How many keys or documents one command carries."""
CONFIRM_MS: Final = 60_000
"""How long a majority may take to confirm a write, before who waits is told that it is not confirmed."""
_DEFAULT_COLLECTION: Final = "Users"
_MARKED: Final = {MARKER_FIELD: MARKER_VALUE}
# An array is text to the first condition where one of its members is.
NAMELESS: Final[Document] = {"$or": [{"user_id": {"$not": {"$type": "string"}}}, {"user_id": {"$type": "array"}}]}
"""Finds the users whose ``user_id`` is no text."""


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """The event that a load-written document came from.

    Attributes:
        created_at: The event's ``created_at``.
        event_id: The event's numeric id.
        load: The load that wrote the entry.
    """

    created_at: str
    event_id: int
    load: str


@dataclass(frozen=True, slots=True)
class Lease:
    """Who holds the collection for loading, and until when by the server's clock.

    Attributes:
        token: Names this one holding.
        holder: The process that holds it.
        writer: Another process that writes for the holder and may outlive it: Spark's driver.
        expires_at: When another may take it.
    """

    token: str
    holder: str
    expires_at: datetime
    writer: str | None = None


def insert_new(collection: Collection[Document], documents: Sequence[Document]) -> list[Document]:
    """Insert documents, which costs less than to replace them; return those whose ``_id`` is there already."""
    try:
        if documents:
            collection.insert_many(documents, ordered=False)
    except BulkWriteError as error:
        failed = error.details["writeErrors"]
        if error.details.get("writeConcernErrors") or any(item["code"] != DUPLICATE_KEY for item in failed):
            raise
        return [documents[item["index"]] for item in failed]
    return []


def merged_if(condition: Document, fields: Document) -> list[Document]:
    """Return an update that adds fields to a document where a condition holds, and leaves it as it is elsewhere.

    In the update and not in its query: of a query with more than ``_id`` not every server makes a look-up by ``_id``.
    """
    # $literal, because a text that starts with $ would be read as a field path.
    return [{"$replaceWith": {"$cond": [condition, {"$mergeObjects": ["$$ROOT", {"$literal": fields}]}, "$$ROOT"]}}]


class UserStore(UsersCollection):
    """The users' collection with its companions, over one client.

    Use as a context manager, or call ``close``.
    """

    def __init__(
        self, uri: str, database: str, collection: str, *, timeout_seconds: float = 10, is_look: bool = False
    ) -> None:
        self.uri = uri
        self.timeout_ms = int(timeout_seconds * 1000)
        # DNS is asked for mongodb+srv:// at once, by default for 20 s.
        patience: Document = {"connectTimeoutMS": min(self.timeout_ms, int(LOOK_SECONDS * 1000))} if is_look else {}
        with mongo_errors("Connecting"), tls_files():
            try:
                self.client: MongoClient[Document] = MongoClient(
                    uri, serverSelectionTimeoutMS=self.timeout_ms, appname="ghsync", tz_aware=True, **patience
                )
            except ValueError as error:
                # Such as a port that is no number, which pymongo does not wrap.
                raise InvalidURI(redact(str(error))) from None
        # Decisions stand on what was written last: a URI that prefers secondaries must not make them stale.
        # What is acknowledged must outlive a failover: a URI with w=1 or w=0 must not weaken it.
        concern = WriteConcern("majority", wtimeout=CONFIRM_MS)
        self.database: Database[Document] = self.client.get_database(
            database, read_preference=ReadPreference.PRIMARY, write_concern=concern
        )
        self.users: Collection[Document] = self.database[collection]
        # Another collection of the same database keeps its own books.
        self._prefix = "_ghsync_" if collection == _DEFAULT_COLLECTION else f"_ghsync_{collection}_"
        self.versions = self.companion("versions")
        self.deleted = self.companion("deleted")
        self.undo = self.companion("undo")
        self.loads = self.companion("loads")
        self.repairs = self.companion("repairs")
        self.leases: Collection[Document] = self.database["_ghsync_leases"]
        self.companions = (self.versions, self.deleted, self.undo, self.loads, self.leases)

    def companion(self, name: str) -> Collection[Document]:
        """Return a collection of the platform's own that belongs to the users' collection."""
        return self.database[f"{self._prefix}{name}"]

    def __enter__(self) -> UserStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the client's connections."""
        self.client.close()

    # The whole collection

    def nonconforming(self, limit: int) -> tuple[int, list[Document]]:
        """Return how many documents break the contract, the marker included, and up to ``limit`` of them."""
        query = {"$nor": [{"$jsonSchema": json_schema()}]}
        with mongo_errors("Checking the contract"):
            total = self.users.count_documents(query)
            return total, list(self.users.find(query).limit(limit)) if total else []

    # The marker

    def count_marked(self) -> int:
        """Return how many documents carry the marker field, with whatever value."""
        with mongo_errors("Counting markers"):
            return self.users.count_documents({MARKER_FIELD: {"$exists": True}})

    def is_empty(self) -> bool:
        """Tell whether the collection has no document at all."""
        with mongo_errors("Reading users"):
            return self.users.find_one({}, {"_id": 1}) is None

    def marked(self, limit: int = 0) -> Iterator[Document]:
        """Yield the documents that carry the marker, the five fields and the marker."""
        with mongo_errors("Reading marked users"):
            yield from self.users.find({MARKER_FIELD: {"$exists": True}}, {"_id": 0}).limit(limit)

    def unmark_all(self) -> int:
        """Remove the marker wherever it is; return from how many documents."""
        with mongo_errors("Removing markers"):
            result = self.users.update_many({MARKER_FIELD: {"$exists": True}}, {"$unset": {MARKER_FIELD: ""}})
        return result.modified_count

    def delete_marked(self, keys: Iterable[str]) -> int:
        """Delete those of the users ``keys`` that still carry the marker; return how many."""
        removed = 0
        with mongo_errors("Deleting marked users"):
            for part in chunks(keys):
                removed += self.users.delete_many({"user_id": {"$in": part}, **_MARKED}).deleted_count
        return removed

    # Reading by keys

    def users_by_id(self, keys: Sequence[str]) -> dict[str, Document]:
        """Return the stored documents of ``keys``, without ``_id``."""
        with mongo_errors("Reading users"):
            return {found["user_id"]: found for found in self.users.find({"user_id": {"$in": list(keys)}}, {"_id": 0})}

    def page(self, after: str | None, upto: str | None, limit: int) -> list[Document]:
        """Return up to ``limit`` whole documents by ``user_id`` in the order of text.

        Both ends are given where they can be: not every server stops reading at the limit.

        Args:
            after: Only those above it; None: from the first text on.
            upto: At most it; None: to the last text.
            limit: How many.
        """
        bounds = {"$gte": ""} if after is None else {"$gt": after}
        if upto is not None:
            bounds["$lte"] = upto
        with (
            mongo_errors("Reading users"),
            # Without a projection: it would take the server more time than it saves of the documents' few fields.
            self.users.find({"user_id": bounds}, sort=[("user_id", 1)], limit=limit, batch_size=limit) as cursor,
        ):
            return cursor.to_list()

    def ids_that_are_no_text(self) -> Iterator[object]:
        """Yield the ``user_id`` of each document in which it is no text; None where it has none."""
        with (
            mongo_errors("Reading users"),
            self.users.find(NAMELESS, {"_id": 0, "user_id": 1}, batch_size=CHUNK) as cursor,
        ):
            for found in cursor:
                yield found.get("user_id")

    def estimated_count(self) -> int:
        """Return about how many documents there are."""
        with mongo_errors("Counting users"):
            return self.users.estimated_document_count()

    def versioned_among(self, keys: Sequence[str]) -> set[str]:
        """Return those of ``keys`` that have a version entry."""
        with mongo_errors("Reading versions"):
            return {found["_id"] for found in self.versions.find({"_id": {"$in": list(keys)}}, {"_id": 1})}

    def count_of(self, key: str) -> int:
        """Return how many documents one user has."""
        with mongo_errors("Counting a user's documents"):
            return self.users.count_documents({"user_id": key})

    def repeated_among(self, keys: Sequence[str]) -> set[str]:
        """Return those of ``keys`` that have several documents, which only the unique index rules out."""
        with mongo_errors("Reading users"):
            found = self.users.find({"user_id": {"$in": list(keys)}}, {"_id": 0, "user_id": 1})
            counts = Counter(str(user["user_id"]) for user in found)
        return {key for key in keys if counts[key] > 1}

    def versions_by_id(self, keys: Sequence[str]) -> dict[str, StoredVersion]:
        """Return the version entries of ``keys``."""
        with mongo_errors("Reading versions"):
            found = self.versions.find({"_id": {"$in": list(keys)}})
            return {entry["_id"]: StoredVersion(entry["created_at"], entry["id"], entry["load"]) for entry in found}

    def deleted_among(self, keys: Sequence[str]) -> set[str]:
        """Return those of ``keys`` that the change stream has deleted."""
        with mongo_errors("Reading deletions"):
            return {found["_id"] for found in self.deleted.find({"_id": {"$in": list(keys)}}, {"_id": 1})}

    def any_deleted(self) -> bool:
        """Tell whether the change stream has recorded any deletion."""
        with mongo_errors("Reading deletions"):
            return self.deleted.find_one({}, {"_id": 1}) is not None

    # Versions

    def insert_versions(
        self, entries: Iterable[tuple[str, str, int]], load: str, *, before_each: Callable[[], None]
    ) -> int:
        """Write version entries ``(user_id, created_at, event id)``; return how many.

        ``before_each`` is called before each command. An entry that is there already is kept: what stood there
        before the load was dropped first, so it is this load's own.
        """
        written = 0
        with mongo_errors("Writing versions"):
            for part in chunks(entries, 5 * CHUNK):
                before_each()
                documents = [{"_id": key, "created_at": at, "id": number, "load": load} for key, at, number in part]
                written += len(part) - len(insert_new(self.versions, documents))
        return written

    def drop_versions(self, keys: Iterable[str]) -> int:
        """Drop the version entries of ``keys``; return how many there were."""
        dropped = 0
        with mongo_errors("Dropping versions"):
            for part in chunks(keys):
                dropped += self.versions.delete_many({"_id": {"$in": part}}).deleted_count
        return dropped

    def move_versions(self, moves: Iterable[VersionMove]) -> None:
        """Move version entries on to newer events; an entry that is gone stays gone."""
        with mongo_errors("Moving versions"):
            for part in chunks(moves):
                self.versions.bulk_write([move.as_update() for move in part], ordered=False)

    def drop_all_versions(self) -> None:
        """Drop every version entry."""
        with mongo_errors("Dropping versions"):
            self.versions.delete_many({})

    def versions_of_load(self, load: str) -> Iterator[str]:
        """Yield the users whose version entry was last written by ``load``."""
        with mongo_errors("Reading versions"):
            for found in self.versions.find({"load": load}, {"_id": 1}):
                yield found["_id"]

    # Replacing what a load itself wrote

    def write_undo(self, old: Iterable[Document], load: str) -> None:
        """Keep the documents that ``load`` is about to replace, so that recovery can put them back.

        The log is empty when a load begins, so a user that is in it already is refused.
        """
        with mongo_errors("Writing the undo log"):
            for part in chunks(old):
                entries = [{"_id": user["user_id"], "user": user, "load": load} for user in part]
                self.undo.insert_many(entries, ordered=False)

    def undo_by_id(self, keys: Sequence[str]) -> dict[str, Document]:
        """Return the old documents that ``write_undo`` kept for ``keys``."""
        with mongo_errors("Reading the undo log"):
            return {found["_id"]: found["user"] for found in self.undo.find({"_id": {"$in": list(keys)}})}

    def forget_undo(self, keys: Iterable[str]) -> None:
        """Forget the undo entries of ``keys``."""
        with mongo_errors("Clearing the undo log"):
            for part in chunks(keys):
                self.undo.delete_many({"_id": {"$in": part}})

    def clear_undo(self) -> None:
        """Forget every undo entry."""
        with mongo_errors("Clearing the undo log"):
            self.undo.delete_many({})

    def replace_unchanged(self, changes: Iterable[tuple[Document, Document]]) -> None:
        """For each ``(old, new)`` replace the user that is still exactly ``old`` by ``new``, marked."""
        with mongo_errors("Replacing users"):
            for part in chunks(changes):
                self.users.bulk_write(
                    [_replace_where(_is_exactly(old), old["user_id"], {**new, **_MARKED}) for old, new in part],
                    ordered=False,
                )

    def put_back(self, old: Iterable[Document]) -> None:
        """Put users back as they were, where the document still carries the marker."""
        marked = {"$eq": [f"${MARKER_FIELD}", MARKER_VALUE]}
        with mongo_errors("Putting users back"):
            for part in chunks(old):
                self.users.bulk_write([_replace_where(marked, user["user_id"], user) for user in part], ordered=False)

    # Load records and the lease

    def unfinished_loads(self) -> list[Document]:
        """Return the records of loads that did not finish, oldest first."""
        with mongo_errors("Reading load records"):
            return list(self.loads.find({"state": {"$ne": "done"}}).sort("started_at", 1))

    def record_load(self, load: str, **fields: object) -> None:
        """Create or update the record of one load."""
        with mongo_errors("Recording the load"):
            self.loads.update_one({"_id": load}, {"$set": fields}, upsert=True)

    def server_time(self) -> datetime:
        """Return the server's clock, the one by which leases run."""
        with mongo_errors("Asking the server's time"):
            # Without the options it would be a time without zone, which can't be compared with a lease's end.
            answer = self.client.admin.command("hello", codec_options=self.client.codec_options)
        now: datetime = answer["localTime"]
        return now

    def lease(self, name: str) -> Lease | None:
        """Return the lease ``name`` as it stands; None where nobody holds it."""
        with mongo_errors("Reading the lease"):
            found = self.leases.find_one({"_id": name})
        return Lease(found["token"], found["holder"], found["expires_at"], found.get("writer")) if found else None

    def take_lease(self, name: str, lease: Lease, *, instead_of: Lease | None) -> bool:
        """Take the lease where nobody holds it, or where ``instead_of`` stands unrenewed; tell whether it worked."""
        document = {"token": lease.token, "holder": lease.holder, "expires_at": lease.expires_at}
        with mongo_errors("Taking the lease"):
            if instead_of is not None:
                unrenewed = {"_id": name, "token": instead_of.token, "expires_at": instead_of.expires_at}
                return self.leases.replace_one(unrenewed, document).matched_count == 1
            try:
                self.leases.insert_one({"_id": name, **document})
            except DuplicateKeyError:
                return False
            return True

    def name_writer(self, name: str, token: str, writer: str) -> bool:
        """Note a process that writes for the holder; tell whether ``token`` still holds the lease."""
        with mongo_errors("Naming the writer"):
            found = self.leases.update_one({"_id": name, "token": token}, {"$set": {"writer": writer}})
        return found.matched_count == 1

    def extend_lease(self, name: str, token: str, expires_at: datetime) -> bool:
        """Move the lease's end; tell whether ``token`` still holds it."""
        with mongo_errors("Extending the lease"):
            found = self.leases.update_one({"_id": name, "token": token}, {"$set": {"expires_at": expires_at}})
        return found.matched_count == 1

    def release_lease(self, name: str, token: str) -> None:
        """Give the lease back, where ``token`` still holds it."""
        with mongo_errors("Releasing the lease"):
            self.leases.delete_one({"_id": name, "token": token})


@dataclass(frozen=True, slots=True)
class VersionMove:
    """A version entry's way to a newer event.

    Attributes:
        key: The user.
        created_at: The newer event's time.
        event_id: The newer event's id.
        load: The load that replaces the document too; None where only the version moves.
    """

    key: str
    created_at: str
    event_id: int
    load: str | None = None

    def as_update(self) -> UpdateOne:
        """Return the move as one update that creates nothing."""
        new = {"created_at": self.created_at, "id": self.event_id}
        return UpdateOne({"_id": self.key}, {"$set": new if self.load is None else {**new, "load": self.load}})


def _is_exactly(user: Document) -> Document:
    """Return the condition that a document holds exactly these five fields, unmarked."""
    fields = [{"$eq": [f"${field}", {"$literal": user.get(field)}]} for field in USER_FIELDS]
    return {"$and": [*fields, {"$eq": [{"$type": f"${MARKER_FIELD}"}, "missing"]}]}


def _replace_where(condition: Document, key: str, new: Document) -> UpdateOne:
    # $literal, because a text that starts with $ would be read as a field path.
    body = {"_id": "$_id", **{field: {"$literal": value} for field, value in new.items()}}
    return UpdateOne({"user_id": key}, [{"$replaceWith": {"$cond": [condition, body, "$$ROOT"]}}])


def chunks(items: Iterable[T], size: int = CHUNK) -> Iterator[list[T]]:
    """Yield lists of up to ``size`` items.

    >>> list(chunks("abcde", 2))
    [['a', 'b'], ['c', 'd'], ['e']]
    """
    source = iter(items)
    while part := list(islice(source, size)):
        yield part
