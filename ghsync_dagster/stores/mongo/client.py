"""MongoDB: a client with our concerns, and the names of the collections.

Belongs here: how connections are opened and closed. Not here: what is read or written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Self

from pymongo import MongoClient, ReadPreference, WriteConcern
from pymongo.errors import InvalidURI

from ghsync_dagster.logging import redact
from ghsync_dagster.stores.mongo.errors import mongo_errors
from ghsync_dagster.stores.mongo.uri import tls_files

if TYPE_CHECKING:
    from pymongo.collection import Collection
    from pymongo.database import Database

    from ghsync_dagster.stores.mongo.commands import Document

FAIL_FAST_SECONDS: Final = 2.5
"""How long the check before a run waits for DNS, and for the server: a mistyped address is reported at once."""
CONFIRM_MS: Final = 60_000
"""How long a majority may take to confirm a write, before the write counts as not confirmed."""
_DEFAULT_COLLECTION: Final = "Users"
LEASES: Final = "_ghsync_leases"
"""The book of leases, one for all users' collections of a database."""


class MongoStore:
    """The users' collection with its books, over one client. Use it as a context manager, or call ``close``.

    Args:
        uri: A MongoDB URI.
        database: The database.
        collection: The users' collection in it.
        timeout_seconds: How long one command waits for a server.
        fails_fast: Whether it is opened for the check before a run, with short timeouts.

    Raises:
        ConfigError: The URI is malformed.
        UnavailableError: The host can't be looked up.
    """

    def __init__(
        self, uri: str, database: str, collection: str, *, timeout_seconds: float = 10, fails_fast: bool = False
    ) -> None:
        self.uri = uri
        self.timeout_ms = int(timeout_seconds * 1000)
        # For mongodb+srv:// the client queries DNS at once, by default for up to 20 s.
        connect_ms = min(self.timeout_ms, int(FAIL_FAST_SECONDS * 1000))
        timeouts: Document = {"connectTimeoutMS": connect_ms} if fails_fast else {}
        with mongo_errors("Connecting"), tls_files():
            try:
                self.client: MongoClient[Document] = MongoClient(
                    uri, serverSelectionTimeoutMS=self.timeout_ms, appname="ghsync", tz_aware=True, **timeouts
                )
            except ValueError as error:
                # Such as a port that is no number, which pymongo does not wrap.
                raise InvalidURI(redact(str(error))) from None
        # Decisions need what was written last: a URI that prefers secondaries must not make them stale.
        # An acknowledged write must survive a failover: a URI with w=1 or w=0 must not weaken it.
        concern = WriteConcern("majority", wtimeout=CONFIRM_MS)
        self.database: Database[Document] = self.client.get_database(
            database, read_preference=ReadPreference.PRIMARY, write_concern=concern
        )
        self.users: Collection[Document] = self.database[collection]
        # Another users' collection of the same database has its own books.
        self._prefix = "_ghsync_" if collection == _DEFAULT_COLLECTION else f"_ghsync_{collection}_"

    def book(self, name: str) -> Collection[Document]:
        """Return a collection of the platform's own that belongs to the users' collection."""
        return self.database[f"{self._prefix}{name}"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the client's connections."""
        self.client.close()
