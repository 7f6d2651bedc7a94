"""Coalescing a batch of changes: the last operation a key, between truncates.

Belongs here: merging changes that have one order, such as a partition's. Not here: how segments are applied, or which
partitions may share a batch.

Segments are applied in order: each truncate first, and then its operations in any order. The result is the same as
applying the changes one by one, in the stored users and in the keys that are recorded as deleted. So the changes before
a truncate stay, though it removes what they write: it records as deleted what it finds stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from ghsync_dagster.domain.change import Change, Op, RecordKind
from ghsync_dagster.domain.user import USER_FIELDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Set

_WHOLE: Final = len(USER_FIELDS)


class Segment(NamedTuple):
    """A part of a batch that can be applied at once.

    Attributes:
        truncate: Whether all users are removed first.
        changes: One UPSERT or DELETE a key, by key. An UPSERT that lacks a field keeps its stored value; where
            nothing is stored, the field is null.
        created: Keys whose first change here creates them. Most likely nothing is stored of them; where records are
            delivered again, something may be.
    """

    truncate: bool
    changes: dict[str, Change]
    created: Set[str] = frozenset()


def coalesce(changes: Iterable[Change]) -> list[Segment]:
    """Merge changes into segments.

    Args:
        changes: Changes in their order. Those to skip are left out.

    Returns:
        The segments in the order to apply them; none where there is nothing to apply.
    """
    segments: list[Segment] = []
    current: dict[str, Change] = {}
    created: set[str] = set()
    truncated = False
    for change in changes:
        key, user = change.key, change.user
        if key is None:
            if change.op is Op.TRUNCATE:
                if current:
                    segments.append(Segment(truncated, current, created))
                current, created, truncated = {}, set(), True
        elif user is not None:
            if change.kind is RecordKind.CREATE and key not in current:
                created.add(key)
            current[key] = change if len(user) == _WHOLE else _completed(change, user, current.get(key), truncated)
        elif change.kind is not RecordKind.TOMBSTONE or not _is_delete(current.get(key)):
            current[key] = change
    if current or truncated:
        segments.append(Segment(truncated, current, created))
    return segments


def _is_delete(change: Change | None) -> bool:
    return change is not None and change.op is Op.DELETE


def _completed(change: Change, user: dict[str, str | None], earlier: Change | None, truncated: bool) -> Change:
    """Return the change with the fields it lacks, as far as the segment has them."""
    if earlier is None and not truncated:
        return change
    known = earlier.user if earlier is not None else None
    if known is None:
        merged = {name: user.get(name) for name in USER_FIELDS}
    else:
        both = known | user
        merged = {name: both[name] for name in USER_FIELDS if name in both}
    return msgspec.structs.replace(change, user=merged)
