"""Spark: the one session, its schemas, and the MongoDB Spark Connector's reads and writes.

Belongs here: how Spark is started, the domain's declarations as Spark types, and the translation of Spark's errors. Not
here: what is read, joined or written when.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from py4j.protocol import Py4JError, Py4JJavaError, Py4JNetworkError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession
from pyspark.sql import functions as F  # noqa: N812  the name that Spark's own documentation gives it
from pyspark.sql.types import LongType, StringType, StructField, StructType

from ghsync_dagster.domain.errors import ConfigError, PermanentError, RefusedError, UnavailableError
from ghsync_dagster.domain.event import event_shape
from ghsync_dagster.domain.user import MARKER_FIELD, MARKER_VALUE, USER_FIELDS
from ghsync_dagster.logging import redact
from ghsync_dagster.progress import log_progress
from ghsync_dagster.stores.mongo.client import CONFIRM_MS
from ghsync_dagster.stores.spark_jvm import launch_jvm

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame

    from ghsync_dagster.stores.mongo.guard import WriterGuard
    from ghsync_dagster.stores.mongo.users import UserStore

T = TypeVar("T")
_SPARK_TYPES: Final = {int: LongType(), str: StringType()}


def _struct(shape: Mapping[str, Any]) -> StructType:
    """Return the Spark type of an ``event_shape``."""
    fields = ((name, _struct(part) if isinstance(part, dict) else _SPARK_TYPES[part]) for name, part in shape.items())
    return StructType([StructField(name, kind) for name, kind in fields])


EVENT_SCHEMA: Final = _struct(event_shape())
"""A typed event, as ``domain.event.Event`` declares it."""

USER_SCHEMA: Final = StructType([StructField(name, StringType()) for name in USER_FIELDS])
VERSIONED_USER_SCHEMA: Final = StructType(
    [*USER_SCHEMA.fields, StructField("created_at", StringType()), StructField("event_id", LongType())]
)
"""A user with the event that gave the fields."""

_CANCEL_SECONDS: Final = 10.0
_CONNECTOR: Final = "mongodb"
_BATCH_SIZE: Final = "5000"
_OF_SECONDARIES: Final = ("readpreferencetags", "maxstalenessseconds")
"""Options of a URI that the Java driver refuses alongside the read preference "primary"."""
_OF_WRITES: Final = ("w", "journal", "wtimeoutms")
"""Options of a URI that would weaken the write concern."""
_AWAY: Final = re.compile(
    "MongoTimeoutException|MongoSocket|MongoNotPrimary|MongoNodeIsRecovering"
    "|MongoConnectionPoolCleared|MongoServerUnavailable|MongoInternalException"
    "|MongoWriteConcernException|Write concern error"
)


TALLY_SCHEMA: Final = StructType(
    [
        *(StructField(name, StringType()) for name in ("kind", "name")),
        *(StructField(name, LongType()) for name in ("rows", "bytes")),
    ]
)
"""What a reading task returns, as ``batch.decide.Tally`` declares it."""


class DuplicateUserError(Exception):
    """An insert found its user stored already: by another writer, or by an earlier attempt of the same task."""


@contextmanager
def spark_errors(what: str) -> Iterator[None]:
    """Translate Spark's errors to ours, credentials masked.

    Raises:
        DuplicateUserError: An insert hit the unique index.
        UnavailableError: MongoDB became unavailable.
        RefusedError: MongoDB refused.
        PermanentError: Any other error, such as the end of the JVM; it contains Spark's first line.
    """
    try:
        yield
    except Py4JNetworkError:
        raise PermanentError(
            f"{what}: the Spark driver's JVM is gone.",
            way_out="Give it memory (SPARK_DRIVER_MEMORY), then run again.",
        ) from None
    except (Py4JJavaError, PySparkException) as error:
        text = redact(str(error))
        if "E11000" in text:
            raise DuplicateUserError from None
        if _AWAY.search(text):
            raise UnavailableError(
                f"{what}: MongoDB can't be reached from Spark ({_cause(text)}).",
                way_out="Check that the server is up and reachable from Spark's executors; then run again.",
            ) from None
        if re.search(r"MongoSecurityException|Unauthorized|code 13\b|code 18\b", text):
            raise RefusedError(
                f"{what}: MongoDB refused ({_cause(text)}).",
                way_out="Check the user, password and roles behind MONGODB_URI.",
            ) from None
        raise PermanentError(
            f"{what}: {_cause(text)}.", way_out="Read Spark's message; see docs/operate/runbook.md."
        ) from None
    except Py4JError as error:
        raise PermanentError(
            f"{what}: {redact(str(error)).splitlines()[0]}.",
            way_out="Read Spark's message; see docs/operate/runbook.md.",
        ) from None


def _cause(text: str) -> str:
    """Return the last error of a Python worker's trace, else the JVM's innermost cause, else the first line."""
    worker = text.partition("Traceback (most recent call last):")[2]
    raised: list[str] = re.findall(r"^(?:\w+\.)*(\w+: .+)$", worker, re.MULTILINE)
    causes: list[str] = re.findall(r"^Caused by: (.+)$", text, flags=re.MULTILINE)
    lines = [line for line in text.splitlines() if line.strip()]
    return ["no message", *lines[:1], *causes[-1:], *raised[-1:]][-1][:300].rstrip(".")


@dataclass(frozen=True, slots=True)
class SparkOptions:
    """What a Spark session is started with.

    Attributes:
        master: Spark master URL.
        java_home: The Java that runs it.
        scratch: Folder for shuffle files.
        jars: Jars on its class path, the MongoDB connector among them.
        packages: Maven coordinates that replace ``jars``, or None.
        driver_memory: Heap of the driver, such as ``1g``.
        jvm_options: Further options of the driver's JVM.
    """

    master: str
    java_home: Path
    scratch: Path
    jars: Sequence[Path] = ()
    packages: str | None = None
    driver_memory: str = "1g"
    jvm_options: Sequence[str] = ()


SessionOf = Callable[[Mapping[str, str]], SparkSession]
"""Returns the session of this process; if there is none, starts it with this Spark configuration."""


def session_of(configuration: Mapping[str, str]) -> SparkSession:
    """Return the session by Spark's own builder."""
    return SparkSession.builder.config(map=dict(configuration)).getOrCreate()


