"""What each form of record decodes to, what is refused and in which words, and that decoding is total."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ghsync_dagster.domain.change import Change, Op, Position, RecordKind
from ghsync_dagster.domain.envelope import UNAVAILABLE, ChangeDecoder, Refusal
from ghsync_dagster.domain.errors import PermanentError, UndecodableError
from ghsync_dagster.domain.user import USER_FIELDS
from ghsync_dagster_tests.support.builders import row, user
from ghsync_dagster_tests.support.envelopes import (
    KEY_FORMS,
    NO_KEYS,
    TOMBSTONES,
    WRAPPERS,
    dump,
    envelope,
    flattened,
    key,
    source,
    wrapped,
)

SERVER = "223344/mysql-bin"
GTID = "3e11fa47-71ca-11e1-9e33-c80aa9429562:23"
AT = (1_700_000_000_123, Position(3, 484, 0, SERVER, GTID))
"""When and where the records of `envelopes.source` were committed."""


def decode(key: bytes | None, value: bytes | None) -> Change:
    """Decode one record, by a decoder that has decoded no other."""
    return ChangeDecoder().decode(key, value)


def upsert(
    what: str, *, at: tuple[int | None, Position | None] = AT, unknown: tuple[str, ...] = (), **columns: Any
) -> Change:
    found = user(**columns)
    return Change(Op.UPSERT, found["user_id"], found, RecordKind(what), *at, unknown)


def delete(user_id: str = "1", what: str = "d", at: tuple[Any, Any] = AT) -> Change:
    return Change(Op.DELETE, user_id, None, RecordKind(what), *at)


NOWHERE = (None, None)


# rows


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("key_form", KEY_FORMS)
def test_creates_updates_and_deletes_decode_in_every_wrapper_with_every_key(wrap: str, key_form: str) -> None:
    decoder = ChangeDecoder()
    for _ in range(2):
        create = decoder.decode(key(5, key_form), envelope("c", None, row(5), wrap=wrap))
        update = decoder.decode(key(5, key_form), envelope("u", row(5), row(5, "cat"), wrap=wrap))
        gone = decoder.decode(key(5, key_form), envelope("d", row(5), None, wrap=wrap))
        assert create == upsert("c", user_id=5)
        assert update == upsert("u", user_id=5, login="cat")
        assert gone == delete("5")


@pytest.mark.parametrize("marker", ["first", "true", "last", "first_in_data_collection", "last_in_data_collection"])
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_snapshot_rows_are_upserts_without_time_or_place(marker: str, wrap: str) -> None:
    record = envelope("r", None, row(), wrap=wrap, source=source(marker))
    assert decode(key(), record) == upsert("r", at=NOWHERE)


def test_rows_of_an_incremental_snapshot_are_upserts_without_time_or_place() -> None:
    record = envelope("r", None, row(), source=source("incremental"))
    assert decode(key(), record) == upsert("r", at=NOWHERE)


@pytest.mark.parametrize("op", ["c", "u"])
def test_a_snapshot_marker_takes_time_and_place_from_any_operation(op: str) -> None:
    assert decode(key(), envelope(op, None, row(), source=source("last"))) == upsert(op, at=NOWHERE)


@pytest.mark.parametrize("snapshot", [False, None, "false"])
def test_records_that_are_no_snapshot_keep_time_and_place(snapshot: object) -> None:
    record = envelope("c", None, row(), source=source() | {"snapshot": snapshot})
    assert decode(key(), record) == upsert("c")


@pytest.mark.parametrize(
    ("given_source", "at"),
    [
        (None, NOWHERE),
        ({}, NOWHERE),
        ("mysql", NOWHERE),
        ({"ts_ms": 7}, (7, None)),
        ({"ts_ms": "7", "file": 1}, NOWHERE),
        ({"ts_ms": 7, "file": "binlog.000012", "pos": 4}, (7, Position(12, 4))),
        ({"ts_ms": 7, "file": "binlog.000012", "pos": 4, "row": None}, (7, Position(12, 4))),
        ({"ts_ms": 7, "file": "binlog", "pos": 4, "row": 0}, (7, None)),
        ({"ts_ms": 7, "file": "", "pos": 0, "row": 0}, (7, None)),
        ({"ts_ms": 7, "file": "a.b.1000000", "pos": 4, "row": 2}, (7, Position(1_000_000, 4, 2))),
        ({"ts_ms": 7, "file": "b." + "9" * 5_000, "pos": 4}, (7, None)),
        ({"ts_ms": 2**63, "file": "b.1", "pos": 2**63}, NOWHERE),
        ({"ts_ms": 7, "file": "b.1", "pos": 4, "row": 2**63}, (7, Position(1, 4, 0))),
        ({"file": "b.1", "pos": 4, "server_id": 5}, (None, Position(1, 4, server="5/b"))),
        ({"file": "c.d.1", "pos": 4, "server_id": 5}, (None, Position(1, 4, server="5/c.d"))),
        ({"file": "b.1", "pos": 4, "server_id": 0}, (None, Position(1, 4))),
        ({"file": "b.1", "pos": 4, "server_id": "5"}, (None, Position(1, 4))),
        ({"file": "b.1", "pos": 4, "server_id": 2**63}, (None, Position(1, 4))),
        ({"file": ".1", "pos": 4, "server_id": 5}, (None, Position(1, 4))),
        ({"file": "b.1", "pos": 4, "gtid": "0-1-7"}, (None, Position(1, 4, gtid="0-1-7"))),
        ({"file": "b.1", "pos": 4, "gtid": 7}, (None, Position(1, 4))),
        *(({"ts_ms": odd, "file": "", "pos": 0, "row": 0}, NOWHERE) for odd in (0, -1, -(2**63))),
    ],
)
def test_time_and_place_are_told_as_far_as_the_source_tells_them(given_source: object, at: tuple[Any, Any]) -> None:
    assert decode(key(), envelope("c", None, row(), source=given_source)) == upsert("c", at=at)


def test_a_key_change_is_a_delete_and_a_create_of_two_keys() -> None:
    assert decode(key(1), envelope("d", row(1), None)) == delete("1")
    assert decode(key(1), None).key == "1"
    assert decode(key(2), envelope("c", None, row(2))) == upsert("c", user_id=2)


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("no_key", NO_KEYS)
def test_a_truncate_has_no_key_and_no_rows(wrap: str, no_key: bytes | None) -> None:
    assert decode(no_key, envelope("t", None, None, wrap=wrap)) == Change(
        Op.TRUNCATE, None, None, RecordKind.TRUNCATE, *AT
    )


@pytest.mark.parametrize("tombstone", TOMBSTONES)
@pytest.mark.parametrize("key_form", KEY_FORMS)
def test_a_tombstone_in_any_form_deletes_its_key(tombstone: bytes | None, key_form: str) -> None:
    assert decode(key(7, key_form), tombstone) == delete("7", "tombstone", NOWHERE)


def test_a_delete_is_told_by_its_key_or_its_row_alone() -> None:
    assert decode(key(3), envelope("d", None, None)) == delete("3")
    assert decode(key(3), envelope("d", {}, None)) == delete("3")
    assert decode(key(3), dump({"op": "d"})) == delete("3", at=NOWHERE)
    for no_key in NO_KEYS:
        assert decode(no_key, envelope("d", row(3), None)) == delete("3")
    assert decode(None, envelope("d", {"user_id": 3}, None)) == delete("3")


def test_a_delete_needs_only_the_user_id_of_its_row() -> None:
    assert decode(key(3), envelope("d", {"user_id": 3, "login": 5, "extra": []}, None)) == delete("3")


@pytest.mark.parametrize("no_key", NO_KEYS)
def test_a_row_without_a_key_is_told_by_its_user_id(no_key: bytes | None) -> None:
    assert decode(no_key, envelope("c", None, row(3))) == upsert("c", user_id=3)


def test_other_members_of_a_key_are_ignored() -> None:
    found = dump({"user_id": 1, "__dbz__physicalTableIdentifier": "mysql-server.new_data.Users"})
    assert decode(found, envelope("c", None, row())) == upsert("c")


@pytest.mark.parametrize("number", [0, -1, 2**63 - 1, -(2**63), 4_293_484])
@pytest.mark.parametrize("kind", [int, str])
def test_a_user_id_is_any_bigint_as_a_number_or_in_digits(number: int, kind: type) -> None:
    record = envelope("c", None, row(kind(number), login="a", avatar_url=None))
    assert decode(key(number), record) == upsert("c", user_id=number, login="a", avatar_url=None)
    assert decode(key(number), envelope("d", {"user_id": kind(number)}, None)) == delete(str(number))
    assert decode(key(str(number)), None).key == str(number)


def test_unavailable_fields_are_absent_and_the_others_keep_their_order() -> None:
    record = envelope("u", row(), row(gravatar_id=UNAVAILABLE, login="b"))
    change = decode(key(), record)
    assert change == upsert("u", login="b", gravatar_id=UNAVAILABLE)
    assert change.user is not None
    assert list(change.user) == ["user_id", "login", "avatar_url", "url"]


def test_the_placeholder_is_the_connectors() -> None:
    record = envelope("u", row(), row(login="?", gravatar_id=UNAVAILABLE))
    assert ChangeDecoder("?").decode(key(), record).user == {
        name: value for name, value in row(login="?", gravatar_id=UNAVAILABLE).items() if name != "login"
    } | {"user_id": "1"}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_unknown_columns_are_listed_and_left_out(wrap: str) -> None:
    decoder = ChangeDecoder()
    strange: dict[str, Any] = {"created": 1.5, "tags": ["x"], "$set": {"a": None}, "payload": 1, "op": "c"}
    for _ in range(2):
        change = decoder.decode(key(), envelope("c", None, row() | strange, wrap=wrap))
        assert change == upsert("c", unknown=("created", "tags", "$set", "payload", "op"))
        assert decoder.decode(key(), envelope("u", row(), row(login="b"), wrap=wrap)) == upsert("u", login="b")


def test_columns_in_another_order_make_a_user_in_its_own_order() -> None:
    change = decode(key(), envelope("c", None, dict(reversed(row().items()))))
    assert change.user is not None
    assert tuple(change.user) == USER_FIELDS


ODD_TEXTS = {
    "empty": "",
    "NUL": "a\0b",
    "line separator": "a\u2028b\u2029",
    "operator": "$set",
    "path": "a.b.$[].c",
    "long": "x" * 2_000,
    "emoji": "\U0001f642",
    "quotes": '"\\/\b\f\n\r\t',
    "highest": "\U0010ffff\uffff\ufffe",
    "right to left": "\u202eabc",
    "number": "12",
    "null in words": "null",
    "JSON": '{"user_id":2}',
    "almost the placeholder": f"{UNAVAILABLE} ",
}


@pytest.mark.parametrize("text", ODD_TEXTS.values(), ids=ODD_TEXTS.keys())
@pytest.mark.parametrize("ascii_only", [True, False], ids=["escaped", "as it is"])
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_text_is_data(text: str, ascii_only: bool, wrap: str) -> None:
    record = json.loads(envelope("u", row(url=text), row(login=text, url=text), wrap=wrap))
    assert decode(key(), dump(record, ascii_only=ascii_only)) == upsert("u", login=text, url=text)


def test_null_is_data_too() -> None:
    nulls = {"login": None, "gravatar_id": None, "avatar_url": None, "url": None}
    assert decode(key(), envelope("c", None, row() | nulls)).user == {"user_id": "1"} | nulls


def test_blanks_around_json_mean_nothing() -> None:
    value, number = envelope("c", None, row(), wrap="schema"), key(1, "schema")
    pretty = json.dumps(json.loads(value), indent=2).encode() + b"\n"
    decoder = ChangeDecoder()
    for one in (value, pretty, value, b" " + value, value + b" "):
        assert decoder.decode(b" " + number + b"\n", one) == upsert("c")


@pytest.mark.parametrize("place", [b'"login":"octo"', b'"op":"c"'])
def test_a_member_that_stands_twice_counts_as_its_last(place: bytes) -> None:
    name, _, _ = place.partition(b":")
    for first in (b'"first"', b"5"):
        record = envelope("c", None, row()).replace(place, name + b":" + first + b"," + place)
        assert decode(key(), record) == upsert("c")


# flattened rows


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_flattened_rows_are_upserts_and_deletes(wrap: str) -> None:
    decoder = ChangeDecoder()
    for _ in range(2):
        assert decoder.decode(key(), flattened(row(), wrap=wrap)) == upsert("row", at=NOWHERE)
        assert decoder.decode(key(), flattened(row(), wrap=wrap, deleted="false")) == upsert("row", at=NOWHERE)
        assert decoder.decode(key(), flattened(row(), wrap=wrap, deleted="true")) == delete(at=NOWHERE)


@pytest.mark.parametrize("prefix", ["", "source_"])
def test_flattened_metadata_tells_operation_time_and_place(prefix: str) -> None:
    told = {name: source()[name] for name in ("server_id", "gtid", "file", "pos", "row", "snapshot")}
    place = {f"{prefix}{name}": value for name, value in told.items()}
    metadata: dict[str, Any] = place | {"source_ts_ms": AT[0], "table": "Users", "ts_ms": 9}
    assert decode(key(), flattened(row(), op="u", deleted="false", **metadata)) == upsert("u")
    assert decode(key(), flattened(row(), op="d", deleted="true", **metadata)) == delete()
    assert decode(key(), flattened(row(), op="r", deleted="false", **metadata)) == upsert("r", at=NOWHERE)
    metadata[f"{prefix}snapshot"] = "last"
    assert decode(key(), flattened(row(), op="c", **metadata)) == upsert("c", at=NOWHERE)


def test_a_flattened_delete_needs_only_its_key_or_its_user_id() -> None:
    assert decode(key(4), dump({"__deleted": "true"})) == delete("4", at=NOWHERE)
    assert decode(None, dump({"user_id": 4, "__deleted": True})) == delete("4", at=NOWHERE)
    assert decode(key(4), dump({"user_id": 4, "__op": "d"})) == delete("4", at=NOWHERE)


def test_flattened_rows_may_have_unknown_columns_and_unavailable_fields() -> None:
    change = decode(key(), flattened(row(extra=1, op="x", payload=2, url=UNAVAILABLE), deleted="false"))
    assert change == upsert("row", at=NOWHERE, unknown=("extra", "op", "payload"), url=UNAVAILABLE)


# what is no change of a row

BYSTANDERS: dict[str, tuple[Any, Any]] = {
    "heartbeat": ({"serverName": "mysql-server"}, {"ts_ms": 1_700_000_000_000}),
    "schema-change": (
        {"databaseName": "new_data"},
        {
            "source": source(),
            "ts_ms": 1,
            "databaseName": "new_data",
            "schemaName": None,
            "ddl": "ALTER TABLE Users ADD COLUMN x INT",
            "tableChanges": [],
        },
    ),
    "transaction": (
        {"id": "file=mysql-bin.000003,pos=484"},
        {"status": "BEGIN", "id": "x", "ts_ms": 1, "event_count": None, "data_collections": None},
    ),
}


@pytest.mark.parametrize("what", BYSTANDERS)
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_messages_that_are_no_changes_are_skipped_by_name(what: str, wrap: str) -> None:
    its_key, its_value = BYSTANDERS[what]
    assert decode(wrapped(its_key, wrap), wrapped(its_value, wrap)) == Change(Op.SKIP, None, None, RecordKind(what))


def test_the_end_of_a_transaction_is_skipped() -> None:
    end = {"status": "END", "id": "x", "event_count": 1, "data_collections": []}
    assert decode(b'{"id":"x"}', dump(end)).kind == "transaction"


# what is refused

ROW = dump(row())


def without(name: str) -> dict[str, Any]:
    return {column: value for column, value in row().items() if column != name}


UPPER = {column.upper(): value for column, value in row().items()}
AVRO = b"\x00\x00\x00\x00\x05\x02\x02\x0aocto"
FORMATS = [
    (AVRO, "Avro or Protobuf with the header of a schema registry (schema id 5)"),
    (b"\x00\x00\x00\x01\x00" + dump(row()), "JSON Schema with the header of a schema registry (schema id 256)"),
    (b"\x82\xa2op\xa1c\xa5after\xc0", "MessagePack"),
    (b"\xde\x00\x01\xa2op\xa1c", "MessagePack"),
    (b"\xa1bopac", "CBOR"),
    (b"\x0f\x00\x00\x00\x02op\x00\x02\x00\x00\x00c\x00\x00", "BSON"),
    (gzip.compress(dump(row())), "gzip"),
    (b"\x28\xb5\x2f\xfd\x00", "zstd"),
    (b"\xac\xed\x00\x05sr", "a serialized Java object"),
    (b"Obj\x01\x04", "an Avro file"),
    (b" <event/>", "XML or HTML"),
    (b"Struct{after=Struct{user_id=1},op=c}", "the text of a Connect Struct"),
    (b"\xef\xbb\xbf" + envelope("c", None, row()), "text that begins with a byte order mark"),
    ('{"op":"c"}'.encode("utf-16"), "UTF-16"),
]
CLOUD_EVENT = {
    "id": "name:mysql-server;file:mysql-bin.000003;pos:484",
    "source": "/debezium/mysql/mysql-server",
    "specversion": "1.0",
    "type": "io.debezium.connector.mysql.DataChangeEvent",
    "datacontenttype": "application/json",
    "iodebeziumop": "c",
    "data": {"before": None, "after": row()},
}


def under_schema(columns: dict[str, Any], *, op: str = "c", flat: bool = False, **types: str) -> bytes:
    """Return a record whose schema declares the types of its columns; a string where none is given."""
    fields = [{"type": types.get(name, "string"), "optional": True, "field": name} for name in columns]
    if flat:
        schema: dict[str, Any] = {"type": "struct", "fields": fields}
        return dump({"schema": schema, "payload": columns})
    images = [{"type": "struct", "fields": fields, "field": name} for name in ("before", "after")]
    before, after = (columns, None) if op == "d" else (None, columns)
    schema = {"type": "struct", "fields": [*images, {"type": "string", "field": "op"}]}
    return dump({"schema": schema, "payload": {"before": before, "after": after, "op": op}})


BYTES_KEY = dump(
    {
        "schema": {"type": "struct", "fields": [{"type": "bytes", "field": "user_id"}]},
        "payload": {"user_id": "1234"},
    }
)
REFUSED: list[tuple[Refusal, bytes | None, bytes | None, str]] = [
    (
        Refusal.NOT_UTF8,
        key(),
        envelope("c", None, row(login="@")).replace(b"@", b"\xff"),
        "value is not UTF-8 from byte",
    ),
    (Refusal.NOT_UTF8, key(), envelope("u", row(login="@"), row()).replace(b"@", b"\xff"), "value is not UTF-8"),
    (Refusal.NOT_UTF8, key(), b"\xed\xa0\x80", "from byte 0"),
    *((Refusal.OTHER_FORMAT, key(), value, name) for value, name in FORMATS),
    (Refusal.OTHER_FORMAT, key(), dump(CLOUD_EVENT), "a CloudEvent"),
    (Refusal.OTHER_FORMAT, key(), wrapped(CLOUD_EVENT, "schema"), "a CloudEvent"),
    (Refusal.NOT_JSON, key(), b" ", "truncated"),
    (Refusal.NOT_JSON, key(), b"not json", "no JSON"),
    (Refusal.NOT_JSON, key(), b"\x00\x00\x00\x00", "no JSON"),
    (Refusal.NOT_JSON, key(), envelope("c", None, row())[:-1], "truncated"),
    (Refusal.NOT_JSON, key(), envelope("c", None, row()) * 2, "trailing"),
    (Refusal.NOT_JSON, key(), b'{"op":NaN}', "no JSON"),
    (Refusal.NOT_JSON, key(), b"[" * 100_000, "nested too deeply"),
    (Refusal.BAD_TEXT, key(), envelope("c", None, row(login="@")).replace(b"@", b"\\ud800"), "surrogate"),
    (Refusal.BAD_TEXT, key(), envelope("c", None, row(url="@")).replace(b"@", b"\\udc00 "), "surrogate"),
    (Refusal.NOT_AN_EVENT, key(), b"[]", "a JSON object, got an array"),
    (Refusal.NOT_AN_EVENT, key(), b"5", "got a number"),
    (Refusal.NOT_AN_EVENT, key(), b"1.5", "got a number with a fraction"),
    (Refusal.NOT_AN_EVENT, key(), b"true", "got true or false"),
    (Refusal.NOT_AN_EVENT, key(), b'"{}"', "got a string"),
    (Refusal.NOT_AN_EVENT, key(), b"{}", "but nothing"),
    (Refusal.NOT_AN_EVENT, key(), b'{"payload":{"payload":{}}}', 'but "payload"'),
    (Refusal.NOT_AN_EVENT, key(), dump(without("user_id")), 'but "login"'),
    (Refusal.NOT_AN_EVENT, key(), b'{"schema":{"type":"struct"}}', 'but "schema"'),
    (Refusal.NOT_AN_EVENT, key(), b'{"ts_ms":1,"x":2}', 'but "ts_ms", "x"'),
    (Refusal.NOT_AN_EVENT, key(), dump({str(n): n for n in range(20)}), '"7", ...'),
    (Refusal.UNKNOWN_OP, key(), envelope("x", None, row()), 'got "x"'),
    (Refusal.UNKNOWN_OP, key(), envelope("m", None, None), 'got "m"'),
    (Refusal.UNKNOWN_OP, key(), envelope("C", None, row()), 'got "C"'),
    (Refusal.UNKNOWN_OP, key(), envelope(None, None, row()), "got null"),
    (Refusal.UNKNOWN_OP, key(), envelope(["c"], None, row()), "got an array"),
    (Refusal.UNKNOWN_OP, key(), flattened(row(), op="t"), '__op must be one of c, u, d and r, got "t"'),
    (Refusal.UNKNOWN_OP, key(), flattened(row(), op=["c"]), "__op"),
    (Refusal.UNKNOWN_OP, key(), b'{"user_id":1,"__op":' + b"[" * 900 + b"]" * 900 + b"}", "got an array"),
    (Refusal.CONTRADICTION, key(), b'{"user_id":1,"__deleted":' + b"[" * 900 + b"]" * 900 + b"}", "got an array"),
    (Refusal.MISSING_ROW, key(), envelope("c", None, None), "after must be the row that op c leaves, got null"),
    (Refusal.MISSING_ROW, key(), envelope("u", row(), None), "op u"),
    (Refusal.MISSING_ROW, key(), envelope("r", None, [1]), "got an array"),
    *(
        (Refusal.MISSING_COLUMN, key(), envelope("c", None, without(name)), f"after lacks {name}.")
        for name in USER_FIELDS
    ),
    (Refusal.MISSING_COLUMN, key(), envelope("c", None, {}), "user_id, login, gravatar_id, avatar_url, url"),
    (Refusal.MISSING_COLUMN, key(), dump(without("url")), "The row lacks url."),
    (Refusal.COLUMN_CASE, key(), envelope("c", None, UPPER), 'after has "USER_ID", "LOGIN", "GRAVATAR_ID"'),
    (Refusal.COLUMN_CASE, key(), envelope("c", None, without("url") | {"Url": ""}), 'after has "Url" in place'),
    (Refusal.COLUMN_CASE, key(), flattened(without("login") | {"LOGIN": ""}), 'The row has "LOGIN" in place'),
    (Refusal.COLUMN_CASE, dump({"USER_ID": 1}), flattened(UPPER), 'The row has "USER_ID"'),
    (Refusal.COLUMN_CASE, dump({"USER_ID": 1}), None, 'The record\'s key has "USER_ID" in place'),
    (Refusal.COLUMN_CASE, dump({"USER_ID": 1}), envelope("d", UPPER, None), "The record's key has"),
    *(
        (Refusal.BAD_COLUMN, key(), envelope("u", None, row() | {name: 5}), f"after.{name} must be a string or null")
        for name in USER_FIELDS[1:]
    ),
    (Refusal.BAD_COLUMN, key(), envelope("c", None, row(login=True)), "got true or false"),
    (Refusal.BAD_COLUMN, key(), envelope("c", None, row(login={"$gt": ""})), "got an object"),
    (Refusal.BAD_COLUMN, key(), flattened(row(url=["a"])), "url must be a string or null, got an array"),
    (
        Refusal.BAD_COLUMN,
        key(),
        under_schema(row("1", "b2N0bw=="), login="bytes"),
        "schema declares after.login as bytes",
    ),
    (Refusal.BAD_COLUMN, key(), under_schema(row(), flat=True, url="bytes"), "schema declares url as bytes"),
    (Refusal.BAD_USER_ID, None, under_schema(row("1234"), user_id="bytes"), "schema declares after.user_id as bytes"),
    (Refusal.BAD_USER_ID, None, under_schema(row("1234"), op="d", user_id="bytes"), "declares before.user_id as bytes"),
    (Refusal.BAD_USER_ID, BYTES_KEY, None, "The schema of the record's key declares user_id as bytes"),
    (Refusal.BAD_USER_ID, key(), envelope("c", None, row(None)), "after.user_id must be a whole number, got null"),
    (Refusal.BAD_USER_ID, key(), envelope("c", None, row(1.0)), "got a number with a fraction"),
    (Refusal.BAD_USER_ID, key(), envelope("c", None, row(True)), "got true or false"),
    (Refusal.BAD_USER_ID, key(), envelope("c", None, row([1])), "got an array"),
    (Refusal.BAD_USER_ID, key(), envelope("c", None, row(2**63)), "must lie within"),
    (Refusal.BAD_USER_ID, key(), envelope("c", None, row(-(2**63) - 1)), "must lie within"),
    (Refusal.BAD_USER_ID, key(), envelope("c", None, row(10**400)), "must lie within"),
    (Refusal.BAD_USER_ID, key(), envelope("c", None, row(str(2**63))), "must lie within"),
    (Refusal.BAD_USER_ID, key(), envelope("c", None, row("9" * 5_000)), "must lie within"),
    (Refusal.BAD_USER_ID, key(), envelope("c", None, row("1e5")), 'got "1e5"'),
    (Refusal.BAD_USER_ID, key(), envelope("c", None, row("007")), 'leading zeros or a plus, got "007"'),
    (Refusal.BAD_USER_ID, key(), envelope("c", None, row("-0")), "leading zeros"),
    (Refusal.BAD_USER_ID, key(), envelope("c", None, row("+1")), "plus"),
    (Refusal.BAD_USER_ID, key(), envelope("c", None, row("1\n")), "decimal digits"),
    (Refusal.BAD_USER_ID, key(), envelope("c", None, row("\u0661")), "decimal digits"),
    (Refusal.BAD_USER_ID, key(), envelope("c", None, row("")), 'got ""'),
    (Refusal.BAD_USER_ID, key(), envelope("c", None, row(UNAVAILABLE)), UNAVAILABLE),
    (Refusal.BAD_USER_ID, key(), envelope("d", row(None), None), "before.user_id"),
    (Refusal.BAD_USER_ID, key(), envelope("u", row("x"), row()), "before.user_id"),
    (Refusal.BAD_USER_ID, key(), flattened(row(1.5), deleted="true"), "user_id must be"),
    (Refusal.BAD_USER_ID, b"1.5", None, "The user_id of the record's key must be a whole number"),
    (Refusal.BAD_USER_ID, b'{"user_id":null}', None, "key must be a whole number, got null"),
    (Refusal.BAD_USER_ID, b'"x"', None, 'got "x"'),
    (Refusal.BAD_USER_ID, b"9223372036854775808", None, "key must lie within"),
    (Refusal.BAD_KEY, b"id=1", None, "The key is no JSON"),
    (Refusal.BAD_KEY, b"Struct{user_id=1}", None, "The key looks like the text of a Connect Struct"),
    (Refusal.BAD_KEY, b"Struct{user_id=1}", envelope("c", None, row()), "The key looks like the text"),
    (Refusal.BAD_KEY, AVRO, envelope("c", None, row()), "The key looks like Avro or Protobuf"),
    (Refusal.BAD_KEY, b"\xff", envelope("c", None, row()), "The key is not UTF-8 from byte 0"),
    (Refusal.BAD_KEY, b'{"id":1}', envelope("u", row(), row()), 'The record\'s key has no user_id, but "id"'),
    (Refusal.BAD_KEY, b'{"schema":{},"payload":{"id":1}}', envelope("d", row(), None), "has no user_id"),
    *((Refusal.MISSING_KEY, no_key, tombstone, "a tombstone") for no_key in NO_KEYS for tombstone in TOMBSTONES),
    (Refusal.MISSING_KEY, None, envelope("d", None, None), "The record is a delete without a key"),
    (Refusal.MISSING_KEY, b"", dump({"__deleted": "true"}), "a delete without a key"),
    (Refusal.KEY_MISMATCH, key(2), envelope("c", None, row(1)), "key names user 2, its row user 1"),
    (Refusal.KEY_MISMATCH, key(11), envelope("u", row(1), row(1)), "key names user 11, its row user 1"),
    (Refusal.KEY_MISMATCH, key(2, "schema"), envelope("r", None, row(1), wrap="schema"), "user 2"),
    (Refusal.KEY_MISMATCH, key(2), envelope("d", row(1), None), "user 2"),
    (Refusal.KEY_MISMATCH, key(2), flattened(row(1)), "user 2"),
    (Refusal.KEY_MISMATCH, key(2), flattened(row(1), deleted="true"), "user 2"),
    (Refusal.KEY_CHANGED, key(2), envelope("u", row(1), row(2)), "from 1 to 2"),
    (Refusal.KEY_CHANGED, key(2), envelope("u", row("1"), row(2)), "from 1 to 2"),
    (Refusal.CONTRADICTION, key(), flattened(row(), deleted="maybe"), 'got "maybe"'),
    (Refusal.CONTRADICTION, key(), flattened(row(), deleted=1), "must be true or false, got 1"),
    (Refusal.CONTRADICTION, key(), flattened(row(), deleted=["true"]), "must be true or false"),
    (Refusal.CONTRADICTION, key(), flattened(row(), deleted="true", op="u"), '__deleted is true, but __op is "u"'),
    (Refusal.CONTRADICTION, key(), flattened(row(), deleted="false", op="d"), "__deleted is false"),
]


@pytest.mark.parametrize(
    ("refusal", "its_key", "value", "words"),
    REFUSED,
    ids=[f"{place}-{refusal.kind}" for place, (refusal, *_) in enumerate(REFUSED)],
)
def test_what_is_refused_is_named_and_explained(
    refusal: Refusal, its_key: bytes | None, value: bytes | None, words: str
) -> None:
    with pytest.raises(UndecodableError) as caught:
        decode(its_key, value)
    error = caught.value
    assert error.kind == refusal.kind
    assert words in error.message
    assert error.message.endswith(".")
    assert error.way_out == refusal.way_out
    assert len(error.message) < 500


def test_each_reason_to_refuse_has_an_example() -> None:
    assert {refusal for refusal, *_ in REFUSED} == set(Refusal)


def test_the_kinds_are_distinct_slugs() -> None:
    kinds = [refusal.kind for refusal in Refusal]
    assert len(set(kinds)) == len(kinds)
    assert all(kind == kind.lower() and " " not in kind for kind in kinds)


def test_the_documentation_lists_each_kind_in_the_same_words() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "dead-letters.md").read_text()
    for refusal in Refusal:
        assert f"| `{refusal.kind}` | {refusal.words} |" in page


def test_a_refusal_is_permanent_and_travels_between_processes() -> None:
    error = Refusal.BAD_KEY.error("It is odd.")
    assert isinstance(error, PermanentError)
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301  our own bytes
    assert (type(copy), copy.kind, str(copy)) == (UndecodableError, "bad-key", str(error))


def test_a_refused_record_leaves_the_decoder_as_good_as_new() -> None:
    decoder = ChangeDecoder()
    good = [
        (key(4, "schema"), envelope("u", row(4), row(4, "b"), wrap="schema")),
        (key(4), envelope("d", row(4), None)),
    ]
    for _, its_key, value, _ in REFUSED:
        with pytest.raises(UndecodableError):
            decoder.decode(its_key, value)
        for one_key, one_value in good:
            assert decoder.decode(one_key, one_value) == decode(one_key, one_value)


def test_a_column_that_the_schema_declares_as_bytes_may_be_null() -> None:
    decoder = ChangeDecoder()
    for _ in range(2):
        change = decoder.decode(key(), under_schema(row(url=None), url="bytes"))
        assert change == upsert("c", at=NOWHERE, url=None)
        # What is remembered of a schema holds for that schema only.
        with pytest.raises(UndecodableError, match="as bytes"):
            decoder.decode(key(), under_schema(row(), url="bytes"))
        assert decoder.decode(key(), under_schema(row())) == upsert("c", at=NOWHERE)


@pytest.mark.parametrize("its_key", [None, b"", b"null", dump({"schema": None, "payload": None})])
def test_an_absent_key_is_told_in_each_form(its_key: bytes | None) -> None:
    assert ChangeDecoder().is_keyless(its_key)
    assert not ChangeDecoder().is_keyless(key())
    assert not ChangeDecoder().is_keyless(b"?")


# laws

BIGINTS = st.integers(-(2**63), 2**63 - 1)
TEXTS = st.none() | st.text(max_size=20) | st.sampled_from([*ODD_TEXTS.values(), UNAVAILABLE])
ROWS: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {"user_id": st.integers(-3, 12) | BIGINTS, "login": TEXTS, "gravatar_id": TEXTS, "avatar_url": TEXTS, "url": TEXTS},
    optional={"extra": st.integers(), "op": TEXTS, "payload": TEXTS},
)
PLACES = st.builds(
    Position,
    st.integers(0, 10**7),
    st.integers(0, 2**40),
    st.integers(0, 9),
    st.sampled_from(["", "1/mysql-bin", "2/mysql-bin"]),
    st.sampled_from([None, "0-1-7", GTID]),
)
TIMES = st.integers(1, 2**42)


def text_of(change: Change) -> dict[str, Any]:
    """Turn a change's user back into a row."""
    assert change.user is not None
    columns = {name: change.user.get(name, UNAVAILABLE) for name in USER_FIELDS}
    return columns | dict.fromkeys(change.unknown_columns, 1)


