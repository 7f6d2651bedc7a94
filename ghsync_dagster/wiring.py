"""Builds the real parts of a process from its settings: a Spark session, a store, and the flows over them.

Belongs here: all that must know the flows and the addresses of local servers. Not here: any decision of a flow.
"""

from __future__ import annotations

import shlex
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Final

from ghsync_dagster.batch.reports import Artifacts
from ghsync_dagster.batch.rules import load_rules
from ghsync_dagster.domain.errors import ConfigError, UnavailableError
from ghsync_dagster.domain.source import STATEMENT_HOURS
from ghsync_dagster.local import endpoints
from ghsync_dagster.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import SecretStr

    from ghsync_dagster.batch.flow import BatchFlow
    from ghsync_dagster.cdc.health.connector import ConnectorProbe
    from ghsync_dagster.cdc.stream.consume import ChangeConsumer
    from ghsync_dagster.cdc.stream.listener import ChangeListener
    from ghsync_dagster.connector import ConnectorKeeper
    from ghsync_dagster.domain.finding import Finding
    from ghsync_dagster.settings import Settings
    from ghsync_dagster.stores.kafka.client import KafkaSettings
    from ghsync_dagster.stores.mongo.users import UserStore
    from ghsync_dagster.stores.mysql import MySqlStore
    from ghsync_dagster.stores.spark import SessionOf, SparkHandle, SparkOptions

_PROBE_SECONDS: Final = 3.0
"""How long a worker may take to answer a probe."""


def spark_options(settings: Settings) -> SparkOptions:
    """Find Java and the connector, and return the options of a session.

    Raises:
        ConfigError: There is no Java 17+.
        TransientError: The connector's jar is missing and can't be fetched.
    """
    from ghsync_dagster.jvm.jars import ensure_jars
    from ghsync_dagster.jvm.java import find_java, jvm_options
    from ghsync_dagster.stores.spark import SparkOptions

    java = find_java(settings)
    return SparkOptions(
        master=settings.spark_master,
        java_home=java.home,
        scratch=settings.home_dir / "spark",
        jars=() if settings.spark_jars_packages else ensure_jars(settings, progress=get_logger("jars").info),
        packages=settings.spark_jars_packages,
        driver_memory=settings.spark_driver_memory,
        jvm_options=[*jvm_options(java, settings), *shlex.split(settings.spark_driver_java_options)],
    )


def spark_handle(settings: Settings, get: SessionOf | None = None) -> SparkHandle:
    """Return a handle on the Spark session, which is not started yet.

    Args:
        settings: The session's settings.
        get: Returns the session; by default Spark's own builder.
    """
    from ghsync_dagster.stores.spark import SparkHandle, session_of

    return SparkHandle(lambda: spark_options(settings), get or session_of)


def store_opener(settings: Settings, *, fails_fast: bool = False) -> Callable[[], UserStore]:
    """Return the function that opens the users' collection, on the local server if no URI is set.

    Args:
        settings: The store's settings.
        fails_fast: Whether it is for the checks before a run, with short timeouts.
    """

    def open_store() -> UserStore:
        from ghsync_dagster.stores.mongo.users import UserStore

        return UserStore(
            _secret(settings.mongodb_uri) or endpoints.started(settings, "mongo"),
            settings.mongodb_database,
            settings.mongodb_collection,
            timeout_seconds=settings.server_timeout_seconds,
            fails_fast=fails_fast,
        )

    return open_store


def shown_mongo(settings: Settings) -> str:
    """Return a description of where the users are stored, without credentials; nothing is started."""
    from ghsync_dagster.stores.mongo.uri import without_credentials

    if settings.mongodb_uri:
        return without_credentials(settings.mongodb_uri.get_secret_value())
    local = endpoints.address(settings, "mongo")
    return f"{local} (local server, stop it with: ghsync down)" if local else "no server"


