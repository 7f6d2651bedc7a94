"""The command ``ghsync cdc``: changes without Dagster.

Belongs here: arguments, signals, what is printed and logged. Not here: exit codes of errors (``cli.app``), and any
decision of the consumer.
"""

from __future__ import annotations

import shlex
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ghsync_dagster.cli.common import STOPPED, AsJson, configured, print_json, say
from ghsync_dagster.logging import get_logger
from ghsync_dagster.stopping import killed_when_frozen, stop_on_signals

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ghsync_dagster.cdc.health.metrics import ChangeMetrics, MetricsSnapshot
    from ghsync_dagster.cdc.stream.consume import ConsumerReport
    from ghsync_dagster.dev.rehearsal import Rehearsal
    from ghsync_dagster.domain.connector import ConnectorState
    from ghsync_dagster.domain.finding import Finding
    from ghsync_dagster.settings import Settings

NOT_EQUAL = CHANGES_LOST = 1

_REPORT_END_SECONDS = 5.0

cdc = typer.Typer(no_args_is_help=True, help="Changes of MySQL, from Kafka to MongoDB.")

log = get_logger("cdc")


@cdc.command()
def run(
    seconds: Annotated[float | None, typer.Option(min=0, help="How long to go on at most. Default: no end.")] = None,
    as_json: AsJson = False,
) -> None:
    """Apply changes until Ctrl-C or SIGTERM; then finish the batch at work and leave the group."""
    _consume(until_end=False, seconds=seconds, as_json=as_json)


@cdc.command()
def drain(as_json: AsJson = False) -> None:
    """Apply what the topic holds now, then end.

    Exit code 3 where the connector does not run, so that later changes never come, and 1 where MySQL's table or
    settings are such that changes can't come or are lost.
    """
    from ghsync_dagster.cdc.health.checks import loses_changes
    from ghsync_dagster.cdc.health.connector import require_stream

    settings = configured()
    _check_connector(settings)
    source = _check_source()
    _consume(until_end=True, seconds=None, as_json=as_json)
    require_stream(_connector(settings))
    if source is not None and loses_changes(source):
        raise typer.Exit(CHANGES_LOST)


def _check_source() -> Finding | None:
    """Report what is wrong with MySQL's table or settings; None if they can't be checked."""
    from ghsync_dagster.domain.errors import GhsyncError
    from ghsync_dagster.wiring import check_source, has_mysql

    settings = configured()
    if not has_mysql(settings):
        return None
    try:
        found = check_source(settings)
    except GhsyncError as error:
        say(f"source: not read: {error}")
        return None
    for problem in found.offenders:
        say(f"source: {problem['text']}; way out: {problem['way_out']}")
    return found


