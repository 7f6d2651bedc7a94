"""The connector of the users' table on a Connect worker: its settings, how it is registered, and how it is watched.

Belongs here: what brings the connector to run and sees that it goes on. Not here: the worker itself
(``local.connect``), and single requests to it (``stores.connect``).
"""

from __future__ import annotations

import hashlib
import re
import time
from typing import TYPE_CHECKING

from ghsync_dagster.domain.connector import CONNECTOR, FAILED, HALTED, NONE, RUNNING, ConnectorState
from ghsync_dagster.domain.errors import ConfigError, UnavailableError
from ghsync_dagster.local import mysql
from ghsync_dagster.mysql_url import MySqlAddress, parse_mysql_url

if TYPE_CHECKING:
    from collections.abc import Callable

    from ghsync_dagster.domain.source import Source
    from ghsync_dagster.settings import Settings
    from ghsync_dagster.stores.connect import ConnectWorker

_SETTLED = (RUNNING, FAILED, NONE)
_RUNNING_SECONDS = 90.0
# A state that is left behind, such as by a worker that was killed or before a resume, is not yet a verdict.
_VERDICT_SECONDS = 3.0
# Debezium gives up a database that does not answer after 30 s; later its task follows, or takes the table in at first.
_FOLLOW_SECONDS = 35.0
_POLL_SECONDS = 0.1
_MARIADB_SSL_MODES = {
    "DISABLED": "disable",
    "REQUIRED": "trust",
    "VERIFY_CA": "verify-ca",
    "VERIFY_IDENTITY": "verify-full",
}
# A task that can't read on fails within seconds of its restart; one that has little to read is soon at the end.
_WATCH_SECONDS = 15.0
# MySQL tells its followers apart by a number, which must be no other server's.
_FIRST_SERVER_ID = 1_000_000


def config_of(settings: Settings, bootstrap: str, url: str) -> dict[str, str]:
    """Return the connector's settings, but for ``database.user`` and ``database.password``.

    The names are those of the Debezium reference for the MySQL and MariaDB connectors.

    Args:
        settings: ``kafka_topic`` is where the changes go.
        bootstrap: The brokers, as the worker reaches them.
        url: The database, as the worker reaches it; it is asked which of the two it is.

    Raises:
        UnavailableError: The database can't be asked.
        RefusedError: The database's TLS is not as the URL asks for.
        ConfigError: KAFKA_TOPIC is no name that Debezium can give to the table's topic, or MYSQL_URL names a socket.
    """
    database = parse_mysql_url(url)
    if database.unix_socket:
        raise ConfigError(
            f"The connector can't follow {database}: Debezium connects by host and port only.",
            way_out="Set MYSQL_URL to host and port, without unix_socket.",
        )
    source = mysql.source(url)
    kind, name = ("mariadb", "MariaDb") if source.is_mariadb else ("mysql", "MySql")
    return {
        "connector.class": f"io.debezium.connector.{kind}.{name}Connector",
        "tasks.max": "1",
        "database.hostname": database.host,
        "database.port": str(database.port),
        "database.server.id": str(_server_id(settings)),
        "database.ssl.mode": ssl_mode(database, source),
        "topic.prefix": _topic_prefix(settings.kafka_topic, source.name),
        # Both are regular expressions.
        "database.include.list": re.escape(database.database),
        "table.include.list": re.escape(source.name),
        "snapshot.mode": "initial",
        "tombstones.on.delete": "true",
        "skipped.operations": "none",
        # A record waits this long at most for others of its batch; each batch costs Connect and Kafka processor time.
        "poll.interval.ms": "25",
        # How soon it notices that the database is gone, and tries again.
        "connect.keep.alive.interval.ms": "5000",
        # Its offset moves with the binlog, also while this table does not change. So the binlog may be purged behind
        # it, and an offset that stands still while the database writes is a fault.
        "heartbeat.interval.ms": "5000",
        # Only the table's own topic is made, so there is nowhere for news of its columns.
        "include.schema.changes": "false",
        "schema.history.internal.kafka.bootstrap.servers": bootstrap,
        "schema.history.internal.kafka.topic": f"{CONNECTOR}.schema-history",
        "schema.history.internal.store.only.captured.tables.ddl": "true",
        "key.converter": "org.apache.kafka.connect.json.JsonConverter",
        "key.converter.schemas.enable": "false",
        "value.converter": "org.apache.kafka.connect.json.JsonConverter",
        "value.converter.schemas.enable": "false",
        # Should the topic be missing, it comes with one partition, which keeps the order of the binlog.
        "topic.creation.default.partitions": "1",
        "topic.creation.default.replication.factor": "-1",
    }


def ssl_mode(database: MySqlAddress, source: Source) -> str:
    """Return the connector's word for an address's ``ssl_mode``; each of the two connectors has its own.

    Args:
        database: The address.
        source: What was read over a connection by it: MariaDB's connector knows no mode that takes TLS where there is
            some, so it gets what that connection got.
    """
    if not source.is_mariadb:
        return database.ssl_mode.lower()
    if database.ssl_mode == "PREFERRED":
        return "trust" if source.encrypted else "disable"
    return _MARIADB_SSL_MODES[database.ssl_mode]


def _topic_prefix(topic: str, table: str) -> str:
    ending = f".{table}"
    if not topic.endswith(ending) or topic == ending:
        raise ConfigError(
            f"KAFKA_TOPIC is {topic}, but Debezium ends the name of the table's topic with {ending}.",
            way_out=f"Set it to something{ending}, or set CONNECT_URL to a worker whose connector routes to it.",
        )
    return topic.removesuffix(ending)


