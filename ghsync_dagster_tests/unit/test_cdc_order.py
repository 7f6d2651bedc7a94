"""The first record from after a truncate: found in chunks, as a scan of the whole window finds it."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from confluent_kafka import Message
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ghsync_dagster.cdc.stream import order
from ghsync_dagster.cdc.stream.order import OrderedTruncates, Truncate, first_after
from ghsync_dagster.domain.change import Position
from ghsync_dagster.domain.errors import PermanentError
from ghsync_dagster.stores.kafka import topics as kafka_topics
from ghsync_dagster_tests.support.builders import row
from ghsync_dagster_tests.support.envelopes import envelope, key, source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from ghsync_dagster.cdc.stream.batch import Batch
    from ghsync_dagster.stores.kafka.consumer import TopicConsumer

TOPIC = "changes"
FILE = 3
"""The number of the binlog file that `envelopes.source` names."""

Record = int | str | None
"""A place in the binlog, or what a record without place is; None for an offset that holds no record."""

WITHOUT_PLACE: Mapping[str, tuple[bytes | None, bytes | None]] = {
    "tombstone": (key(), None),
    "incremental": (key(), envelope("r", None, row(), source=source("incremental"))),
    "heartbeat": (None, b'{"ts_ms":1}'),
    "undecodable": (key(), b"{"),
}


def at(pos: int) -> Position:
    """Return the position that `envelopes.source` tells."""
    told = source()
    return Position(FILE, pos, server="223344/mysql-bin", gtid=told["gtid"])


def message(partition: int, offset: int, record: int | str, op: str = "u") -> Message:
    """A record of a user, or a truncate."""
    if isinstance(record, str):
        found_key, value = WITHOUT_PLACE[record]
    elif op == "t":
        found_key, value = None, envelope("t", None, None, source=source(pos=record))
    else:
        found_key, value = key(), envelope(op, row(), None if op == "d" else row(), source=source(pos=record))
    return Message(topic=TOPIC, partition=partition, offset=offset, key=found_key, value=value)


class Reading:
    """A truncate as the only record of partition 0, and partition 1, of which the group has applied all.

    Args:
        pos: The place of the truncate in the binlog.
        end: Where partition 1 ends.
        make: Makes the record at an offset of it.
    """

    def __init__(self, pos: int, end: int, make: Callable[[int], Message]) -> None:
        self.log: list[tuple[int, int] | str] = []
        """What was read of partition 1, and when the consumer polled."""
        self.kept: dict[int, int] = {}
        self._pos = pos
        self._end = end
        self._make = make

    def read_range(self, _: Any, partition: int, start: int, stop: int) -> list[Message]:
        """Stand in for `kafka_topics.read_range`."""
        if partition == 0:
            return [message(0, start, self._pos, "t")]
        self.log.append((start, stop))
        return [self._make(offset) for offset in range(start, stop)]

    def apply(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Apply the truncate."""
        monkeypatch.setattr(kafka_topics, "read_range", self.read_range)
        ends = {0: 1, 1: self._end}
        consumer = SimpleNamespace(
            kafka=SimpleNamespace(topic=TOPIC, group_id="group"),
            partitions=set(ends),
            all_partitions=lambda: sorted(ends),
            offsets=lambda partition: (0, ends[partition]),
            committed=lambda partitions: {partition: {0: 0, 1: self._end}[partition] for partition in partitions},
        )

        def write(batch: Batch) -> None:
            assert len(batch) == 1

        def keep_polling(_: float) -> None:
            self.log.append("poll")

        def record(_partition: int, _offset: int, stops: Mapping[int, int]) -> None:
            self.kept = dict(stops)

        truncates = OrderedTruncates(cast("TopicConsumer", consumer), write, keep_polling, record, wait_seconds=-1)
        truncates.apply(Truncate(TOPIC, 0, 0, at(self._pos)))


def test_a_long_partition_is_read_in_chunks_up_to_the_first_record_from_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reading = Reading(22_000, 60_000, lambda offset: message(1, offset, offset))
    reading.apply(monkeypatch)
    assert reading.kept == {0: 0, 1: 22_001}
    read = [(59_000, 60_000), (50_000, 55_000), *[(start, start + 5_000) for start in range(0, 25_000, 5_000)]]
    # Who does not poll for long is put out of the group.
    assert reading.log == [entry for chunk in read for entry in ("poll", chunk)]


