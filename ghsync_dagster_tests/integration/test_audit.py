"""The audit on real servers: equal is equal, each difference is counted once, and changes in flight are none."""

from __future__ import annotations

import queue
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from ghsync_dagster.cdc.health import audit as audit_module
from ghsync_dagster.cdc.health.audit import Offender, Patience, audit
from ghsync_dagster.dev.workload import DELETE, INSERT, KEY_CHANGE, ODD_TEXTS, Mix, RowChange, Workload
from ghsync_dagster.domain.errors import ConfigError, RefusedError, UnavailableError
from ghsync_dagster.domain.user import MARKER_FIELD, MARKER_VALUE, USER_FIELDS
from ghsync_dagster.stores.mongo.users import UserStore
from ghsync_dagster.stores.mysql import MySqlStore, Span, hash_sum
from ghsync_dagster_tests.support.builders import user
from ghsync_dagster_tests.support.guards import writer_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


pytestmark = [pytest.mark.integration, pytest.mark.servers("stream")]

NO_PATIENCE = Patience(seconds=0)
Users = dict[str, dict[str, str | None]]


@pytest.fixture
def mongo(store: UserStore) -> UserStore:
    """An open store on an empty collection that is set up as it is in service."""
    store.ensure_collection()
    return store


def put_rows(mysql: MySqlStore, users: Iterable[dict[str, str | None]]) -> None:
    """Insert rows."""
    statement = "INSERT INTO `Users` VALUES (%s, %s, %s, %s, %s)"
    mysql.execute([(statement, [found[name] for name in USER_FIELDS]) for found in users])


def put_documents(mongo: UserStore, users: Iterable[dict[str, str | None]]) -> None:
    """Insert documents."""
    mongo.users.insert_many([dict(found) for found in users])


def test_two_empty_sides_are_equal(mysql: MySqlStore, mongo: UserStore) -> None:
    found = audit(mysql, mongo)
    assert found.equal
    assert (found.rows, found.documents, found.reread) == (0, 0, 0)


def test_a_mirror_is_equal_over_many_chunks_whatever_the_order_of_keys(mysql: MySqlStore, mongo: UserStore) -> None:
    users = [user(key) for key in range(-1_200, 1_300)]
    put_rows(mysql, users)
    put_documents(mongo, reversed(users))
    found = audit(mysql, mongo)
    assert found.equal
    assert (found.rows, found.documents, found.reread, found.rounds) == (2_500, 2_500, 0, 0)
    assert found.summary().startswith("equal: 2500 rows against 2500 documents")


def test_odd_text_is_equal_to_itself(mysql: MySqlStore, mongo: UserStore) -> None:
    users = [user(key, login=text, gravatar_id=text, url=None) for key, text in enumerate(ODD_TEXTS)]
    put_rows(mysql, users)
    put_documents(mongo, users)
    assert audit(mysql, mongo, patience=NO_PATIENCE).equal


def test_each_difference_is_counted_once_and_shown(mysql: MySqlStore, mongo: UserStore) -> None:
    put_rows(mysql, [user(key) for key in range(100)])
    put_documents(mongo, [user(key) for key in range(3, 98)])
    mongo.users.update_one({"user_id": "50"}, {"$set": {"login": "OCTO", "url": None}})
    put_documents(mongo, [user(1_000), user(1_001)])
    found = audit(mysql, mongo, patience=NO_PATIENCE)
    assert not found.equal
    assert (found.missing, found.extra, found.different, found.from_files) == (5, 2, 1, 0)
    assert (found.rows, found.documents, found.reread, found.rounds) == (100, 97, 8, 1)
    assert {offender.user_id for offender in found.offenders} == {"0", "1", "2", "98", "99", "50", "1000", "1001"}
    assert Offender("1000", "extra") in found.offenders
    assert Offender("0", "missing") in found.offenders
    (different,) = (offender for offender in found.offenders if offender.kind == "different")
    assert different.fields == {
        "login": {"mysql": "'octo'", "mongodb": "'OCTO'"},
        "url": {"mysql": "'http://u'", "mongodb": "null"},
    }
    assert found.summary().startswith("5 missing, 2 extra, 1 different: ")


