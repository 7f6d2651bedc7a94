"""The connector of the users' table on a Connect worker: its settings, how it is registered, and what state it is in.

Belongs here: all that is asked of a worker's REST interface about the connector. Not here: the worker itself, see
``local.connect``.
"""

from __future__ import annotations

import hashlib
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ghsync_dagster.domain.errors import ConfigError, UnavailableError
from ghsync_dagster.local import mysql
from ghsync_dagster.mysql_url import MySqlAddress, parse_mysql_url
from ghsync_dagster.observability.logging import redact

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx

    from ghsync_dagster.domain.source import Source
    from ghsync_dagster.settings import Settings

CONNECTOR = "ghsync-users"
NONE = "NONE"
_RUNNING, _FAILED, _UNASSIGNED = "RUNNING", "FAILED", "UNASSIGNED"
_SETTLED = (_RUNNING, _FAILED, NONE)
_HALTED = ("PAUSED", "STOPPED")
_RUNNING_SECONDS = 90.0
_REQUEST_SECONDS = 10.0
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
# A worker that is about to find its order anew says so with 409 to some requests and with 500 to others.
_REBALANCING = "a rebalance is expected"
_RIGHTS = "the database user needs SELECT, RELOAD, SHOW DATABASES, REPLICATION SLAVE and REPLICATION CLIENT"
# MySQL tells its followers apart by a number, which must be no other server's.
_FIRST_SERVER_ID = 1_000_000


@dataclass(frozen=True)
class ConnectorState:
    """How the connector is.

    Attributes:
        state: ``RUNNING`` where it and its task run, else the state of what does not; ``NONE`` where there is none.
        reason: Why it failed, in one line; None unless it did.
        halted: Whether the connector itself was halted, in whatever state its task is.
    """

    state: str
    reason: str | None = None
    halted: bool = False

    def as_json(self) -> dict[str, object]:
        """Return the fields as the status shows them."""
        return {"connector": self.state, "connector_error": self.reason}


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


def client_of(url: str, seconds: float = _REQUEST_SECONDS) -> httpx.Client:
    """Return a client of the worker at an address.

    Raises:
        ConfigError: The address is malformed.
    """
    import httpx

    try:
        # A proxy of the environment knows no server of this machine.
        return httpx.Client(base_url=url, timeout=seconds, trust_env=not url.startswith("http://127.0.0.1:"))
    except httpx.InvalidURL as error:
        raise ConfigError(f"CONNECT_URL is malformed: {redact(str(error))}.", way_out="Correct CONNECT_URL.") from None


def ensure(
    client: httpx.Client,
    config: dict[str, str],
    followers: Callable[[], frozenset[int]],
    gone: frozenset[int],
    progress: Callable[[str], None],
) -> ConnectorState:
    """Give the connector its settings where they differ, let it go on where it was halted, and wait until it runs.

    Args:
        client: Leads to the worker.
        config: The settings that it must have.
        followers: Tells who follows the database now.
        gone: Those who followed it before the worker began, and are not the connector.
        progress: Gets a line of text for each thing done.

    Raises:
        UnavailableError: It is refused, fails, or does not run in time.
    """
    current = _ask(client, "GET", f"/connectors/{CONNECTOR}/config", missing=None)
    found = _state(client)
    state = found.state
    if current != config | {"name": CONNECTOR}:
        progress(f"connect: {'changing' if current else 'registering'} the connector {CONNECTOR}")
        gone |= followers()
        _ask(client, "PUT", f"/connectors/{CONNECTOR}/config", config)
    elif state == _FAILED:
        gone |= followers()
        _restart(client, progress)
    if found.halted:
        progress(f"connect: resuming the connector {CONNECTOR}, which was halted")
        gone |= followers()
        _ask(client, "PUT", f"/connectors/{CONNECTOR}/resume")
    try:
        running = _await_running(client, lambda: bool(followers() - gone))
    except UnavailableError:
        # Debezium's task may fail once as it starts right after another one has stopped.
        if state == _FAILED or _state(client).state != _FAILED:
            raise
        gone |= followers()
        _restart(client, progress)
        running = _await_running(client, lambda: bool(followers() - gone))
    if gone or state != _RUNNING:
        progress(f"connect: the connector {CONNECTOR} runs")
    return running


def _restart(client: httpx.Client, progress: Callable[[str], None]) -> None:
    progress(f"connect: restarting the connector {CONNECTOR}, which failed")
    _ask(client, "POST", f"/connectors/{CONNECTOR}/restart?includeTasks=true&onlyFailed=true")


