"""Users are put right by asking the source, on a real broker, table and store, alongside a stream that is behind."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from ghsync_dagster.cdc.health.repair_requests import (
    Chosen,
    RepairReport,
    Selection,
    Unrepairable,
    plan,
    refuse_too_many,
    repair,
    select,
)
from ghsync_dagster.cdc.stream import source_reader
from ghsync_dagster.cdc.stream.group import GroupOffsets
from ghsync_dagster.cdc.stream.source_reader import SourceReader
from ghsync_dagster.domain.errors import ConfigError, UnavailableError
from ghsync_dagster.domain.letters import LetterState
from ghsync_dagster.domain.repair import Outcome
from ghsync_dagster.stores.mongo.letters import LetterIndex
from ghsync_dagster.stores.mongo.repairs import RepairRequests, RepairWriter
from ghsync_dagster.stores.mysql import MySqlStore
from ghsync_dagster_tests.support.builders import row, user
from ghsync_dagster_tests.support.cdc_parts import Parts, Topic, make_strict, stored, until

if TYPE_CHECKING:
    import io
    from collections.abc import Callable

    from ghsync_dagster.stores.mongo.users import UserStore

pytestmark = [pytest.mark.integration, pytest.mark.servers("stream")]


class _Bench:
    """A table, a topic whose records lie in the table's own binlog, and who repairs."""

    def __init__(self, parts: Parts, topic: Topic, mysql: MySqlStore, url: str, store: UserStore) -> None:
        self.parts, self.topic, self.mysql, self.store, self.url = parts, topic, mysql, store, url
        self.repairs = RepairRequests(store)

    def source(self) -> MySqlStore:
        return MySqlStore(self.url, timeout_seconds=5)

    def row(self, key: int, login: str | None) -> None:
        """Set a row without a record in the topic, or remove it."""
        if login is None:
            self.mysql.execute([("DELETE FROM Users WHERE user_id = %s", (key,))])
        else:
            values = user(key, login)
            columns = ", ".join(values)
            query = f"REPLACE INTO Users ({columns}) VALUES %s"  # noqa: S608  only names
            self.mysql.execute([(query, (list(values.values()),))])

    def record(self, key: int | None, op: str, login: str | None = None, *, ahead: int = 0, **where: Any) -> None:
        """Write a record as the connector would for the newest end of the binlog, or from some bytes after it."""
        end = self.mysql.read_locked([])
        assert end is not None
        source = {"server_id": end.server_id, "file": end.file, "pos": end.pos + ahead, "row": 0, "snapshot": "false"}
        after = None if login is None else row(key, login)
        before = {"user_id": key} if op == "d" else None
        value = {"op": op, "before": before, "after": after, "source": source | {"ts_ms": 1_700_000_000_000}}
        self.topic.raw(None if key is None else {"user_id": key}, value, **where)
        self.topic.flush()

    def consumer(self) -> Any:
        return self.parts.consumer(self.topic, open_source=self.source)

    def repair(self, *keys: int, still_seconds: float = 30.0) -> RepairReport:
        chosen = [str(key) for key in keys]
        return repair(
            self.topic.kafka,
            self.repairs,
            chosen,
            self.consumer,
            stop=threading.Event(),
            still_seconds=still_seconds,
        )

    def select(self, selection: Selection) -> Chosen:
        return select(selection, self.mysql, self.store, self.topic.kafka, 0.5)

    def drain(self) -> None:
        self.parts.drain(self.topic, open_source=self.source)

    def login(self, key: int) -> str | None:
        found = stored(self.store).get(str(key))
        return None if found is None else found["login"]


@pytest.fixture
def bench(parts: Parts, topic: Topic, mysql: MySqlStore, mysql_url: str, store: UserStore) -> _Bench:
    """A bench whose collection is set up."""
    store.ensure_collection()
    return _Bench(parts, topic, mysql, mysql_url, store)


