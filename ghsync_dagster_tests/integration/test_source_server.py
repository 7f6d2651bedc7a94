"""What is wrong with MySQL's table or settings is named, with its way out, before changes are lost without a word."""

from __future__ import annotations

import os
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import dagster as dg
import pytest

from ghsync_dagster.defs.cdc.source_watch import source_watch
from ghsync_dagster.defs.ops.alerts import alerts_sensor
from ghsync_dagster.domain.source import Effect, Source, problems_of
from ghsync_dagster.domain.table import create_table
from ghsync_dagster.stores.mysql import MySqlStore
from ghsync_dagster.stores.mysql_url import parse_mysql_url
from ghsync_dagster.wiring import check_source
from ghsync_dagster_tests.support.cdc_parts import GHSYNC, until
from ghsync_dagster_tests.support.long_campaign import HANG_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import SecretStr

    from ghsync_dagster.settings import Settings

pytestmark = [pytest.mark.integration, pytest.mark.servers("stack")]

COLUMNS = "login VARCHAR(255) NOT NULL, gravatar_id VARCHAR(255), avatar_url VARCHAR(255), `url` VARCHAR(255)"
GOOD_SHAPES = {
    "as declared": create_table(),
    "wider columns": create_table() + "; ALTER TABLE Users MODIFY `url` VARCHAR(512), MODIFY avatar_url TEXT",
    "another column and index": create_table() + "; ALTER TABLE Users ADD bio TEXT AFTER login, ADD INDEX (login)",
    "INT key": f"CREATE TABLE Users (user_id INT PRIMARY KEY, {COLUMNS})",
    "INT UNSIGNED key": f"CREATE TABLE Users (user_id INT UNSIGNED PRIMARY KEY, {COLUMNS})",
    "partitions": f"CREATE TABLE Users (user_id BIGINT PRIMARY KEY, {COLUMNS}) PARTITION BY HASH (user_id)",
}
BAD_SHAPES = {
    "no table": ("SELECT 1", {"no-table"}),
    "BIGINT UNSIGNED": (f"CREATE TABLE Users (user_id BIGINT UNSIGNED PRIMARY KEY, {COLUMNS})", {"key-unsigned"}),
    "text key": (f"CREATE TABLE Users (user_id VARCHAR(20) PRIMARY KEY, {COLUMNS})", {"key-type"}),
    "decimal key": (f"CREATE TABLE Users (user_id DECIMAL(20) PRIMARY KEY, {COLUMNS})", {"key-type"}),
    "no key": (f"CREATE TABLE Users (user_id BIGINT NOT NULL, {COLUMNS})", {"primary-key"}),
    "unique index alone": (f"CREATE TABLE Users (user_id BIGINT NOT NULL UNIQUE, {COLUMNS})", {"no-primary-key"}),
    "unique index with nulls": (f"CREATE TABLE Users (user_id BIGINT UNIQUE, {COLUMNS})", {"key-nullable"}),
    "another primary key": (
        f"CREATE TABLE Users (id INT AUTO_INCREMENT PRIMARY KEY, user_id BIGINT NOT NULL UNIQUE, {COLUMNS})",
        {"primary-key"},
    ),
    "key of two columns": (
        f"CREATE TABLE Users (user_id BIGINT, region INT, {COLUMNS}, PRIMARY KEY (user_id, region))",
        {"primary-key"},
    ),
    "column dropped": (create_table() + "; ALTER TABLE Users DROP COLUMN `url`", {"column-missing"}),
    "upper case": (
        create_table() + "; ALTER TABLE Users CHANGE login LOGIN VARCHAR(255) NOT NULL",
        {"column-case"},
    ),
    "binary column": (create_table() + "; ALTER TABLE Users MODIFY `url` VARBINARY(255)", {"column-type"}),
    "number column": (create_table() + "; ALTER TABLE Users MODIFY gravatar_id INT", {"column-type"}),
    "view": (
        "CREATE VIEW Users AS SELECT 1 AS user_id",
        {"no-base-table"},
    ),
    "another engine": (create_table() + "; ALTER TABLE Users ENGINE=MyISAM", {"engine"}),
    "all at once": (
        f"CREATE TABLE Users (user_id BIGINT UNSIGNED, Login INT, {COLUMNS.partition(', ')[2]}) ENGINE=MyISAM",
        {"key-unsigned", "column-case", "primary-key", "engine"},
    ),
}
SETTINGS = {
    "MIXED format": ("binlog_format", "MIXED", "binlog-format", Effect.LOSES),
    "STATEMENT format": ("binlog_format", "STATEMENT", "binlog-format", Effect.LOSES),
    "MINIMAL image": ("binlog_row_image", "MINIMAL", "row-image", Effect.STOPS),
    "NOBLOB image": ("binlog_row_image", "NOBLOB", "row-image", Effect.STOPS),
    "short expiry": ("binlog_expire_logs_seconds", "3600", "binlog-expiry", Effect.RISKS),
}


