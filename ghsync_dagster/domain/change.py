"""What a change is: an upsert or a delete of one user, a truncate, or nothing to apply; and its binlog position.

Not here: how a record of the topic becomes one (``domain.envelope``), and in which order changes are applied.
"""

from __future__ import annotations

from enum import Enum, StrEnum

import msgspec

from ghsync_dagster.domain.binlog import read_gtid


class RecordKind(StrEnum):
    """What a record is: Debezium's ``op``, or a name of what has none."""

    CREATE = "c"
    UPDATE = "u"
    DELETE = "d"
    READ = "r"
    TRUNCATE = "t"
    FLATTENED = "row"
    """Flattened without its operation."""
    TOMBSTONE = "tombstone"
    """Without a value; it follows a delete."""
    KEYLESS_TOMBSTONE = "keyless-tombstone"
    """A tombstone of a table without a key, which names no user."""
    HEARTBEAT = "heartbeat"
    SCHEMA_CHANGE = "schema-change"
    TRANSACTION = "transaction"
    REPAIR = "repair"
    """No record of the topic: a row that a repair read."""


class Op(Enum):
    """What is to be done."""

    UPSERT = "upsert"
    DELETE = "delete"
    TRUNCATE = "truncate"
    SKIP = "skip"


class Position(msgspec.Struct, frozen=True, gc=False):
    """A position in one server's binlog.

    Attributes:
        file: The number at the end of the binlog file's name.
        pos: The byte position in the file: of the event with MySQL, of its transaction with MariaDB.
        row: The number of the row, from 0. It begins again within a transaction, so with ``pos`` it is not unique.
        server: The server's `server_id` and the base name of its binlog files, such as "184054/mysql-bin"; "" where
            unknown. A relayed transaction carries the id of the server that it was first executed on.
        gtid: The GTID of the transaction, from `source.gtid`; None where the server writes none.
    """

    file: int
    pos: int
    row: int = 0
    server: str = ""
    gtid: str | None = None

    def compare(self, other: Position) -> int | None:
        """Return which of two positions the server executed first.

        GTIDs of one sequence are in order, whichever server they are read from. Byte positions are in order within one
        server only, and only without GTIDs or within one transaction.

        Returns:
            -1 if this one was first, 1 if the other one was, 0 if they are of one event or transaction. None if they
            can't be compared: they are of two servers, or one names no server.
        """
        if self.gtid is not None or other.gtid is not None:
            one, another = read_gtid(self.gtid), read_gtid(other.gtid)
            if one is None or another is None or one.sequence != another.sequence:
                return None
            if one.number != another.number:
                return -1 if one.number < another.number else 1
        if not self.server or self.server != other.server:
            return None
        first, second = (self.file, self.pos), (other.file, other.pos)
        return (first > second) - (first < second)

    @property
    def origin(self) -> str:
        """The server in words, for messages."""
        name = f"server {self.server}" if self.server else "a server that the record does not name"
        return name if self.gtid is None else f"{name} (GTID {self.gtid})"


class Change(msgspec.Struct, frozen=True, gc=False):
    """The change that one record describes.

    Attributes:
        op: What is to be done.
        key: The user_id as a decimal string; None for TRUNCATE and SKIP.
        user: For UPSERT, the fields of USER_FIELDS in their order. A field that Debezium marks as unavailable is
            absent, and keeps its stored value. None otherwise.
        kind: What the record was.
        committed_ms: When the database committed, in milliseconds since 1970 UTC, from Debezium's `source.ts_ms`
            (whole seconds from some servers); None where unknown and for snapshots.
        position: The binlog position; None where unknown and for snapshots.
        unknown_columns: Columns of the row that no user has; ignored.
    """

    op: Op
    key: str | None
    user: dict[str, str | None] | None
    kind: RecordKind
    committed_ms: int | None = None
    position: Position | None = None
    unknown_columns: tuple[str, ...] = ()
