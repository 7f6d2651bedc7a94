"""Consumers that have to end do end: many at once, in the middle of rebalances, on full cores.

``TEST_FAULT_ROUNDS=N`` (any N) has four times as many end.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from confluent_kafka.admin import AdminClient

from ghsync_dagster import stopping
from ghsync_dagster.domain.errors import GhsyncError
from ghsync_dagster.stores.kafka.consumer import TopicConsumer
from ghsync_dagster_tests.support import long_campaign
from ghsync_dagster_tests.support.cdc_parts import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ghsync_dagster_tests.support.cdc_parts import Topic

ROUNDS = 20 if long_campaign.ROUNDS else 5
AT_ONCE = 10
PARTITIONS = 3
LONGEST_SECONDS = 30

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900), pytest.mark.servers("stream")]


@contextmanager
def full_cores() -> Iterator[None]:
    """Keep every core busy."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
        for process in busy:
            process.wait()


class Member:
    """A consumer in a thread of its own, from joining the group to leaving it."""

    def __init__(self, topic: Topic) -> None:
        self.has_joined = False
        self.seconds: float | None = None
        self.stop = threading.Event()
        self._topic = topic
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        def nothing(_: set[int]) -> None:
            self.has_joined = True

        consumer = TopicConsumer(self._topic.kafka, assigned=nothing, revoked=nothing, lost=nothing)
        try:
            while not self.stop.is_set():
                consumer.poll(10, 0.1)
        except GhsyncError:
            # The topic is deleted under some of them.
            self.stop.wait()
        began = time.monotonic()
        consumer.close()
        self.seconds = time.monotonic() - began

    def ended(self) -> float:
        """Wait for its end; return how long leaving took."""
        self._thread.join(120)
        assert self.seconds is not None, "a consumer did not end"
        return self.seconds


def test_consumers_end_in_the_middle_of_rebalances_on_full_cores(make_topic: Callable[..., Topic]) -> None:
    left_behind = list(stopping._abandoned)
    took: list[float] = []
    with full_cores():
        for number in range(ROUNDS):
            took += ended_in_one_round(make_topic(partitions=PARTITIONS), number)
    print(f"{len(took)} consumers ended, the longest in {max(took):.1f} s")  # noqa: T201
    assert len(took) == ROUNDS * AT_ONCE
    assert stopping._abandoned == left_behind
    assert max(took) < LONGEST_SECONDS


def ended_in_one_round(topic: Topic, number: int) -> list[float]:
    """Have consumers of one group join and end at once, every second time with their topic deleted just before."""
    topic.upsert(1)
    topic.flush()
    members = [Member(topic) for _ in range(AT_ONCE)]
    # From none that has partitions yet to all that can have some.
    until(lambda: sum(member.has_joined for member in members) >= min(number, PARTITIONS), 120)
    if number % 2:
        admin = AdminClient({"bootstrap.servers": topic.kafka.bootstrap_servers})
        [deleted] = admin.delete_topics([topic.kafka.topic]).values()
        deleted.result(60)
    for member in members:
        member.stop.set()
    return [member.ended() for member in members]
