"""The one way to write to MongoDB: a command passes its guard, has a time limit, and its failure is translated.

Belongs here: every call of the driver that writes. Not here: what is written (the other modules of this package), and
in which order (the protocols).
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import pymongo
from pymongo.errors import (
    BulkWriteError,
    CollectionInvalid,
    ConnectionFailure,
    DuplicateKeyError,
    ExecutionTimeout,
    NetworkTimeout,
    OperationFailure,
    PyMongoError,
)

from ghsync_dagster import clock
from ghsync_dagster.chunks import chunks
from ghsync_dagster.domain.errors import RefusedError, UnavailableError
from ghsync_dagster.logging import redact
from ghsync_dagster.stores.mongo.errors import DUPLICATE_KEY, PASSING, mongo_errors

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Sequence

    from pymongo import DeleteMany, InsertOne, ReplaceOne, UpdateOne
    from pymongo.collection import Collection
    from pymongo.database import Database

    from ghsync_dagster.stores.mongo.guard import Guard

    Write = InsertOne[dict[str, Any]] | ReplaceOne[dict[str, Any]] | UpdateOne | DeleteMany

Document = dict[str, Any]

KEYS: Final = 200
"""How many keys one ``$in`` carries, if the number matters: some servers compare each document with the whole list."""
TEXT: Final = 500
"""How many characters of the database's own message are kept."""
_NAMESPACE_EXISTS: Final = 48


@contextmanager
def limited(what: str, seconds: float | None) -> Iterator[None]:
    """Limit the time of commands, and translate their failures."""
    with mongo_errors(what):
        try:
            with pymongo.timeout(seconds):
                yield
        except PyMongoError as error:
            if error.timeout and not isinstance(error, ConnectionFailure | ExecutionTimeout):
                raise NetworkTimeout(str(error)) from error
            raise


class Commands:
    """Sends commands under one guard.

    Attributes:
        guard: Called before each command.
        in_doubt: Whether a command may still reach the server, or reached it after its time. The owner resets it.
    """

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.in_doubt = False

    @contextmanager
    def send(self, what: str) -> Iterator[None]:
        """Allow one command to be sent, for a limited time, and translate its failure.

        Args:
            what: What it does, such as ``Reading users``.

        Raises:
            GhsyncError: The guard does not allow it.
            UnavailableError: The server became unavailable; the command may be done or not.
            RefusedError: The server refuses the command as such.
        """
        seconds = self.guard.allow()
        deadline = float("inf") if seconds is None else clock.now() + seconds
        try:
            with limited(what, seconds):
                yield
        except UnavailableError:
            self.in_doubt = True
            raise
        finally:
            if clock.now() > deadline:
                self.in_doubt = True

    def among(self, collection: Collection[Document], keys: Iterable[str]) -> set[str]:
        """Return those of ``keys`` that are an ``_id`` in a collection."""
        found: set[str] = set()
        for part in chunks(keys, KEYS):
            with self.send(f"Reading {collection.name}"):
                found.update([entry["_id"] for entry in collection.find({"_id": {"$in": part}}, {"_id": 1})])
        return found

    def on(self, collection: Collection[Document]) -> GuardedCollection:
        """Return a collection that is written under this guard."""
        return GuardedCollection(collection, self)

    def make_collection(self, database: Database[Document], name: str, **options: Any) -> None:  # noqa: ANN401
        """Create a collection, unless it exists by now."""
        with self.send(f"Creating {name}"):
            try:
                database.create_collection(name, **options)
            except (CollectionInvalid, OperationFailure) as error:
                if isinstance(error, OperationFailure) and error.code != _NAMESPACE_EXISTS:
                    raise

    def change_collection(self, database: Database[Document], name: str, **options: Any) -> None:  # noqa: ANN401
        """Change a collection's options."""
        # A plain command does not inherit the database's write concern.
        concern = database.write_concern.document
        with self.send(f"Changing {name}"):
            database.command({"collMod": name, **options, "writeConcern": concern})


