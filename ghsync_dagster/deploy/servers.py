"""The first state of the stack's own servers: replica set, users, table, topic. Run again, it changes nothing.

Belongs here: what those servers need once. A server elsewhere, which a secret of its owner names, is left alone.
Not here: the connector, which ``connector`` keeps, and the collection, which its writers set up.
"""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Final

from ghsync_dagster.deploy.volumes import CONNECTOR_USER, DATABASE_USER, REPLICA_SET
from ghsync_dagster.domain.connector import GRANTED
from ghsync_dagster.domain.table import DATABASE, TABLE, create_table, quoted
from ghsync_dagster.logging import get_logger
from ghsync_dagster.retry import retrying
from ghsync_dagster.stores.mongo.errors import mongo_errors
from ghsync_dagster.stores.mysql import mysql_errors
from ghsync_dagster.stores.mysql_url import MySqlAddress, connect, parse_mysql_url, tls_context

if TYPE_CHECKING:
    from collections.abc import Callable

    from pymongo import MongoClient
    from pymysql.cursors import Cursor

    from ghsync_dagster.settings import Settings

MONGO: Final = "mongo"
MYSQL: Final = "mysql"
KAFKA: Final = "kafka:9092"
_MONGO_PORT: Final = 27017
_ROOT: Final = "root"
_SECONDS: Final = 10
_NOT_YET_INITIALIZED: Final = 94
_USER_NOT_FOUND: Final = 11

log = get_logger("setup")


def set_up(settings: Settings, secret: Callable[[str], str]) -> None:
    """Bring the stack's own servers into their first state.

    Args:
        settings: Name the servers.
        secret: Returns a secret by its name.

    Raises:
        UnavailableError: One of them is away.
        RefusedError: One of them refuses its root user: its data is older than the vault.
    """
    uri = settings.mongodb_uri.get_secret_value() if settings.mongodb_uri else ""
    if f"@{MONGO}:{_MONGO_PORT}/" in uri:
        retrying("Setting MongoDB up", lambda: _set_up_mongo(settings.mongodb_database, secret), attempts=5)
    else:
        log.info("mongodb is elsewhere; left alone")
    url = settings.mysql_url.get_secret_value() if settings.mysql_url else ""
    address = parse_mysql_url(url)
    if address.host == MYSQL:
        retrying("Setting MySQL up", lambda: _set_up_mysql(address, secret), attempts=5)
    else:
        log.info("mysql is elsewhere; left alone")
    if settings.kafka_bootstrap_servers == KAFKA:
        retrying("Setting Kafka up", lambda: _set_up_kafka(settings), attempts=5)
    else:
        log.info("kafka is elsewhere; left alone")


def _set_up_mongo(database: str, secret: Callable[[str], str]) -> None:
    from pymongo import MongoClient

    with mongo_errors("Setting MongoDB up"):
        client: MongoClient[dict[str, object]] = MongoClient(
            MONGO,
            _MONGO_PORT,
            username=_ROOT,
            password=secret("mongo-root-password"),
            directConnection=True,
            serverSelectionTimeoutMS=_SECONDS * 1000,
        )
        with client:
            _initiate(client)
            roles = [{"role": role, "db": database} for role in ("readWrite", "dbAdmin")]
            _have_user(client, DATABASE_USER, secret("mongo-password"), roles)
    log.info("mongodb is set up", replica_set=REPLICA_SET, user=DATABASE_USER)


def _initiate(client: MongoClient[dict[str, object]]) -> None:
    """Make the replica set of this one member, and wait until it takes writes."""
    from pymongo.errors import OperationFailure

    try:
        client.admin.command("replSetGetStatus")
    except OperationFailure as error:
        if error.code != _NOT_YET_INITIALIZED:
            raise
        members = [{"_id": 0, "host": f"{MONGO}:{_MONGO_PORT}"}]
        client.admin.command("replSetInitiate", {"_id": REPLICA_SET, "members": members})
        log.info("replica set initiated", replica_set=REPLICA_SET)


def _have_user(client: MongoClient[dict[str, object]], user: str, password: str, roles: list[dict[str, str]]) -> None:
    from pymongo.errors import OperationFailure

    try:
        client.admin.command("updateUser", user, pwd=password, roles=roles)
    except OperationFailure as error:
        if error.code != _USER_NOT_FOUND:
            raise
        client.admin.command("createUser", user, pwd=password, roles=roles)


def _set_up_mysql(address: MySqlAddress, secret: Callable[[str], str]) -> None:
    root = MySqlAddress(address.host, address.port, _ROOT, secret("mysql-root-password"), "mysql")
    with (
        mysql_errors("Setting MySQL up"),
        closing(connect(root, tls_context(root), seconds=_SECONDS, answer_seconds=_SECONDS)) as connection,
        connection.cursor() as cursor,
    ):
        cursor.execute(f"CREATE DATABASE IF NOT EXISTS {quoted(DATABASE)} CHARACTER SET utf8mb4")
        cursor.execute(create_table(f"{quoted(DATABASE)}.{quoted(TABLE)}"))
        _have_login(cursor, DATABASE_USER, secret("mysql-password"))
        cursor.execute(f"GRANT SELECT ON {quoted(DATABASE)}.{quoted(TABLE)} TO %s@'%%'", (DATABASE_USER,))
        cursor.execute("GRANT REPLICATION CLIENT ON *.* TO %s@'%%'", (DATABASE_USER,))
        _have_login(cursor, CONNECTOR_USER, secret("connector-password"))
        cursor.execute(f"GRANT {', '.join(GRANTED)} ON *.* TO %s@'%%'", (CONNECTOR_USER,))
    log.info("mysql is set up", table=f"{DATABASE}.{TABLE}", users=[DATABASE_USER, CONNECTOR_USER])


def _set_up_kafka(settings: Settings) -> None:
    """Make the topic of changes: the connector would only with the first change, and consumers wait for it."""
    from ghsync_dagster.stores.kafka.topics import create_topic
    from ghsync_dagster.wiring import existing_kafka

    if create_topic(existing_kafka(settings), settings.kafka_topic, settings.topic_partitions):
        log.info("topic created", topic=settings.kafka_topic, partitions=settings.topic_partitions)


def _have_login(cursor: Cursor, user: str, password: str) -> None:
    cursor.execute("CREATE USER IF NOT EXISTS %s@'%%' IDENTIFIED BY %s", (user, password))
    cursor.execute("ALTER USER %s@'%%' IDENTIFIED BY %s", (user, password))
