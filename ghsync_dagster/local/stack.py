"""All local servers by name, behind ``ghsync up``, ``down`` and ``status``.

Belongs here: which services there are. Not here: how any of them runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ghsync_dagster.domain.errors import ConfigError, GhsyncError
from ghsync_dagster.local.connect import ConnectServer
from ghsync_dagster.local.kafka import KafkaServer
from ghsync_dagster.local.mongo import MongoServer
from ghsync_dagster.local.mysql import MysqlServer
from ghsync_dagster.local.supervisor import ServiceStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ghsync_dagster.local.server import LocalServer
    from ghsync_dagster.settings import Settings

__all__ = ["SERVICES", "ServiceStatus", "down", "ensure", "status", "up"]


# In the order in which they start: each needs only those before it.
SERVICES: Mapping[str, type[LocalServer]] = {
    server.service: server for server in (MongoServer, MysqlServer, KafkaServer, ConnectServer)
}


def ensure(settings: Settings, service: str) -> str:
    """Return the address of a server to use, with credentials; start the local one if there is no external one.

    Raises:
        UnavailableError: It did not start.
        ConfigError: It can't run on this machine.
    """
    return SERVICES[service](settings).ensure()


def up(
    settings: Settings, services: Sequence[str] = (), *, progress: Callable[[str], None]
) -> dict[str, ServiceStatus]:
    """Start the named services, or all, in the order of ``SERVICES``, unless they run.

    A service starts those that it needs, named or not.

    Args:
        settings: ``home_dir`` is where their state, data and logs are kept.
        services: Names out of ``SERVICES``; all when empty.
        progress: Gets a line of text for each thing done.

    Returns:
        The status of each, by name.

    Raises:
        UnavailableError: One did not start; the message holds the end of its log.
        ConfigError: A name is unknown, or a server can't run on this machine.
    """
    return {name: server(settings).up(progress) for name, server in _named(services).items()}


def down(
    settings: Settings, services: Sequence[str] = (), *, progress: Callable[[str], None]
) -> dict[str, ServiceStatus]:
    """Stop the named services, or all, in the reverse order; data stays.

    Args:
        settings: As for ``up``.
        services: Names out of ``SERVICES``; all when empty.
        progress: Gets a line of text for each thing done.

    Raises:
        UnavailableError: One could not be ended.
        ConfigError: A name is unknown.
    """
    stopped: dict[str, ServiceStatus] = {}
    failure: GhsyncError | None = None
    for name, server in reversed(_named(services).items()):
        try:
            stopped[name] = server(settings).down(progress)
        except GhsyncError as error:
            # The others are stopped all the same.
            failure = failure or error
    if failure is not None:
        raise failure
    return dict(reversed(stopped.items()))


def status(settings: Settings) -> dict[str, ServiceStatus]:
    """Return the status of each service by name; start and stop nothing.

    Raises:
        ConfigError: The address of an external server is malformed.
    """
    return {name: server(settings).status() for name, server in SERVICES.items()}


def _named(names: Sequence[str]) -> dict[str, type[LocalServer]]:
    unknown = [name for name in names if name not in SERVICES]
    if unknown:
        raise ConfigError(
            f"There is no local service named {', '.join(unknown)}.", way_out=f"Name any of: {', '.join(SERVICES)}."
        )
    return {name: server for name, server in SERVICES.items() if name in names or not names}
