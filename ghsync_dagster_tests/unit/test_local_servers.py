"""What the local servers are told, and what is said of them, without starting one."""

from __future__ import annotations

import json
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING
from unittest.mock import MagicMock

import httpx
import pytest
from filelock import FileLock

from ghsync_dagster import connector, progress
from ghsync_dagster.domain.errors import ConfigError, UnavailableError
from ghsync_dagster.local import connect, mysql, stack
from ghsync_dagster.local.first_files import make_first_files
from ghsync_dagster.local.kafka import KafkaServer
from ghsync_dagster.local.kafka_program import properties
from ghsync_dagster.local.supervisor import ServerSpec, ServiceStatus, Supervisor, _free_ports, server_to_use
from ghsync_dagster.settings import load_settings
from ghsync_dagster.stores import connect as stores_connect
from ghsync_dagster.wiring import existing_kafka, open_mysql
from ghsync_dagster_tests.support.cdc_parts import free_port

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_a_free_port_is_taken_in_the_order_last_default_any() -> None:
    with socket.socket() as taken, socket.socket() as probe:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        probe.bind(("127.0.0.1", 0))
        busy, free = taken.getsockname()[1], probe.getsockname()[1]
        probe.close()
        assert _free_ports((free, busy), (busy, busy))[0] == free
        assert _free_ports((), (free,)) == (free,)
        assert busy not in _free_ports((busy, busy), (busy, busy))
        assert len(set(_free_ports((), (free, free)))) == 2


def test_first_files_get_their_name_once_they_are_whole(tmp_path: Path) -> None:
    data = tmp_path / "data" / "some"
    script = (
        "import pathlib, sys; pathlib.Path(sys.argv[1]).mkdir(); pathlib.Path(sys.argv[1], 'f').write_text(input())"
    )
    make_first_files(
        data,
        lambda part: [sys.executable, "-c", script, str(part)],
        what="It",
        variable="ITS_URL",
        given=lambda: "in\n",
    )
    assert (data / "f").read_text() == "in"
    assert list(data.parent.iterdir()) == [data]


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["-c", "import pathlib, sys; pathlib.Path(sys.argv[1]).mkdir(); sys.exit('no room left')"], "no room left"),
        (None, "No such file or directory"),
    ],
)
def test_first_files_that_can_not_be_made_are_one_error_and_leave_nothing(
    tmp_path: Path, command: list[str] | None, told: str
) -> None:
    def of(part: Path) -> list[str]:
        return [str(tmp_path / "nothing")] if command is None else [sys.executable, *command, str(part)]

    data = tmp_path / "data" / "some"
    with pytest.raises(UnavailableError, match=rf"^The data of some could not be made in .*/data: .*{told}") as caught:
        make_first_files(data, of, what="The data of some", variable="ITS_URL")
    assert caught.value.way_out == "See whether the disk has room; or set ITS_URL to a server of your own."
    assert list(data.parent.iterdir()) == []


def test_a_status_shows_credentials_in_json_only() -> None:
    status = ServiceStatus(
        "mysql", "up", 7, "mysql://h:1/d", "mariadb", address_key="url", login="mysql://u:s3cret@h:1/d", more={"n": 1}
    )
    assert status.as_json()["url"] == "mysql://u:s3cret@h:1/d"
    assert status.as_text() == "mysql state=up pid=7 url=mysql://h:1/d server=mariadb n=1"
    assert "s3cret" not in repr(status)


def test_each_service_names_its_address_in_its_own_way_also_when_it_is_down(tmp_path: Path) -> None:
    found = {name: status.as_json() for name, status in stack.status(load_settings(GHSYNC_HOME=tmp_path)).items()}
    assert list(found) == ["mongo", "mysql", "kafka", "connect"]
    keys = {"mongo": "uri", "mysql": "url", "kafka": "bootstrap_servers", "connect": "url"}
    assert {name: found[name][key] for name, key in keys.items()} == dict.fromkeys(keys)
    assert {status["state"] for status in found.values()} == {"down"}
    assert json.loads(json.dumps(found)) == found
    assert list(tmp_path.iterdir()) == []


def test_properties_are_read_back_by_java_as_they_were() -> None:
    assert properties({"a": "x=y: z", "b": "ä\\\n\U0001f600"}) == "a=x=y: z\nb=\\u00e4\\\\\\u000a\\ud83d\\ude00\n"


