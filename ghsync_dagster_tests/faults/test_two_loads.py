"""Real ``ghsync batch`` processes: two at once, and one that is asked to stop in the middle.

With ``TEST_FAULT_ROUNDS`` set, a load is stopped by each signal at each moment, and a Dagster run by each signal.
Without it only a Dagster run is stopped, by one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from ghsync_dagster.batch.lease import QUIET_SECONDS, hold_lease
from ghsync_dagster.stores.mongo.client import LEASES
from ghsync_dagster_tests.support.long_campaign import LONG, ROUNDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ghsync_dagster.batch.flow import BatchFlow
    from ghsync_dagster.stores.mongo.users import UserStore
from ghsync_dagster.stores.mongo.books import LeaseBook

pytestmark = [pytest.mark.faults, pytest.mark.servers("spark")]

ASKED: dict[signal.Signals, int] = {signal.SIGTERM: 143, signal.SIGINT: 130}
EVERY = [(number, moment) for number in ASKED for moment in ("reading", "inserting")]
SECONDS = 240
GIVEN_UP = 3
USERS = 6_000


@dataclass
class Batch:
    """A ``ghsync batch`` process."""

    process: subprocess.Popen[bytes]
    log: Path
    home: Path

    def said(self) -> str:
        """Return what it wrote so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_until(self, what: str, happened: Callable[[], bool]) -> None:
        """Wait for what only this process can bring about."""
        deadline = time.monotonic() + SECONDS
        while not happened():
            assert self.process.poll() is None, f"it ended before {what}: {self.said()[-3000:]}"
            assert time.monotonic() < deadline, f"no {what} in {SECONDS} s: {self.said()[-3000:]}"
            time.sleep(0.02)

    def end(self) -> int:
        """Wait for its end; return its exit code."""
        return self.process.wait(SECONDS)

    def left_behind(self) -> list[psutil.Process]:
        """Return the processes that name its home: its JVM and Python workers."""
        return [process for process in psutil.process_iter() if self._is_of_it(process)]

    def _is_of_it(self, process: psutil.Process) -> bool:
        try:
            named = str(self.home) in " ".join(process.cmdline())
            return named and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


@pytest.fixture
def batch(mongo_uri: str, database: str, tmp_path: Path) -> Iterator[Callable[..., Batch]]:
    """Return a function that starts ``ghsync batch``, or ``ghsync run``, on one file; none outlives the test."""
    started: list[Batch] = []

    def start(file: Path, arguments: Sequence[str] = ("batch",), home: Path | None = None, **settings: str) -> Batch:
        home = home or tmp_path / f"home-{len(started)}"
        log = tmp_path / f"log-{len(started)}"
        environment = os.environ | {
            "GHSYNC_HOME": str(home),
            "MONGODB_URI": mongo_uri,
            "MONGODB_DATABASE": database,
            "GHSYNC_LOG_FORMAT": "json",
            **settings,
        }
        command = [str(Path(sys.executable).with_name("ghsync")), *arguments, str(file)]
        with log.open("wb") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        started.append(Batch(process, log, home))
        return started[-1]

    yield start
    for one in started:
        for process in (one.process, *one.left_behind()):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        one.process.wait()


def write(file: Path, lines: Sequence[str]) -> Path:
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def newest_logins(*files: Path) -> dict[str, str]:
    """Return the login of each user's newest event, by ``json`` alone."""
    events = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    events.sort(key=lambda event: (event["created_at"], int(event["id"])))
    return {str(event["actor"]["id"]): event["actor"]["login"] for event in events}


def assert_stored(store: UserStore, expected: dict[str, str]) -> None:
    stored: list[dict[str, Any]] = list(store.users.find())
    assert len(stored) == len(expected)
    assert {found["user_id"]: found["login"] for found in stored} == expected
    assert not any("spark_temp" in found for found in stored)
    assert set(store.book("versions").distinct("_id")) == expected.keys()
    assert store.book("undo").count_documents({}) == 0
    assert store.database[LEASES].count_documents({}) == 0
    assert store.book("loads").distinct("state") == ["done"]


def assert_lease_ends_soon(store: UserStore) -> None:
    """Hold that the lease ends with the quiet time after the last command."""
    lease = LeaseBook(store).current("load:Users")
    assert lease is not None
    assert (lease.expires_at - LeaseBook(store).server_time()).total_seconds() <= QUIET_SECONDS


@contextmanager
def lease_held(store: UserStore) -> Iterator[None]:
    """Hold the lease, so that whoever comes must wait."""
    with hold_lease(store, wait_seconds=0):
        yield


