"""The end of a run that is to end once the group has applied all that the topic held at the start."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ghsync_dagster.cdc.stream.group import GroupOffsets
    from ghsync_dagster.cdc.stream.in_flight import InFlight
    from ghsync_dagster.cdc.stream.rewinds import RewindRequests
    from ghsync_dagster.cdc.stream.source_reader import SourceReader
    from ghsync_dagster.stores.kafka.consumer import TopicConsumer

_CHECK_SECONDS: Final = 0.5


class EndOfTopic:
    """Where the topic ended at the start, and whether the group has applied everything up to there.

    Args:
        consumer: The member of the group.
        offsets: The committed offsets of its partitions.
        in_flight: The work of its writer.
        rewinds: The rewind requests for the group.
        reader: Reads users that are to be repaired, if this consumer can.
    """

    def __init__(
        self,
        consumer: TopicConsumer,
        offsets: GroupOffsets,
        in_flight: InFlight,
        rewinds: RewindRequests,
        reader: SourceReader | None,
    ) -> None:
        self._consumer, self._offsets, self._in_flight = consumer, offsets, in_flight
        self._rewinds, self._reader = rewinds, reader
        self._next_at = 0.0

    def is_reached(self, ends: Mapping[int, int]) -> bool:
        """Return whether the group has applied everything up to ``ends``, whichever of its consumers did.

        Call it while nothing that was polled waits to be acknowledged.
        """
        if time.monotonic() < self._next_at:
            return False
        # A batch that failed is at work no more; the writer records the failure first.
        self._in_flight.raise_failure()
        self._next_at = time.monotonic() + _CHECK_SECONDS
        committed = self._consumer.committed(ends)
        # The last thing in a partition may be no record, such as the mark of a transaction.
        met = {
            partition: end
            for partition, end in self._consumer.eof_offsets.items()
            if end >= ends.get(partition, end + 1) and (committed[partition] or 0) < end
        }
        if met:
            self._offsets.commit(met)
        applied = {partition: met.get(partition) or committed[partition] or 0 for partition in ends}
        if any(applied[partition] < end for partition, end in ends.items()) or self._rewinds.is_any_before(applied):
            return False
        # Another consumer may have carried a rewind out, and cleared it, since the offsets were read.
        now = self._consumer.committed(ends)
        is_applied = all((now[partition] or 0) >= end for partition, end in ends.items())
        # What was left out of the last records may have requested users again.
        return is_applied and not (self._reader is not None and self._reader.has_requests())
