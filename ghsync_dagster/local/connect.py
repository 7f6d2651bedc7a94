"""Kafka Connect: the worker that CONNECT_URL names, else a local one, and what has to hold of the connector on it.

Belongs here: the worker's settings, and in which order it and the connector come up. Not here: the broker and the
database that it stands between, and the connector itself, see ``local.connector``.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from ghsync_dagster.domain.connector import CONNECTOR, NONE
from ghsync_dagster.domain.errors import ConfigError, RefusedError
from ghsync_dagster.domain.source import (
    STATEMENT_HOURS,
    Effect,
    Statements,
    logged_at,
    problems_of,
    statements_in,
)
from ghsync_dagster.jvm.jars import ensure_unpacked, locked_set
from ghsync_dagster.local import connector, kafka, mysql, tls_stores
from ghsync_dagster.local.supervisor import ServerSpec, ServiceStatus, Supervisor
from ghsync_dagster.logging import get_logger, redact
from ghsync_dagster.progress import saying
from ghsync_dagster.stores.connect import ConnectWorker
from ghsync_dagster.stores.mysql import MySqlStore
from ghsync_dagster.stores.mysql_url import MySqlAddress, parse_mysql_url

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ghsync_dagster.domain.connector import ConnectorState
    from ghsync_dagster.domain.source import Source
    from ghsync_dagster.settings import Settings

SERVICE = "connect"
DEFAULT_PORT = 8083
EXTERNAL = "external"
_HEAP_MEGABYTES = 384
_PING_SECONDS = 3.0
_WAITING = f"connect: waiting for the connector {CONNECTOR}"
_LOG_BLOCK = 1 << 18
_LOG_BYTES = 1 << 23
_LOGIN_FILES = ("user", "password", "made-of")


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
        ConfigError: A setting does not fit a local worker, or the source can't be followed as it is.
    """
    if settings.connect_url:
        return _up_external(settings, settings.connect_url.rstrip("/"), progress)
    _refuse_security(settings, "A local Connect worker", "Set CONNECT_URL to a worker of your own, set up for it.")
    bootstrap = kafka.ensure_kafka(settings, progress)
    url = mysql.ensure_mysql(settings, progress)
    source = _look_at_source(settings, url, progress)
    supervisor = _supervisor(settings)
    if _bootstrap_in_use(settings) not in (None, bootstrap):
        supervisor.down(progress)
    login = _keep_login(_folder(settings) / "secrets", parse_mysql_url(url))
    gone: frozenset[int] | None = None

    def choose() -> ServerSpec:
        nonlocal gone
        # Whoever followed before this worker starts is not its connector.
        with MySqlStore(url, in_database=False) as table:
            gone = table.followers()
        return _choose_server(settings, bootstrap, progress)

    status = supervisor.up(choose, progress)
    config = connector.config_of(settings, bootstrap, url, source) | _login_settings(login)
    with ConnectWorker(str(status.uri)) as worker:
        state = _ensure(worker, config, url, gone, progress)
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


def was_set_up(settings: Settings) -> bool:
    """Return whether a worker is named, or a local one was ever started here."""
    return bool(settings.connect_url) or _supervisor(settings).was_set_up()


def status_of_worker(settings: Settings) -> ServiceStatus:
    """Return the local worker's status, without the connector's."""
    return _supervisor(settings).status()


def status(settings: Settings) -> ServiceStatus:
    """Tell how the worker in use and the connector on it are."""
    if settings.connect_url:
        url = settings.connect_url.rstrip("/")
        return _external(url, _connector_state(url) if _serves(url, _PING_SECONDS) else None)
    found = status_of_worker(settings)
    if found.state != "up" or found.uri is None:
        return found
    return replace(found, more=_connector_state(found.uri).as_json())


def _connector_state(url: str) -> ConnectorState:
    with ConnectWorker(url) as worker:
        return worker.state()


def _up_external(settings: Settings, url: str, progress: Callable[[str], None]) -> ServiceStatus:
    if not _serves(url, _PING_SECONDS):
        return _external(url, None)
    source = _look_at_source(settings, settings.mysql_url.get_secret_value(), progress) if settings.mysql_url else None
    with ConnectWorker(url) as worker:
        with saying(progress, _WAITING):
            state = connector.await_settled(worker)
        connector.require_running(state)
        if state.state != NONE:
            connector.report_stale_history(worker, progress)
            return _external(url, state)
    _refuse_security(settings, "The connector", f"Register a connector named {CONNECTOR} on {redact(url)} yourself.")
    source_url = mysql.ensure_mysql(settings, progress)
    database = parse_mysql_url(source_url)
    if files := tls_stores.pem_texts(database):
        raise ConfigError(
            f"The connector on {redact(url)} needs the {' and the '.join(files)} of MYSQL_URL's TLS files, which only"
            " files of that worker's own machine can be.",
            way_out=f"Put PKCS#12 stores there and register a connector named {CONNECTOR} yourself, with"
            " database.ssl.truststore and database.ssl.keystore.",
        )
    if source is None:
        source = _look_at_source(settings, source_url, progress)
    config = connector.config_of(settings, kafka.ensure_kafka(settings, progress), source_url, source) | {
        "database.user": database.user,
        "database.password": database.password,
    }
    with ConnectWorker(url) as worker:
        state = _ensure(worker, config, source_url, None, progress)
    return _external(url, state)


