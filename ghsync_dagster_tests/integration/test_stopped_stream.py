"""A stream that stopped is seen: what up, drain and audit say first, with which exit code, and which check fires.

``TEST_FAULT_ROUNDS=N`` (any N) also waits for the alert of a running Dagster each time.
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import httpx
import psutil
import pytest

from ghsync_dagster.cdc.health import checks
from ghsync_dagster.defs.cdc.connector_watch import Memory, check
from ghsync_dagster.local import stack
from ghsync_dagster.settings import Settings, load_settings
from ghsync_dagster.wiring import change_consumer, connector_probe, existing_kafka, open_mysql, store_opener
from ghsync_dagster_tests.support.alert_parts import daemon
from ghsync_dagster_tests.support.cdc_parts import GHSYNC, until
from ghsync_dagster_tests.support.long_campaign import LONG

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from ghsync_dagster.domain.connector import ConnectorState
    from ghsync_dagster.domain.finding import Finding
    from ghsync_dagster.stores.mysql import MySqlStore
    from ghsync_dagster_tests.support.alert_parts import Webhook

pytestmark = [pytest.mark.integration, pytest.mark.servers("stack")]

SENSORS = ("alerts", "connector_watch", "source_watch")
ALERT_SECONDS = 120

_MANUAL = (("PUT", "stop"), ("DELETE", "offsets"), ("PUT", "resume"))


class Outcome(NamedTuple):
    """What a command did."""

    code: int
    first: str
    text: str


class Stream:
    """The local stack with a group and a database of the test's own."""

    def __init__(self, home: Path, folder: Path) -> None:
        self.folder = folder
        self.names = {
            "GHSYNC_HOME": str(home),
            "MONGODB_DATABASE": f"test_{uuid.uuid4().hex[:12]}",
            "KAFKA_GROUP_ID": f"test-{uuid.uuid4().hex[:12]}",
        }
        self.url = str(stack.status(self.settings())["connect"].uri)

    def settings(self, **more: str) -> Settings:
        """The settings of a command."""
        return load_settings(**self.names, **more)

    def command(self, *arguments: str, **more: str) -> Outcome:
        """Run a command; its first line is the first that it prints or logs for a person."""
        run = subprocess.run(
            [GHSYNC, *arguments],
            cwd=self.folder,
            env=os.environ | self.names | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        lines = [line for line in run.stdout.splitlines() if not line.startswith(("{", "connect: "))]
        print(f"ghsync {' '.join(arguments)}: exit code {run.returncode}: {lines[0] if lines else ''}")  # noqa: T201
        return Outcome(run.returncode, lines[0] if lines else "", run.stdout)

    def drain(self, **more: str) -> Outcome:
        """Drain."""
        return self.command("cdc", "drain", **more)

    def audit(self, **more: str) -> Outcome:
        """Audit, without waiting for what does not come."""
        return self.command("cdc", "audit", "--lag-wait", "1", "--patience", "1", **more)

    def applied(self) -> str | None:
        """Apply all that has come; return the login of the one user."""
        settings = self.settings()
        change_consumer(settings, existing_kafka(settings)).run(threading.Event(), until_end=True, seconds=60)
        with store_opener(settings)() as store:
            found = store.users_by_id(["770001"])
        return found["770001"]["login"] if found else None

    def execute(self, *statements: str) -> None:
        """Execute statements in one session."""
        with open_mysql(self.settings()) as mysql:
            self.in_session(mysql, *statements)

    @staticmethod
    def in_session(mysql: MySqlStore, *statements: str) -> None:
        """Execute statements one by one in the session that is open."""
        for statement in statements:
            mysql.execute([(statement, ())])

    def state(self) -> ConnectorState:
        """The connector's state."""
        probe = connector_probe(self.settings())
        assert probe is not None
        return probe.state()

    def check(self, **more: str) -> Finding:
        """What the check of cdc_audit_job says."""
        probe = connector_probe(self.settings(**more))
        assert probe is not None
        report, still = probe.watched()
        return checks.connector_running(report, still, limit_seconds=probe.still_seconds)

    def reported(self, **more: str) -> Finding | None:
        """What the sensor says at its second look."""
        probe = connector_probe(self.settings(**more))
        assert probe is not None
        memory = check(probe, Memory())[1]
        return check(probe, memory)[0]

    def ask(self, *steps: tuple[str, str]) -> None:
        """Ask the worker for something about the connector."""
        with httpx.Client(base_url=self.url, timeout=60) as client:
            for method, what in steps:
                client.request(method, f"/connectors/ghsync-users/{what}").raise_for_status()

    def await_failure(self) -> None:
        """Wait until the connector has failed."""
        until(lambda: self.state().state == "FAILED", 60)


@pytest.fixture
def stream(local_stack: Settings, tmp_path: Path) -> Iterator[Stream]:
    """The stack, running before and after; what a test stopped goes on from a new snapshot."""
    stack.up(local_stack, progress=print)
    made = Stream(local_stack.home_dir, tmp_path)
    made.execute("REPLACE INTO Users (user_id, login) VALUES (770001, 'a')")
    until(lambda: made.applied() == "a", 90)
    yield made
    stack.up(local_stack, ["mysql", "kafka"], progress=print)
    with open_mysql(made.settings()) as mysql:
        made.in_session(mysql, "DELETE FROM Users WHERE user_id = 770001", "DROP DATABASE IF EXISTS odd_ddl")
    if made.state().state == "UNKNOWN":
        stack.up(local_stack, progress=print)
    if not made.state().is_running:
        made.ask(*_MANUAL)
    stack.up(local_stack, progress=print)
    with store_opener(made.settings())() as store:
        store.client.drop_database(made.names["MONGODB_DATABASE"])


def poison(stream: Stream) -> None:
    """Write a row whose event holds one column."""
    stream.execute(
        "SET SESSION binlog_row_image = MINIMAL", "UPDATE Users SET login = 'poisoned' WHERE user_id = 770001"
    )


def odd_ddl(stream: Stream) -> None:
    """Execute what the server takes and the connector's parser does not, in a database that nobody follows."""
    stream.execute("CREATE DATABASE IF NOT EXISTS odd_ddl", "CREATE TABLE odd_ddl.t (id INT PRIMARY KEY, vector INT)")


def purge(stream: Stream) -> None:
    """Have the server forget what the connector has not read."""
    stream.ask(("PUT", "stop"))
    until(lambda: stream.state().state == "STOPPED", 60)
    with open_mysql(stream.settings()) as mysql:
        stream.in_session(mysql, "UPDATE Users SET login = 'purged' WHERE user_id = 770001", "FLUSH BINARY LOGS")

        def is_purged() -> bool:
            # The server keeps what it may need after a crash.
            stream.in_session(mysql, "FLUSH ENGINE LOGS", "FLUSH BINARY LOGS")
            stream.in_session(mysql, f"PURGE BINARY LOGS TO '{str(mysql.log_end()).partition(':')[0]}'")
            return len(mysql._run("Listing the binlog", "SHOW BINARY LOGS")) == 1

        until(is_purged)
    stream.ask(("PUT", "resume"))


def kill_worker(stream: Stream) -> None:
    """End the local Connect worker without a word."""
    process = psutil.Process(stack.status(stream.settings())["connect"].pid)
    process.kill()
    process.wait(30)


def log_a_statement(stream: Stream) -> None:
    """Change a row in a session whose changes come as text."""
    stream.execute("SET SESSION binlog_format = STATEMENT", "UPDATE Users SET login = 'text' WHERE user_id = 770001")


FAILURES: dict[str, tuple[Callable[[Stream], None], str, str]] = {
    "poisoned event": (poison, "row size 1", "take a new snapshot"),
    "unparseable DDL": (odd_ddl, "ParsingException", "take a new snapshot"),
    "purged binlog": (purge, "purged|no longer available", "take a new snapshot"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_connector_that_failed_is_said_first_and_is_no_success(stream: Stream, what: str) -> None:
    happens, cause, cure = FAILURES[what]
    happens(stream)
    stream.await_failure()
    began = time.monotonic()
    up = stream.command("up", "connect")
    assert up.code == 3
    assert up.first.startswith("error: The connector ghsync-users on ")
    assert re.search(cause, up.first)
    assert cure in up.text
    assert time.monotonic() - began < 90
    for command in (stream.drain, stream.audit):
        found = command()
        assert found.first.startswith("the connector ghsync-users is FAILED: ")
        assert re.search(cause, found.first)
        if command == stream.drain:
            assert found.code == 3
            assert cure in found.text
    for finding in (stream.check(), stream.reported()):
        assert finding is not None
        assert (finding.check, finding.passed) == ("connector_running", False)
        assert re.search(cause, finding.summary)
        assert cure in finding.way_out


def test_a_worker_that_is_away_is_named(stream: Stream) -> None:
    nowhere = {"CONNECT_URL": "http://u:s3cret@127.0.0.1:9"}
    up = stream.command("up", "connect", **nowhere)
    assert (up.code, up.first) == (3, "connect state=down url=http://***@127.0.0.1:9 server=external")
    words = "the Connect worker at http://***@127.0.0.1:9 does not answer: ConnectError"
    drain, audit = stream.drain(**nowhere), stream.audit(**nowhere)
    assert (drain.code, drain.first, audit.first) == (3, words, words)
    for finding in (stream.check(**nowhere), stream.reported(**nowhere)):
        assert finding is not None
        assert (finding.passed, finding.summary) == (False, words)
    assert "s3cret" not in up.text + drain.text + audit.text


@pytest.mark.faults
@LONG
def test_a_local_worker_that_is_down_is_named_and_up_starts_it(stream: Stream) -> None:
    stack.down(stream.settings(), ["connect"], progress=print)
    words = "there is no Connect worker: CONNECT_URL is not set, and the local one is not up"
    drain = stream.drain()
    assert (drain.code, drain.first) == (3, words)
    assert stream.audit().first == words
    assert stream.command("up", "connect").code == 0
    assert stream.drain().code == 0


def test_a_worker_that_was_killed_and_then_meets_what_it_can_not_read_is_no_success(stream: Stream) -> None:
    kill_worker(stream)
    poison(stream)
    # Until the new worker has tried, the connector is called RUNNING, as it was.
    up = stream.command("up", "connect")
    assert up.code == 3
    assert up.first.startswith("error: The connector ghsync-users on ")
    assert "row size 1" in up.first


@contextmanager
def halted(stream: Stream) -> Iterator[None]:
    stream.ask(("PUT", "pause"))
    until(lambda: stream.state().state == "PAUSED", 60)
    try:
        yield
    finally:
        stream.ask(("PUT", "resume"))


@pytest.mark.faults
@LONG
def test_a_halted_connector_is_named_and_up_resumes_it(stream: Stream) -> None:
    with halted(stream):
        drain = stream.drain()
        assert (drain.code, drain.first) == (3, "the connector ghsync-users is PAUSED")
        assert stream.command("up", "connect").code == 0


def test_nobody_is_asked_where_no_worker_is_known(stream: Stream) -> None:
    found = stack.status(stream.settings())
    elsewhere = {"GHSYNC_HOME": str(stream.folder / "home"), "KAFKA_BOOTSTRAP_SERVERS": str(found["kafka"].uri)}
    drain = stream.drain(**elsewhere, MONGODB_URI=str(found["mongo"].login or found["mongo"].uri))
    assert drain.code == 0
    assert drain.first == ("the connector was not asked: CONNECT_URL is not set, and there is no local worker here")


def test_a_connector_that_runs_passes_also_while_only_another_database_writes(stream: Stream) -> None:
    stream.execute("CREATE DATABASE IF NOT EXISTS odd_ddl", "CREATE TABLE odd_ddl.w (n INT AUTO_INCREMENT PRIMARY KEY)")
    deadline = time.monotonic() + 15
    with open_mysql(stream.settings()) as mysql:
        before = mysql.log_end()
        while time.monotonic() < deadline:
            stream.in_session(mysql, "INSERT INTO odd_ddl.w VALUES ()")
            time.sleep(0.05)
        assert mysql.log_end() != before
    finding = stream.check()
    assert (finding.passed, finding.summary) == (True, "the connector ghsync-users is RUNNING")
    probe = connector_probe(stream.settings())
    assert probe is not None

    def caught_up() -> bool:
        # The heartbeat takes the offset to the end, though the table of users did not change.
        sample = probe.report().sample
        return sample.position == sample.log

    until(caught_up, 60)


ALERTED: dict[str, tuple[Callable[[Stream], None], str, str]] = {
    **{what: (happens, "connector_running", cause) for what, (happens, cause, _) in FAILURES.items()},
    "worker away": (kill_worker, "connector_running", "there is no Connect worker"),
    "statement session": (log_a_statement, "source_settings", "1 statements on Users came as text"),
}


@pytest.mark.faults
@LONG
@pytest.mark.parametrize("what", ALERTED)
def test_a_running_dagster_alerts(stream: Stream, webhook: Webhook, tmp_path: Path, what: str) -> None:
    happens, check, cause = ALERTED[what]
    # What an earlier test did to the table must not be what is told.
    assert stream.audit().code == 0
    with daemon(tmp_path, stream.names, SENSORS):
        assert not webhook.taken
        began = time.monotonic()
        happens(stream)
        until(lambda: any(alert["check"] == check for alert in webhook.taken), ALERT_SECONDS)
        seconds = time.monotonic() - began
    alert = next(alert for alert in webhook.taken if alert["check"] == check)
    assert re.search(cause, alert["description"])
    assert alert["way_out"]
    print(f"{what}: alert of {check} after {seconds:.1f} s: {alert['description'][:80]}")  # noqa: T201