def test_each_kind_of_difference_is_put_right_without_a_running_consumer(bench: _Bench) -> None:
    bench.row(1, "missing")
    bench.row(2, "right")
    bench.store.users.insert_many([user(2, "wrong"), user(3, "extra"), user(4, "file")])
    bench.store.book("versions").insert_one({"_id": "4", "created_at": "2015-01-01T00:00:00Z", "id": 1, "load": "l"})
    report = bench.repair(1, 2, 3, 4, 5)
    assert report.by_itself
    assert report.is_carried_out
    expected = {Outcome.WRITTEN: 2, Outcome.REMOVED: 1, Outcome.LEFT_TO_FILES: 1, Outcome.ABSENT: 1}
    assert report.outcomes == {outcome.value: count for outcome, count in expected.items()}
    assert {key: found["login"] for key, found in stored(bench.store).items()} == {
        "1": "missing",
        "2": "right",
        "4": "file",
    }
    # As the stream's own delete: no file brings the user back.
    assert bench.store.deleted_among(["3", "5"]) == {"3"}


def test_a_running_consumer_carries_out_what_is_asked_and_goes_on_with_changes(bench: _Bench) -> None:
    bench.row(1, "right")
    with bench.parts.running(bench.topic, open_source=bench.source) as running:
        bench.record(7, "c", "seven", ahead=-1)
        until(lambda: bench.login(7) == "seven")
        report = bench.repair(1)
        bench.record(7, "u", "later")
        until(lambda: bench.login(7) == "later")
        until(lambda: running.metrics.snapshot().repaired == {"written": 1})
        running.end()
    assert not report.by_itself
    assert report.outcomes == {"written": 1}
    assert bench.login(1) == "right"


def test_records_that_are_part_of_what_was_read_are_not_applied_again(bench: _Bench) -> None:
    for login in ("first", "second"):
        bench.row(1, login)
        bench.record(1, "u", login, ahead=-1)
    # The newest change left no record.
    bench.row(1, "silent")
    bench.repairs.request(["1"])
    with bench.parts.running(bench.topic, open_source=bench.source) as running:
        until(lambda: bench.login(1) == "silent")
        running.end()
    # Delivered again, as after a death.
    bench.topic.commit(0)
    seen: set[str | None] = set()

    def is_passed() -> bool:
        seen.add(bench.login(1))
        return bench.topic.committed() == 2

    with bench.parts.running(bench.topic, open_source=bench.source) as running:
        until(is_passed)
        assert running.metrics.snapshot().outcomes["left_out"] == 2
        running.end()
    assert seen == {"silent"}


def test_a_record_from_after_the_reading_is_applied(bench: _Bench) -> None:
    bench.row(1, "old")
    assert bench.repair(1).is_carried_out
    bench.row(1, "new")
    bench.record(1, "u", "new")
    bench.drain()
    assert bench.login(1) == "new"
    bench.row(1, None)
    bench.record(1, "d")
    bench.topic.raw({"user_id": 1}, None)
    bench.drain()
    assert bench.login(1) is None


def _of_another_server(bench: _Bench, login: str, gtid: str | None) -> None:
    source = {"server_id": 99, "file": "other.000009", "pos": 4, "row": 0, "snapshot": "false", "gtid": gtid}
    after = row(1, login)
    bench.topic.raw({"user_id": 1}, {"op": "u", "before": None, "after": after, "source": source})
    bench.topic.flush()


def test_a_record_of_another_server_is_not_applied_but_its_user_requested_again(bench: _Bench) -> None:
    bench.row(1, "right")
    assert bench.repair(1).is_carried_out
    bench.row(1, "newest")
    # As a replica relays it, which the connector follows since.
    end = bench.mysql.read_locked([])
    assert end is not None
    _of_another_server(bench, "older", end.gtids.rpartition(",")[2] or None)
    with bench.parts.running(bench.topic, open_source=bench.source) as running:
        until(lambda: bench.login(1) == "newest")
        assert running.metrics.snapshot().outcomes["left_out"] == 1
        running.end()


