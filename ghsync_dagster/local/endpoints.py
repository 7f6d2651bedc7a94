"""Where the local servers are: what counts where no setting names a server of the user's own.

Belongs here: all that production code may ask of ``local``; ``wiring`` alone does, for what is not set. The servers'
modules are imported when they are asked for. Not here: how a server runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import datetime

    from ghsync_dagster.domain.source import Source, Statements
    from ghsync_dagster.settings import Settings


def address(settings: Settings, service: str) -> str | None:
    """Return the address of a local server, with its credentials; None where it is not up. Nothing is started."""
    from ghsync_dagster.local import connect, kafka, mongo, mysql

    status = {"mongo": mongo.status, "mysql": mysql.status, "kafka": kafka.status, "connect": connect.status_of_worker}
    found = status[service](settings)
    return found.login or found.uri if found.state == "up" else None


def started_mongo(settings: Settings) -> str:
    """Return the address of the local MongoDB, started where it is not up.

    Raises:
        UnavailableError: It did not start.
        ConfigError: There is no server to start.
    """
    from ghsync_dagster.local.mongo import ensure_mongo

    return ensure_mongo(settings)


def was_set_up(settings: Settings, service: str) -> bool:
    """Return whether a local server was ever started here."""
    from ghsync_dagster.local import connect, kafka, mysql

    tells = {"mysql": mysql.was_set_up, "kafka": kafka.was_set_up, "connect": connect.was_set_up}
    return tells[service](settings)


def logged_statements(settings: Settings, source: Source, since: datetime) -> Statements | None:
    """Return what the local worker's log warns of; None where there is none, or CONNECT_URL names another worker."""
    from ghsync_dagster.local import connect

    return connect.logged_statements(settings, source, since)


def close_statements(settings: Settings, began: datetime) -> None:
    """Remember since when statements of that log count: both sides were equal in a comparison that began then."""
    from ghsync_dagster.local import connect

    connect.close_statements(settings, began)
