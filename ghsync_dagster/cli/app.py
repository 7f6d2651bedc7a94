"""The ``ghsync`` command: the flows and the local servers without the Dagster UI.

Belongs here: the list of commands, and the exit codes of errors. Not here: what a command does.

Exit codes: 0 done; 1 a gate failed; 2 bad settings, input or credentials; 3 a server is away, after retries, or the
stream is stopped; 70 a fault of ghsync itself; 130 and 143 stopped by Ctrl-C and SIGTERM; 141 nobody reads the output
any more; 142 a library froze the process.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from ghsync_dagster.cli import batch, cdc, data, dlq, repair, servers, show, stack
from ghsync_dagster.cli.common import PERMANENT, READER_GONE, STOPPED, TRANSIENT
from ghsync_dagster.domain.errors import GhsyncError, TransientError
from ghsync_dagster.logging import redact
from ghsync_dagster.stopping import exit_if_abandoned, exit_on_signals, is_unread


class _Group(TyperGroup):
    """Prints a ghsync error as one message with its way out, and turns it into an exit code."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401  as click declares it
        try:
            return super().invoke(ctx)
        except GhsyncError as error:
            sys.stderr.write(f"error: {redact(error.message)}\nway out: {redact(error.way_out)}\n")
            ctx.exit(TRANSIENT if isinstance(error, TransientError) else PERMANENT)
        except OSError as error:
            if isinstance(error, BrokenPipeError) and is_unread(sys.stdout):
                # The interpreter flushes once more at its end.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                ctx.exit(READER_GONE)
            sys.stderr.write(f"error: {redact(str(error))}\nway out: check the path, its permissions and the disk.\n")
            ctx.exit(PERMANENT)
        except KeyboardInterrupt:
            sys.stderr.write("stopped\n")
            ctx.exit(STOPPED + signal.SIGINT)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Keeps the MongoDB collection new_data.Users in sync with files of GitHub events and with MySQL's changes.",
)

for command in (
    *(batch.run, batch.batch, batch.audit, batch.report, show.show),
    *(data.sample, data.fetch),
    *(servers.dev, servers.up, servers.down, servers.status),
):
    app.command()(command)
cdc.cdc.command()(repair.repair)
app.add_typer(cdc.cdc, name="cdc")
app.add_typer(dlq.dlq, name="dlq")
app.add_typer(stack.stack, name="stack")


def main() -> None:
    """Run the command; SIGTERM and a closed terminal end it as Ctrl-C does, with everything closed."""
    exit_on_signals()
    try:
        app()
    except SystemExit as end:
        exit_if_abandoned(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
    except Exception:  # noqa: BLE001  a fault of ghsync itself must not end with 1, which means that a gate failed
        sys.stderr.write(redact(traceback.format_exc()))
        exit_if_abandoned(os.EX_SOFTWARE)
        sys.exit(os.EX_SOFTWARE)
