"""The commands that get events: sample and fetch.

Belongs here: arguments and progress. Not here: what is written (``dev.sample``, ``dev.fetch``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ghsync_dagster.cli.common import configured, progress_bar


def sample(
    path: Annotated[Path, typer.Option(help="Where to write it.")] = Path("data/sample_data.json"),
    events: Annotated[int, typer.Option(min=1, help="How many events.")] = 28_600,
    seed: Annotated[int | None, typer.Option(help="Another seed gives another sample.")] = None,
) -> None:
    """Write generated events in GH Archive's shape; the defaults give data/sample_data.json byte for byte."""
    from ghsync_dagster.dev.sample import SAMPLE_SEED, write_sample

    configured()
    with progress_bar() as progress:
        task = progress.add_task("writing events", total=events)
        written = write_sample(
            path,
            events=events,
            seed=SAMPLE_SEED if seed is None else seed,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    typer.echo(f"{written.path}: {written.events:,} events of {written.users:,} users, {written.size:,} bytes")


def fetch(
    hours: Annotated[list[str], typer.Argument(help="Hours as 2015-03-01-17, or a range as 2015-03-01-{0..23}.")],
    target: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("data/gharchive"),
    mirror: Annotated[str | None, typer.Option(help="Base URL of a mirror of GH Archive.")] = None,
) -> None:
    """Download real hours of GH Archive: resumable, and verified at the end."""
    from ghsync_dagster.dev.fetch import fetch_hours

    configured()
    with progress_bar() as progress:
        tasks: dict[str, Any] = {}

        def show(hour: str, done: int, total: int | None) -> None:
            if hour not in tasks:
                tasks[hour] = progress.add_task(hour, total=total)
            progress.update(tasks[hour], completed=done, total=total)

        fetched = fetch_hours(hours, target, progress=show, **({"base_url": mirror} if mirror else {}))
    for hour in fetched:
        typer.echo(f"{hour.path}: {hour.lines:,} lines, {hour.size:,} bytes, {hour.outcome.value}")