class GuardedCollection:
    """A collection for writing: each method is one command, which its guard must allow.

    Args:
        collection: The driver's own, for reading.
        commands: Sends the commands.
    """

    def __init__(self, collection: Collection[Document], commands: Commands) -> None:
        self.reads = collection
        self._commands = commands
        self._what = f"Writing {collection.name}"

    def insert_new(self, documents: Sequence[Document]) -> list[Document]:
        """Insert documents, which costs less than replacing them; return those whose ``_id`` exists already."""
        if not documents:
            return []
        with self._commands.send(self._what):
            try:
                self.reads.insert_many(documents, ordered=False)
            except BulkWriteError as error:
                return [documents[item["index"]] for item in _expected(error, {DUPLICATE_KEY})]
        return []

    def insert(self, document: Document) -> bool:
        """Insert a document; return whether its ``_id`` was new."""
        with self._commands.send(self._what):
            try:
                self.reads.insert_one(document)
            except DuplicateKeyError:
                return False
        return True

    def bulk(self, writes: Sequence[Write]) -> int:
        """Send writes of several documents in any order; return how many were changed.

        Raises:
            RefusedError: A write failed.
            UnavailableError: A majority did not confirm, or the server cannot write now.
        """
        if not writes:
            return 0
        with self._commands.send(self._what):
            try:
                return self.reads.bulk_write(writes, ordered=False).modified_count
            except BulkWriteError as error:
                _expected(error, ())
                raise

    def try_bulk(self, writes: Sequence[Write], expected: Container[int]) -> list[Document]:
        """Send writes as ``bulk`` does; return the errors of those that failed.

        Args:
            writes: The writes.
            expected: Error codes that concern the one write, and raise nothing.
        """
        with self._commands.send(self._what):
            try:
                self.reads.bulk_write(writes, ordered=False)
            except BulkWriteError as error:
                return _expected(error, expected)
        return []

    def update(self, query: Document, update: Document, *, upsert: bool = False) -> bool:
        """Update one document; return whether there was one."""
        with self._commands.send(self._what):
            return self.reads.update_one(query, update, upsert=upsert).matched_count == 1

    def update_all(self, query: Document, update: Document | list[Document]) -> int:
        """Update documents; return how many were changed."""
        with self._commands.send(self._what):
            return self.reads.update_many(query, update).modified_count

    def replace(self, query: Document, document: Document, *, upsert: bool = False) -> bool:
        """Replace one document; return whether there was one."""
        with self._commands.send(self._what):
            return self.reads.replace_one(query, document, upsert=upsert).matched_count == 1

    def delete(self, query: Document) -> int:
        """Delete documents; return how many there were."""
        with self._commands.send(self._what):
            return self.reads.delete_many(query).deleted_count

    def ensure_index(self, keys: str | list[tuple[str, int]], **options: Any) -> None:  # noqa: ANN401
        """Create an index, and the collection, if they do not exist."""
        with self._commands.send(f"Creating an index of {self.reads.name}"):
            self.reads.create_index(keys, **options)

    def discard(self) -> None:
        """Drop the collection."""
        with self._commands.send(f"Dropping {self.reads.name}"):
            self.reads.drop()


def _expected(error: BulkWriteError, codes: Container[int]) -> list[Document]:
    """Return the errors of a bulk's single writes; raise if one has another code than expected."""
    if unconfirmed := error.details.get("writeConcernErrors"):
        raise UnavailableError(
            f"Writing: MongoDB did not confirm ({redact(str(unconfirmed[0].get('errmsg')))[:TEXT]}).",
            way_out="Run again.",
        )
    failed: list[Document] = error.details["writeErrors"]
    for item in failed:
        if (code := item["code"]) in codes:
            continue
        # Its text may hold values of the user.
        if code in PASSING:
            raise UnavailableError(f"Writing: MongoDB could not write now (code {code}).", way_out="Run again.")
        raise RefusedError(
            f"Writing: MongoDB refused (code {code}).",
            way_out="Look the code up among MongoDB's error codes; check the roles behind MONGODB_URI.",
        )
    return failed


def changed_where(condition: Document, fields: Document) -> list[Document]:
    """Return an update that adds fields to a document if a condition holds, and else leaves it as it is.

    The condition is in the update, not in its query: if a query has more than ``_id``, some servers use no index.
    """
    return replaced_where(condition, {"$mergeObjects": ["$$ROOT", {"$literal": fields}]})


def replaced_where(condition: Document, document: Document) -> list[Document]:
    """Return an update that replaces a document by an expression if a condition holds.

    A text in the expression that may start with ``$`` must be in ``$literal``: else it is read as a field path.
    """
    return [{"$replaceWith": {"$cond": [condition, document, "$$ROOT"]}}]