def test_a_server_that_does_not_have_the_newest_record_is_not_believed(bench: _Bench) -> None:
    bench.row(1, "behind")
    bench.store.users.insert_one(user(1, "stream"))
    _of_another_server(bench, "newer", None)
    report = bench.repair(1, still_seconds=4.0)
    assert not report.is_carried_out
    assert report.open == 1
    assert "MYSQL_URL names a server that is behind, or another one" in report.problem
    assert bench.login(1) == "newer"


def test_a_deletion_from_before_the_reading_is_recorded_so_that_no_file_brings_the_user_back(bench: _Bench) -> None:
    bench.record(1, "c", "gone", ahead=-2)
    bench.record(1, "d", ahead=-1)
    bench.topic.raw({"user_id": 1}, None)
    bench.topic.flush()
    bench.repairs.request(["1"])
    with bench.parts.running(bench.topic, open_source=bench.source) as running:
        until(lambda: not bench.repairs.is_any_open() and bench.topic.committed() == 3)
        running.end()
    bench.topic.commit(0)
    bench.drain()
    assert bench.login(1) is None
    assert bench.store.deleted_among(["1"]) == {"1"}


def test_a_drain_ends_once_what_it_has_left_out_is_repaired(bench: _Bench) -> None:
    bench.row(1, "right")
    assert bench.repair(1).is_carried_out
    bench.row(1, "newest")
    bench.topic.raw({"user_id": 1}, {"op": "u", "before": None, "after": row(1, "older")})
    bench.drain()
    assert bench.login(1) == "newest"
    assert not bench.repairs.is_any_open()


def test_work_is_not_lost_where_kafka_does_not_answer(bench: _Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.row(1, "right")
    tries: list[int] = []
    current = GroupOffsets.current

    def failing(offsets: GroupOffsets) -> dict[int, int]:
        tries.append(1)
        if len(tries) <= 3:
            raise UnavailableError("Kafka does not answer.", way_out="Wait.")
        return current(offsets)

    monkeypatch.setattr(GroupOffsets, "current", failing)
    assert bench.repair(1).is_carried_out
    assert bench.login(1) == "right"
    assert len(tries) > 3


def test_locked_users_hold_up_no_other(bench: _Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_reader, "CHUNK", 5)
    monkeypatch.setattr(source_reader, "_LOCK_REPORTED_SECONDS", 0.5)
    for key in range(1, 21):
        bench.row(key, f"u{key}")
    with bench.source() as other, bench.parts.running(bench.topic, open_source=bench.source) as running:
        other.execute([("SET autocommit = 0", ())])
        for key in range(1, 11):
            # By one key each: a scan would lock all rows.
            other.execute([("UPDATE Users SET login = 'x' WHERE user_id = %s", (key,))])
        token = bench.repairs.request([str(key) for key in range(1, 21)])
        until(lambda: bench.repairs.progress(token).open == 10)
        until(lambda: "locked" in bench.repairs.progress(token).problem)
        other.execute([("ROLLBACK", ())])
        until(lambda: bench.repairs.progress(token).open == 0)
        running.end()


def test_an_unexpected_fault_of_a_repair_stops_no_stream(bench: _Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.row(1, "right")

    def failing(*_: Any) -> None:
        raise ValueError("unexpected")

    monkeypatch.setattr(MySqlStore, "read_locked", failing)
    with bench.parts.running(bench.topic, open_source=bench.source) as running:
        token = bench.repairs.request(["1"])
        until(lambda: "unexpectedly" in bench.repairs.progress(token).problem)
        monkeypatch.undo()
        bench.record(7, "c", "seven")
        until(lambda: bench.login(7) == "seven")
        assert running.thread.is_alive()
        running.end()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("ENGINE = Aria", "is kept by Aria"),
        ("DROP PRIMARY KEY", "has no primary key"),
        ("DROP PRIMARY KEY, ADD UNIQUE (user_id)", "a unique index on user_id but no primary key"),
        ("DROP PRIMARY KEY, ADD PRIMARY KEY (user_id, login)", r"primary key of .* is \(user_id, login\)"),
        ("MODIFY user_id BIGINT UNSIGNED NOT NULL", "is BIGINT UNSIGNED"),
        ("MODIFY user_id VARCHAR(20) NOT NULL", r"is varchar\(20\), not BIGINT"),
    ],
)
def test_a_table_whose_rows_cannot_be_locked_is_refused_with_its_reason(bench: _Bench, what: str, words: str) -> None:
    bench.mysql.execute([(f"ALTER TABLE Users {what}", ())])
    with bench.source() as source, pytest.raises(ConfigError, match=f"cannot be locked by user_id.*{words}"):
        source.read_locked(["1"])


