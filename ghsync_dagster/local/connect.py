"""Kafka Connect with Debezium: the worker that CONNECT_URL names, else a local one; the connector of the users' table.

Belongs here: the worker's settings, the connector's settings, how it is registered and what state it is in.
Not here: the broker and the database that it stands between.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ghsync_dagster.domain.errors import ConfigError, UnavailableError
from ghsync_dagster.local import kafka, mysql
from ghsync_dagster.local.jars import ensure_unpacked, locked_set
from ghsync_dagster.local.supervisor import ServerSpec, ServiceStatus, Supervisor
from ghsync_dagster.observability.logging import get_logger, redact

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import httpx

    from ghsync_dagster.settings import Settings

SERVICE = "connect"
CONNECTOR = "ghsync-users"
DEFAULT_PORT = 8083
EXTERNAL = "external"
_HEAP_MEGABYTES = 384
_REQUEST_SECONDS = 10.0
_PING_SECONDS = 3.0
_RUNNING_SECONDS = 90.0
# A state that is left behind, such as by a worker that was killed or before a resume, is not yet a verdict.
_VERDICT_SECONDS = 3.0
# Debezium gives up a database that does not answer after 30 s; later its task follows, or takes the table in at first.
_FOLLOW_SECONDS = 35.0
_POLL_SECONDS = 0.1
_NOT_FOUND, _CONFLICT, _ERRORS_FROM = 404, 409, 400
# A worker that is about to find its order anew says so with 409 to some requests and with 500 to others.
_REBALANCING = "a rebalance is expected"
_RUNNING, _FAILED, _UNASSIGNED, _NONE = "RUNNING", "FAILED", "UNASSIGNED", "NONE"
_SETTLED = (_RUNNING, _FAILED, _NONE)
_HALTED = ("PAUSED", "STOPPED")
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


def ensure_connect(settings: Settings, progress: Callable[[str], None] | None = None) -> str:
    """Return the address of a Connect worker on which the connector runs.

    Starts the local worker, and the broker and database that it needs, where none are named.

    Raises:
        UnavailableError: A server did not start, or the connector does not run.
        ConfigError: A setting does not fit a local worker.
    """
    log = get_logger(SERVICE)
    status = up(settings, progress or (lambda text: log.info("local_server", detail=text)))
    # A status is shown, so it hides the credentials that an address of the user's may have.
    return settings.connect_url.rstrip("/") if settings.connect_url else str(status.uri)


def up(settings: Settings, progress: Callable[[str], None]) -> ServiceStatus:
    """Start the local worker unless it runs, with what it needs, and see that the connector runs as configured.

    With CONNECT_URL ask that worker; a connector that it has is left as it is, and has to run.

    Raises:
        UnavailableError: A server did not start, or the connector does not run; holds its state or the reason.
        ConfigError: A setting does not fit a local worker.
    """
    if settings.connect_url:
        return _up_external(settings, settings.connect_url.rstrip("/"), progress)
    _refuse_security(settings, "A local Connect worker", "Set CONNECT_URL to a worker of your own, set up for it.")
    bootstrap = kafka.ensure_kafka(settings, progress)
    url = mysql.ensure_mysql(settings, progress)
    database = mysql.parse_url(url)
    supervisor = _supervisor(settings)
    if _bootstrap_in_use(settings) not in (None, bootstrap):
        supervisor.down(progress)
    login = _keep_login(_folder(settings) / "secrets", database)
    gone: list[int] = []

    def choose() -> ServerSpec:
        # Whoever followed before this worker starts is not its connector.
        gone.extend(mysql.followers(url))
        return _choose_server(settings, bootstrap, progress)

    status = supervisor.up(choose, progress)
    config = connector_config(settings, bootstrap, url) | {
        f"database.{what}": f"${{directory:{login}:{what}}}" for what in ("user", "password")
    }
    with _client(str(status.uri)) as client:
        state = _ensure_connector(client, config, lambda: mysql.followers(url), frozenset(gone), progress)
    for old in login.parent.iterdir():
        if old != login:
            shutil.rmtree(old)
    return replace(status, more=state.as_json())


def down(settings: Settings, progress: Callable[[str], None]) -> ServiceStatus:
    """Stop the local worker; never one that CONNECT_URL names.

    Raises:
        UnavailableError: It could not be ended.
    """
    return _supervisor(settings).down(progress)


def status(settings: Settings) -> ServiceStatus:
    """Tell how the worker in use and the connector on it are."""
    if settings.connect_url:
        return _external(settings.connect_url.rstrip("/"))
    found = _supervisor(settings).status()
    if found.state != "up" or found.uri is None:
        return found
    return replace(found, more=_state_at(found.uri).as_json())


def connector_config(settings: Settings, bootstrap: str, url: str) -> dict[str, str]:
    """Return the connector's settings, but for ``database.user`` and ``database.password``.

    The names are those of the Debezium reference for the MySQL and MariaDB connectors.

    Args:
        settings: ``kafka_topic`` is where the changes go.
        bootstrap: The brokers, as the worker reaches them.
        url: The database, as the worker reaches it; it is asked which of the two it is.

    Raises:
        UnavailableError: The database can't be asked.
        ConfigError: KAFKA_TOPIC is no name that Debezium can give to the table's topic.
    """
    database = mysql.parse_url(url)
    kind, name = ("mariadb", "MariaDb") if mysql.is_mariadb(url) else ("mysql", "MySql")
    return {
        "connector.class": f"io.debezium.connector.{kind}.{name}Connector",
        "tasks.max": "1",
        "database.hostname": database.host,
        "database.port": str(database.port),
        "database.server.id": str(_server_id(settings)),
        "topic.prefix": _topic_prefix(settings.kafka_topic),
        "database.include.list": mysql.DATABASE,
        "table.include.list": f"{mysql.DATABASE}.{mysql.TABLE}",
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


def _topic_prefix(topic: str) -> str:
    ending = f".{mysql.DATABASE}.{mysql.TABLE}"
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


def _keep_login(folder: Path, database: mysql.Address) -> Path:
    """Return the folder that holds user and password as files; others than before get a new one.

    So they are others for Connect too, which compares only the connector's settings, and these name the folder.
    """
    values = {"user": database.user, "password": database.password}
    for found in folder.glob("*"):
        if {path.name: path.read_text(encoding="utf-8") for path in found.iterdir()} == values:
            return found
    made = folder / secrets.token_hex(4)
    for name, value in values.items():
        mysql.write_secret(made / name, value)
    return made


def _refuse_security(settings: Settings, who: str, way_out: str) -> None:
    if settings.kafka_security_protocol != "PLAINTEXT":
        raise ConfigError(
            f"{who} is not set up for brokers with KAFKA_SECURITY_PROTOCOL={settings.kafka_security_protocol}.",
            way_out=way_out,
        )


def _choose_server(settings: Settings, bootstrap: str, progress: Callable[[str], None]) -> ServerSpec:
    folder = _folder(settings)
    plugins = [ensure_unpacked(settings, jar, progress) for jar in locked_set(SERVICE)]
    data = folder / "data" / SERVICE
    settings_file = _settings_file(settings)
    program = kafka.java_program(
        settings,
        "org.apache.kafka.connect.cli.ConnectDistributed",
        [str(settings_file)],
        progress,
        heap=_HEAP_MEGABYTES,
        log4j=folder / "log4j2.properties",
    )

    def command(port: int) -> list[str]:
        values = _worker_settings(bootstrap, port, plugins, folder / "secrets")
        settings_file.write_text(kafka.properties(values), encoding="ascii")
        return kafka.marked(program, data, port)

    return ServerSpec(
        server=SERVICE,
        data=data,
        log=folder / "log" / f"{SERVICE}.log",
        default_ports=(DEFAULT_PORT,),
        command=command,
    )


def _worker_settings(bootstrap: str, port: int, plugins: list[Path], logins: Path) -> dict[str, object]:
    topics = {
        f"{what}.storage.{key}": value
        for what in ("config", "offset", "status")
        for key, value in (("topic", f"{SERVICE}-{what}"), ("replication.factor", 1))
    }
    return {
        "bootstrap.servers": bootstrap,
        "group.id": f"{SERVICE}-workers",
        "listeners": f"http://127.0.0.1:{port}",
        "rest.advertised.host.name": "127.0.0.1",
        "rest.advertised.port": port,
        "plugin.path": ",".join(map(str, plugins)),
        # Debezium names its plugins in manifests: to look into each class costs half a minute.
        "plugin.discovery": "service_load",
        "key.converter": "org.apache.kafka.connect.json.JsonConverter",
        "value.converter": "org.apache.kafka.connect.json.JsonConverter",
        "key.converter.schemas.enable": "false",
        "value.converter.schemas.enable": "false",
        **topics,
        "offset.storage.partitions": 1,
        "status.storage.partitions": 1,
        "offset.flush.interval.ms": 1000,
        # A worker that was killed is waited for as long, before the next one gets its connector.
        "session.timeout.ms": 6000,
        "heartbeat.interval.ms": 1500,
        "scheduled.rebalance.max.delay.ms": 0,
        "task.shutdown.graceful.timeout.ms": 5000,
        # Credentials stay in files of their owner, out of the worker's REST answers and topics.
        "config.providers": "directory",
        "config.providers.directory.class": "org.apache.kafka.common.config.provider.DirectoryConfigProvider",
        "config.providers.directory.param.allowed.paths": logins,
    }


def _bootstrap_in_use(settings: Settings) -> str | None:
    """Return the brokers that the worker was last started with."""
    try:
        lines = _settings_file(settings).read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((line.partition("=")[2] for line in lines if line.startswith("bootstrap.servers=")), None)


def _settings_file(settings: Settings) -> Path:
    return _folder(settings) / "worker.properties"


def _folder(settings: Settings) -> Path:
    return settings.home_dir / SERVICE


def _supervisor(settings: Settings) -> Supervisor:
    return Supervisor(
        SERVICE,
        _folder(settings),
        lambda port, seconds: _serves(_uri(port), seconds),
        _uri,
        variable="CONNECT_URL",
        address_key="url",
    )


def _uri(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def _client(url: str, seconds: float = _REQUEST_SECONDS) -> httpx.Client:
    import httpx

    try:
        # A proxy of the environment knows no server of this machine.
        return httpx.Client(base_url=url, timeout=seconds, trust_env=not url.startswith("http://127.0.0.1:"))
    except httpx.InvalidURL as error:
        raise ConfigError(f"CONNECT_URL is malformed: {redact(str(error))}.", way_out="Correct CONNECT_URL.") from None


def _serves(url: str, seconds: float) -> bool:
    """Tell whether a worker serves: it has read its topics and joined its group, as far as its version tells."""
    import httpx

    try:
        with _client(url, seconds) as client:
            health = client.get("/health")
            # Workers before Kafka 3.9 have no such path.
            serves = health.is_success or health.status_code == _NOT_FOUND
            return serves and "kafka_cluster_id" in client.get("/").json()
    except (httpx.HTTPError, ValueError, TypeError):
        # Something else than a worker may answer there.
        return False


def _up_external(settings: Settings, url: str, progress: Callable[[str], None]) -> ServiceStatus:
    found = _external(url)
    if found.state == "up" and found.more["connector"] not in _SETTLED:
        found = replace(found, more=_await_settled(url).as_json())
    state = found.more.get("connector")
    if state == _FAILED:
        raise UnavailableError(
            f"The connector {CONNECTOR} on {found.uri} does not run: {found.more['connector_error']}.",
            way_out="Mend what it names, then restart it there: POST /connectors/"
            f"{CONNECTOR}/restart?includeTasks=true&onlyFailed=true.",
        )
    if state in _HALTED:
        raise UnavailableError(
            f"The connector {CONNECTOR} on {found.uri} does not run: it is {state}.",
            way_out=f'Resume it there: curl -X PUT "$CONNECT_URL/connectors/{CONNECTOR}/resume".',
        )
    if found.state == "up" and state not in _SETTLED:
        raise UnavailableError(
            f"The connector {CONNECTOR} on {found.uri} does not run: it is {state} after {_RUNNING_SECONDS:.0f} s.",
            way_out="Read the worker's log, mend what it names, then run ghsync up again.",
        )
    if state != _NONE:
        return found
    _refuse_security(settings, "The connector", f"Register a connector named {CONNECTOR} on {found.uri} yourself.")
    source = mysql.ensure_mysql(settings, progress)
    database = mysql.parse_url(source)
    config = connector_config(settings, kafka.ensure_kafka(settings, progress), source) | {
        "database.user": database.user,
        "database.password": database.password,
    }
    with _client(url) as client:
        state = _ensure_connector(client, config, lambda: mysql.followers(source), frozenset(), progress)
    return replace(found, more=state.as_json())


def _await_settled(url: str) -> ConnectorState:
    """Wait while the connector is on its way to run, and tell how it is then."""
    began = time.monotonic()
    with _client(url) as client:
        while (found := _state(client)).state not in _SETTLED:
            if time.monotonic() - began > (_VERDICT_SECONDS if found.state in _HALTED else _RUNNING_SECONDS):
                break
            time.sleep(_POLL_SECONDS)
    return found


def _external(url: str) -> ServiceStatus:
    up = _serves(url, _PING_SECONDS)
    return ServiceStatus(
        SERVICE,
        "up" if up else "down",
        uri=redact(url),
        server=EXTERNAL,
        address_key="url",
        more=_state_at(url).as_json() if up else {},
    )


def _ensure_connector(
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
        progress(f"{SERVICE}: {'changing' if current else 'registering'} the connector {CONNECTOR}")
        gone |= followers()
        _ask(client, "PUT", f"/connectors/{CONNECTOR}/config", config)
    elif state == _FAILED:
        gone |= followers()
        _restart(client, progress)
    if found.halted:
        progress(f"{SERVICE}: resuming the connector {CONNECTOR}, which was halted")
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
        progress(f"{SERVICE}: the connector {CONNECTOR} runs")
    return running


def _restart(client: httpx.Client, progress: Callable[[str], None]) -> None:
    progress(f"{SERVICE}: restarting the connector {CONNECTOR}, which failed")
    _ask(client, "POST", f"/connectors/{CONNECTOR}/restart?includeTasks=true&onlyFailed=true")


def _await_running(client: httpx.Client, follows: Callable[[], bool]) -> ConnectorState:
    """Wait until the connector runs and follows the database.

    Its task is called running before it has reached the database, so the database is asked too. While it takes the
    table in for the first time, it does not follow yet, and one that began to just before it was looked at is not
    told from the one before it: after a while, to run is enough.
    """
    began = since = time.monotonic()
    state = ConnectorState(_NONE)
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


def _state_at(url: str) -> ConnectorState:
    with _client(url) as client:
        return _state(client)


def _state(client: httpx.Client) -> ConnectorState:
    answer = _ask(client, "GET", f"/connectors/{CONNECTOR}/status", missing=None)
    if answer is None:
        # A worker that has just begun, or got its settings, does not tell yet how a connector is.
        there = _ask(client, "GET", f"/connectors/{CONNECTOR}/config", missing=None) is not None
        return ConnectorState(_UNASSIGNED if there else _NONE)
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
        refused = answer.status_code >= _ERRORS_FROM
        rebalancing = refused and (answer.status_code == _CONFLICT or _REBALANCING in _message(answer))
        if not rebalancing or time.monotonic() > deadline:
            break
        time.sleep(_POLL_SECONDS)
    if answer.status_code == _NOT_FOUND and missing:
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
