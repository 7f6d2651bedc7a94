"""The commands of the servers on this machine: up, down, status and dev.

Belongs here: arguments and what is printed. Not here: how servers are started (``local``).
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ghsync_dagster.cli.common import TRANSIENT, AsJson, configured, print_json, say
from ghsync_dagster.settings import settings_file

if TYPE_CHECKING:
    from collections.abc import Sequence


class DaemonLevel(StrEnum):
    """Log level of Dagster's own processes."""

    WARNING = "warning"
    INFO = "info"
    DEBUG = "debug"


Services = Annotated[list[str] | None, typer.Argument(help="Servers by name. Default: all.")]


def dev(
    port: Annotated[int, typer.Option(min=1, max=65_535, help="TCP port of the UI.")] = 3000,
    log_level: Annotated[
        DaemonLevel, typer.Option(help="Lowest level that Dagster logs; at info it logs each tick of each sensor.")
    ] = DaemonLevel.WARNING,
) -> None:
    """Serve the Dagster UI on 127.0.0.1 with daemon and sensors, until Ctrl-C."""
    from ghsync_dagster.local.dev import serve

    serve(configured(), port, log_level)


def up(services: Services = None, as_json: AsJson = False) -> None:
    """Start the local servers, for development; those that are up stay as they are."""
    from ghsync_dagster.local import stack

    servers = stack.up(configured(), **_named(services), progress=say)
    _show_servers(servers, as_json=as_json)
    if any(server.state != "up" for server in servers.values()):
        raise typer.Exit(TRANSIENT)


def down(services: Services = None) -> None:
    """Stop the local servers; their data stays."""
    from ghsync_dagster.local import stack

    _show_servers(stack.down(configured(), **_named(services), progress=say), as_json=False)


def status(
    dagster_home: Annotated[
        bool,
        typer.Option(
            "--dagster-home", help="Only print the folder to export as DAGSTER_HOME, which is made if it is missing."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the settings file and folders in use, which local servers are up, and the URIs to use."""
    from ghsync_dagster.dagster_home import dagster_home_of, use_dagster_home
    from ghsync_dagster.local import stack

    settings = configured()
    if dagster_home:
        typer.echo(use_dagster_home(settings))
        return
    places = {
        "settings_file": settings_file(),
        "home": str(settings.home_dir),
        "dagster_home": str(dagster_home_of(settings)),
    }
    servers = stack.status(settings)
    if as_json:
        print_json({"places": places, **{name: server.as_json() for name, server in servers.items()}})
        return
    typer.echo(f"settings {places['settings_file'] or 'from the environment alone: there is no .env in this folder'}")
    typer.echo(f"GHSYNC_HOME={places['home']}")
    typer.echo(f"DAGSTER_HOME={places['dagster_home']}")
    _show_servers(servers, as_json=False)


def _named(services: Sequence[str] | None) -> dict[str, Any]:
    return {"services": tuple(services)} if services else {}


def _show_servers(servers: Any, *, as_json: bool) -> None:  # noqa: ANN401
    if as_json:
        print_json({name: server.as_json() for name, server in servers.items()})
        return
    for server in servers.values():
        typer.echo(server.as_text())
