"""What the stack's containers find on their volumes: secrets, each where one principal reads it, and the settings.

A secret is made once, or given by its owner, and kept in the vault, which no service mounts. From there it is copied to
the volume of each principal that needs it, readable by that principal alone.

Belongs here: which secrets there are, who reads them, and what the settings of the stack are. Not here: what a server
does with them (``deploy.servers``).
"""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from dotenv import set_key

from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster.folders import write_whole
from ghsync_dagster.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

REPLICA_SET: Final = "rs0"
DATABASE_USER: Final = "ghsync"
CONNECTOR_USER: Final = "debezium"
UI_USER: Final = "admin"

_BYTES: Final = 24
_KEY_FILE_BYTES: Final = 378
"""What MongoDB's own documentation makes a key file of: 504 characters in base64."""


@dataclass(frozen=True, slots=True)
class Secret:
    """One secret.

    Attributes:
        name: Its file's name, in the vault and on the volumes.
        readers: The principals that read it.
        make: Makes it where its owner gave none, from the others.
    """

    name: str
    readers: tuple[str, ...]
    make: Callable[[Vault], str]


class Vault:
    """The secrets by name, in a folder that only root reads.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, name: str) -> str:
        """Return a secret, made now where there is none yet.

        Raises:
            ConfigError: There is no secret of that name.
        """
        secret = _secret(name)
        path = self._folder / name
        if not path.exists():
            write_whole(path, secret.make(self), "the volume of secrets")
        return path.read_text(encoding="utf-8")

    def give(self, name: str, value: str) -> None:
        """Keep a secret as its owner gives it.

        Raises:
            ConfigError: There is no secret of that name, or the value is empty.
        """
        _secret(name)
        if not value.strip():
            raise ConfigError(f"The value of {name} is empty.", way_out="Give it on standard input.")
        write_whole(self._folder / name, value.strip(), "the volume of secrets")


def _random(vault: Vault) -> str:
    del vault
    return secrets.token_urlsafe(_BYTES)


def _key_file(vault: Vault) -> str:
    del vault
    return base64.b64encode(secrets.token_bytes(_KEY_FILE_BYTES)).decode()


def _mongodb_uri(vault: Vault) -> str:
    login = f"{DATABASE_USER}:{quote(vault.read('mongo-password'), safe='')}"
    return f"mongodb://{login}@mongo:27017/?replicaSet={REPLICA_SET}&authSource=admin"


def _mysql_url(vault: Vault) -> str:
    return f"mysql://{DATABASE_USER}:{quote(vault.read('mysql-password'), safe='')}@mysql:3306/new_data"


def _pgpass(vault: Vault) -> str:
    return f"postgres:5432:*:dagster:{vault.read('postgres-password')}"


def _htpasswd(vault: Vault) -> str:
    """Return the line by which nginx knows the user of the UI; a password that is random needs no slow hash."""
    salt = secrets.token_bytes(8)
    digest = hashlib.sha1(vault.read("ui-password").encode() + salt).digest()  # noqa: S324  the form that nginx reads
    return f"{UI_USER}:{{SSHA}}{base64.b64encode(digest + salt).decode()}"


def _connector_login(vault: Vault) -> str:
    del vault
    return CONNECTOR_USER


SECRETS: Final = (
    Secret("mysql-root-password", ("mysql", "setup"), _random),
    Secret("mysql-password", ("setup",), _random),
    Secret("connector-user", ("connect", "setup"), _connector_login),
    Secret("connector-password", ("connect", "setup"), _random),
    Secret("mongo-root-password", ("mongo", "setup"), _random),
    Secret("mongo-keyfile", ("mongo",), _key_file),
    Secret("mongo-password", ("setup",), _random),
    Secret("postgres-password", ("postgres",), _random),
    Secret("ui-password", (), _random),
    Secret("mongodb-uri", ("ghsync", "setup"), _mongodb_uri),
    Secret("mysql-url", ("ghsync", "setup"), _mysql_url),
    Secret("pgpass", ("ghsync",), _pgpass),
    Secret("htpasswd", ("proxy",), _htpasswd),
)


def _secret(name: str) -> Secret:
    found = next((secret for secret in SECRETS if secret.name == name), None)
    if found is None:
        raise ConfigError(
            f"There is no secret named {name}.", way_out=f"Name any of: {', '.join(one.name for one in SECRETS)}."
        )
    return found


def prepare(root: Path, owners: Mapping[str, tuple[int, int]], environment: Mapping[str, str]) -> None:
    """Put secrets and settings onto the volumes below ``root``, and give each volume to its owner.

    Args:
        root: Holds ``vault``, ``settings``, ``secrets/<principal>`` and ``data/<principal>``, each a volume.
        owners: User and group by principal.
        environment: Where the settings are taken from.

    Raises:
        ConfigError: A principal has no owner, or a setting is wrong.
    """
    for folder in (root / "data").iterdir():
        os.chown(folder, *_owner(owners, folder.name))
        folder.chmod(0o700)
    vault = Vault(root / "vault")
    for secret in SECRETS:
        value = vault.read(secret.name)
        for reader in secret.readers:
            folder = root / "secrets" / reader
            write_whole(folder / secret.name, value, "the volume of secrets")
            for path in (folder, folder / secret.name):
                os.chown(path, *_owner(owners, reader))
            folder.chmod(0o500)
    settings = root / "settings"
    _write_settings(settings / ".env", environment)
    settings.chmod(0o755)


def _owner(owners: Mapping[str, tuple[int, int]], principal: str) -> tuple[int, int]:
    try:
        return owners[principal]
    except KeyError:
        raise ConfigError(
            f"Nobody is named as the owner of {principal}'s volume.", way_out=f"Add --owner {principal}=USER:GROUP."
        ) from None


def _write_settings(path: Path, environment: Mapping[str, str]) -> None:
    """Write the ``.env`` that each of our containers finds in its working folder."""
    names = {str(field.validation_alias) for field in Settings.model_fields.values()}
    values = {name: value for name, value in environment.items() if value and name in names}
    values |= {
        "MONGODB_URI_FILE": "/run/secrets/mongodb-uri",
        "MYSQL_URL_FILE": "/run/secrets/mysql-url",
    }
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "settings"
        for name, value in sorted(values.items()):
            set_key(part, name, value, quote_mode="always")
        write_whole(path, part.read_text(encoding="utf-8"), "the volume of settings", mode=0o644)
