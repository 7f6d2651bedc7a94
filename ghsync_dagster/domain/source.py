"""Judges whether MySQL's table and settings let Debezium follow every change.

Belongs here: the meaning of the server's answers and of Connect's log, and the way out of each problem. Not here: the
queries (``stores.mysql``), where that log is, and what a command does about a problem.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import TYPE_CHECKING, Final

from ghsync_dagster.domain.table import KEY, create_table, quoted
from ghsync_dagster.domain.user import USER_FIELDS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_ESSENTIAL: Final = ("log_bin", "binlog_format", "binlog_row_image")
SETTINGS: Final = (
    *_ESSENTIAL,
    *("log_bin_compress", "binlog_expire_logs_seconds", "binlog_expire_logs_auto_purge", "expire_logs_days"),
    *("log_slave_updates", "log_replica_updates"),
)
"""The GLOBAL settings of the server that are judged."""
_SHORTEST_SECONDS: Final = 86_400.0
"""A binlog with a shorter retention may be purged before somebody restarts a stopped connector."""
KEY_BITS: Final = {"tinyint": 8, "smallint": 16, "mediumint": 24, "int": 32, "bigint": 64}
"""The integer types that a key may have, with their bits; a BIGINT must be signed."""
_TEXTS: Final = frozenset({"char", "varchar", "tinytext", "text", "mediumtext", "longtext"})
_LOGS_CASCADES: Final = (9, 6)
"""The first MySQL that logs the changes of a foreign key's action in the binlog; no MariaDB does."""
_VERSION: Final = re.compile(r"(\d+)\.(\d+)")


STATEMENT_HOURS: Final = 24.0
"""How far back Connect's log is searched for statements that came as text."""
_LOGGED: Final = re.compile(
    r"^(\S+) +WARN +Received DML '(.*?)' for processing, binlog probably contains events generated with statement",
    re.MULTILINE | re.DOTALL,
)
"""Debezium's warning about a statement that is in the binlog as text. It may have several lines."""


OTHER_ENGINE: Final = "engine"
"""The name of the problem that makes repairs unsound too."""
_UNLOCKABLE: Final = frozenset(
    {
        *("no-table", "no-base-table", OTHER_ENGINE, "column-missing", "column-case"),
        *("key-type", "key-unsigned", "primary-key", "key-nullable", "no-primary-key"),
    }
)
"""The names of the problems that prevent locking rows by their key."""


class Effect(Enum):
    """What a problem does to the changes."""

    STOPS = "stops"
    """The connector refuses to run, or its records can't be applied."""
    LOSES = "loses"
    """Changes are missing from the binlog without any other sign."""
    LOST = "lost"
    """Some changes are missing from the binlog already; later ones may arrive."""
    UNTOLD = "untold"
    """It is not known whether changes arrive."""
    RISKS = "risks"
    """Changes may get lost under some conditions; until then all arrive."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A fault of the source.

    Attributes:
        name: A slug, such as ``binlog-format``.
        effect: What it does to the changes.
        text: What is wrong, in words.
        way_out: What to do.
    """

    name: str
    effect: Effect
    text: str
    way_out: str


@dataclass(frozen=True, slots=True)
class SourceColumn:
    """A column as the server describes it.

    Attributes:
        name: In the server's case.
        type: Without its length, lower case, such as ``bigint``.
        whole_type: The full type, lower case, such as ``bigint(20) unsigned``.
        nullable: Whether it may be NULL.
    """

    name: str
    type: str
    whole_type: str
    nullable: bool


@dataclass(frozen=True, slots=True)
class Source:
    """The server's settings and the table's shape.

    Attributes:
        version: The server's version.
        database: The configured database.
        table: The configured table.
        settings: GLOBAL settings by name, with the server's values; one that it lacks or hides is absent.
        found_as: The table's name in the server's case; None where it is missing or not visible to the account.
        kind: ``BASE TABLE``, ``VIEW``, ``SYSTEM VERSIONED``; empty where there is none.
        engine: ``InnoDB`` or another; empty where there is none.
        columns: In their order.
        keys: Each unique index by name to its columns in order; ``PRIMARY`` first where there is one.
        cascades: Foreign keys of the table whose actions change its rows.
        filters: The databases in the server's ``binlog_do_db`` and ``binlog_ignore_db``; None where not readable.
        replicates: Whether the server is itself a replica; None where not readable.
        encrypted: Whether the connection used TLS.
    """

    version: str
    database: str
    table: str
    settings: Mapping[str, str]
    found_as: str | None
    kind: str = ""
    engine: str = ""
    columns: tuple[SourceColumn, ...] = ()
    keys: Mapping[str, tuple[str, ...]] | None = None
    cascades: tuple[str, ...] = ()
    filters: tuple[str, str] | None = None
    replicates: bool | None = None
    encrypted: bool = False

    @property
    def is_mariadb(self) -> bool:
        """Whether the server is a MariaDB, which has a connector of its own."""
        return "mariadb" in self.version.lower()

    @property
    def name(self) -> str:
        """Database and table."""
        return f"{self.database}.{self.table}"


