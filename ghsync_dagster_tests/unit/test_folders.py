"""Folders that can't be written to, or have no room, are told by name before anything is kept in them."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ghsync_dagster.dagster_home import use_dagster_home
from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster.folders import ROOM, ensure_folder, write_whole
from ghsync_dagster.local import stack
from ghsync_dagster.settings import load_settings

if TYPE_CHECKING:
    from collections.abc import Callable

Usage = namedtuple("Usage", "total used free")


def test_a_folder_that_is_missing_is_made_and_left_empty(tmp_path: Path) -> None:
    ensure_folder(tmp_path / "a" / "b", "GHSYNC_HOME")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def under_a_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file" / "home"


def a_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file"


def read_only(folder: Path) -> Path:
    # Read-only for root too.
    del folder
    return Path("/proc/home")


@pytest.mark.parametrize("make", [under_a_file, a_file, read_only])
def test_a_home_that_can_t_be_written_to_is_named_wherever_it_is_needed(
    tmp_path: Path, make: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    home = make(tmp_path)
    settings = load_settings(GHSYNC_HOME=home)
    for use in (
        lambda: ensure_folder(home, "GHSYNC_HOME"),
        lambda: use_dagster_home(settings),
        lambda: stack.up(settings, progress=lambda _: None),
    ):
        with pytest.raises(ConfigError, match="Nothing can be written to") as raised:
            use()
        assert str(home.resolve()) in raised.value.message
        assert "set GHSYNC_HOME to a folder" in raised.value.way_out


def test_a_disk_that_is_nearly_full_is_told_with_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(ROOM * 9, ROOM * 8, 5 << 20))
    with pytest.raises(ConfigError) as raised:
        ensure_folder(tmp_path, "GHSYNC_HOME")
    assert raised.value.message == f"The disk of {tmp_path} has 5 MiB free, and at least 256 MiB are needed."
    assert "GHSYNC_HOME" in raised.value.way_out


@pytest.mark.parametrize("named", ["no/absolute/path", "/dev/null", "/there/is/no/such/folder"])
def test_a_dagster_home_that_is_no_folder_is_refused_and_not_made(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_HOME", named)
    with pytest.raises(ConfigError, match=r"DAGSTER_HOME is .* no absolute path of a folder that exists"):
        use_dagster_home(load_settings())
    assert not Path(named).is_dir()


def test_a_dagster_home_that_can_t_be_written_to_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Read-only for root too.
    monkeypatch.setenv("DAGSTER_HOME", "/proc")
    with pytest.raises(ConfigError, match="Nothing can be written to /proc") as raised:
        use_dagster_home(load_settings())
    assert "set DAGSTER_HOME to a folder" in raised.value.way_out


def test_a_file_is_written_whole_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "secret"
    for content in (b"bytes", "t\u00e9xt"):
        write_whole(path, content, "GHSYNC_HOME")
        assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["secret"]


def test_a_file_that_can_t_be_written_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(ConfigError, match=r"file can't be written: Is a directory") as raised:
        write_whole(tmp_path / "file", "text", "GHSYNC_CACHE")
    assert "set GHSYNC_CACHE to a folder" in raised.value.way_out
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
