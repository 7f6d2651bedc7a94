"""A file that shares servers names them at its head, or no test of the run begins; who shares, runs in one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ghsync_dagster_tests.support import servers

ROOT = Path(__file__).parents[2]
NAMED = 'pytestmark = pytest.mark.servers("{}")'
TEST = """
import pytest
{head}

@pytest.fixture
def spark(): pass

def test_it({fixtures}): pass
"""


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", servers.__name__, *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("head", "fixtures", "said"),
    [
        (NAMED.format("spark"), "spark", ""),
        ("", "", ""),
        ("", "spark", f"shares the servers of spark; put at its head: {NAMED.format('spark')}"),
        (NAMED.format("stream"), "spark", "shares the servers of spark"),
        (NAMED.format("sparc"), "spark", "no servers are named sparc; the names are spark, stream, stack, source"),
        ('pytestmark = [\n    pytest.mark.servers("spark")\n]', "spark", "name the servers once, on one line"),
    ],
    ids=["named", "none", "unnamed", "another", "unknown", "unreadable"],
)
def test_what_shares_servers_without_naming_them_is_refused(
    tmp_path: Path, head: str, fixtures: str, said: str
) -> None:
    (tmp_path / "test_it.py").write_text(TEST.format(head=head, fixtures=fixtures))
    done = run(tmp_path, "--collect-only", "test_it.py")
    assert done.returncode == (pytest.ExitCode.USAGE_ERROR if said else pytest.ExitCode.OK), done.stdout + done.stderr
    assert said in done.stdout + done.stderr


def test_files_that_share_servers_run_first_and_in_one_process(tmp_path: Path) -> None:
    heads = {"a": "", "b": NAMED.format("stack"), "c": "", "d": NAMED.format("stack"), "e": NAMED.format("spark")}
    for name, head in heads.items():
        (tmp_path / f"test_{name}.py").write_text(TEST.format(head=head, fixtures=""))
    listed = run(tmp_path, "--collect-only", "-q").stdout
    assert [line[5] for line in listed.splitlines() if "::" in line] == list("ebdac")
    done = run(tmp_path, "-v", "-n", "3", "--dist", "loadfile", "--no-loadscope-reorder")
    by = {line.split("test_")[1][0]: line[:5] for line in done.stdout.splitlines() if "PASSED" in line}
    assert by.keys() == heads.keys()
    assert by["b"] == by["d"]
