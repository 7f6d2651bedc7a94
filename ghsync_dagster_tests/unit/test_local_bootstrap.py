"""The bootstrap's decisions: what is pending, what uv is told, which Python is refused."""

from __future__ import annotations

import queue
import re
import subprocess
import sys
import threading
import tomllib
from configparser import ConfigParser
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from ghsync_dagster.local import bootstrap
from ghsync_dagster.local.bootstrap import SetupError, Stamps

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder of two lock files."""
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    (tmp_path / "a.lock").write_text("a==1\n")
    (tmp_path / "b.lock").write_text("b==1\n")
    return tmp_path


def test_only_a_changed_lock_is_pending(project: Path) -> None:
    stamp = project / "stamp.json"
    stamps = Stamps(stamp, "here")
    assert stamps.pending("a.lock", "b.lock") == ["a.lock", "b.lock"]
    stamps.mark("a.lock", "b.lock")
    (project / "b.lock").write_text("b==2\n")
    assert Stamps(stamp, "here").pending("a.lock", "b.lock") == ["b.lock"]


def test_stamps_of_another_folder_or_python_are_void(project: Path) -> None:
    stamp = project / "stamp.json"
    Stamps(stamp, "here").mark("a.lock")
    assert Stamps(stamp, "moved").empty
    assert Stamps(stamp, "moved").pending("a.lock") == ["a.lock"]


def test_what_another_set_up_marked_meanwhile_is_kept_and_what_is_forgotten_is_pending(project: Path) -> None:
    path = project / "stamps.json"
    (project / "a.lock").write_text("a")
    (project / "b.lock").write_text("b")
    first, second = Stamps(path, "owner"), Stamps(path, "owner")
    first.mark("a.lock")
    second.mark("b.lock")
    assert Stamps(path, "owner").pending("a.lock", "b.lock") == []
    first.forget("b.lock")
    assert Stamps(path, "owner").pending("a.lock", "b.lock") == ["b.lock"]


@pytest.fixture
def clone(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone whose packages are a Spark and what develops it; each step only marks that it was done."""
    for name in (bootstrap.BASE_LOCK, bootstrap.DEV_LOCK, bootstrap.PROJECT_FILE, bootstrap.ARCHIVE_MAKER):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("one")
    (project / ".venv/bin").mkdir(parents=True)
    (project / ".venv/bin/ghsync").touch()
    monkeypatch.setattr(bootstrap, "STAMP_FILE", project / "stamp.json")
    monkeypatch.setattr(bootstrap, "PACKAGE", project / "ghsync_dagster")
    monkeypatch.setattr(bootstrap, "install_uv", lambda: project / "uv")
    dev_too = {True: [bootstrap.BASE_LOCK, bootstrap.DEV_LOCK], False: [bootstrap.BASE_LOCK]}
    monkeypatch.setattr(bootstrap, "wanted_locks", dev_too.__getitem__)
    monkeypatch.setattr(bootstrap, "usable_venv", lambda _folder: True)
    monkeypatch.setattr(bootstrap, "make_venv", lambda _uv: bootstrap.stamps_of_venv())
    monkeypatch.setattr(bootstrap, "install_packages", lambda _uv, stamps, locks: stamps.mark(*locks))
    monkeypatch.setattr(bootstrap, "install_project", lambda _uv, stamps: stamps.mark(bootstrap.PROJECT_FILE))
    monkeypatch.setattr(bootstrap, "fetch_jars", lambda _stamps: None)
    return project


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The commands that made a class archive."""
    commands: list[object] = []
    monkeypatch.setattr(bootstrap, "run", lambda command, *_: commands.append(command))
    return commands


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> queue.Queue[str]:
    """The lines that were told, many a second while something goes on."""
    lines: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr(bootstrap, "say", lines.put)
    monkeypatch.setattr(bootstrap, "_PROGRESS_SECONDS", 0.01)
    return lines


@pytest.mark.timeout(30)
def test_another_spark_has_the_class_archive_made_anew_though_a_check_came_first(
    clone: Path, made: list[object]
) -> None:
    bootstrap.set_up(dev=True, java=False, archive=True)
    bootstrap.set_up(dev=True, java=True, archive=False)
    assert made == []
    for _ in range(2):
        bootstrap.set_up(dev=True, java=True, archive=True)
        assert len(made) == 1
    (clone / bootstrap.BASE_LOCK).write_text("another Spark")
    bootstrap.set_up(dev=True, java=False, archive=True)
    bootstrap.set_up(dev=True, java=True, archive=True)
    assert len(made) == 2


@pytest.mark.timeout(30)
def test_a_class_archive_that_is_being_made_holds_nobody_up(
    clone: Path, made: list[object], told: queue.Queue[str]
) -> None:
    bootstrap.set_up(dev=False, java=True, archive=False)
    with bootstrap.if_free(clone / "ghsync_dagster") as held:
        assert held
        for dev in (False, True):
            bootstrap.set_up(dev=dev, java=True, archive=False)
            assert told.empty()
            bootstrap.set_up(dev=dev, java=True, archive=True)
            assert told.get(timeout=10) == "set-up: class archive: another set-up makes it, so this one does not"
    assert bootstrap.stamps_of_venv().pending(bootstrap.DEV_LOCK) == []
    assert made == []
    bootstrap.set_up(dev=True, java=True, archive=True)
    assert len(made) == 1


def test_a_class_archive_that_could_not_be_made_is_told_and_made_by_the_next_set_up(
    clone: Path, told: queue.Queue[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert clone.is_dir()
    results = [SetupError("no class archive: no room", "run make setup"), None]
    monkeypatch.setattr(bootstrap, "run", MagicMock(side_effect=results))
    for left in ([bootstrap.ARCHIVE_MAKER], []):
        bootstrap.set_up(dev=False, java=True, archive=True)
        assert bootstrap.stamps_of_venv().pending(bootstrap.ARCHIVE_MAKER) == left
    lines = [told.get() for _ in range(told.qsize())]
    assert sum("Spark starts slower" in line and "no room" in line and "make setup" in line for line in lines) == 1


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("folder", "pending", "holder"),
    [
        ("ghsync_dagster", bootstrap.BASE_LOCK, "makes the class archive of packages to be replaced"),
        ("ghsync_dagster", bootstrap.PROJECT_FILE, "makes the class archive of packages to be replaced"),
        ("", bootstrap.BASE_LOCK, "installs"),
    ],
)
def test_packages_are_replaced_once_no_other_needs_them_and_the_wait_is_told(
    clone: Path, told: queue.Queue[str], folder: str, pending: str, holder: str
) -> None:
    bootstrap.set_up(dev=True, java=True, archive=False)
    (clone / pending).write_text("another")
    second = threading.Thread(target=lambda: bootstrap.set_up(dev=True, java=True, archive=False), daemon=True)
    with bootstrap.if_free(clone / folder) as held:
        assert held
        second.start()
        assert told.get(timeout=10) == f"set-up: wait: for another set-up, which {holder}"
        for _ in range(2):
            assert told.get(timeout=10) == "set-up: wait: 0 s so far"
        assert bootstrap.stamps_of_venv().pending(pending) == [pending]
    second.join(10)
    assert bootstrap.stamps_of_venv().pending(pending) == []


def test_a_phase_tells_that_it_goes_on_and_what_it_took(told: queue.Queue[str]) -> None:
    with bootstrap.phase("packages", "a hint"):
        assert told.get(timeout=10) == "set-up: packages: a hint"
        assert told.get(timeout=10) == "set-up: packages: 0 s so far"
    *_, last = [told.get() for _ in range(told.qsize())]
    assert re.fullmatch(r"set-up: packages: [0-9.]+ s", last)
    with pytest.raises(SetupError), bootstrap.phase("broken"):
        raise SetupError("no", "none")
    assert not [line for line in [told.get() for _ in range(told.qsize())] if "so far" not in line]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"owner": "here", "done": 1}', "\x00"])
def test_a_broken_stamp_file_means_nothing_is_installed(project: Path, content: str) -> None:
    stamp = project / "stamp.json"
    stamp.write_text(content)
    assert Stamps(stamp, "here").pending("a.lock") == ["a.lock"]


def test_what_was_set_for_pip_counts_for_uv_unless_uv_was_told_itself() -> None:
    told = bootstrap.installer_environment(
        {"PIP_INDEX_URL": "file:///pip", "PIP_CERT": "/ca.pem", "UV_DEFAULT_INDEX": "file:///uv", "VIRTUAL_ENV": "/v"}
    )
    assert told["UV_DEFAULT_INDEX"] == "file:///uv"
    assert told["SSL_CERT_FILE"] == told["REQUESTS_CA_BUNDLE"] == "/ca.pem"
    assert "VIRTUAL_ENV" not in told


def test_what_comes_as_source_only_is_not_compressed_before_it_is_installed() -> None:
    options = ConfigParser()
    assert options.read(bootstrap.installer_environment({})["DIST_EXTRA_CONFIG"])
    assert options["bdist_wheel"]["compression"] == "stored"
    assert bootstrap.installer_environment({"DIST_EXTRA_CONFIG": "mine"})["DIST_EXTRA_CONFIG"] == "mine"


def test_a_python_that_is_too_old_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    with pytest.raises(SetupError, match=r"(?s)from 3\.11.*make PYTHON=python3\.11"):
        bootstrap.check_python()


def test_the_accepted_pythons_are_those_of_pyproject() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    lowest, beyond = (".".join(map(str, each)) for each in (bootstrap.PYTHON_FROM, bootstrap.PYTHON_BELOW))
    assert declared == f">={lowest},<{beyond}"


def test_a_failed_command_shows_its_output_and_the_way_out(project: Path) -> None:
    assert project.is_dir()
    with pytest.raises(SetupError, match=r"(?s)no luck\..*boom.*Way out: try again"):
        bootstrap.run([sys.executable, "-c", "import sys; print('boom'); sys.exit(3)"], "no luck", "try again")


def python_without_venv(folder: Path, with_pip: bool) -> str:
    """Make a Python of a system that splits venv, or both venv and pip, off."""
    command = folder / "python3"
    command.write_text(f"""#!/bin/sh
