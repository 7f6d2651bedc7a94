"""The Kafka to use: the one that KAFKA_BOOTSTRAP_SERVERS names, else a local broker.

Belongs here: the broker's settings, first files and topic of changes. Not here: its records.
"""

from __future__ import annotations

import secrets
import socket
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ghsync_dagster.domain.errors import ConfigError, UnavailableError
from ghsync_dagster.local.first_files import make_first_files
from ghsync_dagster.local.kafka_program import KafkaProgram, properties

if TYPE_CHECKING:
    from collections.abc import Callable

    from ghsync_dagster.local.supervisor import ServerSpec, ServiceStatus

_DEFAULT_PORTS: Final = (9092, 9093)
"""Of the broker and of its controller."""
_HEAP_MEGABYTES: Final = 256
_PING_SECONDS: Final = 3.0
_TOPIC_SECONDS: Final = 30.0


class KafkaServer(KafkaProgram):
    """A broker that is its own controller."""

    service = "kafka"
    variable = "KAFKA_BOOTSTRAP_SERVERS"
    address_key = "bootstrap_servers"

    @property
    def external(self) -> str | None:
        """KAFKA_BOOTSTRAP_SERVERS."""
        return self.settings.kafka_bootstrap_servers

    def check_external(self, address: str) -> ServiceStatus:
        """Check whether any of the addresses accepts connections."""
        return self.external_status(address, is_up=any(map(_listens, address.split(","))))

    def uri(self, port: int) -> str:
        """Return the local broker's address."""
        return f"127.0.0.1:{port}"

    def answers(self, port: int, seconds: float) -> bool:
        """Return whether it lists its topics at a port."""
        return _serves(self.uri(port), seconds)

    def start(self, progress: Callable[[str], None]) -> ServiceStatus:
        """Start the local broker unless it runs, and make the topic of changes if it is missing.

        Raises:
            UnavailableError: The broker did not start, or the topic can't be made.
            ConfigError: There is no Java to run it, or GHSYNC_HOME can't be used.
        """
        status = super().start(progress)
        _ensure_topic(str(status.uri), self.settings.kafka_topic, progress)
        return status

    def choose(self, progress: Callable[[str], None]) -> ServerSpec:
        """Make the broker's first files if they are missing, and return how to run it."""
        data = self.data(self.service)
        if not data.exists():
            progress(f"{self.service}: making the broker's first files")
            command = partial(self._format, progress)
            make_first_files(data, command, what="Kafka's first files", variable=self.variable)
        values = partial(_broker_settings, data)
        return self.java_spec("kafka.Kafka", _DEFAULT_PORTS, values, progress, heap=_HEAP_MEGABYTES)

    def _format(self, progress: Callable[[str], None], part: Path) -> list[str]:
        settings_file = part.with_name("server.properties")
        settings_file.write_text(properties(_broker_settings(part, *_DEFAULT_PORTS)), encoding="ascii")
        # A leading dash would be parsed as an option.
        cluster = f"g{secrets.token_urlsafe(16)[1:]}"
        arguments = ["format", "--cluster-id", cluster, "--config", str(settings_file)]
        return self.java_program("kafka.tools.StorageTool", arguments, progress, heap=_HEAP_MEGABYTES)


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
    # Committed offsets outlive a week without a consumer.
    retention = {"offsets.retention.minutes": 525_600}
    quick = {
        "group.initial.rebalance.delay.ms": 0,
        "group.consumer.heartbeat.interval.ms": 200,
        "group.consumer.min.heartbeat.interval.ms": 200,
        # A killed broker can register again only once its old session has timed out.
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
        **retention,
        **quick,
    }


def _serves(bootstrap: str, seconds: float) -> bool:
    """Return whether a broker without security lists its topics."""
    from confluent_kafka import KafkaException

    try:
        _admin(bootstrap).list_topics(timeout=seconds)
    except KafkaException:
        return False
    return True


def _admin(bootstrap: str) -> Any:  # noqa: ANN401  the library has no types
    from confluent_kafka.admin import AdminClient

    # The library would log every failed poll for readiness to standard error.
    return AdminClient({"bootstrap.servers": bootstrap, "log_level": 0})


def _ensure_topic(bootstrap: str, name: str, progress: Callable[[str], None]) -> None:
    """Create the topic, with one partition, if it is missing. The first dead letter creates its own topic.

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
                # Another caller created it.
                if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                    raise
            progress(f"kafka: topic {name} is there")
    except KafkaException as error:
        raise UnavailableError(
            f"The topic {name} could not be made at {bootstrap}: {error.args[0].str()}.",
            way_out="Read the broker's log, then run ghsync up again.",
        ) from None


def _listens(address: str) -> bool:
    """Return whether ``host:port`` accepts connections; credentials are not checked."""
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
