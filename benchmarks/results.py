"""From single runs to what a reader wants: medians with their spread, ratios against targets, a table, a plot.

Belongs here: arithmetic on runs, and how it is shown. Not here: running or measuring anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

SMALL, MIDDLE, LARGE = 28_600, 286_000, 2_860_000
JVM_START = "jvm_start"
UNNAMED = "start and rest"

Colour = str | tuple[float, float, float]


@dataclass(frozen=True)
class Run:
    """One run of one contender.

    Attributes:
        contender: Its name.
        events: Events in the input.
        round: Which time around, from 1.
        seconds: Wall seconds of the whole process.
        phases: Seconds by phase, as the contender tells them; empty where it does not.
        counts: The numbers it told alongside.
        cpu_seconds: CPU time of its process tree.
        peak_mb: Peak RSS of its process tree, MiB.
        peak_java_mb: Peak RSS of the JVMs in it, MiB.
        peak_other_mb: Peak RSS of the rest of it, MiB.
        store_cpu_seconds: CPU time of the store meanwhile; None where the store is not ours.
        store_peak_mb: Peak RSS of the store, MiB; None where the store is not ours.
        stored_mb: Size of the store's files after, MiB; None where the store is not ours.
        documents: Documents in the collection, their content checked.
        foreign_cores: Cores kept busy by others, on average.
        load_average: One-minute load average at the start.
        case: What sets the input apart from others of its size; empty where nothing does.
    """

    contender: str
    events: int
    round: int
    seconds: float
    phases: dict[str, float]
    counts: dict[str, int]
    cpu_seconds: float
    peak_mb: float
    peak_java_mb: float
    peak_other_mb: float
    store_cpu_seconds: float | None
    store_peak_mb: float | None
    stored_mb: float | None
    documents: int
    foreign_cores: float
    load_average: float
    case: str = ""

    @property
    def jvm_start(self) -> float:
        """Seconds of the JVM's start; 0 where there is none or it is not told."""
        return self.phases.get(JVM_START, 0.0)


@dataclass(frozen=True)
class Summary:
    """The median of one contender's runs on one size; ``seconds_min`` and ``seconds_max`` are the spread."""

    contender: str
    events: int
    runs: int
    seconds: float
    seconds_min: float
    seconds_max: float
    seconds_without_jvm_start: float
    events_per_second: float
    cpu_seconds: float
    peak_mb: float
    peak_java_mb: float
    peak_other_mb: float
    store_cpu_seconds: float | None
    store_peak_mb: float | None
    foreign_cores: float
    phases: dict[str, float]
    case: str = ""

    @property
    def input(self) -> str:
        """The input in words."""
        return input_words(self.events, self.case)


@dataclass(frozen=True)
class Ratio:
    """A comparison.

    Attributes:
        words: What is divided by what.
        value: The ratio of the medians.
        target: The target in words; empty where there is none.
        met: Whether it is reached; None where there is no target.
    """

    words: str
    value: float
    target: str = ""
    met: bool | None = None


# --- arithmetic -----------------------------------------------------------------------------------------------------


def summarize(runs: Iterable[Run]) -> list[Summary]:
    """Return the medians by input and contender, in the order of the runs."""
    groups: dict[tuple[int, str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.events, run.case, run.contender), []).append(run)
    return [_summary(group) for group in groups.values()]


def input_words(events: int, case: str = "") -> str:
    """Return an input in words: its size, and what sets it apart from others of its size."""
    return f"{events:,} events, {case}" if case else f"{events:,} events"


def _summary(runs: Sequence[Run]) -> Summary:
    first = runs[0]
    seconds = median(run.seconds for run in runs)
    names = dict.fromkeys(name for run in runs for name in run.phases)
    return Summary(
        contender=first.contender,
        events=first.events,
        runs=len(runs),
        seconds=round(seconds, 3),
        seconds_min=min(run.seconds for run in runs),
        seconds_max=max(run.seconds for run in runs),
        seconds_without_jvm_start=round(median(run.seconds - run.jvm_start for run in runs), 3),
        events_per_second=round(first.events / seconds, 1),
        cpu_seconds=round(median(run.cpu_seconds for run in runs), 2),
        peak_mb=median(run.peak_mb for run in runs),
        peak_java_mb=median(run.peak_java_mb for run in runs),
        peak_other_mb=median(run.peak_other_mb for run in runs),
        store_cpu_seconds=_median_or_none([run.store_cpu_seconds for run in runs]),
        store_peak_mb=_median_or_none([run.store_peak_mb for run in runs]),
        foreign_cores=median(run.foreign_cores for run in runs),
        phases={name: round(median(run.phases.get(name, 0.0) for run in runs), 3) for name in names},
        case=first.case,
    )


def _median_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(median(known), 2) if known else None