def test_a_tombstone_that_begins_a_chunk_belongs_to_the_delete_that_ends_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    border = 5_000

    def make(offset: int) -> Message:
        if offset == border:
            return message(1, offset, "tombstone")
        return message(1, offset, offset, "d" if offset == border - 1 else "u")

    reading = Reading(border, 10_000, make)
    reading.apply(monkeypatch)
    assert [entry for entry in reading.log if entry != "poll"][1:] == [(0, border), (border, 10_000)]
    assert reading.kept == {0: 0, 1: border + 1}


# against a scan of the whole window

TRUNCATED = 5
RECORDS = st.integers(1, 9) | st.sampled_from([*WITHOUT_PLACE, None])
IN_ORDER = st.lists(st.integers(1, 9), max_size=30).map(sorted)


@st.composite
def partitions(draw: st.DrawFn) -> list[Record]:
    """Draw a partition that is in the order of the binlog but for some records, often none."""
    found: list[Record] = list(draw(IN_ORDER))
    for at, record in draw(st.lists(st.tuples(st.integers(0, 30), RECORDS), max_size=5)):
        found.insert(at, record)
    return found


def by_whole_windows(records: Sequence[Record], low: int, back: int) -> int | str | None:
    """Return what is to be found: the first record from behind, or what a refusal names."""
    high = low + len(records)
    start = max(low, high - back)
    window = [(at, record) for at, record in enumerate(records, low) if at >= start and record is not None]
    placed = [(at, record) for at, record in window if isinstance(record, int)]
    behind = next((at for at, place in placed if place > TRUNCATED), None)
    before = [(at, place) for at, place in placed if behind is None or at < behind]
    for (_, place), (at, later) in pairwise(before):
        if later < place:
            return f"partition 1 offset {at} breaks the order"
    if not before and start > low:
        return by_whole_windows(records, low, back * 10)
    since = before[-1][0] if before else -1
    unsure = [
        at
        for nth, (at, record) in enumerate(window)
        if at > since and (record == "incremental" or (record == "tombstone" and nth == 0))
    ]
    if behind is None or not unsure or unsure[0] > behind:
        return behind
    return f"partition 1 offset {unsure[0]} has no position"


def in_chunks(records: Sequence[Record], low: int, size: int) -> int | str | None:
    """Return what is found, or what a refusal says."""

    def chunks(partition: int, start: int, stop: int) -> Iterator[list[Message]]:
        for at in range(start, stop, size):
            found = [(offset, records[offset - low]) for offset in range(at, min(at + size, stop))]
            yield [message(partition, offset, record) for offset, record in found if record is not None]

    truncate = Truncate(TOPIC, 0, 0, at(TRUNCATED))
    try:
        return first_after(truncate, 1, low, low + len(records), chunks).after
    except PermanentError as error:
        return error.message


@settings(max_examples=1_000)
@given(partitions(), st.integers(0, 2), st.integers(1, 3), st.integers(1, 7))
@example([1, "incremental", 9], 0, 3, 2)
@example([1, "tombstone", 9], 0, 3, 1)
@example(["tombstone", 9], 0, 3, 1)
@example([1, "tombstone", 9, 9], 0, 3, 1)
@example([4, 2, 9], 0, 3, 1)
@example([1, 9, 2, "incremental"], 0, 3, 1)
def test_what_is_found_in_chunks_is_what_the_whole_window_tells(
    records: list[Record], low: int, back: int, size: int
) -> None:
    expected = by_whole_windows(records, low, back)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "_SCAN_BACK", back)
        found = in_chunks(records, low, size)
    if isinstance(expected, str):
        assert isinstance(found, str)
        assert expected in found
    else:
        assert found == expected


def test_a_truncate_without_place_is_refused_before_anything_is_read() -> None:
    read = []

    def chunks(_: int, start: int, stop: int) -> Iterator[list[Message]]:
        read.append((start, stop))
        yield []

    with pytest.raises(PermanentError, match="has no position"):
        first_after(Truncate(TOPIC, 0, 0, None), 1, 0, 10, chunks)
    assert read == []