def batch_flow(settings: Settings, run_id: str | None = None, spark: SparkHandle | None = None) -> BatchFlow:
    """Return the batch flow of these settings.

    Args:
        settings: The flow's settings.
        run_id: Its run; None for the newest.
        spark: Its session; by default one of these settings.
    """
    from ghsync_dagster.batch.flow import BatchFlow
    from ghsync_dagster.batch.versions import code_version

    return BatchFlow(
        artifacts=Artifacts(settings.home_dir / "batch", run_id),
        spark=spark or spark_handle(settings),
        open_store=store_opener(settings),
        open_for_check=store_opener(settings, fails_fast=True),
        rules=load_rules(settings.rules_module),
        max_quarantined_ratio=settings.max_quarantined_ratio,
        attempts=settings.retry_attempts,
        lease_wait_seconds=settings.lease_wait_seconds,
        lease_quiet_seconds=settings.lease_quiet_seconds,
        code_version=code_version(settings.rules_module),
        home=settings.home_dir,
    )


def _kafka_settings(settings: Settings, servers: str) -> KafkaSettings:
    from ghsync_dagster.stores.kafka.client import KafkaSettings

    return KafkaSettings(
        bootstrap_servers=servers,
        topic=settings.kafka_topic,
        group_id=settings.kafka_group_id,
        session_timeout_seconds=settings.cdc_session_timeout_seconds,
        timeout_seconds=settings.server_timeout_seconds,
        security_protocol=settings.kafka_security_protocol,
        sasl_mechanism=settings.kafka_sasl_mechanism,
        sasl_username=settings.kafka_sasl_username,
        sasl_password=_secret(settings.kafka_sasl_password),
        ssl_ca_location=settings.kafka_ssl_ca_location,
        ssl_certificate_location=settings.kafka_ssl_certificate_location,
        ssl_key_location=settings.kafka_ssl_key_location,
        ssl_key_password=_secret(settings.kafka_ssl_key_password),
    )


def _secret(value: SecretStr | None) -> str | None:
    return None if value is None else value.get_secret_value()


def _required(address: str | None, server: str, variable: str) -> str:
    """Return an address.

    Raises:
        UnavailableError: It is None or empty.
    """
    if not address:
        raise UnavailableError(
            f"There is no {server}: {variable} is not set, and the local one is not up.",
            way_out=f"Set {variable}, or start the local servers: ghsync up.",
        )
    return address


def has_kafka(settings: Settings) -> bool:
    """Return whether a setting names brokers, or a local one was ever started here."""
    return bool(settings.kafka_bootstrap_servers) or endpoints.was_set_up(settings, "kafka")


def has_mysql(settings: Settings) -> bool:
    """Return whether a setting names a server, or a local one was ever started here."""
    return bool(settings.mysql_url) or endpoints.was_set_up(settings, "mysql")


def existing_kafka(settings: Settings) -> KafkaSettings:
    """Return the settings of topic, group and brokers; nothing is started.

    Raises:
        UnavailableError: KAFKA_BOOTSTRAP_SERVERS is not set and the local broker is not up.
    """
    servers = settings.kafka_bootstrap_servers or endpoints.address(settings, "kafka")
    return _kafka_settings(settings, _required(servers, "Kafka", "KAFKA_BOOTSTRAP_SERVERS"))


def open_mysql(settings: Settings) -> MySqlStore:
    """Open the table of users; nothing is started.

    Raises:
        UnavailableError: MYSQL_URL is not set and the local server is not up.
    """
    from ghsync_dagster.stores.mysql import MySqlStore

    url = _secret(settings.mysql_url) or endpoints.address(settings, "mysql")
    return MySqlStore(_required(url, "MySQL", "MYSQL_URL"), timeout_seconds=settings.server_timeout_seconds)


