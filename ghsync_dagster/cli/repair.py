"""The command ``ghsync cdc repair``: users are repaired from MySQL's current rows.

Belongs here: arguments, signals, what is printed. Not here: who is repaired and how (``cdc.health.repair_requests``).
"""

from __future__ import annotations

import threading
import time
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Final

import typer

from ghsync_dagster.cli.common import STOPPED, AsJson, configured, print_json, say
from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster.stopping import stop_on_signals

if TYPE_CHECKING:
    from ghsync_dagster.cdc.health.repair_requests import RepairReport

NOT_REPAIRED: Final = 1
_PROGRESS_SECONDS: Final = 2.0


def repair(
    user_id: Annotated[list[str] | None, typer.Option("--user-id", help="This user; may be given again.")] = None,
    from_audit: Annotated[
        bool, typer.Option("--from-audit", help="The users in which an audit finds a difference.")
    ] = False,
    dead_letters: Annotated[bool, typer.Option("--dead-letters", help="The users with an open dead letter.")] = False,
    everyone: Annotated[
        bool, typer.Option("--all", help="Every user in which the two sides differ now, without waiting for changes.")
    ] = False,
    patience: Annotated[float, typer.Option(min=0, help="Seconds for which the audit reads differences again.")] = 10,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only report what would be done. With --dead-letters their index is brought up to date; nothing else "
            "is written.",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Also for more users than GHSYNC_REPAIR_MAX_USERS.")] = False,
    as_json: AsJson = False,
) -> None:
    """Repair users from MySQL's current rows, while changes go on; no newer state is overwritten.

    A running consumer carries it out. Where none runs, this command consumes until its users are repaired.
    Users that only files know stay. Exit code 1 where a user is not repaired, or something is left to do by hand.
    """
    from ghsync_dagster.cdc.health.repair_requests import Chosen, Selection, plan, refuse_too_many, select
    from ghsync_dagster.cdc.health.repair_requests import repair as request_repair
    from ghsync_dagster.retry import retrying
    from ghsync_dagster.stores.mongo.repairs import RepairRequests
    from ghsync_dagster.wiring import change_consumer, existing_kafka, open_mysql, store_opener

    settings = configured()
    selection = Selection(tuple(user_id or ()), from_audit, everyone, dead_letters)
    if selection.is_empty:
        raise ConfigError(
            "No user is chosen.", way_out="Give --user-id ID, --from-audit, --dead-letters or --all; see --help."
        )
    kafka = existing_kafka(settings)
    with store_opener(settings)() as store:
        if not dry_run:
            store.ensure_collection()
        repairs = RepairRequests(store)

        def chosen() -> Chosen:
            with open_mysql(settings) as mysql:
                return select(selection, mysql, store, kafka, patience)

        keys, unrepairable = retrying("Choosing users", chosen, attempts=settings.retry_attempts)
        if dry_run:
            with open_mysql(settings) as mysql:
                report = plan(mysql, store, repairs, keys).with_unrepairable(unrepairable)
            _finish(report, as_json=as_json)
            return
        if not yes:
            refuse_too_many(len(keys), settings.repair_max_users)
        stop = threading.Event()
        with stop_on_signals(stop, second_ends=True) as signals:
            report = request_repair(
                kafka,
                repairs,
                keys,
                lambda: change_consumer(settings, kafka),
                stop=stop,
                progress=_Progress(len(keys)),
            ).with_unrepairable(unrepairable)
    _finish(report, as_json=as_json)
    if report.open and signals:
        say(f"stopped: {report.open:,} requests stay, and the next consumer carries them out")
        raise typer.Exit(STOPPED + signals[-1])
    if not report.is_carried_out:
        raise typer.Exit(NOT_REPAIRED)


class _Progress:
    """Reports now and then how many users are repaired."""

    def __init__(self, users: int) -> None:
        self._users = users
        self._next = time.monotonic() + _PROGRESS_SECONDS

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if done < self._users and now >= self._next:
            self._next = now + _PROGRESS_SECONDS
            say(f"{done:,} of {self._users:,} users are repaired")


def _finish(report: RepairReport, *, as_json: bool) -> None:
    from ghsync_dagster.cdc.health.repair_requests import SHOWN

    if as_json:
        print_json(report.as_json())
        return
    typer.echo(report.summary())
    for user_id, outcome in islice(report.planned.items(), SHOWN):
        typer.echo(f"  {outcome:<9} {user_id}")
    if (more := len(report.planned) - SHOWN) > 0:
        typer.echo(f"  ... and {more:,} more: --json names all")
    for refused in report.refused:
        typer.echo(f"  refused   {refused.user_id}: {refused.why}")
    for name in report.by_hand:
        typer.echo(f"  by hand   {name}")
    if more := report.unrepairable - len(report.by_hand):
        typer.echo(f"  ... and {more:,} more")
    if report.problem:
        typer.echo(f"in the way: {report.problem}", err=True)
    if report.way_out:
        typer.echo(f"way out: {report.way_out}", err=True)
