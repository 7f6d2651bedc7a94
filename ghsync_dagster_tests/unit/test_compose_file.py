"""The compose files: each service is as strict as promised, and what belongs together agrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ghsync_dagster.deploy.volumes import SECRETS
from ghsync_dagster.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
ONCE = ("prepare", "setup")


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return found


STACK = read("docker-compose.yml")
SCALE = read("deploy/compose.scale.yml")
DAGSTER = read("deploy/dagster.yaml")
SERVICES: dict[str, dict[str, Any]] = {
    **STACK["services"],
    **{name: service for name, service in SCALE["services"].items() if "image" in service},
}


@pytest.mark.parametrize("name", SERVICES)
def test_each_service_is_as_strict_as_it_can_be(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges"]
    assert service["mem_limit"]
    assert service["pids_limit"]
    assert service["restart"].startswith("on-failure:") or name == "prepare"
    assert ("healthcheck" in service) == (name not in ONCE)
    # Only what gives volumes to their owners is root, without the network.
    assert (service["user"] == "0:0") == (name == "prepare") == ("cap_add" in service) == ("network_mode" in service)
    assert service["user"] not in ("", "root")


def test_one_port_is_published_on_loopback() -> None:
    assert {name: service["ports"] for name, service in SERVICES.items() if "ports" in service} == {
        "proxy": ["127.0.0.1:${STACK_PORT:-3000}:8080"]
    }


def test_only_the_filter_mounts_the_docker_socket() -> None:
    mounts = {name: [str(volume) for volume in service.get("volumes", ())] for name, service in SERVICES.items()}
    assert [name for name, volumes in mounts.items() if any("docker.sock" in one for one in volumes)] == [
        "docker-filter"
    ]
    assert STACK["networks"]["control"] == {"internal": True}


@pytest.mark.parametrize("name", SERVICES)
def test_no_secret_is_in_an_environment(name: str) -> None:
    environment = SERVICES[name].get("environment", {})
    secret = {key for key in environment if "PASSWORD" in key or "SECRET" in key or "TOKEN" in key}
    assert all(key.endswith("_FILE") or key == "CONNECT_SECRETS" for key in secret), secret


def test_each_image_is_pinned_by_a_tag() -> None:
    for name, service in SERVICES.items():
        image = str(service["image"])
        assert ":-" in image, name
        assert image.partition(":-")[2].rstrip("}").count(":") == 1, image
        assert "latest" not in image


def test_each_volume_of_secrets_is_prepared_and_mounted_by_its_principal_alone() -> None:
    principals = {reader for secret in SECRETS for reader in secret.readers}
    prepared = {
        volume.partition(":")[0].removeprefix("secrets-")
        for volume in STACK["services"]["prepare"]["volumes"]
        if volume.startswith("secrets-")
    }
    assert prepared == principals
    owners = {word.split("=")[1] for word in STACK["services"]["prepare"]["command"] if word.startswith("--owner=")}
    assert principals <= owners
    ours = {"ghsync"}
    for name, service in SERVICES.items():
        mounted = {
            str(volume).partition(":")[0].removeprefix("secrets-")
            for volume in service.get("volumes", ())
            if str(volume).startswith("secrets-")
        }
        assert name == "prepare" or mounted <= {name} | (ours if "ghsync:local" in service["image"] else set()), name


def test_what_a_run_asks_for_is_what_the_filter_allows() -> None:
    config = DAGSTER["run_launcher"]["config"]
    command = STACK["services"]["docker-filter"]["command"]
    allowed = {word.partition("=")[2] for word in command if word.startswith("--volume=")}
    asked = {
        f"{volume}={mode}" for volume, _, mode in (bind.split(":") for bind in config["container_kwargs"]["volumes"])
    }
    assert asked == allowed
    assert f"--network={config['network']}" in command
    assert config["network"] == STACK["networks"]["stack"]["name"]
    kwargs = config["container_kwargs"]
    assert (kwargs["read_only"], kwargs["cap_drop"], kwargs["security_opt"]) == (True, ["ALL"], ["no-new-privileges"])
    assert kwargs["mem_limit"] == "3g"
    assert kwargs["pids_limit"] <= 1024
    # docker compose down ends runs too.
    assert kwargs["labels"] == {
        "com.docker.compose.project": STACK["name"],
        "com.docker.compose.service": "code",
        "com.docker.compose.oneoff": "True",
    }


def test_each_setting_that_the_stack_gives_exists() -> None:
    known = {str(field.validation_alias) for field in Settings.model_fields.values()}
    given = set(STACK["services"]["prepare"]["environment"]) | set(SCALE["services"]["prepare"]["environment"])
    assert given <= known


def test_each_choice_of_env_example_is_read_and_each_that_is_read_is_there() -> None:
    import re

    text = (ROOT / "docker-compose.yml").read_text() + (ROOT / "deploy/compose.scale.yml").read_text()
    read_ones = set(re.findall(r"\$\{(STACK_[A-Z_]+)", text))
    example = (ROOT / "deploy/env.example").read_text()
    named = set(re.findall(r"(STACK_[A-Z_]+)=", example))
    assert named <= read_ones
    images = {name for name in read_ones if name.endswith(("_IMAGE", "_UID", "_GID", "_REVISION", "_MEMORY"))}
    assert read_ones - images <= named
    profiles = {profile for service in SERVICES.values() for profile in service.get("profiles", ())}
    assert "COMPOSE_PROFILES=mysql,kafka,connect,mongo" in example
    assert profiles == {"mysql", "kafka", "connect", "mongo"}
