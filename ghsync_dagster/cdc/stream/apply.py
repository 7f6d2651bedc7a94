"""Apply: the last state of every key reaches MongoDB by the step tables of ``domain.precedence``.

Belongs here: which command carries out which step, for many keys at once. Not here: the order of the steps, which is in
the tables; where changes come from; what becomes of those that the database refuses.

Keys are independent of each other, so each step is executed for all keys before the next one. After any error the whole
segment is to be applied again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ghsync_dagster.domain.precedence import DELETE_STEPS, GOES_BACK, UPSERT_STEPS, StreamStep

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence, Set

    from ghsync_dagster.domain.coalesce import Segment
    from ghsync_dagster.stores.mongo.writer import Refused, UserWriter


@dataclass(slots=True)
class Applied:
    """The result of applying a segment.

    Attributes:
        upserts: Users written.
        deletes: Keys deleted, stored before or not.
        truncated: Documents that a truncate removed.
        repeated: Upserts written again, because a load had come between.
        refused: Why the database refused a key's state, by key. The stored document of that key is unchanged.
    """

    upserts: int = 0
    deletes: int = 0
    truncated: int = 0
    repeated: int = 0
    refused: dict[str, Refused] = field(default_factory=dict)


def apply(writer: UserWriter, segment: Segment, keep: Set[str] = frozenset()) -> Applied:
    """Apply one segment: the truncate, then one operation a key.

    Args:
        writer: Writes users, under the guard of whoever applies.
        segment: What is to be applied.
        keep: Users that the truncate does not remove.

    Raises:
        UnavailableError: MongoDB went away: apply the segment again.
        RefusedError: MongoDB refuses the writes as such.
    """
    applied = Applied()
    applying = _Applying(writer, segment, applied)
    if segment.truncate:
        # A user whose version entry is stored counts too: the load that is about to insert it finds the deletion.
        for keys in writer.everyone(keep):
            applying.take(DELETE_STEPS, keys)
        applied.truncated = applying.removed + writer.remove_nameless()
    upserts = [key for key, change in segment.changes.items() if change.user is not None]
    deletes = [key for key, change in segment.changes.items() if change.user is None]
    applying.take(DELETE_STEPS, deletes)
    applying.take(UPSERT_STEPS, upserts)
    applied.upserts = len(upserts) - len(applied.refused)
    applied.deletes = len(deletes)
    return applied


class _Applying:
    """Takes the steps of tables for many keys; the store has one command a step."""

    def __init__(self, writer: UserWriter, segment: Segment, applied: Applied) -> None:
        self.removed = 0
        self._writer, self._segment, self._applied = writer, segment, applied
        self._commands = {
            StreamStep.RECORD_DELETED: writer.record_deleted,
            StreamStep.DROP_VERSION: writer.drop_versions,
            StreamStep.WRITE_DOCUMENT: self._write,
            StreamStep.REMOVE_DOCUMENT: self._remove,
            StreamStep.DROP_VERSION_AGAIN: writer.drop_versions,
            StreamStep.FORGET_DELETED: writer.forget_deleted,
        }

    def take(self, steps: Sequence[StreamStep], keys: Collection[str]) -> None:
        """Take each step for all keys that the database does not refuse; those that must repeat steps do so first."""
        for at, step in enumerate(steps):
            if not keys:
                break
            found = self._commands[step](keys)
            if found and step in GOES_BACK:
                self._applied.repeated += len(found)
                self.take(steps[steps.index(GOES_BACK[step]) : at + 1], found)
            if self._applied.refused:
                keys = [key for key in keys if key not in self._applied.refused]

    def _write(self, keys: Collection[str]) -> None:
        users = {key: user for key in keys if (user := self._segment.changes[key].user) is not None}
        self._applied.refused |= self._writer.upsert(users, created=self._segment.created)

    def _remove(self, keys: Collection[str]) -> None:
        self.removed += self._writer.remove(keys)
