"""The plot of events over time: what it counts, how wide its bars are, and what it costs."""

from __future__ import annotations

import base64
import re
import struct
import time
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ghsync_dagster.batch import plots
from ghsync_dagster.batch.plots import events_over_time

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_IMAGE = re.compile(r"!\[(?P<alt>[^\]]+)\]\(data:image/png;base64,(?P<png>[A-Za-z0-9+/=]+)\)")


def write(folder: Path, *files: Sequence[tuple[str, str]]) -> Path:
    """Write files of (type, created_at) as the events of a read are kept, with a column that no plot needs."""
    folder.mkdir(exist_ok=True)
    schema = pa.schema([(name, pa.string()) for name in ("type", "created_at", "id")])
    for number, events in enumerate(files):
        rows = [{"type": kind, "created_at": at, "id": "1"} for kind, at in events]
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / f"part-{number:05}.parquet")
    (folder / "_SUCCESS").touch()
    return folder


def image_of(markdown: str) -> tuple[str, bytes]:
    """Return the words and the PNG of a plot that is nothing but one image."""
    found = _IMAGE.fullmatch(markdown)
    assert found
    return found["alt"], base64.b64decode(found["png"], validate=True)


def test_the_plot_is_one_small_png_in_the_markdown(tmp_path: Path) -> None:
    events = [(f"{name}Event", f"2015-01-01T{hour:02}:30:00Z") for hour in range(24) for name in "ABCDEFGH"]
    _, png = image_of(events_over_time(write(tmp_path / "events", events)))
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.endswith(b"IEND\xaeB`\x82")
    assert struct.unpack(">II", png[16:24]) == (800, 320)
    assert len(png) < 40_000


@pytest.mark.parametrize(
    ("first", "last", "grain"),
    [
        ("2015-01-01T15:00:00Z", "2015-01-01T15:00:00Z", "minute"),
        ("2015-01-01T23:30:00Z", "2015-01-02T01:30:00Z", "minute"),
        ("2015-01-01T15:00:00Z", "2015-01-01T17:00:01Z", "hour"),
        ("2014-12-31T23:59:59Z", "2015-01-14T23:59:59Z", "hour"),
        ("2015-01-01T00:00:00Z", "2015-03-01T00:00:00Z", "day"),
        ("1970-01-01T00:00:00Z", "2026-12-31T23:59:59Z", "year"),
        ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "year"),
    ],
)
def test_bars_are_as_wide_as_suits_the_span(tmp_path: Path, first: str, last: str, grain: str) -> None:
    alt, _ = image_of(events_over_time(write(tmp_path / "events", [("PushEvent", last)], [("PushEvent", first)])))
    assert alt == f"Events per {grain} by type"


def test_the_five_most_frequent_types_are_named_and_the_rest_is_one(tmp_path: Path) -> None:
    hours = ("2015-01-01T03", "2015-01-01T04")
    events = [
        (f"T{kind}", f"{hour}:{minute:02}:00Z")
        for kind in range(7)
        for hour in hours
        for minute in range(50 - 2 * kind - (hour == hours[1]))
    ]
    folder = write(tmp_path / "events", events[::2], [], events[1::2])
    summary = plots._summarize(folder)
    assert summary is not None
    assert summary.types.total() == len(events)
    assert (summary.first, summary.last) == ("2015-01-01T03:00:00Z", "2015-01-01T04:48:00Z")
    shown = [kind for kind, _ in summary.types.most_common(5)]
    assert shown == ["T0", "T1", "T2", "T3", "T4"]
    counts = plots._count(folder, plots._GRAINS[1], shown)
    assert counts == {
        **{(f"T{kind}", hour): 50 - 2 * kind - (hour == hours[1]) for kind in range(5) for hour in hours},
        ("other", hours[0]): 40 + 38,
        ("other", hours[1]): 39 + 37,
    }


@pytest.mark.parametrize("kind", ["$\\frac{x$", "_hidden", "a" * 5_000, "星\n\x00", "other", "<b>&", "%s {}"])
def test_any_text_may_be_a_type(tmp_path: Path, kind: str) -> None:
    at = "2015-01-01T15:00:00Z"
    image_of(events_over_time(write(tmp_path / "events", [(kind, at), *((f"T{number}", at) for number in range(9))])))


@pytest.mark.parametrize("files", [0, 2])
def test_no_event_is_a_sentence(tmp_path: Path, files: int) -> None:
    assert events_over_time(write(tmp_path / "events", *([] for _ in range(files)))) == "No event to plot."


def test_a_large_input_costs_well_under_two_seconds_and_little_memory(tmp_path: Path) -> None:
    kinds = ["PushEvent"] * 5 + ["CreateEvent", "WatchEvent", "IssuesEvent", "ForkEvent", "GollumEvent", "MemberEvent"]
    events = [
        (kinds[number % len(kinds)], f"2015-01-{1 + number % 3:02}T{number % 24:02}:{number % 60:02}:00Z")
        for number in range(286_000)
    ]
    folder = write(tmp_path / "events", events)
    del events
    events_over_time(folder)  # the first call imports matplotlib
    before = pa.total_allocated_bytes()
    started = time.process_time()
    events_over_time(folder)
    assert time.process_time() - started < 2
    assert pa.total_allocated_bytes() - before < 1_000_000
