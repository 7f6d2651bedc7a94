"""Fixtures of a broker, records of changes and a table, for the tests of the change stream."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import psutil
import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from ghsync_dagster.cdc.health.metrics import ChangeMetrics
from ghsync_dagster.cdc.stream.consume import ChangeConsumer, ConsumerReport
from ghsync_dagster.domain.user import json_schema
from ghsync_dagster.local import stack
from ghsync_dagster.stores.kafka.client import KafkaSettings
from ghsync_dagster.stores.mongo.users import UserStore
from ghsync_dagster.stores.mysql import MySqlStore
from ghsync_dagster_tests.support.builders import row, user

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ghsync_dagster.local.supervisor import ServiceStatus
    from ghsync_dagster.settings import Settings

T = TypeVar("T")
GHSYNC = str(Path(sys.executable).parent / "ghsync")


def server_position(pos: int, file: str = "bin.000001", server_id: int = 1) -> dict[str, Any]:
    """A position in a server's binlog, as members of a record's source."""
    return {"server_id": server_id, "file": file, "pos": pos, "row": 0}


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


@dataclass
class Topic:
    """A topic of changes of the test's own, and what writes into it in Debezium's form."""

    kafka: KafkaSettings
    producer: Producer
    position: int = 0
    written: int = 0
    expected: dict[str, dict[str, Any]] = field(default_factory=dict)

    def write(
        self, key: object, op: str, after: dict[str, Any] | None = None, *, partition: int = 0, pos: int = 0
    ) -> None:
        """Write one change; ``after`` is the user then. Its place in the binlog is the next one, or ``pos``."""
        self.position = pos or self.position + 10
        number = None if key is None else int(str(key))
        image = None if after is None else {**after, "user_id": int(after["user_id"])}
        source = {"ts_ms": 1_700_000_000_000, "snapshot": "false"} | server_position(self.position)
        before = row(number) if op == "d" else None
        value = {"before": before, "after": image, "source": source, "op": op}
        self.raw(None if number is None else {"user_id": number}, value, partition=partition)
        if op == "d":
            self.expected.pop(str(key), None)
        elif op == "t":
            self.expected.clear()
        else:
            assert after is not None
            self.expected[str(key)] = after

    def upsert(self, key: object, login: str | None = "octo", **where: Any) -> None:
        """Write an update, or create."""
        self.write(key, "u" if str(key) in self.expected else "c", user(key, login), **where)

    def delete(self, key: object, **where: Any) -> None:
        """Write a delete and its tombstone."""
        self.write(key, "d", **where)
        self.raw({"user_id": int(str(key))}, None, partition=where.get("partition", 0))

    def raw(self, key: Any, value: Any, *, partition: int = 0, headers: Any = None) -> None:
        """Write whatever it is: bytes as they are, all else as JSON."""
        key, value = (part if part is None or isinstance(part, bytes) else _json(part) for part in (key, value))
        self.producer.produce(self.kafka.topic, key=key, value=value, partition=partition, headers=headers)
        self.written += 1
        self.producer.poll(0)

    def flush(self) -> None:
        """Wait until all is written."""
        assert self.producer.flush(20) == 0

    def commit(self, offset: int) -> None:
        """Move the group, which nobody is in, in the first partition."""
        consumer = Consumer({"bootstrap.servers": self.kafka.bootstrap_servers, "group.id": self.kafka.group_id})
        consumer.commit(offsets=[TopicPartition(self.kafka.topic, 0, offset)], asynchronous=False)
        consumer.close()

    def committed(self, partition: int = 0) -> int:
        """Where the group goes on; -1001 where it has committed nothing."""
        consumer = Consumer({"bootstrap.servers": self.kafka.bootstrap_servers, "group.id": self.kafka.group_id})
        deadline = time.monotonic() + 20
        try:
            while True:
                try:
                    [place] = consumer.committed([TopicPartition(self.kafka.topic, partition)], timeout=10)
                    return int(place.offset)
                except KafkaException:
                    # A broker that has only just started still makes its topic of offsets.
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.1)
        finally:
            consumer.close()


@pytest.fixture(scope="session")
def brokers(server_settings: Settings) -> str:
    """The session's broker."""
    return stack.ensure(server_settings, "kafka")


@pytest.fixture
def make_topic(brokers: str) -> Iterator[Callable[..., Topic]]:
    """Return a function that makes a topic of so many partitions."""
    admin = AdminClient({"bootstrap.servers": brokers})
    made: list[str] = []

    def make(partitions: int = 1, largest_bytes: int = 1_000_000, **settings: Any) -> Topic:
        name = f"changes-{uuid.uuid4().hex[:8]}"
        config = {"max.message.bytes": str(largest_bytes)}
        for future in admin.create_topics([NewTopic(name, partitions, 1, config=config)]).values():
            future.result()
        made.extend([name, f"{name}.dlq"])
        kafka = KafkaSettings(
            bootstrap_servers=brokers, topic=name, group_id=f"group-{name}", session_timeout_seconds=6, **settings
        )
        return Topic(
            kafka, Producer({"bootstrap.servers": brokers, "linger.ms": 5, "message.max.bytes": largest_bytes})
        )

    yield make
    for future in admin.delete_topics(made).values():
        future.exception()


@pytest.fixture
def topic(make_topic: Callable[..., Topic]) -> Topic:
    """A topic of one partition."""
    return make_topic()