def names(source: Source) -> set[str]:
    return {problem.name for problem in problems_of(source)}


def run(mysql: MySqlStore, statements: str) -> None:
    for statement in statements.split("; "):
        mysql.execute([(statement, ())])


@pytest.fixture
def table(mysql_url: str) -> Iterator[MySqlStore]:
    """An open store on a database of the test's own, without a table."""
    with MySqlStore(mysql_url, timeout_seconds=5) as opened:
        yield opened


@contextmanager
def setting(mysql: MySqlStore, name: str, value: str) -> Iterator[None]:
    """Give the server another GLOBAL setting for a while."""
    ((_, before),) = mysql._run("Asking", "SHOW GLOBAL VARIABLES WHERE Variable_name = %s", (name,))
    mysql.execute([(f"SET GLOBAL {name} = {value}", ())])
    try:
        yield
    finally:
        mysql.execute([(f"SET GLOBAL {name} = {before}", ())])


@pytest.mark.parametrize("shape", GOOD_SHAPES)
def test_a_table_that_can_be_followed_has_no_problem(table: MySqlStore, shape: str) -> None:
    run(table, GOOD_SHAPES[shape])
    assert problems_of(table.source()) == []
    # What can be followed can be repaired.
    assert table.read_locked(["1"]) is not None


@pytest.mark.parametrize("shape", BAD_SHAPES)
def test_each_shape_that_cannot_be_followed_is_named_with_its_way_out(table: MySqlStore, shape: str) -> None:
    statements, expected = BAD_SHAPES[shape]
    run(table, statements)
    found = problems_of(table.source())
    assert {problem.name for problem in found} == expected
    assert all(problem.way_out and "Users" in problem.text for problem in found)


@pytest.mark.parametrize(
    "shape",
    [
        "unique index alone",
        "unique index with nulls",
        "BIGINT UNSIGNED",
        "decimal key",
        "column dropped",
        "upper case",
        "binary column",
        "number column",
    ],
)
def test_the_way_out_of_a_shape_is_a_statement_that_works(table: MySqlStore, shape: str) -> None:
    run(table, BAD_SHAPES[shape][0])
    (problem,) = problems_of(table.source())
    if problem.name == "column-missing":
        run(table, "ALTER TABLE Users ADD `url` VARCHAR(255)")
    else:
        run(table, problem.way_out.partition(";")[0])
    assert problems_of(table.source()) == []


def test_a_versioned_table_of_mariadb_is_named(table: MySqlStore) -> None:
    if not table.source().is_mariadb:
        pytest.skip("MySQL has no such tables")
    run(table, create_table() + " WITH SYSTEM VERSIONING")
    assert names(table.source()) == {"system-versioned"}


