"""Nothing is written to MongoDB past a guard: each command asks it, and no other module can send one."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from pymongo.errors import AutoReconnect

from ghsync_dagster import clock
from ghsync_dagster.domain.change import Position
from ghsync_dagster.domain.errors import LeaseLostError, UnavailableError
from ghsync_dagster.domain.repair import Outcome, Reading
from ghsync_dagster.stores.mongo.commands import Commands
from ghsync_dagster.stores.mongo.guard import TimeLimit
from ghsync_dagster.stores.mongo.repairs import RepairRequests, RepairWriter
from ghsync_dagster.stores.mongo.users import UserStore
from ghsync_dagster.stores.mongo.writer import UserWriter
from ghsync_dagster_tests.support.guards import AskedGuard, writer_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PACKAGE: Final = Path(__file__).parents[2] / "ghsync_dagster"
COMMANDS: Final = PACKAGE / "stores" / "mongo" / "commands.py"
WRITES: Final = {
    *("insert_one", "insert_many", "update_one", "update_many", "replace_one", "delete_one", "delete_many"),
    *("bulk_write", "find_one_and_update", "find_one_and_replace", "find_one_and_delete", "create_collection"),
    *("create_index", "create_indexes", "drop_collection", "drop_index", "drop_indexes", "drop_database", "command"),
}
"""The driver's methods that write. None of ours has their names."""
READS: Final = {"ping", "hello", "connectionStatus"}
"""The commands that only read."""
USER: Final = {"user_id": "1", "login": "a", "gravatar_id": None, "avatar_url": None, "url": None}
READING: Final = Reading("r", Position(1, 4, 0, "7/bin"))

BY_WRITER: Final[dict[str, Callable[[UserWriter], object]]] = {
    "insert_versions": lambda writer: writer.insert_versions([("1", "x", 1)], "load"),
    "move_versions": lambda writer: writer.move_versions([("1", "x", 1)], None),
    "drop_versions": lambda writer: writer.drop_versions(["1"]),
    "drop_all_versions": lambda writer: writer.drop_all_versions(),
    "record_deleted": lambda writer: writer.record_deleted(["1"]),
    "forget_deleted": lambda writer: writer.forget_deleted(["1"]),
    "upsert": lambda writer: writer.upsert({"1": dict(USER)}),
    "remove": lambda writer: writer.remove(["1"]),
    "remove_nameless": lambda writer: writer.remove_nameless(),
    "everyone": lambda writer: list(writer.everyone(frozenset())),
    "replace_unchanged": lambda writer: writer.replace_unchanged([(USER, USER)]),
    "put_back": lambda writer: writer.put_back([USER]),
    "delete_marked": lambda writer: writer.delete_marked(["1"]),
    "unmark_all": lambda writer: writer.unmark_all(),
    "write_undo": lambda writer: writer.write_undo([USER], "load"),
    "forget_undo": lambda writer: writer.forget_undo(["1"]),
    "clear_undo": lambda writer: writer.clear_undo(),
    "record_load": lambda writer: writer.record_load("load", state="running"),
}
BY_OWNER: Final[dict[str, Callable[[RepairWriter], object]]] = {
    "stored_users": lambda repairs: repairs.stored_users(["1"]),
    "record_fence": lambda repairs: repairs.record_fence({"1": "token"}, READING, {"1"}),
    "record_outcomes": lambda repairs: repairs.record_outcomes({"1": "token"}, Outcome.WRITTEN, {}),
    "record_reasons": lambda repairs: repairs.record_reasons({"1": "why"}),
}


@pytest.fixture
def nowhere() -> Iterator[UserStore]:
    """A store whose server no command may reach: each would fail as unavailable."""
    with UserStore("mongodb://127.0.0.1:1", "nowhere", "Users", timeout_seconds=0.1) as store:
        yield store


def public(owner: type[Any]) -> set[str]:
    return {name for name, _ in inspect.getmembers(owner, inspect.isfunction) if not name.startswith("_")}


def lost() -> float:
    raise LeaseLostError("planted", way_out="none")


