"""Apply: the last state of every key reaches MongoDB by the steps that ``domain.precedence`` proves.

Belongs here: the order of the steps for many keys at once. Not here: where changes come from, and what becomes of
those that the database refuses.

For each upsert: UPSERT_STEPS, for each delete: DELETE_STEPS. Keys don't touch each other, so a step is taken for all
keys before the next one. After any error the whole segment is to be applied again.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ghsync_dagster.domain.change import Op

if TYPE_CHECKING:
    from ghsync_dagster.domain.coalesce import Segment
    from ghsync_dagster.stores.stream import Refused, StreamStore


@dataclass(slots=True)
class Applied:
    """What applying a segment came to.

    Attributes:
        upserts: Users written.
        deletes: Keys deleted, stored before or not.
        truncated: Documents that a truncate removed.
        repeated: Upserts written again, because a load had come between.
        refused: Why the database refused a key's state, by key. It holds what it had of that key.
    """

    upserts: int = 0
    deletes: int = 0
    truncated: int = 0
    repeated: int = 0
    refused: dict[str, Refused] = field(default_factory=dict)


def apply(store: StreamStore, segment: Segment, keep: Set[str] = frozenset()) -> Applied:
    """Apply one segment: the truncate, then one operation a key.

    Args:
        store: Where users are stored.
        segment: What is to be applied.
        keep: Users that the truncate does not remove.

    Raises:
        UnavailableError: MongoDB went away: apply the segment again.
        RefusedError: MongoDB refuses the writes as such.
    """
    applied = Applied()
    if segment.truncate:
        applied.truncated = store.remove_everyone(keep)
    upserts = {key: change.user for key, change in segment.changes.items() if change.user is not None}
    deletes = [key for key, change in segment.changes.items() if change.op is Op.DELETE]
    if deletes:
        store.record_deleted(deletes)
    store.drop_versions(segment.changes)
    refused = store.write(upserts, deletes, created=segment.created)
    while True:
        for key in refused:
            upserts.pop(key, None)
        applied.refused |= refused
        # A load that wrote an entry since may have taken the document for its own and replaced it: write once more.
        overtaken = store.drop_versions(upserts)
        if not overtaken:
            break
        applied.repeated += len(overtaken)
        refused = store.write({key: upserts[key] for key in overtaken})
    store.forget_deleted(upserts)
    applied.upserts = len(upserts)
    applied.deletes = len(deletes)
    return applied