@pytest.mark.parametrize(
    ("row", "stored"), [("octo", "OCTO"), ("octo", "octo "), ("\u00e9", "e\u0301"), ("a", "\u00e1")]
)
def test_what_mysql_holds_to_be_equal_is_compared_as_it_is(
    mysql: MySqlStore, mongo: UserStore, row: str, stored: str
) -> None:
    put_rows(mysql, [user(1, login=row)])
    put_documents(mongo, [user(1, login=stored)])
    assert audit(mysql, mongo, patience=NO_PATIENCE).different == 1


def test_users_that_only_files_brought_are_no_difference(mysql: MySqlStore, mongo: UserStore) -> None:
    put_rows(mysql, [user(1)])
    put_documents(mongo, [user(1), user(2), user(3)])
    writer_of(mongo).insert_versions([("2", "2015-01-01T00:00:00Z", 1), ("3", "2015-01-01T00:00:00Z", 2)], "load")
    # A load at work, or one that died: its mark stands where the entry is not written yet.
    mongo.users.insert_one({**user(4), MARKER_FIELD: MARKER_VALUE})
    found = audit(mysql, mongo, patience=NO_PATIENCE)
    assert found.equal
    assert (found.from_files, found.documents) == (3, 4)
    assert "3 documents are from files alone" in found.summary()


def test_a_deleted_user_that_came_back_is_extra_though_a_load_wrote_it(mysql: MySqlStore, mongo: UserStore) -> None:
    put_documents(mongo, [user(2)])
    writer_of(mongo).insert_versions([("2", "2015-01-01T00:00:00Z", 1)], "load")
    mongo.users.insert_one({**user(3), MARKER_FIELD: MARKER_VALUE})
    mongo.book("deleted").insert_many([{"_id": "2"}, {"_id": "3"}])
    found = audit(mysql, mongo, patience=NO_PATIENCE)
    assert (found.extra, found.from_files) == (2, 0)


def test_a_file_user_with_a_row_is_compared(mysql: MySqlStore, mongo: UserStore) -> None:
    put_rows(mysql, [user(1, login="row"), user(2)])
    put_documents(mongo, [user(1, login="file"), user(2)])
    writer_of(mongo).insert_versions([("1", "2015-01-01T00:00:00Z", 1), ("2", "2015-01-01T00:00:00Z", 2)], "load")
    found = audit(mysql, mongo, patience=NO_PATIENCE)
    assert (found.different, found.from_files) == (1, 0)


def test_offenders_are_capped_and_counts_are_not(mysql: MySqlStore, mongo: UserStore) -> None:
    put_rows(mysql, [user(key) for key in range(1_500)])
    put_documents(mongo, [user(key) for key in range(5_000, 6_200)])
    found = audit(mysql, mongo, patience=NO_PATIENCE)
    assert (found.missing, found.extra, len(found.offenders)) == (1_500, 1_200, 20)


def test_counts_are_exact_beyond_the_bounded_number_of_suspects(
    mysql: MySqlStore, mongo: UserStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_module, "_SUSPECTS", 100)
    put_rows(mysql, [user(key) for key in range(3_000)])
    put_documents(mongo, [user(key, login="old") for key in range(500, 3_000)])
    put_documents(mongo, [user(key) for key in range(5_000, 7_300)])
    writer_of(mongo).insert_versions([(str(key), "2015-01-01T00:00:00Z", key) for key in range(7_000, 7_300)], "load")
    found = audit(mysql, mongo, patience=NO_PATIENCE)
    assert (found.missing, found.different, found.extra, found.from_files) == (500, 2_500, 2_000, 300)
    assert found.reread == 5_000


def test_a_second_document_of_a_user_is_extra(mysql: MySqlStore, store: UserStore) -> None:
    put_rows(mysql, [user(1), user(2)])
    put_documents(store, [user(1, login="old"), user(2), user(1)])
    found = audit(mysql, store, patience=NO_PATIENCE)
    assert (found.documents, found.missing, found.extra, found.different) == (3, 0, 1, 0)
    assert found.offenders == (Offender("1", "extra"),)


