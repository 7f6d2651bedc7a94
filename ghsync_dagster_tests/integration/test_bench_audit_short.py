"""The benchmark of the audit, short: both builds find what was planted, and changes in flight are no difference."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from benchmarks import harness

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration


def test_both_builds_find_what_was_planted_and_no_more_under_changes(tmp_path: Path) -> None:
    out = tmp_path / "audit.json"
    # This build in the place of the earlier one, which a shallow clone lacks.
    options = ["--users", "3000", "--rounds", "1", "--rate", "100", "--before", str(harness.PROJECT), "--out", str(out)]
    command = [sys.executable, "-m", "benchmarks.audit", *options]
    done = subprocess.run(command, cwd=harness.PROJECT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    (ours,) = found["ours"]
    assert (ours["missing"], ours["extra"], ours["different"], ours["rows"]) == (4, 3, 3, 3_000)
    # Each side sends something, and MySQL not its rows.
    assert 0 < ours["mysql_bytes"] < ours["mongo_bytes"]
    assert len(found["under_changes"]) > 1
    assert all(run["missing"] == run["extra"] == run["different"] == 0 for run in found["under_changes"])
    assert max(run["rows"] for run in found["under_changes"]) > 3_000
