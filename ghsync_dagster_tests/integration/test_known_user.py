"""What ``ghsync show`` tells of a user: gathered from both real sides, with nothing written."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from ghsync_dagster.cdc.health.known_user import EQUAL, NO_KEY, NO_ROW, KnownUser, known_user
from ghsync_dagster.cli import app as cli
from ghsync_dagster.domain.letters import Letter
from ghsync_dagster.stores.mongo.letters import LetterIndex
from ghsync_dagster.stores.mongo.repairs import RepairRequests
from ghsync_dagster.stores.mysql import MySqlStore
from ghsync_dagster_tests.support.cdc_parts import free_port
from ghsync_dagster_tests.support.guards import writer_of

if TYPE_CHECKING:
    from ghsync_dagster.stores.mongo.users import UserStore

pytestmark = [pytest.mark.integration, pytest.mark.servers("stream")]

TOPIC = "t"
USER = {"user_id": "7", "login": "octo", "gravatar_id": None, "avatar_url": "a", "url": "u"}
ROW = (7, "octo", None, "a", "u")


@pytest.fixture
def sides(store: UserStore, mysql: MySqlStore) -> tuple[UserStore, MySqlStore]:
    """Both sides, set up and empty."""
    store.ensure_collection()
    LetterIndex(store, TOPIC).ensure()
    return store, mysql


def look(sides: tuple[UserStore, MySqlStore], user_id: str = "7") -> KnownUser:
    """Gather what is known; the connection is closed as a command would."""
    store, mysql = sides
    return known_user(store, TOPIC, user_id, lambda: mysql)


def test_of_nobody_nothing_is_known(sides: tuple[UserStore, MySqlStore]) -> None:
    for user_id, told in {"7": NO_ROW, "007": NO_KEY, "9" * 20: NO_KEY}.items():
        found = look(sides, user_id)
        assert not found.is_known
        assert found == KnownUser(user_id, None, None, False, None, [], told)


def test_a_user_of_a_file_is_told_with_its_event_and_what_mysql_has_otherwise(
    sides: tuple[UserStore, MySqlStore],
) -> None:
    store, mysql = sides
    store.users.insert_one(dict(USER))
    writer_of(store).insert_versions([("7", "2015-01-01T00:00:00Z", 42)], "a-load")
    found = look(sides)
    assert found.is_known
    assert found.stored == USER
    assert found.version
    assert (found.version.event_id, found.version.load, found.mysql) == (42, "a-load", NO_ROW)
    mysql.execute([("INSERT INTO Users VALUES (%s, %s, %s, %s, %s)", ROW)])
    assert look(sides).mysql == EQUAL
    mysql.execute([("UPDATE Users SET login = 'other', url = NULL", ())])
    assert look(sides).mysql == "login 'other', url None"


def test_deletions_repairs_and_letters_are_told(sides: tuple[UserStore, MySqlStore]) -> None:
    store, _ = sides
    writer_of(store).record_deleted(["7"])
    RepairRequests(store).request(["7"])
    LetterIndex(store, TOPIC).add_refused([Letter(TOPIC, 0, 5, 50, "7", "not-json", "", "2026-01-01", (0, 0))])
    found = look(sides)
    assert found.deleted
    assert found.repair
    assert found.repair["state"] == "requested"
    assert found.open_letters == ["t-0-5"]
    assert found.is_known


def test_mysql_away_is_told_and_ends_nothing(sides: tuple[UserStore, MySqlStore]) -> None:
    store, _ = sides
    store.users.insert_one(dict(USER))
    away = f"mysql://root:s3cret@127.0.0.1:{free_port()}/new_data"
    found = known_user(store, TOPIC, "7", lambda: MySqlStore(away, timeout_seconds=1))
    assert found.stored == USER
    assert found.mysql.startswith("no answer: ")
    assert "s3cret" not in found.mysql
    assert found.is_known
    assert found.is_mysql_away
    assert known_user(store, TOPIC, "7", None).mysql == "not asked: there is no MySQL here"
    nobody = known_user(store, TOPIC, "8", lambda: MySqlStore(away, timeout_seconds=1))
    assert nobody.is_mysql_away
    assert not nobody.is_known


def test_the_command_shows_it_and_ends_with_1_where_nobody_is_known(
    sides: tuple[UserStore, MySqlStore], mongo_uri: str, mysql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, mysql = sides
    store.users.insert_one(dict(USER))
    mysql.execute([("INSERT INTO Users VALUES (%s, %s, %s, %s, %s)", ROW)])
    for name, value in {
        "MONGODB_URI": mongo_uri,
        "MONGODB_DATABASE": store.database.name,
        "MYSQL_URL": mysql_url,
    }.items():
        monkeypatch.setenv(name, value)
    shown = CliRunner().invoke(cli.app, ["show", "7"])
    assert shown.exit_code == 0
    lines = dict(line.split(maxsplit=1) for line in shown.stdout.splitlines() if line)
    assert (lines["login"], lines["written"], lines["MySQL"]) == ("'octo'", "by    the stream", EQUAL)
    both = CliRunner().invoke(cli.app, ["show", "7", "8", "--json"])
    assert both.exit_code == 1
    assert [user["mysql"] for user in json.loads(both.stdout)] == [EQUAL, NO_ROW]


@pytest.mark.parametrize("user_id", ["octocat", "", "1.5", "0x7", "7 ", "+7", "\u0667"])
def test_what_is_no_id_is_one_clear_error_before_any_server_is_asked(
    monkeypatch: pytest.MonkeyPatch, user_id: str
) -> None:
    monkeypatch.setenv("MONGODB_URI", f"mongodb://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MYSQL_URL", f"mysql://root@127.0.0.1:{free_port()}/new_data")
    refused = CliRunner().invoke(cli.app, ["show", "7", user_id])
    assert refused.exit_code == 2
    assert refused.stdout == ""
    assert [line.partition(":")[0] for line in refused.stderr.splitlines()] == ["error", "way out"]
    assert f"No user id: {user_id!r}" in refused.stderr
