"""Kafka: the client's configuration in one place, and how its failures translate.

Not here: the member of a group (``stores.kafka.consumer``), and topics and their records (``stores.kafka.topics``).
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from confluent_kafka import KafkaError, KafkaException, TopicPartition

from ghsync_dagster.domain.errors import ConfigError, GhsyncError, RefusedError, UnavailableError
from ghsync_dagster.logging import redact

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_REFUSED: Final = frozenset(
    {
        KafkaError._AUTHENTICATION,  # noqa: SLF001  the library's own names of its local errors
        KafkaError._SSL,  # noqa: SLF001
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
        KafkaError.SASL_AUTHENTICATION_FAILED,
        KafkaError.UNSUPPORTED_SASL_MECHANISM,
        KafkaError.ILLEGAL_SASL_STATE,
    }
)
_WRONG: Final = {
    KafkaError._INVALID_ARG: "Correct the KAFKA_ settings.",  # noqa: SLF001
    KafkaError._CONFLICT: "Correct the KAFKA_ settings.",  # noqa: SLF001
    KafkaError.INVALID_GROUP_ID: "Correct KAFKA_GROUP_ID.",
    KafkaError.TOPIC_EXCEPTION: "Correct KAFKA_TOPIC.",
    KafkaError.INVALID_SESSION_TIMEOUT: "Set GHSYNC_CDC_SESSION_TIMEOUT_SECONDS to what the brokers allow.",
    KafkaError.INCONSISTENT_GROUP_PROTOCOL: "Give KAFKA_GROUP_ID to ghsync alone: another program is in the group.",
}
DENIED: Final = frozenset({KafkaError.POLICY_VIOLATION, KafkaError.INVALID_CONFIG, KafkaError.INVALID_RECORD})
"""Errors of brokers that do not allow a topic's settings, or a record."""
_TOO_LARGE: Final = frozenset({KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE})
_NO_TOPIC: Final = frozenset(
    {
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError._UNKNOWN_TOPIC,  # noqa: SLF001
        KafkaError._UNKNOWN_PARTITION,  # noqa: SLF001
    }
)
_REQUEST_SECONDS: Final = 10.0
DELIVERY_SECONDS: Final = 20.0
LARGEST_BYTES: Final = 100_000_000
"""Just below the largest request that a broker accepts by default."""
_POLL_LIMIT_SECONDS: Final = 120.0
"""How long a consumer may go without a poll before the group removes it as hung."""


@dataclass(frozen=True, slots=True)
class KafkaSettings:
    """The topic, the group, and the connection settings.

    Attributes:
        bootstrap_servers: Brokers, host:port, comma-separated.
        topic: The topic of changes.
        group_id: The consumer group.
        session_timeout_seconds: After how long without a heartbeat the group removes a consumer.
        timeout_seconds: How long one request waits for a broker.
        security_protocol: PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL.
        sasl_mechanism: PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512.
        sasl_username: User for SASL.
        sasl_password: Password for SASL.
        ssl_ca_location: PEM file of the trusted authorities; the system's own where None.
        ssl_certificate_location: PEM file of the client's certificate.
        ssl_key_location: PEM file of the client's key.
        ssl_key_password: Password of that key.
    """

    bootstrap_servers: str
    topic: str
    group_id: str
    session_timeout_seconds: float = 10.0
    timeout_seconds: float = _REQUEST_SECONDS
    security_protocol: str = "PLAINTEXT"
    sasl_mechanism: str | None = None
    sasl_username: str | None = None
    sasl_password: str | None = field(default=None, repr=False)
    ssl_ca_location: Path | None = None
    ssl_certificate_location: Path | None = None
    ssl_key_location: Path | None = None
    ssl_key_password: str | None = field(default=None, repr=False)

    @property
    def dead_letter_topic(self) -> str:
        """The topic of dead letters."""
        return f"{self.topic}.dlq"

    @property
    def group_name(self) -> str:
        """The name of the group and its topic in the database."""
        return f"{self.group_id}/{self.topic}"


def client_config(kafka: KafkaSettings) -> dict[str, Any]:
    """Return the configuration that all our clients share, with secrets.

    Raises:
        ConfigError: SASL lacks mechanism, user or password.
    """
    config: dict[str, Any] = {
        "bootstrap.servers": kafka.bootstrap_servers,
        "client.id": "ghsync",
        "security.protocol": kafka.security_protocol,
        "reconnect.backoff.ms": 100,
        "reconnect.backoff.max.ms": 1_000,
        "socket.keepalive.enable": True,
        # The library would log to standard error; errors that matter reach our callbacks.
        "log_level": 2,
    }
    if kafka.security_protocol.startswith("SASL"):
        sasl = {
            "KAFKA_SASL_MECHANISM": kafka.sasl_mechanism,
            "KAFKA_SASL_USERNAME": kafka.sasl_username,
            "KAFKA_SASL_PASSWORD": kafka.sasl_password,
        }
        if missing := [name for name, value in sasl.items() if not value]:
            raise ConfigError(
                f"KAFKA_SECURITY_PROTOCOL is {kafka.security_protocol}, but {', '.join(missing)} is not set.",
                way_out=f"Set {', '.join(missing)}.",
            )
        config |= dict(zip(("sasl.mechanism", "sasl.username", "sasl.password"), sasl.values(), strict=True))
    ssl = {
        "ssl.ca.location": kafka.ssl_ca_location,
        "ssl.certificate.location": kafka.ssl_certificate_location,
        "ssl.key.location": kafka.ssl_key_location,
        "ssl.key.password": kafka.ssl_key_password,
    }
    return config | {name: str(value) for name, value in ssl.items() if value is not None}