def start_session(options: SparkOptions, get: SessionOf = session_of) -> SparkSession:
    """Start the session, or return the running one: a process has one, since static settings can't change.

    Args:
        options: What it is started with.
        get: Returns the session.

    Raises:
        ConfigError: The session does not start.
    """
    options.scratch.mkdir(parents=True, exist_ok=True)
    os.environ["JAVA_HOME"] = str(options.java_home)
    os.environ["PYSPARK_PYTHON"] = os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1") if options.master.startswith("local") else None
    log4j = Path(__file__).with_name("log4j2.properties").as_uri()
    configuration = _configuration(options, log4j)
    try:
        launch_jvm(configuration)
        session = get(configuration)
    except (Py4JError, PySparkException, OSError) as error:
        raise ConfigError(
            f"Spark does not start on {options.master} with the Java in {options.java_home}: "
            f"{_cause(redact(str(error)))}.",
            way_out="Check SPARK_MASTER, JAVA_HOME (17 or newer) and SPARK_DRIVER_MEMORY.",
        ) from None
    session.sparkContext.setLogLevel("ERROR")
    return session


def _configuration(options: SparkOptions, log4j: str) -> dict[str, str]:
    # Spark splits the options as a shell does.
    jvm = " ".join(f'"{option}"' for option in (f"-Dlog4j2.configurationFile={log4j}", *options.jvm_options))
    jars = (
        {"spark.jars.packages": options.packages}
        if options.packages
        else {"spark.jars": ",".join(str(jar) for jar in options.jars)}
    )
    return {
        "spark.app.name": "ghsync",
        "spark.master": options.master,
        **jars,
        "spark.driver.memory": options.driver_memory,
        "spark.driver.extraJavaOptions": jvm,
        "spark.local.dir": str(options.scratch),
        "spark.sql.warehouse.dir": str(options.scratch / "warehouse"),
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.adaptive.enabled": "false",
        "spark.sql.shuffle.partitions": "4",
        "spark.sql.execution.arrow.maxRecordsPerBatch": "5000",
        "spark.redaction.regex": "(?i)secret|password|token|access[.]?key|connection[.]uri",
        "spark.sql.redaction.options.regex": "(?i)url|uri|password|secret",
    }


