"""What the change consumer reports of its work, batch by batch, never record by record.

Belongs here: the one interface between the loop and its observers. Not here: what they do; ``cdc.health.metrics`` is
the listener that measures. Every method is called from the loop's own threads, must return quickly and must not raise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

APPLIED: Final = "applied"
"""Written and acknowledged by the store."""
COALESCED: Final = "coalesced"
"""A later record of the same batch has the newer state of its key, so this one needs no write."""
SKIPPED: Final = "skipped"
"""No change of a user: a heartbeat, a schema change, a transaction marker."""
DEAD_LETTER: Final = "dead_letter"
"""Refused alone, and kept with the dead letters."""
LEFT_OUT: Final = "left_out"
"""Not applied, since its user was read later in the binlog by a repair."""
OUTCOMES: Final = (APPLIED, COALESCED, SKIPPED, DEAD_LETTER, LEFT_OUT)

MONGO: Final = "mongo"
KAFKA: Final = "kafka"
CONNECT: Final = "connect"


@dataclass(frozen=True, slots=True)
class AppliedBatch:
    """One batch that is written and acknowledged, its dead letters flushed.

    Attributes:
        counts: Records by ``(kind, outcome)``: a ``RecordKind`` (``c``, ``tombstone`` ...) and one of ``OUTCOMES``.
        acknowledged_ms: When the store had acknowledged the batch, in ms since the epoch.
        committed_ms: When the database committed each record (``source.ts_ms``), in ms since the epoch; a record
            without such a time gives None, or is left out.
        appended_ms: The Kafka timestamp of each record, in ms since the epoch; None where there is none.
        write_seconds: How long the write took.
        broken_rules: Applied records that break a business rule, by the rule's name.
        unknown_columns: Records that had columns that no user has, by column.
    """

    counts: Mapping[tuple[str, str], int]
    acknowledged_ms: int
    committed_ms: Iterable[int | None] = ()
    appended_ms: Iterable[int | None] = ()
    write_seconds: float = 0.0
    broken_rules: Mapping[str, int] = field(default_factory=dict)
    unknown_columns: Mapping[str, int] = field(default_factory=dict)


class ChangeListener:
    """Observes the loop. Derive from it, and implement only the methods that matter."""

    def batch_applied(self, batch: AppliedBatch) -> None:
        """A batch is written and acknowledged."""

    def lag(self, partition: int, records: int, seconds: float) -> None:
        """Report how far a partition lags.

        Args:
            partition: Its number.
            records: Between what is applied and the end of the partition.
            seconds: How long ago the oldest record that waits was appended; 0 where none waits.
        """

    def assigned(self, partitions: Collection[int]) -> None:
        """All partitions that this consumer has from now on; what is known of others is to be dropped."""

    def retried(self, kind: str) -> None:
        """A transient fault: the step is tried again. ``kind`` is the error's class, such as ``UnavailableError``."""

    def failed(self, kind: str) -> None:
        """An error ends the loop. ``kind`` is the error's class."""

    def dead_letter(self, kind: str, count: int = 1) -> None:
        """Records went to the dead letters. ``kind`` is the slug of the reason, such as ``not-json``."""

    def repaired(self, outcome: str, count: int = 1) -> None:
        """Users were repaired. ``outcome`` is one of ``domain.repair.Outcome``."""

    def connection(self, name: str, *, up: bool) -> None:
        """A server answers (``up``) or does not. ``name`` is ``MONGO`` or ``KAFKA``; it may be reported repeatedly."""


class SilentListener(ChangeListener):
    """Ignores everything."""


class Listeners(ChangeListener):
    """Passes each report on to several listeners, in order."""

    def __init__(self, *listeners: ChangeListener) -> None:
        self._listeners = listeners

    def batch_applied(self, batch: AppliedBatch) -> None:
        """Pass on a batch."""
        for listener in self._listeners:
            listener.batch_applied(batch)

    def lag(self, partition: int, records: int, seconds: float) -> None:
        """Pass on a lag."""
        for listener in self._listeners:
            listener.lag(partition, records, seconds)

    def assigned(self, partitions: Collection[int]) -> None:
        """Pass on an assignment."""
        for listener in self._listeners:
            listener.assigned(partitions)

    def retried(self, kind: str) -> None:
        """Pass on a retry."""
        for listener in self._listeners:
            listener.retried(kind)

    def failed(self, kind: str) -> None:
        """Pass on the error that ends the loop."""
        for listener in self._listeners:
            listener.failed(kind)

    def dead_letter(self, kind: str, count: int = 1) -> None:
        """Pass on dead letters."""
        for listener in self._listeners:
            listener.dead_letter(kind, count)

    def repaired(self, outcome: str, count: int = 1) -> None:
        """Pass on repaired users."""
        for listener in self._listeners:
            listener.repaired(outcome, count)

    def connection(self, name: str, *, up: bool) -> None:
        """Pass on a server's state."""
        for listener in self._listeners:
            listener.connection(name, up=up)
