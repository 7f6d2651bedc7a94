"""A table that is really followed: statements on a MariaDB or a MySQL, and what arrives of them in the topic."""

from __future__ import annotations

import json
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any

import pymysql
import pytest
from confluent_kafka import OFFSET_END, Consumer, TopicPartition
from confluent_kafka.admin import AdminClient

from ghsync_dagster.cdc.health.audit import AuditResult, Patience, audit
from ghsync_dagster.domain.connector import CONNECTOR, ConnectorState
from ghsync_dagster.domain.user import USER_FIELDS
from ghsync_dagster.local import stack
from ghsync_dagster.settings import load_settings
from ghsync_dagster.stores.connect import ConnectWorker, client_of
from ghsync_dagster.stores.mysql import MySqlStore
from ghsync_dagster.stores.mysql_url import parse_mysql_url
from ghsync_dagster.wiring import change_consumer, existing_kafka, store_opener
from ghsync_dagster_tests.support.odd_ddl import MARIADB, MYSQL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import httpx

    from ghsync_dagster.settings import Settings

# With every name quoted, and so without a word that any parser could take for something else.
TABLE = """CREATE TABLE `new_data`.`Users` (`user_id` BIGINT PRIMARY KEY, `login` VARCHAR(255) NOT NULL,
    `gravatar_id` VARCHAR(255), `avatar_url` VARCHAR(255), `url` VARCHAR(255))"""
CLEAN = (
    *("SET SESSION sql_mode = ''", "SET SESSION foreign_key_checks = 0"),
    *("DROP DATABASE IF EXISTS `other`", "DROP DATABASE IF EXISTS `odd-one`"),
    *("DROP DATABASE IF EXISTS `new_data`", "CREATE DATABASE `new_data` CHARACTER SET utf8mb4", TABLE),
    *("CREATE DATABASE `other`", "CREATE DATABASE `odd-one`", "DROP DATABASE `odd-one`"),
)
_SECONDS = 60.0


def _state(url: str) -> ConnectorState:
    with ConnectWorker(url) as worker:
        return worker.read_state()


class StoppedError(Exception):
    """The connector failed; says why."""


