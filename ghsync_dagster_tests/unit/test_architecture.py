"""The rooms of the house: who may import what, and that the rules which say so can fail."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "ghsync_dagster"
BIN = Path(sys.executable).parent


def lint_imports(tree: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    """Hold the contracts of pyproject.toml against the package in ``tree``."""
    command = [str(BIN / "lint-imports"), "--no-logo", "--cache-dir", str(cache)]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=120)


def ruff(tree: Path) -> subprocess.CompletedProcess[str]:
    """Hold the rules on heavy and relative imports against the package in ``tree``."""
    command = [str(BIN / "ruff"), "check", "--no-cache", "--select", "TID252,TID253", PACKAGE]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=60)


def deptry(tree: Path) -> subprocess.CompletedProcess[str]:
    """Hold the packages that pyproject.toml declares against what the package in ``tree`` imports."""
    command = [str(BIN / "deptry"), "--no-ansi", ".", "--extend-exclude", "benchmarks|ghsync_dagster_tests"]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=60)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package and its rules, to plant faults in."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / PACKAGE, tree / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    return tree


def test_the_rooms_import_only_what_they_may(tmp_path: Path) -> None:
    result = lint_imports(ROOT, tmp_path)
    assert result.returncode == 0, result.stdout
    assert " 0 broken" in result.stdout


def test_heavy_libraries_are_imported_where_they_are_used() -> None:
    result = ruff(ROOT)
    assert result.returncode == 0, result.stdout


BOTH = "the floors of the house; production code never passes through local/"


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("domain/user.py", "import pyspark", "domain/ is pure"),
        ("domain/event.py", "def hidden() -> None:\n    import pydantic", "domain/ is pure"),
        ("domain/errors.py", "from ghsync_dagster.stores import mongo", "the floors of the house"),
        ("domain/errors.py", "from ghsync_dagster import clock", "the floors of the house"),
        (
            "logging.py",
            "if TYPE_CHECKING:\n    from ghsync_dagster.settings import Settings",
            "the floors of the house",
        ),
        ("batch/flow.py", "from ghsync_dagster.local import mongo", BOTH),
        ("batch/plots.py", "from ghsync_dagster.defs import errors", "the floors of the house"),
        ("cdc/health/checks.py", "from ghsync_dagster.batch import checks", "the floors of the house"),
        ("local/stack.py", "from ghsync_dagster.batch import flow", "the floors of the house"),
        ("jvm/java.py", "from ghsync_dagster.local import mongo", BOTH),
        ("defs/resources.py", "from ghsync_dagster.local import mysql", "production code never passes through local/"),
        ("cli/show.py", "from ghsync_dagster.local import endpoints", "production code never passes through local/"),
        ("definitions.py", "from ghsync_dagster.local import stack", "production code never passes through local/"),
        (
            "wiring.py",
            "def hidden() -> None:\n    from ghsync_dagster.local import kafka",
            "production code never passes through local/",
        ),
        ("stores/mongo/users.py", "from ghsync_dagster.settings import load_settings", "the floors of the house"),
        ("cdc/dead_letters/index.py", "from ghsync_dagster.cdc.stream.batch import Batch", "the rooms of cdc/"),
        ("cdc/stream/write.py", "from ghsync_dagster.cdc.health import audit", "the rooms of cdc/"),
        ("batch/flow.py", "import dagster", "below defs/ nothing knows Dagster"),
        ("stores/mongo/users.py", "def hidden() -> None:\n    import typer", "below defs/ nothing knows Dagster"),
    ],
)
def test_an_import_into_the_wrong_room_is_found(
    copy: Path, tmp_path: Path, file: str, line: str, contract: str
) -> None:
    with (copy / PACKAGE / file).open("a") as module:
        module.write(f"\n\n{line}\n")
    result = lint_imports(copy, tmp_path / "cache")
    assert result.returncode == 1, result.stdout
    broken = [outcome for outcome in result.stdout.splitlines() if " BROKEN" in outcome]
    contracts = contract.split("; ")
    assert len(broken) == len(contracts), result.stdout
    assert all(map(str.startswith, broken, contracts)), result.stdout


@pytest.mark.parametrize(
    ("file", "line", "rule"),
    [
        ("domain/user.py", "import pyspark", "TID253"),
        ("batch/read.py", "import pyspark", "TID253"),
        ("batch/plan.py", "from pymongo import MongoClient", "TID253"),
        ("defs/ops/alerts.py", "import httpx", "TID253"),
        ("batch/plots.py", "import matplotlib.figure", "TID253"),
        ("batch/flow.py", "from . import checks", "TID252"),
    ],
)
def test_a_heavy_or_relative_import_is_found(copy: Path, file: str, line: str, rule: str) -> None:
    with (copy / PACKAGE / file).open("a") as module:
        module.write(f"\n{line}\n")
    result = ruff(copy)
    assert result.returncode == 1, result.stdout
    assert rule in result.stdout
    assert Path(PACKAGE, file).as_posix() in result.stdout


def test_stores_may_import_their_library_at_the_top(copy: Path) -> None:
    with (copy / PACKAGE / "stores" / "spark.py").open("a") as module:
        module.write("\nimport pyspark\n")
    result = ruff(copy)
    assert result.returncode == 0, result.stdout


def test_what_is_imported_is_declared_and_what_is_declared_is_imported(copy: Path) -> None:
    result = deptry(copy)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("line", "rule", "name"),
    [
        ("import nobody_has_this", "DEP001", "nobody_has_this"),
        ("def hidden() -> None:\n    import urllib3", "DEP003", "urllib3"),
        ("from hypothesis import given", "DEP004", "hypothesis"),
    ],
)
def test_an_undeclared_import_is_found(copy: Path, line: str, rule: str, name: str) -> None:
    with (copy / PACKAGE / "domain" / "user.py").open("a") as module:
        module.write(f"\n\n{line}\n")
    result = deptry(copy)
    assert result.returncode == 1, result.stderr
    [found] = [words for words in result.stderr.splitlines() if " DEP" in words]
    assert found.startswith(f"{PACKAGE}/domain/user.py:")
    assert f"{rule} '{name}'" in found


def test_a_package_that_nothing_imports_is_found(copy: Path) -> None:
    project = copy / "pyproject.toml"
    project.write_text(project.read_text().replace("\ndependencies = [\n", '\ndependencies = [\n  "urllib3",\n', 1))
    result = deptry(copy)
    assert result.returncode == 1, result.stderr
    assert "DEP002 'urllib3'" in result.stderr


def test_the_domain_imports_nothing_but_the_standard_library_and_the_record_library() -> None:
    files = sorted((ROOT / PACKAGE / "domain").rglob("*.py"))
    assert files
    for file in files:
        strangers = {name for name in imports_of(file) if not may_be_in_domain(name)}
        assert not strangers, f"{file.name} imports {strangers}"


def imports_of(file: Path) -> set[str]:
    """Return the modules that a file imports, at its top and inside functions."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)}


def may_be_in_domain(module: str) -> bool:
    """Return whether the domain may import a module."""
    own = module == f"{PACKAGE}.domain" or module.startswith(f"{PACKAGE}.domain.")
    return own or module.partition(".")[0] in {"msgspec", *sys.stdlib_module_names}


@pytest.mark.parametrize("module", ["requests", "ghsync_dagster.batch.flow", "ghsync_dagster.domains", "."])
def test_a_stranger_in_the_domain_is_told_from_its_own(module: str) -> None:
    assert not may_be_in_domain(module)