def test_a_foreign_key_that_changes_rows_out_of_the_binlog_is_named(table: MySqlStore) -> None:
    run(table, "CREATE TABLE Parents (id BIGINT PRIMARY KEY); " + create_table())
    run(table, "ALTER TABLE Users ADD FOREIGN KEY (user_id) REFERENCES Parents (id) ON DELETE CASCADE")
    source = table.source()
    logged = not source.is_mariadb and int(source.version.partition(".")[0]) >= 9
    assert names(source) == (set() if logged else {"cascades"})


@pytest.mark.parametrize("case", SETTINGS)
def test_each_setting_that_stops_or_loses_changes_is_named(mysql: MySqlStore, case: str) -> None:
    name, value, problem, effect = SETTINGS[case]
    assert problems_of(mysql.source()) == []
    with setting(mysql, name, value):
        (found,) = problems_of(mysql.source())
    assert (found.name, found.effect) == (problem, effect)
    assert name in found.way_out
    assert problems_of(mysql.source()) == []


def test_compressed_events_are_named_on_mariadb_and_read_right_from_mysql(mysql: MySqlStore) -> None:
    mariadb = mysql.source().is_mariadb
    with setting(mysql, "log_bin_compress" if mariadb else "binlog_transaction_compression", "ON"):
        assert names(mysql.source()) == ({"binlog-compressed"} if mariadb else set())


def test_an_account_that_may_only_read_the_table_can_look(mysql: MySqlStore) -> None:
    at = parse_mysql_url(f"mysql://reader:pw@{mysql.address.host}:{mysql.address.port}/{mysql.address.database}")
    mysql.execute([("CREATE USER reader IDENTIFIED BY 'pw'", ())])
    try:
        # The local account may grant nothing.
        right = "INSERT INTO mysql.tables_priv (Host, Db, User, Table_name, Table_priv) VALUES (%s, %s, %s, %s, %s)"
        mysql.execute([(right, ("%", at.database, "reader", "Users", "Select")), ("FLUSH PRIVILEGES", ())])
        with MySqlStore(f"mysql://reader:pw@{at.host}:{at.port}/{at.database}") as reader:
            source = reader.source()
            assert (problems_of(source), source.filters, source.replicates) == ([], None, None)
            with setting(mysql, "binlog_format", "MIXED"):
                assert names(reader.source()) == {"binlog-format"}
    finally:
        mysql.execute([("DROP USER reader", ())])


# The commands, the checks and the alert, on the whole stack


@pytest.fixture
def root(stack_settings: Settings) -> Iterator[MySqlStore]:
    """The stack's table, open."""
    with MySqlStore(secret(stack_settings.mysql_url)) as opened:
        yield opened


def secret(value: SecretStr | None) -> str:
    assert value is not None
    return value.get_secret_value()


