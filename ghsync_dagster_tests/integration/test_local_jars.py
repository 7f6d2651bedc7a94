"""Jars come whole or not at all."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import zipfile
from typing import TYPE_CHECKING

import msgspec
import pytest

from ghsync_dagster.domain.errors import ConfigError, PermanentError, UnavailableError
from ghsync_dagster.jvm.jars import ROOTS, Jar, ensure_jars, ensure_unpacked, locked_set, read_lock, write_lock
from ghsync_dagster.settings import Settings, load_settings
from ghsync_dagster_tests.support.long_campaign import HANG_SECONDS

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(GHSYNC_HOME=tmp_path / "home", GHSYNC_CACHE=tmp_path / "the cache")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lead all HTTP to a port where nothing listens."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.setenv(name.lower(), "http://127.0.0.1:9")


def test_a_broken_cached_jar_is_found_and_fetched_again(settings: Settings) -> None:
    said: list[str] = []
    (path,) = ensure_jars(settings, said.append)
    whole = path.read_bytes()
    assert any("MB" in line for line in said)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert ensure_jars(settings, said.append) == [path]
    assert path.read_bytes() == whole
    assert sorted(each.name for each in path.parent.iterdir()) == [".lock", path.name]


@pytest.mark.usefixtures("offline")
def test_a_whole_cached_jar_needs_no_network(settings: Settings) -> None:
    content = b"a jar"
    jar = msgspec.structs.replace(read_lock()[0], size=len(content), sha256=sha256(content))
    cached = settings.cache_dir / "jars" / jar.file_name
    cached.parent.mkdir(parents=True)
    cached.write_bytes(content)
    assert ensure_jars(settings, print, [jar]) == [cached]


def sha256(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()


def test_a_download_that_stays_wrong_is_an_error_that_names_the_file(settings: Settings) -> None:
    jar = msgspec.structs.replace(read_lock()[0], sha256="0" * 64)
    with pytest.raises(PermanentError, match=rf"{jar.file_name} was fetched 2 times") as caught:
        ensure_jars(settings, print, [jar])
    assert str(settings.cache_dir / "jars" / jar.file_name) in caught.value.way_out
    assert not (settings.cache_dir / "jars" / jar.file_name).exists()


@pytest.mark.usefixtures("offline")
def test_offline_the_error_says_where_to_put_the_file(settings: Settings) -> None:
    jar = read_lock()[0]
    with pytest.raises(UnavailableError, match="no connection") as caught:
        ensure_jars(settings, print)
    assert jar.sha256 in caught.value.way_out
    assert str(settings.cache_dir / "jars" / jar.file_name) in caught.value.way_out


def test_a_file_that_the_registry_lacks_is_told_apart(settings: Settings) -> None:
    jar = msgspec.structs.replace(read_lock()[0], version="0.0.0")
    with pytest.raises(UnavailableError, match=r"0\.0\.0-all\.jar.*no such file"):
        ensure_jars(settings, print, [jar])


def test_a_cache_that_is_no_folder_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="GHSYNC_CACHE"):
        ensure_jars(load_settings(GHSYNC_CACHE=tmp_path / "file"), print)


def test_two_processes_at_once_both_get_the_jar(settings: Settings) -> None:
    code = (
        "from ghsync_dagster.jvm.jars import ensure_jars; from ghsync_dagster.settings import load_settings; "
        f"print(ensure_jars(load_settings(GHSYNC_CACHE={str(settings.cache_dir)!r}), lambda text: None)[0])"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = {process.communicate(timeout=HANG_SECONDS)[0].strip() for process in both}
    assert answers == {str(settings.cache_dir / "jars" / read_lock()[0].file_name)}


def test_locking_writes_what_the_registry_holds(tmp_path: Path) -> None:
    lock = tmp_path / "jars.lock.json"
    write_lock(lock, print, {"spark": ROOTS["spark"]})
    assert read_lock(lock) == locked_set("spark")


def test_locking_finds_what_a_root_needs(tmp_path: Path) -> None:
    lock = tmp_path / "jars.lock.json"
    write_lock(lock, print, {"kafka": [msgspec.structs.replace(ROOTS["kafka"][3], alone=False)]})
    found = read_lock(lock)
    assert {"connect-json", "connect-api", "kafka-clients"} <= {jar.artifact for jar in found}
    assert {jar.file_name: jar.sha256 for jar in found}.items() <= {
        jar.file_name: jar.sha256 for jar in locked_set("kafka")
    }.items()


def test_the_lock_holds_each_root_once_and_by_the_version_that_is_asked_for() -> None:
    locked = read_lock()
    assert len({jar.file_name for jar in locked}) == len(locked)
    versions = {(jar.part_of, jar.artifact, jar.classifier): jar.version for jar in locked}
    asked = {(name, root.artifact, root.classifier): root.version for name, roots in ROOTS.items() for root in roots}
    assert asked.items() <= versions.items()
    assert {jar.version for jar in locked if jar.group == "org.apache.logging.log4j"} == {"2.25.4"}


def test_an_unknown_set_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"named sparks.*Name any of: spark, kafka, connect, mysql, bench"):
        locked_set("sparks")


def archive_of(settings: Settings, suffix: str) -> Jar:
    """Put an archive with a program and a text into the cache, and return its entry of a lock."""
    whole = settings.cache_dir / "jars" / f"things-1.{suffix}"
    whole.parent.mkdir(parents=True)
    files = {"inside/bin/program": ("#!/bin/sh\necho ran\n", 0o755), "inside/text": ("t", 0o644), "other": ("o", 0o644)}
    if suffix == "jar":
        with zipfile.ZipFile(whole, "w") as jar:
            for name, (content, mode) in files.items():
                entry = zipfile.ZipInfo(name)
                entry.external_attr = (0o100000 | mode) << 16
                jar.writestr(entry, content)
    else:
        with tarfile.open(whole, "w:gz") as tar:
            for name, (content, mode) in files.items():
                member = tarfile.TarInfo(name)
                member.mode, member.size = mode, len(content)
                tar.addfile(member, io.BytesIO(content.encode()))
    packed = whole.read_bytes()
    return Jar("test", "g", "things", "1", "", suffix, sha256(packed), len(packed))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("suffix", ["jar", "tar.gz"])
def test_an_archive_is_unpacked_once_with_the_modes_of_its_files(settings: Settings, suffix: str) -> None:
    jar = archive_of(settings, suffix)
    folder = ensure_unpacked(settings, jar, print, "inside")
    assert sorted(path.name for path in folder.iterdir()) == ["bin", "text"]
    assert not (folder.parent / "other").exists()
    assert subprocess.run([folder / "bin" / "program"], capture_output=True, check=True).stdout == b"ran\n"
    (settings.cache_dir / "jars" / jar.file_name).unlink()
    assert ensure_unpacked(settings, jar, print, "inside") == folder


@pytest.mark.usefixtures("offline")
def test_an_archive_that_breaks_off_leaves_no_folder(settings: Settings) -> None:
    jar = archive_of(settings, "tar.gz")
    whole = settings.cache_dir / "jars" / jar.file_name
    half = whole.read_bytes()[:-60]
    whole.write_bytes(half)
    broken = msgspec.structs.replace(jar, sha256=sha256(half), size=len(half))
    with pytest.raises((ConfigError, EOFError, tarfile.TarError)):
        ensure_unpacked(settings, broken, print)
    assert [path.name for path in (settings.cache_dir / "unpacked").iterdir()] == [".lock"]


@pytest.mark.parametrize("content", ["", "{}", json.dumps([{"group": "g"}])])
def test_a_malformed_lock_is_a_clear_error(tmp_path: Path, content: str) -> None:
    lock = tmp_path / "jars.lock.json"
    lock.write_text(content)
    with pytest.raises(ConfigError, match=r"jars\.lock\.json can't be read"):
        read_lock(lock)
