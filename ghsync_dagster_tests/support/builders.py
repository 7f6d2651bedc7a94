"""Valid users, rows and changes; keywords replace their members.

Not here: how records of a topic are written (envelopes.py), and lines of files (odd_lines.py, ``event_line``).
"""

from __future__ import annotations

from typing import Any, Final

from ghsync_dagster.domain.change import Change, Op, RecordKind
from ghsync_dagster.domain.envelope import UNAVAILABLE
from ghsync_dagster.domain.user import USER_FIELDS

_OPS: Final = {
    RecordKind.DELETE: Op.DELETE,
    RecordKind.TOMBSTONE: Op.DELETE,
    RecordKind.TRUNCATE: Op.TRUNCATE,
    RecordKind.KEYLESS_TOMBSTONE: Op.SKIP,
    RecordKind.HEARTBEAT: Op.SKIP,
}
"""What is to be done for a record that upserts no user."""


def row(user_id: Any = 1, login: Any = "octo", **columns: Any) -> dict[str, Any]:
    """Return a row of the table in the order of its columns; keywords replace or add columns."""
    return {"user_id": user_id, "login": login, "gravatar_id": "", "avatar_url": None, "url": "http://u"} | columns


def user(user_id: Any = 1, login: Any = "octo", **fields: Any) -> dict[str, Any]:
    """Return the user that such a row becomes: the id is text, and a field that Debezium gave as unavailable absent."""
    found = row(user_id, login, **fields)
    known = {name: found[name] for name in USER_FIELDS[1:] if found[name] != UNAVAILABLE}
    return {"user_id": str(user_id)} | known


def change(user_id: object = 1, kind: RecordKind = RecordKind.UPDATE, **members: Any) -> Change:
    """Return what a record of a kind says: of a whole user, unless the keyword ``user`` tells other fields."""
    op = _OPS.get(kind, Op.UPSERT)
    key = str(user_id) if op in (Op.UPSERT, Op.DELETE) else None
    told = members.pop("user", None) or user(user_id) if op is Op.UPSERT else None
    return Change(op, key, told, kind, **members)


def upsert(fields: dict[str, Any], **members: Any) -> Change:
    """Return an update that tells these fields of a user."""
    return change(fields["user_id"], user=fields, **members)


def delete(user_id: object = 1, **members: Any) -> Change:
    """Return a delete."""
    return change(user_id, RecordKind.DELETE, **members)