def test_keys_that_are_no_text_or_no_number_are_extra(mysql: MySqlStore, store: UserStore) -> None:
    put_rows(mysql, [user(1)])
    put_documents(store, [user(1), {**user(0), "user_id": "007"}, {**user(0), "user_id": "octo"}])
    store.users.insert_many([{**user(0), "user_id": 1}, {"login": "nobody"}])
    found = audit(mysql, store, patience=NO_PATIENCE)
    assert (found.extra, found.missing, found.different) == (4, 0, 0)
    assert {offender.user_id for offender in found.offenders} == {"007", "octo", "1 (int)", "None (NoneType)"}


def test_changes_in_flight_are_waited_for(mysql: MySqlStore, mongo: UserStore) -> None:
    put_rows(mysql, [user(key, login="new") for key in range(10)])
    put_documents(mongo, [user(key, login="old") for key in range(5)])
    put_documents(mongo, [user(20)])

    def arrive() -> None:
        mongo.users.update_many({"login": "old"}, {"$set": {"login": "new"}})
        put_documents(mongo, [user(key, login="new") for key in range(5, 10)])
        mongo.users.delete_one({"user_id": "20"})

    timer = threading.Timer(0.7, arrive)
    timer.start()
    found = audit(mysql, mongo, patience=Patience(seconds=20))
    timer.join()
    assert found.equal
    assert found.reread == 11
    assert 0.5 < found.seconds < 10


def test_patience_ends(mysql: MySqlStore, mongo: UserStore) -> None:
    put_rows(mysql, [user(1)])
    found = audit(mysql, mongo, patience=Patience(seconds=0.6))
    assert found.missing == 1
    assert found.rounds > 3
    assert 0.5 < found.seconds < 3


# Rows that the audit must not leave out


def other_table(mysql_url: str, columns: str) -> MySqlStore:
    """A store on a new table with these columns in place of the documented one."""
    with MySqlStore(mysql_url) as admin:
        admin.execute([("DROP TABLE IF EXISTS `Users`", ())])
        admin.execute([(f"CREATE TABLE `Users` ({columns}) CHARACTER SET utf8mb4", ())])
    return MySqlStore(mysql_url, timeout_seconds=5)


TEXTS = "login VARCHAR(255), gravatar_id VARCHAR(255), avatar_url VARCHAR(255), url VARCHAR(255)"


def test_a_key_above_a_signed_bigint_is_missing_and_named(mysql_url: str, mongo: UserStore) -> None:
    with other_table(mysql_url, f"user_id BIGINT UNSIGNED PRIMARY KEY, {TEXTS}") as mysql:
        put_rows(mysql, [user(1), user(2**63), user(2**64 - 1)])
        # What the stream makes of the last one.
        put_documents(mongo, [user(1), user(-1)])
        found = audit(mysql, mongo, patience=NO_PATIENCE)
        assert (found.rows, found.missing, found.extra, found.unusual_keys) == (mysql.count(), 2, 1, 2)
        assert {offender.user_id for offender in found.offenders} == {str(2**63), str(2**64 - 1), "-1"}


