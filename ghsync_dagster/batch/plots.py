"""Plots for people, as markdown with the image inside, so that they need no server and no file.

Belongs here: counting what is shown and drawing it. Not here: where a plot is shown, nor any judgement on it.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import pyarrow as pa

_TOP_TYPES: Final = 5
_OTHER: Final = "other"
_BATCH: Final = 65_536
_LABEL_LIMIT: Final = 32
_COLORS: Final = ("#1b4965", "#2a9d8f", "#e9c46a", "#f4a261", "#c8553d", "#adb5bd")


class _Grain(NamedTuple):
    """How wide a bar is.

    Attributes:
        name: In words.
        unit: NumPy's letter for it.
        digits: How many leading characters of an ISO time name it.
        longest: The longest span of events that it suits.
    """

    name: str
    unit: str
    digits: int
    longest: timedelta


_GRAINS: Final = (
    _Grain("minute", "m", 16, timedelta(hours=2)),
    _Grain("hour", "h", 13, timedelta(days=14)),
    _Grain("day", "D", 10, timedelta(days=3 * 365)),
    _Grain("year", "Y", 4, timedelta.max),
)


class _Summary(NamedTuple):
    """All events in summary: how many of each type, and the first and last time."""

    types: Counter[str]
    first: str
    last: str


def events_over_time(events_path: Path) -> str:
    """Draw how many events happened when, by type.

    Bars are minutes when all events lie within two hours, else hours; days beyond two weeks, years beyond three years.

    Args:
        events_path: Folder of Parquet files with the columns ``type`` and ``created_at`` (ISO 8601, UTC).

    Returns:
        Markdown with one PNG image as a data URI; a sentence where there is no event.
    """
    summary = _summarize(events_path)
    if summary is None:
        return "No event to plot."
    grain = _grain(summary)
    shown = [kind for kind, _ in summary.types.most_common(_TOP_TYPES)]
    image = _draw(_count(events_path, grain, shown), grain, summary, shown)
    return f"![Events per {grain.name} by type](data:image/png;base64,{base64.b64encode(image).decode('ascii')})"


def _batches(events_path: Path) -> Iterator[pa.RecordBatch]:
    """Yield the two columns of all files, a bounded number of rows at a time."""
    import pyarrow.parquet as pq

    for part in sorted(events_path.glob("*.parquet")):
        with pq.ParquetFile(part) as file:
            yield from file.iter_batches(batch_size=_BATCH, columns=["type", "created_at"])


def _summarize(events_path: Path) -> _Summary | None:
    import pyarrow.compute as pc

    types: Counter[str] = Counter()
    times: list[str] = []
    for batch in _batches(events_path):
        if not len(batch):
            continue
        for entry in pc.value_counts(batch.column("type")).to_pylist():
            types[entry["values"]] += entry["counts"]
        ends = pc.min_max(batch.column("created_at")).as_py()
        times = [min([*times, ends["min"]]), max([*times, ends["max"]])]
    return _Summary(types, *times) if times else None


def _grain(summary: _Summary) -> _Grain:
    span = datetime.fromisoformat(summary.last) - datetime.fromisoformat(summary.first)
    return next(grain for grain in _GRAINS if span <= grain.longest)


def _count(events_path: Path, grain: _Grain, shown: list[str]) -> Counter[tuple[str, str]]:
    """Count the events by type and by the start of their bar; types that are not shown are one."""
    import pyarrow as pa
    import pyarrow.compute as pc

    counts: Counter[tuple[str, str]] = Counter()
    known = pa.array(shown, pa.string())
    for batch in _batches(events_path):
        kind = batch.column("type")
        kind = pc.if_else(pc.is_in(kind, value_set=known), kind, pa.scalar(_OTHER))
        bar = pc.utf8_slice_codeunits(batch.column("created_at"), 0, grain.digits)
        grouped = pa.table({"kind": kind, "bar": bar}).group_by(["kind", "bar"]).aggregate([([], "count_all")])
        for row in grouped.to_pylist():
            counts[row["kind"], row["bar"]] += row["count_all"]
    return counts


def _draw(counts: Counter[tuple[str, str]], grain: _Grain, summary: _Summary, shown: list[str]) -> bytes:
    """Return the stacked bars as a PNG."""
    import matplotlib.dates
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    unit: Any = f"datetime64[{grain.unit}]"
    edges = np.arange(summary.first[: grain.digits], np.datetime64(summary.last[: grain.digits]) + 2, dtype=unit)
    # Its functions have no types.
    dates: Any = matplotlib.dates
    positions = dates.date2num(edges)
    # Figure without pyplot draws with Agg and has no global state.
    figure = Figure(figsize=(8, 3.2), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    floor = np.zeros(len(edges) - 1)
    rest = [_OTHER] if any(kind == _OTHER for kind, _ in counts) and _OTHER not in shown else []
    for kind, color in zip([*shown, *rest], _COLORS, strict=False):
        bars = {bar: count for (of, bar), count in counts.items() if of == kind}
        top = floor.copy()
        top[(np.array(list(bars), dtype=unit) - edges[0]).astype(int)] += list(bars.values())
        axes.stairs(top, positions, baseline=floor, fill=True, color=color, label=_label(kind))
        floor = top
    axes.set_title(f"Events per {grain.name} by type, {summary.types.total():,} in all", fontsize=11)
    axes.set_xlabel("created_at (UTC)", fontsize=9)
    axes.set_ylabel(f"events per {grain.name}", fontsize=9)
    locator = dates.AutoDateLocator(maxticks=10)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    # Matplotlib supports no date after the year 9999.
    axes.set_xlim(positions[0], min(positions[-1], dates.date2num(np.datetime64("9999-12-31"))))
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, reverse=True)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _label(kind: str) -> str:
    """Return a type as the legend can show it: short, ASCII, no formula, and not hidden by an underscore."""
    text = "".join(char if char.isascii() and char.isprintable() else "?" for char in kind[:_LABEL_LIMIT])
    return (f" {text}" if text.startswith("_") else text).replace("$", r"\$")
