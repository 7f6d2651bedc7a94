"""The required setup of the users' collection: its kind, validator and indexes.

Belongs here: what is compared before a load, reading only, and what is created if it is missing. Not here: users.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pymongo
from pymongo.errors import ConnectionFailure, OperationFailure, PyMongoError

from ghsync_dagster.domain.errors import RefusedError, UnavailableError
from ghsync_dagster.domain.user import USER_FIELDS, json_schema
from ghsync_dagster.stores.mongo.client import FAIL_FAST_SECONDS, LEASES, MongoStore
from ghsync_dagster.stores.mongo.commands import Commands, Document
from ghsync_dagster.stores.mongo.errors import mongo_errors
from ghsync_dagster.stores.mongo.guard import TimeLimit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

UNIQUE_INDEX: Final = "user_id_unique"
BOOKS: Final = ("versions", "deleted", "undo", "loads")
"""The books that loads and the stream both write."""
_COMMAND_SECONDS: Final = 60.0
"""How long one command may take that sets the collection up."""
_ACTIONS: Final = frozenset({"find", "insert", "update", "remove"})
_OTHER_COLLECTION: Final = "name another collection (MONGODB_COLLECTION)"


@dataclass(frozen=True, slots=True)
class _Index:
    """One index, as far as it decides which users can be stored."""

    name: str
    keys: tuple[tuple[str, Any], ...]
    unique: bool
    sparse: bool
    partial: bool
    collation: str | None

    @classmethod
    def of(cls, listed: Mapping[str, Any]) -> _Index:
        return cls(
            name=listed["name"],
            keys=tuple(listed["key"].items()),
            unique=listed.get("unique", False),
            sparse=listed.get("sparse", False),
            partial="partialFilterExpression" in listed,
            collation=listed.get("collation", {}).get("locale"),
        )

    @property
    def keeps_users_apart(self) -> bool:
        """Whether it lets in one document a ``user_id``, over every document, and serves look-ups by it."""
        return self.unique and self.keys == (("user_id", 1),) and not (self.sparse or self.partial or self.collation)

    @property
    def refuses_users(self) -> bool:
        """Whether it may refuse a user whose ``user_id`` is new."""
        fields = dict(self.keys).keys()
        # A user has no other fields than these, and a sparse index skips documents without its fields.
        covers_some = not self.sparse or not fields.isdisjoint(USER_FIELDS)
        # An _id is new for each document. Only a clustered collection says that its index is unique.
        return self.unique and fields != {"_id"} and covers_some and ("user_id" not in fields or bool(self.collation))


class UsersCollection(MongoStore):
    """The users' collection with its books as a whole: whether it is set up as required, and its creation."""

    def ping(self) -> None:
        """Check within seconds that the server can be reached and accepts the account.

        Raises:
            UnavailableError: The server can't be reached.
            RefusedError: The server refuses the account.
            ConfigError: The URI is malformed.
        """
        self._fail_fast(lambda: self.database.command("ping"))

    def check_collection(self) -> None:
        """Find within seconds what stands in the way of storing users, reading only.

        Raises:
            UnavailableError: The server can't be reached, or is no primary.
            RefusedError: The server refuses the account, the account may not write, or the collection can't hold users
                as it is set up.
            ConfigError: The URI is malformed.
        """

        def check() -> None:
            self._check_setup()
            self._refuse_rights()

        self._fail_fast(check)

    def _fail_fast(self, check: Callable[[], object]) -> None:
        """Check with a short timeout, as an address may be wrong; if a member answers, wait out an election."""
        seconds = self.timeout_ms / 1000
        with mongo_errors("Looking at MongoDB before any work"):
            try:
                with pymongo.timeout(min(FAIL_FAST_SECONDS, seconds)):
                    check()
            except PyMongoError as error:
                members = self.database.client.topology_description.server_descriptions().values()
                is_known = any(member.is_server_type_known for member in members)
                if not isinstance(error, ConnectionFailure) or not is_known:
                    raise
                with pymongo.timeout(seconds):
                    check()

    def _refuse_rights(self) -> None:
        """Raise where the server is no primary, or says that the account may not write."""
        client = self.database.client
        answer = client.admin.command("hello")
        if not answer.get("isWritablePrimary", answer.get("ismaster", True)):
            raise UnavailableError(
                f"MongoDB at {answer.get('me', 'the address given')} is no primary: nothing can be written there.",
                way_out="Name the replica set in MONGODB_URI, without directConnection.",
            )
        account = client.admin.command({"connectionStatus": 1, "showPrivileges": True}).get("authInfo", {})
        users, privileges = account.get("authenticatedUsers"), account.get("authenticatedUserPrivileges")
        # Without authentication everybody may write; some compatible servers do not report it.
        if users and privileges:
            covering = (given["actions"] for given in privileges if self._is_covered(given["resource"]))
            if missing := sorted(_ACTIONS.difference(*covering)):
                raise RefusedError(
                    f"MongoDB's account {users[0].get('user')} may not {', '.join(missing)} in {self.users.full_name}.",
                    way_out=f"Grant it the role readWrite on {self.database.name}, or name another in MONGODB_URI.",
                )

    def _is_covered(self, resource: Mapping[str, Any]) -> bool:
        """Return whether a privilege's resource covers the collection."""
        if resource.get("anyResource"):
            return True
        # An empty text stands for any.
        databases, collections = ("", self.database.name), ("", self.users.name)
        return resource.get("db") in databases and resource.get("collection") in collections

    def ensure_collection(self) -> None:
        """Create the collection with its validator and unique index, or compare what is there.

        Raises:
            RefusedError: The collection is set up in another way; nothing is changed then.
        """
        commands = Commands(TimeLimit(_COMMAND_SECONDS))
        with mongo_errors(f"Preparing {self.users.full_name}"):
            self._check_setup()
            present = set(self.database.list_collection_names())
        # Not left to the first write: if a load and the stream both create it, some servers fail.
        for book in (*map(self.book, BOOKS), self.database[LEASES]):
            if book.name not in present:
                commands.make_collection(self.database, book.name)
        if (repairs := self.book("repairs")).name not in present:
            # Makes the collection too.
            commands.on(repairs).ensure_index("state")
        if self.users.name not in present:
            commands.make_collection(self.database, self.users.name, validator=_contract())
        if not self.validator():
            change = {"validator": _contract(), "validationLevel": "strict", "validationAction": "error"}
            commands.change_collection(self.database, self.users.name, **change)
        if not self.has_unique_index():
            commands.on(self.users).ensure_index("user_id", unique=True, name=UNIQUE_INDEX)
        if self.book("again").name in present:
            self._move_rewinds(commands)

    def _move_rewinds(self, commands: Commands) -> None:
        """Move what a build before 0.2 left in ``_ghsync_again``, which is the book of rewind requests now."""
        old = commands.on(self.book("again"))
        with mongo_errors("Reading rewind requests"):
            left = list(old.reads.find({}))
        for request in left:
            fields = {"$min": {"offset": request["offset"]}, "$set": {"token": request.get("asking")}}
            commands.on(self.book("rewinds")).update({"_id": request["_id"]}, fields, upsert=True)
        if left:
            old.discard()

    def validator(self) -> Document | None:
        """Return the collection's validator; None where it has none or does not exist."""
        with mongo_errors("Reading the validator"):
            validator: Document | None = self._listed().get("options", {}).get("validator")
            return validator

    def has_unique_index(self) -> bool:
        """Return whether exactly ``user_id`` is under a unique index that covers every document."""
        return any(index.keeps_users_apart for index in self._indexes())

    def _listed(self) -> Document:
        """Return the collection as the server lists it; nothing where it does not exist."""
        return {**next(iter(self.database.list_collections(filter={"name": self.users.name})), {})}

    def _indexes(self) -> list[_Index]:
        with mongo_errors("Reading the indexes"):
            return [_Index.of(listed) for listed in self.users.list_indexes()]

    def _check_setup(self) -> None:
        """Raise if the collection exists and is set up in another way."""
        if not (listed := self._listed()):
            self._refuse_like_database()
            return
        name, options = self.users.full_name, listed.get("options", {})
        _refuse_kind(name, listed.get("type", "collection"), options)
        empty = self.users.find_one({}, {"_id": 1}) is None
        _refuse_validator(name, options, empty=empty)
        _refuse_indexes(name, self._indexes(), empty=empty)

    def _refuse_like_database(self) -> None:
        """Raise where the server has a database of this name in another case, alongside which it makes none."""
        own = self.database.name
        try:
            names = self.database.client.list_database_names()
        except OperationFailure:
            # The account may not list them; the first write reports the conflict.
            return
        if own not in names and (like := next((name for name in names if name.lower() == own.lower()), None)):
            raise RefusedError(
                f"MongoDB has a database {like} and makes none alongside it whose name differs in case only, as {own}.",
                way_out=f"Set MONGODB_DATABASE={like}, or name another database.",
            )


