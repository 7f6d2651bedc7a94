"""The ``ghsync`` command: the flows and the local servers without the Dagster UI.

Belongs here: arguments, exit codes, what is printed. Not here: anything that the flows or servers decide.

Exit codes: 0 done; 1 a gate failed; 2 bad settings, input or credentials; 3 a server is away, after retries, or the
stream is stopped; 70 a fault of ghsync itself; 130 and 143 stopped by Ctrl-C and SIGTERM; 141 nobody reads the output
any more; 142 a library froze the process.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
import uuid
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ghsync_dagster import cli_cdc, cli_repair, cli_show
from ghsync_dagster.domain.errors import GhsyncError, TransientError
from ghsync_dagster.observability.logging import configure_logging, redact
from ghsync_dagster.settings import Settings, load_settings, settings_file
from ghsync_dagster.stopping import end_past_what_hangs, exit_on_signals, is_unread

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.progress import Progress

    from ghsync_dagster.batch.checks import Finding

GATE_FAILED, PERMANENT, TRANSIENT = 1, 2, 3
READER_GONE = 128 + signal.SIGPIPE
_PLAIN_WIDTH = 160


class DaemonLevel(StrEnum):
    """What Dagster's own processes log."""

    WARNING = "warning"
    INFO = "info"
    DEBUG = "debug"


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
            ctx.exit(130)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Keeps the MongoDB collection new_data.Users right, from files of GitHub events and from MySQL's changes.",
)

app.add_typer(cli_cdc.cdc, name="cdc")
cli_cdc.cdc.command()(cli_repair.repair)
app.command()(cli_show.show)
app.add_typer(cli_cdc.dlq, name="dlq")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


