"""The whole local stack: from nothing to a row in the topic, and back after anything that kills a part of it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pymysql
import pytest
from confluent_kafka import Consumer, TopicPartition
from pymongo import MongoClient

from ghsync_dagster.domain.errors import UnavailableError
from ghsync_dagster.local import kafka, stack
from ghsync_dagster.settings import Settings, load_settings
from ghsync_dagster.stores.mysql_url import parse_mysql_url
from ghsync_dagster_tests.support.cdc_parts import kill
from ghsync_dagster_tests.support.long_campaign import HANG_SECONDS, LONG

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.integration

TOPIC = "mysql-server.new_data.Users"
ids = itertools.count(1)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Settings of a home of this module's own, in a folder with a space; its servers are stopped afterwards."""
    made = load_settings(GHSYNC_HOME=tmp_path_factory.mktemp("stack") / "a home")
    yield made
    stack.down(made, progress=print)
    assert not servers_of(made)


@pytest.fixture
def up(settings: Settings) -> dict[str, stack.ServiceStatus]:
    """The whole stack, up."""
    return stack.up(settings, progress=print)


def servers_of(settings: Settings) -> list[int]:
    """Return the pids of all processes that have the home in their command line."""
    home = str(settings.home_dir)
    return [
        process.pid
        for process in psutil.process_iter(["cmdline", "status"])
        if any(home in part for part in process.info["cmdline"] or [])
        and process.info["status"] != psutil.STATUS_ZOMBIE
    ]


def ghsync(settings: Settings, *arguments: str) -> str:
    environment = {**os.environ, "GHSYNC_HOME": str(settings.home_dir)}
    command = [sys.executable, "-m", "ghsync_dagster.cli", *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS, check=True
    ).stdout


@contextlib.contextmanager
def database(url: str) -> Iterator[Any]:
    address = parse_mysql_url(url)
    with (
        pymysql.connect(
            host=address.host,
            port=address.port,
            user=address.user,
            password=address.password,
            database="new_data",
            autocommit=True,
        ) as connection,
        connection.cursor() as cursor,
    ):
        yield cursor


def insert(up: dict[str, stack.ServiceStatus]) -> int:
    """Insert a row into the database and return its key."""
    user_id = next(ids)
    with database(str(up["mysql"].login)) as cursor:
        cursor.execute("INSERT INTO Users (user_id, login) VALUES (%s, %s)", (user_id, f"login{user_id}"))
    return user_id


def arrived(up: dict[str, stack.ServiceStatus], *user_ids: int) -> list[dict[str, Any]]:
    """Return the change events of these keys, from the topic's beginning; wait until each has one."""
    consumer = Consumer({"bootstrap.servers": up["kafka"].uri, "group.id": uuid.uuid4().hex, "log_level": 0})
    consumer.assign([TopicPartition(TOPIC, 0, 0)])
    missing, found = set(user_ids), []
    deadline = time.monotonic() + 60
    while missing and time.monotonic() < deadline:
        for record in consumer.consume(100, 0.2):
            content, key = record.value(), record.key()
            if record.error() or not content or not key or json.loads(key)["user_id"] not in user_ids:
                continue
            found.append(json.loads(content))
            missing.discard(json.loads(key)["user_id"])
    consumer.close()
    assert not missing
    return found


def port_of(status: stack.ServiceStatus) -> int:
    return int(str(status.uri).removesuffix("/new_data").rpartition(":")[2])


def test_a_row_of_the_database_arrives_in_the_topic(up: dict[str, stack.ServiceStatus]) -> None:
    user_id = insert(up)
    (event,) = arrived(up, user_id)
    assert (event["op"] in ("c", "r"), event["before"]) == (True, None)
    assert event["after"] == {
        "user_id": user_id,
        "login": f"login{user_id}",
        "gravatar_id": None,
        "avatar_url": None,
        "url": None,
    }
    assert event["source"]["table"] == "Users"


def test_the_temporary_tables_of_the_database_are_where_no_other_server_removes_them(
    settings: Settings, up: dict[str, stack.ServiceStatus]
) -> None:
    with database(str(up["mysql"].login)) as cursor:
        cursor.execute("SELECT @@tmpdir")
        assert Path(cursor.fetchone()[0]) == settings.home_dir / "mysql" / "tmp"


def test_the_topic_has_one_partition_and_no_other_topic_makes_itself(up: dict[str, stack.ServiceStatus]) -> None:
    topics = kafka._admin(str(up["kafka"].uri)).list_topics("unheard-of", timeout=10).topics
    assert topics["unheard-of"].error is not None
    topics = kafka._admin(str(up["kafka"].uri)).list_topics(timeout=10).topics
    assert "unheard-of" not in topics
    assert len(topics[TOPIC].partitions) == 1


