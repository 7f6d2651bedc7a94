"""Kafka Connect: the worker that CONNECT_URL names, else a local one, with the connector on it.

Belongs here: the worker's settings, and the order in which it and the connector start. Not here: the broker, the
database, and the connector itself (``connector``).
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Final

from ghsync_dagster import connector
from ghsync_dagster.domain.connector import CONNECTOR, NONE
from ghsync_dagster.domain.errors import ConfigError, RefusedError
from ghsync_dagster.domain.source import STATEMENT_HOURS, Effect, problems_of
from ghsync_dagster.folders import write_whole
from ghsync_dagster.jvm.jars import ensure_unpacked, locked_set
from ghsync_dagster.local import tls_stores
from ghsync_dagster.local.kafka import KafkaServer
from ghsync_dagster.local.kafka_program import KafkaProgram
from ghsync_dagster.local.mysql import MysqlServer
from ghsync_dagster.local.worker_log import WorkerLog
from ghsync_dagster.logging import redact
from ghsync_dagster.progress import report_progress
from ghsync_dagster.stores.connect import ConnectWorker
from ghsync_dagster.stores.mysql import MySqlStore
from ghsync_dagster.stores.mysql_url import MySqlAddress, parse_mysql_url

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ghsync_dagster.domain.connector import ConnectorState
    from ghsync_dagster.domain.source import Source
    from ghsync_dagster.local.supervisor import ServerSpec, ServiceStatus

_DEFAULT_PORT: Final = 8083
_HEAP_MEGABYTES: Final = 384
_PING_SECONDS: Final = 3.0
_MAIN: Final = "org.apache.kafka.connect.cli.ConnectDistributed"
_WAITING: Final = f"connect: waiting for the connector {CONNECTOR}"
_LOGIN_FILES: Final = ("user", "password", "made-of")


class ConnectServer(KafkaProgram):
    """A worker with the connector of the users' table."""

    service = "connect"
    variable = "CONNECT_URL"
    _earlier_followers: frozenset[int] | None = None
    """The followers of the database before the worker was started; none is its connector."""

    @property
    def external(self) -> str | None:
        """CONNECT_URL."""
        return self.settings.connect_url.rstrip("/") if self.settings.connect_url else None

    def check_external(self, address: str) -> ServiceStatus:
        """Return the status of the worker and of the connector on it."""
        return self._worker_status(address, _connector_state(address) if _serves(address, _PING_SECONDS) else None)

    def uri(self, port: int) -> str:
        """Return the local worker's URL."""
        return f"http://127.0.0.1:{port}"

    def answers(self, port: int, seconds: float) -> bool:
        """Return whether it answers at a port."""
        return _serves(self.uri(port), seconds)

    @property
    def settings_file(self) -> Path:
        """The file of settings that the worker was last started with."""
        return self.folder / "worker.properties"

    @property
    def worker_log(self) -> WorkerLog | None:
        """The local worker's log; None if there is none, or CONNECT_URL names another worker."""
        log = self.log(self.service)
        if not log.exists() or (self.external and self.external != self.local_status().uri):
            return None
        return WorkerLog(log, self.folder / "statements-closed")

    def up(self, progress: Callable[[str], None]) -> ServiceStatus:
        """Start the local worker and the servers that it needs, and bring the connector to run as configured.

        With CONNECT_URL only check that worker. If it has a connector, that is not changed, and has to run.

        Raises:
            UnavailableError: A server did not start, or the connector does not run, with its state or the reason.
            ConfigError: A setting does not fit a local worker, or the source can't be followed as it is.
        """
        if self.external:
            return self._up_external(self.external, progress)
        self._refuse_security("A local Connect worker", "Set CONNECT_URL to a worker of your own, set up for it.")
        bootstrap = KafkaServer(self.settings).ensure(progress)
        url = MysqlServer(self.settings).ensure(progress)
        source = self._check_source(url, progress)
        if self._bootstrap_in_use() not in (None, bootstrap):
            self.down(progress)
        login = _keep_login(self.folder / "secrets", parse_mysql_url(url))
        self._earlier_followers = None
        status = self.start(progress)
        config = connector.config_of(self.settings, bootstrap, url, source) | _login_settings(login)
        with ConnectWorker(str(status.uri)) as worker:
            state = _ensure(worker, config, url, self._earlier_followers, progress)
        for old in login.parent.iterdir():
            if old != login:
                shutil.rmtree(old)
        return replace(status, more=state.as_json())

    def status(self) -> ServiceStatus:
        """Return the status of the worker in use and of the connector on it."""
        found = super().status()
        if self.external or found.state != "up" or found.uri is None:
            return found
        return replace(found, more=_connector_state(found.uri).as_json())

    def choose(self, progress: Callable[[str], None]) -> ServerSpec:
        """Return how to run a worker on the brokers in use; remember the database's followers before it starts."""
        with MySqlStore(MysqlServer(self.settings).ensure(progress), in_database=False) as table:
            self._earlier_followers = table.followers()
        bootstrap = KafkaServer(self.settings).ensure(progress)
        plugins = [ensure_unpacked(self.settings, jar, progress) for jar in locked_set(self.service)]
        values = partial(_worker_settings, bootstrap, plugins, self.folder / "secrets")
        return self.java_spec(_MAIN, (_DEFAULT_PORT,), values, progress, heap=_HEAP_MEGABYTES)

    def _bootstrap_in_use(self) -> str | None:
        """Return the brokers that the worker was last started with."""
        try:
            lines = self.settings_file.read_text(encoding="ascii").splitlines()
        except OSError:
            return None
        return next((line.partition("=")[2] for line in lines if line.startswith("bootstrap.servers=")), None)

    def _up_external(self, url: str, progress: Callable[[str], None]) -> ServiceStatus:
        if not _serves(url, _PING_SECONDS):
            return self._worker_status(url, None)
        database = MysqlServer(self.settings)
        source = self._check_source(database.external, progress) if database.external else None
        with ConnectWorker(url) as worker:
            with report_progress(progress, _WAITING):
                state = connector.await_settled(worker)
            connector.require_running(state)
            if state.state != NONE:
                connector.report_stale_history(worker, progress)
                return self._worker_status(url, state)
        self._refuse_security("The connector", f"Register a connector named {CONNECTOR} on {redact(url)} yourself.")
        source_url = database.ensure(progress)
        address = parse_mysql_url(source_url)
        if files := tls_stores.pem_texts(address):
            raise ConfigError(
                f"The connector on {redact(url)} needs the {' and the '.join(files)} of MYSQL_URL's TLS files, which"
                " only files of that worker's own machine can be.",
                way_out=f"Put PKCS#12 stores there and register a connector named {CONNECTOR} yourself, with"
                " database.ssl.truststore and database.ssl.keystore.",
            )
        if source is None:
            source = self._check_source(source_url, progress)
        bootstrap = KafkaServer(self.settings).ensure(progress)
        config = connector.config_of(self.settings, bootstrap, source_url, source) | {
            "database.user": address.user,
            "database.password": address.password,
        }
        with ConnectWorker(url) as worker:
            return self._worker_status(url, _ensure(worker, config, source_url, None, progress))

    def _worker_status(self, url: str, state: ConnectorState | None) -> ServiceStatus:
        """Return the status of an external worker, and of the connector if its state is given."""
        return self.external_status(redact(url), is_up=state is not None, **(state.as_json() if state else {}))

    def _check_source(self, url: str, progress: Callable[[str], None]) -> Source:
        """Return the source; refuse it if changes would stop or be lost, and report its other problems.

        Raises:
            ConfigError: The table or a setting stops or loses changes, with each problem and its way out.
            UnavailableError: The database does not answer.
            RefusedError: Its TLS is not as the URL requires.
        """
        since = datetime.now(UTC) - timedelta(hours=STATEMENT_HOURS)
        with MySqlStore(url, in_database=False) as table:
            source = table.source()
        log = self.worker_log
        problems = problems_of(source, log.statements(source, since) if log else None)
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

    def _refuse_security(self, who: str, way_out: str) -> None:
        if (protocol := self.settings.kafka_security_protocol) != "PLAINTEXT":
            raise ConfigError(
                f"{who} is not set up for brokers with KAFKA_SECURITY_PROTOCOL={protocol}.", way_out=way_out
            )


