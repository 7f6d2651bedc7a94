"""Kafka Connect: the worker that CONNECT_URL names, else a local one, and what has to hold of the connector on it.

Belongs here: the worker's settings, and in which order it and the connector come up. Not here: the broker and the
database that it stands between, and the connector itself, see ``local.connector``.
"""

from __future__ import annotations

import secrets
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

from ghsync_dagster.domain.errors import ConfigError, UnavailableError
from ghsync_dagster.local import connector, kafka, mysql
from ghsync_dagster.local.jars import ensure_unpacked, locked_set
from ghsync_dagster.local.supervisor import ServerSpec, ServiceStatus, Supervisor
from ghsync_dagster.observability.logging import get_logger, redact

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ghsync_dagster.settings import Settings

SERVICE = "connect"
DEFAULT_PORT = 8083
EXTERNAL = "external"
_HEAP_MEGABYTES = 384
_PING_SECONDS = 3.0


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
    config = connector.config_of(settings, bootstrap, url) | {
        f"database.{what}": f"${{directory:{login}:{what}}}" for what in ("user", "password")
    }
    with connector.client_of(str(status.uri)) as client:
        state = connector.ensure(client, config, lambda: mysql.followers(url), frozenset(gone), progress)
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
        url = settings.connect_url.rstrip("/")
        return _external(url, _connector_state(url) if _serves(url, _PING_SECONDS) else None)
    found = _supervisor(settings).status()
    if found.state != "up" or found.uri is None:
        return found
    return replace(found, more=_connector_state(found.uri).as_json())


def _connector_state(url: str) -> connector.ConnectorState:
    """Return how the connector is, unknown with the reason where its worker does not tell."""
    try:
        return connector.state_at(url)
    except UnavailableError as error:
        return connector.ConnectorState("UNKNOWN", error.message)


def _up_external(settings: Settings, url: str, progress: Callable[[str], None]) -> ServiceStatus:
    if not _serves(url, _PING_SECONDS):
        return _external(url, None)
    state = connector.await_settled(url)
    connector.require_running(state, redact(url))
    if state.state != connector.NONE:
        return _external(url, state)
    _refuse_security(
        settings, "The connector", f"Register a connector named {connector.CONNECTOR} on {redact(url)} yourself."
    )
    source = mysql.ensure_mysql(settings, progress)
    database = mysql.parse_url(source)
    config = connector.config_of(settings, kafka.ensure_kafka(settings, progress), source) | {
        "database.user": database.user,
        "database.password": database.password,
    }
    with connector.client_of(url) as client:
        state = connector.ensure(client, config, lambda: mysql.followers(source), frozenset(), progress)
    return _external(url, state)


def _external(url: str, state: connector.ConnectorState | None) -> ServiceStatus:
    """Return how a worker that CONNECT_URL names is; None for a connector that can't be asked for, as it is down."""
    return ServiceStatus(
        SERVICE,
        "down" if state is None else "up",
        uri=redact(url),
        server=EXTERNAL,
        address_key="url",
        more={} if state is None else state.as_json(),
    )


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


def _serves(url: str, seconds: float) -> bool:
    """Tell whether a worker serves: it has read its topics and joined its group, as far as its version tells."""
    import httpx

    try:
        with connector.client_of(url, seconds) as client:
            health = client.get("/health")
            # Workers before Kafka 3.9 have no such path.
            serves = health.is_success or health.status_code == httpx.codes.NOT_FOUND
            return serves and "kafka_cluster_id" in client.get("/").json()
    except (httpx.HTTPError, ValueError, TypeError):
        # Something else than a worker may answer there.
        return False
