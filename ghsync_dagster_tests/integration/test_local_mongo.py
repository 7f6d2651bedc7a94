"""The local MongoDB server: one, ours, and back after anything that kills it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from pymongo import MongoClient

from ghsync_dagster.domain.errors import ConfigError, UnavailableError
from ghsync_dagster.local import stack, supervisor
from ghsync_dagster.process import born
from ghsync_dagster.settings import Settings, load_settings
from ghsync_dagster.stores.mongo.uri import without_credentials
from ghsync_dagster_tests.support.cdc_parts import kill
from ghsync_dagster_tests.support.long_campaign import HANG_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.integration


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    """Settings of a home of the test's own, in a folder with a space; its server is stopped afterwards."""
    made = load_settings(GHSYNC_HOME=tmp_path / "a home")
    yield made
    stack.down(made, progress=print)
    assert not servers_of(made)


def servers_of(settings: Settings) -> list[int]:
    """Return the pids of all processes started on the home's data."""
    data = str(settings.home_dir / "mongo" / "data")
    return [
        process.pid
        for process in psutil.process_iter(["cmdline", "status"])
        if any(part.startswith(data) for part in process.info["cmdline"] or []) and alive(process.pid)
    ]


def alive(pid: int | None) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return pid is not None and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def start(settings: Settings) -> stack.ServiceStatus:
    return stack.up(settings, ["mongo"], progress=print)["mongo"]


def port_of(status: stack.ServiceStatus) -> int:
    assert status.uri
    return int(status.uri.rpartition(":")[2])


def state_file(settings: Settings) -> Path:
    return settings.home_dir / "mongo" / "state.json"


def state(settings: Settings) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(state_file(settings).read_bytes())
    return content


def insert(status: stack.ServiceStatus, number: int) -> None:
    with MongoClient[dict[str, Any]](status.uri) as client:
        client.things.numbers.insert_one({"_id": number})


def stored(status: stack.ServiceStatus) -> list[int]:
    with MongoClient[dict[str, Any]](status.uri) as client:
        return sorted(each["_id"] for each in client.things.numbers.find())


def test_up_twice_gives_one_server_and_down_leaves_none(settings: Settings) -> None:
    first = start(settings)
    assert start(settings) == first
    assert servers_of(settings) == [first.pid]
    assert stack.status(settings)["mongo"] == first
    stopped = stack.down(settings, progress=print)["mongo"]
    assert (stopped.state, stopped.pid) == ("down", None)
    assert not alive(first.pid)
    assert stack.status(settings)["mongo"].state == "down"
    assert stack.down(settings, progress=print)["mongo"].state == "down"


def test_data_and_port_stay_over_a_restart(settings: Settings) -> None:
    first = start(settings)
    insert(first, 1)
    stack.down(settings, progress=print)
    second = start(settings)
    assert (second.uri, second.pid == first.pid) == (first.uri, False)
    assert stored(second) == [1]


def test_callers_at_once_start_one_server(settings: Settings) -> None:
    code = (
        "from ghsync_dagster.local import stack; from ghsync_dagster.settings import load_settings; "
        f"print(stack.ensure(load_settings(GHSYNC_HOME={str(settings.home_dir)!r}), 'mongo'))"
    )
    callers = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = {caller.communicate(timeout=HANG_SECONDS)[0].split()[-1] for caller in callers}
    assert answers == {stack.status(settings)["mongo"].uri}
    assert len(servers_of(settings)) == 1


