"""The judgement on what a server says of itself, and what Connect's log tells; what is declared once."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ghsync_dagster.batch.decide import event_schema
from ghsync_dagster.cdc.health.checks import causes_in, loses_changes, source_settings
from ghsync_dagster.domain.event import Event, event_shape
from ghsync_dagster.domain.source import (
    Effect,
    Source,
    SourceColumn,
    Statements,
    lock_problems,
    problems_of,
    statements_in,
)
from ghsync_dagster.domain.table import COLUMNS, create_table
from ghsync_dagster.domain.user import USER_FIELDS
from ghsync_dagster.local import endpoints, worker_log
from ghsync_dagster.local.connect import ConnectServer
from ghsync_dagster.local.mysql import _SETUP
from ghsync_dagster.local.supervisor import ServiceStatus
from ghsync_dagster.settings import load_settings
from ghsync_dagster.stores.mysql import read_source
from ghsync_dagster.stores.spark import EVENT_SCHEMA

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ghsync_dagster.local.worker_log import WorkerLog

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "log_bin": "ON",
    "binlog_format": "ROW",
    "binlog_row_image": "FULL",
    "log_bin_compress": "OFF",
    "binlog_expire_logs_seconds": "2592000",
}
GOOD = Source(
    version="11.4.5-MariaDB-log",
    database="new_data",
    table="Users",
    settings=SETTINGS,
    found_as="Users",
    kind="BASE TABLE",
    engine="InnoDB",
    columns=tuple(
        SourceColumn(column.name, column.type.lower().partition("(")[0], column.type.lower(), column.nullable)
        for column in COLUMNS
    ),
    keys={"PRIMARY": ("user_id",)},
    filters=("", ""),
    replicates=False,
)


def with_settings(**settings: str) -> Source:
    return replace(GOOD, settings=SETTINGS | settings)


BAD: dict[str, tuple[Source, dict[str, Effect]]] = {
    "no binlog": (with_settings(log_bin="OFF"), {"no-binlog": Effect.STOPS}),
    "format": (with_settings(binlog_format="mixed"), {"binlog-format": Effect.LOSES}),
    "image": (with_settings(binlog_row_image="FULL_NODUP"), {"row-image": Effect.STOPS}),
    "compressed": (with_settings(log_bin_compress="ON"), {"binlog-compressed": Effect.LOSES}),
    "short": (with_settings(binlog_expire_logs_seconds="60"), {"binlog-expiry": Effect.RISKS}),
    "days": (
        with_settings(binlog_expire_logs_seconds="0", expire_logs_days="0.5"),
        {"binlog-expiry": Effect.RISKS},
    ),
    "another database alone": (replace(GOOD, filters=("a,b", "")), {"binlog-filter": Effect.LOSES}),
    "all but the database": (replace(GOOD, filters=("", "x,new_data")), {"binlog-filter": Effect.LOSES}),
    "replica": (
        replace(with_settings(log_slave_updates="OFF"), replicates=True),
        {"replica-updates": Effect.LOSES},
    ),
    "unread": (replace(GOOD, settings={}), {"settings-unread": Effect.UNTOLD}),
    "one unread": (
        replace(GOOD, settings={name: value for name, value in SETTINGS.items() if name != "binlog_format"}),
        {"settings-unread": Effect.UNTOLD},
    ),
    "unique index alone": (replace(GOOD, keys={"user_id": ("user_id",)}), {"no-primary-key": Effect.RISKS}),
    "unique index with nulls": (
        replace(
            GOOD, keys={"user_id": ("user_id",)}, columns=tuple(replace(one, nullable=True) for one in GOOD.columns)
        ),
        {"key-nullable": Effect.LOSES},
    ),
    "no key": (replace(GOOD, keys={"login": ("login",)}), {"primary-key": Effect.STOPS}),
    "no case": (replace(GOOD, found_as="users"), {"table-case": Effect.STOPS}),
    "another engine": (replace(GOOD, engine="MyISAM"), {"engine": Effect.RISKS}),
    "a risk alongside": (
        replace(with_settings(binlog_format="MIXED"), cascades=("fk",), engine="Aria"),
        {"binlog-format": Effect.LOSES, "engine": Effect.RISKS, "cascades": Effect.RISKS},
    ),
    "cascades": (replace(GOOD, cascades=("fk",)), {"cascades": Effect.RISKS}),
    "cascades of an old MySQL": (
        replace(GOOD, version="9.5.0", cascades=("fk",)),
        {"cascades": Effect.RISKS},
    ),
    "several, worst first": (
        replace(with_settings(binlog_format="STATEMENT", binlog_row_image="MINIMAL"), found_as=None),
        {"row-image": Effect.STOPS, "binlog-format": Effect.LOSES, "no-table": Effect.UNTOLD},
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named_with_its_effect_and_fails_the_check_unless_it_is_a_risk(case: str) -> None:
    source, expected = BAD[case]
    problems = problems_of(source)
    assert {problem.name: problem.effect for problem in problems} == expected
    assert [problem.effect for problem in problems] == list(expected.values())
    found = source_settings(source, Statements())
    assert found.passed == all(effect is Effect.RISKS for effect in expected.values())
    assert all(problem.text in found.summary and problem.way_out in found.way_out for problem in problems)
    assert [problem.effect for problem in problems if f"a risk: {problem.text}" in found.summary] == [
        effect for effect in expected.values() if effect is Effect.RISKS
    ]
    assert loses_changes(found) == any(effect in (Effect.STOPS, Effect.LOSES) for effect in expected.values())
    causes = " ".join(causes_in(found))
    for problem in problems:
        assert (problem.text in causes) == (problem.effect is not Effect.RISKS or problem.name == "engine")


@pytest.mark.parametrize(
    "source",
    [
        GOOD,
        replace(GOOD, version="9.7.4", cascades=("fk",)),
        replace(GOOD, version="10.0.1", cascades=("fk",)),
        with_settings(binlog_expire_logs_seconds="0", expire_logs_days="0"),
        with_settings(binlog_expire_logs_seconds="60", binlog_expire_logs_auto_purge="OFF"),
        with_settings(log_slave_updates="OFF"),
        replace(GOOD, filters=("new_data,x", "y"), replicates=True),
        replace(GOOD, filters=None, replicates=None),
    ],
)
def test_what_can_be_followed_passes(source: Source) -> None:
    assert problems_of(source) == []
    found = source_settings(source, None)
    assert found.passed
    assert "Connect's log can't be read here" in found.summary
    assert "log" not in source_settings(source, Statements()).summary.partition(source.version)[2].replace("logs", "")


@pytest.mark.parametrize("of_type", ["tinyint", "smallint", "mediumint", "int", "bigint"])
@pytest.mark.parametrize("sign", ["", " unsigned"])
def test_every_key_that_can_be_followed_can_be_locked_and_no_other(of_type: str, sign: str) -> None:
    key = SourceColumn("user_id", of_type, of_type + sign, nullable=False)
    source = replace(GOOD, columns=(key, *GOOD.columns[1:]))
    found = [problem.name for problem in lock_problems(source)]
    assert found == [problem.name for problem in problems_of(source)]
    assert found == (["key-unsigned"] if key.whole_type == "bigint unsigned" else [])


def test_a_server_that_refuses_every_question_is_not_taken_for_a_good_one() -> None:
    def refuse(question: str, values: Sequence[object]) -> None:
        del question, values

    found = problems_of(read_source(refuse, "new_data", "Users"))
    assert {problem.name for problem in found} == {"settings-unread", "no-table"}


NOW = datetime(2026, 1, 2, 12, tzinfo=UTC)


def line(at: datetime, sql: str, level: str = "WARN ") -> str:
    local = at.astimezone().replace(tzinfo=None).isoformat(timespec="milliseconds").replace(".", ",")
    return (
        f"{local} {level} Received DML '{sql}' for processing, binlog probably contains events generated with"
        " statement or mixed based replication format [io.debezium.connector.binlog.X]\n"
    )


@pytest.mark.parametrize(
    ("sql", "of_table", "of_others"),
    [
        ("UPDATE Users SET login = 'x'", 1, 0),
        ("update `new_data`.`users` set login='x'", 1, 0),
        ("INSERT INTO\n  Users\n VALUES (1)", 1, 0),
        ("DELETE FROM Others", 0, 1),
        ("DELETE FROM other.users", 0, 1),
        ("DELETE FROM `odd-one` . `Users`", 0, 1),
        ("INSERT INTO other.Users SELECT * FROM Users", 1, 0),
        ("INSERT INTO other.Users SELECT * FROM NEW_DATA . Users", 1, 0),
        ("DELETE FROM MyUsers2", 0, 1),
        ("UPDATE Users SET login = 'don''t' WHERE login = '''", 1, 0),
    ],
)
def test_a_statement_in_the_log_is_of_the_table_or_not(sql: str, of_table: int, of_others: int) -> None:
    log = f"cut off' for processing\n{line(NOW, sql)}{line(NOW, sql, 'INFO ')}"
    found = statements_in(log, GOOD, NOW - timedelta(seconds=1))
    assert (found.of_table, found.of_others) == (of_table, of_others)
    assert statements_in(log, GOOD, NOW + timedelta(seconds=1)) == Statements()


def test_no_text_of_a_statement_is_told() -> None:
    found = source_settings(GOOD, statements_in(line(NOW, "UPDATE Users SET login = 's3cret'"), GOOD, NOW))
    assert not found.passed
    assert loses_changes(found)
    assert "s3cret" not in repr(found)


def test_the_log_is_read_from_its_end_no_further_than_needed_and_never_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def log_of(**named: str) -> WorkerLog | None:
        return endpoints.worker_log(load_settings(GHSYNC_HOME=tmp_path, **named))

    now = datetime.now(UTC)
    hour = timedelta(hours=1)
    assert log_of() is None
    path = tmp_path / "connect" / "log" / "connect.log"
    path.parent.mkdir(parents=True)
    old, new = line(now - 2 * hour, "UPDATE Users SET a = 1"), line(now, "UPDATE Users SET a = 1")
    path.write_text(old * 50_000 + new * 3, encoding="utf-8")
    log = log_of()
    assert log is not None
    assert log.statements(GOOD, now - hour).of_table == 3  # type: ignore[union-attr]
    assert len(worker_log._end_of(path, now - hour)) < 2 * worker_log._LOG_BLOCK
    monkeypatch.setattr(worker_log, "_LOG_BYTES", 10_000)
    monkeypatch.setattr(worker_log, "_LOG_BLOCK", 4_000)
    assert len(worker_log._end_of(path, now - 9 * hour)) <= 14_000
    # The log of a worker that is not in use tells nothing.
    elsewhere = "http://127.0.0.1:9/"
    assert log_of(CONNECT_URL=elsewhere) is None
    at = ServiceStatus("connect", "up", uri="http://127.0.0.1:9")
    monkeypatch.setattr(ConnectServer, "local_status", lambda _: at)
    named = log_of(CONNECT_URL=elsewhere)
    assert named is not None
    assert named.statements(GOOD, now - hour) != Statements()
    # Both sides were found equal since.
    log.close(now + timedelta(seconds=1))
    assert log.statements(GOOD, now - hour) == Statements()


def test_what_is_wrong_with_the_source_is_a_likely_cause_of_differences() -> None:
    bad, good = (source_settings(source, Statements()) for source in (BAD["compressed"][0], GOOD))
    (cause,) = causes_in(bad)
    assert cause.startswith("Likely cause: log_bin_compress is ON")
    assert causes_in(good) == causes_in(None) == []


# Declared once


def test_the_documented_table_is_the_declared_one() -> None:
    documented = (ROOT / "docs" / "reference" / "source.md").read_text(encoding="utf-8")
    assert create_table() in re.sub(r"\s+", " ", documented)
    assert tuple(column.name for column in COLUMNS) == USER_FIELDS


def test_no_module_but_the_declaration_words_the_table() -> None:
    sources = (ROOT / "ghsync_dagster").rglob("*.py")
    found = {path.name for path in sources if "CREATE TABLE" in path.read_text(encoding="utf-8")}
    assert found == {"table.py"}
    assert "{table};" in _SETUP


def test_the_schemas_of_an_event_are_those_of_its_declaration() -> None:
    assert list(event_shape()) == list(inspect.signature(Event).parameters)
    names: dict[Any, str] = {int: "bigint", str: "string"}

    def words(shape: Any) -> str:
        if not isinstance(shape, dict):
            return names[shape]
        return f"struct<{','.join(f'{name}:{words(part)}' for name, part in shape.items())}>"

    assert EVENT_SCHEMA.simpleString() == words(event_shape())
    arrow = str(event_schema().field("actor").type)
    assert arrow == "struct<id: int64, login: string, gravatar_id: string, url: string, avatar_url: string>"
