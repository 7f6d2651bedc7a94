"""Apply a batch: its segments in order, refused keys record by record, and what repaired users leave out of it.

Belongs here: one try of a batch against MongoDB. Not here: trying again and the dead letters (``cdc.stream.write``),
and the steps of a segment (``cdc.stream.apply``).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from ghsync_dagster.cdc.dead_letters.record import dead_letter
from ghsync_dagster.cdc.stream.apply import apply
from ghsync_dagster.cdc.stream.fences import left_out
from ghsync_dagster.cdc.stream.listener import MONGO
from ghsync_dagster.cdc.stream.written import Written
from ghsync_dagster.domain.change import Change, RecordKind
from ghsync_dagster.domain.coalesce import Segment
from ghsync_dagster.domain.user import broken_rule_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ghsync_dagster.cdc.stream.batch import Batch, Part
    from ghsync_dagster.cdc.stream.fences import RepairFences
    from ghsync_dagster.cdc.stream.letters import DeadLetters
    from ghsync_dagster.cdc.stream.listener import ChangeListener
    from ghsync_dagster.cdc.stream.source_reader import SourceReader
    from ghsync_dagster.domain.user import RuleTest
    from ghsync_dagster.stores.mongo.repairs import RepairWriter

_MEASURED_OPERATIONS: Final = 200
"""How many operations show how many the store takes a second."""
_FIRST_RATE: Final = 2_000.0
"""Operations a second that are assumed of a store before the first batch: a slow disk's."""


class BatchApplier:
    """Applies batches, and measures how fast the store takes them.

    Args:
        repairs: Writes users and what is known of their repairs, under the writer's guard.
        fences: The fences of users that were repaired.
        letters: Names the users of refused records.
        listener: Hears that MongoDB answers.
        rules: Rules whose breaking is counted.
        reader: Reads users that are to be repaired, if this consumer can.
    """

    def __init__(
        self,
        repairs: RepairWriter,
        fences: RepairFences,
        letters: DeadLetters,
        listener: ChangeListener,
        rules: Sequence[RuleTest],
        reader: SourceReader | None,
    ) -> None:
        self.rate = _FIRST_RATE
        """Operations that the store takes a second."""
        self._repairs, self._fences, self._letters, self._listener = repairs, fences, letters, listener
        self._rules, self._reader = rules, reader

    def apply(self, batch: Batch) -> Written:
        """Apply a batch from its start: a try that failed may have got anywhere."""
        started = time.monotonic()
        written = Written(batch)
        operations = 0
        left = left_out(batch, self._fences.current())
        batch.left_out, batch.as_deletes = left.records, left.deletes
        written.left_out.update([change.kind for at in left.records if isinstance(change := batch.changes[at], Change)])
        if self._reader is not None:
            self._reader.record_applied(batch, left)
            # So far these are the records that cannot be decoded.
            for letter in written.letters:
                self._reader.record_refused(self._letters.user_of(letter))
        for part in batch.parts():
            applied = apply(self._repairs.users, part.segment, left.keep.get(part.start, frozenset()))
            operations += applied.upserts + applied.deletes + applied.truncated
            written.applied.update([change.kind for change in part.segment.changes.values()])
            if part.segment.truncate:
                written.applied[RecordKind.TRUNCATE] += 1
            for key in applied.refused:
                self._apply_each(written, part, key)
            if self._rules:
                for change in part.segment.changes.values():
                    if change.user is not None:
                        written.broken_rules.update(broken_rule_names(change.user, self._rules))
        if left.request_again:
            self._repairs.request_again(left.request_again)
        written.seconds = time.monotonic() - started
        written.acknowledged_ms = time.time_ns() // 1_000_000
        if operations:
            self._listener.connection(MONGO, up=True)
        # Of few operations the time goes into round trips, which shows nothing of many.
        if operations >= _MEASURED_OPERATIONS:
            self.rate += (operations / written.seconds - self.rate) / 2
        return written

    def _apply_each(self, written: Written, part: Part, key: str) -> None:
        """Apply the records of one key one by one, since its last state was refused: the others may be good."""
        written.applied[part.segment.changes[key].kind] -= 1
        for message, change in written.batch.history(part, key):
            refused = apply(self._repairs.users, Segment(truncate=False, changes={key: change})).refused
            if key in refused:
                if self._reader is not None:
                    self._reader.record_refused(key)
                written.letters.append(dead_letter(message, *refused[key]))
                written.refused[change.kind] += 1
            else:
                written.applied[change.kind] += 1
