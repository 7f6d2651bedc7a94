"""The benchmark of files, short: every reader reads every event of every input, and the ratios have their targets."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from benchmarks import files, files_once, harness
from ghsync_dagster_tests.support.long_campaign import LONG

if TYPE_CHECKING:
    from pathlib import Path

    from ghsync_dagster.stores.spark import SparkHandle

pytestmark = [pytest.mark.integration, pytest.mark.servers("spark")]


def read(reader: str, name: str, seconds: float) -> files.Read:
    return files.Read(reader, name, seconds, cpu_seconds=seconds, peak_mb=100.0, foreign_cores=0.0)


def test_ratios_compare_medians_and_know_their_targets() -> None:
    inputs = ["day", "day gz", "24 gz", "plain", "gz", "200 gz", "files of one event", "28,600", "286,000"]
    seconds = {"day": 10.0, "24 gz": 12.0, "plain": 2.0, "gz": 4.0, "200 gz": 2.8, "files of one event": 9.0}
    reads = [read("ours", name, seconds.get(name, 1.0)) for name in inputs]
    reads += [read("ours", "day", seconds) for seconds in (1.0, 90.0)]
    reads += [read("earlier", name, 3.0) for name in inputs]
    reads.append(read("spark", "files of one event", 10.0))
    found = {ratio.words: (ratio.value, ratio.met) for ratio in files.judge(reads, inputs)}
    assert found["ours: 200 gz / ours: plain"] == (1.4, True)
    assert found["ours: 24 gz / ours: day"] == (1.2, False)
    assert found["ours: files of one event / spark: files of one event"] == (0.9, True)
    assert found["ours: 286,000 / earlier: 286,000"] == (0.333, True)
    assert found["ours: 200 gz / earlier: 200 gz"][1] is None


def test_each_reader_reads_every_event(tmp_path: Path, spark: SparkHandle) -> None:
    inputs = files.write_inputs(tmp_path, 0.002)
    assert sum(1 for _ in (tmp_path / "250-files").iterdir()) == 250
    assert len(files.plan(list(inputs))) == 16
    for number, (reader, name) in enumerate(files.plan(list(inputs))):
        if reader != "earlier":
            read_by = files_once.read_spark if reader == "spark" else files_once.read_ours
            one = inputs[name]
            assert read_by(spark.session(), str(one.path), tmp_path / f"out-{number}") == one.events, name


@LONG
@pytest.mark.faults
def test_the_whole_benchmark_runs(tmp_path: Path) -> None:
    # This build in the place of the earlier one, which a shallow clone lacks.
    out = tmp_path / "files.json"
    options = ["--scale", "0.005", "--rounds", "1", "--before", str(harness.PROJECT), "--out", str(out)]
    command = [sys.executable, "-m", "benchmarks.files", *options]
    done = subprocess.run(command, cwd=harness.PROJECT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(out.read_text())
    assert len(document["ratios"]) == 10
    assert {row["reader"] for row in document["summary"]} == {"ours", "earlier", "spark"}
    assert all(min(row["seconds"], row["cpu_seconds"], row["peak_mb"]) > 0 for row in document["summary"])
