"""MongoDB: reads of the stored users and of their books.

Belongs here: single reads. Not here: writing (``writer``, ``books``), and the order of operations, which is a
protocol's. Filters name one indexed field only, so that every server uses the index.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ghsync_dagster.chunks import CHUNK
from ghsync_dagster.domain.user import MARKER_FIELD, json_schema
from ghsync_dagster.stores.mongo.errors import mongo_errors
from ghsync_dagster.stores.mongo.schema import UsersCollection

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ghsync_dagster.stores.mongo.commands import Document

# The first condition takes an array for text if one of its members is text.
NAMELESS: Final[Document] = {"$or": [{"user_id": {"$not": {"$type": "string"}}}, {"user_id": {"$type": "array"}}]}
"""Matches the users whose ``user_id`` is no text."""


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


class UserStore(UsersCollection):
    """The users' collection and its books, for reading."""

    # The whole collection

    def nonconforming(self, limit: int) -> tuple[int, list[Document]]:
        """Return how many documents break the contract, the marker included, and up to ``limit`` of them."""
        query = {"$nor": [{"$jsonSchema": json_schema()}]}
        with mongo_errors("Checking the contract"):
            total = self.users.count_documents(query)
            return total, list(self.users.find(query).limit(limit)) if total else []

    # The marker

    def count_marked(self) -> int:
        """Return how many documents carry the marker field, with any value."""
        with mongo_errors("Counting markers"):
            return self.users.count_documents({MARKER_FIELD: {"$exists": True}})

    def is_empty(self) -> bool:
        """Return whether the collection has no document at all."""
        with mongo_errors("Reading users"):
            return self.users.find_one({}, {"_id": 1}) is None

    def marked(self, limit: int = 0) -> Iterator[Document]:
        """Yield the documents that carry the marker, the five fields and the marker."""
        with mongo_errors("Reading marked users"):
            yield from self.users.find({MARKER_FIELD: {"$exists": True}}, {"_id": 0}).limit(limit)

    # Reading by keys

    def users_by_id(self, keys: Sequence[str]) -> dict[str, Document]:
        """Return the stored documents of ``keys``, without ``_id``."""
        with mongo_errors("Reading users"):
            return {found["user_id"]: found for found in self.users.find({"user_id": {"$in": list(keys)}}, {"_id": 0})}

    def page(self, after: str | None, upto: str | None, limit: int) -> list[Document]:
        """Return up to ``limit`` whole documents by ``user_id`` in the order of text.

        If possible, give both ends: some servers do not stop reading at the limit.

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
            # Without a projection: it would cost the server more time than it saves on a few fields.
            self.users.find({"user_id": bounds}, sort=[("user_id", 1)], limit=limit, batch_size=limit) as cursor,
        ):
            return cursor.to_list()

    def ids_that_are_no_text(self) -> Iterator[object]:
        """Yield the ``user_id`` of each document in which it is no text; None if it has none."""
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
        return self._ids_among("versions", keys, "Reading versions")

    def count_of(self, key: str) -> int:
        """Return how many documents one user has."""
        with mongo_errors("Counting a user's documents"):
            return self.users.count_documents({"user_id": key})

    def repeated_among(self, keys: Sequence[str]) -> set[str]:
        """Return those of ``keys`` that have several documents, which only the unique index prevents."""
        with mongo_errors("Reading users"):
            found = self.users.find({"user_id": {"$in": list(keys)}}, {"_id": 0, "user_id": 1})
            counts = Counter(str(user["user_id"]) for user in found)
        return {key for key in keys if counts[key] > 1}

    def versions_by_id(self, keys: Sequence[str]) -> dict[str, StoredVersion]:
        """Return the version entries of ``keys``."""
        with mongo_errors("Reading versions"):
            found = self.book("versions").find({"_id": {"$in": list(keys)}})
            return {entry["_id"]: StoredVersion(entry["created_at"], entry["id"], entry["load"]) for entry in found}

    def deleted_among(self, keys: Sequence[str]) -> set[str]:
        """Return those of ``keys`` that the change stream has deleted."""
        return self._ids_among("deleted", keys, "Reading deletions")

    def _ids_among(self, book: str, keys: Sequence[str], what: str) -> set[str]:
        with mongo_errors(what):
            return {found["_id"] for found in self.book(book).find({"_id": {"$in": list(keys)}}, {"_id": 1})}

    def any_deleted(self) -> bool:
        """Return whether the change stream has recorded any deletion."""
        with mongo_errors("Reading deletions"):
            return self.book("deleted").find_one({}, {"_id": 1}) is not None

    def versions_of_load(self, load: str) -> Iterator[str]:
        """Yield the users whose version entry was last written by ``load``."""
        with mongo_errors("Reading versions"):
            for found in self.book("versions").find({"load": load}, {"_id": 1}):
                yield found["_id"]

    def undo_by_id(self, keys: Sequence[str]) -> dict[str, Document]:
        """Return the old documents that ``write_undo`` kept for ``keys``."""
        with mongo_errors("Reading the undo log"):
            return {found["_id"]: found["user"] for found in self.book("undo").find({"_id": {"$in": list(keys)}})}

    def unfinished_loads(self) -> list[Document]:
        """Return the records of loads that did not finish, oldest first."""
        with mongo_errors("Reading load records"):
            return list(self.book("loads").find({"state": {"$ne": "done"}}).sort("started_at", 1))