def ratios(summaries: Sequence[Summary]) -> list[Ratio]:
    """Return every comparison whose two sides were measured."""
    by_key = {(summary.events, summary.contender): summary for summary in summaries}
    sizes = sorted({summary.events for summary in summaries})
    found: list[Ratio] = []
    for size in sizes:
        found += _ratios_of_size({name: summary for (events, name), summary in by_key.items() if events == size}, size)
    for name in ("ours", "floor"):
        measured = [by_key[size, name] for size in sizes if (size, name) in by_key]
        for smaller, larger in pairwise(measured):
            found += _growth(smaller, larger)
    return found


def _ratios_of_size(of: Mapping[str, Summary], size: int) -> list[Ratio]:
    found: list[Ratio] = []
    ours, dagster, plain = of.get("ours"), of.get("ours-dagster"), of.get("plain")
    if ours and (before := of.get("before")):
        found.append(at_most(f"ours / before, {size:,} events", ours.seconds / before.seconds, 1.0))
    if ours and plain:
        faster = plain.seconds / ours.seconds
        found.append(at_least(f"plain / ours, {size:,} events", faster, 4.0 if size == MIDDLE else None))
        found.append(Ratio(f"plain / ours in CPU seconds, {size:,} events", share(plain.cpu_seconds, ours.cpu_seconds)))
    if dagster and plain:
        faster = plain.seconds / dagster.seconds
        found.append(at_least(f"plain / ours-dagster, {size:,} events", faster, 1.0 if size == SMALL else None))
    for name in ("floor", "floor-versions"):
        if ours and (floor := of.get(name)):
            times = ours.seconds_without_jvm_start / floor.seconds
            most = 1.3 if size == MIDDLE and name == "floor" else None
            found.append(at_most(f"(ours - JVM start) / {name}, {size:,} events", times, most))
    return found


def _growth(smaller: Summary, larger: Summary) -> list[Ratio]:
    a_target = smaller.contender == "ours" and (smaller.events, larger.events) == (MIDDLE, LARGE)
    time = (larger.seconds_without_jvm_start / larger.events) / (smaller.seconds_without_jvm_start / smaller.events)
    memory = share(larger.peak_mb, smaller.peak_mb)
    sizes = f"{larger.events:,} against {smaller.events:,} events"
    return [
        at_most(f"{larger.contender}: seconds an event without JVM start, {sizes}", time, 1.2 if a_target else None),
        at_most(f"{larger.contender}: peak memory, {sizes}", memory, 1.2 if a_target else None),
    ]


def share(over: float, under: float) -> float:
    """Return a ratio; 0 where there is nothing to divide by."""
    return round(over / under, 3) if under else 0.0


def at_least(words: str, value: float, target: float | None = None) -> Ratio:
    """Return a ratio that should be at least so much, where there is a target."""
    if target is None:
        return Ratio(words, round(value, 3))
    return Ratio(words, round(value, 3), f"at least {target:g}", value >= target)


def at_most(words: str, value: float, target: float | None = None) -> Ratio:
    """Return a ratio that should be at most so much, where there is a target."""
    if target is None:
        return Ratio(words, round(value, 3))
    return Ratio(words, round(value, 3), f"at most {target:g}", value <= target)


def unnamed_seconds(summary: Summary) -> float:
    """Return the wall seconds that no phase names: the interpreter's start, imports, the end of processes."""
    return max(0.0, summary.seconds - sum(summary.phases.values()))


def noise_warnings(runs: Sequence[Run], bearable_cores: float = 0.2) -> list[str]:
    """Return a warning where other processes took part of the machine, or a contender's phases overlap."""
    found = []
    noisy = [run for run in runs if run.foreign_cores > bearable_cores]
    if noisy:
        worst = max(run.foreign_cores for run in noisy)
        found.append(
            f"Other processes kept more than {bearable_cores:g} cores busy in {len(noisy)} of {len(runs)} runs "
            f"(up to {worst:g}): compare CPU seconds rather than seconds."
        )
    overlapping = sorted({run.contender for run in runs if sum(run.phases.values()) > run.seconds})
    if overlapping:
        found.append(
            f"Phases of {', '.join(overlapping)} overlap (their sum is above the wall time): "
            "what is reckoned without the JVM's start is too low."
        )
    return found


# --- shown ----------------------------------------------------------------------------------------------------------


def summary_table(summaries: Sequence[Summary], title: str = "Batch load") -> Table:
    """Return the table of medians."""
    table = Table(title=f"{title}: medians (minimum to maximum)")
    table.add_column("input" if any(summary.case for summary in summaries) else "events", justify="right")
    table.add_column("contender")
    numbers = ("runs", "seconds", "events/s", "CPU s", "peak MiB", "of it JVM", "store MiB", "others' cores")
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for summary in sorted(summaries, key=lambda each: (each.events, each.case)):
        if previous not in (None, summary.input):
            table.add_section()
        previous = summary.input
        table.add_row(
            summary.input.replace(" events", ""),
            summary.contender,
            str(summary.runs),
            f"{summary.seconds:.1f} ({summary.seconds_min:.1f} to {summary.seconds_max:.1f})",
            f"{summary.events_per_second:,.0f}",
            f"{summary.cpu_seconds:.1f}",
            f"{summary.peak_mb:,.0f}",
            f"{summary.peak_java_mb:,.0f}",
            "" if summary.store_peak_mb is None else f"{summary.store_peak_mb:,.0f}",
            f"{summary.foreign_cores:.2f}",
        )
    return table


