"""Bad input through the real commands: exit codes, one clear message each, and nothing stored past a gate."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from ghsync_dagster_tests.support.long_campaign import LONG

if TYPE_CHECKING:
    from collections.abc import Callable

    from ghsync_dagster.stores.mongo.users import UserStore

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
GHSYNC = (sys.executable, "-m", "ghsync_dagster.cli")
DAGSTER = (sys.executable, "-m", "dagster")


@dataclass
class Commands:
    """Runs real commands on the test's own database and folder."""

    environment: dict[str, str]

    def run(self, *command: str, seconds: float = 180) -> subprocess.CompletedProcess[str]:
        """Run to the end."""
        return subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=seconds, check=False
        )


@pytest.fixture
def commands(mongo_uri: str, database: str, tmp_path: Path) -> Commands:
    """The commands, set up by their environment alone."""
    home = tmp_path / "dagster"
    home.mkdir()
    settings = {
        "MONGODB_URI": mongo_uri,
        "MONGODB_DATABASE": database,
        "GHSYNC_HOME": str(tmp_path / "home"),
        "DAGSTER_HOME": str(home),
    }
    return Commands({**os.environ, **settings})


@pytest.fixture
def fifth_bad(tmp_path: Path, event_line: Callable[..., str]) -> Path:
    """A file of which one line in five is bad."""
    path = tmp_path / "fifth_bad.json"
    path.write_text("\n".join("bad" if number % 5 == 0 else event_line(number) for number in range(1, 101)))
    return path


@pytest.mark.faults
@LONG
def test_a_fifth_of_bad_lines_ends_the_batch_with_1_and_stores_nothing(
    commands: Commands, fifth_bad: Path, store: UserStore
) -> None:
    result = commands.run(*GHSYNC, "batch", str(fifth_bad), "--json")
    assert result.returncode == 1, result.stderr
    summary = json.loads(result.stdout)
    assert (summary["lines"], summary["events"], summary["quarantined"]) == (100, 80, 20)
    (check,) = summary["checks"]
    assert (check["check"], check["passed"], len(check["offenders"])) == ("quarantined_ratio", False, 20)
    assert check["offenders"][0]["line"] == 5
    assert "GHSYNC_MAX_QUARANTINED_RATIO" in check["way_out"]
    assert "Traceback" not in result.stderr
    assert store.database.list_collection_names() == []


def test_a_fifth_of_bad_lines_ends_the_job_with_1_and_stores_nothing(
    commands: Commands, fifth_bad: Path, store: UserStore
) -> None:
    commands.environment["GHSYNC_EVENTS_PATH"] = str(fifth_bad)
    # As the reference of commands says: without it, Dagster calls the command superseded.
    commands.environment["PYTHONWARNINGS"] = "ignore:Function:FutureWarning"
    result = commands.run(*DAGSTER, "job", "execute", "-m", "ghsync_dagster.definitions", "-j", "users_batch_job")
    assert result.returncode == 1, result.stderr
    assert "quarantined_ratio" in result.stdout + result.stderr
    assert "superseded" not in result.stdout + result.stderr
    assert commands.environment["PYTHONWARNINGS"] in (ROOT / "docs/reference/commands.md").read_text(encoding="utf-8")
    assert store.database.list_collection_names() == []


def missing(folder: Path, line: str) -> Path:
    del line
    return folder / "missing.json"


def empty_folder(folder: Path, line: str) -> Path:
    del line
    (folder / "nothing").mkdir()
    return folder / "nothing"


def cut_short(folder: Path, line: str) -> Path:
    path = folder / "events.json.gz"
    path.write_bytes(gzip.compress((line + "\n").encode() * 500)[:-10])
    return path


def web_page(folder: Path, line: str) -> Path:
    del line
    path = folder / "events.json.gz"
    path.write_bytes(gzip.compress(b"<!doctype html><title>Log in</title>"))
    return path


FAULTS: list[tuple[Callable[[Path, str], Path], str]] = [
    (missing, "There is no file or folder {path}."),
    (empty_folder, "{path} has no file."),
    (cut_short, "{path} is damaged: its gzip data ends early"),
    (web_page, "{path} is a web page (HTML), not JSON of events."),
]


@pytest.mark.parametrize(("make", "words"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_wrong_file_ends_the_batch_with_2_one_message_and_no_jvm(
    commands: Commands, tmp_path: Path, event_line: Callable[..., str], make: Callable[[Path, str], Path], words: str
) -> None:
    path = make(tmp_path, event_line())
    # Who waited for Spark would be told of this first.
    commands.environment["JAVA_HOME"] = "/there/is/no/java"
    result = commands.run(*GHSYNC, "batch", str(path))
    assert result.returncode == 2
    messages = [line for line in result.stderr.splitlines() if not line.startswith("{")]
    assert len(messages) == 2
    assert messages[0].startswith("error: " + words.format(path=path))
    assert messages[1].startswith("way out: ")
    assert result.stdout == ""


def test_a_jvm_that_starts_meanwhile_ends_with_the_command(commands: Commands, tmp_path: Path) -> None:
    assert commands.run(*GHSYNC, "batch", str(tmp_path / "missing.json")).returncode == 2
    assert not _javas_of(commands.environment["GHSYNC_HOME"])


def _javas_of(home: str) -> list[list[str]]:
    """Return the command lines of the JVMs that still run for a home folder, once those that end have ended."""
    deadline = time.monotonic() + 10
    while True:
        lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
        found = [line for line in lines if "java" in " ".join(line[:1]) and home in " ".join(line)]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def test_a_wrong_file_fails_the_job_with_the_same_message(
    commands: Commands, tmp_path: Path, event_line: Callable[..., str], store: UserStore
) -> None:
    path = cut_short(tmp_path, event_line())
    good = tmp_path / "good.json"
    good.write_text(event_line())
    result = commands.run(*GHSYNC, "run", "--events", str(good), "--events", str(path))
    assert result.returncode == 2
    messages = [line for line in result.stderr.splitlines() if not line.startswith("{")]
    assert any(line.startswith(f"error: {path} ") for line in messages)
    assert any(line.startswith("way out: ") for line in messages)
    assert "Traceback" not in result.stderr
    assert store.database.list_collection_names() == []
