"""Records as Debezium, Kafka Connect and ExtractNewRecordState write them. Used by the tests of the change stream."""

from __future__ import annotations

import json
from typing import Any, Final

from ghsync_dagster.domain.user import USER_FIELDS

WRAPPERS: Final = ("bare", "schema", "payload")
KEY_FORMS: Final = ("number", "string", "struct", "struct-string", "schema", "payload", "schema-scalar")
TOMBSTONES: Final = (
    None,
    b"",
    b"null",
    b'{"schema":null,"payload":null}',
    b'{"schema":{"type":"struct","fields":[],"optional":true},"payload":null}',
    b'{"payload":null}',
)
NO_KEYS: Final = (None, b"", b"null", b'{"schema":null,"payload":null}', b'{"payload":null}')

_ROW_SCHEMA: Final = {
    "type": "struct",
    "fields": [
        {
            "type": "string" if name != "user_id" else "int64",
            "optional": name not in ("user_id", "login"),
            "field": name,
        }
        for name in USER_FIELDS
    ],
    "optional": True,
    "name": "mysql-server.new_data.Users.Value",
}
_KEY_SCHEMA: Final = {
    "type": "struct",
    "fields": [{"type": "int64", "optional": False, "field": "user_id"}],
    "optional": False,
    "name": "mysql-server.new_data.Users.Key",
}
_ENVELOPE_SCHEMA: Final = {
    "type": "struct",
    "fields": [
        _ROW_SCHEMA | {"field": "before"},
        _ROW_SCHEMA | {"field": "after"},
        {"type": "string", "optional": False, "field": "op"},
        {"type": "int64", "optional": True, "field": "ts_ms"},
    ],
    "optional": False,
    "name": "mysql-server.new_data.Users.Envelope",
    "version": 2,
}


def dump(value: Any, *, ascii_only: bool = False) -> bytes:
    """Write JSON without blanks, as Connect does; strings as they are, or with escapes."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=ascii_only).encode()


def source(snapshot: str = "false", ts_ms: int = 1_700_000_000_123, **more: Any) -> dict[str, Any]:
    """Return the source block of a MySQL record."""
    return {
        "version": "3.6.1.Final",
        "connector": "mysql",
        "name": "mysql-server",
        "ts_ms": ts_ms,
        "snapshot": snapshot,
        "db": "new_data",
        "sequence": None,
        "ts_us": ts_ms * 1_000,
        "ts_ns": ts_ms * 1_000_000,
        "table": "Users",
        "server_id": 223344,
        "gtid": "3e11fa47-71ca-11e1-9e33-c80aa9429562:23",
        "file": "mysql-bin.000003",
        "pos": 484,
        "row": 0,
        "thread": 7,
        "query": None,
    } | more


def envelope(op: Any, before: Any, after: Any, *, wrap: str = "bare", **more: Any) -> bytes:
    """Return the value of a change event; keywords replace or add members, such as `source`."""
    event = {
        "before": before,
        "after": after,
        "source": source("true" if op == "r" else "false"),
        "transaction": None,
        "op": op,
        "ts_ms": 1_700_000_000_456,
        "ts_us": 1_700_000_000_456_000,
        "ts_ns": 1_700_000_000_456_000_000,
    }
    return wrapped(event | more, wrap, _ENVELOPE_SCHEMA)


def flattened(columns: dict[str, Any], *, wrap: str = "bare", **metadata: Any) -> bytes:
    """Return the value that ExtractNewRecordState makes of a row; keywords are its `__` fields, without the prefix."""
    return wrapped(columns | {f"__{name}": value for name, value in metadata.items()}, wrap, _ROW_SCHEMA)


def wrapped(payload: Any, wrap: str = "schema", schema: Any = None) -> bytes:
    """Return a payload as the JSON converter writes it: bare, with its schema, or with `payload` alone."""
    parts = {"bare": payload, "payload": {"payload": payload}, "schema": {"schema": schema, "payload": payload}}
    return dump(parts[wrap])


def key(user_id: int | str = 1, form: str = "struct") -> bytes:
    """Return a record's key."""
    struct = {"user_id": user_id}
    scalar_schema = {"type": "int64", "optional": False}
    forms: dict[str, Any] = {
        "number": int(user_id),
        "string": str(user_id),
        "struct": struct,
        "struct-string": {"user_id": str(user_id)},
        "schema": {"schema": _KEY_SCHEMA, "payload": struct},
        "payload": {"payload": struct},
        "schema-scalar": {"schema": scalar_schema, "payload": int(user_id)},
    }
    return dump(forms[form])