@cdc.command("audit")
def audit_changes(
    lag_wait: Annotated[float, typer.Option(min=0, help="Seconds to wait until no change waits for the group.")] = 60,
    patience: Annotated[float, typer.Option(min=0, help="Seconds for which what differs is read again.")] = 30,
    limit: Annotated[
        int | None,
        typer.Option(min=0, help="How many differences are named. Default: 20; with --json all, at most 100,000."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare MySQL's table with the collection, key by key, while both may change; write nothing.

    Exit code 1 where they differ.
    """
    from ghsync_dagster.cdc.dead_letters.index import users_with_letters
    from ghsync_dagster.cdc.health.audit import MOST_OFFENDERS, OFFENDERS, AuditResult, Patience, audit
    from ghsync_dagster.cdc.health.causes import Circumstances
    from ghsync_dagster.cdc.health.checks import causes_in, in_step_with_mysql
    from ghsync_dagster.domain.connector import stopped_words
    from ghsync_dagster.retry import retrying
    from ghsync_dagster.stores.kafka.backlog import await_no_lag
    from ghsync_dagster.wiring import close_statements, existing_kafka, open_mysql, store_opener

    settings = configured()
    connector = _check_connector(settings)
    if limit is None:
        limit = MOST_OFFENDERS if as_json else OFFENDERS
    source, began = _check_source(), datetime.now(UTC)

    def compare() -> tuple[AuditResult, set[str]]:
        with open_mysql(settings) as mysql, store_opener(settings)() as store:
            result = audit(mysql, store, patience=Patience(seconds=patience), limit=limit)
            return result, set() if result.equal else users_with_letters(kafka, store)

    kafka = existing_kafka(settings)
    attempts = settings.retry_attempts
    waiting = retrying("Asking for the lag", lambda: await_no_lag(kafka, lag_wait), attempts=attempts)
    result, lettered = retrying("Comparing", compare, attempts=attempts)
    known = Circumstances(connector=stopped_words(connector), settings=causes_in(source), with_letters=lettered)
    finding = in_step_with_mysql(result, waiting, known)
    if finding.passed:
        close_statements(settings, began)
    print_json(asdict(finding)) if as_json else _show_finding(finding)
    if not finding.passed:
        raise typer.Exit(NOT_EQUAL)


def _show_finding(finding: Finding) -> None:
    typer.echo(finding.summary)
    for offender in finding.offenders:
        differs = "; ".join(
            f"{name}: MySQL {values['mysql']}, MongoDB {values['mongodb']}"
            for name, values in offender["fields"].items()
        )
        kind = "shifted" if offender["shifted"] else offender["kind"]
        typer.echo(f"  {kind:9} {offender['user_id']}{f': {differs}' if differs else ''}")
    if more := finding.counts["not_named"]:
        typer.echo(f"  ... and {more} more: --limit N names more, --json all")
    if finding.way_out:
        typer.echo(f"way out: {finding.way_out}", err=True)


@cdc.command()
def rehearse(
    rate: Annotated[float, typer.Option(min=1, help="Changes a second against MySQL.")] = 500,
    seconds: Annotated[float, typer.Option(min=1, help="How long MySQL is changed.")] = 20,
    load: Annotated[
        bool, typer.Option("--load/--no-load", help="Whether GHSYNC_EVENTS_PATH is loaded meanwhile.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Try the whole path on the local servers: change MySQL, consume, load files meanwhile, then compare both sides."""
    from ghsync_dagster.dev.rehearsal import leftovers
    from ghsync_dagster.dev.rehearsal import rehearse as run_rehearsal

    settings = configured()
    events = settings.events() if load else None
    found = run_rehearsal(settings, rate=rate, seconds=seconds, load=events, progress=say)
    if as_json:
        print_json({**asdict(found), "ok": found.ok, "limits": [asdict(limit) for limit in found.limits]})
    else:
        for name, text in _rehearsed(found).items():
            typer.echo(f"{name:18} {text}")
        typer.echo("")
        for limit in found.limits:
            verdict = "met" if limit.is_met else "missed" if limit.decides else "missed, not fatal"
            typer.echo(f"{verdict:18} {limit.name}: {limit.words}")
        typer.echo(f"\nverdict: {'passed' if found.ok else 'failed'}")
        typer.echo(
            f"Its rows, documents and topics stay in {settings.home_dir}. To remove them, with all\n"
            "else that the local servers hold: ghsync down, then\n"
            f"rm -r {shlex.join(map(str, leftovers(settings)))}"
        )
    if not found.ok:
        raise typer.Exit(1)


def _rehearsed(found: Rehearsal) -> dict[str, str]:
    work = found.workload
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in work.changes.items())
    letters = ", ".join(f"{count:,} {kind}" for kind, count in found.consumer.dead_letters.items())
    return {
        "changes": f"{work.total:,} at {work.rate:,.0f} a second ({kinds})",
        "commit to document": f"{_latency(found.latency)}{'' if found.load_exit is None else ', during the file load'}",
        "dead letters": letters or "none",
        "file load": {None: "none", 0: "succeeded"}.get(found.load_exit, f"failed with exit code {found.load_exit}"),
        "audit": found.audit.summary(),
        "seconds": f"{found.seconds:.1f} from the first change to the end of the audit",
    }


def _consume(*, until_end: bool, seconds: float | None, as_json: bool) -> None:
    """Run a consumer until its end or a signal, and print what it did."""
    from ghsync_dagster.cdc.health.metrics import ChangeMetrics, MetricsEndpoint
    from ghsync_dagster.wiring import change_consumer, existing_kafka

    settings = configured()
    metrics = ChangeMetrics()
    consumer = change_consumer(settings, existing_kafka(settings), metrics)
    with ExitStack() as around:
        if settings.metrics_port is not None:
            around.enter_context(MetricsEndpoint(metrics, host=settings.metrics_host, port=settings.metrics_port))
        around.enter_context(killed_when_frozen())
        stop = threading.Event()
        signals = around.enter_context(stop_on_signals(stop, second_ends=True))
        around.enter_context(_reporting(metrics, settings))
        report = consumer.run(stop, until_end=until_end, seconds=seconds)
    _finish(report, metrics.snapshot(), as_json=as_json)
    if signals and not report.reached_end:
        if until_end:
            say("stopped before the end of the topic; what is left is applied by the next run")
        raise typer.Exit(STOPPED + signals[-1])


def _check_connector(settings: Settings) -> ConnectorState | None:
    """Return the connector's state, None if no worker is known; report it if the connector does not run."""
    from ghsync_dagster.cdc.health.connector import NOT_ASKED

    state = _connector(settings)
    if state is None or not state.is_running:
        say(NOT_ASKED if state is None else state.words())
    return state


def _connector(settings: Settings) -> ConnectorState | None:
    from ghsync_dagster.wiring import connector_probe

    probe = connector_probe(settings)
    return None if probe is None else probe.settled()


@contextmanager
def _reporting(metrics: ChangeMetrics, settings: Settings) -> Iterator[None]:
    """Log every few seconds what the consumer does, or what blocks it."""
    from ghsync_dagster.cdc.health.connector import watch_connector
    from ghsync_dagster.progress import repeating
    from ghsync_dagster.wiring import connector_probe

    probe = connector_probe(settings)

    def report() -> None:
        watch_connector(probe, metrics.connector)
        if ended.is_set():
            return
        now = metrics.snapshot(settings.cdc_report_seconds)
        if now.held_up is None:
            log.info("consuming", **_brief(now))
        else:
            log.warning("consumption blocked", reason=now.held_up, **_brief(now))

    # A report may wait for the worker's answer.
    with repeating(report, settings.cdc_report_seconds, join_seconds=_REPORT_END_SECONDS) as ended:
        yield


def _brief(snapshot: MetricsSnapshot) -> dict[str, Any]:
    latency = snapshot.commit.window if snapshot.commit.window.count else snapshot.kafka.window
    return {
        "records": snapshot.records,
        "a_minute": snapshot.records_a_minute,
        **{f"{part}_ms": getattr(latency, part) if latency.count else None for part in ("p50", "p99", "max")},
        "lag": snapshot.lag_records,
        "lag_seconds": None if snapshot.lag_seconds is None else round(snapshot.lag_seconds, 1),
        "dead_letters": sum(snapshot.dead_letters.values()),
        "retries": sum(snapshot.retries.values()),
        "connector": snapshot.connector,
    }


def _finish(report: ConsumerReport, snapshot: MetricsSnapshot, *, as_json: bool) -> None:
    if as_json:
        print_json({**asdict(report), "metrics": snapshot.as_dict()})
        return
    records = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(report.records.items())) or "none"
    lines = {
        "changes": records,
        "batches": f"{report.batches:,}",
        "seconds": f"{report.seconds:.1f}",
        "from commit": _latency(snapshot.commit.total),
        "from Kafka": _latency(snapshot.kafka.total),
        "dead letters": ", ".join(f"{count:,} {kind}" for kind, count in sorted(report.dead_letters.items())),
        "retries": ", ".join(f"{count:,} {kind}" for kind, count in sorted(report.retries.items())),
    }
    for name, text in lines.items():
        if text:
            typer.echo(f"{name:13} {text}")
    if report.dead_letters:
        say("see: ghsync dlq list --state open")


def _latency(found: Any) -> str:  # noqa: ANN401
    return f"p50 {found.p50} ms, p95 {found.p95} ms, p99 {found.p99} ms, max {found.max} ms" if found.count else ""
