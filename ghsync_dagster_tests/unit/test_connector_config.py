"""The list of statements that the connector leaves out: all that make no column, and none that may make one."""

from __future__ import annotations

import re

import pytest

from ghsync_dagster.connector import NO_COLUMNS
from ghsync_dagster_tests.support.odd_ddl import FOLLOWED, NOT_FOLLOWED, SHIFTING

LEFT_OUT = (
    "CREATE USER a",
    "create or replace role r",
    "RENAME USER 'o''dd'@'%' TO auto",
    "GRANT SELECT ON *.* TO a",
    "/* a comment, 'odd */ -- and\n # another\n DROP VIEW v",
    "SET STATEMENT max_statement_time=1, lock_wait_timeout=2 FOR FLUSH TABLES",
    "CREATE ALGORITHM=UNDEFINED DEFINER=`ghsync`@`%` SQL SECURITY DEFINER JSON RELATIONAL DUALITY VIEW `v` AS SELECT 1",
    "CREATE DEFINER='a b'@'%' EVENT e ON SCHEDULE EVERY 1 DAY DO ALTER TABLE Users ADD COLUMN c INT",
    "CREATE OR REPLACE AGGREGATE FUNCTION f() RETURNS INT RETURN 1",
    "CREATE SPATIAL REFERENCE SYSTEM 1 NAME 'x'",
    "ALTER UNDO TABLESPACE t SET INACTIVE",
    "OPTIMIZE TABLE Users",
    "/**//* ** *//*Migration*/DROP VIEW v",
    "--\n# it's\nGRANT SELECT ON *.* TO a",
    f"/* {'x' * 200_000} */ CREATE USER a",
    f"{' ' * 200_000}CREATE{' ' * 200_000}OR REPLACE VIEW v AS SELECT 1",
    f"{'/**/ ' * 50_000}DROP{' ' * 200_000}VIEW v",
    f"-- {'x' * 200_000}\nCREATE DEFINER='{'x' * 200_000}'@'%' TRIGGER t",
    f"CREATE VIEW v AS SELECT {'1, ' * 70_000} 1",
    "INSERT INTO mysql.rds_heartbeat2(id, value) values (1,2) ON DUPLICATE KEY UPDATE value = 2",
)
KEPT = (
    "ALTER TABLE `USER` ADD COLUMN c INT",
    "CREATE TABLE view1 (id INT)",
    "ALTER TABLE Users COMMENT 'CREATE USER a'",
    "/* x */ ALTER TABLE t COMMENT '*/ DROP VIEW v'",
    "/*! CREATE USER a */",
    "/*!50000 ALTER TABLE t ADD COLUMN c INT, */ /* DROP */ RENAME TABLE a TO b",
    "SET STATEMENT max_statement_time=1 FOR ALTER TABLE t COMMENT ' FOR DROP VIEW v'",
    "/*M!100000 CREATE USER a */",
    "SET STATEMENT max_statement_time=1 FOR ALTER TABLE t ADD COLUMN c INT /* FOR DROP VIEW v */",
    "--\nCREATE TABLE t (\nSAVEPOINT INT)",
    f"/* {'x' * 200_000} */ CREATE{' ' * 200_000}TABLE view1 (id INT)",
    "-- DROP VIEW v\nALTER TABLE t ADD COLUMN c INT",
    "RENAME TABLE Users TO `VIEW`",
    "CREATE TABLE t SELECT * FROM event",
    "DROP TABLE IF EXISTS user",
    "CREATE INDEX role ON Users (url)",
)


def short(statement: str) -> str:
    """Return a test's name: some statements are very long."""
    return statement[:40]


def left_out(statement: str) -> bool:
    """Match as the connector does: any of the list, the whole statement, in any case."""
    return any(re.fullmatch(each, statement, re.IGNORECASE | re.DOTALL) for each in NO_COLUMNS)


@pytest.mark.parametrize("statement", LEFT_OUT, ids=short)
def test_a_statement_that_makes_no_column_is_left_out(statement: str) -> None:
    assert left_out(statement)


@pytest.mark.parametrize("statement", KEPT, ids=short)
def test_a_statement_that_may_make_a_column_is_kept(statement: str) -> None:
    assert not left_out(statement)


def test_no_odd_statement_of_a_table_is_left_out() -> None:
    lists = [*(odd.statements for odd in (*FOLLOWED.values(), *NOT_FOLLOWED.values(), *SHIFTING.values()))]
    tables = [each for each in sum(lists, ()) if re.search(r"\b(ALTER|RENAME|CREATE).* TABLE ", each)]
    assert len(tables) > 60
    assert [each for each in tables if left_out(each)] == []


def test_no_expression_holds_the_comma_that_divides_the_list() -> None:
    assert not any("," in each for each in NO_COLUMNS)


@pytest.mark.parametrize("each", NO_COLUMNS)
def test_no_group_is_repeated_that_java_may_turn_back(each: str) -> None:
    # For each turn of such a group Java's expressions call themselves: a long comment would use up the stack.
    assert re.findall(r"\)[*+](?!\+)|\)\{", each) == []
