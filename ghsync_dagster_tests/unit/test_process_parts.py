"""How tests look at processes: one that fails does not wait for what it started."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import psutil
import pytest

from ghsync_dagster_tests.support.process_parts import left_by_a_signal

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

IN_ITSELF = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"


def test_what_is_never_at_work_is_ended_with_all_below_it(tmp_path: Path) -> None:
    seen: set[psutil.Process] = set()

    def is_at_work(family: Collection[psutil.Process]) -> bool:
        seen.update(family)
        return False

    began = time.monotonic()
    with pytest.raises(AssertionError, match="never at work"):
        left_by_a_signal([sys.executable, "-c", IN_ITSELF], tmp_path, is_at_work, seconds=2)
    assert time.monotonic() - began < 60
    assert seen
    assert psutil.wait_procs(list(seen), timeout=10)[1] == []
