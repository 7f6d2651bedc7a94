"""Under a steady stream of changes servers are killed and come back, and consumers are killed, join and leave.

After each fault the collection equals MySQL's table, no record is a dead letter, and it is told how long a row took
that was written when the fault was over: what was committed before it is applied then, or being applied in the same
batch. All parts are real, the consumers processes of their own.
``TEST_FAULT_ROUNDS=N`` (any N) has the faults last for minutes in place of seconds.
"""

from __future__ import annotations

import dataclasses
import random
import signal
import sys
import threading
import time
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from ghsync_dagster.cdc.dead_letters.topic import read_dead_letters
from ghsync_dagster.cdc.health.audit import Patience, audit
from ghsync_dagster.dev.workload import Workload
from ghsync_dagster.local import stack
from ghsync_dagster.stores.mysql import MySqlStore
from ghsync_dagster.wiring import existing_kafka
from ghsync_dagster_tests.support.cdc_parts import Parts, child, kill, until
from ghsync_dagster_tests.support.long_campaign import ONLY_LONG, ROUNDS

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

    from ghsync_dagster.settings import Settings

FULL = bool(ROUNDS)
RATE = 500
AWAY_SECONDS = 60 if FULL else 5
RESTARTS = 3 if FULL else 1
KILLS = 20 if FULL else 2
JOINING_SECONDS = 120 if FULL else 10
LONGEST_SECONDS = 900 if FULL else 300
CATCH_UP_SECONDS = 120
SESSION_SECONDS = 6
"""The shortest that a broker allows: so long a killed consumer's partition waits."""
_LOG_CHARACTERS = 10_000

pytestmark = [pytest.mark.faults, pytest.mark.timeout(LONGEST_SECONDS), pytest.mark.servers("stream")]


class Campaign:
    """The stack under a workload, and what is seen of it from outside."""

    def __init__(self, settings: Settings, servers: Settings, tables: tuple[MySqlStore, MySqlStore], log: Path) -> None:
        self.kafka = dataclasses.replace(existing_kafka(settings), session_timeout_seconds=SESSION_SECONDS)
        self.parts = Parts(_secret(settings.mongodb_uri), settings.mongodb_database)
        self._servers = servers
        self._mysql, changed = tables
        self._log = log
        self._rows = 0
        seed = random.SystemRandom().randrange(10**6)
        sys.stdout.write(f"seed {seed}\n")
        self.chance = random.Random(seed)  # noqa: S311
        self._workload = Workload(changed, rate=RATE, seed=seed)
        self._stop, self._failed = threading.Event(), threading.Event()
        self._errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._change, name="workload", daemon=True)
        self._thread.start()

    def _change(self) -> None:
        try:
            self._workload.run(seconds=LONGEST_SECONDS, stop=self._stop)
        except BaseException as error:  # noqa: BLE001  the test raises it
            self._errors.append(error)
            self._failed.set()

    def end_workload(self) -> None:
        """End the workload; raise what ended it before."""
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive()
        if self._errors:
            raise self._errors[0]

    def let_run(self, seconds: float) -> None:
        """Let the workload go on for so long."""
        if self._failed.wait(seconds):
            self.end_workload()

    def consumer(self) -> AbstractContextManager[subprocess.Popen[bytes]]:
        """Run a consumer of the campaign's group."""
        return child(self.kafka, self.parts, self._log)

    @contextmanager
    def killed(self, service: str) -> Iterator[None]:
        """Kill a server hard; afterwards it is up again where it was, with its data."""
        before = stack.status(self._servers)[service]
        kill(before)
        try:
            yield
        finally:
            again = stack.up(self._servers, [service], progress=lambda _: None)[service]
        assert (again.uri, again.pid != before.pid) == (before.uri, True)

    def arrival(self) -> float:
        """Write a row, and return how many seconds it takes to its document."""
        self._rows += 1
        began = time.monotonic()
        self._mysql.execute([("INSERT INTO `Users` (user_id, login) VALUES (%s, %s)", (self._rows, "after"))])
        with self.parts.open_store() as store:
            until(lambda: bool(store.users_by_id([str(self._rows)])), CATCH_UP_SECONDS)
        return time.monotonic() - began

    def assert_in_step(self) -> None:
        """End the workload, and see that all of it is applied and nothing was left out."""
        self.end_workload()
        self.arrival()
        sent = self._workload.report()
        with self.parts.open_store() as store:
            judged = audit(self._mysql, store, patience=Patience(seconds=30))
        sys.stdout.write(f"{sent.total:,} changes at {sent.rate:.0f} a second; {judged.summary()}\n")
        if not judged.equal:
            sys.stdout.write(f"The consumers' log:\n{self._log.read_text()[-_LOG_CHARACTERS:]}\n")
        assert judged.equal, judged.offenders
        assert list(read_dead_letters(self.kafka)) == []
        assert sent.missed == 0
        assert sent.rate > 0.9 * RATE