def check_source(settings: Settings, *, hours: float = STATEMENT_HOURS) -> Finding:
    """Return the finding on the table's shape, the server's settings and Connect's log; nothing is started.

    Args:
        settings: Name MySQL and Connect.
        hours: How far back the log is read.

    Raises:
        UnavailableError: MySQL does not answer, or MYSQL_URL is not set and the local server is not up.
        RefusedError: MySQL refuses the account, or its TLS is not as MYSQL_URL requires.
        ConfigError: There is no such database.
    """
    from ghsync_dagster.cdc.health.checks import source_settings

    with open_mysql(settings) as mysql:
        source = mysql.source()
    since = datetime.now(UTC) - timedelta(hours=hours)
    log = endpoints.worker_log(settings)
    return source_settings(source, log.statements(source, since) if log else None)


def close_statements(settings: Settings, began: datetime) -> None:
    """Record that both sides were equal: earlier statements in Connect's log have left no difference.

    Args:
        settings: Name Connect.
        began: When the comparison began.
    """
    if log := endpoints.worker_log(settings):
        log.close(began)


def connector_probe(settings: Settings) -> ConnectorProbe | None:
    """Return the probe of the connector and of MySQL; nothing is started.

    The worker is that of CONNECT_URL, else the local one. The probe is None if there is neither: no local one was ever
    started here, or it is down and a setting names the brokers.
    """
    from ghsync_dagster.cdc.health.connector import ConnectorProbe
    from ghsync_dagster.stores.connect import ConnectWorker

    def address() -> str | None:
        return settings.connect_url or endpoints.address(settings, "connect")

    if not address() and (settings.kafka_bootstrap_servers or not endpoints.was_set_up(settings, "connect")):
        return None

    def worker() -> ConnectWorker:
        # A local worker may have another port after a restart.
        url = _required(address(), "Connect worker", "CONNECT_URL")
        return ConnectWorker(url.rstrip("/"), _PROBE_SECONDS, _PROBE_SECONDS)

    table = partial(open_mysql, settings) if has_mysql(settings) else None
    return ConnectorProbe(worker, table, still_seconds=settings.connector_still_seconds)


def connector_keeper(settings: Settings) -> ConnectorKeeper:
    """Return what keeps the connector on the worker of CONNECT_URL; its login is in files of that worker's machine.

    Raises:
        ConfigError: CONNECT_URL or CONNECT_SECRETS is not set.
    """
    from ghsync_dagster.connector import ConnectorKeeper, config_of, login_by_files
    from ghsync_dagster.stores.connect import ConnectWorker

    address, folder = settings.connect_url, settings.connect_secrets
    if address is None or folder is None:
        raise ConfigError(
            "The connector is kept on a worker that CONNECT_URL names, by a login in the folder CONNECT_SECRETS.",
            way_out="Set both; or ghsync up connect, for the local worker.",
        )
    url = address.rstrip("/")

    def config() -> dict[str, str]:
        with open_mysql(settings) as mysql:
            source = mysql.source()
        bootstrap = _required(settings.kafka_bootstrap_servers, "Kafka", "KAFKA_BOOTSTRAP_SERVERS")
        mysql_url = _required(_secret(settings.mysql_url), "MySQL", "MYSQL_URL")
        return config_of(settings, bootstrap, mysql_url, source) | login_by_files(folder)

    return ConnectorKeeper(lambda: ConnectWorker(url), config)


def change_consumer(settings: Settings, kafka: KafkaSettings, listener: ChangeListener | None = None) -> ChangeConsumer:
    """Return a consumer of the changes, which reports to the listener.

    Raises:
        ConfigError: GHSYNC_RULES_MODULE can't be used.
    """
    from ghsync_dagster.cdc.stream.consume import ChangeConsumer

    return ChangeConsumer(
        kafka,
        store_opener(settings),
        listener=listener,
        rules=load_rules(settings.rules_module),
        open_source=partial(open_mysql, settings),
        repair_users_a_second=settings.repair_users_a_second,
    )
