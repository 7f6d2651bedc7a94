"""The collection's validator and unique index: created, compared, and never changed under documents."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import pymongo
import pytest
from pymongo import MongoClient, WriteConcern
from pymongo.database import Database
from pymongo.errors import AutoReconnect, DuplicateKeyError, OperationFailure, WriteError
from pymongo.monitoring import CommandFailedEvent, CommandListener, CommandStartedEvent, CommandSucceededEvent

from ghsync_dagster.cdc.stream.apply import apply
from ghsync_dagster.domain.coalesce import Segment
from ghsync_dagster.domain.errors import RefusedError, UnavailableError
from ghsync_dagster.domain.user import json_schema
from ghsync_dagster.stores.mongo import client as mongo
from ghsync_dagster.stores.mongo.client import LEASES
from ghsync_dagster.stores.mongo.users import UserStore
from ghsync_dagster_tests.support.cdc_parts import free_port
from ghsync_dagster_tests.support.guards import writer_of

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.integration

CONTRACT = {"$jsonSchema": json_schema()}
USER = {"user_id": "1", "login": "one", "gravatar_id": None, "avatar_url": "a", "url": "u"}


READS = {"find", "aggregate", "listCollections", "listIndexes", "getMore", "hello", "endSessions"}


class WriteConcerns(CommandListener):
    """The write concern of each command that is no read, by the command's name."""

    def __init__(self) -> None:
        self.sent: dict[str, list[Any]] = {}

    def started(self, event: CommandStartedEvent) -> None:
        """Note what the command asks for."""
        if event.command_name not in READS:
            self.sent.setdefault(event.command_name, []).append(event.command.get("writeConcern"))

    def succeeded(self, event: CommandSucceededEvent) -> None:
        """Nothing is to be noted."""

    def failed(self, event: CommandFailedEvent) -> None:
        """Nothing is to be noted."""


def setup_of(store: UserStore) -> tuple[Any, ...]:
    """Return how the collection is set up, and what it holds."""
    listed = next(iter(store.database.list_collections(filter={"name": store.users.name})))
    return listed["options"], list(store.users.list_indexes()), list(store.users.find())


def test_a_new_collection_gets_the_contract_and_the_unique_index(store: UserStore) -> None:
    store.ensure_collection()
    assert store.validator() == CONTRACT
    assert store.has_unique_index()
    store.users.insert_one(dict(USER))
    with pytest.raises(DuplicateKeyError):
        store.users.insert_one(dict(USER))
    for broken in ({"user_id": 2}, {"user_id": "x"}, {"login": 5}, {"extra": 1}, {"spark_temp": "other"}):
        with pytest.raises(WriteError):
            store.users.insert_one(USER | {"user_id": "2"} | broken)


def test_a_collection_that_is_right_is_left_as_it_is(store: UserStore) -> None:
    store.ensure_collection()
    store.users.insert_one(dict(USER))
    before = setup_of(store)
    store.ensure_collection()
    assert setup_of(store) == before


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"validator": {"$jsonSchema": {"required": ["user_id"]}}},
        {"validator": CONTRACT, "validationAction": "warn"},
        {"validator": CONTRACT, "validationLevel": "off"},
    ],
    ids=["none", "another", "only warns", "off"],
)
def test_a_collection_with_documents_and_another_validator_is_refused_and_unchanged(
    store: UserStore, options: dict[str, Any]
) -> None:
    store.database.create_collection("Users", **options)
    store.users.create_index("user_id", unique=True)
    store.users.insert_one(dict(USER))
    before = setup_of(store)
    with pytest.raises(RefusedError, match=r"Users holds documents and has another validator") as raised:
        store.ensure_collection()
    assert "collMod" in raised.value.way_out
    assert setup_of(store) == before