def test_up_again_changes_nothing(settings: Settings, up: dict[str, stack.ServiceStatus]) -> None:
    said: list[str] = []
    again = stack.up(settings, progress=said.append)
    assert {name: status.as_json() for name, status in again.items()} == {n: s.as_json() for n, s in up.items()}
    assert [line for line in said if "starting" in line or "registering" in line or "changing" in line] == []
    assert len(servers_of(settings)) == 4


def test_status_gives_a_program_what_it_needs_to_connect(
    settings: Settings, up: dict[str, stack.ServiceStatus]
) -> None:
    found = json.loads(ghsync(settings, "status", "--json"))
    assert found.pop("places")["home"] == str(settings.home_dir)
    assert list(found) == ["mongo", "mysql", "kafka", "connect"]
    assert {name: each["pid"] for name, each in found.items()} == {name: status.pid for name, status in up.items()}
    assert {each["state"] for each in found.values()} == {"up"}
    assert found["connect"]["connector"] == "RUNNING"
    assert found["kafka"]["bootstrap_servers"] == up["kafka"].uri
    assert httpx.get(f"{found['connect']['url']}/connectors").json() == ["ghsync-users"]
    with database(found["mysql"]["url"]) as cursor:
        cursor.execute("SHOW CREATE TABLE Users")
        assert "PRIMARY KEY (`user_id`)" in cursor.fetchone()[1]
    with MongoClient[dict[str, Any]](found["mongo"]["uri"]) as client:
        assert client.admin.command("ping")["ok"] == 1


def test_the_password_is_told_nowhere_but_in_files_of_the_owner(
    settings: Settings, up: dict[str, stack.ServiceStatus]
) -> None:
    password = parse_mysql_url(str(up["mysql"].login)).password
    assert len(password) >= 32
    with_password = [path for path in settings.home_dir.glob("*/*") if path.is_file() and password in path.read_text()]
    assert {path.name for path in with_password} == {"password", "setup.sql"}
    secret_files = [*with_password, *(settings.home_dir / "connect" / "secrets").glob("*/*")]
    assert len(secret_files) == 4
    assert {path.stat().st_mode & 0o777 for path in secret_files} == {0o600}
    assert not any(password in path.read_text(errors="replace") for path in settings.home_dir.glob("*/log/*"))
    assert not any(password in part for status in up.values() for part in psutil.Process(status.pid).cmdline())
    assert password not in httpx.get(f"{up['connect'].uri}/connectors/ghsync-users/config").text
    assert password not in ghsync(settings, "status")


def test_servers_that_are_named_are_used_and_never_stopped(up: dict[str, stack.ServiceStatus], tmp_path: Path) -> None:
    named = load_settings(
        GHSYNC_HOME=tmp_path / "unused",
        MONGODB_URI=up["mongo"].uri,
        MYSQL_URL=up["mysql"].login,
        KAFKA_BOOTSTRAP_SERVERS=up["kafka"].uri,
        CONNECT_URL=up["connect"].uri,
    )
    assert {name: stack.ensure(named, name) for name in up} == {name: status.login for name, status in up.items()}
    found = stack.up(named, progress=print)
    assert {(status.state, status.server, status.pid) for status in found.values()} == {("up", "external", None)}
    assert {name: status.uri for name, status in found.items()} == {name: status.uri for name, status in up.items()}
    assert found["connect"].more["connector"] == "RUNNING"
    stack.down(named, progress=print)
    assert all(psutil.pid_exists(status.pid) for status in up.values() if status.pid)
    assert not (tmp_path / "unused").exists()


def test_a_connector_that_was_changed_or_halted_is_put_right(
    settings: Settings, up: dict[str, stack.ServiceStatus]
) -> None:
    with httpx.Client(base_url=str(up["connect"].uri)) as client:
        config = client.get("/connectors/ghsync-users/config").json()
        client.put("/connectors/ghsync-users/config", json=config | {"tombstones.on.delete": "false"})
        client.put("/connectors/ghsync-users/pause")
        deadline = time.monotonic() + 30
        while stack.status(settings)["connect"].more["connector"] != "PAUSED":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert stack.up(settings, progress=print)["connect"].more["connector"] == "RUNNING"
        assert client.get("/connectors/ghsync-users/config").json() == config
    arrived(up, insert(up))


