"""The workload: a repeatable history whose every change touches one row, sent by a schedule that does not drift."""

from __future__ import annotations

import threading
import time
from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING

import pytest

from ghsync_dagster.dev.workload import (
    DELETE,
    INSERT,
    KEY_CHANGE,
    ODD_TEXTS,
    UPDATE,
    Mix,
    RowChange,
    Workload,
    fresh_base_id,
    plan,
)
from ghsync_dagster.domain.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ghsync_dagster.stores.mysql import Statement

BASE = 5_000_000


class Time(threading.Event):
    """A clock that goes on only while somebody waits: the schedule is tried whatever else the machine does."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def read(self) -> float:
        """Return the seconds."""
        return self.now

    def wait(self, timeout: float | None = None) -> bool:
        """Let the time pass."""
        assert timeout is not None
        self.now += timeout
        return self.is_set()


class CountingTable:
    """Takes statements in place of a server: the schedule is what is tried here."""

    table = "`Users`"

    def __init__(self, seconds: float = 0.0, stall: dict[int, float] | None = None) -> None:
        self.time = Time()
        self.seconds = seconds
        self.stall = stall or {}
        self.sizes: list[int] = []

    def execute(self, statements: Sequence[Statement]) -> int:
        """Take as long as it was told, and touch a row a statement."""
        self.time.wait(self.stall.get(len(self.sizes), self.seconds))
        self.sizes.append(len(statements))
        return len(statements)


def changes(seed: int, count: int, mix: Mix | None = None) -> list[RowChange]:
    """The first changes of a history."""
    return [change for transaction in islice(plan(seed, BASE, mix), count) for change in transaction]


def test_the_same_seed_gives_the_same_history_and_another_seed_another() -> None:
    assert changes(7, 2_000) == changes(7, 2_000)
    assert changes(7, 200) != changes(8, 200)


@pytest.mark.parametrize("seed", range(5))
def test_every_change_is_of_a_row_that_is_there_and_every_new_key_is_free(seed: int) -> None:
    rows: dict[int, dict[str, str | None]] = {}
    for change in changes(seed, 10_000, Mix(rows=500, again=0.5)):
        if change.kind == INSERT:
            assert change.key not in rows
            rows[change.key] = change.fields
        elif change.kind == UPDATE:
            assert change.fields
            rows[change.key] |= change.fields
        elif change.kind == KEY_CHANGE:
            assert change.new_key is not None
            assert change.new_key not in rows
            rows[change.new_key] = rows.pop(change.key)
        else:
            assert change.kind == DELETE
            del rows[change.key]
        assert len(rows) <= 500
    assert rows
    assert all(abs(key) > BASE for key in rows)
    assert all(row["login"] is not None for row in rows.values())


def test_the_history_has_everything_in_it() -> None:
    found = changes(1, 20_000)
    kinds = Counter(change.kind for change in found)
    assert kinds[INSERT] > kinds[DELETE] > kinds[KEY_CHANGE] > 0
    assert kinds[UPDATE] > kinds[DELETE]
    texts = {text for change in found for text in change.fields.values()}
    assert {None, *ODD_TEXTS} <= texts
    assert max(len(text) for text in texts if text is not None) == 255
    assert any(change.key < 0 for change in found)
    deleted = {change.key for change in found if change.kind == DELETE}
    assert any(change.kind == INSERT and change.key in deleted for change in found)
    assert {len(transaction) for transaction in islice(plan(1, BASE), 20_000)} >= {1, 2, 10}


def test_statements_carry_values_apart_from_the_text() -> None:
    odd = "'; DROP TABLE x; -- %s"
    assert RowChange(INSERT, 5, {"login": odd, "url": None}).statement("`t`") == (
        "INSERT INTO `t` (`user_id`, `login`, `url`) VALUES (%s, %s, %s)",
        (5, odd, None),
    )
    assert RowChange(UPDATE, 5, {"login": odd}).statement("`t`") == (
        "UPDATE `t` SET `login` = %s WHERE `user_id` = %s",
        (odd, 5),
    )
    assert RowChange(DELETE, 5).statement("`t`") == ("DELETE FROM `t` WHERE `user_id` = %s", (5,))
    assert RowChange(KEY_CHANGE, 5, new_key=6).statement("`t`") == (
        "UPDATE `t` SET `user_id` = %s WHERE `user_id` = %s",
        (6, 5),
    )


def test_each_run_takes_keys_of_its_own() -> None:
    first = fresh_base_id()
    time.sleep(0.001)
    assert first < fresh_base_id() < 2**62


def scheduled(table: CountingTable, rate: float, longest_transaction: int = 100) -> Workload:
    """A workload that goes by the table's time."""
    return Workload(table, rate=rate, base_id=BASE, longest_transaction=longest_transaction, clock=table.time.read)


