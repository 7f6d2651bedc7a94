"""The MongoDB to write to: the one that MONGODB_URI names, else a local server.

Belongs here: which server is used, its command line, and its readiness. Not here: collections.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster.local.server import LocalServer
from ghsync_dagster.local.supervisor import server_to_use
from ghsync_dagster.stores.mongo.uri import tls_files, without_credentials

if TYPE_CHECKING:
    from collections.abc import Callable

    from ghsync_dagster.local.supervisor import ServerSpec, ServiceStatus

_DEFAULT_PORT: Final = 27017
_MONGOD: Final = "mongod"
_EMBEDDED: Final = "secantusdb"
_EMBEDDED_PROGRAM: Final = "secantusd-rs"
_EXTERNAL_PING_SECONDS: Final = 3.0


class MongoServer(LocalServer):
    """A mongod or the embedded server."""

    service = "mongo"
    variable = "MONGODB_URI"
    address_key = "uri"

    @property
    def external(self) -> str | None:
        """MONGODB_URI."""
        return self.settings.mongodb_uri.get_secret_value() if self.settings.mongodb_uri else None

    def check_external(self, address: str) -> ServiceStatus:
        """Check whether it answers."""
        return self.external_status(without_credentials(address), is_up=_answers(address, _EXTERNAL_PING_SECONDS))

    def uri(self, port: int) -> str:
        """Return the local server's URI."""
        return f"mongodb://127.0.0.1:{port}"

    def answers(self, port: int, seconds: float) -> bool:
        """Return whether it answers at a port."""
        return _answers(self.uri(port), seconds)

    def choose(self, progress: Callable[[str], None]) -> ServerSpec:
        """Choose the server that has data here, else a mongod on PATH, else the embedded one."""
        del progress
        in_venv = shutil.which(_EMBEDDED_PROGRAM, path=str(Path(sys.executable).parent))
        found = {_MONGOD: shutil.which("mongod"), _EMBEDDED: in_venv or shutil.which(_EMBEDDED_PROGRAM)}
        programs = {server: program for server, program in found.items() if program}
        if not programs:
            raise ConfigError(
                "MONGODB_URI is unset and there is no local server: no mongod on PATH, and the embedded one is not "
                "installed.",
                way_out="Set MONGODB_URI, put a mongod on PATH, or run make setup, which installs the embedded server.",
            )
        server = server_to_use([*programs], self.folder / "data", self.variable)
        command = self._mongod if server == _MONGOD else self._embedded
        return self.spec(server, (_DEFAULT_PORT,), lambda port: command(programs[server], str(port)))

    def _mongod(self, program: str, port: str) -> list[str]:
        return [
            *(program, "--dbpath", str(self.data(_MONGOD)), "--bind_ip", "127.0.0.1", "--port", port),
            *("--logpath", str(self.log(_MONGOD)), "--logappend"),
        ]

    def _embedded(self, program: str, port: str) -> list[str]:
        # Without this file it would read a configuration from the working or home folder.
        config = self.folder / "empty.toml"
        config.write_text("", encoding="utf-8")
        return [
            *(program, "--config", str(config), "--host", "127.0.0.1", "--port", port),
            *("--storage-path", str(self.data(_EMBEDDED)), "--standalone", "--sync-on-commit", "--cache-size", "256M"),
            # The default allocates 2 GB of disk at once.
            *("--log-file-max", "128MB"),
        ]


def _answers(uri: str, seconds: float) -> bool:
    """Return whether a MongoDB answers at ``uri``, even if it refuses the credentials."""
    from pymongo import MongoClient
    from pymongo.errors import ConfigurationError, InvalidURI, OperationFailure, PyMongoError

    from ghsync_dagster.stores.mongo.errors import is_unresolved

    milliseconds = int(seconds * 1000)
    try:
        with (
            tls_files(),
            MongoClient[dict[str, object]](
                uri,
                serverSelectionTimeoutMS=milliseconds,
                connectTimeoutMS=milliseconds,
                socketTimeoutMS=milliseconds,
            ) as client,
        ):
            client.admin.command("hello")
    except OperationFailure:
        return True
    except (InvalidURI, ConfigurationError, ValueError) as error:
        if is_unresolved(error):
            return False
        raise ConfigError(
            f"MONGODB_URI is malformed ({type(error).__name__}).",
            way_out="Correct it; see MongoDB's description of connection strings.",
        ) from None
    except PyMongoError:
        return False
    return True
