"""The Kafka to use: the one that KAFKA_BOOTSTRAP_SERVERS names, else a local broker of our own with its topics.

Belongs here: the broker's settings, its first files, its topics, and how a program of Kafka's jars is run.
Not here: what is written into the topics or read from them.
"""

from __future__ import annotations

import secrets
import socket
from typing import TYPE_CHECKING, Any

from ghsync_dagster.domain.errors import ConfigError, UnavailableError
from ghsync_dagster.jvm.jars import ensure_jars, locked_set
from ghsync_dagster.jvm.java import find_java
from ghsync_dagster.local.first_files import make_first_files
from ghsync_dagster.local.supervisor import ServerSpec, ServiceStatus, Supervisor
from ghsync_dagster.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from ghsync_dagster.local.supervisor import State
    from ghsync_dagster.settings import Settings

SERVICE = "kafka"
DEFAULT_PORT, DEFAULT_CONTROLLER_PORT = 9092, 9093
EXTERNAL = "external"
_HEAP_MEGABYTES = 256
_PING_SECONDS = 3.0
_TOPIC_SECONDS = 30.0
_SEPARATORS = frozenset(":,}")
# Dead letters wait for a person; changes are kept as long as Kafka does by default, a week.

_LOG4J = """status=warn
appender.out.type=Console
appender.out.name=out
appender.out.layout.type=PatternLayout
appender.out.layout.pattern=%d{ISO8601} %-5p %m [%c]%n
rootLogger.level=WARN
rootLogger.appenderRef.out.ref=out
logger.main.name=kafka.server
logger.main.level=INFO
logger.connect.name=org.apache.kafka.connect.runtime.distributed
logger.connect.level=INFO
logger.debezium.name=io.debezium
logger.debezium.level=INFO
logger.threads.name=io.debezium.util.Threads
logger.threads.level=WARN
"""


def ensure_kafka(settings: Settings, progress: Callable[[str], None] | None = None) -> str:
    """Return the bootstrap servers to use; start the local broker where none is named.

    Raises:
        UnavailableError: The local broker did not start, or its jars can't be fetched.
        ConfigError: There is no Java to run it.
    """
    if settings.kafka_bootstrap_servers:
        return settings.kafka_bootstrap_servers
    log = get_logger(SERVICE)
    status = up(settings, progress or (lambda text: log.info("local_server", detail=text)))
    if status.uri is None:
        raise AssertionError("a server that is up has an address")
    return status.uri


def up(settings: Settings, progress: Callable[[str], None]) -> ServiceStatus:
    """Start the local broker unless it runs, and make the topics that are missing.

    With KAFKA_BOOTSTRAP_SERVERS only ask that one.

    Raises:
        UnavailableError: The broker did not start; holds the end of its log.
        ConfigError: There is no Java to run it, or GHSYNC_HOME can't be used.
    """
    if settings.kafka_bootstrap_servers:
        return _external(settings.kafka_bootstrap_servers)
    status = _supervisor(settings).up(lambda: _choose_server(settings, progress), progress)
    if status.uri is None:
        raise AssertionError("a server that is up has an address")
    _ensure_topic(status.uri, settings.kafka_topic, progress)
    return status


def down(settings: Settings, progress: Callable[[str], None]) -> ServiceStatus:
    """Stop the local broker; never one that KAFKA_BOOTSTRAP_SERVERS names.

    Raises:
        UnavailableError: It could not be ended.
    """
    return _supervisor(settings).down(progress)


def was_set_up(settings: Settings) -> bool:
    """Return whether a broker is named, or a local one was ever started here."""
    return bool(settings.kafka_bootstrap_servers) or _supervisor(settings).was_set_up()


def status(settings: Settings) -> ServiceStatus:
    """Tell how the broker in use is."""
    if settings.kafka_bootstrap_servers:
        return _external(settings.kafka_bootstrap_servers)
    return _supervisor(settings).status()