@st.composite
def changes(draw: st.DrawFn) -> Change:
    what = draw(st.sampled_from(["c", "u", "r", "row", "d", "t", "tombstone", "heartbeat"]))
    at = NOWHERE if what in ("r", "tombstone", "heartbeat") else (draw(TIMES), draw(PLACES))
    if what == "t":
        return Change(Op.TRUNCATE, None, None, RecordKind(what), *at)
    if what == "heartbeat":
        return Change(Op.SKIP, None, None, RecordKind(what))
    columns = draw(ROWS)
    number = str(columns["user_id"])
    if what in ("d", "tombstone"):
        return Change(Op.DELETE, number, None, RecordKind(what), *at)
    texts = {name: columns[name] for name in USER_FIELDS[1:] if columns[name] != UNAVAILABLE}
    unknown = tuple(name for name in columns if name not in USER_FIELDS)
    return Change(Op.UPSERT, number, {"user_id": number} | texts, RecordKind(what), at[0], at[1], unknown)


@st.composite
def encoded(draw: st.DrawFn, change: Change) -> tuple[bytes | None, bytes | None]:
    """Write a change in any form that can say it."""
    if change.op is Op.SKIP:
        its_key, its_value = BYSTANDERS[change.kind]
        return dump(its_key), wrapped(its_value, draw(st.sampled_from(WRAPPERS)))
    wrap = draw(st.sampled_from(WRAPPERS))
    place = {}
    if change.position is not None:
        position = change.position
        place = {"file": f"mysql-bin.{position.file:06d}", "pos": position.pos, "row": position.row}
        place |= {"server_id": int(position.server.partition("/")[0] or 0), "gtid": position.gtid}
    snapshot = draw(st.sampled_from(["first", "true", "last", "incremental"])) if change.kind == "r" else "false"
    its_source = source(snapshot, change.committed_ms or 0) | place
    if change.op is Op.TRUNCATE:
        return draw(st.sampled_from(NO_KEYS)), envelope("t", None, None, wrap=wrap, source=its_source)
    assert change.key is not None
    form = draw(st.sampled_from(KEY_FORMS))
    its_key = key(int(change.key) if draw(st.booleans()) or form == "number" else change.key, form)
    if change.kind == "tombstone":
        return its_key, draw(st.sampled_from(TOMBSTONES))
    columns = text_of(change) if change.op is Op.UPSERT else row(change.key)
    if draw(st.booleans()):
        columns["user_id"] = int(columns["user_id"])
    if change.kind == "row" or draw(st.booleans()):
        metadata: dict[str, Any] = {f"source_{name}": value for name, value in its_source.items()}
        if change.kind != "row":
            metadata["op"] = change.kind
        deleted = change.op is Op.DELETE
        metadata["deleted"] = draw(st.sampled_from([deleted, str(deleted).lower()]))
        return its_key, flattened(columns, wrap=wrap, **metadata)
    before = draw(st.sampled_from([None, row(change.key), columns]))
    if change.op is Op.DELETE:
        return its_key, envelope("d", before, None, wrap=wrap, source=its_source)
    return its_key, envelope(change.kind, before, columns, wrap=wrap, source=its_source)


