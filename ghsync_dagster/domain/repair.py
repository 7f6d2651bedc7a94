"""Repair of single users: the source is read again for them, alongside the live stream and loads.

Belongs here: the order of the steps, as data that the code executes and a test enumerates, and the pure decisions
between them. Not here: how a step is written to a server, who requests a repair, or when the owner carries it out.

The owner of a user's partition carries a request out, between two batches. This rests on the following:

- **One writer a user.** Only the owner of the partition applies records of the user, and it repairs in the thread that
  applies them. So no record of the user is applied between two steps from ``READ_STORED`` on.
- **A reading divides the binlog.** The source is read in one transaction: a shared lock on each requested key (on the
  gap where there is no row), the rows, then the end of the binlog. A transaction writes the binlog before it commits
  and holds its locks until then. So every record of a requested key from before the reading's position is part of the
  rows, and none from after it is. The position without the locks does not suffice: the server shows positions of
  transactions whose rows are not visible yet.
- **A reading is current.** It includes the newest record that the owner has polled. A reading of a server that lags
  behind the stream, or of another server, is refused.
- **The fence.** The reading's position is stored before the row is written. From then on no record of the user from
  before it is applied again, also if it is delivered again. A record that cannot be compared with the position is left
  out too, and the user is requested again. If the source had no row, deletes and truncates are applied all the same,
  and other records as deletes. MySQL had the user once, so it is recorded that no file may bring the user back.
- **Undecodable records count.** A record of the user that becomes a dead letter after the claim may be newer than the
  reading. So the source is read again, and a repair resolves no letter of a change that it does not contain.
- **The request stays open** until the row is written. A repair that dies anywhere is repeated with a newer reading. A
  command that is in doubt opens its request again.

The document is written by the stream's own steps (``domain.precedence``), so loads treat it as the stream's.
"""

from __future__ import annotations

from enum import Enum, StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from ghsync_dagster.domain.binlog import GtidSet
from ghsync_dagster.domain.change import Op, Position

if TYPE_CHECKING:
    from collections.abc import Iterable


class RepairStep(Enum):
    """The steps of a repair of one user, in order. Each may be the last one."""

    CLAIM = "claim"
    """Read the open request with its token."""

    WATCH = "watch"
    """From here on the owner records the position of each record of the user that it applies. At once it keeps the
    position of the newest record that it has polled. Before READ_SOURCE: so each record was polled, recorded or
    read."""

    READ_SOURCE = "read source"
    """Lock the key, read its row and the end of the binlog, release. After CLAIM: a later request gets a later one."""

    READ_STORED = "read stored"
    """Read document, version entry and deletion: they show whether a user without a row came from files."""

    RECORD_FENCE = "record fence"
    """Store the reading's position for the user, where the request is still open. Before the first write."""

    WRITE = "write"
    """Carry out the ``cure``: the stream's own upsert of the row, its own delete, or nothing."""

    RECORD_OUTCOME = "record outcome"
    """Close the request where its token is still the claimed one: a user that was requested since stays open."""


READING_STEPS = (RepairStep.CLAIM, RepairStep.WATCH, RepairStep.READ_SOURCE)
"""The steps alongside the stream."""

WRITING_STEPS = (RepairStep.READ_STORED, RepairStep.RECORD_FENCE, RepairStep.WRITE, RepairStep.RECORD_OUTCOME)
"""The steps of the writer, between two batches."""

REPAIR_STEPS = READING_STEPS + WRITING_STEPS
"""A repair."""


class Reading(NamedTuple):
    """Where a reading of the source lies in the binlog.

    Attributes:
        id: Names the reading.
        position: The end of the binlog while the keys were locked; its ``server`` is the one that was read.
        gtids: The GTIDs that the server had executed then, in its own form; empty where it has none.
        read_ms: The server's clock then, in milliseconds since 1970 UTC; None where unknown.
    """

    id: str
    position: Position
    gtids: str = ""
    read_ms: int | None = None

    def includes(self, position: Position | None, committed_ms: int | None = None) -> bool | None:
        """Return whether a record is part of what was read; None where that is not certain.

        Positions are comparable on one server only. GTIDs are comparable on all, but MySQL adds a GTID to the executed
        ones a moment after the rows are visible. So a GTID in the set is proof; for a missing one the position has to
        agree. A record that was committed later than the reading is never part of it. If its position says otherwise,
        it is of another binlog; if its GTID is missing, that suffices.

        Args:
            position: The record's own; None where it has none.
            committed_ms: When the record was committed, likewise.
        """
        if position is None:
            return None
        order = msgspec.structs.replace(position, gtid=None).compare(self.position)
        by_position = None if order is None else order < 0
        by_gtid = _gtid_set(self.gtids).contains(position.gtid) if self.gtids else None
        if committed_ms is not None and self.read_ms is not None and committed_ms > self.read_ms + _SKEW_MS:
            return None if by_gtid or (by_gtid is None and by_position is not False) else False
        if by_gtid is None or by_gtid == by_position:
            return by_position
        return True if by_gtid and by_position is None else None


_SKEW_MS: Final = 5_000
"""How far the clocks of two servers may differ."""


@lru_cache(maxsize=256)
def _gtid_set(text: str) -> GtidSet:
    # Many users share a reading.
    return GtidSet.parse(text)