def test_the_rate_is_kept() -> None:
    table = CountingTable(seconds=0.0005)
    report = scheduled(table, rate=500).run(changes=1_000, stop=table.time)
    # Due times have no drift: the last of 1,000 changes is due after 1.998 s, and the last transaction before it.
    assert 1.95 < report.seconds < 2.01
    assert report.rate == pytest.approx(500, rel=0.03)
    assert report.missed == 0


def test_a_stall_is_made_up_for() -> None:
    table = CountingTable(stall={100: 0.3})
    report = scheduled(table, rate=1_000, longest_transaction=50).run(changes=1_000, stop=table.time)
    assert 0.95 < report.seconds < 1.01
    assert 0.25 < report.longest_behind_seconds < 0.35
    assert max(table.sizes) >= 50
    assert report.total == sum(table.sizes) == sum(report.changes.values())


def test_a_slow_server_gets_fuller_transactions_and_not_a_lower_rate() -> None:
    table = CountingTable(seconds=0.02)
    report = scheduled(table, rate=1_000).run(seconds=1.0, stop=table.time)
    assert report.rate == pytest.approx(1_000, rel=0.05)
    assert report.transactions == len(table.sizes) < 60


def test_it_ends_after_the_number_of_changes() -> None:
    report = Workload(CountingTable(), rate=1e6, base_id=BASE, mix=Mix(transaction=0)).run(changes=1_234)
    assert report.total == 1_234


def test_it_stops_at_once_when_asked() -> None:
    stop = threading.Event()
    workload = Workload(CountingTable(), rate=0.5, base_id=BASE)
    began = time.monotonic()
    threading.Timer(0.2, stop.set).start()
    report = workload.run(stop=stop)
    # The second change is due after two seconds.
    assert time.monotonic() - began < 1.8
    assert report.total >= 1


def test_progress_can_be_read_meanwhile_and_commits_are_told() -> None:
    told: list[tuple[int, int]] = []
    workload = Workload(
        CountingTable(), rate=400, base_id=BASE, on_commit=lambda batch, at: told.append((len(batch), at))
    )
    thread = threading.Thread(target=lambda: workload.run(seconds=0.6))
    thread.start()
    time.sleep(0.3)
    half = workload.report()
    thread.join()
    assert 0 < half.total < workload.report().total
    assert sum(size for size, _ in told) == workload.report().total
    assert abs(told[-1][1] - time.time() * 1_000) < 5_000


def test_rows_that_are_not_there_are_counted() -> None:
    class Emptied(CountingTable):
        def execute(self, statements: Sequence[Statement]) -> int:
            return super().execute(statements) - 1

    report = Workload(Emptied(), rate=1_000, base_id=BASE).run(changes=10)
    assert report.missed == report.transactions


def test_an_outage_ends_the_run_and_the_report_stays() -> None:
    class Away(CountingTable):
        def execute(self, statements: Sequence[Statement]) -> int:
            if len(self.sizes) == 3:
                raise UnavailableError("MySQL is away.", way_out="Wait.")
            return super().execute(statements)

    workload = Workload(Away(), rate=1_000, base_id=BASE)
    with pytest.raises(UnavailableError):
        workload.run(changes=1_000)
    assert workload.report().transactions == 3


@pytest.mark.parametrize(
    ("rate", "longest_transaction", "base_id"), [(0, 1, BASE), (-1, 1, BASE), (5, 0, BASE), (5, 1, -1), (5, 1, 2**63)]
)
def test_numbers_out_of_range_are_refused(rate: float, longest_transaction: int, base_id: int) -> None:
    with pytest.raises(ConfigError, match="can't run with"):
        Workload(CountingTable(), rate=rate, longest_transaction=longest_transaction, base_id=base_id)