@dataclass(frozen=True, slots=True)
class Statements:
    """Statements that Debezium found in the binlog as text instead of rows, so their changes have no event.

    Attributes:
        of_table: How many are on the table.
        of_others: How many are on others.
        newest: When the newest of the table was logged; None where there is none.
    """

    of_table: int = 0
    of_others: int = 0
    newest: datetime | None = None


def statements_in(log: str, source: Source, since: datetime) -> Statements:
    """Count the statements in warnings of Connect's log.

    Args:
        log: The log, or its end.
        source: The table. A statement contains its name as a word, in any case, without a database or with this one.
        since: Earlier warnings don't count. It has a time zone; the log's times are in this machine's zone.
    """
    # A name without a database may be this table, as the log lacks the session's default database.
    named = re.compile(rf"(?:([\w$-]+)`?\s*\.\s*`?)?\b{re.escape(source.table)}\b", re.IGNORECASE)
    databases = (None, source.database.casefold())
    of_table, of_others, newest = 0, 0, None
    for found in _LOGGED.finditer(log):
        at = logged_at(found[1])
        if at is None or at < since:
            continue
        if any((name[1] and name[1].casefold()) in databases for name in named.finditer(found[2])):
            of_table, newest = of_table + 1, at
        else:
            of_others += 1
    return Statements(of_table, of_others, newest)


def logged_at(line: str) -> datetime | None:
    """Return the time of a line of Connect's log; None where it does not begin with one."""
    try:
        return datetime.fromisoformat(line.partition(" ")[0]).astimezone()
    except ValueError:
        return None


def problems_of(source: Source, statements: Statements | None = None) -> list[Problem]:
    """Return the faults of a source, the worst effects first.

    Args:
        source: The server's settings and the table's shape.
        statements: The statements in Connect's log; None where the log can't be read.
    """
    found = [*_table_problems(source), *_settings_problems(source)]
    if statements is not None and statements.newest is not None:
        found.append(
            Problem(
                "statements",
                Effect.LOST,
                f"{statements.of_table} statements on {source.table} came as text, not as rows, the newest at"
                f" {statements.newest.isoformat(timespec='seconds')}: what they changed has no event",
                "Find the sessions with a binlog_format of their own (SET SESSION binlog_format) and end that; then"
                " repair. An audit that finds both sides equal closes this.",
            )
        )
    return sorted(found, key=lambda problem: list(Effect).index(problem.effect))


def lock_problems(source: Source) -> list[Problem]:
    """Return the problems that prevent locking rows by their key, or the gaps of missing rows."""
    return [problem for problem in _table_problems(source) if problem.name in _UNLOCKABLE]


