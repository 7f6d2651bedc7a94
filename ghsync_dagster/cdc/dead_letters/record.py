"""A dead letter: a record that could not be applied, as the topic of dead letters holds it.

Belongs here: what a dead letter holds, and how it is written into headers and read from them. Not here: which record
becomes one, and the index.

Key, value and headers are the record's own bytes; ours are further headers, all text in UTF-8, named ``ghsync.*``.
A record may be written twice, when a consumer dies before its offsets are committed: ``ghsync.id`` is the same then.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from ghsync_dagster.domain.letters import letter_id
from ghsync_dagster.logging import redact

if TYPE_CHECKING:
    from confluent_kafka import Message

    from ghsync_dagster.stores.kafka.topics import Headers

_OURS: Final = "ghsync."

_TEXT_LIMIT: Final = 1_000
"""Characters of the reason that are kept: the record itself is there too."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record that could not be applied, and why.

    Attributes:
        topic: The topic that it came from.
        partition: Its partition there.
        offset: Its offset there.
        timestamp_ms: Its Kafka timestamp in milliseconds since 1970 UTC, None where it had none.
        key: Its key.
        value: Its value.
        headers: Its headers.
        kind: The slug of the reason.
        text: The reason in words.
        failed_at: When it was refused, ISO 8601 in UTC.
        place: Partition and offset of the dead letter itself; None before it is written.
    """

    topic: str
    partition: int
    offset: int
    timestamp_ms: int | None
    key: bytes | None
    value: bytes | None
    headers: Headers
    kind: str
    text: str
    failed_at: str
    place: tuple[int, int] | None = None

    @property
    def id(self) -> str:
        """The name of the record: its topic, partition and offset."""
        return letter_id(self.topic, self.partition, self.offset)

    def as_record(self) -> tuple[bytes | None, bytes | None, Headers]:
        """Return key, value and headers as they are written."""
        ours = {
            "topic": self.topic,
            "partition": str(self.partition),
            "offset": str(self.offset),
            "timestamp": "" if self.timestamp_ms is None else str(self.timestamp_ms),
            "error.kind": self.kind,
            "error.text": self.text,
            "failed_at": self.failed_at,
            "id": self.id,
        }
        named: Headers = [(f"{_OURS}{name}", text.encode(errors="replace")) for name, text in ours.items()]
        return self.key, self.value, [*self.headers, *named]

    def as_json(self, *, whole: bool = False) -> dict[str, Any]:
        """Return it as JSON: bytes that are no UTF-8 become escapes; value and headers only if ``whole``."""
        fields: dict[str, Any] = {
            "id": self.id,
            "topic": self.topic,
            "partition": self.partition,
            "offset": self.offset,
            "timestamp_ms": self.timestamp_ms,
            "kind": self.kind,
            "text": self.text,
            "failed_at": self.failed_at,
            "key": _shown(self.key),
        }
        if whole:
            fields |= {"value": _shown(self.value), "headers": [[name, _shown(value)] for name, value in self.headers]}
        return fields


def dead_letter(message: Message, kind: str, text: str) -> DeadLetter:
    """Return the dead letter of a record that was refused.

    Args:
        message: The record.
        kind: The slug of the reason.
        text: The reason in words.
    """
    from ghsync_dagster.stores.kafka.topics import location, timestamp_ms

    partition, offset = location(message)
    return DeadLetter(
        topic=str(message.topic()),
        partition=partition,
        offset=offset,
        timestamp_ms=timestamp_ms(message),
        key=as_bytes(message.key()),
        value=as_bytes(message.value()),
        headers=_headers(message),
        kind=kind,
        text=redact(text)[:_TEXT_LIMIT],
        failed_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
    )


def parse(message: Message) -> DeadLetter | None:
    """Return the dead letter that a record of the dead-letter topic is; None where it is none of ours."""
    from ghsync_dagster.stores.kafka.topics import location

    headers = _headers(message)
    # Ours are the last ones: a record that was a dead letter before brought those of that time.
    first = max((at for at, (name, _) in enumerate(headers) if name == f"{_OURS}topic"), default=len(headers))
    ours = {name.removeprefix(_OURS): _text(value) for name, value in headers[first:]}
    try:
        return DeadLetter(
            topic=ours["topic"],
            partition=int(ours["partition"]),
            offset=int(ours["offset"]),
            timestamp_ms=int(ours["timestamp"]) if ours["timestamp"] else None,
            key=as_bytes(message.key()),
            value=as_bytes(message.value()),
            headers=headers[:first],
            kind=ours["error.kind"],
            text=ours["error.text"],
            failed_at=ours["failed_at"],
            place=location(message),
        )
    except (KeyError, ValueError):
        return None


def _headers(message: Message) -> Headers:
    found = message.headers() or []
    return list(found.items() if isinstance(found, dict) else found)


def as_bytes(value: str | bytes | None) -> bytes | None:
    """Return a key or value, which a client may give as text."""
    return value.encode() if isinstance(value, str) else value


def _text(value: str | bytes | None) -> str:
    return (as_bytes(value) or b"").decode(errors="replace")


def _shown(value: str | bytes | None) -> str | None:
    return None if value is None else (as_bytes(value) or b"").decode(errors="backslashreplace")