def _contract() -> Document:
    return {"$jsonSchema": json_schema()}


def _refuse_kind(name: str, kind: str, options: Document) -> None:
    if kind == "view":
        raise RefusedError(
            f"{name} is a view on {options.get('viewOn')}: nothing can be stored in it.",
            way_out=f"Drop the view, or {_OTHER_COLLECTION}.",
        )
    if kind != "collection":
        raise RefusedError(
            f"{name} is a {kind} collection: it has no unique index, and its documents can't be replaced one by one.",
            way_out=f"Drop it, or {_OTHER_COLLECTION}.",
        )
    if options.get("capped"):
        raise RefusedError(
            f"{name} is a capped collection: it drops its oldest users when it is full.",
            way_out=f"Copy the documents into a collection that is not capped, or {_OTHER_COLLECTION}.",
        )
    if locale := options.get("collation", {}).get("locale"):
        raise RefusedError(
            f"{name} compares text by the collation {locale!r}: different users may count as one.",
            way_out=f"Copy the documents into a collection without a collation, or {_OTHER_COLLECTION}.",
        )


def _refuse_validator(name: str, options: Document, *, empty: bool) -> None:
    found = options.get("validator")
    enforced = (options.get("validationLevel", "strict"), options.get("validationAction", "error"))
    if found == _contract() and enforced == ("strict", "error"):
        return
    if not found and empty:
        return
    if empty:
        collection = name.partition(".")[2]
        raise RefusedError(
            f"{name} is empty and has another validator than ghsync's, or does not enforce it.",
            way_out=f"Drop the collection, and ghsync creates it: db.{collection}.drop(). Or {_OTHER_COLLECTION}.",
        )
    raise RefusedError(
        f"{name} holds documents and has another validator, or none, or does not enforce it.",
        way_out="Check the documents against docs/reference/collections.md, then set the validator that it shows with "
        "collMod.",
    )


def _refuse_indexes(name: str, indexes: Sequence[_Index], *, empty: bool) -> None:
    collection = name.partition(".")[2]
    if foreign := next((index for index in indexes if index.refuses_users), None):
        fields = ", ".join(field for field, _ in foreign.keys)
        collation = f" by the collation {foreign.collation!r}" if foreign.collation else ""
        raise RefusedError(
            f"{name} has a unique index on {fields}{collation}, {foreign.name}: it refuses users that differ in "
            "user_id.",
            way_out=f"Drop it, or make it anew without unique: db.{collection}.dropIndex({foreign.name!r}).",
        )
    if empty or any(index.keeps_users_apart for index in indexes):
        return
    near = next((index for index in indexes if index.unique and dict(index.keys).keys() == {"user_id"}), None)
    why = (
        ""
        if near is None
        else f": {near.name} " + ("leaves documents out" if (near.partial or near.sparse) else "is not ascending")
    )
    raise RefusedError(
        f"{name} holds documents and has no unique index on user_id{why}.",
        way_out="Remove duplicate users, then create a unique index: "
        f"db.{collection}.createIndex({{user_id: 1}}, {{unique: true}}).",
    )