def _table_problems(source: Source) -> Iterator[Problem]:
    name = _sql_name(source)
    if source.found_as is None:
        yield Problem(
            "no-table",
            Effect.UNTOLD,
            f"there is no table {source.name}, or the account of MYSQL_URL may not see it",
            f"Make it, or grant SELECT on it: {create_table(name)};",
        )
        return
    if source.found_as != source.table:
        yield Problem(
            "table-case",
            Effect.STOPS,
            f"the table is named {source.found_as}, not {source.table}, so its changes go to another topic",
            f"Rename it, on a server whose lower_case_table_names keeps the case: "
            f"RENAME TABLE {quoted(source.found_as)} TO {name};",
        )
    if source.kind == "SYSTEM VERSIONED":
        yield Problem(
            "system-versioned",
            Effect.STOPS,
            f"{source.name} is system-versioned, which Debezium can't follow",
            f"ALTER TABLE {name} DROP SYSTEM VERSIONING;",
        )
    elif source.kind != "BASE TABLE":
        yield Problem(
            "no-base-table",
            Effect.STOPS,
            f"{source.name} is a {source.kind.lower()}, which has no changes in the binlog",
            "Follow the table behind it under this name.",
        )
        return
    elif source.engine.lower() != "innodb":
        yield Problem(
            OTHER_ENGINE,
            Effect.RISKS,
            f"{source.name} is kept by {source.engine}, so a failed statement may leave rows that no change tells,"
            " and a repair can't lock the rows that it reads",
            f"ALTER TABLE {name} ENGINE=InnoDB;",
        )
    yield from _column_problems(source)
    yield from _key_problems(source)
    version = _VERSION.match(source.version)
    logged = version is not None and not source.is_mariadb and (int(version[1]), int(version[2])) >= _LOGS_CASCADES
    if source.cascades and not logged:
        yield Problem(
            "cascades",
            Effect.RISKS,
            f"the foreign keys {', '.join(source.cascades)} change rows of {source.name} by their actions, which this"
            " server does not write into the binlog",
            "Let the application change these rows itself (ON DELETE RESTRICT), or repair after the parent's changes.",
        )


def _column_problems(source: Source) -> Iterator[Problem]:
    name = _sql_name(source)
    by_name = {column.name: column for column in source.columns}
    any_case = {column.name.lower(): column for column in source.columns}
    for wanted in USER_FIELDS:
        column = by_name.get(wanted)
        if column is None and wanted in any_case:
            other = any_case[wanted].name
            yield Problem(
                "column-case",
                Effect.STOPS,
                f"the column {other} of {source.name} must be named {wanted}: events have it in the table's case",
                f"ALTER TABLE {name} RENAME COLUMN {quoted(other)} TO {quoted(wanted)};",
            )
        elif column is None:
            yield Problem(
                "column-missing",
                Effect.STOPS,
                f"{source.name} has no column {wanted}, so nothing tells what to store for it",
                f"Add it as in: {create_table(name)};",
            )
        elif wanted == KEY:
            yield from _key_type_problems(source, column)
        elif column.type not in _TEXTS:
            yield Problem(
                "column-type",
                Effect.STOPS,
                f"the column {wanted} of {source.name} is {column.whole_type}, which does not reach the topic as text",
                f"ALTER TABLE {name} MODIFY {quoted(wanted)} VARCHAR(255)"
                f"{'' if column.nullable else ' NOT NULL'} CHARACTER SET utf8mb4;",
            )


def _key_type_problems(source: Source, column: SourceColumn) -> Iterator[Problem]:
    way_out = f"ALTER TABLE {_sql_name(source)} MODIFY {quoted(KEY)} BIGINT NOT NULL;"
    if column.type not in KEY_BITS:
        yield Problem(
            "key-type",
            Effect.STOPS,
            f"{KEY} of {source.name} is {column.whole_type}, not BIGINT, so its changes can't be told apart by number",
            way_out,
        )
    elif column.type == "bigint" and "unsigned" in column.whole_type:
        yield Problem(
            "key-unsigned",
            Effect.STOPS,
            f"{KEY} of {source.name} is BIGINT UNSIGNED: Debezium writes a key above 9223372036854775807 as a negative"
            " one, which may be another user's",
            f"{way_out} Remove larger keys first.",
        )


def _key_problems(source: Source) -> Iterator[Problem]:
    keys = source.keys or {}
    key = (KEY,)
    add = f"ADD PRIMARY KEY ({quoted(KEY)});"
    if (primary := keys.get("PRIMARY")) is not None:
        if tuple(column.lower() for column in primary) != key:
            yield Problem(
                "primary-key",
                Effect.STOPS,
                f"the primary key of {source.name} is ({', '.join(primary)}), not ({KEY}), so a change does not tell"
                " its user alone, or two rows are one user's",
                f"ALTER TABLE {_sql_name(source)} DROP PRIMARY KEY, {add}",
            )
    elif key not in {tuple(column.lower() for column in columns) for columns in keys.values()}:
        yield Problem(
            "primary-key",
            Effect.STOPS,
            f"{source.name} has no primary key, so two rows may be one user's",
            f"ALTER TABLE {_sql_name(source)} {add}",
        )
    elif any(column.nullable for column in source.columns if column.name.lower() == KEY):
        yield Problem(
            "key-nullable",
            Effect.LOSES,
            f"{KEY} of {source.name} may be null, and the changes of rows without a key are lost",
            f"ALTER TABLE {_sql_name(source)} {add} Remove the rows without a key first.",
        )
    else:
        yield Problem(
            "no-primary-key",
            Effect.RISKS,
            f"{source.name} has a unique index on {KEY} but no primary key, so no user of it can be repaired",
            f"ALTER TABLE {_sql_name(source)} {add}",
        )


