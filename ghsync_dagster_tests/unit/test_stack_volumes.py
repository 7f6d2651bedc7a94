"""What the stack's volumes hold: each secret where one principal reads it, made once, and the settings."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from dotenv import dotenv_values
from typer.testing import CliRunner

from ghsync_dagster.cli.app import app
from ghsync_dagster.deploy.volumes import SECRETS, Vault, prepare
from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster.stores.mysql_url import parse_mysql_url

PRINCIPALS = sorted({reader for secret in SECRETS for reader in secret.readers})
ME = (os.getuid(), os.getgid())


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    """The volumes, mounted and empty."""
    for folder in ("vault", "settings", *(f"secrets/{name}" for name in PRINCIPALS), "data/mysql", "data/ghsync"):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


def prepared(volumes: Path, **environment: str) -> None:
    prepare(volumes, dict.fromkeys([*PRINCIPALS, "mysql"], ME), environment)


def content(volumes: Path) -> dict[str, str]:
    return {
        str(path.relative_to(volumes)): path.read_text()
        for path in volumes.rglob("*")
        if path.is_file() and "secrets" in path.parts
    }


def test_each_principal_has_its_own_secrets_and_no_other(volumes: Path) -> None:
    prepared(volumes)
    found = {name: sorted(path.name for path in (volumes / "secrets" / name).iterdir()) for name in PRINCIPALS}
    assert found == {name: sorted(secret.name for secret in SECRETS if name in secret.readers) for name in PRINCIPALS}
    assert "mysql-root-password" not in found["ghsync"]
    for path in volumes.rglob("*"):
        if path.is_file() and path.name != ".env":
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_a_second_time_nothing_changes(volumes: Path) -> None:
    prepared(volumes)
    before = content(volumes)
    prepared(volumes)
    assert content(volumes) == before
    assert len({before[f"secrets/{secret.readers[0]}/{secret.name}"] for secret in SECRETS if secret.readers}) > 8


def test_what_is_made_of_another_secret_fits_it(volumes: Path) -> None:
    prepared(volumes)
    vault = Vault(volumes / "vault")
    address = parse_mysql_url(vault.read("mysql-url"))
    assert (address.user, address.password, address.host) == ("ghsync", vault.read("mysql-password"), "mysql")
    assert vault.read("mongo-password") in vault.read("mongodb-uri")
    assert vault.read("pgpass").endswith(vault.read("postgres-password"))
    assert len(vault.read("mongo-keyfile")) == 504


def test_a_secret_that_its_owner_gives_is_handed_on(volumes: Path) -> None:
    given = "mongodb://app:pw@cluster.example/"
    done = CliRunner().invoke(app, ["stack", "secret", "mongodb-uri", "--root", str(volumes)], input=f"{given}\n")
    assert done.exit_code == 0, done.output
    prepared(volumes)
    assert (volumes / "secrets/ghsync/mongodb-uri").read_text() == given
    shown = CliRunner().invoke(app, ["stack", "secret", "mongodb-uri", "--show", "--root", str(volumes)])
    assert shown.output.strip() == given


@pytest.mark.parametrize(("name", "value", "says"), [("mongo-uri", "x", "no secret"), ("mysql-url", " \n", "empty")])
def test_an_unknown_or_empty_secret_is_refused(volumes: Path, name: str, value: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Vault(volumes / "vault").give(name, value)
    assert list((volumes / "vault").iterdir()) == []


def test_settings_are_written_for_all_and_hold_no_secret(volumes: Path) -> None:
    prepared(
        volumes, GHSYNC_MAX_LAG_RECORDS="7", GHSYNC_EVENTS_PATH='/events/it\'s "odd" $HOME', STACK_PORT="1", HOME="/x"
    )
    path = volumes / "settings/.env"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert dotenv_values(path, interpolate=False) == {
        "GHSYNC_EVENTS_PATH": '/events/it\'s "odd" $HOME',
        "GHSYNC_MAX_LAG_RECORDS": "7",
        "MONGODB_URI_FILE": "/run/secrets/mongodb-uri",
        "MYSQL_URL_FILE": "/run/secrets/mysql-url",
    }


def test_a_volume_without_an_owner_is_refused(volumes: Path) -> None:
    with pytest.raises(ConfigError, match="owner of mysql's volume"):
        prepare(volumes, dict.fromkeys(set(PRINCIPALS) - {"mysql"}, ME), {})


@pytest.mark.parametrize("owner", ["mysql", "mysql=999", "mysql=a:b", "=1:1"])
def test_a_malformed_owner_is_refused(volumes: Path, owner: str) -> None:
    done = CliRunner().invoke(app, ["stack", "prepare", "--owner", owner, "--root", str(volumes)])
    assert done.exit_code == 2
    assert "Write it as mysql=999:999" in done.output
