"""Decoding a record of the change topic: to a change of one user, a truncate, nothing to apply, or a refusal.

Belongs here: the decision about one record's key and value, complete: nothing is dropped, coerced or guessed. Not
here: where records come from, what becomes of refused ones, or in which order changes are applied.

The forms are Debezium's (https://debezium.io/documentation/reference/stable/connectors/mysql.html, "Data change
events") as Kafka Connect's JSON converter writes them, with schemas and without, and what the transformation
ExtractNewRecordState makes of them
(https://debezium.io/documentation/reference/stable/transformations/event-flattening.html).

There are two ways through this module, with equal results: a typed one for the usual records, and a general one for
any value, which words each refusal. The first leaves to the second whatever it does not expect.
"""

from __future__ import annotations

import json
import re
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeGuard

import msgspec

from ghsync_dagster.domain.change import Change, Op, Position, RecordKind
from ghsync_dagster.domain.errors import UndecodableError
from ghsync_dagster.domain.formats import format_of
from ghsync_dagster.domain.text import shortened
from ghsync_dagster.domain.user import USER_FIELDS, User

if TYPE_CHECKING:
    from collections.abc import Mapping

UNAVAILABLE: Final = "__debezium_unavailable_value"
"""Debezium's default for `unavailable.value.placeholder`: the row holds a value that the event does not contain."""

_KEY_FIELD: Final = USER_FIELDS[0]
_TEXT_FIELDS: Final = USER_FIELDS[1:]
_BIGINT_MIN: Final = -(2**63)
_BIGINT_MAX: Final = 2**63 - 1


_REPAIR_NAMED: Final = "Then run `ghsync cdc repair --dead-letters`."
_REPAIR_UNNAMED: Final = (
    "Then run `ghsync cdc repair --from-audit`, which needs no user from the record, and `ghsync dlq close` for it."
)


class Refusal(Enum):
    """Every reason to refuse a record.

    Attributes:
        kind: The slug.
        words: What is wrong with such a record.
        way_out: One line on what to do.
    """

    NOT_UTF8 = (
        "not-utf8",
        "The key or value is not UTF-8.",
        "Find out who else writes to the topic: Connect's JSON converter writes UTF-8 only. " + _REPAIR_UNNAMED,
    )
    NOT_JSON = (
        "not-json",
        "The value is no JSON text, or more than one.",
        "Set Connect's value.converter to the JSON converter, or find out who else writes to the topic. "
        + _REPAIR_UNNAMED,
    )
    OTHER_FORMAT = (
        "other-format",
        "The value is in another known format than Debezium's JSON.",
        "Set Connect's key.converter and value.converter to the JSON converter. " + _REPAIR_UNNAMED,
    )
    BAD_TEXT = (
        "bad-text",
        "A string holds half of a surrogate pair, which is no text: neither UTF-8 nor MongoDB can hold it.",
        "Correct the producer: MySQL can't hold such text either. " + _REPAIR_NAMED,
    )
    NOT_AN_EVENT = (
        "not-an-event",
        "The value is JSON, but no form of a change event.",
        "Find out who writes other messages to the topic. " + _REPAIR_UNNAMED,
    )
    UNKNOWN_OP = (
        "unknown-op",
        "The operation is none of c, u, d, r and t.",
        "Read what the operation means in the release notes of the connector. " + _REPAIR_NAMED,
    )
    MISSING_ROW = (
        "missing-row",
        "A create, update or snapshot record without the row after it.",
        "Set binlog_row_image=FULL in MySQL, and look for a transformation that drops `after`. " + _REPAIR_NAMED,
    )
    MISSING_COLUMN = (
        "missing-column",
        "The row lacks a column of a user, so it is unknown what to store for it.",
        "Bring the column back in MySQL or in the connector's column filter. " + _REPAIR_NAMED,
    )
    COLUMN_CASE = (
        "column-case",
        "The name of a user's column is in another case.",
        "Rename the columns to lower case by ALTER TABLE ... RENAME COLUMN in MySQL. " + _REPAIR_UNNAMED,
    )
    BAD_COLUMN = (
        "bad-column",
        "A column other than user_id is neither a string nor null.",
        "Declare the column as VARCHAR in MySQL, and look for a converter that changes it. " + _REPAIR_NAMED,
    )
    BAD_USER_ID = (
        "bad-user-id",
        "The user_id is no whole number of MySQL's BIGINT, as a JSON number or in canonical decimal digits.",
        "Declare user_id as BIGINT PRIMARY KEY in MySQL, and look for a converter that changes it. " + _REPAIR_UNNAMED,
    )
    BAD_KEY = (
        "bad-key",
        "The record's key is none of the known forms.",
        "Set Connect's key.converter to the JSON converter, and the table's key to user_id. " + _REPAIR_UNNAMED,
    )
    MISSING_KEY = (
        "missing-key",
        "A delete or a tombstone that names no user.",
        "Look for a transformation that drops keys. " + _REPAIR_UNNAMED,
    )
    KEY_MISMATCH = (
        "key-mismatch",
        "The record's key names another user than its row.",
        "Set no message.key.columns in the connector, and look for a transformation that changes keys. "
        + _REPAIR_UNNAMED,
    )
    KEY_CHANGED = (
        "key-changed",
        "An update that changes user_id; Debezium writes a delete and a create for that.",
        "Make user_id the primary key in MySQL, and set no message.key.columns in the connector. " + _REPAIR_UNNAMED,
    )
    CONTRADICTION = (
        "contradiction",
        "A flattened row whose __deleted and __op do not agree.",
        "Look for a second transformation after ExtractNewRecordState. " + _REPAIR_NAMED,
    )

    def __init__(self, kind: str, words: str, way_out: str) -> None:
        self.kind = kind
        self.words = words
        self.way_out = way_out

    def error(self, message: str) -> UndecodableError:
        """Return the error that refuses a record for this reason.

        Args:
            message: What is wrong, and where in the record.
        """
        return UndecodableError(self.kind, message, way_out=self.way_out)


