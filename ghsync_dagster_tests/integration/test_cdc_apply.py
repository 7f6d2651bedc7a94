"""Applying segments to a real collection: exactly what the stream says, alongside what loads left."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pymongo import MongoClient
from pymongo.collection import Collection
from pymongo.synchronous import pool

from ghsync_dagster import clock
from ghsync_dagster.cdc.stream.apply import Applied, apply
from ghsync_dagster.cdc.stream.group import GroupFence
from ghsync_dagster.domain.coalesce import Segment
from ghsync_dagster.domain.errors import RefusedError, UnavailableError
from ghsync_dagster.domain.user import MARKER_FIELD, MARKER_VALUE, json_schema
from ghsync_dagster.stores.mongo.books import GroupBook
from ghsync_dagster.stores.mongo.users import UserStore
from ghsync_dagster.stores.mongo.writer import KINDS_OF_REFUSED, UserWriter
from ghsync_dagster_tests.support.builders import delete, upsert, user
from ghsync_dagster_tests.support.cdc_parts import stored
from ghsync_dagster_tests.support.guards import AskedGuard, writer_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ghsync_dagster.domain.change import Change

pytestmark = pytest.mark.integration

CONNECT = "_configured_socket_interface"
"""The function by which PyMongo connects: only there can a refusal be placed before one command."""


def segment(*changes: Change, truncate: bool = False, created: bool = False) -> Segment:
    by_key = {str(change.key): change for change in changes}
    return Segment(truncate, by_key, {key for key in by_key if created})


def applied(store: UserStore, *changes: Change, truncate: bool = False, created: bool = False) -> Applied:
    return apply(writer_of(store), segment(*changes, truncate=truncate, created=created))


def ids(documents: Iterable[dict[str, Any]]) -> set[str]:
    return {document["_id"] for document in documents}


@pytest.fixture
def users(store: UserStore) -> UserStore:
    store.ensure_collection()
    return store


def test_upserts_and_deletes_of_one_segment_are_all_applied(users: UserStore) -> None:
    applied(users, upsert(user("1")), upsert(user("2")), upsert(user("3")))
    result = applied(users, upsert(user("1", "renamed")), delete("2"), delete("9"), upsert(user("-4", None)))
    assert (result.upserts, result.deletes, result.refused) == (2, 2, {})
    assert stored(users) == {"1": user("1", "renamed"), "3": user("3"), "-4": user("-4", None)}
    assert ids(users.book("deleted").find()) == {"2", "9"}
    assert list(users.users.find_one({"user_id": "1"}) or {}) == ["_id", *user("1")]


def test_a_write_whose_first_connection_is_refused_is_done_whole(
    users: UserStore, mongo_uri: str, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    applied(users, upsert(user("1")), upsert(user("2")), upsert(user("3")))
    connect, refused = getattr(pool, CONNECT), list[Any]()

    def refuse_once(*arguments: Any) -> Any:
        # What watches the server has threads of its own.
        if threading.current_thread() is threading.main_thread() and not refused:
            refused.append(arguments)
            raise ConnectionRefusedError("planted")
        return connect(*arguments)

    monkeypatch.setattr(pool, CONNECT, refuse_once)
    with UserStore(mongo_uri, database, "Users") as fresh:
        stream = writer_of(fresh)
        assert stream.upsert({"1": user("1", "renamed")}) == {}
        assert stream.remove(["2", "3"]) == 2
    assert len(refused) == 1
    assert stored(users) == {"1": user("1", "renamed")}


def test_created_users_are_inserted_and_those_that_are_there_all_the_same_are_replaced(users: UserStore) -> None:
    users.users.insert_many([user("1", "before", url=None), {**user("2", "before"), MARKER_FIELD: MARKER_VALUE}])
    users.book("deleted").insert_one({"_id": "3"})
    changes = [upsert(user(key, "after")) for key in "1234"]
    result = applied(users, *changes, upsert({"user_id": "5"}), delete("6"), created=True)
    assert (result.upserts, result.deletes, result.refused) == (5, 1, {})
    assert {key: stored(users)[key] for key in "1234"} == {key: user(key, "after") for key in "1234"}
    assert stored(users).keys() == set("12345")
    assert ids(users.book("deleted").find()) == {"6"}
    assert changes[3].user == user("4", "after")


def test_a_user_that_comes_back_is_no_longer_recorded_as_deleted(users: UserStore) -> None:
    applied(users, delete("1"), delete("2"))
    applied(users, upsert(user("1")))
    assert ids(users.book("deleted").find()) == {"2"}


def test_applying_again_changes_nothing(users: UserStore) -> None:
    for _ in range(3):
        applied(users, upsert(user("1")), delete("2"))
    assert stored(users) == {"1": user("1")}
    assert ids(users.book("deleted").find()) == {"2"}


def test_version_entries_of_touched_keys_go_and_others_stay(users: UserStore) -> None:
    users.book("versions").insert_many([{"_id": key, "created_at": "x", "id": 1, "load": "l"} for key in "123"])
    result = applied(users, upsert(user("1")), delete("2"))
    assert ids(users.book("versions").find()) == {"3"}
    assert result.repeated == 0


def test_a_marked_document_loses_its_marker(users: UserStore) -> None:
    users.users.insert_many([{**user(key), MARKER_FIELD: MARKER_VALUE} for key in "12"])
    applied(users, upsert(user("1", "new")), upsert({"user_id": "2", "login": "part"}))
    assert stored(users) == {"1": user("1", "new"), "2": user("2", "part")}


def test_unknown_fields_keep_what_is_stored_and_are_null_where_nothing_is(users: UserStore) -> None:
    applied(users, upsert(user("1", "before", avatar_url="http://a")))
    applied(users, upsert({"user_id": "1", "login": "after"}), upsert({"user_id": "2", "login": "new"}))
    assert stored(users) == {
        "1": user("1", "after", avatar_url="http://a"),
        "2": {"user_id": "2", "login": "new", "gravatar_id": None, "avatar_url": None, "url": None},
    }


def test_a_user_of_whom_nothing_is_known_but_the_id_is_stored_all_the_same(users: UserStore) -> None:
    applied(users, upsert({"user_id": "1"}))
    assert stored(users)["1"] == dict.fromkeys(("user_id", "login", "gravatar_id", "avatar_url", "url")) | {
        "user_id": "1"
    }


@pytest.mark.parametrize("text", ["a\0b", "\u2028", "$set", "$$ROOT", "{", "🦄" * 60, "x" * 2_000, ""])
@pytest.mark.parametrize("whole", [True, False])
def test_text_is_data(users: UserStore, text: str, *, whole: bool) -> None:
    row: dict[str, str | None] = user("1", text) if whole else {"user_id": "1", "login": text}
    applied(users, upsert(row))
    assert stored(users)["1"]["login"] == text


def test_a_load_between_the_write_and_the_second_look_is_overwritten_once_more(users: UserStore) -> None:
    class Racing(UserWriter):
        raced = 0

        def upsert(self, *args: Any, **kwargs: Any) -> Any:
            refused = super().upsert(*args, **kwargs)
            if self.raced < 2:
                # As a load that found the new document replaces it and writes its version.
                self.raced += 1
                users.users.update_one({"user_id": "1"}, {"$set": {"login": f"load-{self.raced}"}})
                users.book("versions").insert_one({"_id": "1", "created_at": "x", "id": 1, "load": "l"})
            return refused

    result = apply(Racing(users, AskedGuard()), segment(upsert(user("1", "stream")), upsert(user("2"))))
    assert result.repeated == 2
    assert stored(users) == {"1": user("1", "stream"), "2": user("2")}
    assert users.book("versions").count_documents({}) == 0


# what the database refuses


@pytest.mark.parametrize("created", [False, True])
def test_the_database_refuses_one_user_and_takes_the_others(users: UserStore, *, created: bool) -> None:
    strict = json_schema()
    strict["properties"]["login"] = {"bsonType": "string", "maxLength": 5}
    users.database.command({"collMod": "Users", "validator": {"$jsonSchema": strict}})
    users.book("deleted").insert_one({"_id": "2"})
    changes = [upsert(user("1")), upsert(user("2", "too long")), delete("3"), upsert({"user_id": "4"})]
    result = applied(users, *changes, created=created)
    assert set(result.refused) == {"2", "4"}
    assert {refused.kind for refused in result.refused.values()} == {"validator"}
    assert "121" in result.refused["2"].text
    assert (result.upserts, result.deletes) == (1, 1)
    assert stored(users) == {"1": user("1")}
    assert ids(users.book("deleted").find()) == {"2", "3"}


@pytest.mark.parametrize("created", [False, True])
def test_what_is_too_large_or_no_text_is_refused_alone(users: UserStore, *, created: bool) -> None:
    others = [upsert(user(str(key))) for key in range(10, 30)]
    bad = [upsert(user("1", "x" * 17_000_000)), upsert(user("2", "\ud800"))]
    result = applied(users, *others, *bad, upsert(user("3")), created=created)
    assert {key: refused.kind for key, refused in result.refused.items()} == {"1": "too-large", "2": "unencodable"}
    assert len(stored(users)) == 21


@pytest.mark.parametrize("created", [False, True])
def test_another_unique_index_refuses_alone(users: UserStore, *, created: bool) -> None:
    users.users.create_index("login", unique=True)
    applied(users, upsert(user("1", "taken")))
    result = applied(users, upsert(user("2", "taken")), upsert(user("3", "free")), created=created)
    assert {key: refused.kind for key, refused in result.refused.items()} == {"2": "unique-index"}
    assert set(stored(users)) == {"1", "3"}


def test_the_documentation_lists_each_kind_of_what_the_database_refuses() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "dead-letters.md").read_text()
    for kind in KINDS_OF_REFUSED:
        assert f"`{kind}`" in page


# what loads and deletes left, looked up for many keys


@pytest.mark.parametrize("entries", [0, 100, 2_000])
def test_however_many_entries_there_are_those_of_a_batch_are_found(users: UserStore, entries: int) -> None:
    keys = [str(key) for key in range(1_000)]
    ours = set(keys[: entries // 20])
    others = {f"other-{key}" for key in range(entries - len(ours))}
    if entries:
        users.book("versions").insert_many([{"_id": key} for key in ours | others])
    stream = writer_of(users)
    assert stream.drop_versions(keys) == ours
    assert stream.drop_versions(keys) == set()
    assert ids(users.book("versions").find()) == others


def test_a_collection_that_held_many_entries_is_not_read_whole_again_for_a_while(
    users: UserStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[float] = []

    def may_write() -> float:
        commands.append(30.0)
        return commands[-1]

    stream = writer_of(users, may_write)

    def looked_up(keys: int) -> int:
        commands.clear()
        stream.forget_deleted([str(key) for key in range(keys)])
        return len(commands)

    assert looked_up(1_000) == 1, "there are none: that takes one command"
    users.book("deleted").insert_many([{"_id": f"other-{key}"} for key in range(300)])
    monkeypatch.setattr("ghsync_dagster.stores.mongo.writer._REST", 1e9)
    by_key = 1_000 // 200
    assert looked_up(1_000) == 1 + by_key, "reading them shows that there are many"
    assert looked_up(1_000) == by_key
    assert looked_up(4_000) == 4 * by_key
    assert looked_up(200) == 1, "few keys are always looked up"
    commands.clear()
    assert stream.drop_versions([str(key) for key in range(1_000)]) == set()
    assert len(commands) == 1, "of another collection nothing is known yet"
    stream = writer_of(users, may_write)
    monkeypatch.setattr("ghsync_dagster.stores.mongo.writer._REST", 0)
    for _ in range(2):
        assert looked_up(1_000) == 1 + by_key, "it may hold few by now"


def test_an_entry_that_is_read_twice_makes_no_collection_that_was_cut_off_a_whole_one(
    users: UserStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [str(key) for key in range(1_000)]
    users.book("deleted").insert_many([{"_id": key} for key in keys])
    find = Collection.find
    looks: list[int] = []

    class Twice:
        """What is found where an entry is dropped and comes anew behind the place that is read."""

        def __init__(self, collection: Collection[Any]) -> None:
            self.collection = collection

        def limit(self, count: int) -> list[Any]:
            looks.append(count)
            found = list(find(self.collection, {}).limit(count - 1))
            return [*found, found[0]]

    monkeypatch.setattr(
        Collection, "find", lambda found, *args, **more: find(found, *args, **more) if args[0] else Twice(found)
    )
    writer_of(users).forget_deleted(keys)
    monkeypatch.undo()
    assert looks
    assert ids(users.book("deleted").find()) == set()


# rewinds and the fence


def test_a_rewind_is_cleared_only_by_who_carried_the_newest_request_out(users: UserStore) -> None:
    book = GroupBook(users)
    book.request_rewind({"g/0": 100})
    done = book.pending_rewinds(["g/0", "g/1"])["g/0"]
    assert done.offset == 100
    book.request_rewind({"g/0": 120})
    book.clear_rewind("g/0", done)
    again = book.pending_rewinds(["g/0"])["g/0"]
    assert again.offset == 100, "the earliest counts"
    book.clear_rewind("g/0", again)
    assert book.pending_rewinds(["g/0"]) == {}


def test_what_a_build_before_left_to_be_consumed_again_is_a_rewind_request(users: UserStore) -> None:
    old = users.database["_ghsync_again"]
    old.insert_many([{"_id": "g/0", "offset": 7}, {"_id": "g/1", "offset": 9, "asking": "theirs"}])
    GroupBook(users).request_rewind({"g/1": 5})
    users.ensure_collection()
    book = GroupBook(users)
    pending = book.pending_rewinds(["g/0", "g/1"])
    assert {name: rewind.offset for name, rewind in pending.items()} == {"g/0": 7, "g/1": 5}
    assert old.name not in users.database.list_collection_names()
    for name, rewind in pending.items():
        book.clear_rewind(name, rewind)
    assert book.pending_rewinds(["g/0", "g/1"]) == {}


def test_sleep_counts_in_the_time_that_a_renewal_is_good_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fence = GroupFence(10)
    asked = clock.now()
    fence.renewed(asked)
    assert fence.is_recent
    monkeypatch.setattr(clock, "now", lambda: asked + 60)
    assert fence.remaining == -50


# truncates


def test_a_truncate_removes_everyone_and_remembers_them_as_deleted(users: UserStore) -> None:
    users.users.insert_many([user("1"), {**user("2"), MARKER_FIELD: MARKER_VALUE}])
    users.book("versions").insert_many([{"_id": key, "created_at": "x", "id": 1, "load": "l"} for key in ("2", "3")])
    result = applied(users, upsert(user("5")), truncate=True)
    assert result.truncated == 2
    assert stored(users) == {"5": user("5")}
    assert users.book("versions").count_documents({}) == 0
    assert ids(users.book("deleted").find()) == {"1", "2", "3"}


def test_a_truncate_removes_more_than_one_command_carries(users: UserStore) -> None:
    users.users.insert_many([user(str(key)) for key in range(12_001)])
    assert applied(users, truncate=True).truncated == 12_001
    assert users.book("deleted").count_documents({}) == 12_001
    assert stored(users) == {}


def test_a_truncate_removes_those_whose_id_is_no_text_and_keeps_whom_it_is_to_keep(users: UserStore) -> None:
    users.database.drop_collection("Users")
    odd: list[dict[str, Any]] = [{"user_id": None}, {"user_id": ["1"]}, {}, *({"user_id": key} for key in range(2_000))]
    users.users.insert_many([user("1"), user("2"), *odd])
    assert apply(writer_of(users), segment(truncate=True), {"2"}).truncated == len(odd) + 1
    assert stored(users) == {"2": user("2")}
    assert ids(users.book("deleted").find()) == {"1"}


# faults


def test_a_server_that_is_away_is_a_transient_error() -> None:
    with (
        UserStore("mongodb://127.0.0.1:1", "nowhere", "Users", timeout_seconds=0.2) as away,
        pytest.raises(UnavailableError),
    ):
        apply(writer_of(away, lambda: 0.5), segment(upsert(user("1"))))


def test_who_may_not_write_any_more_sends_no_command(users: UserStore) -> None:
    class GoneError(Exception):
        pass

    def gone() -> float:
        raise GoneError

    with pytest.raises(GoneError):
        apply(writer_of(users, gone), segment(upsert(user("1")), delete("2")))
    assert stored(users) == {}
    assert users.book("deleted").count_documents({}) == 0


def test_a_command_gets_no_more_time_than_is_left(users: UserStore) -> None:
    with pytest.raises(UnavailableError):
        apply(writer_of(users, lambda: 0.00001), segment(upsert(user("1"))))


def test_refused_credentials_are_permanent(mongo_uri: str) -> None:
    wrong = mongo_uri.replace("://", "://nobody:wrong@")
    with (
        UserStore(wrong, "some", "Users", timeout_seconds=2) as store,
        pytest.raises(RefusedError, match="user, password and roles"),
    ):
        applied(store, upsert(user("1")))
    with MongoClient[dict[str, Any]](mongo_uri) as client:
        assert "some" not in client.list_database_names()
