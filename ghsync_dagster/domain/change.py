"""What a change is: an upsert or a delete of one user, a truncate, or nothing to apply, and its place in the binlog.

Not here: how a record of the topic becomes one (``domain.envelope``), and in which order changes are applied.
"""

from __future__ import annotations

from enum import Enum

import msgspec


class Op(Enum):
    """What is to be done."""

    UPSERT = "upsert"
    DELETE = "delete"
    TRUNCATE = "truncate"
    SKIP = "skip"


class Position(msgspec.Struct, frozen=True, order=True, gc=False):
    """A place in one MySQL server's binlog. Later places compare greater, across the roll to the next file.

    Attributes:
        file: The number at the end of the binlog file's name.
        pos: The byte position of the event in the file.
        row: The place of the row within the event, from 0.
    """

    file: int
    pos: int
    row: int = 0


class Change(msgspec.Struct, frozen=True, gc=False):
    """What one record says.

    Attributes:
        op: What is to be done.
        key: The user_id as a decimal string; None for TRUNCATE and SKIP.
        user: For UPSERT, the fields of USER_FIELDS in their order; a field that Debezium gave as unavailable is
            absent, and keeps its stored value. None otherwise.
        what: What the record was, for counts: c, u, d, r, t, row (flattened without its operation), tombstone,
            heartbeat, schema-change or transaction.
        committed_ms: When the database committed, in milliseconds since 1970 UTC, as Debezium's `source.ts_ms`
            tells it (whole seconds from some servers); None where unknown and for snapshots.
        position: The place in the binlog; None where unknown and for snapshots.
        unknown_columns: Columns of the row that no user has; ignored.
    """

    op: Op
    key: str | None
    user: dict[str, str | None] | None
    what: str
    committed_ms: int | None = None
    position: Position | None = None
    unknown_columns: tuple[str, ...] = ()