class Source:
    """The table of a running stack, the connector that follows it, and its topic."""

    def __init__(self, settings: Settings) -> None:
        assert settings.mysql_url is not None
        self.settings = settings
        self.url = settings.mysql_url.get_secret_value()
        with MySqlStore(self.url) as table:
            self.server = MARIADB if table.source().is_mariadb else MYSQL
        self._connect = str(settings.connect_url)
        self._key = 1_000
        self.events: list[dict[str, Any]] = []
        kafka = existing_kafka(settings)
        self._topic = Consumer(
            {"bootstrap.servers": kafka.bootstrap_servers, "group.id": uuid.uuid4().hex, "enable.auto.commit": False}
        )
        partition = TopicPartition(settings.kafka_topic, 0)
        partition.offset = self._topic.get_watermark_offsets(partition, timeout=30)[1]
        self._topic.assign([partition])

    def close(self) -> None:
        """Leave the topic."""
        self._topic.close()

    def do(self, *statements: str) -> None:
        """Execute statements in one session, each committed by itself unless they say otherwise."""
        address = parse_mysql_url(self.url)
        with (
            pymysql.connect(
                host=address.host, port=address.port, user=address.user, password=address.password,
                database="new_data", charset="utf8mb4", autocommit=True,
            ) as connection,
            connection.cursor() as cursor,
        ):  # fmt: skip
            for statement in statements:
                cursor.execute(statement)

    def mark(self) -> dict[str, Any]:
        """Insert a user, and return it as it should arrive."""
        self._key += 1
        marker = self.marker()
        values = ", ".join(f"'{marker[name]}'" for name in USER_FIELDS)
        names = ", ".join(f"`{name}`" for name in USER_FIELDS)
        # Where the table has a parent, this row has none.
        insert = f"INSERT INTO `new_data`.`Users` ({names}) VALUES ({values})"  # noqa: S608
        self.do("SET SESSION foreign_key_checks = 0", insert)
        return marker

    def arrived(self) -> list[dict[str, Any]]:
        """Insert a user, and return all that arrives up to it, as ``{op, and the five fields}``; it is last.

        ``events`` has the same as it arrived, whole.

        Raises:
            StoppedError: The connector failed.
        """
        user = self.mark()
        found: list[dict[str, Any]] = []
        self.events.clear()
        deadline = time.monotonic() + _SECONDS
        while time.monotonic() < deadline:
            record = self._topic.poll(0.2)
            if record is None:
                state = _state(self._connect)
                if state.state == "FAILED":
                    raise StoppedError(state.reason)
                continue
            value = json.loads(record.value() or b"{}")
            if "op" in value:
                self.events.append(value)
                row = value.get("after") or value.get("before") or {}
                found.append({"op": value["op"], **{name: row.get(name) for name in USER_FIELDS}})
                # Whatever column they stand in.
                if str(user["login"]) in (value.get("after") or {}).values():
                    return found
        raise AssertionError(f"nothing arrived, and the connector is {_state(self._connect)}")

    def marker(self) -> dict[str, Any]:
        """The user that was inserted last as a marker, as it should arrive."""
        return {"op": "c", "user_id": self._key, **{name: f"{name} of {self._key}" for name in USER_FIELDS[1:]}}

    def restart(self) -> None:
        """Restart the connector, and wait until it follows again."""
        self._await_follower(lambda client: self._post(client, "restart?includeTasks=true"))

    def snapshot(self) -> None:
        """Take a new snapshot, as the manual has it."""

        def forget(client: httpx.Client) -> None:
            client.put(f"/connectors/{CONNECTOR}/stop").raise_for_status()
            deadline = time.monotonic() + _SECONDS
            # A task that still ends holds its offsets.
            while client.delete(f"/connectors/{CONNECTOR}/offsets").is_error:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            client.put(f"/connectors/{CONNECTOR}/resume").raise_for_status()

        self._await_follower(forget)

    def configure(self, **changes: str) -> dict[str, str]:
        """Change settings of the connector, take a new snapshot under them, and return those before."""
        with client_of(self._connect) as client:
            path = f"/connectors/{CONNECTOR}/config"
            before: dict[str, str] = client.get(path).raise_for_status().json()
            client.put(path, json=before | changes).raise_for_status()
        self.snapshot()
        return before

    def forget(self) -> None:
        """Have a topic in which a new group finds nothing of the tests before."""
        admin = AdminClient({"bootstrap.servers": existing_kafka(self.settings).bootstrap_servers})
        for future in admin.delete_records([TopicPartition(self.settings.kafka_topic, 0, OFFSET_END)]).values():
            future.result(30)
        self.do("TRUNCATE TABLE `new_data`.`Users`")

    def clean(self) -> None:
        """Have the table as documented and no other."""
        self.do(*CLEAN)

    def audited(self, patience: Patience | None = None) -> AuditResult:
        """Apply all that has come, and compare table and collection."""
        self.arrived()
        # A group of its own each time: it begins where the topic does, as no test before it matters to the outcome.
        settings = self.settings.model_copy(update={"kafka_group_id": f"test-{uuid.uuid4().hex[:12]}"})
        consumer = change_consumer(settings, existing_kafka(settings))
        report = consumer.run(threading.Event(), until_end=True, seconds=_SECONDS)
        assert report.reached_end
        assert not report.dead_letters
        with MySqlStore(self.url) as table, store_opener(self.settings)() as store:
            return audit(table, store, patience=patience)

    def _post(self, client: httpx.Client, what: str) -> None:
        client.post(f"/connectors/{CONNECTOR}/{what}").raise_for_status()

    def _await_follower(self, act: Callable[[httpx.Client], None]) -> None:
        """Do something that makes the connector begin again, and wait until it reads the binlog."""
        with MySqlStore(self.url) as table, client_of(self._connect, 30) as client:
            gone = table.followers()
            act(client)
            deadline = time.monotonic() + _SECONDS
            while not table.followers() - gone:
                assert time.monotonic() < deadline, _state(self._connect)
                if _state(self._connect).state == "FAILED":
                    # It may fail once as it starts right after the one before it.
                    self._post(client, "restart?includeTasks=true&onlyFailed=true")
                time.sleep(0.2)


@pytest.fixture(scope="module")
def followed(source_stack: Settings) -> Iterator[Source]:
    """The table of either stack and its topic, for all tests of a file."""
    found = stack.up(source_stack, progress=lambda _: None)
    made = Source(
        load_settings(
            GHSYNC_HOME=source_stack.home_dir,
            MONGODB_URI=found["mongo"].uri,
            MONGODB_DATABASE=f"test_{uuid.uuid4().hex[:12]}",
            KAFKA_BOOTSTRAP_SERVERS=found["kafka"].uri,
            MYSQL_URL=found["mysql"].login,
            CONNECT_URL=found["connect"].uri,
        )
    )
    yield made
    made.clean()
    made.close()


@pytest.fixture
def source(followed: Source) -> Iterator[Source]:
    """The same with the table as documented and empty, a connector that runs, and an empty collection."""
    followed.clean()
    try:
        assert followed.arrived()[-1] == followed.marker()
    except StoppedError:
        followed.snapshot()
        assert followed.arrived()[-1] == followed.marker()
    followed.forget()
    yield followed
    with store_opener(followed.settings)() as store:
        store.client.drop_database(followed.settings.mongodb_database)
