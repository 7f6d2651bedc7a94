"""The probable format of bytes that are no JSON: what Connect's other converters and other producers write.

Belongs here: recognizing a format by its first bytes, for messages only. Not here: reading any of them.
"""

from __future__ import annotations

from typing import Final

_MAGIC: Final = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x04\x22\x4d\x18", "LZ4"),
    (b"\xff\x06\x00\x00sNaPpY", "Snappy"),
    (b"BZh", "bzip2"),
    (b"PK\x03\x04", "a zip archive"),
    (b"PAR1", "Parquet"),
    (b"Obj\x01", "an Avro file"),
    (b"\xc3\x01", "Avro in the single-object encoding"),
    (b"\xac\xed\x00\x05", "a serialized Java object"),
    (b"\xd9\xd9\xf7", "CBOR"),
    (b"\xef\xbb\xbf", "text that begins with a byte order mark"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
    (b"Struct{", "the text of a Connect Struct, as StringConverter writes it"),
)
_REGISTRY_HEADER: Final = 5
_SPACES: Final = b" \t\r\n"


def format_of(raw: bytes) -> str | None:
    """Return the name of the format that bytes without JSON seem to have; None if no known one fits.

    Args:
        raw: The bytes, whole.
    """
    for magic, name in _MAGIC:
        if raw.startswith(magic):
            return name
    if raw[:1] == b"\0" and len(raw) > _REGISTRY_HEADER:
        return _of_registry(raw)
    if len(raw) > _REGISTRY_HEADER and int.from_bytes(raw[:4], "little") == len(raw) and raw.endswith(b"\0"):
        return "BSON"
    text = raw.lstrip(_SPACES)
    if text.startswith(b"<"):
        return "XML or HTML"
    # A map begins with one of these bytes, and no text in UTF-8 does.
    first = raw[0] if raw else 0
    if 0x80 <= first <= 0x8F or first in (0xDE, 0xDF):
        return "MessagePack"
    return "CBOR" if 0xA0 <= first <= 0xBF else None


def _of_registry(raw: bytes) -> str:
    schema_id = int.from_bytes(raw[1:_REGISTRY_HEADER], "big")
    body = raw[_REGISTRY_HEADER:].lstrip(_SPACES)
    format_name = "JSON Schema" if body[:1] in (b"{", b"[") else "Avro or Protobuf"
    return f"{format_name} with the header of a schema registry (schema id {schema_id})"
