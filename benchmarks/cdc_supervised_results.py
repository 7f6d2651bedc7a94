"""What was measured of slices under the supervisor, against its limits, as tables and as a plot.

Belongs here: which numbers have a limit, and how they are shown. Not here: how they come about.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from benchmarks.cdc_results import HAND_OVER_MS, STEADY_P99_MS, STEADY_RATE, draw_seconds, in_words
from benchmarks.results import Ratio, at_most

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.cdc_supervised import SupervisedRun
    from benchmarks.cdc_timeline import Kill, Stretch


def ratios(run: SupervisedRun) -> list[Ratio]:
    """Return what is held against a limit; the limits are for ``STEADY_RATE``."""
    at_rate = run.plan.rate == STEADY_RATE
    steady, over = (STEADY_P99_MS, HAND_OVER_MS) if at_rate else (None, None)
    around = [each.around for each in run.timeline.hand_overs]
    found = [at_most("steady, p99 in ms", run.timeline.steady.latency.p99, steady)]
    for number, each in enumerate(around, 1):
        found += [
            at_most(f"hand-over {number}, p99 in ms", each.latency.p99, over),
            at_most(f"hand-over {number}, longest gap in ms", each.longest_gap_ms, over),
        ]
    limit = run.plan.session_seconds if at_rate else None
    for kill in run.timeline.kills:
        seconds = {
            "the replacement runs": kill.started,
            "the partition is another's": kill.taken_over,
            "the next change is applied": kill.next_applied,
        }
        found += [
            at_most(f"killed {kill.how}, seconds until {what}", took, limit)
            for what, took in seconds.items()
            if took is not None
        ]
    return found


def latency_table(run: SupervisedRun) -> Table:
    """Return the table of latencies and gaps."""
    table = Table(title=f"Slices under cdc_supervisor at {run.plan.rate:,.0f} changes/s: commit to document")
    table.add_column("when")
    for heading in ("from s", "to s", "probes", "p50 / p95 / p99 / max ms", "longest gap ms"):
        table.add_column(heading, justify="right", no_wrap=True)

    def add(what: str, begins: str, ends: str, found: Stretch) -> None:
        shown = (f"{found.latency.count:,}", in_words(found.latency), f"{found.longest_gap_ms}")
        table.add_row(what, begins, ends, *shown)

    add("steady", "", "", run.timeline.steady)
    for number, each in enumerate(run.timeline.hand_overs, 1):
        add(f"around hand-over {number}", f"{each.asked_at:.0f}", f"{each.ended_at:.0f}", each.around)
    for kill in run.timeline.kills:
        add(f"killed -9, {kill.how}", f"{kill.at:.0f}", f"{kill.at + kill.caught_up:.0f}", kill.around)
    return table


def kill_table(run: SupervisedRun) -> Table:
    """Return the table of the kills."""
    table = Table(title=f"Seconds from the kill -9; the session times out after {run.plan.session_seconds:g} s")
    for heading in (
        "killed",
        "partition given away",
        "next change applied",
        "caught up",
        "run held for failed",
        "replacement asked",
        "runs",
    ):
        table.add_column(heading, justify="right")
    for kill in run.timeline.kills:
        table.add_row(kill.how, *_times(kill))
    return table


def _times(kill: Kill) -> list[str]:
    times = (kill.taken_over, kill.next_applied, kill.caught_up, kill.noticed, kill.asked, kill.started)
    return ["" if time is None else f"{time:.1f}" for time in times]


def words(run: SupervisedRun) -> str:
    """Return the rest in words."""
    found = run.timeline
    cores = ", ".join(f"{name} {share:.2f}" for name, share in run.busy_cores.items())
    return (
        f"{run.changes:,} changes, {run.rate:,.0f}/s reached, {found.all.count:,} of them probes; sent up to "
        f"{run.longest_behind_seconds:.2f} s late, at most {found.longest_commit_gap_ms} ms between two commits of "
        f"probes. A sighting is exact to {found.resolution.p50} ms (p99 {found.resolution.p99}, max "
        f"{found.resolution.max}). Busy cores: {cores}. Table and collection: "
        f"{'equal' if run.equal else 'NOT equal'}."
    )


def plot(run: SupervisedRun, path: Path) -> None:
    """Draw latency over time, with hand-overs and kills.

    Args:
        run: What to draw.
        path: The PNG to write.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panel = plt.subplots(figsize=(11, 4), layout="constrained")
    draw_seconds(panel, run.timeline.seconds)
    for number, each in enumerate(run.timeline.hand_overs):
        label = "hand-over" if number == 0 else None
        panel.axvspan(each.asked_at, each.ended_at, color="#1b4965", alpha=0.15, linewidth=0, label=label)
    for number, kill in enumerate(run.timeline.kills):
        label = "kill -9" if number == 0 else None
        panel.axvline(kill.at, color="black", linestyle=":", linewidth=1.2, label=label)
        panel.annotate(kill.how, (kill.at, 1), xytext=(3, 3), textcoords="offset points", fontsize=8)
    panel.set_title(
        f"Commit to document at {run.plan.rate:,.0f} changes/s ({run.rate:,.0f} reached), slices of "
        f"{run.plan.slice_seconds:g} s",
        loc="left",
        fontsize=10,
    )
    panel.set_xlabel("seconds since the first probe")
    panel.legend(fontsize=8, frameon=False, ncols=6, loc="upper left")
    figure.savefig(path, dpi=130)
    plt.close(figure)
