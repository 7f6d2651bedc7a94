"""All local servers by name, behind ``ghsync up``, ``down`` and ``status``.

Belongs here: which services there are. Not here: how any of them runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ghsync_dagster.domain.errors import ConfigError, GhsyncError
from ghsync_dagster.local import connect, kafka, mongo, mysql
from ghsync_dagster.local.supervisor import ServiceStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ghsync_dagster.settings import Settings

__all__ = ["SERVICES", "ServiceStatus", "down", "status", "up"]


class Service(NamedTuple):
    """What can be done with one service."""

    up: Callable[[Settings, Callable[[str], None]], ServiceStatus]
    down: Callable[[Settings, Callable[[str], None]], ServiceStatus]
    status: Callable[[Settings], ServiceStatus]


# In the order in which they start: each needs only those before it.
SERVICES: dict[str, Service] = {
    mongo.SERVICE: Service(mongo.up, mongo.down, mongo.status),
    mysql.SERVICE: Service(mysql.up, mysql.down, mysql.status),
    kafka.SERVICE: Service(kafka.up, kafka.down, kafka.status),
    connect.SERVICE: Service(connect.up, connect.down, connect.status),
}


def up(
    settings: Settings, services: Sequence[str] = (), *, progress: Callable[[str], None]
) -> dict[str, ServiceStatus]:
    """Start the named services, or all, in the order of ``SERVICES``, unless they run.

    A service brings up those that it can't do without, named or not.

    Args:
        settings: ``home_dir`` is where their state, data and logs are kept.
        services: Names out of ``SERVICES``; all when empty.
        progress: Gets a line of text for each thing done.

    Returns:
        The status of each, by name.

    Raises:
        UnavailableError: One did not start; holds the end of its log.
        ConfigError: A name is unknown, or a server can't run on this machine.
    """
    return {name: service.up(settings, progress) for name, service in _named(services).items()}


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
    for name, service in reversed(_named(services).items()):
        try:
            stopped[name] = service.down(settings, progress)
        except GhsyncError as error:
            # The others are stopped all the same.
            failure = failure or error
    if failure is not None:
        raise failure
    return dict(reversed(stopped.items()))


def status(settings: Settings) -> dict[str, ServiceStatus]:
    """Tell how each service is, by name; starts and stops nothing.

    Raises:
        ConfigError: The address of a server that is not ours is malformed.
    """
    return {name: service.status(settings) for name, service in SERVICES.items()}


def _named(names: Sequence[str]) -> dict[str, Service]:
    unknown = [name for name in names if name not in SERVICES]
    if unknown:
        raise ConfigError(
            f"There is no local service named {', '.join(unknown)}.", way_out=f"Name any of: {', '.join(SERVICES)}."
        )
    return {name: service for name, service in SERVICES.items() if name in names or not names}
