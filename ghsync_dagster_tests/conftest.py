"""Fixtures of real parts: started once a session, clean for each test."""

from __future__ import annotations

import gc
import io
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pymysql
import pytest
import structlog
from confluent_kafka import OFFSET_END, Consumer, TopicPartition
from confluent_kafka.admin import AdminClient

from ghsync_dagster.batch.flow import BatchFlow
from ghsync_dagster.batch.reports import Artifacts
from ghsync_dagster.domain.user import BUILT_IN_RULES
from ghsync_dagster.local import stack
from ghsync_dagster.logging import configure_logging
from ghsync_dagster.settings import Settings, load_settings
from ghsync_dagster.stores.mongo.users import UserStore
from ghsync_dagster.stores.mysql_url import parse_mysql_url
from ghsync_dagster.wiring import close_statements, spark_handle
from ghsync_dagster_tests.support.real_mysql import NotToBeHadError, real_mysql
from ghsync_dagster_tests.support.servers import FOLLOWING, group_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ghsync_dagster.stores.spark import SparkHandle

pytest_plugins = tuple(
    f"ghsync_dagster_tests.support.{name}"
    for name in ("servers", "cdc_parts", "alert_parts", "hanging", "source_parts")
)

MEMORY = Path("/dev/shm")
MEMORY_BYTES = 6 * 1024**3
_OURS = ("GHSYNC_", "MONGODB_", "SPARK_", "DAGSTER_", "KAFKA_", "MYSQL_", "CONNECT_")
_homes: list[Settings] = []


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Stop what follows a database once no test of this process shares it, as idling takes a tenth of a core."""
    if nextitem and group_of(item.path) in FOLLOWING and group_of(nextitem.path) not in FOLLOWING:
        for settings in _homes:
            stack.down(settings, ("connect", "kafka", "mysql"), progress=lambda _: None)


# A deadline of milliseconds is for a machine of one's own: pytest's time-out ends what hangs.
hypothesis.settings.register_profile("shared-machine", deadline=None)
hypothesis.settings.load_profile("shared-machine")

# A test process that another one starts may ignore Ctrl-C, and what it starts would then ignore it too.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def clean_environment() -> Iterator[None]:
    """Keep the caller's settings out of the tests, but for the jar cache."""
    saved = {name: value for name, value in os.environ.items() if name.startswith(_OURS) and name != "GHSYNC_CACHE"}
    for name in saved:
        del os.environ[name]
    yield
    os.environ.update(saved)


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., io.StringIO]]:
    """Return a function that sets up logging and returns what goes to standard error from then on."""
    root = logging.getLogger("ghsync")
    handlers, level, propagate = root.handlers[:], root.level, root.propagate

    def start(stream: io.StringIO | None = None, **settings: str) -> io.StringIO:
        target = stream or io.StringIO()
        monkeypatch.setattr(sys, "stderr", target)
        configure_logging(load_settings(**settings))
        return target

    yield start
    root.handlers[:], root.propagate = handlers, propagate
    root.setLevel(level)
    structlog.contextvars.clear_contextvars()


@pytest.fixture
def without_gc() -> Iterator[None]:
    """Look for no cycles: a walk keeps a million states, which have none, and looking takes half of its time."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="session")
def server_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the session's servers keep their files: in memory where there is room, so that no test waits for a disk."""
    if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free >= MEMORY_BYTES:
        with tempfile.TemporaryDirectory(prefix="ghsync-tests-", dir=MEMORY) as folder:
            yield Path(folder)
    else:
        yield tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="session")
def server_settings(server_folder: Path, clean_environment: None) -> Iterator[Settings]:
    """Settings whose home holds the session's one local MongoDB."""
    del clean_environment
    settings = load_settings(GHSYNC_HOME=server_folder)
    _homes.append(settings)
    stack.ensure(settings, "mongo")
    yield settings
    stack.down(settings, progress=lambda _: None)


@pytest.fixture(scope="session")
def mongo_uri(server_settings: Settings) -> str:
    """The URI of the session's MongoDB."""
    return stack.ensure(server_settings, "mongo")


@pytest.fixture(scope="session")
def local_stack(server_settings: Settings) -> Settings:
    """Settings whose home holds the session's whole stack, running: all four servers and the connector.

    For tests that kill and start servers; they leave them running (``stack.up(local_stack, ...)``).
    """
    stack.up(server_settings, progress=lambda _: None)
    return server_settings


