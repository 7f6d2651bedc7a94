"""A password in MONGODB_URI is in no output, log, event log, file or command line, be it right, wrong or unused."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pymongo
import pytest

from ghsync_dagster.domain.errors import ConfigError, RefusedError, UnavailableError
from ghsync_dagster.stores.mongo.users import UserStore
from ghsync_dagster_tests.support.long_campaign import HANG_SECONDS, ONLY_LONG
from ghsync_dagster_tests.support.process_parts import children_of, words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
SECRET = "s3cr3t-PLANTED"
WRONG = "wr0ng-PLANTED"
USERS = 25
SERVER = shutil.which("secantusd-rs", path=str(Path(sys.executable).parent)) or shutil.which("secantusd-rs")


@dataclass
class Watched:
    """What a command left to be seen while it ran: its output, and every command line of its process tree."""

    code: int
    stdout: str
    stderr: str
    command_lines: set[str] = field(default_factory=set)

    def shows(self, text: str) -> bool:
        """Return whether any of it holds ``text``."""
        return any(text in seen for seen in (self.stdout, self.stderr, *self.command_lines))

    def starts_java(self) -> bool:
        """Return whether a JVM was in its process tree."""
        return any("java" in line for line in self.command_lines)


@dataclass
class Commands:
    """Runs the real command in folders of the test's own."""

    home: Path
    events: Path

    def run(self, *arguments: str, uri: str) -> Watched:
        """Run to the end, watching the process tree."""
        environment = {
            **os.environ,
            "MONGODB_URI": uri,
            "GHSYNC_HOME": str(self.home),
            "DAGSTER_HOME": str(self.home / "dagster"),
            "GHSYNC_EVENTS_PATH": str(self.events),
            "GHSYNC_RETRY_ATTEMPTS": "2",
            "GHSYNC_SERVER_TIMEOUT_SECONDS": "1",
        }
        (self.home / "dagster").mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "ghsync_dagster.cli", *arguments]
        seen: set[str] = set()
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            watcher = threading.Thread(target=_watch, args=(psutil.Process(process.pid), seen))
            watcher.start()
            try:
                stdout, stderr = process.communicate(timeout=HANG_SECONDS)
            finally:
                process.kill()
                watcher.join()
        return Watched(process.returncode, stdout, stderr, seen)

    def files_that_hold(self, text: str) -> list[str]:
        """Return the files below the home folder whose bytes hold ``text``."""
        files = [path for path in self.home.rglob("*") if path.is_file()]
        return [str(path) for path in files if text.encode() in path.read_bytes()]


def _watch(process: psutil.Process, seen: set[str]) -> None:
    """Note the command lines of a process and all below it, until it has ended."""
    with suppress(psutil.NoSuchProcess):
        while process.status() != psutil.STATUS_ZOMBIE:
            seen.update(" ".join(words(each)) for each in [process, *children_of(process.pid)])
            time.sleep(0.1)


@pytest.fixture
def commands(tmp_path: Path, event_line: Callable[..., str]) -> Commands:
    events = tmp_path / "in.json"
    events.write_text("\n".join(event_line(number, f"user-{number}", number=number) for number in range(1, USERS + 1)))
    return Commands(tmp_path / "home", events)


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of this machine on which nobody listens, kept so by being bound."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])


@dataclass
class Guarded:
    """The embedded server with authentication on, and a user ``app`` of the database ``new_data``."""

    port: int

    def uri(self, password: str) -> str:
        """Return the URI of the user ``app`` with a password."""
        return f"mongodb://app:{password}@127.0.0.1:{self.port}/?authSource=admin"


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    if SERVER is None:
        pytest.skip("the embedded server is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    (tmp_path / "empty.toml").touch()
    command = [SERVER, "--config", str(tmp_path / "empty.toml"), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--storage-path", str(tmp_path / "data"), "--standalone", "--log-file-max", "128MB"]
    with _server(command, port) as client:
        client.admin.command("createUser", "app", pwd=SECRET, roles=[{"role": "readWrite", "db": "new_data"}])
    with _server([*command, "--auth"], port):
        yield Guarded(port)


class _server:  # noqa: N801  used as a function
    """Run a server for the length of a block; gives a client once it answers."""

    def __init__(self, command: list[str], port: int) -> None:
        self._command = command
        self._client: pymongo.MongoClient[dict[str, Any]] = pymongo.MongoClient(
            "127.0.0.1", port, serverSelectionTimeoutMS=20_000
        )

    def __enter__(self) -> pymongo.MongoClient[dict[str, Any]]:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._client.admin.command("hello")
        return self._client

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()


def message_of(watched: Watched) -> list[str]:
    return [line for line in watched.stderr.splitlines() if not line.startswith("{") and line.strip()]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        pytest.param(["batch", "{events}"], 3, marks=ONLY_LONG),
        pytest.param(["run"], 3, marks=ONLY_LONG),
        (["status"], 0),
        (["status", "--json"], 0),
    ],
)
def test_a_password_is_nowhere_while_the_store_is_away(
    commands: Commands, closed_port: int, arguments: list[str], code: int
) -> None:
    uri = f"mongodb://app:{SECRET}@127.0.0.1:{closed_port}/new_data"
    watched = commands.run(*[part.format(events=commands.events) for part in arguments], uri=uri)
    assert watched.code == code, watched.stderr
    if code == 3:
        assert any(line.startswith("error: ") and "MongoDB can't be reached" in line for line in message_of(watched))
        assert watched.starts_java()
        assert any(path.is_file() for path in commands.home.rglob("*"))
    assert not watched.shows("PLANTED")
    assert not watched.shows("Traceback")
    assert commands.files_that_hold("PLANTED") == []


