"""What a batch may apply of users that were repaired: nothing that a reading of the source includes.

Belongs here: the fences that this consumer knows, and which records of a batch they leave out. Not here: the decision
about one record, which is ``domain.repair``'s.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ghsync_dagster.domain.change import Change, Op, RecordKind
from ghsync_dagster.domain.repair import Disposition, Fence, disposition

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ghsync_dagster.cdc.stream.batch import Batch


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Which records of a batch are not applied as they are, since their users were read later in the binlog.

    Attributes:
        records: Indexes of the records that are not applied.
        deletes: Indexes of the records that are applied as deletes.
        request_again: Users that have a record which cannot be compared with their fence.
        keep: The users that a truncate does not remove, by the index of the truncate.
    """

    records: frozenset[int] = frozenset()
    deletes: frozenset[int] = frozenset()
    request_again: frozenset[str] = frozenset()
    keep: Mapping[int, frozenset[str]] = field(default_factory=dict)


_NOTHING: Final = LeftOut()


def left_out(batch: Batch, fences: Mapping[str, Fence]) -> LeftOut:
    """Decide which records of a batch are left out.

    Args:
        batch: Records in the order of their partitions.
        fences: The fence of each user that was repaired.
    """
    if not fences or (batch.first_truncate() is None and fences.keys().isdisjoint(batch.keys)):
        return _NOTHING
    records: set[int] = set()
    deletes: set[int] = set()
    request_again: set[str] = set()
    keep: dict[int, frozenset[str]] = {}
    last: dict[str, Disposition] = {}
    for at, change in enumerate(batch.changes):
        if type(change) is not Change:
            continue
        if change.op is Op.TRUNCATE:
            found = {key: _disposition(fence, change) for key, fence in fences.items()}
            keep[at] = frozenset(key for key, each in found.items() if each.is_left_out)
            request_again.update(key for key, each in found.items() if each.requests_again)
        elif (key := change.key) is not None and (fence := fences.get(key)) is not None:
            # A tombstone has no position of its own: it belongs to the delete before it.
            is_of_delete = change.kind is RecordKind.TOMBSTONE and key in last
            decided = last[key] if is_of_delete else _disposition(fence, change)
            last[key] = decided
            if decided.is_left_out:
                records.add(at)
            if decided.deletes:
                deletes.add(at)
            if decided.requests_again:
                request_again.add(key)
    return LeftOut(frozenset(records), frozenset(deletes), frozenset(request_again), keep)


def _disposition(fence: Fence, change: Change) -> Disposition:
    return disposition(fence, change.op, change.position, change.committed_ms)


class RepairFences:
    """The fence of each user that was repaired, read once for the partitions that this consumer has.

    Args:
        read: Reads all fences.
    """

    def __init__(self, read: Callable[[], dict[str, Fence]]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._found: dict[str, Fence] | None = None
        """None until they are read."""
        self._assignments = 0

    def forget(self) -> None:
        """Have the fences read again: another consumer may have repaired users of partitions that came."""
        with self._lock:
            self._found, self._assignments = None, self._assignments + 1

    def current(self) -> dict[str, Fence]:
        """Return the fences; the thread that writes adds to them.

        Raises:
            UnavailableError: The store is away.
        """
        while True:
            with self._lock:
                fences, assignments = self._found, self._assignments
            if fences is not None:
                return fences
            found = self._read()
            with self._lock:
                # Partitions that came meanwhile may bring users that another consumer has repaired since.
                if assignments == self._assignments:
                    self._found = found