def ghsync(settings: Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command on the stack."""
    environment = {
        **os.environ,
        "GHSYNC_HOME": str(settings.home_dir),
        "GHSYNC_LOG_LEVEL": "ERROR",
        "MONGODB_URI": secret(settings.mongodb_uri),
        "MONGODB_DATABASE": settings.mongodb_database,
        "KAFKA_BOOTSTRAP_SERVERS": str(settings.kafka_bootstrap_servers),
        "KAFKA_GROUP_ID": settings.kafka_group_id,
        "MYSQL_URL": secret(settings.mysql_url),
        "CONNECT_URL": str(settings.connect_url),
    }
    return subprocess.run([GHSYNC, *arguments], env=environment, capture_output=True, text=True, timeout=HANG_SECONDS)


def test_up_refuses_and_drain_and_audit_say_first_what_loses_changes(
    stack_settings: Settings, root: MySqlStore
) -> None:
    with setting(root, "binlog_format", "MIXED"):
        up = ghsync(stack_settings, "up", "connect")
        drain = ghsync(stack_settings, "cdc", "drain")
        audit = ghsync(stack_settings, "cdc", "audit", "--patience", "1")
    assert (up.returncode, drain.returncode, audit.returncode) == (2, 1, 0)
    assert up.stderr.startswith("error: Changes can't be followed: binlog_format is MIXED")
    for said in (drain, audit):
        assert said.stderr.startswith("source: binlog_format is MIXED")
        assert "SET GLOBAL binlog_format = ROW" in said.stderr
    for arguments in (("up", "connect"), ("cdc", "drain"), ("cdc", "audit")):
        assert ghsync(stack_settings, *arguments).returncode == 0


def test_what_only_risks_changes_is_said_and_stops_nothing(stack_settings: Settings, root: MySqlStore) -> None:
    with setting(root, "binlog_expire_logs_seconds", "600"):
        up, drain = ghsync(stack_settings, "up", "connect"), ghsync(stack_settings, "cdc", "drain")
    assert (up.returncode, drain.returncode) == (0, 0)
    assert "the binlog is kept for 600 s" in up.stderr
    assert drain.stderr.startswith("source: the binlog is kept for 600 s")


def test_a_statement_that_came_as_text_is_told_until_both_sides_are_equal(
    stack_settings: Settings, root: MySqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    root.execute([("INSERT INTO Users (user_id, login) VALUES (1, 'one'), (2, 'two')", ())])
    until(lambda: "2 applied" in ghsync(stack_settings, "cdc", "drain").stdout, 60)
    assert ghsync(stack_settings, "cdc", "audit").returncode == 0
    assert check_source(stack_settings).passed
    # On a connection of its own: the session is left as it is.
    with MySqlStore(secret(stack_settings.mysql_url)) as session:
        session.execute([("SET SESSION binlog_format = STATEMENT", ())])
        session.execute([("UPDATE Users\n SET login = 'lost-s3cret' WHERE user_id = 1", ())])
    found = until(lambda: check_source(stack_settings), 60, lambda finding: not finding.passed)
    assert "1 statements on Users came as text" in found.summary
    assert found.counts["statements"] == 1
    up, drain, audit = (
        ghsync(stack_settings, *arguments)
        for arguments in (("up", "connect"), ("cdc", "drain"), ("cdc", "audit", "--patience", "1"))
    )
    assert (up.returncode, drain.returncode, audit.returncode) == (0, 1, 1)
    assert "1 statements on Users came as text" in up.stderr
    for said in (drain, audit):
        assert said.stderr.startswith("source: 1 statements on Users came as text")
        assert "lost-s3cret" not in said.stderr
    assert "way out: Likely cause: 1 statements on Users" in audit.stderr
    _sees_and_alerts(stack_settings, monkeypatch)
    # Once a change as a row has brought the user, and the audit finds both sides equal, nothing is left to say.
    root.execute([("UPDATE Users SET login = 'found' WHERE user_id = 1", ())])
    until(lambda: "1 applied" in ghsync(stack_settings, "cdc", "drain").stdout, 60)
    assert ghsync(stack_settings, "cdc", "audit").returncode == 0
    assert check_source(stack_settings).passed
    assert ghsync(stack_settings, "cdc", "drain").returncode == 0


def _sees_and_alerts(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """See that the sensor reports the check once, and that this is an alert."""
    monkeypatch.setenv("GHSYNC_HOME", str(settings.home_dir))
    monkeypatch.setenv("MYSQL_URL", secret(settings.mysql_url))
    with dg.DagsterInstance.ephemeral() as instance:
        tick = source_watch.evaluate_tick(dg.build_sensor_context(instance=instance))
        (event,) = tick.asset_events
        assert isinstance(event, dg.AssetCheckEvaluation)
        assert (event.check_name, event.passed) == ("source_settings", False)
        instance.report_runless_asset_event(event)
        assert not source_watch.evaluate_tick(dg.build_sensor_context(instance=instance)).asset_events
        seen = dg.build_sensor_context(instance=instance, cursor='{"logged":0,"posted":0}')
        assert "1 alerts" in str(alerts_sensor.evaluate_tick(seen).skip_message)