@pytest.fixture(scope="session")
def mysql_stack(server_settings: Settings) -> Iterator[Settings]:
    """The same with a real MySQL, alongside the same MongoDB; skips where no MySQL can be had."""
    try:
        mysqld = real_mysql(server_settings)
    except NotToBeHadError as error:
        pytest.skip(f"no real MySQL: {error}")
    settings = load_settings(
        GHSYNC_HOME=server_settings.home_dir / "mysqld", MONGODB_URI=stack.ensure(server_settings, "mongo")
    )
    _homes.append(settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{mysqld}{os.pathsep}{os.environ['PATH']}")
        stack.up(settings, progress=lambda _: None)
    yield settings
    stack.down(settings, progress=lambda _: None)


@pytest.fixture(scope="session", params=["mariadb", "mysql"])
def source_stack(request: pytest.FixtureRequest) -> Settings:
    """Either stack: the one with the locked MariaDB, and the one with a real MySQL."""
    found: Settings = request.getfixturevalue({"mariadb": "local_stack", "mysql": "mysql_stack"}[request.param])
    return found


@pytest.fixture
def stack_settings(local_stack: Settings) -> Iterator[Settings]:
    """Settings that name the running stack's servers, with table and topics empty, as a test's own.

    The consumer group and the Mongo database are the test's own too; the database is dropped afterwards.
    """
    found = stack.up(local_stack, progress=lambda _: None)
    own = load_settings(
        GHSYNC_HOME=local_stack.home_dir,
        MONGODB_URI=found["mongo"].uri,
        MONGODB_DATABASE=f"test_{uuid.uuid4().hex[:12]}",
        KAFKA_BOOTSTRAP_SERVERS=found["kafka"].uri,
        KAFKA_GROUP_ID=f"test-{uuid.uuid4().hex[:12]}",
        MYSQL_URL=found["mysql"].login,
        CONNECT_URL=found["connect"].uri,
    )
    empty_table_and_topics(own)
    # What an earlier test did in a session of statements is told for a day.
    close_statements(own, datetime.now(UTC))
    yield own
    with UserStore(stack.ensure(own, "mongo"), own.mongodb_database, "Users") as opened:
        opened.client.drop_database(own.mongodb_database)


def empty_table_and_topics(settings: Settings) -> None:
    """Truncate the table, wait until the topic has the truncation, and delete all records of topic and dead letters."""
    marker = -uuid.uuid4().int % 2**62
    address = parse_mysql_url(stack.ensure(settings, "mysql"))
    bootstrap = stack.ensure(settings, "kafka")
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": uuid.uuid4().hex, "enable.auto.commit": False})
    end = consumer.get_watermark_offsets(TopicPartition(settings.kafka_topic, 0), timeout=30)[1]
    consumer.assign([TopicPartition(settings.kafka_topic, 0, end)])
    with (
        pymysql.connect(
            host=address.host, port=address.port, user=address.user, password=address.password, autocommit=True
        ) as connection,
        connection.cursor() as cursor,
    ):
        cursor.execute("INSERT INTO new_data.Users (user_id, login) VALUES (%s, 'marker')", (marker,))
        cursor.execute("TRUNCATE TABLE new_data.Users")
    seen, deadline = False, time.monotonic() + 60
    while time.monotonic() < deadline:
        record = consumer.poll(1)
        content = record.value() if record and not record.error() else None
        value = json.loads(content) if content else {}
        seen = seen or (value.get("after") or {}).get("user_id") == marker
        if seen and value.get("op") == "t":
            break
    else:
        raise AssertionError("the truncation did not arrive in the topic")
    consumer.close()
    admin = AdminClient({"bootstrap.servers": bootstrap})
    topics = {settings.kafka_topic, f"{settings.kafka_topic}.dlq"} & set(admin.list_topics(timeout=10).topics)
    for future in admin.delete_records([TopicPartition(name, 0, OFFSET_END) for name in topics]).values():
        future.result(30)


@pytest.fixture
def database(mongo_uri: str) -> Iterator[str]:
    """The name of a database of the test's own, dropped afterwards."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    yield name
    with UserStore(mongo_uri, name, "Users") as store:
        store.client.drop_database(name)


@pytest.fixture
def store(mongo_uri: str, database: str) -> Iterator[UserStore]:
    """An open store on the test's own database; the collection does not exist yet."""
    with UserStore(mongo_uri, database, "Users", timeout_seconds=5) as opened:
        yield opened


@pytest.fixture(scope="session")
def spark(server_settings: Settings) -> Iterator[SparkHandle]:
    """The session's Spark, started when first asked for."""
    handle = spark_handle(server_settings)
    yield handle
    handle.stop()


@pytest.fixture
def flow(spark: SparkHandle, mongo_uri: str, database: str, tmp_path: Path) -> BatchFlow:
    """A batch flow on the test's own database and folder."""
    return BatchFlow(
        artifacts=Artifacts(tmp_path / "batch"),
        spark=spark,
        open_store=lambda: UserStore(mongo_uri, database, "Users", timeout_seconds=5),
        rules=BUILT_IN_RULES,
        max_quarantined_ratio=0.01,
        attempts=1,
        lease_wait_seconds=5,
        lease_quiet_seconds=2,
    )


@pytest.fixture
def event_line() -> Callable[..., str]:
    """Return a function that makes one valid line of GH Archive; keywords replace fields, ``actor_*`` the actor's."""

    def make(
        user_id: int = 1, login: str = "octo", at: str = "2015-01-01T15:00:00Z", number: int = 1, **more: Any
    ) -> str:
        actor = {
            "id": user_id,
            "login": login,
            "gravatar_id": "",
            "url": f"https://api.github.com/users/{login}",
            "avatar_url": f"https://avatars.githubusercontent.com/u/{user_id}?",
        }
        actor |= {name.removeprefix("actor_"): value for name, value in more.items() if name.startswith("actor_")}
        event = {
            "id": str(number),
            "type": "PushEvent",
            "actor": actor,
            "repo": {"id": 7, "name": "octo/repo", "url": "https://api.github.com/repos/octo/repo"},
            "payload": {},
            "public": True,
            "created_at": at,
        }
        event |= {name: value for name, value in more.items() if not name.startswith("actor_")}
        return json.dumps(event, separators=(",", ":"))

    return make