_BigInt = Annotated[int, msgspec.Meta(ge=_BIGINT_MIN, le=_BIGINT_MAX)]


class _Row(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    user_id: _BigInt
    login: str | None
    gravatar_id: str | None
    avatar_url: str | None
    url: str | None


class _Before(msgspec.Struct, gc=False):
    user_id: _BigInt | None = None


class _Source(msgspec.Struct, gc=False):
    ts_ms: _BigInt | None = None
    snapshot: str | bool | None = None
    server_id: _BigInt | None = None
    gtid: str | None = None
    file: str | None = None
    pos: _BigInt | None = None
    row: _BigInt = 0


class _Event(msgspec.Struct, gc=False, kw_only=True):
    # In the order in which Debezium writes them: a name is first compared with the one that follows the last.
    before: _Before | None = None
    after: _Row | None = None
    source: _Source | None = None
    op: Literal["c", "u", "d", "r"]


class _Wrapped(msgspec.Struct, gc=False):
    payload: msgspec.Raw


_decode_event: Final = msgspec.json.Decoder(_Event).decode
_decode_wrapped: Final = msgspec.json.Decoder(_Wrapped).decode
# Without the hook a number too large for a float makes the whole text unreadable.
_decode_json: Final = msgspec.json.Decoder(float_hook=float).decode

_UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_KINDS: Final = {kind.value: kind for kind in RecordKind}
_ROW_KINDS: Final = frozenset({RecordKind.CREATE, RecordKind.UPDATE, RecordKind.READ})
_ENVELOPE_PARTS: Final = frozenset({"before", "after", "source"})
_WRAPPER_PARTS: Final = frozenset({"schema", "payload"})
_METADATA_PREFIX: Final = "__"
_DELETED: Final = {"true": True, True: True, "false": False, False: False, None: None}


class ChangeDecoder:
    """Decodes the records of a topic.

    It remembers the bytes around the last payload (the schema, which is the same in all records of a table), so as
    not to parse them again. The result does not depend on that. For one thread.

    Args:
        unavailable: The connector's `unavailable.value.placeholder`. A text that equals it counts as unavailable.
    """

    def __init__(self, unavailable: str = UNAVAILABLE) -> None:
        self._unavailable = unavailable
        self._key_head = b'{"user_id":'
        self._key_tail = b"}"
        self._file: str | None = None
        self._file_number: int | None = None
        self._server_id: int | None = None
        self._server = ""
        self._typed = True
        self._binary: frozenset[str] = frozenset()
        self._expect_head(b"")

    def decode(self, key: bytes | None, value: bytes | None) -> Change:
        """Decode one record.

        Args:
            key: The record's raw key, or None.
            value: The record's raw value, or None.

        Raises:
            UndecodableError: The record is no change that can be applied; its `kind` is one of `Refusal`.
        """
        head = self._head
        if self._typed and value and (not head or (value.startswith(head) and value.endswith(b"}"))):
            try:
                if not value.isascii():
                    value.decode()
                event = _decode_event(value[self._start : self._stop] if head else value)
            except _UNREADABLE:
                event = None
            if event is not None and (change := self._usual(key, event)) is not None:
                return change
        return self._decode_any(key, value)

    def _usual(self, key: bytes | None, event: _Event) -> Change | None:
        """Return the change of a typed event, or None where the general way has to decide."""
        kind, row, before, source = _KINDS[event.op], event.after, event.before, event.source
        if kind is RecordKind.DELETE:
            if before is None or before.user_id is None:
                return None
            op, user_id, user = Op.DELETE, str(before.user_id), None
        else:
            if row is None or (before is not None and kind is RecordKind.UPDATE and before.user_id != row.user_id):
                return None
            op, user_id = Op.UPSERT, str(row.user_id)
            user = {
                "user_id": user_id,
                "login": row.login,
                "gravatar_id": row.gravatar_id,
                "avatar_url": row.avatar_url,
                "url": row.url,
            }
            if self._unavailable in user.values():
                return None
        if key != self._key_head + user_id.encode() + self._key_tail:
            self._refuse_other_key(key, user_id)
        if source is None or kind is RecordKind.READ or (source.snapshot != "false" and source.snapshot):
            return Change(op, user_id, user, kind)
        if source.file != self._file or source.server_id != self._server_id:
            self._file, self._file_number = source.file, _file_number(source.file)
            self._server_id, self._server = source.server_id, _server(source.server_id, source.file)
        committed_ms = source.ts_ms
        if committed_ms is not None and committed_ms <= 0:
            committed_ms = None
        if self._file_number is None or source.pos is None:
            return Change(op, user_id, user, kind, committed_ms)
        position = Position(self._file_number, source.pos, source.row, self._server, source.gtid)
        return Change(op, user_id, user, kind, committed_ms, position)

    def _decode_any(self, key: bytes | None, value: bytes | None) -> Change:
        """Decode a record of any form, or word the refusal."""
        payload = self._payload(value) if value else None
        if payload is None:
            return Change(Op.DELETE, self._deleted_user(key, None, "a tombstone"), None, RecordKind.TOMBSTONE)
        if not isinstance(payload, dict):
            raise Refusal.NOT_AN_EVENT.error(f"The value must be a JSON object, got {_shape(payload)}.")
        if "op" in payload and (_KEY_FIELD not in payload or not _ENVELOPE_PARTS.isdisjoint(payload)):
            return self._envelope(key, payload)
        if _KEY_FIELD in payload or "__deleted" in payload:
            return self._flattened(key, payload)
        if (kind := _message_kind(payload)) is not None:
            return Change(Op.SKIP, None, None, kind)
        if "specversion" in payload:
            raise Refusal.OTHER_FORMAT.error("The value is a CloudEvent.")
        _refuse_case(payload, "The row")
        raise Refusal.NOT_AN_EVENT.error(f"The value has neither op nor user_id, but {_names(payload)}.")

    def _payload(self, value: bytes) -> Any:  # noqa: ANN401  any JSON value
        """Return the value without its wrapper; record which columns the wrapper's schema declares as bytes."""
        self._binary = frozenset()
        if self._head and value.startswith(self._head) and value.endswith(b"}"):
            try:
                return _decode_json(value[self._start : self._stop])
            except _UNREADABLE:
                self._expect_head(b"")
        found = _read(value, "value")
        if not isinstance(found, dict) or "payload" not in found or "op" in found or _KEY_FIELD in found:
            self._expect_head(b"")
            return found
        self._binary = _binary_columns(found.get("schema"))
        if found.keys() <= _WRAPPER_PARTS and not self._binary:
            tail = bytes(_decode_wrapped(value).payload) + b"}"
            self._expect_head(value.removesuffix(tail) if value.endswith(tail) else b"")
        return found["payload"]

    def _expect_head(self, head: bytes) -> None:
        """Remember what stands before the payload: nothing, or the beginning of a wrapper that `}` ends."""
        self._head = head
        self._start = len(head)
        self._stop = -1 if head else None

    def is_keyless(self, key: bytes | None) -> bool:
        """Return whether a record's key is absent, in any form that says so."""
        try:
            return self._key_user_id(key) is None
        except UndecodableError:
            return False

    def _envelope(self, key: bytes | None, event: dict[str, Any]) -> Change:
        op = event["op"]
        before = event.get("before")
        committed_ms, position = _origin(event.get("source"), op)
        kind = _KINDS.get(op) if isinstance(op, str) else None
        if kind is RecordKind.TRUNCATE:
            return Change(Op.TRUNCATE, None, None, kind, committed_ms, position)
        if kind is RecordKind.DELETE:
            user_id = self._deleted_user(key, before, "a delete", "before.")
            return Change(Op.DELETE, user_id, None, kind, committed_ms, position)
        if kind not in _ROW_KINDS:
            got = _shown(op) if isinstance(op, str) else _shape(op)
            raise Refusal.UNKNOWN_OP.error(f"op must be one of c, u, d, r and t, got {got}.")
        row = event.get("after")
        if not isinstance(row, dict):
            raise Refusal.MISSING_ROW.error(f"after must be the row that op {op} leaves, got {_shape(row)}.")
        user = self._user(row, "after.")
        if kind is RecordKind.UPDATE:
            _refuse_changed_key(before, user)
        self._refuse_other_key(key, user[_KEY_FIELD])
        unknown = tuple([name for name in row if name not in USER_FIELDS])
        self._typed = not unknown
        return Change(Op.UPSERT, user[_KEY_FIELD], user, kind, committed_ms, position, unknown)

    def _flattened(self, key: bytes | None, row: dict[str, Any]) -> Change:
        self._typed = False
        op = row.get("__op")
        deleted = _is_deleted(row, op)
        committed_ms, position = _flattened_origin(row, op)
        if deleted:
            user_id = self._deleted_user(key, row, "a delete")
            return Change(Op.DELETE, user_id, None, RecordKind.DELETE, committed_ms, position)
        kind = RecordKind.FLATTENED if op is None else _KINDS.get(op) if isinstance(op, str) else None
        if kind is not RecordKind.FLATTENED and kind not in _ROW_KINDS:
            raise Refusal.UNKNOWN_OP.error(f"__op must be one of c, u, d and r, got {_shown(op)}.")
        user = self._user(row, "")
        self._refuse_other_key(key, user[_KEY_FIELD])
        unknown = tuple([name for name in row if name not in USER_FIELDS and not name.startswith(_METADATA_PREFIX)])
        return Change(Op.UPSERT, user[_KEY_FIELD], user, kind, committed_ms, position, unknown)

    def _user(self, row: dict[str, Any], where: str) -> dict[str, Any]:
        """Return the row as a user, without the fields that are unavailable."""
        missing = [name for name in USER_FIELDS if name not in row]
        if missing:
            row_name = where.removesuffix(".") or "The row"
            _refuse_case(row, row_name)
            raise Refusal.MISSING_COLUMN.error(f"{row_name} lacks {', '.join(missing)}.")
        user: dict[str, str | None] = {_KEY_FIELD: self._row_user_id(row, where)}
        for name in _TEXT_FIELDS:
            value = row[name]
            if value is not None and not isinstance(value, str):
                raise Refusal.BAD_COLUMN.error(f"{where}{name} must be a string or null, got {_shape(value)}.")
            if value is not None and name in self._binary:
                raise Refusal.BAD_COLUMN.error(f"The schema declares {where}{name} as bytes, so its text is base64.")
            if value != self._unavailable:
                user[name] = value
        return user

    def _deleted_user(self, key: bytes | None, row: Any, what: str, where: str = "") -> str:  # noqa: ANN401
        """Return the user_id of a delete from its key and its row, of which one may be absent."""
        by_key = self._key_user_id(key)
        if not isinstance(row, dict) or _KEY_FIELD not in row:
            if by_key is None:
                raise Refusal.MISSING_KEY.error(f"The record is {what} without a key, and no row names its user.")
            return by_key
        by_row = self._row_user_id(row, where)
        _refuse_mismatch(by_key, by_row)
        return by_row

    def _row_user_id(self, row: dict[str, Any], where: str) -> str:
        if _KEY_FIELD in self._binary:
            raise Refusal.BAD_USER_ID.error(f"The schema declares {where}{_KEY_FIELD} as bytes, so its text is base64.")
        return _user_id(row[_KEY_FIELD], f"{where}{_KEY_FIELD}")

    def _refuse_other_key(self, key: bytes | None, user_id: str) -> None:
        """Refuse a record whose key is unreadable or names another user. A record without a key passes."""
        _refuse_mismatch(self._key_user_id(key), user_id)

    def _key_user_id(self, key: bytes | None) -> str | None:
        """Return the user_id that a record's key names, None where there is no key."""
        user_id = _user_id_of_key(key)
        if key is not None and user_id is not None:
            self._learn_key(key, user_id)
        return user_id

    def _learn_key(self, key: bytes, user_id: str) -> None:
        """Remember what stands around the number of this key, where another number gives another key."""
        head, found, tail = key.rpartition(user_id.encode())
        if not found or (head, tail) == (self._key_head, self._key_tail):
            return
        try:
            plain = all(_user_id_of_key(head + probe + tail) == probe.decode() for probe in (b"0", b"-1"))
        except UndecodableError:
            return
        if plain:
            self._key_head, self._key_tail = head, tail


def _origin(source: Any, op: Any) -> tuple[int | None, Position | None]:  # noqa: ANN401
    """Return when and where the database committed, as far as the source block has it."""
    return _commit_of(op, source) if isinstance(source, dict) else (None, None)


def _flattened_origin(row: dict[str, Any], op: Any) -> tuple[int | None, Position | None]:  # noqa: ANN401
    """Return when and where the database committed, as far as `add.fields` added it (`source.pos` or just `pos`)."""
    source = {name: row.get(f"__source_{name}", row.get(f"__{name}")) for name in _ORIGIN_FIELDS}
    # Without `source.` it is the time at which the connector saw the change.
    source["ts_ms"] = row.get("__source_ts_ms")
    return _commit_of(op, source)


_ORIGIN_FIELDS: Final = ("snapshot", "server_id", "gtid", "file", "pos", "row")


def _commit_of(op: Any, source: Mapping[str, Any]) -> tuple[int | None, Position | None]:  # noqa: ANN401
    snapshot = source.get("snapshot")
    if op == "r" or (snapshot != "false" and snapshot):
        return None, None
    ts_ms: Any = source.get("ts_ms")
    file, pos, row = (source.get(name) for name in ("file", "pos", "row"))
    # Some write 0 where they know no time.
    committed_ms = ts_ms if _is_bigint(ts_ms) and ts_ms > 0 else None
    number = _file_number(file) if isinstance(file, str) else None
    if number is None or not _is_bigint(pos):
        return committed_ms, None
    server_id, gtid = source.get("server_id"), source.get("gtid")
    return committed_ms, Position(
        number,
        pos,
        row if _is_bigint(row) else 0,
        _server(server_id if _is_bigint(server_id) else None, file),
        gtid if isinstance(gtid, str) else None,
    )


def _is_bigint(value: Any) -> TypeGuard[int]:  # noqa: ANN401
    return type(value) is int and _BIGINT_MIN <= value <= _BIGINT_MAX


_FILE_DIGITS: Final = 18
"""More than any binlog has, and what every reader of numbers takes."""


def _file_number(file: str | None) -> int | None:
    """Return the number that MySQL gives a binlog file: `mysql-bin.000003` is 3."""
    number = (file or "").rpartition(".")[2]
    return int(number) if len(number) <= _FILE_DIGITS and number.isascii() and number.isdigit() else None


def _server(server_id: int | None, file: str | None) -> str:
    """Return a name for the binlog of a server, "" where it is unknown. A server that is replicated is never 0."""
    base = (file or "").rpartition(".")[0]
    return f"{server_id}/{base}" if server_id and base else ""


def binlog_position(server_id: int, file: str, pos: int) -> Position:
    """Return the position at which a server's binlog ends, comparable with those of the server's records.

    Args:
        server_id: The server's `server_id`.
        file: The binlog file that it writes.
        pos: Where that file ends.

    Raises:
        ValueError: The file's name has no number at its end.
    """
    number = _file_number(file)
    if number is None:
        raise ValueError(f"no name of a binlog file: {file}")
    return Position(number, pos, 0, _server(server_id, file))


def _message_kind(payload: dict[str, Any]) -> RecordKind | None:
    """Return the kind of a message of Debezium that is no change of a row, else None."""
    if payload.keys() == {"ts_ms"}:
        return RecordKind.HEARTBEAT
    if "ddl" in payload and "databaseName" in payload:
        return RecordKind.SCHEMA_CHANGE
    if payload.get("status") in ("BEGIN", "END") and "id" in payload:
        return RecordKind.TRANSACTION
    return None


def _is_deleted(row: dict[str, Any], op: Any) -> bool:  # noqa: ANN401
    flag = row.get("__deleted")
    if not isinstance(flag, str | bool | None) or flag not in _DELETED:
        raise Refusal.CONTRADICTION.error(f"__deleted must be true or false, got {_shown(flag)}.")
    deleted = _DELETED[flag]
    if op is not None and deleted is not None and deleted != (op == "d"):
        raise Refusal.CONTRADICTION.error(f"__deleted is {str(deleted).lower()}, but __op is {_shown(op)}.")
    return op == "d" if deleted is None else deleted


def _refuse_case(row: Mapping[str, Any], name: str) -> None:
    """Refuse an object that has a user's column in another case."""
    if odd := [column for column in row if column not in USER_FIELDS and column.lower() in USER_FIELDS]:
        raise Refusal.COLUMN_CASE.error(f"{name} has {_names(dict.fromkeys(odd))} in place of the lower-case name.")


def _binary_columns(schema: Any) -> frozenset[str]:  # noqa: ANN401
    """Return which columns of a user a schema of Connect declares as bytes, in an envelope or flattened."""
    fields = _schema_fields(schema)
    for name in ("before", "after"):
        fields += [inner for field in fields if field.get("field") == name for inner in _schema_fields(field)]
    binary = [field.get("field") for field in fields if field.get("type") == "bytes"]
    return frozenset(name for name in USER_FIELDS if name in binary)


def _schema_fields(schema: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    fields = schema.get("fields") if isinstance(schema, dict) else None
    return [field for field in fields if isinstance(field, dict)] if isinstance(fields, list) else []


def _refuse_changed_key(before: Any, user: User) -> None:  # noqa: ANN401
    if not isinstance(before, dict) or before.get(_KEY_FIELD) is None:
        return
    old = _user_id(before[_KEY_FIELD], f"before.{_KEY_FIELD}")
    if old != user[_KEY_FIELD]:
        raise Refusal.KEY_CHANGED.error(f"The update changes user_id from {old} to {user[_KEY_FIELD]}.")


def _refuse_mismatch(by_key: str | None, by_row: str) -> None:
    if by_key is not None and by_key != by_row:
        raise Refusal.KEY_MISMATCH.error(f"The record's key names user {by_key}, its row user {by_row}.")


_CANONICAL: Final = re.compile(r"0|-?[1-9][0-9]*", re.ASCII)
_BIGINT_DIGITS: Final = len(str(_BIGINT_MIN))


def _user_id(value: Any, where: str) -> str:  # noqa: ANN401
    """Return a user_id as the contract wants it.

    Digits must be as MySQL writes a BIGINT, so that one user has one user_id.
    """
    if type(value) is int:
        if _BIGINT_MIN <= value <= _BIGINT_MAX:
            return str(value)
        raise Refusal.BAD_USER_ID.error(f"{where} must lie within {_BIGINT_MIN} and {_BIGINT_MAX}.")
    if not isinstance(value, str):
        raise Refusal.BAD_USER_ID.error(f"{where} must be a whole number, got {_shape(value)}.")
    if not _CANONICAL.fullmatch(value):
        raise Refusal.BAD_USER_ID.error(
            f"{where} must be decimal digits without leading zeros or a plus, got {_shown(value)}."
        )
    if len(value) > _BIGINT_DIGITS or not _BIGINT_MIN <= int(value) <= _BIGINT_MAX:
        raise Refusal.BAD_USER_ID.error(f"{where} must lie within {_BIGINT_MIN} and {_BIGINT_MAX}.")
    return value


def _user_id_of_key(key: bytes | None) -> str | None:
    """Return the user_id of a record's key, None where there is no key."""
    if not key:
        return None
    try:
        found = _read(key, "key")
    except UndecodableError as error:
        raise Refusal.BAD_KEY.error(error.message) from error
    if isinstance(found, dict) and _KEY_FIELD not in found and "payload" in found:
        if _KEY_FIELD in _binary_columns(found.get("schema")):
            raise Refusal.BAD_USER_ID.error("The schema of the record's key declares user_id as bytes.")
        found = found["payload"]
    if found is None:
        return None
    if isinstance(found, dict):
        if _KEY_FIELD not in found:
            _refuse_case(found, "The record's key")
            raise Refusal.BAD_KEY.error(f"The record's key has no user_id, but {_names(found)}.")
        found = found[_KEY_FIELD]
    return _user_id(found, "The user_id of the record's key")


def _read(raw: bytes, what: str) -> Any:  # noqa: ANN401  any JSON value
    """Read JSON, or raise what is wrong with it."""
    try:
        return _decode_json(raw)
    except _UNREADABLE as error:
        raise _unreadable(raw, what, error) from error


def _unreadable(raw: bytes, what: str, error: Exception) -> UndecodableError:
    if (name := format_of(raw)) is not None:
        return Refusal.OTHER_FORMAT.error(f"The {what} looks like {name}.")
    try:
        text = raw.decode()
    except UnicodeDecodeError as invalid:
        return Refusal.NOT_UTF8.error(f"The {what} is not UTF-8 from byte {invalid.start} on.")
    if isinstance(error, RecursionError):
        return Refusal.NOT_JSON.error(f"The {what} is nested too deeply.")
    if _has_lone_surrogate(text):
        return Refusal.BAD_TEXT.error(f"The {what} holds a string with half of a surrogate pair.")
    return Refusal.NOT_JSON.error(f"The {what} is no JSON: {str(error).removeprefix('JSON is malformed: ')}.")


def _has_lone_surrogate(text: str) -> bool:
    """Return whether the text is JSON except for lone surrogates, which Python's own reader accepts."""
    try:
        json.dumps(json.loads(text, parse_int=str), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    except (ValueError, RecursionError):
        return False
    return False


_SHAPES: Final = {
    bool: "true or false",
    int: "a number",
    float: "a number with a fraction",
    str: "a string",
    list: "an array",
    dict: "an object",
}


_SHOWN_NAMES: Final = 8


def _shape(value: Any) -> str:  # noqa: ANN401
    return "null" if value is None else _SHAPES[type(value)]


def _shown(value: Any, limit: int = 60) -> str:  # noqa: ANN401
    # What is nested is as deep as its writer liked.
    text = _shape(value) if isinstance(value, dict | list) else json.dumps(value)
    return shortened(text, limit)


def _names(found: Mapping[str, Any]) -> str:
    """List the names of an object, not its values."""
    names = [_shown(name, 30) for name in list(found)[:_SHOWN_NAMES]]
    more = ["..."] if len(found) > _SHOWN_NAMES else []
    return ", ".join(names + more) or "nothing"
