"""The Dagster UI as a script starts it: told once it serves, and ended by SIGTERM with everything below it."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

from ghsync_dagster_tests.support.cdc_parts import free_port
from ghsync_dagster_tests.support.process_parts import left_by_a_signal

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration
IN_THE_BACKGROUND = 'trap \'\' INT; exec "$0" "$@" 2>dev.log'
"""What a shell without a terminal does for a command with an ampersand."""
SERVED_SECONDS, ENDED_SECONDS = 180.0, 60.0


def test_a_script_ends_the_ui_with_everything_below_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GHSYNC_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MONGODB_URI", "mongodb://127.0.0.1:1")
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    port, told = free_port(), tmp_path / "dev.log"
    command = [sys.executable, "-m", "ghsync_dagster.cli", "dev", "--port", str(port)]
    code, output, left = left_by_a_signal(
        ["sh", "-c", IN_THE_BACKGROUND, *command],
        tmp_path,
        lambda family: len(family) > 2 and "Dagster UI: " in told.read_text(encoding="utf-8"),
        SERVED_SECONDS,
        ENDED_SECONDS,
    )
    before, served, after = told.read_text(encoding="utf-8").partition(f"Dagster UI: http://127.0.0.1:{port}\n")
    first, *between = before.splitlines()
    assert first == f"The Dagster UI comes up on http://127.0.0.1:{port}. Ctrl-C ends it."
    assert [line for line in between if not line.startswith("The Dagster UI comes up: ")] == []
    # Dagster may have a word of its own for what the signal met.
    assert (bool(served), "Traceback" in after) == (True, False), after
    assert (code, output, left) == (os.EX_OK, "", [])
