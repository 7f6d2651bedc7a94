"""What is in flight: the batch or repair that the writer has, from submitting to acknowledging it.

Belongs here: submitting, committing what is written, and finishing before partitions go. Not here: what makes a batch
(``cdc.stream.polled``), and writing it (``cdc.stream.write``).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from ghsync_dagster.cdc.stream.batch import Batch
from ghsync_dagster.cdc.stream.listener import KAFKA
from ghsync_dagster.domain.errors import GhsyncError
from ghsync_dagster.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Collection

    from ghsync_dagster.cdc.stream.group import GroupOffsets
    from ghsync_dagster.cdc.stream.listener import ChangeListener
    from ghsync_dagster.cdc.stream.source_reader import SourceReader
    from ghsync_dagster.cdc.stream.write import Writer
    from ghsync_dagster.cdc.stream.written import Written

_PACE_SECONDS: Final = 0.05
"""How soon after a batch the next one may follow: a batch of few changes costs nearly what one of fifty does."""
_GIVE_UP_SECONDS: Final = 5.0
"""How long a batch at work may still take when its partitions are revoked."""

log = get_logger("cdc")


class InFlight:
    """The work of the writer, as the consuming thread sees it.

    Args:
        writer: Carries the work out.
        offsets: Where it is committed.
        listener: Hears of each batch that is acknowledged.
    """

    def __init__(self, writer: Writer, offsets: GroupOffsets, listener: ChangeListener) -> None:
        self.batch = Batch()
        """The batch that was submitted last; empty while users are repaired."""
        self.was_repair = False
        """Whether users were repaired last, so that it is a batch's turn."""
        self.next_batch_at = 0.0
        """When the next batch may follow, by ``time.monotonic``."""
        self._writer, self._offsets, self._listener = writer, offsets, listener
        self._starts: dict[int, int] = {}
        """Where the work starts in each partition: to commit that changes nothing."""
        self._written: Written | None = None
        """A batch that is written and not yet committed."""

    @property
    def is_writing(self) -> bool:
        """Whether a batch that was submitted is not acknowledged yet."""
        return self._writer.at_work or self._writer.has_written or self._written is not None

    def submit(self, batch: Batch) -> None:
        """Have a batch written, where nothing is in flight."""
        self.was_repair = False
        self.batch, self._starts = batch, batch.starts
        self.next_batch_at = time.monotonic() + _PACE_SECONDS
        self.renew_fence()
        self._writer.submit(batch)

    def submit_repair(self, reader: SourceReader) -> None:
        """Have users of one reading repaired, where nothing is in flight."""
        self.was_repair = True
        self.batch = Batch()
        self._starts = self._offsets.current()
        self.renew_fence()
        # Last, since work that is handed out has to be carried out.
        if (work := reader.next_work()) is not None:
            self._writer.submit(work)

    def wait(self, seconds: float) -> bool:
        """Wait until the writer has nothing at work, at most so long; return whether that is so."""
        return self._writer.wait(seconds)

    def renew_fence(self) -> None:
        """Have the group confirm now and then that this consumer is in it, for the work to go on."""
        self._offsets.renew_fence(self._starts)

    def acknowledge(self) -> None:
        """Commit the batch that is written, if there is one, and report it; else keep the fence for the writer."""
        self._written = self._written or self._writer.pop_written()
        if (written := self._written) is not None:
            self._offsets.commit(written.batch.offsets)
            self._written = None
            for kind, count in written.kinds.items():
                self._listener.dead_letter(kind, count)
            self._listener.connection(KAFKA, up=True)
            self._listener.batch_applied(written.report())
        elif self._writer.at_work:
            self.renew_fence()

    def raise_failure(self) -> None:
        """Raise what ended the writer's work permanently, if anything did."""
        if self._writer.failure is not None:
            raise self._writer.failure

    def release(self, partitions: Collection[int], *, lost: bool) -> bool:
        """Finish what is in flight, or stop it, before partitions go.

        Args:
            partitions: The partitions that go.
            lost: Whether they may be another consumer's already, so that nothing of them is committed.

        Returns:
            Whether nothing of them was given up: a batch that was is to be applied again.
        """
        is_repair = self._writer.at_work and not len(self.batch)
        if not is_repair and self.batch.offsets.keys().isdisjoint(partitions):
            return True
        return self._finish(lost=lost)

    def _finish(self, *, lost: bool) -> bool:
        if not self.is_writing:
            return True
        in_time = self._writer.wait(0 if lost or self._writer.fault is not None else _GIVE_UP_SECONDS)
        if not in_time:
            self._writer.stop_batch()
            if not self._writer.wait(self._offsets.fence.session_seconds + _GIVE_UP_SECONDS):
                log.error("store does not answer; a command may still arrive")
        if in_time and not lost:
            try:
                self.acknowledge()
            except GhsyncError as error:
                log.warning("commit failed after the batch was written", reason=error.message)
        finished = in_time and not self.is_writing
        if (written := self._written or self._writer.pop_written()) is not None:
            self._writer.give_up(written)
        self._written = None
        return finished
