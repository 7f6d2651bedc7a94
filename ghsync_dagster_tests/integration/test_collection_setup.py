"""The collection's validator and unique index: created, compared, and never changed under documents."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from pymongo.errors import DuplicateKeyError, WriteError

from ghsync_dagster.domain.errors import RefusedError
from ghsync_dagster.domain.user import json_schema
from ghsync_dagster.stores.mongo import UserStore

pytestmark = pytest.mark.integration

CONTRACT = {"$jsonSchema": json_schema()}
USER = {"user_id": "1", "login": "one", "gravatar_id": None, "avatar_url": "a", "url": "u"}


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


def test_an_empty_collection_is_brought_in_order(store: UserStore) -> None:
    store.database.create_collection("Users", validator={"$jsonSchema": {"required": ["a"]}}, validationAction="warn")
    store.ensure_collection()
    assert store.validator() == CONTRACT
    assert store.has_unique_index()
    with pytest.raises(WriteError):
        store.users.insert_one(USER | {"extra": 1})


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