def _settings_problems(source: Source) -> Iterator[Problem]:
    settings = source.settings
    if unread := [name for name in _ESSENTIAL if name not in settings]:
        yield Problem(
            "settings-unread",
            Effect.UNTOLD,
            f"the server does not show {', '.join(unread)} to the account of MYSQL_URL, so nobody can tell whether it"
            " logs whole rows",
            "Let the account read them (SHOW GLOBAL VARIABLES), or look yourself: ROW and FULL are needed.",
        )
    if settings.get("log_bin", "ON").upper() not in ("ON", "1"):
        yield Problem(
            "no-binlog",
            Effect.STOPS,
            "the server writes no binlog (log_bin is OFF)",
            "Set log_bin in its configuration, with binlog_format=ROW and binlog_row_image=FULL, and restart it.",
        )
        return
    if (of := settings.get("binlog_format", "ROW").upper()) != "ROW":
        yield Problem(
            "binlog-format",
            Effect.LOSES,
            f"binlog_format is {of}: a statement that is logged as text changes rows without an event",
            f"{_set('binlog_format', 'ROW')} Sessions that are open keep theirs: end them; then repair.",
        )
    if (image := settings.get("binlog_row_image", "FULL").upper()) != "FULL":
        yield Problem(
            "row-image",
            Effect.STOPS,
            f"binlog_row_image is {image}: the connector fails on a row that is not whole",
            f"{_set('binlog_row_image', 'FULL')} Sessions that are open keep theirs: end them. A connector that failed"
            " needs a new snapshot, see docs/operate/runbook.md.",
        )
    if settings.get("log_bin_compress", "OFF").upper() in ("ON", "1"):
        yield Problem(
            "binlog-compressed",
            Effect.LOSES,
            "log_bin_compress is ON: Debezium passes over compressed events without a word",
            f"{_set('log_bin_compress', 'OFF')} Then repair what was changed meanwhile.",
        )
    yield from _retention_problems(source)


def _retention_problems(source: Source) -> Iterator[Problem]:
    settings = source.settings
    kept = _kept_seconds(settings)
    if 0 < kept < _SHORTEST_SECONDS:
        yield Problem(
            "binlog-expiry",
            Effect.RISKS,
            f"the binlog is kept for {kept:.0f} s: a connector that stops for longer has lost changes",
            _set("binlog_expire_logs_seconds", "604800"),
        )
    only, but = source.filters or ("", "")
    if (only and source.database not in only.split(",")) or source.database in but.split(","):
        yield Problem(
            "binlog-filter",
            Effect.LOSES,
            f"the server's binlog_do_db or binlog_ignore_db leaves {source.database} out of the binlog",
            "Take the option out of its configuration, restart it, and take a new snapshot.",
        )
    updates = settings.get("log_replica_updates", settings.get("log_slave_updates", "ON"))
    if source.replicates and updates.upper() not in ("ON", "1"):
        yield Problem(
            "replica-updates",
            Effect.LOSES,
            "the server is a replica that does not log what it replicates (log_slave_updates is OFF)",
            "Set log_slave_updates (log_replica_updates) in its configuration, restart it, and take a new snapshot.",
        )


def _kept_seconds(settings: Mapping[str, str]) -> float:
    """Return how long the binlog is kept, in seconds; 0 where it is never purged or that is not known."""
    if settings.get("binlog_expire_logs_auto_purge", "ON").upper() in ("OFF", "0"):
        return 0.0
    seconds = float(settings.get("binlog_expire_logs_seconds") or 0)
    return seconds or float(settings.get("expire_logs_days") or 0) * 86_400


def _set(setting: str, value: str) -> str:
    return f"SET GLOBAL {setting} = {value}; and the same in the server's configuration."


def _sql_name(source: Source) -> str:
    return f"{quoted(source.database)}.{quoted(source.table)}"
