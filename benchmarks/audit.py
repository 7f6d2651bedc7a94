"""The audit, measured against an earlier build: ``python -m benchmarks.audit`` runs, judges and writes the results.

Belongs here: the order of a run, and what is written. Not here: one audit (``audit_once``).

Both builds compare the same table and collection with some differences, in turns, each in a process of its own. Then
the differences are taken away, a consumer and a workload run, and this build compares again and again.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import threading
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from benchmarks import harness
from benchmarks.contenders import inherited_environment
from benchmarks.harness import BenchmarkError
from benchmarks.results import at_least
from benchmarks.stack import Stack
from ghsync_dagster.domain.errors import GhsyncError
from ghsync_dagster.domain.user import USER_FIELDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from ghsync_dagster.stores.mongo.users import UserStore
    from ghsync_dagster.stores.mysql import MySqlStore

RESULTS = Path(__file__).with_name("results")
ROOM_BYTES = 6 * 1024**3
EARLIER = "117d803"
TARGET = 3.0
KINDS = ("missing", "extra", "different")
_CHUNK = 2_000
_AUDIT_SECONDS = 1_800
_TIMES_UNDER_CHANGES = 3

console = Console(highlight=False, width=harness.table_width())


@dataclass(frozen=True)
class AuditRun:
    """What a run found.

    Attributes:
        users: Rows of the table.
        differences: How many were planted.
        earlier: What the earlier build took in each round.
        ours: What this build took in each round.
        times_faster: Median seconds, earlier over ours.
        rate: Changes a second meanwhile; 0 where that part was left out.
        under_changes: What this build took then, each time.
    """

    users: int
    differences: int
    earlier: list[dict[str, Any]]
    ours: list[dict[str, Any]]
    times_faster: float
    rate: float
    under_changes: list[dict[str, Any]]


def user(key: int) -> dict[str, str | None]:
    """Return a user such as GitHub has them."""
    return {
        "user_id": str(key),
        "login": f"user{key}",
        "gravatar_id": "" if key % 3 else None,
        "avatar_url": f"https://avatars.githubusercontent.com/u/{key}?",
        "url": f"https://api.github.com/users/user{key}",
    }


def fill(mysql: MySqlStore, mongo: UserStore, users: int) -> None:
    """Write the same users to both sides, past the binlog: the stream has nothing to do with them."""
    mongo.ensure_collection()
    mysql.execute([("SET SESSION sql_log_bin = 0", ())])
    for first in range(1, users + 1, _CHUNK):
        found = [user(key) for key in range(first, min(first + _CHUNK, users + 1))]
        rows = ", ".join(["(%s, %s, %s, %s, %s)"] * len(found))
        values = [one[name] for one in found for name in USER_FIELDS]
        mysql.execute([(f"INSERT INTO {mysql.table} VALUES {rows}", values)])  # noqa: S608  only names
        mongo.users.insert_many(found, ordered=False)


def plant(mongo: UserStore, users: int, differences: int) -> dict[str, int]:
    """Make differences of all kinds, spread over all keys; return how many of each."""
    planted = dict.fromkeys(KINDS, 0)
    for number in range(differences):
        kind = KINDS[number % len(KINDS)]
        key = 1 + number * users // differences
        if kind == "missing":
            mongo.users.delete_one({"user_id": str(key)})
        elif kind == "extra":
            mongo.users.insert_one({**user(key), "user_id": str(-key)})
        else:
            mongo.users.update_one({"user_id": str(key)}, {"$set": {"login": "other"}})
        planted[kind] += 1
    return planted


def take_away(mongo: UserStore, users: int, differences: int) -> None:
    """Put right what was planted."""
    for number in range(differences):
        key = 1 + number * users // differences
        mongo.users.delete_one({"user_id": str(-key)})
        mongo.users.replace_one({"user_id": str(key)}, user(key), upsert=True)


class _Conductor:
    """A run on running servers."""

    def __init__(self, stack: Stack, tell: Callable[[str], None]) -> None:
        self._stack, self._tell = stack, tell

    def run(self, before: Path, users: int, differences: int, rounds: int, rate: float) -> AuditRun:
        """Fill, compare, and compare under changes.

        Raises:
            BenchmarkError: An audit failed, or found what is not there.
        """
        from ghsync_dagster.stores.mysql import MySqlStore
        from ghsync_dagster.wiring import store_opener

        url = self._stack.settings.mysql_url
        if url is None:
            raise AssertionError("the stack's addresses are set")
        earlier: list[dict[str, Any]] = []
        ours: list[dict[str, Any]] = []
        with MySqlStore(url.get_secret_value()) as mysql, store_opener(self._stack.settings)() as mongo:
            self._tell(f"writing {users:,} users to both sides")
            fill(mysql, mongo, users)
            planted = plant(mongo, users, differences)
            for number in range(rounds):
                for name, build, runs in (("earlier", before, earlier), ("ours", harness.PROJECT, ours)):
                    found = self._audit(f"{name}-{number}", build, patience=0)
                    if {kind: found[kind] for kind in KINDS} != planted or found["rows"] != users:
                        raise BenchmarkError(f"The {name} build found {found}, where {planted} were planted.")
                    runs.append(found)
            take_away(mongo, users, differences)
        under = self._under_changes(rate) if rate else []
        times = statistics.median(run["seconds"] for run in earlier) / statistics.median(run["seconds"] for run in ours)
        return AuditRun(users, differences, earlier, ours, round(times, 2), rate, under)

    def _audit(self, name: str, build: Path, patience: float) -> dict[str, Any]:
        settings = self._stack.settings
        if settings.mysql_url is None or settings.mongodb_uri is None:
            raise AssertionError("the stack's addresses are set")
        addresses = [settings.mysql_url.get_secret_value(), settings.mongodb_uri.get_secret_value()]
        command = [sys.executable, str(Path(__file__).with_name("audit_once.py")), *addresses]
        done = harness.run_watched(
            [*command, settings.mongodb_database, str(patience)],
            inherited_environment() | {"PYTHONPATH": str(build)},
            self._stack.logs,
            name=f"audit-{name}",
            timeout_seconds=_AUDIT_SECONDS,
        )
        found: dict[str, Any] = json.loads(done.output.strip().splitlines()[-1])
        # A folder of this machine says nothing in the results.
        if Path(imported := found.pop("build")) != build.resolve():
            raise BenchmarkError(f"The audit {name} was one of {imported}, not of {build}.")
        found["cpu_seconds"] = done.usage.cpu_seconds
        self._tell(
            f"{name}: {found['seconds']:.1f} s, {found['mysql_bytes'] / harness.MIB:.1f} MiB of MySQL, "
            f"{found['mongo_bytes'] / harness.MIB:.1f} MiB of MongoDB"
        )
        return found

    def _under_changes(self, rate: float) -> list[dict[str, Any]]:
        from ghsync_dagster.dev.workload import Workload
        from ghsync_dagster.stores.mysql import MySqlStore

        url = self._stack.settings.mysql_url
        if url is None:
            raise AssertionError("the stack's addresses are set")
        logs = self._stack.logs
        consumer = [str(Path(sys.executable).with_name("ghsync")), "cdc", "run"]
        stop = threading.Event()
        with (
            harness.watched(
                consumer, self._stack.environment(), logs / "consumer.out", logs / "consumer.err"
            ) as process,
            MySqlStore(url.get_secret_value()) as source,
        ):
            workload = Workload(source, rate=rate)
            thread = threading.Thread(target=lambda: workload.run(seconds=2 * _AUDIT_SECONDS, stop=stop))
            thread.start()
            try:
                runs = [
                    self._audit(f"under-changes-{number}", harness.PROJECT, patience=60)
                    for number in range(_TIMES_UNDER_CHANGES)
                ]
            finally:
                stop.set()
                thread.join()
            if process.child.poll() is not None:
                raise BenchmarkError(f"The consumer ended early:\n{harness.tail(logs / 'consumer.err')}")
        if wrong := [run for run in runs if any(run[kind] for kind in KINDS)]:
            raise BenchmarkError(f"Under changes the audit found differences that are none: {wrong}.")
        return runs


def main(
    users: Annotated[int, typer.Option(min=100, help="Rows of the table.")] = 1_000_000,
    differences: Annotated[int, typer.Option(min=1, help="Differences between both sides.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="How often each build compares.")] = 2,
    rate: Annotated[float, typer.Option(min=0, help="Changes a second in the last part; 0: leave it out.")] = 1_000,
    commit: Annotated[str, typer.Option(help="The earlier build.")] = EARLIER,
    before: Annotated[Path | None, typer.Option(help="A folder with the earlier build in place of the commit.")] = None,
    folder: Annotated[Path | None, typer.Option(help="For the servers' files. Default: on tmpfs.")] = None,
    out: Annotated[Path, typer.Option(help="The results.")] = RESULTS / "audit.json",
) -> None:
    """Measure the audit against an earlier build, and under changes."""
    harness.interrupt_on_signals()
    room, warnings = harness.store_folder(folder, ROOM_BYTES)
    try:
        with ExitStack() as around:
            home = Path(around.enter_context(tempfile.TemporaryDirectory(prefix="ghsync-bench-audit-", dir=room)))
            (home / "logs").mkdir()
            build = before.resolve() if before else harness.earlier_build(commit, home / "earlier")
            stack = around.enter_context(Stack(home / "home", home / "logs", console.print))
            run = _Conductor(stack, console.print).run(build, users, differences, rounds, rate)
    except KeyboardInterrupt:
        console.print("Interrupted: everything is stopped, nothing is written.")
        raise typer.Exit(harness.INTERRUPTED) from None
    except (BenchmarkError, GhsyncError) as error:
        console.print(f"failed: {error}")
        raise typer.Exit(1) from None
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        json.dumps({**asdict(run), "target": TARGET, "warnings": warnings}, indent=2) + "\n", encoding="utf-8"
    )
    # As in the other benchmarks a target that is missed is a result, and no failure of the run.
    met = "met" if at_least("audit", run.times_faster, TARGET).met else "missed"
    console.print(f"{run.times_faster:.2f} times as fast as {commit} (target {TARGET:.0f}: {met}); results: {out}")


if __name__ == "__main__":
    typer.run(main)
