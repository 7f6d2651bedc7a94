"""Versions are the same only where files and code are the same for certain."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING

import msgspec
import pytest

from ghsync_dagster.batch import versions
from ghsync_dagster.batch.reports import Artifacts, FlattenReport, ReadReport
from ghsync_dagster.batch.versions import UNKNOWN, InputState, code_version, state_of, version_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two files."""
    found = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in found:
        file.write_text("one\n")
    return found


def of(files: Sequence[Path]) -> InputState:
    """Return the state of files."""
    return InputState(tuple(sorted(state_of(str(file), file.stat()) for file in files)))


def same_length_and_time(file: Path) -> None:
    """Write other content of the same length, and set the time back, as a copy with its times does."""
    before = file.stat()
    file.write_text("two\n")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(file: Path) -> None:
    """Put another file of the same length and time at the path."""
    before, other = file.stat(), file.with_name("other")
    other.write_text("two\n")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(file)


def renamed(file: Path) -> None:
    """Have another name for the same content."""
    file.rename(file.with_name("c.json"))


def longer(file: Path) -> None:
    """Append a line."""
    with file.open("a") as end:
        end.write("two\n")


def test_files_that_nobody_touched_have_one_version_in_any_order(files: list[Path]) -> None:
    assert of(files).version == of(files[::-1]).version


@pytest.mark.parametrize("change", [same_length_and_time, replaced, renamed, longer])
def test_any_change_of_a_file_makes_another_version(files: list[Path], change: Callable[[Path], None]) -> None:
    before = of(files).version
    change(files[1])
    assert of(sorted(files[0].parent.iterdir())).version != before


def test_a_file_more_or_less_makes_another_version(files: list[Path]) -> None:
    assert len({of(files[:count]).version for count in range(3)}) == 3


def test_parts_do_not_run_into_each_other() -> None:
    assert version_of("ab", "c") != version_of("a", "bc")
    assert version_of("a") != version_of("a", "")


def test_what_is_not_known_is_equal_to_nothing() -> None:
    assert len({version_of("a", UNKNOWN) for _ in range(3)} | {version_of("a")}) == 4


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with a project's rules, and a copy of this package's code."""
    copy = tmp_path / "package"
    for room in ("domain", "batch", "stores"):
        shutil.copytree(versions._PACKAGE / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(versions, "_PACKAGE", copy)
    package = tmp_path / "acme_rules"
    package.mkdir()
    for name in ("__init__", "rules", "helpers"):
        (package / f"{name}.py").write_text("RULES = ()\n")
    monkeypatch.syspath_prepend(tmp_path)
    code_version.cache_clear()
    yield tmp_path
    code_version.cache_clear()
    sys.modules.pop("acme_rules", None)


@pytest.mark.parametrize(
    "changed", ["package/domain/event.py", "package/batch/decide.py", "acme_rules/rules.py", "acme_rules/helpers.py"]
)
def test_any_change_of_code_or_rules_makes_another_version(project: Path, changed: str) -> None:
    before = code_version("acme_rules.rules")
    code_version.cache_clear()
    assert code_version("acme_rules.rules") == before
    with (project / changed).open("a") as source:
        source.write("# another\n")
    code_version.cache_clear()
    assert code_version("acme_rules.rules") != before


@pytest.mark.usefixtures("project")
def test_rules_that_are_not_found_have_no_known_version() -> None:
    found = {code_version(None), code_version("acme_rules.gone")}
    code_version.cache_clear()
    assert len({*found, code_version("acme_rules.gone")}) == 3


def test_a_report_of_a_build_without_versions_is_of_no_known_version(tmp_path: Path) -> None:
    report = FlattenReport("users", 1, 0.1, "in", "out")
    Artifacts(tmp_path).publish(report)
    file = tmp_path / "flatten.json"
    old = msgspec.json.decode(file.read_bytes())
    file.write_bytes(msgspec.json.encode({name: old[name] for name in ("users_path", "users", "seconds")}))
    assert Artifacts(tmp_path).newest(FlattenReport).data_version == UNKNOWN
    assert ReadReport("e", "q", [], 0, 0, 0, 0, {}, 0.0).data_version == UNKNOWN
