"""The outcome of each record of a batch that is written.

Belongs here: the counts, and the report of them. Not here: writing (``cdc.stream.apply_batch``).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from ghsync_dagster.cdc.dead_letters.record import dead_letter
from ghsync_dagster.cdc.stream.listener import APPLIED, COALESCED, DEAD_LETTER, LEFT_OUT, SKIPPED, AppliedBatch
from ghsync_dagster.domain.change import Change, Op

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ghsync_dagster.cdc.stream.batch import Batch

_UNDECODABLE: Final = "undecodable"
"""What stands for ``Change.kind`` in the counts of records that can't be decoded."""


class Written:
    """A batch that is written, and the outcomes of its records.

    Attributes:
        batch: The batch.
        letters: The dead letters among its records.
        applied: Records that were applied, by their kind.
        refused: Records that the database refused, likewise.
        left_out: Records whose users were read later in the binlog, likewise.
        broken_rules: Applied records that break a rule, by rule.
        seconds: How long the store took.
        acknowledged_ms: When the store had all, in milliseconds since 1970 UTC.
        in_doubt: Whether a command may still reach the store, or reached it after its time.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.letters = [dead_letter(message, error.kind, error.message) for message, error in batch.undecodable()]
        self.applied: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.broken_rules: Counter[str] = Counter()
        self.seconds = 0.0
        self.acknowledged_ms = 0
        self.in_doubt = False

    @property
    def kinds(self) -> Counter[str]:
        """How many dead letters there are of each kind."""
        return Counter(letter.kind for letter in self.letters)

    def report(self) -> AppliedBatch:
        """Return the report for listeners, once the offsets are committed."""
        from ghsync_dagster.stores.kafka.topics import timestamp_ms

        good = [change for change in self.batch.changes if type(change) is Change]
        return AppliedBatch(
            counts=self._counts(good),
            acknowledged_ms=self.acknowledged_ms,
            committed_ms=[change.committed_ms for change in good],
            appended_ms=[timestamp_ms(message) for message in self.batch.messages],
            write_seconds=self.seconds,
            broken_rules=self.broken_rules,
            unknown_columns=Counter(
                [name for change in good if change.unknown_columns for name in change.unknown_columns]
            ),
        )

    def _counts(self, good: Sequence[Change]) -> dict[tuple[str, str], int]:
        skipped = Counter([change.kind for change in good if change.op is Op.SKIP])
        counts: dict[tuple[str, str], int] = {(kind, SKIPPED): count for kind, count in skipped.items()}
        for kind, count in self.batch.kinds.items():
            applied, refused, left_out = self.applied[kind], self.refused[kind], self.left_out[kind]
            counts |= {(kind, APPLIED): applied, (kind, DEAD_LETTER): refused, (kind, LEFT_OUT): left_out}
            counts[kind, COALESCED] = count - applied - refused - left_out - skipped[kind]
        counts[_UNDECODABLE, DEAD_LETTER] = len(self.batch) - len(good)
        return {key: count for key, count in counts.items() if count}
