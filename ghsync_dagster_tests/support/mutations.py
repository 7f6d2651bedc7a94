"""Single mutations of the product's own code, and the tests that must turn red for each.

Belongs here: what is changed, where, and how a copy with the change is tried. Not here: which of them a run tries
(faults/test_mutations.py).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ghsync_dagster_tests.support.long_campaign import HANG_SECONDS

ROOT = Path(__file__).parents[2]
_COPIED = ("ghsync_dagster", "ghsync_dagster_tests", "benchmarks", "docs", "pyproject.toml")

MODEL, REPAIR_MODEL = "unit/test_precedence.py", "unit/test_repair_model.py"
APPLY, PLAN, SETTLE = "unit/test_apply_trace.py", "unit/test_plan_trace.py", "unit/test_settle_trace.py"
REPAIR, COALESCE = "unit/test_repair_trace.py", "unit/test_coalesce.py"
HISTORIES, GUARD = "unit/test_stream_histories.py", "unit/test_guard.py"


@dataclass(frozen=True)
class Mutation:
    """One change of one place.

    Attributes:
        what: What goes wrong, in words.
        file: The file, below the package.
        before: Text that stands in it once.
        after: What stands there instead.
        tests: The file of tests that must turn red.
    """

    what: str
    file: str
    before: str
    after: str
    tests: str

    def __str__(self) -> str:
        return self.what.replace(" ", "-")


_PRECEDENCE, _REPAIR, _COMMANDS = "domain/precedence.py", "domain/repair.py", "stores/mongo/commands.py"
_APPLY, _PLAN, _SETTLE, _CARRY = "cdc/stream/apply.py", "batch/plan.py", "batch/settle.py", "cdc/stream/repair.py"

MUTATIONS = (
    # The tables
    Mutation(
        "an upsert drops no version first",
        _PRECEDENCE,
        "UPSERT_STEPS = (\n    StreamStep.DROP_VERSION,\n",
        "UPSERT_STEPS = (\n",
        MODEL,
    ),
    Mutation(
        "an upsert drops no version again",
        _PRECEDENCE,
        "    StreamStep.DROP_VERSION_AGAIN,\n    StreamStep.FORGET_DELETED,\n)",
        "    StreamStep.FORGET_DELETED,\n)",
        MODEL,
    ),
    Mutation(
        "an upsert forgets the deletion before it writes",
        _PRECEDENCE,
        "    StreamStep.WRITE_DOCUMENT,\n    StreamStep.DROP_VERSION_AGAIN,\n    StreamStep.FORGET_DELETED,\n)",
        "    StreamStep.FORGET_DELETED,\n    StreamStep.WRITE_DOCUMENT,\n    StreamStep.DROP_VERSION_AGAIN,\n)",
        MODEL,
    ),
    Mutation(
        "a delete is recorded last",
        _PRECEDENCE,
        "(StreamStep.RECORD_DELETED, StreamStep.DROP_VERSION, StreamStep.REMOVE_DOCUMENT)",
        "(StreamStep.DROP_VERSION, StreamStep.REMOVE_DOCUMENT, StreamStep.RECORD_DELETED)",
        MODEL,
    ),
    Mutation(
        "a key that was overtaken does not go back",
        _PRECEDENCE,
        "{StreamStep.DROP_VERSION_AGAIN: StreamStep.WRITE_DOCUMENT}",
        "dict[StreamStep, StreamStep]()",
        MODEL,
    ),
    Mutation(
        "old content is logged after it is replaced",
        _PRECEDENCE,
        "(LoadStep.LOG_OLD, LoadStep.WRITE_DOCUMENT, LoadStep.WRITE_VERSION)",
        "(LoadStep.WRITE_DOCUMENT, LoadStep.LOG_OLD, LoadStep.WRITE_VERSION)",
        MODEL,
    ),
    Mutation(
        "a version is written before the document is replaced",
        _PRECEDENCE,
        "(LoadStep.LOG_OLD, LoadStep.WRITE_DOCUMENT, LoadStep.WRITE_VERSION)",
        "(LoadStep.LOG_OLD, LoadStep.WRITE_VERSION, LoadStep.WRITE_DOCUMENT)",
        MODEL,
    ),
    Mutation(
        "an insert leaves the entry of no document",
        _PRECEDENCE,
        "(LoadStep.DROP_STALE, LoadStep.WRITE_DOCUMENT, LoadStep.WRITE_VERSION)",
        "(LoadStep.WRITE_DOCUMENT, LoadStep.WRITE_VERSION)",
        MODEL,
    ),
    Mutation(
        "what is inserted again stays in the log",
        _PRECEDENCE,
        "    LoadStep.DROP_STALE,\n    LoadStep.FORGET_LOGGED,\n",
        "    LoadStep.DROP_STALE,\n",
        MODEL,
    ),
    Mutation(
        "the marker goes before the check is recorded",
        _PRECEDENCE,
        "SETTLE_STEPS = tuple(SettleStep)\n",
        "SETTLE_STEPS = (*list(SettleStep)[:5], SettleStep.UNMARK, SettleStep.RECORD_CHECKED, *list(SettleStep)[7:])\n",
        MODEL,
    ),
    # The decisions
    Mutation(
        "an older event replaces a newer one",
        _PRECEDENCE,
        "    if stored.version > incoming.version:",
        "    if stored.version < incoming.version:",
        MODEL,
    ),
    Mutation(
        "a file brings back what the stream deleted",
        _PRECEDENCE,
        "        return Action.DELETED_BY_STREAM if stored.deleted else Action.INSERT\n    if stored.version is None:",
        "        return Action.INSERT\n    if stored.version is None:",
        MODEL,
    ),
    Mutation(
        "a load takes the stream's document for its own",
        _PRECEDENCE,
        "    if stored.version is None:\n        return Action.OWNED_BY_STREAM\n",
        "    if stored.version is None:\n        return Action.REPLACE\n",
        MODEL,
    ),
    Mutation(
        "settling does not look at the deletion",
        _PRECEDENCE,
        "found.versioned and not found.deleted",
        "found.versioned",
        MODEL,
    ),
    Mutation(
        "settling keeps a document without its version",
        _PRECEDENCE,
        "        return Repair.KEEP if found.versioned else Repair.PUT_BACK",
        "        return Repair.KEEP",
        MODEL,
    ),
    Mutation(
        "a checked load is settled as a running one",
        _PRECEDENCE,
        "    return steps if last is None else steps[steps.index(last) + 1 :]",
        "    return steps",
        SETTLE,
    ),
    # How changes are applied
    Mutation(
        "the deletion is recorded by the command that removes",
        _APPLY,
        "StreamStep.RECORD_DELETED: writer.record_deleted",
        "StreamStep.RECORD_DELETED: self._remove",
        APPLY,
    ),
    Mutation(
        "what a load wrote in between is not written again",
        _APPLY,
        "            if found and step in GOES_BACK:",
        "            if found and step in ():",
        APPLY,
    ),
    Mutation(
        "what is refused takes the next steps",
        _APPLY,
        "            if self._applied.refused:\n",
        "            if self._applied.repeated:\n",
        APPLY,
    ),
    Mutation(
        "a truncate removes whom it keeps",
        _APPLY,
        "writer.everyone(keep)",
        "writer.everyone(frozenset())",
        APPLY,
    ),
    Mutation(
        "a truncate comes after the changes behind it",
        _APPLY,
        "    applying.take(UPSERT_STEPS, upserts)\n    applied.upserts",
        "    for keys in writer.everyone(keep) if segment.truncate else ():\n"
        "        applying.take(DELETE_STEPS, keys)\n    applied.upserts",
        APPLY,
    ),
    Mutation(
        "deletes are not applied",
        _APPLY,
        "    applying.take(DELETE_STEPS, deletes)\n",
        "",
        APPLY,
    ),
    # How a load plans
    Mutation(
        "the log gets what is replaced after it is replaced",
        _PLAN,
        "        for step in steps:\n            if rows and not",
        "        for step in sorted(steps, key=lambda step: step is LoadStep.LOG_OLD):\n            if rows and not",
        PLAN,
    ),
    Mutation(
        "a confirmed version names the load",
        _PLAN,
        "self._move_versions(rows, None)",
        "self._move_versions(rows, load_id)",
        PLAN,
    ),
    Mutation(
        "a version entry of no document stays",
        _PLAN,
        "if key in self._versions])\n",
        "if key in self._deleted])\n",
        PLAN,
    ),
    Mutation(
        "late inserts stay",
        _PRECEDENCE,
        "PLAN_STEPS = (*READ_STEPS, LoadStep.REMOVE_LATE)",
        "PLAN_STEPS = READ_STEPS",
        PLAN,
    ),
    Mutation(
        "a command does not ask its guard",
        _COMMANDS,
        "        seconds = self.guard.allow()\n",
        "        seconds = None\n",
        GUARD,
    ),
    Mutation(
        "what is missing and marked counts as another's",
        _PLAN,
        "is_marked = MARKER_FIELD in",
        "is_marked = MARKER_FIELD not in",
        PLAN,
    ),
    # How a load settles
    Mutation(
        "the load is done before it is checked",
        _SETTLE,
        "SettleStep.RECORD_CHECKED: lambda: self._record(LoadState.CHECKED)",
        "SettleStep.RECORD_CHECKED: lambda: self._record(LoadState.DONE)",
        SETTLE,
    ),
    Mutation(
        "the log is cleared before the marker goes",
        _SETTLE,
        "            SettleStep.UNMARK: self._unmark,\n            SettleStep.FORGET_OLD: writer.clear_undo,\n",
        "            SettleStep.UNMARK: writer.clear_undo,\n            SettleStep.FORGET_OLD: self._unmark,\n",
        SETTLE,
    ),
    Mutation(
        "settling drops the entry of another load",
        _SETTLE,
        "if entry.load == self._load_id",
        "if entry.load",
        SETTLE,
    ),
    Mutation(
        "settling skips the keys though the stream deleted some",
        _SETTLE,
        " and not store.any_deleted():",
        ":",
        SETTLE,
    ),
    Mutation(
        "users are deleted past the guard",
        "stores/mongo/writer.py",
        '        return sum(self._users.delete({"user_id": {"$in": part}}) for part in chunks(keys, KEYS))\n',
        '        found = [self.store.users.delete_many({"user_id": {"$in": part}}) for part in chunks(keys, KEYS)]\n'
        "        return sum(each.deleted_count for each in found)\n",
        GUARD,
    ),
    Mutation(
        "a command whose time ran out is not in doubt",
        _COMMANDS,
        "        except UnavailableError:\n            self.in_doubt = True\n            raise\n",
        "        except UnavailableError:\n            raise\n",
        GUARD,
    ),
    Mutation(
        "nothing is put back",
        _SETTLE,
        "        self._writer.put_back(found.old[key] for key in found.due(Repair.PUT_BACK))\n",
        "",
        SETTLE,
    ),
    # Repairs
    Mutation(
        "the fence is recorded after the row is written",
        _REPAIR,
        "(RepairStep.READ_STORED, RepairStep.RECORD_FENCE, RepairStep.WRITE, RepairStep.RECORD_OUTCOME)",
        "(RepairStep.READ_STORED, RepairStep.WRITE, RepairStep.RECORD_FENCE, RepairStep.RECORD_OUTCOME)",
        REPAIR_MODEL,
    ),
    Mutation(
        "the source is read before noting begins",
        _REPAIR,
        "(RepairStep.CLAIM, RepairStep.WATCH, RepairStep.READ_SOURCE)",
        "(RepairStep.CLAIM, RepairStep.READ_SOURCE, RepairStep.WATCH)",
        REPAIR_MODEL,
    ),
    Mutation(
        "a record from before the reading is applied",
        _REPAIR,
        "        return Disposition.LEAVE_OUT if included else Disposition.REQUEST_AGAIN\n",
        "        return Disposition.APPLY if included else Disposition.REQUEST_AGAIN\n",
        REPAIR,
    ),
    Mutation(
        "a user of files is removed as MySQL has no row",
        _REPAIR,
        "    if stored.is_of_files:\n",
        "    if stored.is_of_files and stored.deleted:\n",
        REPAIR_MODEL,
    ),
    Mutation(
        "a refused row keeps its fence",
        _CARRY,
        "            if (before := self._before[key]) is None:\n                del self._fences[key]\n",
        "            if (before := self._before[key]) is None:\n                pass\n",
        REPAIR,
    ),
    Mutation(
        "what a newer record told is overwritten by the reading",
        _CARRY,
        "if what is Overtaken.NO]",
        "if what is not Overtaken.UNKNOWN]",
        REPAIR,
    ),
    # How changes become segments
    Mutation(
        "what comes before a truncate comes after it too",
        "domain/coalesce.py",
        "                current, created, truncated = {}, set(), True\n",
        "                current, created, truncated = current, set(), True\n",
        HISTORIES,
    ),
    Mutation(
        "the first change of a key counts",
        "domain/coalesce.py",
        "            current[key] = change if len(user) == _WHOLE else",
        "            current[key] = current.get(key, change) if len(user) == _WHOLE else",
        HISTORIES,
    ),
)


def copied(target: Path) -> Path:
    """Copy what the tests need; return where."""
    for name in _COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target / name)
    return target


def tried(mutation: Mutation, copy: Path) -> str | None:
    """Make a mutation in a copy, run its tests there, and undo it.

    Returns:
        The first test that turned red; None where the mutation survives.

    Raises:
        AssertionError: The text is not there once, or the tests could not be run.
    """
    file = copy / "ghsync_dagster" / mutation.file
    text = file.read_text(encoding="utf-8")
    assert text.count(mutation.before) == 1, f"{mutation.file} has the text {text.count(mutation.before)} times"
    file.write_text(text.replace(mutation.before, mutation.after), encoding="utf-8")
    try:
        return _first_red(copy, f"ghsync_dagster_tests/{mutation.tests}")
    finally:
        file.write_text(text, encoding="utf-8")


def _first_red(copy: Path, tests: str) -> str | None:
    # From the copy, whose package then comes before the installed one.
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--show-capture=no", tests]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        command, cwd=copy, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS, check=False
    )
    assert done.returncode in (0, 1, 2), done.stdout[-3000:] + done.stderr[-3000:]
    red = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    assert bool(red) == bool(done.returncode), done.stdout[-3000:]
    return red[0] if red else None
