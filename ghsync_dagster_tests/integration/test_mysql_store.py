"""Reading and changing the table on a real server, what a MYSQL_URL means, and how failures are told."""

from __future__ import annotations

import socket
from threading import Thread
from urllib.parse import urlsplit

import pymysql
import pytest

from ghsync_dagster.dev.workload import ODD_TEXTS, Mix, Workload
from ghsync_dagster.domain.errors import ConfigError, RefusedError, UnavailableError
from ghsync_dagster.stores.mysql import KEY_MAX, KEY_MIN, LockedRows, MySqlStore, is_key
from ghsync_dagster_tests.support.cdc_parts import until

pytestmark = [pytest.mark.integration, pytest.mark.servers("stream")]

INSERT = "INSERT INTO `Users` VALUES (%s, %s, %s, %s, %s)"


def insert(mysql: MySqlStore, *keys: int, login: str = "octo") -> None:
    """Insert plain rows."""
    mysql.execute([(INSERT, (key, login, None, "a", "u")) for key in keys])


def test_a_row_has_the_shape_of_a_stored_user(mysql: MySqlStore) -> None:
    mysql.ensure_table()
    insert(mysql, -7)
    assert list(mysql.rows_by_id(["-7"]).values()) == [
        {"user_id": "-7", "login": "octo", "gravatar_id": None, "avatar_url": "a", "url": "u"}
    ]
    assert mysql.count() == 1
    assert mysql.version()


def test_lookups_take_keys_that_mysql_cannot_hold(mysql: MySqlStore) -> None:
    insert(mysql, 1, 2, 3)
    odd = ["007", "-0", "octo", "", "9" * 30, str(KEY_MAX + 1), "1 OR 1=1", "\u0661"]
    assert set(mysql.rows_by_id(["1", "3", "4", *odd])) == {"1", "3"}
    assert mysql.rows_by_id(odd) == {}
    assert mysql.rows_by_id([]) == {}


def test_keys_are_what_mysql_writes() -> None:
    assert all(is_key(str(key)) for key in (0, 1, -1, KEY_MIN, KEY_MAX))
    assert not any(is_key(key) for key in ("", "-", "+1", "01", "1.0", "1\n", str(KEY_MIN - 1)))


@pytest.mark.parametrize(
    ("of_type", "least", "most"),
    [
        ("BIGINT", KEY_MIN, KEY_MAX),
        ("INT", -(2**31), 2**31 - 1),
        ("INT UNSIGNED", 0, 2**32 - 1),
        ("SMALLINT", -(2**15), 2**15 - 1),
    ],
)
def test_rows_and_gaps_are_locked_whatever_whole_number_the_key_is(
    mysql: MySqlStore, mysql_url: str, of_type: str, least: int, most: int
) -> None:
    mysql.execute([(f"ALTER TABLE Users MODIFY user_id {of_type} NOT NULL", ())])
    insert(mysql, least, 5, 9, 20, most)
    beyond = [str(least - 1), str(most + 1), str(KEY_MIN - 1), str(KEY_MAX + 1)]
    found: list[LockedRows | None] = []
    with MySqlStore(mysql_url) as reader, MySqlStore(mysql_url) as holder, MySqlStore(mysql_url) as other:
        # The reading keeps its locks until it gets another one.
        holder.execute([("SELECT GET_LOCK('held', 0)", ())])
        reader._dialect = reader._dialect_of_server()._replace(gtids="GET_LOCK('held', 30)")
        wanted = [str(least), "5", "7", str(most), *beyond]
        thread = Thread(target=lambda: found.append(reader.read_locked(wanted)))
        thread.start()
        until(lambda: any(row[6] == "User lock" for row in holder._run("Asking", "SHOW PROCESSLIST")))

        def is_free(statement: str, key: int) -> bool:
            try:
                other.execute([(f"SET STATEMENT innodb_lock_wait_timeout = 0 FOR {statement}", (key,))])
            except UnavailableError:
                return False
            return True

        update, into = (
            "UPDATE Users SET login = 'x' WHERE user_id = %s",
            "INSERT INTO Users (user_id, login) VALUES (%s, 'x')",
        )
        try:
            assert [is_free(update, key) for key in (least, 5, most, 9, 20)] == [False, False, False, True, True]
            assert [is_free(into, key) for key in (6, 7, 8, 12)] == [False, False, False, True]
        finally:
            holder.close()
            thread.join()
    [locked] = found
    assert locked is not None
    assert set(locked.rows) == {str(least), "5", str(most)}
    alone = mysql.read_locked(beyond)
    assert alone is not None
    assert alone.rows == {}


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_text_comes_back_as_it_was(mysql: MySqlStore, text: str) -> None:
    mysql.execute([(INSERT, (1, text, text, None, text))])
    # In one request of several statements too.
    mysql.execute([(INSERT, (key, text, text, None, text)) for key in (2, 3)])
    expected = {"login": text, "gravatar_id": text, "avatar_url": None, "url": text}
    assert mysql.rows_by_id(["1", "2", "3"]) == {key: {"user_id": key, **expected} for key in ("1", "2", "3")}