def test_a_new_snapshot_as_the_operations_manual_has_it_brings_every_row_again(
    settings: Settings, up: dict[str, stack.ServiceStatus]
) -> None:
    before = [insert(up), insert(up)]
    arrived(up, *before)
    with httpx.Client(base_url=str(up["connect"].uri), timeout=30) as client:
        for method, what in (("PUT", "stop"), ("DELETE", "offsets")):
            client.request(method, f"/connectors/ghsync-users/{what}").raise_for_status()
    assert stack.up(settings, ["connect"], progress=print)["connect"].more["connector"] == "RUNNING"
    after = insert(up)
    deadline = time.monotonic() + 60
    while [event["op"] for event in arrived(up, *before, after)].count("r") < len(before):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_deployment_whose_connector_knows_its_own_table_only_is_told_until_its_new_snapshot(
    settings: Settings, up: dict[str, stack.ServiceStatus]
) -> None:
    name = "schema.history.internal.store.only.captured.tables.ddl"
    told: list[str] = []

    def up_again() -> str:
        told.clear()
        assert stack.up(settings, ["connect"], progress=told.append)["connect"].more["connector"] == "RUNNING"
        return str(client.get("/connectors/ghsync-users/config").json()[name])

    with httpx.Client(base_url=str(up["connect"].uri), timeout=30) as client:
        config = client.get("/connectors/ghsync-users/config").json()
        assert config[name] == "false"
        client.put("/connectors/ghsync-users/config", json=config | {name: "true", "poll.interval.ms": "50"})
        arrived(up, insert(up))
        for _ in range(2):
            assert up_again() == "true"
            assert any("Take a new snapshot" in line for line in told)
        told.clear()
        stack.up(load_settings(CONNECT_URL=up["connect"].uri), ["connect"], progress=told.append)
        assert any("Take a new snapshot" in line for line in told)
        assert client.get("/connectors/ghsync-users/config").json()["poll.interval.ms"] == config["poll.interval.ms"]
        for method, what in (("PUT", "stop"), ("DELETE", "offsets")):
            client.request(method, f"/connectors/ghsync-users/{what}").raise_for_status()
        assert up_again() == "false"
        assert not any("Take a new snapshot" in line for line in told)
    arrived(up, insert(up))


def test_a_connector_that_can_not_run_is_an_error_with_its_reason(
    settings: Settings, up: dict[str, stack.ServiceStatus]
) -> None:
    address = parse_mysql_url(str(up["mysql"].login))
    with database(str(up["mysql"].login)) as cursor:
        cursor.execute("DROP USER IF EXISTS 'weak'@'%'")
        cursor.execute("CREATE USER 'weak'@'%' IDENTIFIED BY 'w3ak-sécret'")
    url = f"mysql://weak:w3ak-s%C3%A9cret@{address.host}:{address.port}/new_data"
    weak = load_settings(GHSYNC_HOME=settings.home_dir, MYSQL_URL=url)
    # MariaDB's connector is taken in and then fails; MySQL's is refused at once.
    with pytest.raises(UnavailableError, match=r"FAILED, .*[Aa]ccess denied|refuses PUT .*ghsync-users") as caught:
        stack.up(weak, ["connect"], progress=print)
    assert "REPLICATION SLAVE" in caught.value.way_out
    assert "w3ak-s" not in str(caught.value)
    # While it is halted its task stays as it was: failed.
    httpx.put(f"{up['connect'].uri}/connectors/ghsync-users/pause")
    assert stack.up(settings, progress=print)["connect"].more["connector"] == "RUNNING"
    arrived(up, insert(up))


@pytest.mark.faults
@LONG
@pytest.mark.parametrize("service", ["mongo", "mysql", "kafka", "connect"])
def test_a_server_killed_hard_is_back_with_its_data(
    settings: Settings, up: dict[str, stack.ServiceStatus], service: str
) -> None:
    before = insert(up)
    arrived(up, before)
    with MongoClient[dict[str, Any]](up["mongo"].uri) as client:
        client.things.numbers.insert_one({"_id": before})
    kill(up[service])
    assert stack.status(settings)[service].state == "failed"
    again = stack.up(settings, progress=print)
    assert {status.state for status in again.values()} == {"up"}
    changed = {name for name, status in again.items() if status.pid != up[name].pid}
    assert changed == {service}
    after = insert(again)
    arrived(again, before, after)
    with database(str(again["mysql"].login)) as cursor:
        cursor.execute("SELECT count(*) FROM Users WHERE user_id IN (%s, %s)", (before, after))
        assert cursor.fetchone() == (2,)
    with MongoClient[dict[str, Any]](again["mongo"].uri) as client:
        assert client.things.numbers.count_documents({"_id": before}) == 1


def test_all_killed_and_their_ports_taken_they_are_back_on_others(
    settings: Settings, up: dict[str, stack.ServiceStatus]
) -> None:
    before = insert(up)
    kill(*up.values())
    with contextlib.ExitStack() as others:
        for status in up.values():
            other = others.enter_context(socket.socket())
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("127.0.0.1", port_of(status)))
            other.listen()
        again = stack.up(settings, progress=print)
        assert {name for name, status in again.items() if status.uri == up[name].uri} == set()
        arrived(again, before, insert(again))


def test_down_leaves_no_process_and_no_lock(settings: Settings, up: dict[str, stack.ServiceStatus]) -> None:
    ports = [port_of(status) for status in up.values()]
    ghsync(settings, "down")
    assert servers_of(settings) == []
    for port in ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0
    assert {status.state for status in stack.down(settings, progress=print).values()} == {"down"}
