"""Spark's JVM: no banner that nobody can act on, its words in our log, and the cause where it does not start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from ghsync_dagster_tests.support.long_campaign import HANG_SECONDS

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.integration

SESSION = """
import sys
from ghsync_dagster.logging import configure_logging
from ghsync_dagster.settings import load_settings
from ghsync_dagster.wiring import spark_handle
settings = load_settings()
configure_logging(settings)
session = spark_handle(settings).session()
session._jvm.System.err.println("a word with mongodb://u:s3cret@h")
print(session.range(3).count())
session.stop()
"""


def start(home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Start a session in a process of its own, and end it."""
    given = {**os.environ, "GHSYNC_HOME": str(home), **more}
    command = [sys.executable, "-c", SESSION]
    return subprocess.run(command, env=given, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)


def test_what_the_jvm_prints_is_a_log_line_and_its_banners_are_none(tmp_path: Path) -> None:
    ended = start(tmp_path)
    assert (ended.returncode, ended.stdout) == (0, "3\n"), ended.stderr
    told = [line for line in map(json.loads, ended.stderr.splitlines()) if line["logger"] == "ghsync.spark"]
    assert [line["event"] for line in told] == ["a word with mongodb://***@h"]


def test_a_jvm_that_does_not_start_is_told_by_its_own_words(tmp_path: Path) -> None:
    ended = start(tmp_path, SPARK_DRIVER_JAVA_OPTIONS="-XX:MaxMetaspaceSize=much")
    assert ended.returncode == 1
    assert "ConfigError: Spark's JVM does not start (" in ended.stderr
    assert "MaxMetaspaceSize" in ended.stderr.partition("does not start (")[2]