def _in_thread(name: str, function: Callable[[], T]) -> Future[T]:
    """Call a function in a daemon thread, which does not keep the process from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001  it is raised again in the thread that needs the result
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


@dataclass
class SparkHandle:
    """A session that starts at the first call, in its own thread.

    In the main thread, Spark would replace the handler of Ctrl-C.

    Attributes:
        options: Called once, before the start.
        get: Returns the session.
        waited_seconds: How long callers have waited for it so far.
    """

    options: Callable[[], SparkOptions]
    get: SessionOf = session_of
    waited_seconds: float = 0.0
    _started: Future[SparkSession] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def session(self) -> SparkSession:
        """Return the session, started if necessary.

        Raises:
            GhsyncError: Java or jars are missing, or the session does not start.
        """
        requested_at = time.monotonic()
        with self._lock:
            if self._started is None:
                self._started = _in_thread("spark-start", lambda: start_session(self.options(), self.get))
        with log_progress("starting Spark"):
            wait([self._started])
        self.waited_seconds += time.monotonic() - requested_at
        return self._started.result()

    def stop(self) -> None:
        """Stop the session if there is one."""
        if self._started is not None and self._started.exception() is None:
            # In another thread: after Ctrl-C this thread's connection to the JVM may hold an unread answer.
            stopper = threading.Thread(target=self._started.result().stop, name="spark-stop")
            stopper.start()
            stopper.join()


def to_arrow(frame: DataFrame) -> pa.Table:
    """Collect rows; if a signal ends the wait, cancel the job, as Spark would first wait for its end."""
    collected = _in_thread("spark-collect", frame.toArrow)
    try:
        wait([collected])
    except BaseException:
        # The signal may have ended the JVM too; the signal is what is raised.
        with suppress(Exception):
            frame.sparkSession.sparkContext.cancelAllJobs()
        wait([collected], _CANCEL_SECONDS)
        raise
    return collected.result()


def insert_users(users: DataFrame, store: UserStore, guard: WriterGuard) -> None:
    """Append users, marked, unordered; users that the unique index refuses stay as they are stored.

    The guard is checked before the job begins. The caller must cancel the job when the guard allows no more writes.

    Raises:
        DuplicateUserError: A user was stored already; others of its batch may be missing.
    """
    guard.allow()
    with spark_errors("Writing users"):
        (
            users.select(*USER_FIELDS, F.lit(MARKER_VALUE).alias(MARKER_FIELD))
            .write.format(_CONNECTOR)
            .mode("append")
            .options(**write_options(store))
            .save()
        )


def write_options(store: UserStore) -> dict[str, str]:
    """Return the connector's options for inserts that a majority confirms, like the store's own writes."""
    return {
        **_connection(store),
        "operationType": "insert",
        "ordered": "false",
        "maxBatchSize": _BATCH_SIZE,
        "writeConcern.w": "majority",
        "writeConcern.wTimeoutMS": str(CONFIRM_MS),
    }


def read_marked(session: SparkSession, store: UserStore) -> DataFrame:
    """Return the users that carry the marker, the five fields."""
    pipeline = f'[{{"$match": {{"{MARKER_FIELD}": "{MARKER_VALUE}"}}}}]'
    return (
        session.read.format(_CONNECTOR)
        .schema(USER_SCHEMA)
        .options(**_connection(store))
        .option("aggregation.pipeline", pipeline)
        .option("partitioner", "com.mongodb.spark.sql.connector.read.partitioner.SinglePartitionPartitioner")
        .load()
    )


def _connection(store: UserStore) -> dict[str, str]:
    # A load needs no streaming monitoring, and some compatible servers answer it incorrectly.
    ours = {"serverMonitoringMode": "poll", "readPreference": "primary"}
    address, _, query = store.uri.partition("?")
    left_out = {*map(str.lower, ours), *_OF_SECONDARIES, *_OF_WRITES}
    given = [part for part in query.split("&") if part and part.partition("=")[0].lower() not in left_out]
    if "serverselectiontimeoutms" not in {part.partition("=")[0].lower() for part in given}:
        ours["serverSelectionTimeoutMS"] = str(store.timeout_ms)
    path = "" if "/" in address.partition("://")[2].rpartition("@")[2] else "/"
    uri = f"{address}{path}?{'&'.join([*given, *(f'{name}={value}' for name, value in ours.items())])}"
    return {"connection.uri": uri, "database": store.database.name, "collection": store.users.name}