def _connector_state(url: str) -> ConnectorState:
    with ConnectWorker(url) as worker:
        return worker.state()


def _serves(url: str, seconds: float) -> bool:
    with ConnectWorker(url, seconds) as worker:
        return worker.serves()


def _ensure(
    worker: ConnectWorker,
    config: dict[str, str],
    url: str,
    earlier: frozenset[int] | None,
    progress: Callable[[str], None],
) -> ConnectorState:
    with report_progress(progress, _WAITING), MySqlStore(url, in_database=False) as table:

        def log_end() -> str | None:
            # An account that may follow the binlog may lack the right to query its end.
            with suppress(RefusedError):
                return table.log_end()
            return None

        return connector.ensure(worker, config, table.followers, earlier, log_end, progress)


def _keep_login(folder: Path, database: MySqlAddress) -> Path:
    """Return the folder that holds user, password and TLS stores as files; changed ones get a new folder.

    The connector's settings name the folder. So Connect, which compares only settings, notices the change.
    """
    texts = tls_stores.pem_texts(database)
    values = {"user": database.user, "password": database.password}
    if texts:
        # The stores themselves differ each time they are generated.
        digest = hashlib.sha256(repr((sorted(texts.items()), database.ssl_key_password)).encode())
        values["made-of"] = digest.hexdigest()
    for found in folder.glob("*"):
        if {name: _text_of(found / name) for name in _LOGIN_FILES} == {name: values.get(name) for name in _LOGIN_FILES}:
            return found
    made = folder / secrets.token_hex(4)
    if texts:
        password = secrets.token_urlsafe(24)
        for name, content in tls_stores.java_stores(database, password).items():
            write_whole(made / f"{name}.p12", content, "GHSYNC_HOME")
        write_whole(made / "store-password", password, "GHSYNC_HOME")
    for name, value in values.items():
        write_whole(made / name, value, "GHSYNC_HOME")
    return made