def _ensure(
    worker: ConnectWorker,
    config: dict[str, str],
    url: str,
    gone: frozenset[int] | None,
    progress: Callable[[str], None],
) -> ConnectorState:
    with saying(progress, _WAITING), MySqlStore(url, in_database=False) as table:

        def log_end() -> str | None:
            # Whoever may follow the binlog need not have the right to ask for its end.
            with suppress(RefusedError):
                return table.log_end()
            return None

        return connector.ensure(worker, config, table.followers, gone, log_end, progress)


def _external(url: str, state: ConnectorState | None) -> ServiceStatus:
    """Return how a worker that CONNECT_URL names is; None for a connector that can't be asked for, as it is down."""
    return ServiceStatus(
        SERVICE,
        "down" if state is None else "up",
        uri=redact(url),
        server=EXTERNAL,
        address_key="url",
        more={} if state is None else state.as_json(),
    )


def logged_statements(settings: Settings, source: Source, since: datetime) -> Statements | None:
    """Return what the local worker's log warns of since a time, or since both sides were last found equal.

    Returns:
        None where there is no such log, as with another worker that CONNECT_URL names.
    """
    log = _log(settings)
    if not _is_log_of_worker(settings):
        return None
    closed = _text_of(_closed(settings))
    since = max(since, datetime.fromisoformat(closed)) if closed else since
    try:
        return statements_in(_end_of(log, since), source, since)
    except OSError:
        return None


def close_statements(settings: Settings, began: datetime) -> None:
    """Remember since when statements of the log count: both sides were equal in a comparison that began then."""
    if _is_log_of_worker(settings):
        mysql.write_secret(_closed(settings), began.isoformat().encode())


def _is_log_of_worker(settings: Settings) -> bool:
    """Return whether there is a log here, and it is that of the worker in use."""
    named = settings.connect_url
    return _log(settings).exists() and (not named or named.rstrip("/") == status_of_worker(settings).uri)


def _end_of(log: Path, since: datetime) -> str:
    """Return the end of a log, block by block backwards until one begins before a time, within a limit."""
    end = b""
    with log.open("rb") as file:
        place = file.seek(0, os.SEEK_END)
        while place > 0 and len(end) < _LOG_BYTES:
            size = min(_LOG_BLOCK, place)
            place = file.seek(place - size)
            end = file.read(size) + end
            times = (logged_at(line.decode(errors="replace")) for line in end[:_LOG_BLOCK].splitlines())
            if (first := next((at for at in times if at is not None), None)) is not None and first < since:
                break
    return end.decode(errors="replace")


def _log(settings: Settings) -> Path:
    return _folder(settings) / "log" / f"{SERVICE}.log"


def _closed(settings: Settings) -> Path:
    return _folder(settings) / "statements-closed"


def _look_at_source(settings: Settings, url: str, progress: Callable[[str], None]) -> Source:
    """See that the source can be followed as it is, and return it; what stops or loses nothing now is only told.

    Raises:
        ConfigError: The table or a setting stops or loses changes; each problem is named with its way out.
        UnavailableError: The database can't be asked.
        RefusedError: Its TLS is not as the URL asks for.
    """
    since = datetime.now(UTC) - timedelta(hours=STATEMENT_HOURS)
    with MySqlStore(url, in_database=False) as table:
        source = table.source()
    problems = problems_of(source, logged_statements(settings, source, since))
    wrong = [problem for problem in problems if problem.effect in (Effect.STOPS, Effect.LOSES)]
    for problem in problems:
        if problem not in wrong:
            progress(f"mysql: {problem.text}; way out: {problem.way_out}")
    if wrong:
        raise ConfigError(
            f"Changes can't be followed: {'; '.join(problem.text for problem in wrong)}.",
            way_out=" ".join(problem.way_out for problem in wrong),
        )
    return source


def _keep_login(folder: Path, database: MySqlAddress) -> Path:
    """Return the folder that holds user, password and TLS stores as files; others than before get a new one.

    So they are others for Connect too, which compares only the connector's settings, and these name the folder.
    """
    texts = tls_stores.pem_texts(database)
    values = {"user": database.user, "password": database.password}
    if texts:
        # The stores themselves differ each time they are made.
        digest = hashlib.sha256(repr((sorted(texts.items()), database.ssl_key_password)).encode())
        values["made-of"] = digest.hexdigest()
    for found in folder.glob("*"):
        if {name: _text_of(found / name) for name in _LOGIN_FILES} == {name: values.get(name) for name in _LOGIN_FILES}:
            return found
    made = folder / secrets.token_hex(4)
    if texts:
        password = secrets.token_urlsafe(24)
        for name, content in tls_stores.java_stores(database, password).items():
            mysql.write_secret(made / f"{name}.p12", content)
        mysql.write_secret(made / "store-password", password.encode())
    for name, value in values.items():
        mysql.write_secret(made / name, value.encode())
    return made


def _text_of(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def _login_settings(login: Path) -> dict[str, str]:
    """Return the connector's settings that lead to the files of a login."""
    found = {f"database.{what}": f"${{directory:{login}:{what}}}" for what in ("user", "password")}
    for store in (tls_stores.TRUST, tls_stores.KEY):
        if (path := login / f"{store}.p12").exists():
            found[f"database.ssl.{store}"] = str(path)
            found[f"database.ssl.{store}.password"] = f"${{directory:{login}:store-password}}"
    return found


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
        log=_log(settings),
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
    with ConnectWorker(url, seconds) as worker:
        return worker.serves()
