"""What would end a run later on ends it before any work: by the real commands, without a JVM, with nothing written."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ghsync_dagster_tests.support.cdc_parts import free_port
from ghsync_dagster_tests.support.long_campaign import HANG_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from ghsync_dagster.stores.mongo.users import UserStore

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
GHSYNC = (sys.executable, "-m", "ghsync_dagster.cli")


@dataclass
class World:
    """Where a command runs: a database, a file of one event and the environment."""

    store: UserStore
    events: Path
    environment: dict[str, str] = field(default_factory=dict)

    def refused(self, command: str, code: int) -> str:
        """Run a command that ends with ``code`` before Spark and the local MongoDB start; return its words."""
        arguments = {"batch": ["batch", str(self.events)], "run": ["run", "--events", str(self.events)]}[command]
        # A Java that does not exist would be told by another message.
        given = {**os.environ, **self.environment, "JAVA_HOME": "/there/is/no/java"}
        ended = subprocess.run(
            [*GHSYNC, *arguments],
            cwd=ROOT,
            env=given,
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
            check=False,
        )
        assert ended.returncode == code, ended.stderr
        assert ended.stdout == ""
        lines = [line for line in ended.stderr.splitlines() if not line.startswith("{")]
        assert [line.partition(":")[0] for line in lines] == ["error", "way out"]
        assert "s3cret" not in ended.stderr
        assert not (Path(self.environment["GHSYNC_HOME"]) / "mongo").exists()
        return lines[0]


@pytest.fixture
def world(mongo_uri: str, database: str, store: UserStore, tmp_path: Path, event_line: Callable[..., str]) -> World:
    """A world in which all is right."""
    events = tmp_path / "events.json"
    events.write_text(event_line())
    return World(
        store,
        events,
        {"MONGODB_URI": mongo_uri, "MONGODB_DATABASE": database, "GHSYNC_HOME": str(tmp_path / "home")},
    )


@pytest.mark.parametrize("command", ["batch", "run"])
def test_a_target_that_can_t_hold_users(world: World, command: str) -> None:
    world.store.database.command({"create": "Users", "viewOn": "Other", "pipeline": []})
    assert "is a view on Other" in world.refused(command, 2)
    assert world.store.database.list_collection_names() == ["Users"]


@pytest.mark.parametrize("command", ["batch", "run"])
def test_a_server_that_is_away(world: World, command: str) -> None:
    world.environment["MONGODB_URI"] = f"mongodb://app:s3cret@127.0.0.1:{free_port()}"
    assert "MongoDB can't be reached" in world.refused(command, 3)


@pytest.mark.parametrize("command", ["batch", "run"])
def test_a_host_that_dns_does_not_know(world: World, command: str) -> None:
    world.environment["MONGODB_URI"] = "mongodb+srv://app:s3cret@db.example.invalid/"
    assert "the host of MONGODB_URI can't be looked up in DNS" in world.refused(command, 3)


@pytest.mark.parametrize("command", ["batch", "run"])
def test_a_home_that_can_t_be_written_to(world: World, command: str) -> None:
    world.environment["GHSYNC_HOME"] = "/proc/home"
    assert "Nothing can be written to /proc/" in world.refused(command, 2)


@pytest.mark.parametrize("command", ["batch", "run"])
def test_a_path_that_leads_nowhere(world: World, command: str) -> None:
    world.events = world.events.with_name("nope.json")
    del world.environment["MONGODB_URI"]
    assert f"There is no file or folder {world.events}" in world.refused(command, 2)
    assert not (Path(world.environment["GHSYNC_HOME"]) / "dagster" / "history").exists()


@pytest.mark.parametrize("command", ["batch", "run"])
def test_a_file_of_another_kind(world: World, command: str) -> None:
    world.events.write_text("id,login,url\n1,octocat,u\n2,hubot,v\n")
    assert f"{world.events} is " in world.refused(command, 2)