@settings(max_examples=500)
@given(st.data())
def test_decoding_what_was_encoded_gives_the_change_again(data: st.DataObject) -> None:
    decoder = ChangeDecoder()
    for change in data.draw(st.lists(changes(), min_size=1, max_size=6)):
        record = data.draw(encoded(change))
        assert decode(*record) == change
        assert decoder.decode(*record) == change


def outcome(decoder: ChangeDecoder, its_key: bytes | None, value: bytes | None) -> Change | tuple[str, str]:
    try:
        return decoder.decode(its_key, value)
    except UndecodableError as error:
        return error.kind, error.message


class Unhurried(ChangeDecoder):
    """A decoder that never takes the typed way."""

    def decode(self, key: bytes | None, value: bytes | None) -> Change:
        """Take the other way at once."""
        return self._decode_any(key, value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda part: st.lists(part, max_size=3) | st.dictionaries(TEXTS.filter(bool), part, max_size=3),
    max_leaves=5,
)
ODD_MEMBERS: st.SearchStrategy[dict[str, Any]] = st.dictionaries(
    st.sampled_from(["op", "before", "after", "source", "user_id", "payload", "schema", "__deleted", "__op"]), JSON
)
ODD_ROWS = st.dictionaries(st.sampled_from(USER_FIELDS), JSON, max_size=3)


