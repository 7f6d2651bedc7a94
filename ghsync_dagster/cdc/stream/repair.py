"""Repair: the owner of the partitions writes what the source says of users, between two batches.

Belongs here: carrying out ``WRITING_STEPS`` of ``domain.repair``, in the thread that applies batches. Not here: reading
the source (``cdc.stream.source_reader``), and which operations the store has (``stores.mongo.repairs``).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ghsync_dagster.cdc.stream.apply import apply
from ghsync_dagster.domain.change import Change, Op, RecordKind
from ghsync_dagster.domain.coalesce import Segment
from ghsync_dagster.domain.repair import (
    WRITING_STEPS,
    Cure,
    Fence,
    Outcome,
    Overtaken,
    RepairStep,
    StoredUser,
    cure,
    overtaken,
    resolves_letters,
)
from ghsync_dagster.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ghsync_dagster.cdc.stream.source_reader import RepairWork
    from ghsync_dagster.stores.mongo.repairs import RepairWriter

log = get_logger("repair")


def carry_out(
    store: RepairWriter, work: RepairWork, fences: dict[str, Fence], resolve: Callable[[Iterable[str]], object]
) -> Counter[Outcome]:
    """Carry out the writing steps for all users of a reading; users do not touch each other.

    Args:
        store: Where users are stored.
        work: What was read.
        fences: The fences that batches go by; those of the work are added before anything is written.
        resolve: Resolves the dead letters of users that were repaired.

    Returns:
        Users by outcome; those that stay open are left out.

    Raises:
        UnavailableError: The store went away; the requests are open still.
        RefusedError: The store refuses the writes as such.
    """
    writing = _Writing(store, work, fences, resolve)
    for step in WRITING_STEPS:
        writing.commands[step]()
    return writing.outcomes


class _Writing:
    """The writing steps of one piece of work, each a command."""

    def __init__(
        self,
        store: RepairWriter,
        work: RepairWork,
        fences: dict[str, Fence],
        resolve: Callable[[Iterable[str]], object],
    ) -> None:
        self.outcomes: Counter[Outcome] = Counter()
        self.commands: dict[RepairStep, Callable[[], None]] = {
            RepairStep.READ_STORED: self._read_stored,
            RepairStep.RECORD_FENCE: self._record_fence,
            RepairStep.WRITE: self._write,
            RepairStep.RECORD_OUTCOME: self._record_outcome,
        }
        self._store, self._work, self._fences, self._resolve = store, work, fences, resolve
        judged = {key: self._overtaken(key) for key in work.claim.requests}
        self._newer = [key for key, what in judged.items() if what is Overtaken.NEWER]
        self._keys = [key for key, what in judged.items() if what is Overtaken.NO]
        self._stored: dict[str, StoredUser] = {}
        self._cures: dict[str, Cure] = {}
        self._refused: dict[str, str] = {}
        self._before: dict[str, Fence | None] = {}

    def _overtaken(self, key: str) -> Overtaken:
        applied = self._work.claim.applied
        return overtaken(self._work.reading, applied[key]) if key in applied else Overtaken.NO

    def _read_stored(self) -> None:
        self._stored = self._store.stored_users(self._keys)

    def _record_fence(self) -> None:
        rows, reading = self._work.rows, self._work.reading
        # A user that was requested again meanwhile gets no fence, and so no write: it is claimed again.
        fenced = self._store.record_fence(self._requests(self._keys), reading, rows)
        self._keys = [key for key in self._keys if key in fenced]
        self._before = {key: self._fences.get(key) for key in self._keys}
        self._fences |= {key: Fence(reading, key in rows) for key in self._keys}

    def _write(self) -> None:
        rows = self._work.rows
        self._cures = {key: cure(self._stored[key], has_row=key in rows) for key in self._keys}
        changes = {
            key: Change(what.op, key, dict(rows[key]) if what.op is Op.UPSERT else None, RecordKind.REPAIR)
            for key, what in self._cures.items()
            if what.op is not Op.SKIP
        }
        if changes:
            found = apply(self._store.users, Segment(truncate=False, changes=changes)).refused
            self._refused = {key: f"{refused.kind}: {refused.text}" for key, refused in found.items()}

    def _record_outcome(self) -> None:
        for key in self._refused:
            # What was left out for the refused row is applied after all, as far as it can be.
            if (before := self._before[key]) is None:
                del self._fences[key]
            else:
                self._fences[key] = before
        by_outcome: dict[Outcome, list[str]] = {Outcome.OVERTAKEN: self._newer}
        for key, what in self._cures.items():
            by_outcome.setdefault(Outcome.REFUSED if key in self._refused else what.outcome, []).append(key)
        if resolves_letters(self._work.reading, self._work.claim.polled):
            self._resolve([key for key in self._cures if key not in self._refused])
        for outcome, keys in by_outcome.items():
            if keys:
                fences = {} if outcome is Outcome.OVERTAKEN else {key: self._fences.get(key) for key in keys}
                self._store.record_outcomes(self._requests(keys), outcome, fences)
                self.outcomes[outcome] += len(keys)
        if self._refused:
            log.warning("rows refused by the collection", users=len(self._refused))
            self._store.record_reasons(self._refused)

    def _requests(self, keys: Iterable[str]) -> dict[str, str]:
        return {key: self._work.claim.requests[key] for key in keys}