@pytest.mark.parametrize("name", ["a,b", "a:b", "a}b"])
def test_a_home_that_java_would_take_for_two_is_a_clear_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"separates paths.*Set GHSYNC_HOME to another folder"):
        KafkaServer(load_settings(GHSYNC_HOME=tmp_path / name)).up(print)


def test_named_servers_that_are_away_are_down(tmp_path: Path) -> None:
    settings = load_settings(
        GHSYNC_HOME=tmp_path,
        MONGODB_URI="mongodb://u:s3cret@127.0.0.1:9",
        MYSQL_URL="mysql://u:s3cret@127.0.0.1:9/new_data",
        KAFKA_BOOTSTRAP_SERVERS="127.0.0.1:9,127.0.0.1:10",
        CONNECT_URL="http://u:s3cret@127.0.0.1:9",
    )
    found = stack.up(settings, progress=print)
    assert {(status.state, status.server) for status in found.values()} == {("down", "external")}
    assert "s3cret" not in json.dumps({name: status.as_json() for name, status in found.items()})
    assert list(tmp_path.iterdir()) == []


class Told:
    """The lines that are told, many a second while something goes on."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.goes_on = threading.Event()

    def __call__(self, line: str) -> None:
        """Take a line."""
        self.lines.append(line)
        if line.endswith(" s so far"):
            self.goes_on.set()

    def await_line(self) -> str:
        """Return the first line that says that something goes on, from now on."""
        self.goes_on.clear()
        assert self.goes_on.wait(30)
        return next(line for line in reversed(self.lines) if line.endswith(" s so far"))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.01)
    return Told()


def test_each_wait_for_a_server_is_told(tmp_path: Path, told: Told) -> None:
    code = "import signal, socket, sys; s = socket.create_server(('127.0.0.1', int(sys.argv[2]))); signal.pause()"
    data = tmp_path / "data"

    def choose() -> ServerSpec:
        return ServerSpec(
            "python",
            data,
            tmp_path / "log",
            (free_port(),),
            lambda port: [sys.executable, "-c", code, str(data), str(port)],
        )

    def answers(_port: int, _seconds: float) -> bool:
        assert told.await_line() == "some: coming up: 0 s so far"
        return True

    some = Supervisor("some", tmp_path, answers, str, variable="SOME_URL", address_key="url")
    assert some.up(choose, told).state == "up"
    with ThreadPoolExecutor() as pool:
        with FileLock(tmp_path / "lock"):
            stopped = pool.submit(some.down, told)
            assert told.await_line() == "some: going down: 0 s so far"
        assert stopped.result(30).state == "down"


def test_the_wait_for_a_connector_is_told(monkeypatch: pytest.MonkeyPatch, told: Told) -> None:
    monkeypatch.setattr(connect, "MySqlStore", MagicMock())
    monkeypatch.setattr(connector, "ensure", lambda *_: told.await_line())
    waited: object = connect._ensure(MagicMock(), {}, "mysql://h/d", None, told)
    assert waited == "connect: waiting for the connector ghsync-users: 0 s so far"


def program(folder: Path, *lines: str) -> Path:
    path = folder / "mysqld"
    path.write_text("\n".join(["#!/bin/sh", *lines]))
    path.chmod(0o755)
    return path


def test_a_missing_library_is_named_with_the_way_out(tmp_path: Path) -> None:
    words = "mariadbd: error while loading shared libraries: libcrypt.so.1: cannot open shared object file"
    with pytest.raises(ConfigError, match=r"the library libcrypt\.so\.1 is missing.*libcrypt1.*MYSQL_URL"):
        mysql._version(program(tmp_path, f"echo '{words}' >&2", "exit 127"))


def test_a_program_of_another_machine_is_a_clear_error(tmp_path: Path) -> None:
    path = program(tmp_path)
    path.write_bytes(b"\x7fELF")
    with pytest.raises(ConfigError, match="can't run on this machine"):
        mysql._version(path)


def test_only_a_real_mysql_on_path_comes_before_the_locked_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    path = program(tmp_path, "echo 'mysqld  Ver 8.4.6 for Linux on x86_64 (MySQL Community Server - GPL)'")
    assert mysql._mysqld_on_path() == mysql.Program("mysqld", path)
    program(tmp_path, "echo 'mysqld  Ver 11.8.2-MariaDB for debian-linux-gnu on x86_64'")
    assert mysql._mysqld_on_path() is None


def test_the_topic_must_be_one_that_debezium_can_name() -> None:
    assert connector._topic_prefix("mysql-server.new_data.Users", "new_data.Users") == "mysql-server"
    assert connector._topic_prefix("a.b.other.Users", "other.Users") == "a.b"
    for topic in ("users", ".new_data.Users", "mysql-server.new_data.users"):
        with pytest.raises(ConfigError, match="KAFKA_TOPIC"):
            connector._topic_prefix(topic, "new_data.Users")


def test_a_local_worker_refuses_brokers_that_it_has_no_keys_for(tmp_path: Path) -> None:
    settings = load_settings(
        GHSYNC_HOME=tmp_path, KAFKA_BOOTSTRAP_SERVERS="127.0.0.1:9", KAFKA_SECURITY_PROTOCOL="SASL_SSL"
    )
    with pytest.raises(ConfigError, match=r"SASL_SSL.*CONNECT_URL"):
        connect.ConnectServer(settings).up(print)


def test_data_decides_which_server_is_run_and_is_never_left_for_an_empty_one(tmp_path: Path) -> None:
    assert server_to_use(["mongod", "embedded"], tmp_path / "data", "MONGODB_URI") == "mongod"
    for name in (".making-it", "mongod", "embedded"):
        (tmp_path / "data" / name).mkdir(parents=True)
    assert server_to_use(["mongod", "embedded"], tmp_path / "data", "MONGODB_URI") == "mongod"
    (tmp_path / "data" / "embedded" / "users").touch()
    (tmp_path / "data" / ".making-it" / "users").touch()
    (tmp_path / "data" / "README").touch()
    assert server_to_use(["mongod", "embedded"], tmp_path / "data", "MONGODB_URI") == "embedded"
    with pytest.raises(ConfigError, match=r"is of embedded, which is not here any more.*MONGODB_URI.*move"):
        server_to_use(["mongod"], tmp_path / "data", "MONGODB_URI")
    (tmp_path / "data" / "mongod" / "users").touch()
    assert server_to_use(["mongod", "embedded"], tmp_path / "data", "MONGODB_URI") == "mongod"


def test_who_needs_servers_that_are_there_starts_none_that_goes_just_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings(GHSYNC_HOME=tmp_path)
    for server, address in ((KafkaServer, "127.0.0.1:9"), (mysql.MysqlServer, "mysql://u:p@127.0.0.1:9/new_data")):
        up = ServiceStatus(server.service, "up", 1, address, login=address)
        monkeypatch.setattr(server, "local_status", lambda _, up=up: up)
    assert existing_kafka(settings).bootstrap_servers == "127.0.0.1:9"
    with open_mysql(settings) as table, pytest.raises(UnavailableError, match=r"127\.0\.0\.1"):
        table.execute([("SELECT 1", ())])
    assert list(tmp_path.iterdir()) == []


def test_a_connector_elsewhere_that_failed_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(GHSYNC_HOME=tmp_path, CONNECT_URL="http://127.0.0.1:9")
    worker(monkeypatch, "FAILED")
    with pytest.raises(UnavailableError, match=r"does not run: it is FAILED, Access denied\..*restart"):
        stack.up(settings, ["connect"], progress=print)


def serve(monkeypatch: pytest.MonkeyPatch, answer: Callable[[httpx.Request], httpx.Response]) -> None:
    """Put a web server in place where a Connect worker is expected."""

    def client(url: str, seconds: float = 1) -> httpx.Client:
        return httpx.Client(base_url=url, timeout=seconds, transport=httpx.MockTransport(answer))

    monkeypatch.setattr(stores_connect, "client_of", client)


UNTOLD = "untold"
"""The state of a connector that the worker has, and does not tell yet."""


def worker(monkeypatch: pytest.MonkeyPatch, *states: str, health: int = 200) -> None:
    """Put a Connect worker in place whose connector goes through these states and stays in the last."""
    left = list(states)

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/":
            return httpx.Response(200, json={"version": "3.8.0", "kafka_cluster_id": "c"})
        if request.url.path == "/health":
            return httpx.Response(health)
        if request.url.path == "/connectors/ghsync-users/config":
            assert request.method == "GET"
            return httpx.Response(200, json={})
        assert (request.method, request.url.path) == ("GET", "/connectors/ghsync-users/status")
        state = left.pop(0) if len(left) > 1 else left[0]
        if state == UNTOLD:
            return httpx.Response(404, json={"error_code": 404, "message": "No status found"})
        tasks = [] if state == "STOPPED" else [{"id": 0, "state": state}]
        told = {"state": state} | ({"trace": "Access denied"} if state == "FAILED" else {})
        return httpx.Response(200, json={"connector": told, "tasks": tasks})

    serve(monkeypatch, answer)
    monkeypatch.setattr(connector, "_POLL_SECONDS", 0)
    monkeypatch.setattr(connector, "_VERDICT_SECONDS", 0.05)


@pytest.mark.parametrize("state", ["PAUSED", "STOPPED"])
def test_a_connector_elsewhere_that_is_halted_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    settings = load_settings(GHSYNC_HOME=tmp_path, CONNECT_URL="http://u:s3cret@127.0.0.1:9")
    worker(monkeypatch, state)
    with pytest.raises(UnavailableError, match=rf"does not run: it is {state}\..*PUT .*/ghsync-users/resume") as caught:
        stack.up(settings, ["connect"], progress=print)
    assert "s3cret" not in str(caught.value)
    assert stack.status(settings)["connect"].more["connector"] == state


def test_a_connector_elsewhere_that_is_on_its_way_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings(GHSYNC_HOME=tmp_path, CONNECT_URL="http://127.0.0.1:9")
    worker(monkeypatch, "STOPPED", "UNASSIGNED", "RESTARTING", "RUNNING")
    assert stack.up(settings, ["connect"], progress=print)["connect"].more["connector"] == "RUNNING"
    worker(monkeypatch, "UNASSIGNED")
    monkeypatch.setattr(connector, "_RUNNING_SECONDS", 0.1)
    with pytest.raises(UnavailableError, match=r"does not run: it is UNASSIGNED after .*worker's log"):
        stack.up(settings, ["connect"], progress=print)
    worker(monkeypatch, "UNASSIGNED", "PAUSED")
    with pytest.raises(UnavailableError, match=r"it is PAUSED.*/ghsync-users/resume"):
        stack.up(settings, ["connect"], progress=print)


@pytest.mark.timeout(30)
def test_a_connector_whose_following_can_not_be_told_is_not_waited_for_until_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker(monkeypatch, "UNASSIGNED", "RUNNING")
    monkeypatch.setattr(connector, "_FOLLOW_SECONDS", 0.05)
    asked: list[bool] = []

    def follows() -> bool:
        asked.append(False)
        return False

    with stores_connect.ConnectWorker("http://127.0.0.1:9") as worker_there:
        assert connector._await_running(worker_there, follows).state == "RUNNING"
    assert len(asked) > 1


@pytest.mark.parametrize(("health", "state"), [(404, "up"), (503, "down")])
def test_a_worker_that_knows_no_health_is_asked_for_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, health: int, state: str
) -> None:
    worker(monkeypatch, "RUNNING", health=health)
    settings = load_settings(GHSYNC_HOME=tmp_path, CONNECT_URL="http://127.0.0.1:9")
    assert stack.up(settings, ["connect"], progress=print)["connect"].state == state


def test_a_connector_elsewhere_whose_state_is_not_told_yet_is_not_registered_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings(GHSYNC_HOME=tmp_path, CONNECT_URL="http://127.0.0.1:9")
    worker(monkeypatch, UNTOLD, UNTOLD, "RUNNING")
    assert stack.up(settings, ["connect"], progress=print)["connect"].more["connector"] == "RUNNING"


def test_a_worker_that_does_not_tell_how_the_connector_is_does_not_hide_the_other_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/":
            return httpx.Response(200, json={"version": "3.8.0", "kafka_cluster_id": "c"})
        return httpx.Response(200 if request.url.path == "/health" else 500, json={"message": "Request timed out"})

    serve(monkeypatch, answer)
    settings = load_settings(GHSYNC_HOME=tmp_path, CONNECT_URL="http://127.0.0.1:9")
    found = stack.status(settings)
    assert found.keys() == set(stack.SERVICES)
    assert found["connect"].state == "up"
    assert found["connect"].more["connector"] == "UNKNOWN"
    assert "Request timed out" in str(found["connect"].more["connector_error"])


@pytest.mark.parametrize("health", [200, 404])
def test_another_web_server_is_no_worker_that_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, health: int
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(health if request.url.path == "/health" else 200, html="<h1>Welcome</h1>")

    serve(monkeypatch, answer)
    settings = load_settings(GHSYNC_HOME=tmp_path, CONNECT_URL="http://127.0.0.1:9")
    assert stack.status(settings)["connect"].state == "down"
