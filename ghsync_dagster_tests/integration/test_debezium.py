"""What the real connector writes of each kind of statement is applied: MySQL, Debezium, Kafka, MongoDB."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from ghsync_dagster.cdc.stream.listener import SilentListener
from ghsync_dagster.stores.mysql import MySqlStore, Span
from ghsync_dagster.wiring import change_consumer, existing_kafka, store_opener

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ghsync_dagster.cdc.stream.listener import AppliedBatch
    from ghsync_dagster.settings import Settings

pytestmark = [pytest.mark.integration, pytest.mark.servers("stack")]

INSERT = "INSERT INTO Users VALUES (%s, %s, %s, %s, %s)"
CREATED, UPDATED = {"c": 1}, {"u": 1}
KEY_CHANGED = {"d": 1, "tombstone": 1, "c": 1}
TEXTS = {
    "NUL": "a\0b",
    "line separator": "\u2028\u2029",
    "operator": "$set",
    "variable": "$$ROOT",
    "dots": "a.b.c",
    "JSON": '{"op":"d"}',
    "quotes": "'\"\\`;--",
    "four bytes": "\U0001f984" * 60,
    "combining": "e\u0301\u200d\ufeff",
    "empty": "",
    "as long as the column": "x" * 255,
}


class Counts(SilentListener):
    """Counts records by what they were."""

    def __init__(self) -> None:
        self.what: Counter[str] = Counter()

    def batch_applied(self, batch: AppliedBatch) -> None:
        """Count a batch."""
        for (what, _), count in batch.counts.items():
            self.what[what] += count


class Both:
    """Table and collection of one test."""

    def __init__(self, settings: Settings, mysql: MySqlStore) -> None:
        self.settings = settings
        self.mysql = mysql
        self._counts = Counts()

    def do(self, *statements: tuple[str, tuple[Any, ...]]) -> None:
        """Execute statements as one transaction."""
        self.mysql.execute(list(statements))

    def applied(self, **expected: int) -> dict[str, int]:
        """Apply what comes until so many records have come of each kind; return how many of each came."""
        self._counts.what.clear()
        deadline = time.monotonic() + 60
        while any(self._counts.what[what] < count for what, count in expected.items()):
            assert time.monotonic() < deadline, self._counts.what
            consumer = change_consumer(self.settings, existing_kafka(self.settings), self._counts)
            report = consumer.run(threading.Event(), until_end=True, seconds=60)
            assert not report.dead_letters
        return dict(self._counts.what)

    def stored(self) -> dict[str, dict[str, Any]]:
        """The documents by user_id, without ``_id``."""
        with store_opener(self.settings)() as store:
            return {found["user_id"]: found for found in store.users.find({}, {"_id": 0})}

    def rows(self) -> dict[str, dict[str, Any]]:
        """The table's rows, as documents are to be."""
        return {str(row["user_id"]): dict(row) for row in self.mysql.rows_within(Span(), None, 1_000)}

    def deleted(self) -> set[str]:
        """The keys that the stream recorded as deleted."""
        with store_opener(self.settings)() as store:
            return {found["_id"] for found in store.book("deleted").find()}


@pytest.fixture
def both(stack_settings: Settings) -> Iterator[Both]:
    """An empty table, and a collection that is not there yet."""
    assert stack_settings.mysql_url is not None
    with MySqlStore(stack_settings.mysql_url.get_secret_value()) as mysql:
        yield Both(stack_settings, mysql)


def row(key: int, login: str = "octo", url: str | None = "u") -> tuple[str, tuple[Any, ...]]:
    return INSERT, (key, login, None, "a", url)


def _change_key(both: Both) -> None:
    both.do(("UPDATE Users SET user_id = 11 WHERE user_id = 1", ()))


def _swap_keys(both: Both) -> None:
    both.do(*(("UPDATE Users SET user_id = %s WHERE user_id = %s", pair) for pair in ((9, 1), (1, 2), (2, 9))))


STATEMENTS: dict[str, tuple[Callable[[Both], None], dict[str, int]]] = {
    "insert": (lambda both: both.do(row(5)), CREATED),
    "insert of many": (lambda both: both.do(row(5), row(6), row(7)), {"c": 3}),
    "update": (lambda both: both.do(("UPDATE Users SET login = 'new' WHERE user_id = 1", ())), UPDATED),
    "update to null": (lambda both: both.do(("UPDATE Users SET url = NULL WHERE user_id = 1", ())), UPDATED),
    "update of all": (lambda both: both.do(("UPDATE Users SET login = CONCAT(login, user_id)", ())), {"u": 3}),
    "delete": (lambda both: both.do(("DELETE FROM Users WHERE user_id = 1", ())), {"d": 1, "tombstone": 1}),
    "delete and insert": (
        lambda both: both.do(("DELETE FROM Users WHERE user_id = 1", ()), row(1, "back")),
        {"d": 1, "tombstone": 1, "c": 1},
    ),
    "replace": (lambda both: both.do(("REPLACE INTO Users (user_id, login) VALUES (1, 'r')", ())), UPDATED),
    "insert or update": (
        lambda both: both.do((f"{INSERT} ON DUPLICATE KEY UPDATE login = 'dup'", (1, "x", None, None, None))),
        UPDATED,
    ),
    "key change": (_change_key, KEY_CHANGED),
    "swap of keys": (_swap_keys, {what: 3 * count for what, count in KEY_CHANGED.items()}),
    "truncate": (lambda both: both.do(("TRUNCATE TABLE Users", ())), {"t": 1}),
    "truncate, then insert": (lambda both: both.do(("TRUNCATE TABLE Users", ()), row(1, "after")), {"t": 1, "c": 1}),
}


@pytest.mark.parametrize("name", STATEMENTS)
def test_a_statement_ends_in_the_collection_as_in_the_table(both: Both, name: str) -> None:
    both.do(row(1), row(2), row(3, url=None))
    assert both.applied(c=3) == {"c": 3}
    assert both.stored() == both.rows()
    before = both.rows().keys()
    act, records = STATEMENTS[name]
    act(both)
    assert both.applied(**records) == records
    assert both.stored() == both.rows()
    assert both.deleted() >= before - both.rows().keys()
    assert both.deleted().isdisjoint(both.rows())


def test_text_is_what_it_was(both: Both) -> None:
    both.do(*(row(number, text, text) for number, text in enumerate(TEXTS.values(), start=1)))
    both.applied(c=len(TEXTS))
    assert [both.stored()[str(number)]["login"] for number in range(1, len(TEXTS) + 1)] == list(TEXTS.values())
    assert both.stored() == both.rows()


def test_the_ends_of_bigint_are_keys(both: Both) -> None:
    both.do(row(2**63 - 1), row(-(2**63)), row(0))
    both.applied(c=3)
    assert both.stored().keys() == {str(2**63 - 1), str(-(2**63)), "0"}


def test_a_snapshot_brings_the_rows_that_are_there(both: Both) -> None:
    both.do(row(1), row(2))
    both.applied(c=2)
    with store_opener(both.settings)() as store:
        store.users.delete_one({"user_id": "1"})
        store.users.update_one({"user_id": "2"}, {"$set": {"login": "evil"}})
    with httpx.Client(base_url=str(both.settings.connect_url), timeout=30) as client:
        for method, what in (("PUT", "stop"), ("DELETE", "offsets"), ("PUT", "resume")):
            client.request(method, f"/connectors/ghsync-users/{what}").raise_for_status()
    assert both.applied(r=2)["r"] == 2
    assert both.stored() == both.rows()