def consumer_config(kafka: KafkaSettings) -> dict[str, Any]:
    """Return the configuration of the group's consumer: it never commits or resets an offset by itself."""
    session_ms = int(kafka.session_timeout_seconds * 1000)
    return {
        **client_config(kafka),
        "group.id": kafka.group_id,
        "partition.assignment.strategy": "cooperative-sticky",
        "session.timeout.ms": session_ms,
        # A consumer learns of a rebalance by the answer to a heartbeat.
        "heartbeat.interval.ms": min(100, session_ms // 3),
        "max.poll.interval.ms": max(int(_POLL_LIMIT_SECONDS * 1000), 2 * session_ms),
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        # A committed offset that is no longer in the topic must be an error, not skipped.
        "auto.offset.reset": "error",
        "enable.partition.eof": True,
        "isolation.level": "read_committed",
        "allow.auto.create.topics": False,
        "topic.metadata.refresh.interval.ms": 10_000,
        "fetch.wait.max.ms": 100,
        "fetch.queue.backoff.ms": 10,
        "fetch.message.max.bytes": 4_194_304,
        "queued.max.messages.kbytes": 65_536,
    }


def producer_config(kafka: KafkaSettings) -> dict[str, Any]:
    """Return the configuration of a producer that neither loses nor repeats records while it lives."""
    return {
        **client_config(kafka),
        "enable.idempotence": True,
        "acks": "all",
        "linger.ms": 5,
        "delivery.timeout.ms": int(DELIVERY_SECONDS * 1000),
        # The topic's own limit decides.
        "message.max.bytes": LARGEST_BYTES,
    }


def kafka_error(error: KafkaError, what: str) -> GhsyncError:
    """Return our error for the client's.

    Args:
        error: The client's error.
        what: What was being done.
    """
    code, text = error.code(), redact(error.str())[:300].rstrip(".")
    if code in _REFUSED:
        return RefusedError(
            f"{what}: Kafka refused ({error.name()}: {text}).",
            way_out="Check KAFKA_SECURITY_PROTOCOL, the KAFKA_SASL_ and KAFKA_SSL_ settings, and the user's rights.",
        )
    if code in _WRONG:
        return ConfigError(f"{what}: {text} ({error.name()}).", way_out=_WRONG[code])
    if code in _TOO_LARGE:
        return RefusedError(
            f"{what}: a record is too large for its topic ({text}).", way_out="Raise the topic's max.message.bytes."
        )
    if code in DENIED:
        return RefusedError(
            f"{what}: the brokers do not take it ({error.name()}: {text}).",
            way_out="Have the brokers allow it, or make the topic yourself as they allow it; see "
            "docs/reference/dead-letters.md.",
        )
    if is_no_topic(error):
        return UnavailableError(
            f"{what}: the topic is not there ({text}).",
            way_out="Check KAFKA_TOPIC; start the connector, which makes the topic, or make the topic yourself.",
        )
    return UnavailableError(
        f"{what}: Kafka can't be reached or can't answer now ({error.name()}: {text}).",
        way_out="Check that the brokers are up (ghsync status) and that KAFKA_BOOTSTRAP_SERVERS names them.",
    )


def committed_offset(answer: TopicPartition, what: str) -> int | None:
    """Return a group's committed offset in a partition, None where there is none.

    Args:
        answer: The client's answer for the partition: an offset or an error.
        what: What was being done.

    Raises:
        UnavailableError: The brokers can't answer now.
        RefusedError: The rights are refused.
    """
    if answer.error is not None:
        raise kafka_error(answer.error, what)
    return answer.offset if answer.offset >= 0 else None


def is_no_topic(error: KafkaError) -> bool:
    """Return whether an error means that there is no such topic or partition."""
    return error.code() in _NO_TOPIC


@contextmanager
def kafka_errors(what: str) -> Iterator[None]:
    """Translate the client's failures to ours.

    Raises:
        UnavailableError: The brokers can't be reached or can't answer now.
        RefusedError: They refused the credentials or rights.
        ConfigError: A setting is wrong.
    """
    try:
        yield
    except KafkaException as error:
        raise kafka_error(error.args[0], what) from None
    except BufferError:
        raise UnavailableError(f"{what}: the client's queue is full.", way_out="Run again.") from None