def java_program(
    settings: Settings, main: str, arguments: Sequence[str], progress: Callable[[str], None], *, heap: int, log4j: Path
) -> list[str]:
    """Return the command line that runs a program of Kafka's jars, fetched where they are missing.

    Args:
        settings: Where Java and the jars are looked for.
        main: The program's class.
        arguments: What follows it.
        progress: Gets a line of text now and then while jars load.
        heap: Its greatest heap in megabytes.
        log4j: The file of its log settings; written here.

    Raises:
        UnavailableError: A jar is missing and can't be fetched.
        ConfigError: There is no Java 17+, or a path has a character that separates paths.
    """
    _refuse_separators(settings)
    jars = ensure_jars(settings, progress, locked_set(SERVICE))
    log4j.parent.mkdir(parents=True, exist_ok=True)
    log4j.write_text(_LOG4J, encoding="ascii")
    return [
        *(str(find_java(settings).command), f"-Xmx{heap}m", "-Xss512k", "-XX:MaxDirectMemorySize=64m"),
        # One compiler takes two thirds of the processor time until the servers are warm, and a little more afterwards.
        *("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:+ExitOnOutOfMemoryError", "-Djava.awt.headless=true"),
        *(f"-Dlog4j2.configurationFile={log4j.as_uri()}", "-cp", ":".join(map(str, jars)), main, *arguments),
    ]


def _refuse_separators(settings: Settings) -> None:
    for variable, folder in (("GHSYNC_HOME", settings.home_dir), ("GHSYNC_CACHE", settings.cache_dir)):
        if found := set(str(folder)) & _SEPARATORS:
            raise ConfigError(
                f"The path {folder} has a {found.pop()!r} in it, which separates paths for Java and Kafka.",
                way_out=f"Set {variable} to another folder.",
            )


def properties(values: Mapping[str, object]) -> str:
    r"""Return the text of a Java properties file.

    >>> properties({"a": 1, "path": "\\ä"})
    'a=1\npath=\\\\\\u00e4\n'
    """
    return "".join(f"{name}={_escaped(str(value))}\n" for name, value in values.items())


def _escaped(value: str) -> str:
    # As java.util.Properties reads them: Latin-1 with UTF-16 escapes.
    units = value.replace("\\", "\\\\").encode("utf-16-be")
    codes = [int.from_bytes(units[at : at + 2], "big") for at in range(0, len(units), 2)]
    return "".join(chr(code) if 32 <= code < 127 else f"\\u{code:04x}" for code in codes)


def _choose_server(settings: Settings, progress: Callable[[str], None]) -> ServerSpec:
    """Make the broker's first files if they are missing, and tell how to run it."""
    folder = _folder(settings)
    data = folder / "data" / SERVICE
    log4j = folder / "log4j2.properties"
    if not data.exists():
        progress(f"{SERVICE}: making the broker's first files")
        _format(settings, data, log4j, progress)
    settings_file = folder / "server.properties"
    program = java_program(settings, "kafka.Kafka", [str(settings_file)], progress, heap=_HEAP_MEGABYTES, log4j=log4j)

    def command(port: int, controller: int) -> list[str]:
        settings_file.write_text(properties(_broker_settings(data, port, controller)), encoding="ascii")
        return marked(program, data, port)

    return ServerSpec(
        server=SERVICE,
        data=data,
        log=folder / "log" / f"{SERVICE}.log",
        default_ports=(DEFAULT_PORT, DEFAULT_CONTROLLER_PORT),
        command=command,
    )


def marked(program: Sequence[str], data: Path, port: int) -> list[str]:
    """Return a Java command line with the data folder and port in it, by which the process is told from others."""
    return [program[0], f"-Dghsync.data={data}", f"-Dghsync.port={port}", *program[1:]]


def _broker_settings(data: Path, port: int, controller: int) -> dict[str, object]:
    one_copy = {
        "offsets.topic.replication.factor": 1,
        "transaction.state.log.replication.factor": 1,
        "transaction.state.log.min.isr": 1,
        "share.coordinator.state.topic.replication.factor": 1,
        "share.coordinator.state.topic.min.isr": 1,
    }
    few_files = {
        "offsets.topic.num.partitions": 5,
        "transaction.state.log.num.partitions": 5,
        "share.coordinator.state.topic.num.partitions": 1,
        "log.cleaner.dedupe.buffer.size": 16_777_216,
    }
    # A week without a consumer is no reason to forget where it was.
    patient = {"offsets.retention.minutes": 525_600}
    quick = {
        "group.initial.rebalance.delay.ms": 0,
        "group.consumer.heartbeat.interval.ms": 200,
        "group.consumer.min.heartbeat.interval.ms": 200,
        # A broker that was killed is let in again once its old session is over.
        "broker.session.timeout.ms": 3000,
        "broker.heartbeat.interval.ms": 1000,
    }
    return {
        "process.roles": "broker,controller",
        "node.id": 1,
        "listeners": f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}",
        "advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "controller.listener.names": "CONTROLLER",
        "controller.quorum.voters": f"1@127.0.0.1:{controller}",
        "log.dirs": data,
        "auto.create.topics.enable": "false",
        **one_copy,
        **few_files,
        **patient,
        **quick,
    }


