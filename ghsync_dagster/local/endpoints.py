"""The addresses of the local servers, which are used if no setting names an external one.

Belongs here: all that ``wiring``, and no other production code, uses of ``local``. The servers' modules are imported
only when they are needed. Not here: how a server runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ghsync_dagster.local.server import LocalServer
    from ghsync_dagster.local.worker_log import WorkerLog
    from ghsync_dagster.settings import Settings


def address(settings: Settings, service: str) -> str | None:
    """Return the address of a local server, with its credentials; None if it is not up. Nothing is started."""
    status = _server(settings, service).local_status()
    return status.login if status.state == "up" else None


def started(settings: Settings, service: str) -> str:
    """Return the address of a local server; start it if it is not up.

    Raises:
        UnavailableError: It did not start.
        ConfigError: There is no server to start.
    """
    return _server(settings, service).ensure()


def was_set_up(settings: Settings, service: str) -> bool:
    """Return whether a local server was ever started here."""
    return _server(settings, service).supervisor.was_set_up()


def worker_log(settings: Settings) -> WorkerLog | None:
    """Return the log of the Connect worker in use; None if that is an external one."""
    from ghsync_dagster.local.connect import ConnectServer

    return ConnectServer(settings).worker_log


def _server(settings: Settings, service: str) -> LocalServer:
    from ghsync_dagster.local.stack import SERVICES

    return SERVICES[service](settings)
