"""Shared by the command modules: settings, exit codes, and output for a person or a program.

Not here: any one command.
"""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from ghsync_dagster.logging import configure_logging
from ghsync_dagster.settings import Settings, load_settings

if TYPE_CHECKING:
    from rich.progress import Progress

GATE_FAILED: Final = 1
PERMANENT: Final = 2
TRANSIENT: Final = 3
STOPPED: Final = 128
"""A signal's number is added."""

READER_GONE: Final = STOPPED + signal.SIGPIPE

_PLAIN_WIDTH: Final = 160

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


def configured() -> Settings:
    """Load the settings, and set up logging by them."""
    settings = load_settings()
    configure_logging(settings)
    return settings


def say(line: str) -> None:
    """Print a line of progress for a person."""
    # A closed terminal must not end the work.
    with suppress(OSError):
        typer.echo(line, err=True)


def print_json(document: object) -> None:
    """Print JSON for a program."""
    import msgspec

    typer.echo(msgspec.json.format(msgspec.json.encode(document), indent=2).decode())


def console() -> Any:  # noqa: ANN401
    """Return the console for tables."""
    from rich.console import Console

    class Whole(Console):
        """Leaves a pipe that nobody reads to the outermost layer."""

        def on_broken_pipe(self) -> None:
            raise  # noqa: PLE0704  it is called where one is handled

    return Whole() if sys.stdout.isatty() else Whole(width=_PLAIN_WIDTH)


def progress_bar() -> Progress:
    """Return a progress bar on standard error, which disappears at its end."""
    from rich.console import Console
    from rich.progress import Progress

    return Progress(console=Console(stderr=True), transient=True)