def test_two_loads_at_once_go_one_after_the_other_and_end_in_the_newest_state(
    batch: Callable[..., Batch], store: UserStore, tmp_path: Path, event_line: Callable[..., str]
) -> None:
    early = [event_line(key, f"early-{key}", "2015-01-01T15:00:00Z", key) for key in range(1, 1_500)]
    late = [event_line(key, f"late-{key}", "2015-01-01T16:00:00Z", key) for key in range(1_000, 2_500)]
    files = [write(tmp_path / "early.json", early), write(tmp_path / "late.json", late)]
    with lease_held(store):
        # In one home, where each must load what it has read itself.
        both = [batch(file, home=tmp_path / "shared") for file in files]
        for one in both:
            one.wait_until("waiting", lambda one=one: "waiting for another load" in one.said())  # type: ignore[misc]
        assert store.users.count_documents({}) == 0
    for one in both:
        assert one.end() == 0, one.said()[-3000:]
    assert_stored(store, newest_logins(*files))


@LONG
def test_a_load_that_meets_another_too_long_ends_with_a_clear_message(
    batch: Callable[..., Batch], store: UserStore, tmp_path: Path, event_line: Callable[..., str]
) -> None:
    with lease_held(store):
        one = batch(
            write(tmp_path / "one.json", [event_line()]), GHSYNC_LEASE_WAIT_SECONDS="1", GHSYNC_RETRY_ATTEMPTS="1"
        )
        assert one.end() == GIVEN_UP, one.said()[-3000:]
    assert f"Another load holds {store.users.full_name}: process {os.getpid()} on " in one.said()
    assert "way out: Wait for it to end, or raise GHSYNC_LEASE_WAIT_SECONDS." in one.said()
    assert "Traceback" not in one.said()
    assert store.users.count_documents({}) == 0


@LONG
@pytest.mark.parametrize(("number", "moment"), EVERY)
def test_a_load_that_is_asked_to_stop_gives_the_lease_up_and_leaves_no_process(
    batch: Callable[..., Batch],
    flow: BatchFlow,
    store: UserStore,
    tmp_path: Path,
    event_line: Callable[..., str],
    number: signal.Signals,
    moment: str,
) -> None:
    lines = [event_line(key, f"user-{key}", "2015-01-01T15:00:00Z", key) for key in range(1, USERS + 1)]
    file = write(tmp_path / "events.json", lines)
    one = batch(file)
    if moment == "reading":
        one.wait_until(moment, lambda: '"event": "reading"' in one.said())
    else:
        one.wait_until(moment, lambda: store.users.find_one({"spark_temp": {"$exists": True}}) is not None)
    one.process.send_signal(number)
    assert one.end() == ASKED[number], one.said()[-3000:]
    if moment == "inserting":
        assert_lease_ends_soon(store)
    else:
        assert store.database[LEASES].count_documents({}) == 0
    deadline = time.monotonic() + 20
    while left := one.left_behind():
        assert time.monotonic() < deadline, left
        time.sleep(0.1)

    flow.read([str(file)])
    flow.flatten()
    report = flow.load("next")
    assert (report.unresolved, bool(report.recovered)) == (0, moment == "inserting")
    assert_stored(store, newest_logins(file))


@pytest.mark.parametrize("number", ASKED if ROUNDS else [signal.SIGTERM])
def test_a_dagster_run_that_is_asked_to_stop_says_so_and_leaves_no_process(
    batch: Callable[..., Batch],
    store: UserStore,
    tmp_path: Path,
    event_line: Callable[..., str],
    number: signal.Signals,
) -> None:
    lines = [event_line(key, f"user-{key}", "2015-01-01T15:00:00Z", key) for key in range(1, USERS + 1)]
    one = batch(write(tmp_path / "events.json", lines), ("run", "--events"))
    one.wait_until("inserting", lambda: store.users.find_one({"spark_temp": {"$exists": True}}) is not None)
    one.process.send_signal(number)
    # Dagster takes both signals for an interrupt.
    assert one.end() == 130, one.said()[-3000:]
    assert "stopped" in one.said()
    assert_lease_ends_soon(store)
    deadline = time.monotonic() + 20
    while left := one.left_behind():
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@LONG
def test_a_dagster_run_that_is_killed_does_not_hold_up_the_next_one(
    batch: Callable[..., Batch], store: UserStore, tmp_path: Path, event_line: Callable[..., str]
) -> None:
    lines = [event_line(key, f"user-{key}", "2015-01-01T15:00:00Z", key) for key in range(1, USERS + 1)]
    file = write(tmp_path / "events.json", lines)
    home = tmp_path / "shared"
    one = batch(file, ("run", "--events"), home=home)
    one.wait_until("inserting", lambda: store.users.find_one({"spark_temp": {"$exists": True}}) is not None)
    one.process.kill()
    assert one.end() == -signal.SIGKILL
    # Of the same Dagster instance, which still takes the killed run for one at work.
    other = batch(file, ("run", "--events"), home=home)
    assert other.end() == 0, other.said()[-3000:]
    assert_stored(store, newest_logins(file))