def make_anew(topic: Topic, *, letters_too: bool = False, group: str = "") -> Topic:
    """Delete the topic, and make one with its name, for the same or another group; its dead letters go too, or stay."""
    admin = AdminClient({"bootstrap.servers": topic.kafka.bootstrap_servers})
    name = topic.kafka.topic
    for future in admin.delete_topics([name, f"{name}.dlq"] if letters_too else [name]).values():
        future.result(30)

    def is_made() -> bool:
        [made] = admin.create_topics([NewTopic(name, 1, 1)]).values()
        error = made.exception(30)
        if error is not None and error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
            raise error
        return error is None

    # A broker goes on for a moment with a topic that is to go.
    until(is_made)
    return replace(
        topic,
        kafka=replace(topic.kafka, group_id=group or topic.kafka.group_id),
        producer=Producer({"bootstrap.servers": topic.kafka.bootstrap_servers}),
        expected={},
    )


@dataclass
class Running:
    """A consumer in a thread of its own."""

    stop: threading.Event
    thread: threading.Thread
    metrics: ChangeMetrics
    reports: list[ConsumerReport]
    errors: list[BaseException]

    def end(self, seconds: float = 30) -> ConsumerReport:
        """Ask for the end, wait for it, and return the report; raises what the consumer raised."""
        self.stop.set()
        self.thread.join(seconds)
        assert not self.thread.is_alive()
        if self.errors:
            raise self.errors[0]
        return self.reports[0]


@dataclass
class Parts:
    """What a consumer is made of in a test."""

    uri: str
    database: str

    def consumer(self, topic: Topic, **more: Any) -> ChangeConsumer:
        """Return a consumer of a topic into the test's own database."""
        return ChangeConsumer(topic.kafka, self.open_store, **more)

    def open_store(self) -> UserStore:
        """Open the test's own database."""
        return UserStore(self.uri, self.database, "Users", timeout_seconds=2)

    def drain(self, topic: Topic, **more: Any) -> ConsumerReport:
        """Apply all that the topic holds."""
        topic.flush()
        report = self.consumer(topic, **more).run(threading.Event(), until_end=True, seconds=60)
        assert report.reached_end
        return report

    @contextmanager
    def running(self, topic: Topic, **more: Any) -> Iterator[Running]:
        """Run a consumer alongside the test."""
        metrics = ChangeMetrics()
        consumer = self.consumer(topic, listener=metrics, **more)
        reports: list[ConsumerReport] = []
        errors: list[BaseException] = []
        stop = threading.Event()

        def run() -> None:
            try:
                reports.append(consumer.run(stop))
            except BaseException as error:  # noqa: BLE001  the test raises it
                errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield Running(stop, thread, metrics, reports, errors)
        finally:
            stop.set()
            thread.join(30)


@pytest.fixture
def mysql_url(server_settings: Settings) -> Iterator[str]:
    """The URL of a MySQL database of the test's own, dropped afterwards."""
    server = stack.ensure(server_settings, "mysql")
    name = f"test_{uuid.uuid4().hex[:12]}"
    with MySqlStore(server) as admin:
        admin.execute([(f"CREATE DATABASE `{name}` CHARACTER SET utf8mb4", ())])
        yield urlsplit(server)._replace(path=f"/{name}").geturl()
        admin.execute([(f"DROP DATABASE `{name}`", ())])


@pytest.fixture
def mysql(mysql_url: str) -> Iterator[MySqlStore]:
    """An open store on an empty table."""
    with MySqlStore(mysql_url, timeout_seconds=5) as opened:
        opened.ensure_table()
        yield opened


@pytest.fixture
def parts(mongo_uri: str, database: str) -> Parts:
    """What a consumer is made of, with a database of the test's own."""
    return Parts(mongo_uri, database)


def stored(store: UserStore) -> dict[str, dict[str, Any]]:
    """All stored users by id, without ``_id``."""
    return {found["user_id"]: found for found in store.users.find({}, {"_id": 0})}


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(look: Callable[[], T], seconds: float = 30, good: Callable[[T], object] = bool) -> T:
    """Look at something outside of this process's reach until what is found is good, or true; return it."""
    started = time.monotonic()
    while not good(found := look()):
        waited = time.monotonic() - started
        assert waited < seconds, f"it did not come about: {found}"
        # Seldom after a while: looking takes its time from what is awaited.
        time.sleep(min(0.02 + waited / 20, 0.2))
    return found


@contextmanager
def child(kafka: KafkaSettings, parts: Parts, log: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Run a consumer as a process of its own; its log is appended to a file, or dropped."""
    environment = {
        "KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
        "KAFKA_TOPIC": kafka.topic,
        "KAFKA_GROUP_ID": kafka.group_id,
        "GHSYNC_CDC_SESSION_TIMEOUT_SECONDS": str(kafka.session_timeout_seconds),
        "MONGODB_URI": parts.uri,
        "MONGODB_DATABASE": parts.database,
    }
    with log.open("ab") if log else contextlib.nullcontext(subprocess.DEVNULL) as stderr:
        process = subprocess.Popen([GHSYNC, "cdc", "run"], env=environment, cwd=Path.home(), stderr=stderr)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(10)


def kill(*statuses: ServiceStatus) -> None:
    """Kill servers hard and wait until they are gone, since until then their ports are taken."""
    for status in statuses:
        assert status.pid
        process = psutil.Process(status.pid)
        process.kill()
        with contextlib.suppress(psutil.NoSuchProcess):
            process.wait(10)


class StrictStore(UserStore):
    """A store whose users' validator somebody made stricter, and which leaves it so."""

    def ensure_collection(self) -> None:
        """Leave the stricter validator as it is."""


def make_strict(store: UserStore) -> None:
    """Set the collection up, then have the database refuse logins of more than 8 characters."""
    store.ensure_collection()
    strict = json_schema()
    strict["properties"]["login"] = {"bsonType": "string", "maxLength": 8}
    store.database.command({"collMod": "Users", "validator": {"$jsonSchema": strict}})