@pytest.mark.parametrize("name", BY_WRITER)
def test_a_writer_of_users_sends_nothing_that_its_guard_does_not_allow(nowhere: UserStore, name: str) -> None:
    with pytest.raises(LeaseLostError):
        BY_WRITER[name](writer_of(nowhere, lost))
    with pytest.raises(UnavailableError):
        BY_WRITER[name](writer_of(nowhere, lambda: 0.2))


@pytest.mark.parametrize("name", BY_OWNER)
def test_an_owner_of_repairs_sends_nothing_that_its_guard_does_not_allow(nowhere: UserStore, name: str) -> None:
    with pytest.raises(LeaseLostError):
        BY_OWNER[name](RepairWriter(writer_of(nowhere, lost)))


def test_the_tables_here_name_every_method_that_writes() -> None:
    assert public(UserWriter) == BY_WRITER.keys()
    # What a request does, everybody may do; the owner adds what it writes.
    own = {name for name in public(RepairWriter) if name in vars(RepairWriter)}
    assert own == BY_OWNER.keys()
    assert public(RepairWriter) - own <= public(RepairRequests)


def test_a_command_whose_answer_is_missing_is_in_doubt(nowhere: UserStore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not Commands(TimeLimit(5)).in_doubt
    commands = Commands(TimeLimit(5))
    with pytest.raises(UnavailableError), commands.send("Reading"):
        # Well within its time, which would put it in doubt too.
        raise AutoReconnect("planted")
    assert commands.in_doubt
    commands.in_doubt = False
    with pytest.raises(LeaseLostError):
        Commands(AskedGuard(lost)).on(nowhere.users).delete({})
    now = clock.now()
    times = iter([now, now + 6])
    monkeypatch.setattr(clock, "now", lambda: next(times))
    with commands.send("Reading"):
        pass
    assert commands.in_doubt, "it came after its time"


def written_in(source: str) -> list[tuple[str, bool]]:
    """Return each call of a method that may write, and whether it stands in a ``with`` of a guarded command."""
    found: list[tuple[str, bool]] = []

    def walk(node: ast.AST, *, is_sent: bool) -> None:
        if isinstance(node, ast.With):
            is_sent = is_sent or any(".send(" in ast.unparse(item.context_expr) for item in node.items)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WRITES:
            named = [str(part.value) for part in ast.walk(node) if isinstance(part, ast.Constant)]
            is_of_driver = ast.unparse(node.func.value).endswith(("database", "admin"))
            if node.func.attr != "command" or (is_of_driver and not READS.intersection(named[:1])):
                found.append((node.func.attr, is_sent))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "self.reads.drop":
            found.append(("drop", is_sent))
        for child in ast.iter_child_nodes(node):
            walk(child, is_sent=is_sent)

    walk(ast.parse(source), is_sent=False)
    return found


def test_only_one_module_calls_what_writes_and_only_in_a_guarded_command() -> None:
    elsewhere = {
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in PACKAGE.rglob("*.py")
        if path != COMMANDS
        for name, _ in written_in(path.read_text(encoding="utf-8"))
    }
    # It makes the replica set and users of the stack's own server, by commands of the database admin.
    assert elsewhere == {"deploy/servers.py: command"}
    servers = (PACKAGE / "deploy/servers.py").read_text(encoding="utf-8")
    assert servers.count(".command(") == servers.count("client.admin.command(") > 0
    here = written_in(COMMANDS.read_text(encoding="utf-8"))
    assert {"insert_many", "bulk_write", "delete_many", "update_many", "replace_one"} <= {name for name, _ in here}
    assert [name for name, is_sent in here if not is_sent] == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("store.users.delete_many({})", [("delete_many", False)]),
        ("with self._commands.send('x'):\n    self.reads.insert_one({})", [("insert_one", True)]),
        ("def f():\n    return self.reads.drop()", [("drop", False)]),
        ("self.database.command({'collMod': 'Users'})", [("command", False)]),
        ("self.database.command('ping')", []),
        ("app.command()(run)", []),
    ],
)
def test_a_write_past_the_guard_is_found(source: str, found: list[tuple[str, bool]]) -> None:
    assert written_in(source) == found