@pytest.mark.parametrize(
    ("keys", "options"),
    [
        (None, {}),
        ("user_id", {}),
        ([("user_id", 1), ("login", 1)], {"unique": True}),
        ("user_id", {"unique": True, "sparse": True}),
        ("user_id", {"unique": True, "partialFilterExpression": {"login": {"$exists": True}}}),
    ],
    ids=["none", "not unique", "two fields", "sparse", "partial"],
)
def test_a_collection_with_documents_and_no_unique_index_is_refused_and_unchanged(
    store: UserStore, keys: str | list[tuple[str, int]] | None, options: dict[str, Any]
) -> None:
    store.database.create_collection("Users", validator=CONTRACT)
    if keys:
        store.users.create_index(keys, **options)
    store.users.insert_one(dict(USER))
    before = setup_of(store)
    with pytest.raises(RefusedError, match="has no unique index on user_id") as raised:
        store.ensure_collection()
    assert "unique index" in raised.value.way_out
    assert setup_of(store) == before


def test_an_empty_collection_without_a_validator_is_brought_in_order(store: UserStore) -> None:
    store.database.create_collection("Users")
    store.ensure_collection()
    assert store.validator() == CONTRACT
    assert store.has_unique_index()
    with pytest.raises(WriteError):
        store.users.insert_one(USER | {"extra": 1})


HARMLESS: dict[str, tuple[Any, dict[str, Any]]] = {
    "more than user_id": ([("user_id", 1), ("login", 1)], {}),
    "sparse on a field that no user has": ("email", {"sparse": True}),
    "not unique": ("login", {"unique": False}),
}
INDEXED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "login": ("login", {}, "has a unique index on login, login_1: it refuses users that differ in user_id"),
    "a name of somebody's": ([("url", 1), ("login", -1)], {"name": "mine"}, "a unique index on url, login, mine: it"),
    "collation": ("user_id", {"collation": {"locale": "en"}}, "a unique index on user_id by the collation 'en', user_"),
}
CREATED: dict[str, tuple[dict[str, Any], str]] = {
    "view": ({"viewOn": "Other", "pipeline": []}, "is a view on Other"),
    "time series": ({"timeseries": {"timeField": "at"}}, "is a timeseries collection"),
    "capped": ({"capped": True, "size": 100_000}, "is a capped collection"),
    "collation": ({"collation": {"locale": "en", "strength": 1}}, "compares text by the collation 'en'"),
    "another validator": ({"validator": {"a": {"$exists": True}}}, "is empty and has another validator"),
    "only warns": ({"validator": CONTRACT, "validationAction": "warn"}, "is empty and has another validator"),
}


def refused(store: UserStore, words: str) -> None:
    """Hold that the collection is refused both ways, that the words say why, and that nothing is written."""
    before = list(store.database.list_collections()), list(store.users.list_indexes())
    for look in (store.check_collection, store.ensure_collection):
        with pytest.raises(RefusedError) as raised:
            look()
        assert raised.value.message.startswith(store.users.full_name)
        assert words in raised.value.message
        assert raised.value.way_out.startswith(("Drop", "Copy", "Remove"))
    assert (list(store.database.list_collections()), list(store.users.list_indexes())) == before


@pytest.mark.parametrize("kind", CREATED)
def test_a_collection_that_can_t_hold_users_is_refused_and_unchanged(store: UserStore, kind: str) -> None:
    options, words = CREATED[kind]
    store.database.command({"create": "Users", **options})
    refused(store, words)


@pytest.mark.parametrize("kind", INDEXED)
def test_another_unique_index_is_named_and_unchanged(store: UserStore, kind: str) -> None:
    keys, options, words = INDEXED[kind]
    store.database.create_collection("Users", validator=CONTRACT)
    store.users.create_index("user_id", unique=True, name="by_hand")
    store.users.create_index(keys, unique=True, **options)
    refused(store, words)


def test_a_descending_index_is_told_apart_from_none(store: UserStore) -> None:
    store.database.create_collection("Users", validator=CONTRACT)
    store.users.create_index([("user_id", -1)], unique=True)
    store.users.insert_one(dict(USER))
    refused(store, "has no unique index on user_id: user_id_-1 is not ascending")