def test_a_truncate_from_before_the_reading_keeps_the_repaired_user(bench: _Bench) -> None:
    bench.record(2, "c", "two", ahead=-2)
    bench.record(None, "t", ahead=-1)
    bench.row(1, "after the truncate")
    bench.repairs.request(["1"])
    bench.topic.commit(1)
    bench.store.users.insert_one(user(2, "two"))
    with bench.parts.running(bench.topic, open_source=bench.source) as running:
        until(lambda: bench.login(1) is not None)
        until(lambda: bench.topic.committed() == 2)
        running.end()
    bench.topic.commit(0)
    bench.drain()
    assert stored(bench.store).keys() == {"1"}


def test_a_truncate_after_the_last_record_of_a_user_without_a_row_is_recorded_as_its_deletion(bench: _Bench) -> None:
    assert bench.repair(1).outcomes == {"absent": 1}
    bench.record(1, "c", "gone", ahead=-2)
    bench.record(None, "t", ahead=-1)
    bench.drain()
    assert bench.login(1) is None
    assert bench.store.deleted_among(["1"]) == {"1"}


def test_a_user_id_is_the_text_that_is_stored_and_no_number(bench: _Bench) -> None:
    bench.row(7, "seven")
    bench.store.users.insert_one({**user(7, "odd"), "user_id": "007"})
    chosen = bench.select(Selection(user_ids=("007",))).users
    report = repair(bench.topic.kafka, bench.repairs, chosen, bench.consumer, stop=threading.Event())
    assert report.outcomes == {"removed": 1}
    assert stored(bench.store) == {}
    with pytest.raises(ConfigError, match="No user id: '7777"):
        bench.select(Selection(user_ids=("7" * 5_000,)))


def test_rows_are_read_whole_whatever_limit_the_server_has(bench: _Bench) -> None:
    for key in (1, 2, 3):
        bench.row(key, "right")
    bench.mysql.execute([("SET GLOBAL sql_select_limit = 1", ())])
    try:
        with bench.source() as source:
            found = source.read_locked(["1", "2", "3", "4"])
    finally:
        bench.mysql.execute([(f"SET GLOBAL sql_select_limit = {2**64 - 1}", ())])
    assert found is not None
    assert found.rows.keys() == {"1", "2", "3"}


def test_a_record_that_names_no_server_does_not_hold_up_repairs(bench: _Bench) -> None:
    # As flattened records have it where only file, pos and row are added.
    bench.topic.raw(
        {"user_id": 1},
        {
            "op": "u",
            "before": None,
            "after": row(1, "old"),
            "source": {"file": "bin.000001", "pos": 4, "row": 0},
        },
    )
    bench.topic.flush()
    bench.drain()
    bench.row(1, "right")
    assert bench.repair(1).is_carried_out
    assert bench.login(1) == "right"


