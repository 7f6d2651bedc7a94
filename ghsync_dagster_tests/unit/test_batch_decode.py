"""A tombstone without a key: skipped right after the delete it belongs to, a dead letter anywhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest
from confluent_kafka import Message

from ghsync_dagster.cdc.stream.batch import Batch, RecordDecoder
from ghsync_dagster.domain.change import RecordKind
from ghsync_dagster.domain.envelope import Refusal
from ghsync_dagster.domain.errors import UnavailableError, UndecodableError
from ghsync_dagster.stores.kafka import topics as kafka_topics
from ghsync_dagster_tests.support.builders import change, row
from ghsync_dagster_tests.support.envelopes import NO_KEYS, TOMBSTONES, dump, envelope, flattened, key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ghsync_dagster.cdc.stream.batch import Decoded
    from ghsync_dagster.stores.kafka.client import KafkaSettings

KAFKA = cast("KafkaSettings", object())
SKIPPED = change(kind=RecordKind.KEYLESS_TOMBSTONE)
DELETE = (None, envelope("d", row(1), None))
TOMBSTONE = (None, None)


def record(offset: int, pair: tuple[bytes | None, bytes | None], partition: int = 0) -> Message:
    return Message(topic="changes", partition=partition, offset=offset, key=pair[0], value=pair[1])


def told(decoded: Sequence[Decoded]) -> list[str]:
    """Say what each record is: what a change was, or the kind of a refusal."""
    return [change.kind for change in decoded]


class Stored:
    """A partition that can be read again, and what was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *records: Message, away: bool = False) -> None:
        self.asked: list[tuple[int, int, int]] = []
        self._records = records
        self._away = away
        monkeypatch.setattr(kafka_topics, "read_range", self._read)

    def _read(self, _: Any, partition: int, start: int, stop: int) -> list[Message]:
        self.asked.append((partition, start, stop))
        if self._away:
            raise UnavailableError("The broker is away.", way_out="Wait.")
        return [
            found for found in self._records if found.partition() == partition and start <= (found.offset() or 0) < stop
        ]


@pytest.mark.parametrize("no_key", NO_KEYS)
@pytest.mark.parametrize("tombstone", TOMBSTONES)
@pytest.mark.parametrize(
    "delete",
    [envelope("d", row(1), None), flattened(row(1), deleted="true"), envelope("d", row(1), None, wrap="schema")],
    ids=["envelope", "flattened", "with its schema"],
)
def test_it_is_skipped_right_after_a_delete_without_a_key(
    no_key: bytes | None, tombstone: bytes | None, delete: bytes
) -> None:
    records = [record(4, (no_key, delete)), record(5, (no_key, tombstone))]
    decoded = RecordDecoder().decode(records)
    assert told(decoded) == ["d", "keyless-tombstone"]
    assert decoded[1] == SKIPPED
    batch = Batch()
    batch.add(records, decoded)
    assert not batch.undecodable()
    assert [part.segment.changes.keys() for part in batch.parts()] == [{"1"}]


@pytest.mark.parametrize(
    "before",
    [
        (None, envelope("c", None, row(1))),
        (key(), envelope("d", row(1), None)),
        (None, envelope("t", None, None)),
        (None, envelope("d", None, None)),
        (None, dump({"ts_ms": 1})),
        (None, b"?"),
        (b"?", envelope("d", row(1), None)),
        TOMBSTONE,
    ],
)
def test_it_is_a_dead_letter_after_anything_else(before: tuple[bytes | None, bytes | None]) -> None:
    decoded = RecordDecoder().decode([record(4, before), record(5, TOMBSTONE)])
    assert told(decoded)[1] == Refusal.MISSING_KEY.kind


def test_a_second_one_is_a_dead_letter() -> None:
    decoded = RecordDecoder().decode([record(4, DELETE), record(5, TOMBSTONE), record(6, TOMBSTONE)])
    assert told(decoded) == ["d", "keyless-tombstone", Refusal.MISSING_KEY.kind]


def test_a_delete_of_another_partition_or_offset_is_not_its_own() -> None:
    decoder = RecordDecoder()
    decoded = decoder.decode([record(4, DELETE), record(5, TOMBSTONE, partition=1), record(6, TOMBSTONE)])
    assert told(decoded) == ["d", Refusal.MISSING_KEY.kind, Refusal.MISSING_KEY.kind]


def test_records_of_other_partitions_may_come_between() -> None:
    records = [record(4, DELETE), record(9, (key(), envelope("c", None, row())), partition=1), record(5, TOMBSTONE)]
    assert told(RecordDecoder().decode(records)) == ["d", "c", "keyless-tombstone"]


def test_a_border_of_batches_may_come_between() -> None:
    decoder = RecordDecoder()
    assert told(decoder.decode([record(4, DELETE)])) == ["d"]
    assert decoder.decode([]) == []
    assert decoder.decode([record(5, TOMBSTONE)]) == [SKIPPED]


def test_after_a_restart_the_record_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = Stored(monkeypatch, record(4, DELETE), record(6, (key(), None)), record(7, TOMBSTONE))
    assert RecordDecoder(KAFKA).decode([record(5, TOMBSTONE)]) == [SKIPPED]
    assert told(RecordDecoder(KAFKA).decode([record(7, TOMBSTONE)])) == [Refusal.MISSING_KEY.kind]
    assert stored.asked == [(0, 4, 5), (0, 6, 7)]


@pytest.mark.parametrize("away", [False, True])
@pytest.mark.parametrize("offset", [0, 5])
def test_it_is_a_dead_letter_where_the_record_before_it_is_gone(
    monkeypatch: pytest.MonkeyPatch, away: bool, offset: int
) -> None:
    stored = Stored(monkeypatch, away=away)
    (decoded,) = RecordDecoder(KAFKA).decode([record(offset, TOMBSTONE)])
    assert isinstance(decoded, UndecodableError)
    assert stored.asked == ([(0, 4, 5)] if offset else [])


def test_a_delete_without_a_key_that_tells_nobody_stays_a_dead_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = Stored(monkeypatch)
    records = [record(4, DELETE), record(5, (None, envelope("d", None, None)))]
    assert told(RecordDecoder(KAFKA).decode(records)) == ["d", Refusal.MISSING_KEY.kind]
    assert stored.asked == []