def test_a_transaction_is_whole_or_not_there(mysql: MySqlStore, mysql_url: str) -> None:
    insert(mysql, 1)
    with pytest.raises(RefusedError, match="code 1062"):
        mysql.execute([(INSERT, (key, "x", None, None, None)) for key in (2, 3, 1, 4)])
    assert mysql.count() == 1
    # The connection is not left in the broken transaction.
    insert(mysql, 5)
    with MySqlStore(mysql_url, timeout_seconds=5) as other:
        assert set(other.rows_by_id(["2", "5"])) == {"5"}


def test_touched_rows_are_counted_though_nothing_changed(mysql: MySqlStore) -> None:
    insert(mysql, 1, 2)
    assert mysql.execute([("UPDATE `Users` SET `login` = 'octo'", ())]) == 2
    assert mysql.execute([("DELETE FROM `Users` WHERE `user_id` = %s", (9,))]) == 0
    assert mysql.execute([("UPDATE `Users` SET `url` = 'v'", ()), ("DELETE FROM `Users`", ())]) == 4
    assert mysql.execute([]) == 0


def test_a_read_sees_what_others_have_committed_since(mysql: MySqlStore, mysql_url: str) -> None:
    assert mysql.count() == 0
    with MySqlStore(mysql_url) as other:
        insert(other, 1)
        assert mysql.count() == 1
        other.execute([("UPDATE `Users` SET `login` = 'new'", ())])
        assert mysql.rows_by_id(["1"])["1"]["login"] == "new"


def test_a_killed_connection_is_an_outage_and_made_again(mysql: MySqlStore, mysql_url: str) -> None:
    number = mysql._run("Asking", "SELECT CONNECTION_ID()")[0][0]
    with MySqlStore(mysql_url) as admin:
        admin.execute([("KILL %s", (number,))])
    with pytest.raises(UnavailableError, match="can't be reached or can't answer now"):
        mysql.count()
    assert mysql.count() == 0


def test_a_locked_row_is_an_outage_that_may_pass(mysql: MySqlStore) -> None:
    insert(mysql, 1)
    mysql.execute([("SET SESSION innodb_lock_wait_timeout = 1", ())])
    at = mysql.address
    holder = pymysql.connect(
        host=at.host, port=at.port, user=at.user, password=at.password.encode(), database=at.database
    )
    with holder, holder.cursor() as cursor:
        cursor.execute("UPDATE `Users` SET `login` = 'held'")
        with pytest.raises(UnavailableError, match="code 1205"):
            mysql.execute([("UPDATE `Users` SET `login` = 'mine'", ())])
    assert mysql.execute([("UPDATE `Users` SET `login` = 'mine'", ())]) == 1


def test_a_wrong_password_is_refused_and_not_shown(mysql: MySqlStore) -> None:
    at = mysql.address
    wrong = f"mysql://{at.user}:wr0ng-secret@{at.host}:{at.port}/{at.database}"
    with MySqlStore(wrong) as store, pytest.raises(RefusedError, match="Check the user, password") as told:
        store.count()
    assert "wr0ng-secret" not in str(told.value)
    assert "wr0ng-secret" not in repr(store.address)


def test_a_missing_database_or_table_is_a_setting_to_correct(mysql_url: str) -> None:
    with MySqlStore(mysql_url, table="No`Such") as store, pytest.raises(ConfigError, match="code 1146"):
        store.count()
    with (
        MySqlStore(urlsplit(mysql_url)._replace(path="/no_such_database").geturl()) as store,
        pytest.raises(ConfigError, match="code 1049"),
    ):
        store.count()


def test_nobody_there_is_an_outage() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (
        MySqlStore(f"mysql://app:pw@127.0.0.1:{port}/new_data", timeout_seconds=1) as store,
        pytest.raises(UnavailableError, match=f"127.0.0.1:{port}"),
    ):
        store.count()


def test_a_server_that_never_answers_is_an_outage() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        with (
            MySqlStore(f"mysql://app:pw@127.0.0.1:{port}/new_data", timeout_seconds=0.2) as store,
            pytest.raises(UnavailableError),
        ):
            store.count()


def test_a_planned_history_meets_its_rows_on_the_server_beside_others(mysql: MySqlStore) -> None:
    insert(mysql, 1, 2, 3, login="theirs")
    mix = Mix(rows=200, odd=0.3, transaction=0.2, again=0.5)
    first = Workload(mysql, rate=1e6, seed=1, base_id=1_000_000, mix=mix).run(changes=2_000)
    second = Workload(mysql, rate=1e6, seed=2, base_id=2_000_000, mix=mix, longest_transaction=1).run(changes=300)
    assert (first.missed, second.missed) == (0, 0)
    net = sum(report.changes["insert"] - report.changes["delete"] for report in (first, second))
    assert mysql.count() == net + 3
    assert all(row["login"] == "theirs" for row in mysql.rows_by_id(["1", "2", "3"]).values())
