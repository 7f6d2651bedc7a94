"""What the binlogs of a MariaDB and of a MySQL do not tell: each line of the table in docs/reference/source.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest

from ghsync_dagster.domain.user import USER_FIELDS
from ghsync_dagster_tests.support.odd_ddl import BOTH, MARIADB, MYSQL, TUTORIAL

if TYPE_CHECKING:
    from ghsync_dagster_tests.support.source_parts import Source

pytestmark = [pytest.mark.integration, pytest.mark.servers("source")]

ROWS = "INSERT INTO Users (user_id, login, url) VALUES (1, 'one', NULL), (2, 'two', NULL)"
UPDATE = "UPDATE Users SET login = REPEAT('x', 200), url = REPEAT('y', 200) WHERE user_id = 1"
PARTITIONED = (
    "ALTER TABLE Users PARTITION BY RANGE (user_id) (PARTITION p0 VALUES LESS THAN (10), "
    "PARTITION p1 VALUES LESS THAN MAXVALUE)"
)
WITH_PARENT = (
    "CREATE TABLE other.parents (id BIGINT PRIMARY KEY)",
    "INSERT INTO other.parents VALUES (1), (2)",
    "ALTER TABLE Users ADD FOREIGN KEY (user_id) REFERENCES other.parents (id) ON DELETE CASCADE",
)


class Untold(NamedTuple):
    """Something that happens to rows.

    Attributes:
        statements: What does it, in one session.
        events: The operations that arrive, by server.
        before: What comes before the two rows.
        after: What undoes a setting of the whole server.
    """

    statements: tuple[str, ...]
    events: dict[str, list[str]]
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


NOTHING: dict[str, list[str]] = {server: [] for server in BOTH}
UNTOLD = {
    "a table made again": Untold(
        (
            "DROP TABLE Users",
            TUTORIAL,
        ),
        NOTHING,
    ),
    "a partition that is emptied": Untold(("ALTER TABLE Users TRUNCATE PARTITION p0",), NOTHING, (PARTITIONED,)),
    "a partition that is dropped": Untold(("ALTER TABLE Users DROP PARTITION p0",), NOTHING, (PARTITIONED,)),
    "a default of DDL": Untold(
        ("ALTER TABLE Users DROP COLUMN url", "ALTER TABLE Users ADD COLUMN url VARCHAR(255) DEFAULT 'd'"), NOTHING
    ),
    "a session that logs nothing": Untold(("SET SESSION sql_log_bin = 0", UPDATE), NOTHING),
    "a session that logs statements": Untold(("SET SESSION binlog_format = 'STATEMENT'", UPDATE), NOTHING),
    "a session that logs statements where it can": Untold(("SET SESSION binlog_format = 'MIXED'", UPDATE), NOTHING),
    "a distributed transaction that is rolled back": Untold(
        ("XA START 'x'", UPDATE, "XA END 'x'", "XA PREPARE 'x'", "XA ROLLBACK 'x'"), {MARIADB: ["u"], MYSQL: ["u"]}
    ),
    "a cascade": Untold(("DELETE FROM other.parents WHERE id = 1",), {MARIADB: [], MYSQL: ["d"]}, WITH_PARENT),
    "a compressed event": Untold(
        ("SET GLOBAL log_bin_compress = ON", UPDATE), {MARIADB: []}, after=("SET GLOBAL log_bin_compress = OFF",)
    ),
    "a compressed transaction": Untold(("SET SESSION binlog_transaction_compression = ON", UPDATE), {MYSQL: ["u"]}),
}


@pytest.mark.parametrize("name", UNTOLD)
def test_the_binlog_tells_so_much_and_no_more(source: Source, name: str) -> None:
    untold = UNTOLD[name]
    if source.server not in untold.events:
        pytest.skip(f"{source.server} has no such setting")
    source.do(*untold.before, ROWS)
    source.arrived()
    try:
        source.do(*untold.statements)
        arrived = source.arrived()
    finally:
        source.do(*untold.after)
    assert [event["op"] for event in arrived] == [*untold.events[source.server], "c"]
    assert arrived[-1] == source.marker()


def test_one_transaction_of_many_rows_arrives_whole_whether_its_places_differ_or_not(source: Source) -> None:
    rows = ", ".join(f"({key}, REPEAT('x', 200))" for key in range(1, 501))
    source.do(f"INSERT INTO Users (user_id, login) VALUES {rows}")  # noqa: S608
    source.arrived()
    events = [event for event in source.events if event["op"] == "c"][:-1]
    assert [event["after"]["user_id"] for event in events] == list(range(1, 501))
    places = {(event["source"]["file"], event["source"]["pos"], event["source"]["row"]) for event in events}
    # MariaDB's pos is that of the transaction, and row begins anew in each of its events.
    assert (len(places) == 500) == (source.server == MYSQL)


def test_a_column_that_was_away_is_missing_in_the_events_of_that_time(source: Source) -> None:
    source.do(ROWS, "ALTER TABLE Users DROP COLUMN url", "UPDATE Users SET login = 'new' WHERE user_id = 1")
    source.do("ALTER TABLE Users ADD COLUMN url VARCHAR(255)", "UPDATE Users SET login = 'newer' WHERE user_id = 1")
    source.arrived()
    without, whole = (event["after"] for event in source.events if event["op"] == "u")
    assert set(without) == set(USER_FIELDS) - {"url"}
    assert set(whole) == set(USER_FIELDS)