def _format(settings: Settings, data: Path, log4j: Path, progress: Callable[[str], None]) -> None:
    def command(part: Path) -> list[str]:
        settings_file = part.with_name("server.properties")
        values = _broker_settings(part, DEFAULT_PORT, DEFAULT_CONTROLLER_PORT)
        settings_file.write_text(properties(values), encoding="ascii")
        # A leading dash would be taken for an option.
        cluster = f"g{secrets.token_urlsafe(16)[1:]}"
        arguments = ["format", "--cluster-id", cluster, "--config", str(settings_file)]
        return java_program(settings, "kafka.tools.StorageTool", arguments, progress, heap=_HEAP_MEGABYTES, log4j=log4j)

    make_first_files(data, command, what="Kafka's first files", variable="KAFKA_BOOTSTRAP_SERVERS")


def _folder(settings: Settings) -> Path:
    return settings.home_dir / SERVICE


def _supervisor(settings: Settings) -> Supervisor:
    return Supervisor(
        SERVICE,
        _folder(settings),
        lambda port, seconds: _serves(_uri(port), seconds),
        _uri,
        variable="KAFKA_BOOTSTRAP_SERVERS",
        address_key="bootstrap_servers",
    )


def _uri(port: int) -> str:
    return f"127.0.0.1:{port}"


def _serves(bootstrap: str, seconds: float) -> bool:
    """Return whether a broker without security gives its list of topics."""
    from confluent_kafka import KafkaException

    try:
        _admin(bootstrap).list_topics(timeout=seconds)
    except KafkaException:
        return False
    return True


def _admin(bootstrap: str) -> Any:  # noqa: ANN401  the library has no types
    from confluent_kafka.admin import AdminClient

    # The library would write to standard error of its own what is asked here again and again.
    return AdminClient({"bootstrap.servers": bootstrap, "log_level": 0})


def _ensure_topic(bootstrap: str, name: str, progress: Callable[[str], None]) -> None:
    """Make the topic, with one partition, if it is missing. That of dead letters is made by who writes the first one.

    Raises:
        UnavailableError: The broker does not answer, or refuses it.
    """
    from confluent_kafka import KafkaError, KafkaException
    from confluent_kafka.cimpl import NewTopic

    admin = _admin(bootstrap)
    try:
        if name not in admin.list_topics(timeout=_TOPIC_SECONDS).topics:
            [future] = admin.create_topics([NewTopic(name, 1, 1)], request_timeout=_TOPIC_SECONDS).values()
            try:
                future.result()
            except KafkaException as error:
                # Another caller was first.
                if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                    raise
            progress(f"{SERVICE}: topic {name} is there")
    except KafkaException as error:
        raise UnavailableError(
            f"The topic {name} could not be made at {bootstrap}: {error.args[0].str()}.",
            way_out="Read the broker's log, then run ghsync up again.",
        ) from None


def _external(bootstrap: str) -> ServiceStatus:
    state: State = "up" if any(map(_listens, bootstrap.split(","))) else "down"
    return ServiceStatus(SERVICE, state, uri=bootstrap, server=EXTERNAL, address_key="bootstrap_servers")


def _listens(address: str) -> bool:
    """Return whether somebody listens at ``host:port``; whether the credentials are taken, the flows find out."""
    host, _, port = address.strip().rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_PING_SECONDS):
            return True
    except ValueError:
        raise ConfigError(
            f"KAFKA_BOOTSTRAP_SERVERS is malformed: {address.strip()!r}.", way_out="Write it as host:port,host:port."
        ) from None
    except OSError:
        return False