def test_a_dead_letter_that_comes_after_the_reading_has_the_source_read_again(
    bench: _Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_read, may_be_written = threading.Event(), threading.Event()

    def is_ready(reader: SourceReader) -> bool:
        if reader._works:
            is_read.set()
        return bool(reader._works) and may_be_written.is_set()

    monkeypatch.setattr(SourceReader, "is_ready", property(is_ready))
    bench.row(1, "old")
    with bench.parts.running(bench.topic, open_source=bench.source) as running:
        token = bench.repairs.request(["1"])
        until(is_read.is_set)
        bench.row(1, "newest")
        bench.topic.raw({"user_id": 1}, b"{")
        bench.topic.flush()
        until(lambda: bench.topic.committed() == 1)
        may_be_written.set()
        until(lambda: bench.repairs.progress(token).open == 0)
        assert bench.login(1) == "newest"
        running.end()
    (letter,) = LetterIndex(bench.store, bench.topic.kafka.topic).find()
    assert letter.state is LetterState.RESOLVED


def test_a_write_that_the_store_refuses_is_told_once_and_holds_up_no_change(
    bench: _Bench, monkeypatch: pytest.MonkeyPatch, logged: Callable[..., io.StringIO]
) -> None:
    stream = logged()
    monkeypatch.setattr(source_reader, "_PERMANENT_SECONDS", 0.2)
    bench.row(1, "right")
    readings = bench.store.database["_ghsync_readings"]
    bench.store.database.create_collection(readings.name, validator={"never": {"$exists": True}})
    tries: list[int] = []
    record_fence = RepairWriter.record_fence

    def counted(*given: Any) -> set[str]:
        tries.append(1)
        return record_fence(*given)

    monkeypatch.setattr(RepairWriter, "record_fence", counted)
    with bench.parts.running(bench.topic, open_source=bench.source) as running:
        token = bench.repairs.request(["1"])
        until(lambda: len(tries) > 2)
        assert bench.repairs.progress(token).problem
        bench.record(7, "c", "seven", ahead=-1)
        until(lambda: bench.login(7) == "seven")
        bench.store.database.drop_collection(readings.name)
        until(lambda: bench.repairs.progress(token).open == 0)
        running.end()
    said = stream.getvalue()
    assert (said.count("repairs wait"), said.count("repairs resumed")) == (1, 1)


def test_a_row_that_another_transaction_has_locked_is_read_once_it_is_free(bench: _Bench) -> None:
    bench.row(1, "before")
    bench.row(2, "two")
    with bench.source() as other, bench.parts.running(bench.topic, open_source=bench.source) as running:
        other.execute([("SET autocommit = 0", ())])
        other.execute([("UPDATE Users SET login = 'after' WHERE user_id = 1", ())])
        token = bench.repairs.request(["1", "2"])
        until(lambda: bench.login(2) == "two")
        until(lambda: bench.repairs.progress(token).open == 1)
        assert bench.login(1) is None
        other.execute([("COMMIT", ())])
        until(lambda: bench.repairs.progress(token).open == 0)
        assert bench.login(1) == "after"
        running.end()


def test_a_row_that_the_database_refuses_is_told_and_holds_up_no_other(bench: _Bench) -> None:
    make_strict(bench.store)
    bench.row(1, "far too long a login")
    bench.row(2, "short")
    strict = _Strict(bench)
    report = repair(
        bench.topic.kafka, bench.repairs, ["1", "2"], strict.consumer, stop=threading.Event(), still_seconds=30
    )
    assert not report.is_carried_out
    assert report.outcomes == {"refused": 1, "written": 1}
    assert [refused.user_id for refused in report.refused] == ["1"]
    assert report.refused[0].why.startswith("validator")


class _Strict:
    """Makes consumers whose store leaves a stricter validator as it is."""

    def __init__(self, bench: _Bench) -> None:
        self._bench = bench

    def consumer(self) -> Any:
        from ghsync_dagster_tests.support.cdc_parts import StrictStore

        found = self._bench.consumer()
        parts = self._bench.parts
        found.open_store = lambda: StrictStore(parts.uri, parts.database, "Users", timeout_seconds=2)
        return found


def test_requests_wait_while_mysql_is_away_and_the_reason_is_told(bench: _Bench) -> None:
    bench.row(1, "right")
    is_away = threading.Event()
    is_away.set()

    def source() -> MySqlStore:
        if is_away.is_set():
            raise UnavailableError("There is no MySQL.", way_out="Start it.")
        return bench.source()

    with bench.parts.running(bench.topic, open_source=source) as running:
        token = bench.repairs.request(["1"])
        until(lambda: "There is no MySQL" in bench.repairs.progress(token).problem)
        bench.record(7, "c", "seven", ahead=-1)
        until(lambda: bench.login(7) == "seven")
        is_away.clear()
        until(lambda: bench.repairs.progress(token).open == 0)
        running.end()
    assert bench.login(1) == "right"


def test_who_has_not_all_partitions_repairs_nothing(
    parts: Parts, make_topic: Callable[..., Topic], mysql: MySqlStore, mysql_url: str, store: UserStore
) -> None:
    store.ensure_collection()
    bench = _Bench(parts, make_topic(2), mysql, mysql_url, store)
    bench.row(1, "right")
    with parts.running(bench.topic, open_source=bench.source) as first:
        until(lambda: first.metrics.snapshot().lag.keys() == {0, 1})
        with parts.running(bench.topic, open_source=bench.source) as second:
            until(lambda: len(second.metrics.snapshot().lag) == 1)
            token = bench.repairs.request(["1"])
            until(lambda: "partitions" in bench.repairs.progress(token).problem)
            assert bench.login(1) is None
            second.end()
        until(lambda: bench.repairs.progress(token).open == 0)
        first.end()
    assert bench.login(1) == "right"


def test_a_dry_run_tells_and_writes_nothing(bench: _Bench) -> None:
    bench.row(1, "right")
    bench.row(2, "right")
    bench.store.users.insert_many([user(2, "right"), user(3, "extra")])
    report = plan(bench.mysql, bench.store, bench.repairs, ["1", "2", "3", "4"])
    assert report.dry_run
    assert report.outcomes == {"written": 1, "in_sync": 1, "removed": 1, "absent": 1}
    assert report.planned == {"1": "written", "3": "removed", "4": "absent"}
    assert stored(bench.store).keys() == {"2", "3"}
    assert not bench.repairs.is_any_open()


def test_an_audit_chooses_whom_to_repair(bench: _Bench) -> None:
    for key in range(1, 30):
        bench.row(key, f"u{key}")
    bench.store.users.insert_many([user(key, f"u{key}") for key in range(3, 30)] + [user(100, "extra")])
    bench.store.users.update_one({"user_id": "7"}, {"$set": {"login": "wrong"}})
    for selection in (Selection(from_audit=True), Selection(everyone=True)):
        chosen = bench.select(selection)
        assert (sorted(chosen.users), chosen.unrepairable) == (["1", "100", "2", "7"], [])
    assert bench.select(Selection(user_ids=("7", "007", "-3", "7"))).users == ["7", "007", "-3"]
    with pytest.raises(ConfigError, match="No user id: 'octo'"):
        bench.select(Selection(user_ids=("octo",)))
    with pytest.raises(ConfigError, match="GHSYNC_REPAIR_MAX_USERS=3"):
        refuse_too_many(4, 3)


def test_what_no_repair_can_put_right_is_left_to_be_done_by_hand(bench: _Bench) -> None:
    users = bench.store.users
    bench.row(1, "right")
    bench.row(2, "two")
    users.drop_index("user_id_unique")
    odd: list[dict[str, Any]] = [row(0) | {"user_id": key} for key in (42, None, 4.5, "octo", "")]
    users.insert_many([user(1, "right"), user(1, "surplus"), *odd], bypass_document_validation=True)
    for selection in (Selection(from_audit=True), Selection(everyone=True), Selection(("1",), from_audit=True)):
        chosen = bench.select(selection)
        assert chosen.users == ["2"]
        assert sorted(one.name for one in chosen.unrepairable) == [
            "",
            "1",
            "4.5 (float)",
            "42 (int)",
            "None (NoneType)",
            "octo",
        ]
    report = plan(bench.mysql, bench.store, bench.repairs, chosen.users).with_unrepairable(chosen.unrepairable)
    assert not report.is_carried_out
    assert report.unrepairable == len(report.by_hand) == len(odd) + 1
    assert "6 to be fixed by hand; nothing was changed" in report.summary()
    assert report.way_out.count("remove") == 2
    # Without an audit too: the stream would write one of the two.
    assert [one.name for one in bench.select(Selection(("1", "2"))).unrepairable] == ["1"]
    # What is done by hand ends it.
    users.delete_many({"$or": [{"login": "surplus"}, {"user_id": {"$in": [one["user_id"] for one in odd]}}]})
    assert bench.select(Selection(from_audit=True)) == (["2"], [])


def test_no_more_than_twenty_are_named_and_all_are_counted() -> None:
    found = [Unrepairable(str(number), "Do it.") for number in range(25)]
    report = RepairReport(0, {}).with_unrepairable(found)
    assert (report.unrepairable, len(report.by_hand), report.way_out) == (25, 20, "Do it.")
    assert report.summary() == "0 users asked for: none repaired; 25 to be fixed by hand; 0.0 s"
    assert not report.is_carried_out


def test_a_consumer_that_dies_after_the_fence_repeats_the_repair(
    bench: _Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.row(1, "old")
    bench.record(1, "u", "old", ahead=-1)
    bench.row(1, "right")
    monkeypatch.setattr(RepairWriter, "record_outcomes", _raise)
    with pytest.raises(_DiedError):
        bench.repair(1)
    assert bench.login(1) == "right"
    monkeypatch.undo()
    assert bench.repairs.is_any_open()
    with bench.parts.running(bench.topic, open_source=bench.source) as running:
        until(lambda: not bench.repairs.is_any_open())
        running.end()
    bench.drain()
    assert bench.login(1) == "right"


class _DiedError(BaseException):
    """What ends a consumer as a death does."""


def _raise(*_: object) -> None:
    raise _DiedError


def test_fences_are_dropped_once_the_topic_holds_nothing_from_before(
    bench: _Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_reader, "KEPT_SECONDS", -1.0)
    bench.record(1, "u", "old", ahead=-1)
    bench.row(1, "right")
    assert bench.repair(1).is_carried_out
    readings = bench.store.database["_ghsync_readings"]
    assert readings.count_documents({}) == 1
    # The record from before is still there.
    with bench.parts.running(bench.topic, open_source=bench.source) as running:
        until(lambda: bench.topic.committed() == 1)
        running.end()
    assert readings.count_documents({}) == 1
    bench.record(1, "u", "new")
    admin = AdminClient({"bootstrap.servers": bench.topic.kafka.bootstrap_servers})
    for future in admin.delete_records([TopicPartition(bench.topic.kafka.topic, 0, 1)]).values():
        future.result(30)
    with bench.parts.running(bench.topic, open_source=bench.source) as running:
        until(lambda: readings.count_documents({}) == 0)
        until(lambda: bench.login(1) == "new")
        running.end()
    assert bench.repairs.fences() == {}


def test_users_with_open_dead_letters_are_repaired_and_their_letters_resolved(bench: _Bench) -> None:
    bench.row(1, "right")
    bench.store.users.insert_one(user(2, "extra"))
    for key in (1, 2):
        bench.topic.raw({"user_id": key}, b"{")
    bench.topic.raw(None, b"{")
    bench.drain()
    chosen = bench.select(Selection(dead_letters=True))
    assert chosen.users == ["1", "2"]
    report = bench.repair(1, 2)
    assert report.is_carried_out
    assert report.open == 0
    left = report.with_unrepairable(chosen.unrepairable)
    assert not left.is_carried_out
    assert (left.unrepairable, left.by_hand) == (1, (f"{bench.topic.kafka.topic}-0-2",))
    assert "ghsync dlq close" in left.way_out
    assert (bench.login(1), bench.login(2)) == ("right", None)
    states = {letter.user: letter.state.value for letter in LetterIndex(bench.store, bench.topic.kafka.topic).find()}
    assert states == {"1": "resolved", "2": "resolved", None: "open"}