def is_current(reading: Reading, polled: Iterable[Position | None]) -> bool:
    """Return whether a reading includes the records that the stream has polled already.

    A position without server and GTID, as flattened records may have it, proves nothing of any server.

    Args:
        reading: What was read.
        polled: The position of the newest record of each partition, None where it has none.
    """
    known = [position for position in polled if position is not None and (position.server or position.gtid)]
    return all(reading.includes(position) is True for position in known)


def resolves_letters(reading: Reading, polled: Iterable[Position | None]) -> bool:
    """Return whether a reading includes records that could not be decoded, whose positions are unknown.

    It does if it is of the server that the connector follows; another server may lag behind these records.

    Args:
        reading: What was read.
        polled: The position of the newest record of each partition, None where it has none.
    """
    servers = {position.server for position in polled if position is not None and position.server}
    return not servers or reading.position.server in servers


class Fence(NamedTuple):
    """What keeps older records from a repaired user.

    Attributes:
        reading: Where the user was read.
        has_row: Whether the source had a row then.
    """

    reading: Reading
    has_row: bool


class Disposition(Enum):
    """What becomes of a record of a user that was repaired."""

    APPLY = "apply"
    """It is from after the reading, or removes a user without a row."""

    LEAVE_OUT = "leave out"
    """What was read includes it."""

    REQUEST_AGAIN = "request again"
    """It cannot be compared with the reading: it is left out, and its user is requested again."""

    DELETE = "delete"
    """What was read includes it, and had no row: it is applied as a delete."""

    DELETE_AND_REQUEST_AGAIN = "delete and request again"
    """The same, where it cannot be compared with the reading: its user is requested again too."""

    @property
    def is_left_out(self) -> bool:
        """Whether the record is not applied."""
        return self in (Disposition.LEAVE_OUT, Disposition.REQUEST_AGAIN)

    @property
    def deletes(self) -> bool:
        """Whether a delete is applied in the record's place."""
        return self in (Disposition.DELETE, Disposition.DELETE_AND_REQUEST_AGAIN)

    @property
    def requests_again(self) -> bool:
        """Whether the user is to be read again."""
        return self in (Disposition.REQUEST_AGAIN, Disposition.DELETE_AND_REQUEST_AGAIN)


def disposition(fence: Fence, op: Op, position: Position | None, committed_ms: int | None = None) -> Disposition:
    """Decide what becomes of a record of a repaired user.

    Args:
        fence: The user's own.
        op: What the record does.
        position: The record's own; None where it has none.
        committed_ms: When it was committed, likewise.
    """
    included = fence.reading.includes(position, committed_ms)
    if included is False or (op is not Op.UPSERT and not fence.has_row):
        return Disposition.APPLY
    if fence.has_row:
        return Disposition.LEAVE_OUT if included else Disposition.REQUEST_AGAIN
    return Disposition.DELETE if included else Disposition.DELETE_AND_REQUEST_AGAIN


class Overtaken(Enum):
    """What the records of a user that were applied since its request was claimed mean for the reading."""

    NO = "no"
    """There is none, or the reading includes them all: the row is the newest state."""

    NEWER = "newer"
    """The last one is from after the reading: the user has a newer state already."""

    UNKNOWN = "unknown"
    """The last one cannot be compared: the source is to be read again."""


def overtaken(reading: Reading, applied: Position | None) -> Overtaken:
    """Decide whether a reading is older than the last record that the stream applied since the claim.

    Args:
        reading: What was read.
        applied: The record's position; None where it has none, could not be decoded, or was refused.
    """
    included = reading.includes(applied)
    if included is None:
        return Overtaken.UNKNOWN
    return Overtaken.NO if included else Overtaken.NEWER


class StoredUser(NamedTuple):
    """The stored state of a user, each part read at its own moment, in this order.

    Attributes:
        document: Whether there is a document.
        marked: Whether a load has not finished with it.
        versioned: Whether it has a version entry.
        deleted: Whether the stream recorded that it deleted the user.
    """

    document: bool
    marked: bool
    versioned: bool
    deleted: bool

    @property
    def is_of_files(self) -> bool:
        """Whether files alone brought the document: the stream neither wrote nor deleted the user since."""
        return self.document and (self.marked or self.versioned) and not self.deleted


class Outcome(StrEnum):
    """The result of a repair."""

    WRITTEN = "written"
    """MySQL has a row, and the document is that row."""

    REMOVED = "removed"
    """MySQL has no row, and the document was removed."""

    LEFT_TO_FILES = "left_to_files"
    """MySQL has no row, and files brought the document."""

    ABSENT = "absent"
    """Neither side has the user."""

    OVERTAKEN = "overtaken"
    """The stream applied a newer record of the user meanwhile."""

    REFUSED = "refused"
    """The database refuses the row for what is in it."""


class Cure(NamedTuple):
    """How a user is repaired.

    Attributes:
        op: ``UPSERT``, ``DELETE`` or ``SKIP``, by the stream's own steps.
        outcome: The result where the database refuses nothing.
    """

    op: Op
    outcome: Outcome


def cure(stored: StoredUser, *, has_row: bool) -> Cure:
    """Decide how a user is repaired.

    Args:
        stored: What is stored of the user.
        has_row: Whether the source has a row.
    """
    if has_row:
        return Cure(Op.UPSERT, Outcome.WRITTEN)
    if stored.is_of_files:
        return Cure(Op.SKIP, Outcome.LEFT_TO_FILES)
    if stored.document:
        return Cure(Op.DELETE, Outcome.REMOVED)
    return Cure(Op.SKIP, Outcome.ABSENT)