def _server_id(settings: Settings) -> int:
    """Return a number of this home's own, the same at each start."""
    digest = hashlib.sha256(str(settings.home_dir).encode()).digest()
    return _FIRST_SERVER_ID + int.from_bytes(digest[:4], "big") % 1_000_000_000


def ensure(
    worker: ConnectWorker,
    config: dict[str, str],
    followers: Callable[[], frozenset[int]],
    gone: frozenset[int],
    log_end: Callable[[], str | None],
    progress: Callable[[str], None],
) -> ConnectorState:
    """Give the connector its settings where they differ, resume it where it was halted, and wait until it runs.

    One that was not at work before is watched until its offset moves, or until it had the time to fail again.

    Args:
        worker: Where it is to run.
        config: The settings that it must have.
        followers: Tells who follows the database now.
        gone: Those who followed it before the worker began, and are not the connector.
        log_end: Tells where the database's binlog ends, as ``file:position``.
        progress: Gets a line of text for each thing done.

    Raises:
        UnavailableError: It is refused, fails, or does not run in time.
    """
    current = worker.config()
    found = worker.told_state()
    state = found.state
    if current != config | {"name": CONNECTOR}:
        progress(f"connect: {'changing' if current else 'registering'} the connector {CONNECTOR}")
        gone |= followers()
        worker.configure(config)
    elif state == FAILED:
        gone |= followers()
        _restart(worker, progress)
    if found.halted:
        progress(f"connect: resuming the connector {CONNECTOR}, which was halted")
        gone |= followers()
        worker.resume()
    try:
        running = _await_running(worker, lambda: bool(followers() - gone))
    except UnavailableError:
        # Debezium's task may fail once as it starts right after another one has stopped.
        if state == FAILED or worker.told_state().state != FAILED:
            raise
        gone |= followers()
        _restart(worker, progress)
        running = _await_running(worker, lambda: bool(followers() - gone))
    if gone or state != RUNNING:
        progress(f"connect: watching whether the connector {CONNECTOR} goes on")
        running = _watch(worker, log_end)
        progress(f"connect: the connector {CONNECTOR} runs")
    return running


def _restart(worker: ConnectWorker, progress: Callable[[str], None]) -> None:
    progress(f"connect: restarting the connector {CONNECTOR}, which failed")
    worker.restart()


def _await_running(worker: ConnectWorker, follows: Callable[[], bool]) -> ConnectorState:
    """Wait until the connector runs and follows the database.

    Its task is called running before it has reached the database, so the database is asked too. While it takes the
    table in for the first time, it does not follow yet, and one that began to just before the first request is not
    told from the one before it: after a while, to run is enough.
    """
    began = since = time.monotonic()
    state = ConnectorState(NONE)
    while time.monotonic() - began < _RUNNING_SECONDS:
        before, state = state, worker.told_state()
        # The answer may have taken long.
        now = time.monotonic()
        if state.state != before.state:
            since = now
        if state.state == RUNNING and (follows() or now - since > _FOLLOW_SECONDS):
            return state
        if state.state == FAILED and now - since > _VERDICT_SECONDS:
            break
        time.sleep(_POLL_SECONDS)
    if state.state == RUNNING:
        return state
    raise _does_not_run(state)


def _watch(worker: ConnectWorker, log_end: Callable[[], str | None]) -> ConnectorState:
    """Watch a connector that has begun to run until its offset moves or is at the end of the binlog.

    It fails at the event that it can't read. Where the offset does neither, as that of a connector which may leave out
    all that is left to read, it had the time to fail: after a while, to run is enough.

    Raises:
        UnavailableError: It failed again.
    """
    began = time.monotonic()
    offset = worker.offset()
    while True:
        state = worker.told_state()
        if state.state == FAILED:
            raise _does_not_run(state)
        now = worker.offset()
        goes_on = now is not None and (
            offset is None or now.text != offset.text or (now.position is not None and now.position == log_end())
        )
        if state.is_running and (goes_on or time.monotonic() - began > _WATCH_SECONDS):
            return state
        if time.monotonic() - began > _RUNNING_SECONDS:
            raise _does_not_run(state)
        time.sleep(_POLL_SECONDS)


def _does_not_run(state: ConnectorState) -> UnavailableError:
    on = f" on {state.where}" if state.where else ""
    after = f", {state.reason}" if state.reason else "" if state.is_stopped else f" after {_RUNNING_SECONDS:.0f} s"
    return UnavailableError(
        f"The connector {CONNECTOR}{on} does not run: it is {state.state}{after}.", way_out=state.way_out()
    )


def await_settled(worker: ConnectWorker) -> ConnectorState:
    """Wait while the connector is on its way to run, and return its state then.

    Raises:
        UnavailableError: The worker does not answer, or refuses to.
    """
    began = time.monotonic()
    while (found := worker.told_state()).state not in _SETTLED:
        if time.monotonic() - began > (_VERDICT_SECONDS if found.state in HALTED else _RUNNING_SECONDS):
            break
        time.sleep(_POLL_SECONDS)
    return found


def require_running(found: ConnectorState) -> None:
    """See that a connector that is there runs; where there is none, nothing is wrong with it.

    Raises:
        UnavailableError: It failed, was halted, or is still on its way.
    """
    if found.state not in (RUNNING, NONE):
        raise _does_not_run(found)
