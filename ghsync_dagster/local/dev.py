"""The Dagster UI with daemon on this machine, one pair for each instance.

Belongs here: the checks before they start, their end by signals, and a line once they serve. Not here: the definitions,
and how Dagster is deployed elsewhere.
"""

from __future__ import annotations

import fcntl
import http.client
import os
import runpy
import signal
import socket
import sys
import threading
import time
import warnings
from contextlib import closing
from typing import TYPE_CHECKING, Final, NoReturn

from ghsync_dagster.dagster_home import use_dagster_home
from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster.progress import report_progress
from ghsync_dagster.stopping import SIGNALS

if TYPE_CHECKING:
    from pathlib import Path

    from ghsync_dagster.settings import Settings

HOST: Final = "127.0.0.1"
_MODULE: Final = "ghsync_dagster.definitions"
_SUPERSEDED: Final = "Function `dev_command` is superseded"
"""Dagster's advice to use another command, which a user of ghsync can't follow."""
_POLL_SECONDS: Final = 0.25
_ANSWER_SECONDS: Final = 5.0


def serve(settings: Settings, port: int, log_level: str) -> None:
    """Run ``dagster dev`` on DAGSTER_HOME, by default the one under GHSYNC_HOME, until a signal ends it.

    Args:
        settings: Where the instance is.
        port: TCP port of the UI.
        log_level: The lowest level that Dagster logs; at info it logs each tick of each sensor.

    Raises:
        ConfigError: The port is in use, or a daemon of the instance runs on this machine.
        SystemExit: Dagster has ended.
    """
    _claim(use_dagster_home(settings) / "dev.lock", port)
    _refuse_taken(port)
    _say(f"The Dagster UI comes up on http://{HOST}:{port}. Ctrl-C ends it.")
    ended: list[int] = []
    _end_by_signals(ended)
    # A thread ends with this process; a process of its own would have to be ended.
    threading.Thread(target=_report_until_served, args=(port, ended), name="dev-report", daemon=True).start()
    warnings.filterwarnings("ignore", _SUPERSEDED)
    command = ["dev", "-m", _MODULE, "--host", HOST, "--port", str(port), "--log-level", log_level]
    sys.argv = ["dagster", *command]
    runpy.run_module("dagster", run_name="__main__", alter_sys=True)


def _end_by_signals(ended: list[int]) -> None:
    """Have SIGTERM, Ctrl-C and a closed terminal end Dagster; only the last may be ignored, such as under nohup.

    A shell script starts background commands with SIGINT ignored. Dagster handles SIGTERM like SIGINT, and its child
    processes inherit what is ignored here. So without this none of them could be ended.
    """

    def end(number: int, _frame: object) -> NoReturn:
        ended.append(number)
        raise KeyboardInterrupt

    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end)


def _report_until_served(port: int, ended: list[int]) -> None:
    """Report every few seconds that the UI starts, and its address once it serves; nothing after a signal."""
    with report_progress(lambda line: None if ended else _say(line), "The Dagster UI comes up"):
        while not (ended or _serves(port)):
            time.sleep(_POLL_SECONDS)
    if not ended:
        _say(f"Dagster UI: http://{HOST}:{port}")


def _serves(port: int) -> bool:
    with closing(http.client.HTTPConnection(HOST, port, timeout=_ANSWER_SECONDS)) as connection:
        try:
            connection.request("GET", "/server_info")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _claim(lock: Path, port: int) -> None:
    """Lock the instance for the life of this process: two daemons would start every run twice."""
    file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(file, 99).decode()
        os.close(file)
        raise ConfigError(
            f"A Dagster UI with daemon runs already on {lock.parent}: {holder}.",
            way_out="Use that one or end it; for a second one alongside it set GHSYNC_HOME to another folder.",
        ) from None
    os.ftruncate(file, 0)
    os.write(file, f"process {os.getpid()}, http://{HOST}:{port}".encode())


def _refuse_taken(port: int) -> None:
    with socket.socket() as probe:
        # As servers do; else a port in TIME_WAIT would count as in use.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ConfigError(
                f"Port {port} of {HOST} can't be served ({error.strerror}).",
                way_out=f"Take another: make dev PORT={port + 1}, or ghsync dev --port {port + 1}.",
            ) from None