@pytest.mark.parametrize(
    ("key", "readable", "unusual"),
    [
        (
            "VARCHAR(40) COLLATE utf8mb4_general_ci PRIMARY KEY",
            ["1", "-7", "10"],
            ["octo", "OCTA", "007", "9" * 30, "a\t", "a"],
        ),
        ("VARCHAR(40) COLLATE utf8mb4_bin PRIMARY KEY", ["1", "-7", "10"], ["octo", "OCTO", "", "007", "x\u00e9"]),
        ("VARCHAR(40) CHARACTER SET latin1 PRIMARY KEY", ["1", "2"], ["\u00e9"]),
        ("DECIMAL(30,0) PRIMARY KEY", ["1", "-7"], ["9" * 25]),
        ("VARBINARY(16) PRIMARY KEY", ["1", "2"], ["octo"]),
        ("SMALLINT PRIMARY KEY", ["1", "-7", "32767", "-32768"], []),
        ("INT UNSIGNED PRIMARY KEY", ["1", "4294967295"], []),
        ("INT ZEROFILL PRIMARY KEY", ["1", "20"], []),
    ],
)
def test_each_row_is_accounted_for_whatever_the_type_of_its_key(
    mysql_url: str, mongo: UserStore, key: str, readable: list[str], unusual: list[str]
) -> None:
    with other_table(mysql_url, f"user_id {key}, {TEXTS}") as mysql:
        put_rows(mysql, [{**user(0), "user_id": one} for one in readable + unusual])
        put_documents(mongo, [{**user(0), "user_id": one} for one in readable])
        found = audit(mysql, mongo, patience=NO_PATIENCE)
        assert (found.rows, found.documents) == (mysql.count(), len(readable))
        assert (found.missing, found.extra, found.different) == (len(unusual), 0, 0)
        assert {offender.user_id for offender in found.offenders} == set(unusual)
        mongo.users.update_many({}, {"$set": {"login": "other"}})
        assert audit(mysql, mongo, patience=NO_PATIENCE).different == len(readable)