def test_threads_at_once_start_one_server(settings: Settings) -> None:
    uris: list[str] = []
    threads = [threading.Thread(target=lambda: uris.append(stack.ensure(settings, "mongo"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(uris) == 4
    assert len(set(uris)) == 1
    assert len(servers_of(settings)) == 1


def test_the_server_outlives_its_starter_and_a_control_c(settings: Settings) -> None:
    status = start(settings)
    assert status.pid
    assert os.getsid(status.pid) == status.pid
    assert os.getpgid(status.pid) != os.getpgrp()


def test_a_server_killed_hard_is_recovered_with_its_data(settings: Settings) -> None:
    first = start(settings)
    for number in range(3):
        insert(first, number)
    kill(first)
    failed = stack.status(settings)["mongo"]
    assert (failed.state, failed.pid) == ("failed", None)
    second = start(settings)
    assert second.pid != first.pid
    assert stored(second) == [0, 1, 2]


def test_a_state_file_whose_pid_now_belongs_to_another_process(settings: Settings) -> None:
    first = start(settings)
    kill(first)
    own = psutil.Process()
    content = state(settings) | {"pid": own.pid, "born": born(own.pid)}
    state_file(settings).write_text(json.dumps(content))
    assert stack.status(settings)["mongo"].state == "failed"
    assert stack.down(settings, progress=print)["mongo"].state == "down"
    second = start(settings)
    assert second.pid not in (own.pid, first.pid)


def test_the_same_command_line_started_at_another_time_is_not_ours(settings: Settings) -> None:
    status = start(settings)
    content = state(settings)
    state_file(settings).write_text(json.dumps(content | {"born": f"{content['born']}0"}))
    assert stack.status(settings)["mongo"].state == "failed"
    state_file(settings).write_text(json.dumps(content))
    assert stack.status(settings)["mongo"] == status


def test_a_clock_that_is_set_makes_no_stranger_of_a_server(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    status = start(settings)
    told = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: told(process) + 3_600)
    assert stack.status(settings)["mongo"] == status
    stack.down(settings, progress=print)
    assert servers_of(settings) == []


def test_a_copied_home_has_no_hold_on_the_servers_of_the_original(settings: Settings, tmp_path: Path) -> None:
    status = start(settings)
    insert(status, 1)
    copied = load_settings(GHSYNC_HOME=tmp_path / "copy")
    shutil.copytree(settings.home_dir, copied.home_dir)
    assert stack.status(copied)["mongo"].state == "down"
    stack.down(copied, progress=print)
    assert stack.status(settings)["mongo"] == status
    assert stored(status) == [1]


def test_a_copied_home_has_no_hold_on_them_either_where_the_original_was_renamed(
    settings: Settings, tmp_path: Path
) -> None:
    status = start(settings)
    copied, renamed = load_settings(GHSYNC_HOME=tmp_path / "copy"), load_settings(GHSYNC_HOME=tmp_path / "renamed")
    shutil.copytree(settings.home_dir, copied.home_dir)
    settings.home_dir.rename(renamed.home_dir)
    try:
        assert stack.down(copied, ["mongo"], progress=print)["mongo"].state == "down"
        assert stack.status(renamed)["mongo"] == status
    finally:
        stack.down(renamed, progress=print)
    assert not alive(status.pid)


def test_a_copied_home_has_no_hold_on_them_where_the_original_may_not_be_looked_at(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = start(settings)
    copied = load_settings(GHSYNC_HOME=tmp_path / "copy")
    shutil.copytree(settings.home_dir, copied.home_dir)
    named = supervisor._folder_id

    def forbidden(folder: Path) -> str:
        if "copy" not in str(folder):
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return named(folder)

    with monkeypatch.context() as patched:
        patched.setattr(supervisor, "_folder_id", forbidden)
        assert stack.down(copied, ["mongo"], progress=print)["mongo"].state == "down"
    assert stack.status(settings)["mongo"] == status


@pytest.mark.parametrize("place", ["elsewhere", "a home"])
def test_the_server_of_a_home_that_was_moved_to_another_disk_is_stopped(
    settings: Settings, tmp_path: Path, place: str
) -> None:
    left = start(settings)
    moved = moved_to_another_disk(settings, tmp_path / place)
    status = stack.status(moved)["mongo"]
    assert (status.state, status.pid) == ("failed", left.pid)
    stopped = stack.down(moved, ["mongo"], progress=print)["mongo"]
    assert (stopped.state, stopped.pid) == ("down", None)
    assert not alive(left.pid)


def test_up_in_a_home_that_was_moved_to_another_disk_starts_on_the_data_there(
    settings: Settings, tmp_path: Path
) -> None:
    left = start(settings)
    moved = moved_to_another_disk(settings, tmp_path / "elsewhere")
    try:
        again = start(moved)
        assert (again.state, again.data) == ("up", moved.home_dir / "mongo" / "data" / "secantusdb")
        assert not alive(left.pid)
    finally:
        stack.down(moved, progress=print)
    assert servers_of(moved) == []


def moved_to_another_disk(settings: Settings, place: Path) -> Settings:
    """Move the home as ``mv`` does between file systems, which copies it and removes the original."""
    copy = place.with_name("copy on the way")
    shutil.copytree(settings.home_dir, copy)
    shutil.rmtree(settings.home_dir)
    copy.rename(place)
    return load_settings(GHSYNC_HOME=place)


def test_a_home_that_is_reached_by_another_path_or_keeps_data_elsewhere_is_the_same(
    settings: Settings, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "another disk"
    elsewhere.mkdir()
    (settings.home_dir / "mongo").mkdir(parents=True)
    (settings.home_dir / "mongo" / "data").symlink_to(elsewhere)
    status = start(settings)
    (tmp_path / "link").symlink_to(settings.home_dir)
    linked = load_settings(GHSYNC_HOME=tmp_path / "link")
    assert stack.status(linked)["mongo"] == stack.status(settings)["mongo"] == status
    stack.down(linked, progress=print)
    assert not alive(status.pid)


def test_data_is_served_by_the_program_that_made_it(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert(start(settings), 1)
    stack.down(settings, progress=print)
    mongod = tmp_path / "mongod"
    mongod.write_text("#!/bin/sh\nexit 1\n")
    mongod.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    again = start(settings)
    assert (again.server, stored(again)) == ("secantusdb", [1])


@pytest.mark.parametrize("content", [b"", b"{", b'{"pid": 1}', b"\x00\xff"])
def test_a_broken_state_file_is_no_obstacle(settings: Settings, content: bytes) -> None:
    state_file(settings).parent.mkdir(parents=True)
    state_file(settings).write_bytes(content)
    assert stack.status(settings)["mongo"].state == "down"
    assert start(settings).state == "up"


def test_a_server_whose_starter_was_killed_before_it_noted_the_pid_is_found(settings: Settings) -> None:
    first = start(settings)
    content = state(settings) | {"pid": None, "born": None}
    state_file(settings).write_text(json.dumps(content))
    assert start(settings) == first
    assert state(settings)["pid"] == first.pid
    assert servers_of(settings) == [first.pid]


def test_a_found_server_that_dies_just_then_is_an_error_with_its_last_words(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start(settings)
    state_file(settings).write_text(json.dumps(state(settings) | {"pid": None, "born": None}))

    search = supervisor._search

    def find_and_end(record: supervisor.Record) -> psutil.Process | None:
        if process := search(record):
            process.kill()
            process.wait(30)
        return process

    with monkeypatch.context() as patched:
        patched.setattr(supervisor, "_search", find_and_end)
        with pytest.raises(UnavailableError, match=rf"(?s)process {first.pid}, ended .*End of its log .*ghsync up"):
            start(settings)
    assert stack.status(settings)["mongo"].state == "failed"
    assert start(settings).state == "up"


def test_a_system_that_does_not_tell_its_boot_is_no_obstacle(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_text = Path.read_text

    def refuse(path: Path, *arguments: Any, **more: Any) -> str:
        if path.name == "boot_id":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read_text(path, *arguments, **more)

    monkeypatch.setattr(Path, "read_text", refuse)
    status = start(settings)
    assert start(settings) == status
    stack.down(settings, progress=print)
    assert not alive(status.pid)


def test_a_taken_port_is_left_alone_for_a_free_one(settings: Settings) -> None:
    first = start(settings)
    stack.down(settings, progress=print)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port_of(first)))
        other.listen()
        second = start(settings)
        assert port_of(second) != port_of(first)
        assert second.state == "up"


def test_somebody_elses_server_on_the_port_is_neither_taken_nor_killed(settings: Settings, tmp_path: Path) -> None:
    other_settings = load_settings(GHSYNC_HOME=tmp_path / "another home")
    other = start(other_settings)
    try:
        insert(other, 99)
        settings.home_dir.joinpath("mongo").mkdir(parents=True)
        data = settings.home_dir / "mongo" / "data" / "secantusdb"
        claim = state(other_settings) | {"data": str(data), "folder": None}
        state_file(settings).write_text(json.dumps(claim))
        ours = start(settings)
        assert (ours.pid == other.pid, port_of(ours) == port_of(other)) == (False, False)
        assert stored(ours) == []
        stack.down(settings, progress=print)
        assert alive(other.pid)
        assert stored(other) == [99]
    finally:
        stack.down(other_settings, progress=print)
    assert not alive(other.pid)


def test_the_json_of_a_status(settings: Settings) -> None:
    status = start(settings)
    assert json.loads(json.dumps(status.as_json())) == {
        "state": "up",
        "pid": status.pid,
        "uri": f"mongodb://127.0.0.1:{port_of(status)}",
        "server": "secantusdb",
        "data": str(settings.home_dir / "mongo" / "data" / "secantusdb"),
        "log": str(settings.home_dir / "mongo" / "log" / "secantusdb.log"),
    }


def test_a_mongod_on_path_comes_first(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded = shutil.which("secantusd-rs", path=str(Path(sys.executable).parent))
    assert embedded
    mongod = tmp_path / "bin" / "mongod"
    mongod.parent.mkdir()
    # Takes mongod's arguments in the order they are given, and serves by the embedded server.
    mongod.write_text(f"""#!/bin/sh
[ "$1 $3 $5 $7 $9" = "--dbpath --bind_ip --port --logpath --logappend" ] || exit 64
: > "$2/empty.toml"
exec '{embedded}' --config "$2/empty.toml" --storage-path "$2" --host "$4" --port "$6" --standalone
""")
    mongod.chmod(0o755)
    monkeypatch.setenv("PATH", f"{mongod.parent}:/usr/bin:/bin")
    status = start(settings)
    assert (status.server, status.state) == ("mongod", "up")
    assert status.data == settings.home_dir / "mongo" / "data" / "mongod"


def test_a_server_that_ends_at_once_is_an_error_with_its_last_words(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mongod = tmp_path / "mongod"
    mongod.write_text("#!/bin/sh\necho 'no room for data'\nexit 48\n")
    mongod.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(UnavailableError, match=r"(?s)mongod ended while it started.*no room for data.*MONGODB_URI"):
        start(settings)
    assert stack.status(settings)["mongo"].state == "down"


def test_without_any_server_the_error_names_the_ways_out(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(ConfigError, match=r"MONGODB_URI, put a mongod on PATH, or run make setup"):
        start(settings)


def test_a_named_server_is_used_as_it_is_and_never_stopped(settings: Settings, tmp_path: Path) -> None:
    running = start(settings)
    uri = f"mongodb://127.0.0.1:{port_of(running)}/?appName=x"
    named = load_settings(GHSYNC_HOME=tmp_path / "unused", MONGODB_URI=uri)
    assert stack.ensure(named, "mongo") == uri
    status = stack.up(named, ["mongo"], progress=print)["mongo"]
    assert (status.state, status.server, status.pid, status.uri) == ("up", "external", None, running.uri)
    stack.down(named, progress=print)
    assert alive(running.pid)
    assert not (tmp_path / "unused").exists()


def test_a_named_server_that_is_away_is_down_and_its_password_stays_secret(tmp_path: Path) -> None:
    named = load_settings(GHSYNC_HOME=tmp_path, MONGODB_URI="mongodb://app:s3cret@127.0.0.1:9/?tls=false")
    status = stack.status(named)["mongo"]
    assert (status.state, status.uri) == ("down", "mongodb://127.0.0.1:9")
    assert "s3cret" not in repr(status)


@pytest.mark.parametrize(
    "uri", ["mongodb://app:p@ss/w?rd@db1:27017,db2/x?a=b", "mongodb+srv://u:p@db.example.com/?x=s@"]
)
def test_no_part_of_a_password_is_shown(uri: str) -> None:
    shown = without_credentials(uri)
    assert not any(secret in shown for secret in ("app", "ss", "rd", "u:p", "?", "="))


def test_a_server_whose_host_dns_does_not_know_is_down(tmp_path: Path) -> None:
    uri = "mongodb+srv://app:s3cret@db.example.invalid/?connectTimeoutMS=2000"
    found = stack.status(load_settings(GHSYNC_HOME=str(tmp_path), MONGODB_URI=uri))["mongo"]
    assert (found.state, found.uri) == ("down", "mongodb+srv://db.example.invalid")


def test_a_malformed_uri_is_a_clear_error_without_the_secret(tmp_path: Path) -> None:
    named = load_settings(GHSYNC_HOME=tmp_path, MONGODB_URI="mongodb://app:s3c/ret@host:port")
    with pytest.raises(ConfigError, match="MONGODB_URI is malformed") as caught:
        stack.status(named)
    assert "s3c" not in str(caught.value)


def test_an_unknown_service_is_a_clear_error(settings: Settings) -> None:
    with pytest.raises(ConfigError, match=r"named redis.*Name any of: mongo"):
        stack.up(settings, ["redis"], progress=print)


def test_a_home_that_is_no_folder_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="GHSYNC_HOME"):
        stack.up(load_settings(GHSYNC_HOME=tmp_path / "file"), progress=print)
