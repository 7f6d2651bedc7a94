"""The load's guarantees on a real store: who is written, who is left, and what a load finds and mends on its way."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from bson.codec_options import CodecOptions
from bson.raw_bson import RawBSONDocument

from ghsync_dagster.batch.load import ROUNDS, Step
from ghsync_dagster.domain.errors import InputError
from ghsync_dagster.stores.mongo.users import UserStore
from ghsync_dagster.stores.spark import USER_SCHEMA, DuplicateUserError, insert_users, write_options
from ghsync_dagster_tests.support.builders import user
from ghsync_dagster_tests.support.guards import AskedGuard, writer_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from ghsync_dagster.batch.flow import BatchFlow
    from ghsync_dagster.batch.reports import FlattenReport, LoadReport
    from ghsync_dagster.stores.spark import SparkHandle

pytestmark = [pytest.mark.integration, pytest.mark.servers("spark")]

EARLY, LATE = "2015-01-01T15:00:00Z", "2015-01-01T16:00:00Z"
MARKED = {"spark_temp": "spark_write"}


@dataclass
class World:
    """A flow with its store, seen by plain pymongo."""

    flow: BatchFlow
    store: UserStore
    folder: Path

    def flatten(self, *lines: str) -> FlattenReport:
        """Bring a file of these lines up to the users that are to be loaded."""
        file = self.folder / "events.json"
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self.flow.read([str(file)])
        return self.flow.flatten()

    def load(self, *lines: str, on_step: Callable[[Step], None] = lambda _: None) -> LoadReport:
        """Load a file of these lines."""
        self.flatten(*lines)
        return self.flow.load("run", on_step)

    def users(self) -> dict[str, dict[str, Any]]:
        """Return the stored documents by user."""
        return {found["user_id"]: found for found in self.store.users.find()}

    def logins(self) -> dict[str, str | None]:
        """Return the stored logins by user."""
        return {key: found["login"] for key, found in self.users().items()}

    def versions(self) -> dict[str, tuple[str, int]]:
        """Return the version entries by user, without the load."""
        return {found["_id"]: (found["created_at"], found["id"]) for found in self.store.book("versions").find()}

    def bytes_of(self, name: str) -> list[bytes]:
        """Return the documents of a collection as the server holds them."""
        raw = self.store.database[name].with_options(CodecOptions(document_class=RawBSONDocument))
        return sorted(bytes(found.raw) for found in raw.find())

    def insert(self, user_id: str, login: str, **more: str) -> None:
        """Insert a user as somebody else would."""
        self.store.users.insert_one(user(user_id, login) | more)

    def assert_settled(self) -> None:
        """Hold that no load left anything half done."""
        assert self.store.users.count_documents({"spark_temp": {"$exists": True}}) == 0
        assert self.store.book("undo").count_documents({}) == 0
        assert self.store.book("loads").distinct("state") == ["done"]
        assert self.store.database["_ghsync_leases"].count_documents({}) == 0


def at_step(wanted: Step, action: Callable[[], object]) -> Callable[[Step], None]:
    """Return a hook that acts each time one step is done."""

    def hook(step: Step) -> None:
        if step is wanted:
            action()

    return hook


@pytest.fixture
def world(flow: BatchFlow, store: UserStore, tmp_path: Path) -> World:
    return World(flow, store, tmp_path)


# Who is written, and who is left


def test_a_first_load_stores_every_user_in_exactly_the_five_fields(
    world: World, event_line: Callable[..., str]
) -> None:
    report = world.load(
        event_line(1, "old", EARLY, 1),
        event_line(1, "new", EARLY, 2),
        event_line(2, "two", LATE, 3, actor_gravatar_id=None),
    )
    assert (report.users, report.inserted, report.replaced, report.confirmed, report.left) == (2, 2, 0, 0, {})
    assert (report.marked, report.expected_marked, report.unmarked) == (2, 2, 2)
    assert (report.missing, report.unresolved, report.marker_lost, report.recovered) == (0, 0, 0, {})
    users = world.users()
    assert {tuple(found) for found in users.values()} == {
        ("_id", "user_id", "login", "gravatar_id", "avatar_url", "url")
    }
    del users["1"]["_id"], users["2"]["_id"]
    assert users["1"] == {
        "user_id": "1",
        "login": "new",
        "gravatar_id": "",
        "avatar_url": "https://avatars.githubusercontent.com/u/1?",
        "url": "https://api.github.com/users/new",
    }
    assert users["2"]["gravatar_id"] is None
    assert world.versions() == {"1": (EARLY, 2), "2": (LATE, 3)}
    assert world.store.has_unique_index()
    assert world.store.validator() is not None
    world.assert_settled()


def test_the_same_load_again_writes_nothing(world: World, event_line: Callable[..., str]) -> None:
    lines = [event_line(number, f"user-{number}", EARLY, number) for number in range(1, 30)]
    world.load(*lines)
    before = world.bytes_of("Users"), world.bytes_of("_ghsync_versions")
    report = world.load(*lines)
    assert report.left == {"already stored": 29}
    assert (report.inserted, report.replaced, report.confirmed, report.unmarked) == (0, 0, 0, 0)
    assert (world.bytes_of("Users"), world.bytes_of("_ghsync_versions")) == before
    world.assert_settled()


def test_a_newer_event_with_the_same_fields_only_moves_the_version(
    world: World, event_line: Callable[..., str]
) -> None:
    world.load(event_line(1, "one", EARLY, 1, actor_gravatar_id=None))
    before = world.bytes_of("Users")
    report = world.load(event_line(1, "one", LATE, 2, actor_gravatar_id=None))
    assert (report.confirmed, report.replaced, report.inserted, report.left) == (1, 0, 0, {})
    assert world.bytes_of("Users") == before
    assert world.versions() == {"1": (LATE, 2)}
    world.assert_settled()


def test_a_newer_event_with_other_fields_replaces_them_and_keeps_the_document(
    world: World, event_line: Callable[..., str]
) -> None:
    world.load(event_line(1, "one", EARLY, 1, actor_gravatar_id=None), event_line(2, "two", EARLY, 2))
    before = world.users()
    report = world.load(event_line(1, "uno", LATE, 3), event_line(2, "two", LATE, 4, actor_gravatar_id=None))
    assert (report.replaced, report.confirmed, report.inserted, report.left) == (2, 0, 0, {})
    assert (report.expected_marked, report.marked, report.unmarked) == (2, 2, 2)
    after = world.users()
    assert (after["1"]["login"], after["1"]["gravatar_id"], after["2"]["gravatar_id"]) == ("uno", "", None)
    assert {key: found["_id"] for key, found in after.items()} == {key: found["_id"] for key, found in before.items()}
    assert all(list(found) == list(before["1"]) for found in after.values())
    assert world.versions() == {"1": (LATE, 3), "2": (LATE, 4)}
    world.assert_settled()


def test_an_older_file_changes_nothing(world: World, event_line: Callable[..., str]) -> None:
    world.load(event_line(1, "new", LATE, 1), event_line(2, "tie", LATE, 10))
    before = world.bytes_of("Users"), world.bytes_of("_ghsync_versions")
    report = world.load(event_line(1, "old", EARLY, 99), event_line(2, "older-by-number", LATE, 9))
    assert report.left == {"newer stored": 2}
    assert (world.bytes_of("Users"), world.bytes_of("_ghsync_versions")) == before
    world.assert_settled()


def test_documents_without_a_version_are_left_whatever_the_file_says(
    world: World, event_line: Callable[..., str]
) -> None:
    world.store.ensure_collection()
    world.insert("1", "mirrored-from-mysql")
    before = world.bytes_of("Users")
    report = world.load(event_line(1, "newer", "2025-01-01T00:00:00Z", 1))
    assert report.left == {"owned by the stream": 1}
    assert world.bytes_of("Users") == before
    assert world.versions() == {}
    world.assert_settled()


@pytest.mark.parametrize("others_stored", [False, True])
def test_a_recorded_deletion_is_not_brought_back(
    world: World, event_line: Callable[..., str], *, others_stored: bool
) -> None:
    if others_stored:
        world.load(event_line(9, "nine", EARLY, 9))
    world.store.book("deleted").insert_one({"_id": "1"})
    report = world.load(event_line(1, "gone", LATE, 1), event_line(2, "two", LATE, 2))
    assert report.left == {"deleted by the stream": 1}
    assert report.inserted == 1
    assert world.logins() == {"2": "two"} | ({"9": "nine"} if others_stored else {})
    assert "1" not in world.versions()
    world.assert_settled()


def test_all_cases_in_one_load_are_counted(world: World, event_line: Callable[..., str]) -> None:
    def lines(keys: range, prefix: str, at: str, first: int) -> list[str]:
        return [event_line(key, f"{prefix}-{key}", at, first + key) for key in keys]

    replaced, confirmed, same, newer = range(1, 4), range(10, 15), range(20, 26), range(30, 37)
    inserted, streamed, deleted = range(40, 48), range(50, 59), range(60, 62)
    world.load(*(line for keys in (replaced, confirmed, same, newer) for line in lines(keys, "a", EARLY, 0)))
    world.store.book("versions").update_many(
        {"_id": {"$in": [str(key) for key in newer]}}, {"$set": {"created_at": "2020-01-01T00:00:00Z"}}
    )
    for key in streamed:
        world.insert(str(key), f"stream-{key}")
    world.store.book("deleted").insert_many([{"_id": str(key)} for key in deleted])
    report = world.load(
        *lines(replaced, "b", LATE, 100),
        *lines(confirmed, "a", LATE, 100),
        *lines(same, "a", EARLY, 0),
        *(line for keys in (newer, inserted, streamed, deleted) for line in lines(keys, "b", LATE, 100)),
    )
    assert report.users == 40
    assert (report.inserted, report.replaced, report.confirmed) == (8, 3, 5)
    assert report.left == {
        "already stored": 6,
        "newer stored": 7,
        "owned by the stream": 9,
        "deleted by the stream": 2,
    }
    assert (report.expected_marked, report.marked, report.unmarked, report.missing) == (11, 11, 11, 0)
    expected = {str(key): f"b-{key}" for keys in (replaced, inserted) for key in keys}
    expected |= {str(key): f"a-{key}" for keys in (confirmed, same, newer) for key in keys}
    expected |= {str(key): f"stream-{key}" for key in streamed}
    assert world.logins() == expected
    versions = world.versions()
    assert versions.keys() == expected.keys() - {str(key) for key in streamed}
    assert {versions[str(key)] for key in (*replaced, *confirmed, *inserted)} == {
        (LATE, 100 + key) for key in (*replaced, *confirmed, *inserted)
    }
    world.assert_settled()


def test_a_version_entry_without_document_says_nothing(world: World, event_line: Callable[..., str]) -> None:
    entry = {"created_at": "2030-01-01T00:00:00Z", "id": 99, "load": "of-old"}
    world.store.book("versions").insert_many([{"_id": "1", **entry}, {"_id": "2", **entry}])
    world.load(event_line(1, "one", LATE, 1))
    assert world.versions() == {"1": (LATE, 1)}
    world.store.book("versions").insert_one({"_id": "3", **entry})
    assert world.load(event_line(3, "three", LATE, 3)).inserted == 1
    assert world.versions() == {"1": (LATE, 1), "3": (LATE, 3)}
    assert world.logins() == {"1": "one", "3": "three"}
    world.assert_settled()


def test_more_users_than_a_chunk_are_inserted_replaced_and_confirmed(
    world: World, event_line: Callable[..., str]
) -> None:
    chunk = 5_300
    replaced, confirmed, inserted = range(1, chunk), range(chunk, 2 * chunk), range(2 * chunk, 3 * chunk)
    first = world.load(*(event_line(key, f"a-{key}", EARLY, key) for key in (*replaced, *confirmed)))
    assert first.inserted == first.unmarked == len(replaced) + len(confirmed)
    report = world.load(
        *(event_line(key, f"b-{key}", LATE, key) for key in (*replaced, *inserted)),
        *(event_line(key, f"a-{key}", LATE, key) for key in confirmed),
    )
    assert (report.inserted, report.replaced, report.confirmed) == (len(inserted), len(replaced), len(confirmed))
    assert (report.left, report.missing, report.unresolved) == ({}, 0, 0)
    logins = world.logins()
    assert logins == {str(key): f"{'a' if key in confirmed else 'b'}-{key}" for key in range(1, 3 * chunk)}
    assert world.versions() == {str(key): (LATE, key) for key in range(1, 3 * chunk)}
    world.assert_settled()


# Text is data


@pytest.mark.parametrize(
    "text", ["$login", "$$ROOT", "a.b.$c", "line\u2028separator", "x" * 2_000, "\u0000nul", "\U0001f680", None]
)
def test_any_text_survives_replacing_and_putting_back(store: UserStore, text: str | None) -> None:
    store.ensure_collection()
    old, new = user("1", "one") | {"url": text}, user("1", "uno") | {"avatar_url": text}
    store.users.insert_one(dict(old))
    writer_of(store).write_undo([old], "load")
    assert store.undo_by_id(["1"]) == {"1": old}
    writer_of(store).replace_unchanged([(old, new)])
    assert store.users_by_id(["1"]) == {"1": new | MARKED}
    writer_of(store).replace_unchanged([(old, user("1", "not unchanged any more"))])
    assert store.users_by_id(["1"]) == {"1": new | MARKED}
    writer_of(store).put_back([old])
    assert store.users_by_id(["1"]) == {"1": old}
    writer_of(store).put_back([new])
    assert store.users_by_id(["1"]) == {"1": old}


def test_a_marked_document_is_not_replaced_as_unchanged(store: UserStore) -> None:
    store.ensure_collection()
    old = user("1", "one")
    store.users.insert_one(old | MARKED)
    writer_of(store).replace_unchanged([(old, user("1", "uno"))])
    assert store.users_by_id(["1"]) == {"1": old | MARKED}


def test_replacing_what_is_gone_creates_nothing(store: UserStore) -> None:
    store.ensure_collection()
    writer_of(store).replace_unchanged([(user("1", "one"), user("1", "uno"))])
    writer_of(store).put_back([user("1", "one")])
    assert store.users_by_id(["1"]) == {}


# What happens under a load's hands


def test_a_user_that_somebody_stores_after_the_plan_is_left_as_stored(
    world: World, event_line: Callable[..., str]
) -> None:
    world.load(event_line(9, "nine", EARLY, 9))
    report = world.load(
        *(event_line(key, f"file-{key}", LATE, key) for key in range(1, 8)),
        on_step=at_step(Step.PLANNED, lambda: world.insert("3", "somebody")),
    )
    assert report.left == {"stored meanwhile": 1}
    assert (report.inserted, report.unresolved, report.marker_lost) == (6, 0, 0)
    assert world.logins() == {str(key): f"file-{key}" for key in range(1, 8)} | {"3": "somebody", "9": "nine"}
    assert world.versions().keys() == {"1", "2", "4", "5", "6", "7", "9"}
    world.assert_settled()


def test_a_user_that_the_stream_writes_while_it_is_replaced_is_the_streams(
    world: World, event_line: Callable[..., str]
) -> None:
    world.load(event_line(1, "one", EARLY, 1), event_line(2, "two", EARLY, 2))

    def stream_writes() -> None:
        world.store.book("versions").delete_one({"_id": "1"})
        world.store.users.replace_one({"user_id": "1"}, user("1", "stream"))

    report = world.load(
        event_line(1, "uno", LATE, 3),
        event_line(2, "due", LATE, 4),
        event_line(3, "tre", LATE, 5),
        on_step=at_step(Step.PLANNED, stream_writes),
    )
    assert (report.inserted, report.replaced, report.left) == (1, 1, {"stored meanwhile": 1})
    assert world.logins() == {"1": "stream", "2": "due", "3": "tre"}
    assert world.versions().keys() == {"2", "3"}
    world.assert_settled()


def test_rows_that_are_lost_after_the_insert_are_found_missing_and_written_again(
    world: World, event_line: Callable[..., str]
) -> None:
    lost = iter([{"$in": ["2", "3"]}])

    def lose_once() -> None:
        for keys in lost:
            world.store.users.delete_many({"user_id": keys})

    report = world.load(
        *(event_line(key, f"user-{key}", LATE, key) for key in range(1, 7)), on_step=at_step(Step.INSERTED, lose_once)
    )
    assert (report.missing, report.reconciled, report.unresolved) == (2, 2, 0)
    assert (report.expected_marked, report.marked, report.unmarked, report.inserted) == (6, 4, 6, 6)
    assert world.logins() == {str(key): f"user-{key}" for key in range(1, 7)}
    assert world.versions() == {str(key): (LATE, key) for key in range(1, 7)}
    world.assert_settled()


def test_rows_that_stay_lost_fail_the_load_and_the_next_one_recovers(
    world: World, event_line: Callable[..., str]
) -> None:
    lines = [event_line(key, f"user-{key}", LATE, key) for key in range(1, 7)]
    steps: Counter[Step] = Counter()

    def lose(step: Step) -> None:
        steps[step] += 1
        if step is Step.INSERTED:
            world.store.users.delete_one({"user_id": "2"})

    report = world.load(*lines, on_step=lose)
    assert (report.unresolved, report.missing, report.reconciled, report.offenders) == (1, 1, 0, ["2"])
    assert report.unmarked == 0
    assert steps[Step.RECONCILED] == ROUNDS
    assert not steps[Step.CHECKED]
    assert world.store.users.count_documents(MARKED) == 5
    assert world.store.book("loads").distinct("state") == ["running"]

    again = world.load(*lines)
    assert again.recovered["unmarked"] == 5
    assert again.left == {"already stored": 5}
    assert (again.inserted, again.unresolved) == (1, 0)
    assert world.logins() == {str(key): f"user-{key}" for key in range(1, 7)}
    assert world.versions() == {str(key): (LATE, key) for key in range(1, 7)}
    world.assert_settled()


def test_a_marker_that_somebody_removes_is_told_and_nothing_is_written_twice(
    world: World, event_line: Callable[..., str]
) -> None:
    def unmark() -> None:
        world.store.users.update_one({"user_id": "2"}, {"$unset": {"spark_temp": ""}})

    world.load(*(event_line(key, f"old-{key}", EARLY, key) for key in range(1, 5)))
    report = world.load(
        *(event_line(key, f"user-{key}", LATE, key) for key in range(1, 5)), on_step=at_step(Step.PLANNED, unmark)
    )
    assert (report.replaced, report.marker_lost, report.missing, report.unresolved) == (3, 1, 1, 0)
    assert world.logins() == {str(key): f"user-{key}" for key in range(1, 5)}
    assert world.versions().keys() == {"1", "3", "4"}
    world.assert_settled()


def test_a_replaced_user_that_is_lost_and_then_deleted_by_the_stream_stays_deleted(
    world: World, event_line: Callable[..., str]
) -> None:
    world.load(event_line(1, "one", EARLY, 1), event_line(2, "two", EARLY, 2))

    def act(step: Step) -> None:
        if step is Step.PLANNED:
            world.store.users.delete_one({"user_id": "1"})
        if step is Step.RECONCILED:
            world.store.book("deleted").insert_one({"_id": "1"})

    report = world.load(event_line(1, "uno", LATE, 3), event_line(2, "due", LATE, 4), on_step=act)
    assert (report.missing, report.unresolved) == (1, 0)
    assert world.logins() == {"2": "due"}
    assert world.versions() == {"2": (LATE, 4)}
    world.assert_settled()


def test_what_a_dead_loads_executors_insert_late_does_not_stand_in_the_way(
    world: World, event_line: Callable[..., str]
) -> None:
    world.load(event_line(9, "nine", EARLY, 9))

    def insert_late() -> None:
        world.insert("1", "late", **MARKED)
        world.insert("7", "late", **MARKED)

    report = world.load(
        event_line(1, "one", LATE, 1), event_line(2, "two", LATE, 2), on_step=at_step(Step.RECORDED, insert_late)
    )
    assert (report.inserted, report.left, report.unresolved) == (2, {}, 0)
    assert world.logins() == {"1": "one", "2": "two", "9": "nine"}
    assert world.versions().keys() == {"1", "2", "9"}
    world.assert_settled()


def test_a_stray_marker_is_removed_and_counted_and_a_deleted_user_goes_with_it(
    world: World, event_line: Callable[..., str]
) -> None:
    world.load(event_line(9, "nine", EARLY, 9))
    world.insert("1", "somebody", **MARKED)
    world.insert("2", "gone", **MARKED)
    world.store.book("deleted").insert_one({"_id": "2"})
    report = world.load(event_line(9, "nine", LATE, 10))
    assert report.recovered == {"unmarked": 1, "remove": 1}
    assert world.logins() == {"1": "somebody", "9": "nine"}
    world.assert_settled()


def test_users_that_were_removed_before_the_load_are_an_error_and_not_an_empty_success(
    world: World, event_line: Callable[..., str]
) -> None:
    for stored in (False, True):
        if stored:
            world.load(event_line(9, "nine", EARLY, 9))
        users = world.flatten(event_line(1, "one", LATE, 1))
        for file in Path(users.users_path).glob("*.parquet"):
            file.unlink()
        with pytest.raises(InputError):
            world.flow.load("run")
    assert world.logins() == {"9": "nine"}


@pytest.mark.parametrize("weak", ["", "?w=0", "?w=1&journal=false&wTimeoutMS=1"])
def test_what_spark_writes_waits_for_a_majority_whatever_the_uri_says(
    spark: SparkHandle, mongo_uri: str, database: str, weak: str
) -> None:
    session = spark.session()
    gateway: Any = session.sparkContext._gateway
    config = gateway.jvm.com.mongodb.spark.sql.connector.config.MongoConfig
    with UserStore(f"{mongo_uri}/{weak}", database, "Users", timeout_seconds=5) as store:
        # As the connector takes a write's options.
        concern = config.writeConfig({}).withOptions(write_options(store)).getWriteConcern()
        assert concern.asDocument().toJson() == '{"w": "majority", "wtimeout": 60000}'
        store.ensure_collection()
        users = session.createDataFrame([user("1", "one")], USER_SCHEMA)
        insert_users(users, store, AskedGuard())
        with pytest.raises(DuplicateUserError):
            insert_users(users, store, AskedGuard())
        assert store.count_marked() == 1
