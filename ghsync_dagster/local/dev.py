"""The Dagster UI with daemon on this machine, one of each an instance.

Belongs here: what has to be free before they start. Not here: what they serve, nor how Dagster is deployed elsewhere.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
from typing import TYPE_CHECKING, Final, NoReturn

from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster.local.dagster_home import use_dagster_home

if TYPE_CHECKING:
    from pathlib import Path

    from ghsync_dagster.settings import Settings

HOST: Final = "127.0.0.1"
_MODULE: Final = "ghsync_dagster.definitions"
_SUPERSEDED: Final = "ignore:Function `dev_command` is superseded"
"""Dagster's advice to take another tool for the same, which a user of ours can't act on."""


def serve(settings: Settings, port: int, log_level: str) -> NoReturn:
    """Become ``dagster dev`` on DAGSTER_HOME, by default the one under GHSYNC_HOME.

    Args:
        settings: Where the instance is.
        port: TCP port of the UI.
        log_level: From where on Dagster logs; at info it tells each look of each sensor.

    Raises:
        ConfigError: The port is taken, or the instance has a daemon that was started here.
    """
    _claim(use_dagster_home(settings) / "dev.lock", port)
    _refuse_taken(port)
    sys.stderr.write(f"The Dagster UI comes up on http://{HOST}:{port}. Ctrl-C ends it.\n")
    sys.stderr.flush()
    command = [sys.executable, "-W", _SUPERSEDED, "-m", "dagster", "dev", "-m", _MODULE, "--host", HOST]
    command += ["--port", str(port), "--log-level", log_level]
    os.execv(sys.executable, command)  # noqa: S606  no shell is wanted


def _claim(lock: Path, port: int) -> None:
    """Lock the instance for as long as this process lives, whatever it becomes: two daemons would do all twice."""
    file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        told = os.read(file, 99).decode()
        os.close(file)
        raise ConfigError(
            f"A Dagster UI with daemon runs already on {lock.parent}: {told}.",
            way_out="Use that one or end it; for a second one beside it set GHSYNC_HOME to another folder.",
        ) from None
    os.ftruncate(file, 0)
    os.write(file, f"process {os.getpid()}, http://{HOST}:{port}".encode())
    os.set_inheritable(file, True)


def _refuse_taken(port: int) -> None:
    with socket.socket() as probe:
        # As servers do, or the connections of one that has just ended would count as taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ConfigError(
                f"Port {port} of {HOST} can't be served ({error.strerror}).",
                way_out=f"Take another: make dev PORT={port + 1}, or ghsync dev --port {port + 1}.",
            ) from None
