"""Settle: end a load, the present or a dead one, so that nothing is left marked and nothing is half done.

Belongs here: which command executes which step of SETTLE_STEPS, over all keys of a load. Not here: the order of the
steps and the decision between them, which are ``domain.precedence``'s.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Final

from ghsync_dagster.chunks import chunks
from ghsync_dagster.domain.precedence import OF_EACH_KEY, Found, LoadState, Repair, SettleStep, settle, steps_left
from ghsync_dagster.domain.user import MARKER_FIELD
from ghsync_dagster.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence, Set

    from ghsync_dagster.stores.mongo.commands import Document
    from ghsync_dagster.stores.mongo.writer import UserWriter

_DONE_TO_A_KEY: Final = [repair for repair in Repair if repair is not Repair.NOTHING]

log = get_logger("settle")


def recover(writer: UserWriter) -> dict[str, int]:
    """Settle what earlier loads left unfinished.

    Returns:
        How many keys were settled, by kind of repair; empty if nothing was left.
    """
    settled: Counter[str] = Counter()
    store = writer.store
    for record in store.unfinished_loads():
        log.warning("settling unfinished load", load=record["_id"], state=record["state"])
        settling = _Settling(writer, record["_id"])
        settling.execute(steps_left(LoadState(record["state"])))
        settled += settling.repaired
        settled["unmarked"] += settling.unmarked
    if store.count_marked():
        settled += _settle_strays(writer)
    # Empty, except for what a holder wrote after it had lost its lease.
    writer.clear_undo()
    return dict(+settled)


def _settle_strays(writer: UserWriter) -> Counter[str]:
    """Settle markers that belong to no unfinished load: the users stay, except those that the stream deleted.

    A dead load's executors may have written them after the load was settled, or another program marked them.
    """
    store, removed = writer.store, 0
    for keys in chunks(user["user_id"] for user in store.marked()):
        deleted = store.deleted_among(keys)
        owned = store.versions_by_id(sorted(deleted))
        removed += writer.delete_marked(deleted - owned.keys())
    return Counter({Repair.REMOVE.value: removed, "unmarked": writer.unmark_all()})


def settle_load(
    writer: UserWriter,
    load_id: str,
    *,
    expected_marked: int | None,
    on_step: Callable[[SettleStep], None],
) -> int:
    """End a verified load: compare with the stream, make versions final, remove the marker.

    Args:
        writer: Writes under the load's lease.
        load_id: The load.
        expected_marked: How many documents carry the marker if nobody wrote one since; None: check each.
        on_step: Called after each step that is executed once a load.

    Returns:
        From how many documents the marker was removed.
    """
    store, steps = writer.store, steps_left(LoadState.RUNNING)
    # If all inserts are still marked and no deletion is recorded, the stream wrote none of them: all are kept.
    if expected_marked is not None and store.count_marked() == expected_marked and not store.any_deleted():
        steps = tuple(step for step in steps if step not in OF_EACH_KEY)
    settling = _Settling(writer, load_id, on_step)
    settling.execute(steps)
    return settling.unmarked


@dataclass
class _Keys:
    """Some keys of a load, all of them marked or all of them not, and what is found of them."""

    marked: bool
    keys: Sequence[str]
    old: dict[str, Document] = field(default_factory=dict)
    versioned: Set[str] = frozenset()
    deleted: Set[str] = frozenset()

    def due(self, *repairs: Repair) -> list[str]:
        """Return the keys that need one of these repairs."""
        return [key for key in self.keys if self.repair(key) in repairs]

    def repair(self, key: str) -> Repair:
        """Return the repair of a key."""
        found = Found(self.marked, key in self.old, key in self.versioned, key in self.deleted)
        return settle(LoadState.RUNNING, found)


class _Settling:
    """Executes the steps that settle one load."""

    def __init__(
        self,
        writer: UserWriter,
        load_id: str,
        on_step: Callable[[SettleStep], None] = lambda _: None,
    ) -> None:
        self.repaired: Counter[str] = Counter()
        self.unmarked = 0
        self._writer, self._store, self._load_id, self._on_step = writer, writer.store, load_id, on_step
        self._of_keys: dict[SettleStep, Callable[[_Keys], None]] = {
            SettleStep.FIND_VERSION: self._find_version,
            SettleStep.FIND_DELETED: self._find_deleted,
            SettleStep.REPAIR_DOCUMENT: self._repair_document,
            SettleStep.REPAIR_VERSION: self._repair_version,
        }
        self._of_load: dict[SettleStep, Callable[[], None]] = {
            SettleStep.RECORD_CHECKED: lambda: self._record(LoadState.CHECKED),
            SettleStep.UNMARK: self._unmark,
            SettleStep.FORGET_OLD: writer.clear_undo,
            SettleStep.RECORD_DONE: lambda: self._record(LoadState.DONE),
        }

    def execute(self, steps: Sequence[SettleStep]) -> None:
        """Execute steps: those of each key for some keys at a time, the others for all keys at once."""
        for is_of_each_key, some in groupby(steps, OF_EACH_KEY.__contains__):
            if is_of_each_key:
                self._settle_keys(tuple(some))
                continue
            for step in some:
                self._of_load[step]()
                self._on_step(step)

    def _settle_keys(self, steps: Sequence[SettleStep]) -> None:
        first, *others = steps
        for found in {SettleStep.FIND_MARKED: self._find_marked}[first]():
            for step in others:
                self._of_keys[step](found)
            self.repaired.update(found.repair(key).value for key in found.due(*_DONE_TO_A_KEY))

    def _find_marked(self) -> Iterator[_Keys]:
        """Yield all keys on which the load may have left something: marked ones, then those with only its entry."""
        for keys in chunks(user["user_id"] for user in self._store.marked()):
            yield _Keys(marked=True, keys=keys, old=self._store.undo_by_id(keys))
        for keys in chunks(self._store.versions_of_load(self._load_id)):
            documents = self._store.users_by_id(keys)
            overtaken = [key for key in keys if MARKER_FIELD not in documents.get(key, {})]
            if overtaken:
                yield _Keys(marked=False, keys=overtaken)

    def _find_version(self, found: _Keys) -> None:
        entries = self._store.versions_by_id(found.keys)
        found.versioned = {key for key, entry in entries.items() if entry.load == self._load_id}

    def _find_deleted(self, found: _Keys) -> None:
        found.deleted = self._store.deleted_among(found.keys)

    def _repair_document(self, found: _Keys) -> None:
        self._writer.put_back(found.old[key] for key in found.due(Repair.PUT_BACK))
        self._writer.delete_marked(found.due(Repair.REMOVE))

    def _repair_version(self, found: _Keys) -> None:
        due = found.due(Repair.REMOVE, Repair.DROP_VERSION)
        self._writer.drop_versions([key for key in due if key in found.versioned])

    def _record(self, state: LoadState) -> None:
        self._writer.record_load(self._load_id, state=state.value, unmarked=self.unmarked)

    def _unmark(self) -> None:
        self.unmarked = self._writer.unmark_all()