def test_rows_without_a_key_or_with_one_twice_are_missing(
    mysql_url: str, mongo: UserStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that the rows of one key would not fit into what is read at once.
    monkeypatch.setattr(audit_module, "_BLOCK", 4)
    with other_table(mysql_url, f"user_id BIGINT, {TEXTS}") as mysql:
        put_rows(mysql, [user(key) for key in range(10)])
        put_rows(mysql, [user(3, login=f"other{number}") for number in range(6)])
        put_rows(mysql, [{**user(0), "user_id": None}, {**user(0), "user_id": None}])
        put_documents(mongo, [user(key) for key in range(10)])
        found = audit(mysql, mongo, patience=NO_PATIENCE)
        assert (found.rows, found.documents, found.missing) == (mysql.count(), 10, 8)
        assert {offender.user_id for offender in found.offenders} == {"3", "null"}
    with other_table(mysql_url, f"user_id VARBINARY(8) PRIMARY KEY, {TEXTS}") as mysql:
        mysql.execute([("INSERT INTO `Users` (user_id) VALUES (x'ff01')", ())])
        mongo.users.delete_many({})
        found = audit(mysql, mongo, patience=NO_PATIENCE)
        assert (found.rows, found.missing, found.unusual_keys) == (1, 1, 1)
        assert found.offenders == (Offender("0xFF01", "missing"),)


# Blocks


@pytest.mark.parametrize(
    "columns",
    [
        TEXTS,
        TEXTS.replace("(255)", "(255) CHARACTER SET utf8mb3"),
        TEXTS.replace("(255)", "(255) COLLATE utf8mb4_bin"),
        TEXTS.replace("VARCHAR(255)", "TEXT"),
        f"{TEXTS}, more INT DEFAULT 7, made VARCHAR(9) AS ('x') VIRTUAL",
    ],
)
def test_both_sides_make_the_same_hashes(mysql_url: str, columns: str) -> None:
    texts = [text for text in ODD_TEXTS if "utf8mb3" not in columns or all(ord(char) < 2**16 for char in text)]
    users = [user(key, login=text, gravatar_id=text, url=None) for key, text in enumerate(texts, start=-3)]
    users += [user(100, gravatar_id=None, url=""), user(101, gravatar_id="", url=None)]
    with other_table(mysql_url, f"user_id BIGINT PRIMARY KEY, {columns}") as mysql:
        statement = f"INSERT INTO `Users` ({', '.join(USER_FIELDS)}) VALUES (%s, %s, %s, %s, %s)"  # noqa: S608  only names
        mysql.execute([(statement, [found[name] for name in USER_FIELDS]) for found in users])
        assert mysql.digest(Span(), 1_000) == (len(users), hash_sum(users))
        one = mysql.digest(Span("100", "101"), 1_000)
        assert one == (1, hash_sum(users[-1:]))
        # Fields that run into each other, or change places, give other hashes.
        assert one[1] not in (hash_sum(users[-2:-1]), hash_sum([user(101, gravatar_id=None, url="")]))
        assert mysql.digest(Span("9"), 1_000) == (0, 0)
        assert mysql.digest(Span(), 2)[0] == 2


def test_equal_blocks_are_not_compared_row_by_row(
    mysql: MySqlStore, mongo: UserStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_module, "_BLOCK", 100)
    put_rows(mysql, [user(key) for key in range(3_000)])
    put_documents(mongo, [user(key) for key in range(3_000)])
    read: list[int] = []
    rows_within = MySqlStore.rows_within

    def counted(self: MySqlStore, *given: Any) -> list[Any]:
        found = rows_within(self, *given)
        read.append(len(found))
        return found

    monkeypatch.setattr(MySqlStore, "rows_within", counted)
    assert audit(mysql, mongo, patience=NO_PATIENCE).equal
    assert read == []
    # Two changes whose hashes would cancel out are in one block.
    mongo.users.update_many({"user_id": {"$in": ["1500", "1501"]}}, {"$set": {"login": "evil"}})
    mongo.users.delete_one({"user_id": "7"})
    found = audit(mysql, mongo, patience=NO_PATIENCE)
    assert (found.rows, found.documents, found.different, found.missing) == (3_000, 2_999, 2, 1)
    assert 0 < sum(read) <= 3 * 101


def test_many_users_from_files_beside_few_rows_are_sorted_out_block_by_block(
    mysql: MySqlStore, mongo: UserStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_module, "_BLOCK", 200)
    put_rows(mysql, [user(key) for key in range(0, 3_000, 6)])
    put_documents(mongo, [user(key) for key in range(3_000)])
    alone = [key for key in range(3_000) if key % 6]
    entries = [(str(key), "2015-01-01T00:00:00Z", key) for key in alone]
    writer_of(mongo).insert_versions(entries, "load")
    found = audit(mysql, mongo, patience=NO_PATIENCE)
    assert found.equal
    assert (found.rows, found.documents, found.from_files, found.reread) == (500, 3_000, 2_500, 0)
    mongo.book("versions").delete_one({"_id": "1"})
    assert audit(mysql, mongo, patience=NO_PATIENCE).offenders == (Offender("1", "extra"),)


def test_documents_of_one_user_over_the_end_of_a_block_are_counted_once(
    mysql: MySqlStore, store: UserStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_module, "_BLOCK", 4)
    put_rows(mysql, [user(key) for key in range(10)])
    put_documents(store, [user(key) for key in range(10)] + [user(5) for _ in range(9)])
    found = audit(mysql, store, patience=NO_PATIENCE)
    assert (found.rows, found.documents, found.extra, found.missing, found.different) == (10, 19, 9, 0, 0)


def test_a_collection_that_orders_text_by_a_collation_is_refused(mysql: MySqlStore, store: UserStore) -> None:
    store.database.create_collection("Users", collation={"locale": "en", "numericOrdering": True})
    put_documents(store, [user(key) for key in (9, 10, 100)])
    found = list(store.users.find({}, {"user_id": 1}).sort("user_id", 1))
    if [one["user_id"] for one in found] == ["10", "100", "9"]:
        pytest.skip("this server does not order by a collection's collation")
    with pytest.raises(RefusedError, match="collation"):
        audit(mysql, store, patience=NO_PATIENCE)


# What is told of differences


def test_every_difference_is_given_though_few_are_kept(mysql: MySqlStore, mongo: UserStore) -> None:
    put_rows(mysql, [user(key) for key in range(1_500)])
    put_documents(mongo, [user(key) for key in range(5_000, 6_200)])
    given: list[Offender] = []
    found = audit(mysql, mongo, patience=NO_PATIENCE, limit=3, on_difference=given.append)
    assert len(found.offenders) == 3
    assert found.total == len(given) == len({offender.user_id for offender in given}) == 2_700
    assert found.extra_keys == (5_000, 6_199)
    assert len(audit(mysql, mongo, patience=NO_PATIENCE, limit=10_000).offenders) == 2_700


def test_values_in_each_others_columns_are_told_as_shifted(mysql: MySqlStore, mongo: UserStore) -> None:
    row: dict[str, str | None] = {"user_id": "1", "login": "one", "gravatar_id": "g1", "avatar_url": "a1", "url": "u1"}
    put_rows(mysql, [row, user(2)])
    put_documents(mongo, [{**row, "gravatar_id": None, "avatar_url": "g1", "url": "a1"}, user(2, login="x")])
    found = audit(mysql, mongo, patience=NO_PATIENCE)
    assert (found.different, found.shifted) == (2, 1)
    assert {offender.user_id: offender.shifted for offender in found.offenders} == {"1": True, "2": False}
    assert "2 different (1 shifted)" in found.summary()


class Follower:
    """Applies a workload's changes to the collection some time after their commit, as a stream does."""

    def __init__(self, mongo: UserStore, delay_seconds: float) -> None:
        self._mongo = mongo
        self._delay = delay_seconds
        self._changes: queue.Queue[tuple[float, Sequence[RowChange]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._follow)
        self._users: Users = {}

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._changes.put(None)
        self._thread.join()

    def committed(self, changes: Sequence[RowChange], _at_ms: int) -> None:
        """Take the changes of one transaction."""
        self._changes.put((time.monotonic() + self._delay, changes))

    def _follow(self) -> None:
        while (taken := self._changes.get()) is not None:
            due, changes = taken
            time.sleep(max(0.0, due - time.monotonic()))
            for change in changes:
                self._apply(change)

    def _apply(self, change: RowChange) -> None:
        key = str(change.key)
        if change.kind == INSERT:
            self._users[key] = {"user_id": key, **change.fields}
        elif change.kind == DELETE:
            del self._users[key]
        elif change.kind == KEY_CHANGE:
            self._users[str(change.new_key)] = {**self._users.pop(key), "user_id": str(change.new_key)}
        else:
            self._users[key] |= change.fields
        for touched in {key, str(change.new_key or key)}:
            if touched in self._users:
                self._mongo.users.replace_one({"user_id": touched}, self._users[touched], upsert=True)
            else:
                self._mongo.users.delete_one({"user_id": touched})


@pytest.mark.parametrize(
    "mix",
    [
        Mix(rows=30, odd=0.3, transaction=0.1, again=0.5),
        # A handful of rows, each updated far more often than the delay is long: the sides are never the same at once.
        Mix(insert=1, update=99, delete=0, key_change=0),
    ],
    ids=["all kinds", "hot rows"],
)
def test_a_collection_that_follows_with_a_delay_is_equal_at_any_moment(
    mysql_url: str, mysql: MySqlStore, mongo: UserStore, mix: Mix
) -> None:
    with MySqlStore(mysql_url) as source, Follower(mongo, delay_seconds=0.2) as follower:
        workload = Workload(source, rate=200, seed=5, mix=mix, on_commit=follower.committed)
        stop = threading.Event()
        thread = threading.Thread(target=lambda: workload.run(seconds=60, stop=stop))
        thread.start()
        time.sleep(0.5)
        during = [audit(mysql, mongo, patience=Patience(seconds=5)) for _ in range(3)]
        stop.set()
        thread.join()
    assert [found.summary() for found in during if not found.equal] == []
    assert sum(found.reread for found in during) > 0
    after = audit(mysql, mongo, patience=NO_PATIENCE)
    assert after.equal
    assert (after.rows, after.reread) == (mysql.count(), 0)
    assert after.rows > 0

    mongo.users.delete_one({})
    assert audit(mysql, mongo, patience=NO_PATIENCE).missing == 1


def test_an_outage_is_an_error_and_never_a_difference(mysql: MySqlStore) -> None:
    put_rows(mysql, [user(1)])
    away = "mongodb://127.0.0.1:9"
    with UserStore(away, "x", "Users", timeout_seconds=0.5) as mongo, pytest.raises(UnavailableError, match="MongoDB"):
        audit(mysql, mongo)


def test_a_missing_table_is_an_error_and_never_a_difference(mysql_url: str, mongo: UserStore) -> None:
    put_documents(mongo, [user(1)])
    with MySqlStore(mysql_url) as empty, pytest.raises(ConfigError, match="1146"):
        audit(empty, mongo)