def _secret(value: Any) -> str:
    assert value is not None
    return str(value.get_secret_value())


@pytest.fixture
def campaign(stack_settings: Settings, local_stack: Settings, tmp_path: Path) -> Iterator[Campaign]:
    """The session's stack under a workload, with empty table and topics to begin with."""
    url = _secret(stack_settings.mysql_url)
    with MySqlStore(url) as one, MySqlStore(url) as other:
        made = Campaign(stack_settings, local_stack, (one, other), tmp_path / "consumers.log")
        try:
            yield made
        finally:
            made.end_workload()


def leave(process: subprocess.Popen[bytes]) -> None:
    """Have a consumer end as it should."""
    process.send_signal(signal.SIGTERM)
    # One that has only just begun does not listen yet, and simply ends.
    assert process.wait(20) in (128 + signal.SIGTERM, -signal.SIGTERM)


def told(what: str, seconds: list[float]) -> None:
    times = ", ".join(f"{each:.1f}" for each in seconds)
    sys.stdout.write(f"{what}: caught up after {times} s (longest {max(seconds):.1f} s)\n")


def test_while_the_store_is_away_nothing_is_lost_and_afterwards_it_is_caught_up(campaign: Campaign) -> None:
    with campaign.consumer() as consumer:
        campaign.arrival()
        with campaign.killed("mongo"):
            campaign.let_run(AWAY_SECONDS)
            assert consumer.poll() is None
        told(f"store away for {AWAY_SECONDS} s", [campaign.arrival()])
        campaign.assert_in_step()
        leave(consumer)


@pytest.mark.parametrize("service", ["kafka", pytest.param("connect", marks=ONLY_LONG)])
def test_a_server_of_the_stream_that_is_killed_and_restarted_loses_nothing(campaign: Campaign, service: str) -> None:
    times = []
    with campaign.consumer() as consumer:
        campaign.arrival()
        for _ in range(RESTARTS):
            campaign.let_run(campaign.chance.uniform(0, 2))
            with campaign.killed(service):
                pass
            times.append(campaign.arrival())
            assert consumer.poll() is None
        told(f"{service} killed and restarted", times)
        campaign.assert_in_step()
        leave(consumer)


def test_consumers_killed_at_random_moments_lose_nothing(campaign: Campaign) -> None:
    times = []
    with ExitStack() as consumers:
        consumer = consumers.enter_context(campaign.consumer())
        campaign.arrival()
        for _ in range(KILLS):
            campaign.let_run(campaign.chance.uniform(0, 3))
            assert consumer.poll() is None
            consumer.kill()
            consumer = consumers.enter_context(campaign.consumer())
            times.append(campaign.arrival())
        told("a consumer killed and replaced", times)
        campaign.assert_in_step()
        leave(consumer)


def test_consumers_that_join_and_leave_lose_nothing(campaign: Campaign) -> None:
    times = []
    with ExitStack() as consumers:
        pair = [consumers.enter_context(campaign.consumer())]
        campaign.arrival()
        end = time.monotonic() + JOINING_SECONDS
        while time.monotonic() < end:
            pair.append(consumers.enter_context(campaign.consumer()))
            campaign.let_run(campaign.chance.uniform(0, 3))
            leave(pair.pop(campaign.chance.randrange(2)))
            times.append(campaign.arrival())
        told(f"{len(times)} consumers came, as many left", times)
        campaign.assert_in_step()
        leave(pair.pop())
