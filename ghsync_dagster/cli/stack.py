"""The command ``ghsync stack``: what the services of ``docker-compose.yml`` run that are neither Dagster nor a flow.

Belongs here: arguments, signals, what is printed. Not here: what is done (``deploy``).
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from ghsync_dagster.cli.common import configured
from ghsync_dagster.domain.errors import ConfigError

stack = typer.Typer(no_args_is_help=True, help="Parts of the compose stack; its services run them.")

_SECRETS = Path("/run/secrets")
_VOLUMES = Path("/volumes")


@stack.command()
def prepare(
    owner: Annotated[list[str], typer.Option(metavar="NAME=USER:GROUP", help="Who owns a principal's volumes.")],
    root: Annotated[Path, typer.Option(help="Folder that holds the volumes.")] = _VOLUMES,
) -> None:
    """Put secrets and settings onto the volumes of the stack, made where there are none yet."""
    from ghsync_dagster.deploy.volumes import prepare as prepare_volumes

    configured()
    prepare_volumes(root, dict(map(_owner, owner)), os.environ)


def _owner(text: str) -> tuple[str, tuple[int, int]]:
    name, _, ids = text.partition("=")
    user, _, group = ids.partition(":")
    if not (name and user.isdecimal() and group.isdecimal()):
        raise ConfigError(f"--owner {text} is malformed.", way_out="Write it as mysql=999:999.")
    return name, (int(user), int(group))


@stack.command()
def secret(
    name: Annotated[str, typer.Argument(help="Its name, such as ui-password.")],
    show: Annotated[bool, typer.Option("--show", help="Print it instead of reading a new value.")] = False,
    root: Annotated[Path, typer.Option(help="Folder that holds the volumes.")] = _VOLUMES,
) -> None:
    """Keep a secret that is given on standard input, or show one; docker compose up hands it on."""
    from ghsync_dagster.deploy.volumes import Vault

    vault = Vault(root / "vault")
    if show:
        typer.echo(vault.read(name))
    else:
        vault.give(name, sys.stdin.read())


@stack.command()
def setup() -> None:
    """Bring the stack's own servers into their first state: replica set, users, database, table."""
    from ghsync_dagster.deploy.servers import set_up

    set_up(configured(), lambda name: (_SECRETS / name).read_text(encoding="utf-8"))


@stack.command()
def connector(
    healthy: Annotated[
        Path, typer.Option(help="File that is touched whenever the connector runs as configured.")
    ] = Path("/tmp/healthy"),  # noqa: S108  a container's own
) -> None:
    """Register the connector on the worker of CONNECT_URL and keep it as configured, until Ctrl-C or SIGTERM.

    One that failed is restarted, after growing pauses. One that was paused or stopped is left alone.
    """
    from ghsync_dagster.stopping import stop_on_signals
    from ghsync_dagster.wiring import connector_keeper

    keeper = connector_keeper(configured())
    stop = threading.Event()
    with stop_on_signals(stop, second_ends=True):
        keeper.keep(stop, on_running=healthy.touch)


@stack.command()
def spark(
    role: Annotated[str, typer.Argument(metavar="master|worker")],
    cores: Annotated[int, typer.Option(min=1, help="Cores that a worker offers.")] = 1,
    memory: Annotated[str, typer.Option(help="Memory that a worker offers, such as 1g.")] = "1g",
) -> None:
    """Run a part of a Spark cluster, which SPARK_MASTER names, with the Java that a driver would take."""
    from ghsync_dagster.deploy.spark import start

    start(configured(), role, cores, memory)


@stack.command("docker-filter")
def docker_filter(
    image: Annotated[str, typer.Option(help="The one image that runs.")],
    network: Annotated[str, typer.Option(help="The network that they join.")],
    volume: Annotated[list[str], typer.Option(metavar="NAME=MODE", help="A volume that they may mount, ro or rw.")],
    memory: Annotated[int, typer.Option(min=1, help="MiB at the most.")] = 4096,
    pids: Annotated[int, typer.Option(min=1, help="Processes and threads at the most.")] = 1024,
    keep: Annotated[float, typer.Option(min=0, help="Seconds that an ended container is kept.")] = 60,
    socket: Annotated[Path, typer.Option(help="The engine's socket.")] = Path("/var/run/docker.sock"),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",  # noqa: S104  a network of two
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 2375,
) -> None:
    """Serve the part of the Docker API that runs in containers of their own need."""
    from ghsync_dagster.deploy.docker_filter import Allowed, serve

    configured()
    volumes = {name: mode for name, _, mode in (text.partition("=") for text in volume)}
    serve(socket, Allowed(image, network, volumes, memory << 20, pids, keep), host, port)
