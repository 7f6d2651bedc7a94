"""A library that hangs ends neither the process nor the run of the tests: what does, with which exit code, how soon."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from ghsync_dagster_tests.support import hanging

ROOT = Path(__file__).parents[2]
PYTEST = (sys.executable, "-m", "pytest")
_SECONDS = 60

CONSUMER = """
import ctypes, sys, threading
from ghsync_dagster import stopping
from ghsync_dagster.cli import app as cli
from ghsync_dagster.cli import cdc as cli_cdc
from ghsync_dagster.domain.errors import PermanentError, UnavailableError
from ghsync_dagster.stores.kafka import consumer as kafka_consumer
from ghsync_dagster.stores.kafka.client import KafkaSettings

class Client:
    def __init__(self, config): pass
    def subscribe(self, *_, **__): pass
    def unsubscribe(self): pass
    def poll(self, seconds): pass
    def close(self): {close}

kafka_consumer.Consumer = Client
kafka_consumer._LEAVE_SECONDS = 0.5

def consume(**_):
    kafka = KafkaSettings("h:9", "t", "g", session_timeout_seconds=0.5)
    nothing = lambda partitions: None
    consumer = kafka_consumer.TopicConsumer(kafka, assigned=nothing, revoked=nothing, lost=nothing)
    with stopping.killed_when_frozen(2):
        try:
            {ends}
        finally:
            consumer.close()

cli_cdc._consume = consume
sys.argv = ["ghsync", "cdc", "drain"]
{runs}
"""
FOR_EVER = "threading.Event().wait()"
HOLDS_THE_LOCK = "ctypes.PyDLL(None).sleep(600)"


def ended(program: str, folder: Path) -> tuple[int, float, str]:
    """Run a program; return its exit code, its seconds, and what it said."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GHSYNC_")}
    began = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=_SECONDS,
    )
    return process.returncode, time.monotonic() - began, process.stdout + process.stderr


@pytest.mark.parametrize(
    ("ends", "code", "said"),
    [
        ("pass", 0, ""),
        ("raise UnavailableError('away', way_out='wait')", 3, "error: away"),
        ("raise PermanentError('wrong', way_out='correct it')", 2, "error: wrong"),
        ("raise RuntimeError('a fault')", 70, "a fault"),
        ("raise SystemExit(143)", 143, ""),
    ],
)
def test_a_client_that_never_closes_keeps_no_command_from_ending_with_its_own_exit_code(
    tmp_path: Path, ends: str, code: int, said: str
) -> None:
    program = CONSUMER.format(close=FOR_EVER, ends=ends, runs="cli.main()")
    found, seconds, told = ended(program, tmp_path)
    sys.stdout.write(f"exit code {found} after {seconds:.1f} s\n")
    assert found == code
    assert said in told
    assert f"ended with exit code {code}, though the Kafka client does not close: group g" in told
    assert seconds < _SECONDS / 2


def test_a_process_of_dagster_ends_by_itself_past_a_client_that_never_closes(tmp_path: Path) -> None:
    code, _, told = ended(CONSUMER.format(close=FOR_EVER, ends="pass", runs="consume()"), tmp_path)
    assert code == 0
    assert "library hangs; abandoning its thread" in told


def test_a_client_that_holds_the_interpreters_lock_for_ever_is_ended_by_the_system(tmp_path: Path) -> None:
    code, seconds, told = ended(CONSUMER.format(close=HOLDS_THE_LOCK, ends="pass", runs="cli.main()"), tmp_path)
    sys.stdout.write(f"exit code {code} after {seconds:.1f} s\n")
    assert code == -signal.SIGALRM
    assert "in close" in told


HANGS = """
import ctypes
import pytest

@pytest.mark.timeout(1)
def test_hangs():
    library, mutex = ctypes.{library}(None), ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    # No signal ends this wait.
    library.pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize("library", ["CDLL", "PyDLL"])
@pytest.mark.parametrize("processes", [0, 1])
def test_a_test_that_hangs_in_a_library_fails_the_run_within_its_timeout(
    tmp_path: Path, library: str, processes: int
) -> None:
    (tmp_path / "test_it.py").write_text(textwrap.dedent(HANGS).format(library=library))
    began = time.monotonic()
    run = subprocess.run(
        [*PYTEST, "-p", hanging.__name__, "-n", str(processes), "--max-worker-restart=1", "test_it.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=_SECONDS,
    )
    sys.stdout.write(f"exit code {run.returncode} after {time.monotonic() - began:.1f} s\n")
    assert run.returncode == 1
    assert "in test_hangs" in run.stdout + run.stderr
