"""Who is measured on the batch load, and what each must leave in the store.

Belongs here: commands, environments, the reading of a contender's JSON, the end state that it owes. Not here: running
or measuring processes, or comparing results.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymongo import MongoClient

from benchmarks.harness import BenchmarkError, earlier_build
from ghsync_dagster.settings import environment_without_settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from benchmarks.harness import Store

EARLIER = "302b9a1"
"""The last build in which the driver read every file, and Spark again."""
COLLECTION = "Users"
FIELDS = ("user_id", "login", "gravatar_id", "avatar_url", "url")
PEERS = Path(__file__).with_name("peers")
_OTHER_SETTINGS = ("DAGSTER_", "PYSPARK_", "PYTHONDONTWRITEBYTECODE")
_KEPT_SETTINGS = ("GHSYNC_CACHE",)
_DIGEST_BYTES = 16


# --- the contenders -------------------------------------------------------------------------------------------------

Command = Callable[[Path, Path], list[str]]


@dataclass(frozen=True)
class Contender:
    """One way to do the batch load.

    Attributes:
        name: What ``--contenders`` takes.
        words: What it is, for the table and the plot.
        command: Makes the command line from the events' file and the connector's jar.
        newest_wins: It promises the newest state of each user; else one document a user is all.
    """

    name: str
    words: str
    command: Command
    newest_wins: bool = True


def program(name: str) -> str:
    """Return the path of a program of this virtual environment."""
    return str(Path(sys.executable).with_name(name))


@cache
def _build_before() -> Path:
    """Unpack the earlier build, until this process ends."""
    folder = tempfile.TemporaryDirectory(prefix="ghsync-bench-before-")
    atexit.register(folder.cleanup)
    return earlier_build(EARLIER, Path(folder.name))


def _before(events: Path, _jar: Path) -> list[str]:
    path = f"PYTHONPATH={_build_before()}"
    return ["env", path, sys.executable, "-m", "ghsync_dagster.cli", "batch", str(events), "--json"]


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("ours", "ghsync batch", lambda events, _: [program("ghsync"), "batch", str(events), "--json"]),
        Contender("before", f"ghsync batch at {EARLIER}", _before),
        Contender(
            "ours-dagster",
            "ghsync as a Dagster job",
            lambda _events, _jar: [
                *(program("dagster"), "job", "execute"),
                *("-m", "ghsync_dagster.definitions", "-j", "users_batch_job"),
            ],
        ),
        Contender(
            "plain",
            "plain Spark script",
            lambda events, jar: [sys.executable, str(PEERS / "plain_spark.py"), str(events), str(jar)],
            newest_wins=False,
        ),
        Contender(
            "floor",
            "msgspec + pymongo",
            lambda events, _: [sys.executable, str(PEERS / "msgspec_pymongo.py"), str(events)],
        ),
        Contender(
            "floor-versions",
            "msgspec + pymongo, with versions",
            lambda events, _: [sys.executable, str(PEERS / "msgspec_pymongo.py"), str(events), "--versions"],
        ),
    )
}


def inherited_environment() -> dict[str, str]:
    """Return the caller's environment without any setting of ghsync, Spark or Dagster.

    Nor is Python kept from keeping what it compiles, which would add to the start of every process.
    """
    given = environment_without_settings()
    kept = {name: os.environ[name] for name in _KEPT_SETTINGS if name in os.environ}
    return {name: value for name, value in given.items() if not name.startswith(_OTHER_SETTINGS)} | kept


def environment(store: Store, events: Path, home: Path, java_home: Path) -> dict[str, str]:
    """Return the whole environment of a contender: the caller's, with every setting that could tilt the race replaced.

    Args:
        store: Where to write.
        events: The input.
        home: A new, empty folder for ghsync's and Dagster's state.
        java_home: The one Java that all contenders run on.
    """
    dagster_home = home / "dagster"
    dagster_home.mkdir(parents=True)
    return {
        **inherited_environment(),
        "JAVA_HOME": str(java_home),
        "MONGODB_URI": store.uri,
        "MONGODB_DATABASE": store.database,
        "GHSYNC_EVENTS_PATH": str(events),
        "GHSYNC_HOME": str(home),
        "DAGSTER_HOME": str(dagster_home),
    }


def parse_output(output: str) -> dict[str, Any]:
    """Return the JSON object that a contender printed: the whole output or its last line; empty where there is none."""
    lines = [line for line in output.splitlines() if line.strip()]
    for text in (output, lines[-1] if lines else ""):
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(value, dict):
            return value
    return {}


# --- the end state --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Content:
    """What a collection holds, by number and by a digest that does not depend on the order."""

    documents: int
    digest: str


@dataclass(frozen=True)
class Expected:
    """What an input must end as: one document a user, of the newest event."""

    events: int
    users: Content


def expected_content(events: Path) -> Expected:
    """Compute from the file alone, with the standard library only, what must be stored."""
    newest: dict[int, tuple[tuple[str, int], dict[str, Any]]] = {}
    rows = 0
    with events.open(encoding="utf-8") as lines:
        for line in lines:
            event = json.loads(line)
            actor = event["actor"]
            age = (event["created_at"], int(event["id"]))
            rows += 1
            if actor["id"] not in newest or newest[actor["id"]][0] <= age:
                newest[actor["id"]] = age, actor
    users = Digest()
    for _, actor in newest.values():
        users.add(_row(actor))
    return Expected(events=rows, users=users.content())


def check_end_state(contender: Contender, store: Store, expected: Expected) -> Content:
    """Compare the store with what was due after a load; see ``check_users``."""
    return check_users(contender.name, store, expected.users, newest_wins=contender.newest_wins)


def check_users(name: str, store: Store, due: Content, *, newest_wins: bool = True) -> Content:
    """Compare the users in the store with what was due.

    Args:
        name: Whose work it is.
        store: Where it wrote.
        due: What must be there.
        newest_wins: Whether the content is compared too; else only the number of documents.

    Returns:
        What the collection holds.

    Raises:
        BenchmarkError: It is not what was due: its number would be worth nothing.
    """
    with MongoClient[dict[str, Any]](store.uri) as client:
        collection = client[store.database][COLLECTION]
        documents = Digest()
        marked = 0
        for document in collection.find({}, {"_id": False}):
            marked += "spark_temp" in document
            documents.add(document)
        unique = [index for index in collection.index_information().values() if index.get("unique")]
    found = documents.content()
    if found.documents != due.documents:
        raise BenchmarkError(f"{name} left {found.documents:,} documents; {due.documents:,} are due.")
    if marked:
        raise BenchmarkError(f"{name} left {marked:,} documents with the marker.")
    if newest_wins and found != due:
        raise BenchmarkError(f"{name} left the right number of documents, but not the right content.")
    if [("user_id", 1)] not in [list(index["key"]) for index in unique]:
        raise BenchmarkError(f"{name} left no unique index on user_id.")
    return found


class Digest:
    """The sum of the documents' hashes: the same for the same documents in any order, repeats counted."""

    def __init__(self) -> None:
        self.documents = 0
        self._sum = 0

    def add(self, document: Mapping[str, Any]) -> None:
        """Add a document."""
        text = json.dumps(document, sort_keys=True).encode()
        self.documents += 1
        self._sum += int.from_bytes(hashlib.blake2b(text, digest_size=_DIGEST_BYTES).digest(), "big")

    def content(self) -> Content:
        """Return what was added so far."""
        return Content(self.documents, f"{self._sum % (1 << (8 * _DIGEST_BYTES)):0{2 * _DIGEST_BYTES}x}")


def _row(actor: Mapping[str, Any]) -> dict[str, Any]:
    return {"user_id": str(actor["id"]), **{name: actor.get(name) for name in FIELDS[1:]}}


def named(names: Iterable[str]) -> list[Contender]:
    """Return the contenders of these names, in this order.

    Raises:
        BenchmarkError: There is no such contender.
    """
    wanted = list(names)
    if unknown := [name for name in wanted if name not in CONTENDERS]:
        raise BenchmarkError(f"There is no contender {', '.join(unknown)}. Way out: pick from {', '.join(CONTENDERS)}.")
    return [CONTENDERS[name] for name in wanted]