def main() -> None:
    """Run the command; SIGTERM and a closed terminal end it as Ctrl-C does, with everything closed."""
    exit_on_signals()
    try:
        app()
    except SystemExit as end:
        end_past_what_hangs(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
    except Exception:  # noqa: BLE001  a fault of ghsync itself must not end as 1, which says that a gate failed
        sys.stderr.write(redact(traceback.format_exc()))
        end_past_what_hangs(os.EX_SOFTWARE)
        sys.exit(os.EX_SOFTWARE)


def _settings() -> Settings:
    settings = load_settings()
    configure_logging(settings)
    return settings


@app.command()
def run(
    events: Annotated[
        list[str] | None,
        typer.Option(
            help="File, folder or glob of events; may be given more than once. Default: GHSYNC_EVENTS_PATH; the sample "
            "for a local MongoDB."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Materialize raw_events -> users -> mongo_users through Dagster with every check, and print a summary."""
    from ghsync_dagster.local.dagster_home import use_dagster_home
    from ghsync_dagster.wiring import batch_flow

    started = time.monotonic()
    settings = _settings()
    # Told here in their own words; inside it would be a run that failed before its first step.
    paths = settings.events(events or ())
    use_dagster_home(settings)
    batch_flow(settings).check_first(paths)
    from ghsync_dagster.defs.runner import materialize_batch

    outcome = materialize_batch(paths)
    seconds = round(time.monotonic() - started, 3)
    _finish(settings, outcome.findings, ok=outcome.success, as_json=as_json, run_id=outcome.run_id, seconds=seconds)


@app.command()
def batch(
    paths: Annotated[list[str], typer.Argument(help="Files, folders or globs of events; see docs/batch.md.")],
    as_json: AsJson = False,
) -> None:
    """Read, flatten, load and verify without Dagster, with the same gates."""
    from ghsync_dagster.batch.flow import BatchRun
    from ghsync_dagster.wiring import batch_flow

    started = time.monotonic()
    settings = _settings()
    run_id = uuid.uuid4().hex
    flow = batch_flow(settings, run_id)
    one = BatchRun(flow, settings.events(paths), run_id)
    try:
        ok = one.run()
    finally:
        flow.spark.stop()
    phases = {"jvm_start": round(flow.spark.waited_seconds, 3)}
    seconds = round(time.monotonic() - started, 3)
    _finish(settings, one.findings, ok=ok, as_json=as_json, run_id=run_id, seconds=seconds, phases=phases)


@app.command()
def audit(as_json: AsJson = False) -> None:
    """Judge what is stored by every check; write nothing."""
    from ghsync_dagster.wiring import batch_flow

    settings = _settings()
    flow = batch_flow(settings)
    try:
        findings = flow.audit()
    finally:
        flow.spark.stop()
    _finish(settings, findings, ok=all(finding.passed for finding in findings), as_json=as_json)


@app.command()
def report(as_json: AsJson = False) -> None:
    """Print what the newest read, flatten and load in GHSYNC_HOME did."""
    from ghsync_dagster.batch.reports import Artifacts, ReadReport

    settings = _settings()
    # Where nothing has run yet, this is an error with its way out.
    Artifacts(settings.home_dir / "batch").newest(ReadReport)
    _finish(settings, [], ok=True, as_json=as_json)


def _finish(
    settings: Settings,
    findings: Sequence[Finding],
    *,
    ok: bool,
    as_json: bool,
    run_id: str | None = None,
    **more: object,
) -> None:
    """Print the summary of one run, or of the newest; exit with 1 where a gate failed."""
    from ghsync_dagster.batch.reports import Artifacts
    from ghsync_dagster.observability.report import batch_summary, draw

    where = f"{settings.mongodb_database}.{settings.mongodb_collection} at {_where(settings)}"
    summary = batch_summary(Artifacts(settings.home_dir / "batch", run_id), findings, ok=ok, collection=where, **more)
    _print_json(summary) if as_json else _console().print(draw(summary))
    if not ok:
        raise typer.Exit(GATE_FAILED)


def _where(settings: Settings) -> str:
    from ghsync_dagster.local import mongo

    server = mongo.status(settings)
    local = server.server not in (None, "external")
    return redact(server.uri or "no server") + (" (local server, stop it with: ghsync down)" if local else "")


@app.command()
def sample(
    path: Annotated[Path, typer.Option(help="Where to write it.")] = Path("data/sample_data.json"),
    events: Annotated[int, typer.Option(min=1, help="How many events.")] = 28_600,
    seed: Annotated[int | None, typer.Option(help="Another seed gives another sample.")] = None,
) -> None:
    """Write generated events in GH Archive's shape; the defaults give data/sample_data.json byte for byte."""
    from ghsync_dagster.batch.sample import SAMPLE_SEED, write_sample

    _settings()
    with _progress() as progress:
        task = progress.add_task("writing events", total=events)
        written = write_sample(
            path,
            events=events,
            seed=SAMPLE_SEED if seed is None else seed,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    typer.echo(f"{written.path}: {written.events:,} events of {written.users:,} users, {written.size:,} bytes")


@app.command()
def fetch(
    hours: Annotated[list[str], typer.Argument(help="Hours as 2015-03-01-17, or a range as 2015-03-01-{0..23}.")],
    target: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("data/gharchive"),
    mirror: Annotated[str | None, typer.Option(help="Base URL of a mirror of GH Archive.")] = None,
) -> None:
    """Get real hours of GH Archive: resumable, and verified once they are here."""
    from ghsync_dagster.batch.fetch import fetch_hours

    _settings()
    with _progress() as progress:
        tasks: dict[str, Any] = {}

        def show(hour: str, done: int, total: int | None) -> None:
            if hour not in tasks:
                tasks[hour] = progress.add_task(hour, total=total)
            progress.update(tasks[hour], completed=done, total=total)

        fetched = fetch_hours(hours, target, progress=show, **({"base_url": mirror} if mirror else {}))
    for hour in fetched:
        typer.echo(f"{hour.path}: {hour.lines:,} lines, {hour.size:,} bytes, {hour.outcome.value}")


@app.command()
def dev(
    port: Annotated[int, typer.Option(min=1, max=65_535, help="TCP port of the UI.")] = 3000,
    log_level: Annotated[
        DaemonLevel, typer.Option(help="From where on Dagster logs; at info it tells each look of each sensor.")
    ] = DaemonLevel.WARNING,
) -> None:
    """Serve the Dagster UI on 127.0.0.1 with daemon and sensors, until Ctrl-C."""
    from ghsync_dagster.local.dev import serve

    serve(_settings(), port, log_level)


Services = Annotated[list[str] | None, typer.Argument(help="Servers by name; all that there are if none is named.")]


@app.command()
def up(services: Services = None, as_json: AsJson = False) -> None:
    """Start the local servers, for development; those that are up stay as they are."""
    from ghsync_dagster.local import stack

    servers = stack.up(_settings(), **_named(services), progress=cli_cdc.say)
    _show_servers(servers, as_json=as_json)
    if any(server.state != "up" for server in servers.values()):
        raise typer.Exit(TRANSIENT)


@app.command()
def down(services: Services = None) -> None:
    """Stop the local servers; their data stays."""
    from ghsync_dagster.local import stack

    _show_servers(stack.down(_settings(), **_named(services), progress=cli_cdc.say), as_json=False)


@app.command()
def status(
    dagster_home: Annotated[
        bool, typer.Option("--dagster-home", help="Only print the folder to export as DAGSTER_HOME, made if need be.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Tell which settings file and folders count, which local servers are up, and the URIs to use."""
    from ghsync_dagster.local import stack
    from ghsync_dagster.local.dagster_home import dagster_home_of, use_dagster_home

    settings = _settings()
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
        _print_json({"places": places, **{name: server.as_json() for name, server in servers.items()}})
        return
    typer.echo(f"settings {places['settings_file'] or 'from the environment alone: there is no .env in this folder'}")
    typer.echo(f"GHSYNC_HOME={places['home']}")
    typer.echo(f"DAGSTER_HOME={places['dagster_home']}")
    _show_servers(servers, as_json=False)


def _named(services: Sequence[str] | None) -> dict[str, Any]:
    return {"services": tuple(services)} if services else {}


def _show_servers(servers: Any, *, as_json: bool) -> None:  # noqa: ANN401
    if as_json:
        _print_json({name: server.as_json() for name, server in servers.items()})
        return
    for server in servers.values():
        typer.echo(server.as_text())


def _print_json(document: object) -> None:
    import msgspec

    typer.echo(msgspec.json.format(msgspec.json.encode(document), indent=2).decode())


def _console() -> Any:  # noqa: ANN401
    from rich.console import Console

    class Whole(Console):
        """Leaves a pipe that nobody reads to the outermost layer."""

        def on_broken_pipe(self) -> None:
            raise  # noqa: PLE0704  it is called where one is handled

    return Whole() if sys.stdout.isatty() else Whole(width=_PLAIN_WIDTH)


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import Progress

    return Progress(console=Console(stderr=True), transient=True)


if __name__ == "__main__":
    main()