def _text_of(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def _login_settings(login: Path) -> dict[str, str]:
    """Return the connector's settings that refer to the files of a login."""
    found = {f"database.{what}": f"${{directory:{login}:{what}}}" for what in ("user", "password")}
    for store in (tls_stores.TRUST, tls_stores.KEY):
        if (path := login / f"{store}.p12").exists():
            found[f"database.ssl.{store}"] = str(path)
            found[f"database.ssl.{store}.password"] = f"${{directory:{login}:store-password}}"
    return found


def _worker_settings(bootstrap: str, plugins: list[Path], logins: Path, port: int) -> dict[str, object]:
    topics = {
        f"{what}.storage.{key}": value
        for what in ("config", "offset", "status")
        for key, value in (("topic", f"connect-{what}"), ("replication.factor", 1))
    }
    return {
        "bootstrap.servers": bootstrap,
        "group.id": "connect-workers",
        "listeners": f"http://127.0.0.1:{port}",
        "rest.advertised.host.name": "127.0.0.1",
        "rest.advertised.port": port,
        "plugin.path": ",".join(map(str, plugins)),
        # Debezium lists its plugins in manifests; a scan of all classes takes half a minute.
        "plugin.discovery": "service_load",
        "key.converter": "org.apache.kafka.connect.json.JsonConverter",
        "value.converter": "org.apache.kafka.connect.json.JsonConverter",
        "key.converter.schemas.enable": "false",
        "value.converter.schemas.enable": "false",
        **topics,
        "offset.storage.partitions": 1,
        "status.storage.partitions": 1,
        "offset.flush.interval.ms": 1000,
        # The next worker gets a killed worker's connector after this time.
        "session.timeout.ms": 6000,
        "heartbeat.interval.ms": 1500,
        "scheduled.rebalance.max.delay.ms": 0,
        "task.shutdown.graceful.timeout.ms": 5000,
        # Credentials stay in private files, out of the worker's REST answers and topics.
        "config.providers": "directory",
        "config.providers.directory.class": "org.apache.kafka.common.config.provider.DirectoryConfigProvider",
        "config.providers.directory.param.allowed.paths": logins,
    }
