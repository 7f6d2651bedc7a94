"""Reports and folders between the steps: published whole or not at all, damaged ones told, old ones removed."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ghsync_dagster.batch.reports import (
    Artifacts,
    FileCount,
    FlattenReport,
    LeftOut,
    LoadReport,
    ReadReport,
    count_rows,
)
from ghsync_dagster.batch.summary import batch_summary, draw
from ghsync_dagster.domain.errors import ConfigError

READ = ReadReport(
    events_path="/e",
    quarantine_path="/q",
    files=[FileCount("/in/ü.json", 4)],
    lines=4,
    events=2,
    quarantined=1,
    blank=1,
    reasons={"login is missing": 1},
    seconds=1.5,
)
FLATTEN = FlattenReport("/u", 2, 0.25)
LOAD = LoadReport(
    load_id="l",
    run_id="r",
    users_path="/u",
    users=2,
    inserted=1,
    replaced=1,
    confirmed=0,
    left={},
    expected_marked=2,
    marked=2,
    marker_lost=0,
    lost=[],
    missing=0,
    reconciled=0,
    unresolved=0,
    offenders=[],
    unmarked=2,
    recovered={},
    phases={"write": 0.5},
    seconds=1,
)


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    return Artifacts(tmp_path / "batch")


@pytest.mark.parametrize("report", [READ, FLATTEN, LOAD], ids=lambda report: type(report).__name__)
def test_a_published_report_is_the_newest_of_its_step(artifacts: Artifacts, report: FlattenReport) -> None:
    assert artifacts.find(type(report)) is None
    artifacts.publish(report)
    assert artifacts.newest(type(report)) == report
    other = msgspec.structs.replace(report, seconds=99.0)
    artifacts.publish(other)
    assert artifacts.newest(type(report)) == other
    assert [entry.suffix for entry in artifacts.root.iterdir()] == [".json"]


def test_the_steps_do_not_mix(artifacts: Artifacts) -> None:
    artifacts.publish(READ)
    artifacts.publish(FLATTEN)
    artifacts.publish(LOAD)
    assert (artifacts.newest(ReadReport), artifacts.newest(FlattenReport), artifacts.newest(LoadReport)) == (
        READ,
        FLATTEN,
        LOAD,
    )


@pytest.mark.parametrize("kind", [ReadReport, FlattenReport, LoadReport])
def test_a_step_that_has_not_run_is_one_clear_error(artifacts: Artifacts, kind: type[FlattenReport]) -> None:
    with pytest.raises(ConfigError, match=f"no {kind.__name__} in .*nothing has been materialized") as caught:
        artifacts.newest(kind)
    assert "users_batch_job" in caught.value.way_out


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"users": "many"}', b"\xff\xff", b"null"])
def test_a_damaged_report_is_one_clear_error_that_names_it(artifacts: Artifacts, damage: bytes) -> None:
    artifacts.publish(FLATTEN)
    (path,) = artifacts.root.iterdir()
    path.write_bytes(damage)
    for ask in (artifacts.find, artifacts.newest):
        with pytest.raises(ConfigError, match=f"{path} is damaged") as caught:
            ask(FlattenReport)
        assert "Remove it" in caught.value.way_out


def _publish_many(root: str, users: int) -> None:
    for _ in range(200):
        Artifacts(Path(root)).publish(FlattenReport("/u" * users, users, 0.0))


def test_a_reader_never_sees_half_a_report(artifacts: Artifacts) -> None:
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=_publish_many, args=(str(artifacts.root), size)) for size in (10, 20_000)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        if report := artifacts.find(FlattenReport):
            assert report.users_path == "/u" * report.users
            seen.add(report.users)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert seen <= {10, 20_000}
    assert artifacts.newest(FlattenReport).users in {10, 20_000}


def test_a_killed_publish_leaves_the_last_report(artifacts: Artifacts) -> None:
    artifacts.publish(FLATTEN)
    (artifacts.root / "flatten.12345.part").write_bytes(b'{"users_pa')
    assert artifacts.newest(FlattenReport) == FLATTEN


def test_old_folders_are_removed_but_for_the_newest(artifacts: Artifacts) -> None:
    folders = []
    for age in range(6, 0, -1):
        folder = artifacts.new_folder("events")
        (folder / "part.parquet").write_text("x")
        os.utime(folder, (1e9 - age, 1e9 - age))
        folders.append(folder)
    last = artifacts.new_folder("events")
    assert {entry.name for entry in last.parent.iterdir()} == {folders[-2].name, folders[-1].name, last.name}
    assert list(last.iterdir()) == []


def test_published_data_outlives_any_number_of_runs_that_fail(artifacts: Artifacts) -> None:
    good = artifacts.new_folder("users")
    artifacts.publish(FlattenReport(str(good), 2, 0.25))
    os.utime(good, (5e8, 5e8))
    for age in range(9, 0, -1):
        os.utime(artifacts.new_folder("users"), (1e9 - age, 1e9 - age))
    assert good.is_dir()
    assert len(list(good.parent.iterdir())) == 4


def test_a_young_folder_is_kept_for_the_run_that_waits_with_it(artifacts: Artifacts) -> None:
    waiting = artifacts.new_folder("users")
    for _ in range(6):
        artifacts.new_folder("users")
    assert waiting.is_dir()


def test_a_run_finds_its_own_reports_whatever_others_publish(tmp_path: Path) -> None:
    mine, others, any_run = Artifacts(tmp_path, "mine"), Artifacts(tmp_path, "others"), Artifacts(tmp_path)
    mine.publish(FlattenReport("mine", 1, 0.0))
    others.publish(FlattenReport("others", 2, 0.0))
    assert mine.newest(FlattenReport).users_path == "mine"
    assert others.newest(FlattenReport).users_path == "others"
    assert any_run.newest(FlattenReport).users_path == "others"
    assert mine.own(ReadReport) is None
    others.publish(READ)
    assert mine.own(ReadReport) is None
    assert mine.newest(ReadReport) == READ


def test_steps_have_folders_of_their_own(artifacts: Artifacts) -> None:
    folders = [artifacts.new_folder(step) for step in ("events", "users", "load")]
    assert [folder.parent.name for folder in folders] == ["events", "users", "load"]
    assert all(folder.is_dir() for folder in folders)


@given(st.integers(0, 1_000), st.integers(0, 1_000), st.integers(0, 1_000))
def test_the_ratio_is_among_the_lines_that_are_not_blank(events: int, quarantined: int, blank: int) -> None:
    report = msgspec.structs.replace(READ, events=events, quarantined=quarantined, blank=blank)
    assert 0 <= report.quarantined_ratio <= 1
    assert report.quarantined_ratio * (events + quarantined) == pytest.approx(quarantined)


def test_rows_are_counted_over_all_parts(tmp_path: Path) -> None:
    assert count_rows(tmp_path) == 0
    for part, rows in enumerate((3, 0, 4)):
        pq.write_table(pa.table({"a": list(range(rows))}), tmp_path / f"part-{part}.parquet")
    (tmp_path / "_SUCCESS").touch()
    assert count_rows(tmp_path) == 7


def test_what_is_left_out_is_told_in_the_summary(artifacts: Artifacts) -> None:
    names = [f"/in/{number}.txt" for number in range(20)]
    artifacts.publish(msgspec.structs.replace(READ, left_out=[LeftOut("no [b]known[/b] name", 1_234, names)]))
    summary = batch_summary(artifacts, [], ok=True)
    assert summary["left_out"] == [{"reason": "no [b]known[/b] name", "files": 1_234, "names": names}]
    drawn = io.StringIO()
    Console(file=drawn, width=300).print(draw(summary))
    shown = "1,234 file(s), no [b]known[/b] name: /in/0.txt, /in/1.txt, /in/2.txt, /in/3.txt, /in/4.txt and 1,229 more"
    assert shown in drawn.getvalue()


@pytest.mark.parametrize(
    ("phases", "names"),
    [
        ({"jvm_start": 6.25}, "start of Spark 6.2, read 1.5, flatten 0.2, load: write 0.5, rest (checks) 1.5"),
        ({}, "read 1.5, flatten 0.2, load: write 0.5, rest (start of Spark, checks) 7.8"),
    ],
)
def test_the_phases_that_are_drawn_add_up_to_the_total(
    artifacts: Artifacts, phases: dict[str, float], names: str
) -> None:
    for report in (READ, FLATTEN, LOAD):
        artifacts.publish(report)
    drawn = io.StringIO()
    Console(file=drawn, width=200).print(draw(batch_summary(artifacts, [], ok=True, seconds=10.0, phases=phases)))
    lines = [line.strip() for line in drawn.getvalue().splitlines()]
    assert re.sub(" +", " ", next(line for line in lines if line.startswith("seconds"))) == f"seconds {names}"
    assert re.search("^total seconds +10.0$", "\n".join(lines), re.MULTILINE)
    drawn = io.StringIO()
    Console(file=drawn, width=200).print(draw(batch_summary(artifacts, [], ok=True)))
    assert "rest (" not in drawn.getvalue()


def test_a_report_of_an_earlier_version_is_read(artifacts: Artifacts) -> None:
    artifacts.publish(READ)
    file = artifacts.root / "read.json"
    old = {name: value for name, value in json.loads(file.read_text()).items() if name not in ("bytes", "left_out")}
    file.write_text(json.dumps(old))
    assert artifacts.newest(ReadReport) == READ


def test_what_comes_from_the_input_is_no_markup_in_the_summary() -> None:
    reason = "key [/x] stands more than once, with an optional [bot]"
    check = {"check": "quarantine", "passed": False, "summary": "1 line [/y]", "way_out": "Mend [/z]."}
    summary = {
        "checks": [check],
        "lines": 2,
        "files": ["a.json"],
        "events": 1,
        "quarantined": 1,
        "left_out": [],
        "phases": {},
    }
    drawn = io.StringIO()
    Console(file=drawn, width=200).print(draw(summary | {"reasons": {reason: 1}}))
    for words in (f"{reason}: 1", "1 line [/y]", "way out: Mend [/z].", "FAILED"):
        assert words in drawn.getvalue()