def test_a_password_that_works_is_nowhere_either(commands: Commands, guarded: Guarded) -> None:
    done = commands.run("run", uri=guarded.uri(SECRET))
    assert done.code == 0, done.stderr
    with UserStore(guarded.uri(SECRET), "new_data", "Users") as store:
        assert store.users.count_documents({"spark_temp": {"$exists": False}}) == USERS
    audited = commands.run("audit", uri=guarded.uri(SECRET))
    assert audited.code == 0, audited.stderr
    refused = commands.run("audit", uri=guarded.uri(WRONG))
    assert refused.code == 2, refused.stderr
    assert all(watched.starts_java() for watched in (done, audited))
    # A look before any work finds it.
    assert not refused.starts_java()
    for watched in (done, audited, refused):
        assert watched.command_lines
        assert not watched.shows("PLANTED")
        assert not watched.shows("Traceback")
    assert commands.files_that_hold("PLANTED") == []


def test_a_wrong_password_is_refused_at_once_with_one_clear_message(commands: Commands, guarded: Guarded) -> None:
    with UserStore(guarded.uri(WRONG), "new_data", "Users") as store, pytest.raises(RefusedError) as caught:
        store.is_empty()
    assert "PLANTED" not in f"{caught.value!r}"
    watched = commands.run("batch", str(commands.events), uri=guarded.uri(WRONG))
    assert watched.code == 2, watched.stderr
    error, way_out = [line for line in message_of(watched) if line.startswith(("error: ", "way out: "))]
    assert "MongoDB refused (code 18): " in error
    assert way_out == "way out: Check the user, password and roles behind MONGODB_URI."
    assert "transient fault; retrying" not in watched.stderr
    assert not watched.shows("PLANTED")
    assert commands.files_that_hold("PLANTED") == []


def test_rights_on_another_database_are_refused_with_one_clear_message(guarded: Guarded) -> None:
    with UserStore(guarded.uri(SECRET), "elsewhere", "Users") as store, pytest.raises(RefusedError) as caught:
        store.ensure_collection()
    assert "code 13" in caught.value.message
    assert caught.value.way_out == "Check the user, password and roles behind MONGODB_URI."


MALFORMED = [
    f"mongodb://app:{SECRET}@",
    f"mongodb://app:{SECRET}@host:port",
    f"mongodb://app:{SECRET}/x@127.0.0.1:1/",
    f"mongodb://app:x/{SECRET}@127.0.0.1:1/new_data",
    f"mongodb://app:{SECRET}@a@127.0.0.1:1/",
    f"mongo://app:{SECRET}@127.0.0.1:1/",
    f"app:{SECRET}@127.0.0.1:1",
]


@pytest.mark.parametrize("uri", MALFORMED)
def test_a_malformed_uri_opens_no_store_and_its_password_is_not_told(uri: str) -> None:
    with pytest.raises(ConfigError, match="MONGODB_URI is malformed") as caught:
        UserStore(uri, "new_data", "Users")
    assert "PLANTED" not in f"{caught.value!r}"
    assert caught.value.way_out == "Correct MONGODB_URI; percent-encode special characters of user and password."


def test_a_host_that_dns_does_not_know_opens_no_store_and_the_password_is_not_told() -> None:
    with pytest.raises(UnavailableError, match="the host of MONGODB_URI can't be looked up in DNS") as caught:
        UserStore(f"mongodb+srv://app:{SECRET}@no-such-host.invalid/?connectTimeoutMS=2000", "new_data", "Users")
    assert "PLANTED" not in f"{caught.value!r}"
    assert "mongodb://HOST:PORT" in caught.value.way_out


@pytest.mark.parametrize(("uri", "command"), list(zip(MALFORMED, cycle(["status", "up"]), strict=False)))
def test_a_malformed_uri_is_one_clear_error_without_its_password(commands: Commands, uri: str, command: str) -> None:
    watched = commands.run(command, uri=uri)
    assert watched.code == 2, watched
    assert message_of(watched)[0].startswith(("error: MONGODB_URI", "error: Settings are wrong: MONGODB_URI: it needs"))
    assert not watched.shows("PLANTED")
    assert not watched.shows("Traceback")