@pytest.mark.parametrize("kind", HARMLESS)
def test_an_index_that_refuses_no_user_is_left(store: UserStore, kind: str) -> None:
    keys, options = HARMLESS[kind]
    store.ensure_collection()
    store.users.create_index(keys, **{"unique": True, **options})
    store.check_collection()


def test_the_index_of_a_clustered_collection_refuses_no_user(store: UserStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.ensure_collection()
    own = list(store.users.list_indexes())
    # As MongoDB lists it; the embedded server has none.
    clustered = {"v": 2, "key": {"_id": 1}, "name": "by_id", "unique": True, "clustered": True}
    monkeypatch.setattr(store.users, "list_indexes", lambda: [clustered, *own], raising=False)
    store.check_collection()


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Answers to commands by name, in place of the server's: the embedded one has no replicas and tells no rights."""
    given: dict[str, dict[str, Any]] = {}
    real = Database.command

    def command(database: Any, command: Any, *arguments: Any, **more: Any) -> Any:
        name = command if isinstance(command, str) else next(iter(command))
        return given[name] if name in given else real(database, command, *arguments, **more)

    monkeypatch.setattr(Database, "command", command)
    return given


def rights(database: str, collection: str, *actions: str) -> dict[str, Any]:
    """Return what a server tells of an account with one privilege."""
    privilege = {"resource": {"db": database, "collection": collection}, "actions": list(actions)}
    return {"authInfo": {"authenticatedUsers": [{"user": "app"}], "authenticatedUserPrivileges": [privilege]}}


ALL = ("find", "insert", "remove", "update")


def test_an_account_that_may_only_read_is_refused(store: UserStore, answers: dict[str, dict[str, Any]]) -> None:
    own = store.database.name
    for database, named, actions, missing in (
        (own, "", ("find",), "insert, remove, update"),
        (own, "Users", ("find", "insert"), "remove, update"),
        ("elsewhere", "", ALL, "find, insert, remove, update"),
        (own, "Others", ALL, "find, insert, remove, update"),
    ):
        answers["connectionStatus"] = rights(database, named, *actions)
        with pytest.raises(RefusedError) as caught:
            store.check_collection()
        assert caught.value.message == f"MongoDB's account app may not {missing} in {store.users.full_name}."
        assert "readWrite" in caught.value.way_out
    for database, named in ((own, ""), (own, "Users"), ("", ""), ("", "Users")):
        answers["connectionStatus"] = rights(database, named, *ALL)
        store.check_collection()
    answers["connectionStatus"]["authInfo"]["authenticatedUserPrivileges"][0]["resource"] = {"anyResource": True}
    store.check_collection()


def test_a_member_that_is_no_primary_is_refused(store: UserStore, answers: dict[str, dict[str, Any]]) -> None:
    answers["hello"] = {"isWritablePrimary": False, "me": "db2:27017"}
    with pytest.raises(UnavailableError, match="MongoDB at db2:27017 is no primary") as caught:
        store.check_collection()
    assert "directConnection" in caught.value.way_out


def test_an_election_is_awaited_and_a_dead_address_is_not(store: UserStore, monkeypatch: pytest.MonkeyPatch) -> None:
    patience: list[float] = []

    @contextmanager
    def timeout(seconds: float) -> Iterator[None]:
        patience.append(seconds)
        if len(patience) == 1:
            raise AutoReconnect("no primary yet")
        yield

    monkeypatch.setattr(pymongo, "timeout", timeout)
    store.timeout_ms = 9_000
    # The store has answered before, so that one member is known.
    store.is_empty()
    store.check_collection()
    assert patience == [2.5, 9.0]
    patience.clear()
    with UserStore(f"mongodb://127.0.0.1:{free_port()}", "x", "Users") as away, pytest.raises(UnavailableError):
        away.check_collection()
    assert patience == [2.5]


def test_a_look_at_a_collection_that_is_not_there_makes_none(store: UserStore) -> None:
    store.check_collection()
    assert store.database.list_collection_names() == []


def test_a_database_whose_name_differs_in_case_only_is_refused(
    store: UserStore, mongo_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.database["Others"].insert_one({})
    own = store.database.name
    with UserStore(mongo_uri, own.upper(), "Users") as other:
        for look in (other.check_collection, other.ensure_collection):
            with pytest.raises(
                RefusedError, match=f"MongoDB has a database {own} and makes none alongside it"
            ) as caught:
                look()
            assert f"MONGODB_DATABASE={own}," in caught.value.way_out
        # An account that may not list them goes on.
        refusal = OperationFailure("not authorized", 13)
        monkeypatch.setattr(MongoClient, "list_database_names", Mock(side_effect=refusal))
        other.check_collection()
        # Where a server keeps both, both are right.
        monkeypatch.setattr(MongoClient, "list_database_names", lambda _: [own, other.database.name])
        other.check_collection()
    monkeypatch.undo()
    store.check_collection()


def test_an_index_that_makes_user_id_unique_under_another_name_is_enough(store: UserStore) -> None:
    store.database.create_collection("Users", validator=CONTRACT)
    store.users.create_index("user_id", unique=True, name="by_hand")
    store.users.insert_one(dict(USER))
    store.ensure_collection()
    assert set(store.users.index_information()) == {"_id_", "by_hand"}


def test_two_stores_that_set_up_the_collection_at_once_both_succeed(mongo_uri: str, database: str) -> None:
    stores = [UserStore(mongo_uri, database, "Users", timeout_seconds=5) for _ in range(4)]
    try:
        with ThreadPoolExecutor(max_workers=len(stores)) as pool:
            for done in [pool.submit(store.ensure_collection) for store in stores]:
                done.result()
        assert stores[0].validator() == CONTRACT
        assert stores[0].has_unique_index()
        assert len(stores[0].users.index_information()) == 2
    finally:
        for store in stores:
            store.close()


@pytest.mark.parametrize("weak", ["w=0", "w=1", "w=1&journal=false&wTimeoutMS=1"])
def test_a_uri_can_t_weaken_what_a_write_waits_for(
    mongo_uri: str, database: str, weak: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = WriteConcerns()
    monkeypatch.setattr(mongo, "MongoClient", partial(MongoClient, event_listeners=[seen]))
    with UserStore(f"{mongo_uri}/?{weak}", database, "Users", timeout_seconds=5) as store:
        assert (
            store.users.write_concern
            == store.database[LEASES].write_concern
            == WriteConcern("majority", wtimeout=60_000)
        )
        store.database.create_collection("Users")
        store.ensure_collection()
        stream = writer_of(store)
        assert stream.upsert({"1": USER, "2": USER | {"user_id": "2"}}, created={"1"}) == {}
        assert stream.remove(["2", "3"]) == 1
        stream.record_load("a-load", state="done")
        with pytest.raises(DuplicateKeyError):
            store.users.insert_one(dict(USER))
        with pytest.raises(WriteError):
            store.users.insert_one(USER | {"user_id": "3", "extra": 1})
        assert [found["user_id"] for found in store.users.find()] == ["1"]
    assert seen.sent.keys() == {"create", "collMod", "createIndexes", "insert", "update", "delete"}
    assert [given for each in seen.sent.values() for given in each if (given or {}).get("w") != "majority"] == []


def test_a_truncate_that_finds_nobody_left_is_confirmed_too(
    mongo_uri: str, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = WriteConcerns()
    monkeypatch.setattr(mongo, "MongoClient", partial(MongoClient, event_listeners=[seen]))
    with UserStore(mongo_uri, database, "Users", timeout_seconds=5) as store:
        store.ensure_collection()
        seen.sent.clear()
        assert apply(writer_of(store), Segment(truncate=True, changes={})).truncated == 0
    # A try before it may have deleted all of them without a majority's word.
    assert [(given or {}).get("w") for given in seen.sent["delete"]] == ["majority"]
