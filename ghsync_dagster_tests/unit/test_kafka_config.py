"""How settings become a Kafka client's configuration, and its errors ours. No broker."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from ghsync_dagster.domain.errors import ConfigError, GhsyncError, RefusedError, UnavailableError
from ghsync_dagster.settings import load_settings
from ghsync_dagster.stores.kafka.client import (
    KafkaSettings,
    client_config,
    committed_offset,
    consumer_config,
    kafka_error,
    kafka_errors,
    producer_config,
)
from ghsync_dagster.stores.kafka.consumer import TopicConsumer
from ghsync_dagster.stores.kafka.topics import RecordWriter
from ghsync_dagster.wiring import existing_kafka

PLAIN = KafkaSettings("broker:9092", "changes", "group")
SECURE = KafkaSettings(
    "broker:9093",
    "changes",
    "group",
    security_protocol="SASL_SSL",
    sasl_mechanism="SCRAM-SHA-512",
    sasl_username="app",
    sasl_password="s3cret",
    ssl_ca_location=Path("/ca.pem"),
    ssl_certificate_location=Path("/cert.pem"),
    ssl_key_location=Path("/key.pem"),
    ssl_key_password="k3y",
)


def nothing(_: set[int]) -> None:
    """A callback."""


def test_a_plain_client_has_no_word_of_security_but_the_protocol() -> None:
    config = client_config(PLAIN)
    assert config["bootstrap.servers"] == "broker:9092"
    assert config["security.protocol"] == "PLAINTEXT"
    assert not [name for name in config if name.startswith(("sasl.", "ssl."))]


def test_every_security_setting_reaches_every_client() -> None:
    for config in (client_config(SECURE), consumer_config(SECURE), producer_config(SECURE)):
        assert {name: value for name, value in config.items() if name.startswith(("sasl.", "ssl.", "security."))} == {
            "security.protocol": "SASL_SSL",
            "sasl.mechanism": "SCRAM-SHA-512",
            "sasl.username": "app",
            "sasl.password": "s3cret",
            "ssl.ca.location": "/ca.pem",
            "ssl.certificate.location": "/cert.pem",
            "ssl.key.location": "/key.pem",
            "ssl.key.password": "k3y",
        }


def test_secrets_are_not_shown() -> None:
    assert "s3cret" not in repr(SECURE)
    assert "k3y" not in repr(SECURE)


def test_sasl_without_what_it_needs_names_what_is_missing() -> None:
    half = KafkaSettings("b", "t", "g", security_protocol="SASL_PLAINTEXT", sasl_username="app")
    with pytest.raises(ConfigError, match=r"KAFKA_SASL_MECHANISM, KAFKA_SASL_PASSWORD is not set"):
        client_config(half)


def test_nothing_is_committed_or_skipped_unasked() -> None:
    config = consumer_config(PLAIN)
    assert config["enable.auto.commit"] is False
    assert config["enable.auto.offset.store"] is False
    assert config["auto.offset.reset"] == "error"
    assert config["partition.assignment.strategy"] == "cooperative-sticky"


@pytest.mark.parametrize("seconds", [6.0, 10.0, 45.0, 300.0])
def test_the_times_of_the_group_fit_each_other(seconds: float) -> None:
    config = consumer_config(KafkaSettings("b", "t", "g", session_timeout_seconds=seconds))
    assert config["session.timeout.ms"] == seconds * 1000
    assert config["heartbeat.interval.ms"] * 3 <= config["session.timeout.ms"] <= config["max.poll.interval.ms"]


def test_a_producer_waits_for_all_replicas() -> None:
    config = producer_config(PLAIN)
    assert (config["acks"], config["enable.idempotence"]) == ("all", True)


def test_the_settings_of_the_environment_arrive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("s3cret\n")
    for name, value in {
        "KAFKA_BOOTSTRAP_SERVERS": "one:1,two:2",
        "KAFKA_TOPIC": "changes",
        "KAFKA_GROUP_ID": "group",
        "KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
        "KAFKA_SASL_MECHANISM": "PLAIN",
        "KAFKA_SASL_USERNAME": "app",
        "KAFKA_SASL_PASSWORD_FILE": str(secret),
        "KAFKA_SSL_CA_LOCATION": "/ca.pem",
        "GHSYNC_CDC_SESSION_TIMEOUT_SECONDS": "7",
    }.items():
        monkeypatch.setenv(name, value)
    kafka = existing_kafka(load_settings())
    assert kafka.bootstrap_servers == "one:1,two:2"
    assert kafka.dead_letter_topic == "changes.dlq"
    assert (kafka.sasl_password, kafka.ssl_ca_location) == ("s3cret", Path("/ca.pem"))
    assert kafka.session_timeout_seconds == 7


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (KafkaError._TRANSPORT, UnavailableError),
        (KafkaError._ALL_BROKERS_DOWN, UnavailableError),
        (KafkaError._TIMED_OUT, UnavailableError),
        (KafkaError.REBALANCE_IN_PROGRESS, UnavailableError),
        (KafkaError.ILLEGAL_GENERATION, UnavailableError),
        (KafkaError.UNKNOWN_TOPIC_OR_PART, UnavailableError),
        (KafkaError._AUTHENTICATION, RefusedError),
        (KafkaError._SSL, RefusedError),
        (KafkaError.TOPIC_AUTHORIZATION_FAILED, RefusedError),
        (KafkaError.GROUP_AUTHORIZATION_FAILED, RefusedError),
        (KafkaError.MSG_SIZE_TOO_LARGE, RefusedError),
        (KafkaError._INVALID_ARG, ConfigError),
        (KafkaError.INVALID_SESSION_TIMEOUT, ConfigError),
        (KafkaError.INCONSISTENT_GROUP_PROTOCOL, ConfigError),
    ],
)
def test_each_error_of_the_client_says_whether_to_try_again_and_the_way_out(code: int, kind: type[GhsyncError]) -> None:
    error = kafka_error(KafkaError(code), "Consuming changes")
    assert type(error) is kind
    assert error.message.startswith("Consuming changes: ")
    assert error.way_out


def test_an_exception_of_the_client_becomes_ours() -> None:
    with pytest.raises(RefusedError), kafka_errors("Writing"):
        raise KafkaException(KafkaError(KafkaError.SASL_AUTHENTICATION_FAILED))
    with pytest.raises(UnavailableError), kafka_errors("Writing"):
        raise BufferError


@pytest.mark.parametrize(
    "wrong",
    [
        {"security_protocol": "SSL", "ssl_ca_location": Path("/no/such.pem")},
        {"security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": "X", "sasl_username": "u", "sasl_password": "hush"},
    ],
)
def test_a_wrong_setting_is_told_when_the_client_is_made(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        TopicConsumer(KafkaSettings("b:1", "t", "g", **wrong), assigned=nothing, revoked=nothing, lost=nothing)
    assert "hush" not in str(caught.value)
    with pytest.raises(ConfigError):
        RecordWriter(KafkaSettings("b:1", "t", "g", **wrong), "t.dlq").write([])


def test_a_place_that_may_not_be_told_is_not_taken_for_none() -> None:
    assert committed_offset(TopicPartition("changes", 0, 7), "Asking") == 7
    assert committed_offset(TopicPartition("changes", 0), "Asking") is None
    # The client alone can put an error into a place.
    untold: Any = SimpleNamespace(partition=0, offset=-1001, error=KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED))
    with pytest.raises(RefusedError, match="Asking: Kafka refused"):
        committed_offset(untold, "Asking")
    untold.error = KafkaError(KafkaError.UNSTABLE_OFFSET_COMMIT)
    with pytest.raises(UnavailableError):
        committed_offset(untold, "Asking")
