"""The commands of the batch flow: run, batch, audit and report.

Belongs here: arguments, and the summary at the end. Not here: any decision of the flow.
"""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Annotated

import typer

from ghsync_dagster.cli.common import GATE_FAILED, AsJson, configured, console, print_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ghsync_dagster.domain.finding import Finding
    from ghsync_dagster.settings import Settings


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
    from ghsync_dagster.dagster_home import use_dagster_home
    from ghsync_dagster.wiring import batch_flow

    started = time.monotonic()
    settings = configured()
    # Outside the run, so that a wrong setting or input is an error of the command and no failed run.
    paths = settings.events(events or ())
    use_dagster_home(settings)
    batch_flow(settings).check_first(paths)
    from ghsync_dagster.cli.runner import materialize_batch

    outcome = materialize_batch(paths)
    seconds = round(time.monotonic() - started, 3)
    _finish(settings, outcome.findings, ok=outcome.success, as_json=as_json, run_id=outcome.run_id, seconds=seconds)


def batch(
    paths: Annotated[list[str], typer.Argument(help="Files, folders or globs of events; see docs/explain/files.md.")],
    as_json: AsJson = False,
) -> None:
    """Read, flatten, load and verify without Dagster, with the same gates."""
    from ghsync_dagster.batch.flow import BatchRun
    from ghsync_dagster.wiring import batch_flow

    started = time.monotonic()
    settings = configured()
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


def audit(as_json: AsJson = False) -> None:
    """Run every check on the stored users; write nothing."""
    from ghsync_dagster.wiring import batch_flow

    settings = configured()
    flow = batch_flow(settings)
    try:
        findings = flow.audit()
    finally:
        flow.spark.stop()
    _finish(settings, findings, ok=all(finding.passed for finding in findings), as_json=as_json)


def report(as_json: AsJson = False) -> None:
    """Print the reports of the newest read, flatten and load in GHSYNC_HOME."""
    from ghsync_dagster.batch.reports import Artifacts, ReadReport

    settings = configured()
    # If nothing has run yet, this raises an error with its way out.
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
    """Print the summary of one run, or of the newest; exit with 1 if a gate failed."""
    from ghsync_dagster.batch.reports import Artifacts
    from ghsync_dagster.batch.summary import batch_summary, draw
    from ghsync_dagster.wiring import shown_mongo

    where = f"{settings.mongodb_database}.{settings.mongodb_collection} at {shown_mongo(settings)}"
    summary = batch_summary(Artifacts(settings.home_dir / "batch", run_id), findings, ok=ok, collection=where, **more)
    print_json(summary) if as_json else console().print(draw(summary))
    if not ok:
        raise typer.Exit(GATE_FAILED)