if [ "$2" = venv ]; then echo 'ensurepip is not available'; exit 1; fi
if [ "$2" = pip ]; then exit {0 if with_pip else 1}; fi
exit 64
""")
    command.chmod(0o755)
    return str(command)


def test_without_venv_pip_alone_is_used(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = python_without_venv(project, with_pip=True)
    monkeypatch.setattr(sys, "executable", python)
    assert bootstrap.make_pip(project / ".uv") == [python, "-m", "pip", "install", "--target", project / ".uv"]


def test_without_venv_and_pip_the_error_says_what_to_install(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", python_without_venv(project, with_pip=False))
    with pytest.raises(SetupError, match=r"(?s)ensurepip is not available.*apt-get install python3-venv"):
        bootstrap.make_pip(project / ".uv")


def test_the_bootstrap_imports_only_the_standard_library() -> None:
    code = (
        "import sys; sys.path.insert(0, '.'); import ghsync_dagster.local.bootstrap as b; "
        "import ghsync_dagster.jvm.probe; "
        "print([m for m in sys.modules if m.partition('.')[0] not in {*sys.stdlib_module_names, 'ghsync_dagster', "
        "'__main__'}])"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_locks_hold_hashes_and_no_address() -> None:
    for lock in ROOT.glob("requirements*.lock"):
        text = lock.read_text(encoding="utf-8")
        assert "--hash=sha256:" in text, lock.name
        assert "://" not in text, lock.name
