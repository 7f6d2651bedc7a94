"""From runs of the change path to ratios, tables and the plot.

Belongs here: which ratios have a target, and how throughput and latency are shown. Not here: medians and the shape of
tables that other benchmarks share.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from rich.table import Table

from benchmarks import results
from benchmarks.cdc_contenders import OURS, RAW, SINK
from benchmarks.results import UNNAMED, Ratio, at_least, at_most, share

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from benchmarks.cdc_latency import LatencyRun, Second
    from benchmarks.results import Summary
    from ghsync_dagster.cdc.health.metrics import Percentiles

SINK_TARGETS = {False: 3.0, True: 2.5}
RAW_TARGET = 0.9
MEMORY_TARGET = 1.2
MEMORY_SIZES = (100_000, 1_000_000)
STEADY_RATE = 1_000
STEADY_P99_MS = 250
HAND_OVER_MS = 1_000
SCHEMAS_ON = "schemas on"
_COLOURS = {"p50": "#2a9d8f", "p95": "#e9c46a", "p99": "#f4a261", "max": "#c8553d"}


def ratios(summaries: Sequence[Summary]) -> list[Ratio]:
    """Return every comparison whose two sides were measured."""
    found: list[Ratio] = []
    for name in results.inputs_of(summaries):
        found += _ratios_of_input({each.contender: each for each in summaries if each.input == name}, name)
    return [*found, *_growth([each for each in summaries if each.contender == OURS])]


def _ratios_of_input(of: Mapping[str, Summary], name: str) -> list[Ratio]:
    ours, sink, raw = of.get(OURS), of.get(SINK), of.get(RAW)
    found = []
    if ours and sink:
        target = SINK_TARGETS[SCHEMAS_ON in ours.case]
        found.append(at_least(f"events/s, ours / sink: {name}", share(sink.seconds, ours.seconds), target))
    if ours and raw:
        found.append(at_least(f"events/s, ours / raw: {name}", share(raw.seconds, ours.seconds), RAW_TARGET))
    return found


def _growth(ours: Sequence[Summary]) -> list[Ratio]:
    """Compare the sizes of inputs that are alike: the same share of keys, the same form."""
    alike: dict[tuple[int, bool], list[Summary]] = {}
    for each in sorted(ours, key=lambda summary: summary.events):
        keys = int(each.case.split(" ", 1)[0].replace(",", ""))
        alike.setdefault((round(100 * keys / each.events), SCHEMAS_ON in each.case), []).append(each)
    found = []
    for group in alike.values():
        for smaller, larger in pairwise(group):
            words = f"ours, peak memory: {larger.input}, against {smaller.events:,}"
            target = MEMORY_TARGET if (smaller.events, larger.events) == MEMORY_SIZES else None
            found.append(at_most(words, share(larger.peak_mb, smaller.peak_mb), target))
    return found


def latency_ratios(runs: Sequence[LatencyRun]) -> list[Ratio]:
    """Return what the latencies are held against, in ms."""
    found = []
    for run in runs:
        steady = STEADY_P99_MS if run.wanted_rate == STEADY_RATE else None
        over = HAND_OVER_MS if run.wanted_rate == STEADY_RATE else None
        rate = f"{run.wanted_rate:,.0f} changes/s"
        found += [
            at_most(f"commit to document, steady p99 in ms: {rate}", run.steady.p99, steady),
            at_most(f"commit to document, p99 in ms around the hand-over: {rate}", run.around.p99, over),
            at_most(f"longest time without a write in ms, hand-over included: {rate}", run.longest_gap_ms, over),
        ]
    return found


def latency_table(runs: Sequence[LatencyRun]) -> Table:
    """Return the table of latencies."""
    table = Table(title="From the database's commit to the stored document, ms (p50 / p95 / p99 / max)")
    headings = (
        "asked/s",
        "reached",
        "changes",
        "steady",
        "around hand-over",
        "from Kafka",
        "longest gap",
        "writing",
        "equal",
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        shown = (run.steady, run.around, run.from_kafka)
        table.add_row(
            f"{run.wanted_rate:,.0f}",
            f"{run.rate:,.0f}",
            f"{run.changes:,}",
            *(in_words(each) for each in shown),
            f"{run.longest_gap_ms}",
            f"{run.writing_share:.0%}",
            "yes" if run.equal else "no",
        )
    return table


def plot(summaries: Sequence[Summary], latencies: Sequence[LatencyRun], words: Mapping[str, str], path: Path) -> None:
    """Draw seconds by contender, one panel an input, then latency over time, one panel a rate.

    Args:
        summaries: Throughput.
        latencies: Latency.
        words: A contender's name to what it is.
        path: The PNG to write.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    inputs = results.inputs_of(summaries)
    bars = results.height(summaries) if summaries else 0.0
    heights = [bars / max(len(inputs), 1)] * len(inputs) + [2.6] * len(latencies)
    figure, panels = plt.subplots(
        *(len(heights), 1),
        squeeze=False,
        figsize=(11, sum(heights) + 0.6),
        height_ratios=heights,
        layout="constrained",
    )
    axes = list(panels[:, 0])
    if summaries:
        results.draw_panels(axes[: len(inputs)], summaries, words, {UNNAMED: "#1b4965"})
        axes[len(inputs) - 1].set_xlabel("seconds from the first change on offer to the last one stored (median)")
    for run, panel in zip(latencies, axes[len(inputs) :], strict=True):
        draw_seconds(panel, run.seconds)
        panel.axvline(run.hand_over_at, color="black", linestyle=":", linewidth=1, label="hand-over")
        panel.set_title(
            f"Commit to document at {run.wanted_rate:,.0f} changes/s ({run.rate:,.0f} reached)", loc="left", fontsize=10
        )
        panel.legend(fontsize=8, frameon=False, ncols=5, loc="upper right")
    if latencies:
        axes[-1].set_xlabel("seconds since the first change")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_seconds(panel: Axes, seconds: Sequence[Second]) -> None:
    """Draw latency second by second.

    Args:
        panel: matplotlib's axes.
        seconds: What to draw.
    """
    for name, colour in _COLOURS.items():
        values = [max(getattr(second.latency, name), 1) for second in seconds]
        panel.plot([second.at for second in seconds], values, color=colour, label=name, linewidth=1.2)
    panel.set_yscale("log")
    panel.set_ylabel("ms")
    panel.spines[["top", "right"]].set_visible(False)


def in_words(latency: Percentiles) -> str:
    """Return p50 / p95 / p99 / max."""
    return f"{latency.p50} / {latency.p95} / {latency.p99} / {latency.max}"
