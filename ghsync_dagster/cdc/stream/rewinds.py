"""Rewind requests of a group: left where a command is in doubt, carried out by whoever has the partition.

Belongs here: which requests this consumer has still to make, has found, and has carried out. Not here: going back to an
offset (``cdc.stream.consume``), and why a command may come late (``cdc.stream.write``).
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final

from ghsync_dagster.domain.errors import GhsyncError, TransientError
from ghsync_dagster.logging import get_logger
from ghsync_dagster.stores.mongo.books import Truncated

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ghsync_dagster.stores.mongo.books import GroupBook, Rewind
    from ghsync_dagster.stores.mongo.repairs import RepairRequests

REWIND_SECONDS: Final = 1.0
"""How often to look for rewind requests."""

log = get_logger("cdc")


class RewindRequests:
    """The rewind requests for the partitions of this consumer. Two threads use it: one consumes, one writes.

    Args:
        book: Where requests and the last truncate are stored.
        repairs: Where users are requested again that a late command may have overwritten after their repair.
        name: Names the group and the topic.
    """

    def __init__(self, book: GroupBook, repairs: RepairRequests, name: str) -> None:
        self._book, self._repairs, self._name = book, repairs, name
        self._lock = threading.Lock()
        self._to_request: dict[int, int] = {}
        """Offsets of partitions for which a request is still to be made."""
        self._to_repair: frozenset[str] = frozenset()
        """Users that are still to be requested again."""
        self._partitions: list[int] = []
        self._pending: dict[int, Rewind] = {}
        """Requests that were found and not yet carried out."""
        self._done: dict[int, Rewind] = {}
        """Requests that were carried out and not yet cleared."""
        self._next_at = 0.0

    # For the thread that consumes

    def pending(self, partitions: Iterable[int]) -> dict[int, Rewind]:
        """Return the requests that were found for the partitions that this consumer has now."""
        with self._lock:
            self._partitions = sorted(partitions)
            pending, self._pending = self._pending, {}
            return {partition: rewind for partition, rewind in pending.items() if partition in self._partitions}

    def carried_out(self, partition: int, rewind: Rewind) -> None:
        """Have a request cleared that was carried out."""
        with self._lock:
            self._done[partition] = rewind

    def is_any_before(self, offsets: Mapping[int, int]) -> bool:
        """Return whether any partition is to be consumed again from before its offset.

        Raises:
            UnavailableError: The store is away.
        """
        found = self._book.pending_rewinds([self._at(partition) for partition in offsets])
        stored = {partition: found[name].offset for partition in offsets if (name := self._at(partition)) in found}
        with self._lock:
            earliest = _earliest(stored, self._to_request)
        return any(offset < offsets.get(partition, 0) for partition, offset in earliest.items())

    def record_truncate(self, partition: int, offset: int, stops: Mapping[int, int]) -> None:
        """Record a truncate that is about to be applied, and the first offset after it in the other partitions.

        Raises:
            UnavailableError: The store is away.
        """
        self._book.keep_truncate(self._name, Truncated(partition, offset, dict(stops)))

    def repeat_truncate(self, partition: int, offset: int) -> None:
        """Request the last truncate again where it came after the offset to which a partition is rewound.

        Raises:
            UnavailableError: The store is away.
        """
        last = self._book.last_truncate(self._name)
        if last is not None and last.partition != partition and offset < last.stops.get(partition, 0):
            self._book.request_rewind({self._at(last.partition): last.offset})

    # For both threads

    def request(self, starts: Mapping[int, int], users: Iterable[str]) -> None:
        """Have partitions consumed again, and repaired users read again. What fails now is retried later.

        Args:
            starts: From which offset on, by partition.
            users: Users that a late command may overwrite.
        """
        with self._lock:
            self._to_request = _earliest(starts, self._to_request)
            self._to_repair |= frozenset(users)
        try:
            self.make_requests()
        except GhsyncError as error:
            log.warning("rewind not requested yet; retrying", offsets=dict(starts), reason=error.message)

    def make_requests(self) -> None:
        """Make the requests that are still to be made.

        Raises:
            UnavailableError: The store is away.
            RefusedError: The store refuses.
        """
        with self._lock:
            offsets, users = dict(self._to_request), self._to_repair
        if offsets:
            self._request_rewinds(offsets)
        if users:
            # Users that were never repaired are corrected by the records that come again.
            self._repairs.request_fenced(users)
            with self._lock:
                # Where the other thread added users meanwhile, all of them are requested once more.
                if self._to_repair is users:
                    self._to_repair = frozenset()

    def _request_rewinds(self, offsets: Mapping[int, int]) -> None:
        try:
            self._book.request_rewind({self._at(partition): offset for partition, offset in offsets.items()})
        except GhsyncError as error:
            named = ", ".join(f"partition {partition} from offset {offset}" for partition, offset in offsets.items())
            raise type(error)(
                f"{self._name}: {named} is to be applied again, since a command to the store may have come late, and "
                f"the rewind can't be requested: {error.message}",
                way_out="Set the group back to them where it is beyond, before another consumer runs; see "
                "docs/operate/runbook.md.",
            ) from error
        log.warning("rewind requested: a command may have come late", offsets=dict(offsets))
        with self._lock:
            self._to_request = {p: offset for p, offset in self._to_request.items() if offsets.get(p) != offset}

    @property
    def is_unfinished(self) -> bool:
        """Whether any request is still to be made."""
        with self._lock:
            return bool(self._to_request or self._to_repair)

    # For the thread that writes

    def synchronize(self, *, closing: bool) -> None:
        """Make requests, clear those that were carried out, and look for new ones; once a second, or when closing."""
        if not closing and time.monotonic() < self._next_at:
            return
        self._next_at = time.monotonic() + REWIND_SECONDS
        with self._lock:
            done, self._done = self._done, {}
            partitions = self._partitions
        try:
            self.make_requests()
            for partition, rewind in done.items():
                self._book.clear_rewind(self._at(partition), rewind)
            if partitions and not closing:
                stored = self._book.pending_rewinds([self._at(partition) for partition in partitions])
                found = {p: stored[self._at(p)] for p in partitions if self._at(p) in stored}
                with self._lock:
                    self._pending = {p: rewind for p, rewind in found.items() if self._done.get(p) != rewind}
        except TransientError:
            with self._lock:
                self._done = done | self._done

    def _at(self, partition: int) -> str:
        return f"{self._name}/{partition}"


def _earliest(one: Mapping[int, int], other: Mapping[int, int]) -> dict[int, int]:
    """Return the earlier offset of each partition."""
    return {partition: min(one.get(partition, offset), offset) for partition, offset in {**one, **other}.items()}