@st.composite
def odd_records(draw: st.DrawFn) -> tuple[bytes | None, bytes | None]:
    """Draw records that are nearly right, or not at all."""
    its_key, value = draw(changes().flatmap(encoded))
    kind = draw(st.sampled_from(["members", "rows", "cut", "bytes", "other key", "as it is"]))
    if kind == "members":
        value = dump(json.loads(envelope("u", row(), row())) | draw(ODD_MEMBERS))
    elif kind == "rows":
        value = envelope(draw(st.sampled_from("curd")), row() | draw(ODD_ROWS), row() | draw(ODD_ROWS))
    elif kind == "cut" and value:
        value = value[: draw(st.integers(0, len(value)))]
    elif kind == "bytes" and value:
        place = draw(st.integers(0, len(value)))
        value = value[:place] + draw(st.binary(max_size=3)) + value[place + draw(st.integers(0, 2)) :]
    elif kind == "other key":
        its_key = draw(st.none() | st.binary(max_size=12) | JSON.map(dump))
    return its_key, value


@settings(max_examples=1_000)
@given(st.lists(odd_records(), min_size=1, max_size=4))
def test_decoding_is_total_and_depends_on_nothing_but_the_record(
    records: list[tuple[bytes | None, bytes | None]],
) -> None:
    decoder = ChangeDecoder()
    for record in records:
        found = outcome(decoder, *record)
        assert found == outcome(ChangeDecoder(), *record)
        assert found == outcome(Unhurried(), *record)


@settings(max_examples=300)
@given(st.none() | st.binary(max_size=40), st.none() | st.binary(max_size=60))
def test_any_bytes_are_a_change_or_refused(its_key: bytes | None, value: bytes | None) -> None:
    found = outcome(ChangeDecoder(), its_key, value)
    assert isinstance(found, Change) or found[0] in {refusal.kind for refusal in Refusal}


@settings(max_examples=300)
@given(changes(), st.data())
def test_every_upsert_keeps_the_contract(change: Change, data: st.DataObject) -> None:
    found = decode(*data.draw(encoded(change)))
    if found.user is not None:
        assert list(found.user) == [name for name in USER_FIELDS if name in found.user]
        assert found.user["user_id"] == found.key
        assert -(2**63) <= int(found.key or "x") < 2**63
        assert all(value is None or value.encode() is not None for value in found.user.values())
