"""Consumers that die or freeze under a steady stream: another takes over, nothing is lost, nothing older comes back."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from ghsync_dagster.cdc.dead_letters.topic import read_dead_letters
from ghsync_dagster_tests.support.cdc_parts import child, stored, until
from ghsync_dagster_tests.support.long_campaign import ROUNDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ghsync_dagster.stores.mongo.users import UserStore
    from ghsync_dagster_tests.support.cdc_parts import Parts, Topic

pytestmark = [pytest.mark.faults, pytest.mark.servers("stream")]

KEYS = 50


@contextmanager
def steady_changes(topic: Topic) -> Iterator[Callable[[], None]]:
    """Write changes of a few keys all the time; gives a function that ends it and waits until all is written."""
    stopped = threading.Event()

    def write() -> None:
        number = 0
        while not stopped.wait(0.003):
            number += 1
            key = number % KEYS
            if str(key) in topic.expected and number % 7 == 0:
                topic.delete(key)
            else:
                topic.upsert(key, f"u{number}")

    thread = threading.Thread(target=write)
    thread.start()

    def end() -> None:
        stopped.set()
        thread.join()
        topic.flush()

    try:
        yield end
    finally:
        end()


def test_killed_consumers_lose_nothing(topic: Topic, parts: Parts, store: UserStore) -> None:
    with steady_changes(topic) as end:
        for _ in range(3):
            before = topic.committed()
            with child(topic.kafka, parts) as process:
                until(lambda before=before: topic.committed() > before + 20)  # type: ignore[misc]
                process.kill()
        end()
        parts.drain(topic)
    assert stored(store) == topic.expected
    assert list(read_dead_letters(topic.kafka)) == []


@pytest.mark.parametrize("round_number", range(ROUNDS or 2))
def test_what_a_frozen_consumer_had_in_hand_does_not_stay(
    topic: Topic, parts: Parts, store: UserStore, round_number: int
) -> None:
    with child(topic.kafka, parts) as process:
        with steady_changes(topic) as end:
            until(lambda: topic.committed() > 50 + 7 * round_number)
            os.kill(process.pid, signal.SIGSTOP)
            with parts.running(topic) as other:
                until(lambda: other.metrics.snapshot().records > 100)
                end()
                until(lambda: stored(store) == topic.expected)
                os.kill(process.pid, signal.SIGCONT)
                # What it sends now is older than what is stored; it is put right within a second or so.
                time.sleep(3)
                for _ in range(20):
                    assert stored(store) == topic.expected
                assert process.poll() is None
                other.end()
        topic.upsert(1, "after")
        topic.flush()
        until(lambda: stored(store) == topic.expected)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM
    assert list(read_dead_letters(topic.kafka)) == []