def phase_table(summaries: Sequence[Summary]) -> Table:
    """Return the table of phases and their seconds."""
    table = Table(title="Phases: median seconds")
    table.add_column("events", justify="right")
    table.add_column("contender")
    table.add_column("phases", overflow="fold")
    for summary in sorted(summaries, key=lambda each: each.events):
        parts = {**summary.phases, UNNAMED: unnamed_seconds(summary)} if summary.phases else {}
        told = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items() if seconds >= 0.05)
        table.add_row(f"{summary.events:,}", summary.contender, told or "not told")
    return table


def ratio_table(found: Sequence[Ratio], title: str = "Ratios of medians") -> Table:
    """Return the table of ratios."""
    table = Table(title=title)
    table.add_column("what")
    table.add_column("ratio", justify="right")
    table.add_column("target")
    table.add_column("met")
    for ratio in found:
        met = {None: "", True: "[green]yes[/]", False: "[red]no[/]"}[ratio.met]
        table.add_row(ratio.words, f"{ratio.value:.2f}", ratio.target, met)
    return table


def plot(summaries: Sequence[Summary], words: Mapping[str, str], path: Path) -> None:
    """Draw seconds by contender, one panel an input, phases stacked, the spread as a whisker.

    Args:
        summaries: What to draw.
        words: A contender's name to what it is.
        path: The PNG to write.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    inputs = inputs_of(summaries)
    colours = _phase_colours(summaries)
    figure, panels = plt.subplots(len(inputs), 1, squeeze=False, figsize=(11, height(summaries)), layout="constrained")
    draw_panels(list(panels[:, 0]), summaries, words, colours)
    panels[-1, 0].set_xlabel("seconds from start to end of the process (median; whisker: min to max)")
    handles = [Patch(color=colour) for colour in colours.values()]
    figure.legend(handles, list(colours), loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def inputs_of(summaries: Sequence[Summary]) -> list[str]:
    """Return the inputs in words, each once, smaller ones first."""
    return list(dict.fromkeys(each.input for each in sorted(summaries, key=lambda each: (each.events, each.case))))


def height(summaries: Sequence[Summary]) -> float:
    """Return how high the panels must be, in inches."""
    return 1.1 + 0.55 * len(summaries) + 0.6 * len(inputs_of(summaries))


def draw_panels(
    panels: Sequence[Any], summaries: Sequence[Summary], words: Mapping[str, str], colours: Mapping[str, Colour]
) -> None:
    """Draw one panel an input.

    Args:
        panels: matplotlib's axes, as many as there are inputs.
        summaries: What to draw.
        words: A contender's name to what it is.
        colours: A phase's name to its colour, ``UNNAMED`` among them.
    """
    for name, panel in zip(inputs_of(summaries), panels, strict=True):
        shown = [summary for summary in summaries if summary.input == name]
        for place, summary in enumerate(shown):
            left = 0.0
            for phase, seconds in _parts(summary).items():
                panel.barh(place, seconds, left=left, color=colours[phase], edgecolor="white", linewidth=0.4)
                left += seconds
            spread = [[summary.seconds - summary.seconds_min], [summary.seconds_max - summary.seconds]]
            panel.errorbar(summary.seconds, place, xerr=spread, color="black", capsize=3, linewidth=1)
            panel.annotate(
                f"{summary.seconds:.1f} s, {summary.events_per_second:,.0f} events/s, {summary.peak_mb:,.0f} MiB",
                (summary.seconds_max, place),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        panel.set_yticks(range(len(shown)), [words.get(summary.contender, summary.contender) for summary in shown])
        panel.invert_yaxis()
        panel.set_xlim(0, 1.45 * max(summary.seconds_max for summary in shown))
        panel.set_title(name, loc="left", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)


def _parts(summary: Summary) -> dict[str, float]:
    """Return the bar's parts: the phases that are wide enough to be seen, and everything else."""
    seen = {name: seconds for name, seconds in summary.phases.items() if seconds >= 0.01 * summary.seconds}
    return {**seen, UNNAMED: max(0.0, summary.seconds - sum(seen.values()))}


def _phase_colours(summaries: Sequence[Summary]) -> dict[str, Colour]:
    """Give each phase a colour; what no phase names is grey."""
    from matplotlib import colormaps

    names = dict.fromkeys(name for summary in summaries for name in _parts(summary) if name != UNNAMED)
    palette = colormaps["tab20"].colors  # type: ignore[attr-defined]
    colours: dict[str, Colour] = {name: palette[place % len(palette)] for place, name in enumerate(names)}
    return {**colours, UNNAMED: "#c8c8c8"}