def _await_running(client: httpx.Client, follows: Callable[[], bool]) -> ConnectorState:
    """Wait until the connector runs and follows the database.

    Its task is called running before it has reached the database, so the database is asked too. While it takes the
    table in for the first time, it does not follow yet, and one that began to just before it was looked at is not
    told from the one before it: after a while, to run is enough.
    """
    began = since = time.monotonic()
    state = ConnectorState(NONE)
    while time.monotonic() - began < _RUNNING_SECONDS:
        before, state = state, _state(client)
        # The answer may have taken long.
        now = time.monotonic()
        if state.state != before.state:
            since = now
        if state.state == _RUNNING and (follows() or now - since > _FOLLOW_SECONDS):
            return state
        if state.state == _FAILED and now - since > _VERDICT_SECONDS:
            break
        time.sleep(_POLL_SECONDS)
    if state.state == _RUNNING:
        return state
    raise UnavailableError(
        f"The connector {CONNECTOR} does not run: it is {state.state}"
        + (f", {state.reason}." if state.reason else f" after {_RUNNING_SECONDS:.0f} s."),
        way_out=f"Read the worker's log, mend what it names ({_RIGHTS}), then run ghsync up again.",
    )


def await_settled(url: str) -> ConnectorState:
    """Wait while the connector is on its way to run, and tell how it is then.

    Raises:
        UnavailableError: The worker does not answer, or refuses to.
    """
    began = time.monotonic()
    with client_of(url) as client:
        while (found := _state(client)).state not in _SETTLED:
            if time.monotonic() - began > (_VERDICT_SECONDS if found.state in _HALTED else _RUNNING_SECONDS):
                break
            time.sleep(_POLL_SECONDS)
    return found


def require_running(found: ConnectorState, where: str) -> None:
    """See that a connector that is there runs; where there is none, nothing is wrong with it.

    Args:
        found: How it is.
        where: The worker's address, for the error.

    Raises:
        UnavailableError: It failed, was halted, or is still on its way.
    """
    if found.state in (_RUNNING, NONE):
        return
    if found.state == _FAILED:
        why = f"{found.reason}."
        way_out = (
            "Mend what it names, then restart it there: POST /connectors/"
            f"{CONNECTOR}/restart?includeTasks=true&onlyFailed=true."
        )
    elif found.state in _HALTED:
        why = f"it is {found.state}."
        way_out = f'Resume it there: curl -X PUT "$CONNECT_URL/connectors/{CONNECTOR}/resume".'
    else:
        why = f"it is {found.state} after {_RUNNING_SECONDS:.0f} s."
        way_out = "Read the worker's log, mend what it names, then run ghsync up again."
    raise UnavailableError(f"The connector {CONNECTOR} on {where} does not run: {why}", way_out=way_out)


def state_at(url: str) -> ConnectorState:
    """Return how the connector on the worker at an address is.

    Raises:
        UnavailableError: The worker does not answer, or refuses to.
    """
    with client_of(url) as client:
        return _state(client)


def _state(client: httpx.Client) -> ConnectorState:
    answer = _ask(client, "GET", f"/connectors/{CONNECTOR}/status", missing=None)
    if answer is None:
        # A worker that has just begun, or got its settings, does not tell yet how a connector is.
        there = _ask(client, "GET", f"/connectors/{CONNECTOR}/config", missing=None) is not None
        return ConnectorState(_UNASSIGNED if there else NONE)
    parts = [answer["connector"], *answer["tasks"]]
    halted = answer["connector"]["state"] in _HALTED
    for part in parts:
        if part["state"] == _FAILED:
            return ConnectorState(_FAILED, _reason(part.get("trace", "")), halted)
    others = [part["state"] for part in parts if part["state"] != _RUNNING]
    # A connector whose task is still to come does nothing yet.
    return ConnectorState(others[0] if others else _RUNNING if answer["tasks"] else _UNASSIGNED, halted=halted)


def _reason(trace: str) -> str:
    """Return the first line of a Java stack trace, and its innermost cause where there is one."""
    lines = trace.strip().splitlines() or ["no reason is given"]
    causes = [line.removeprefix("Caused by: ") for line in lines if line.startswith("Caused by: ")]
    return redact("; ".join([lines[0], *causes[-1:]]))


def _ask(client: httpx.Client, method: str, path: str, body: object = None, **missing: None) -> Any:  # noqa: ANN401
    """Send one request and return the JSON of its answer; while workers find their order, ask again.

    Args:
        client: Leads to the worker.
        method: HTTP's.
        path: Below the worker's address.
        body: Sent as JSON, if any.
        missing: ``missing=None`` gives None where there is no such connector.

    Raises:
        UnavailableError: There is no answer, or it is a refusal.
    """
    import httpx

    deadline = time.monotonic() + _RUNNING_SECONDS
    while True:
        try:
            answer = client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise UnavailableError(
                f"The Connect worker at {redact(str(client.base_url))} does not answer: {type(error).__name__}.",
                way_out="Read its log; run ghsync up connect.",
            ) from None
        refused = answer.is_error
        rebalancing = refused and (answer.status_code == httpx.codes.CONFLICT or _REBALANCING in _message(answer))
        if not rebalancing or time.monotonic() > deadline:
            break
        time.sleep(_POLL_SECONDS)
    if answer.status_code == httpx.codes.NOT_FOUND and missing:
        return None
    if refused:
        raise UnavailableError(
            f"The Connect worker refuses {method} {path}: {redact(_message(answer))}",
            way_out=f"Mend what it names, or what its log does ({_RIGHTS}), then run ghsync up again.",
        )
    return answer.json() if answer.content else None


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {answer.status_code}"
