"""Consumers that die or freeze under a steady stream: another takes over, nothing is lost, nothing older comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ghsync_dagster.cdc.dead_letters import read_dead_letters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cdc_parts import Parts, Topic

    from ghsync_dagster.stores.mongo import UserStore

pytestmark = pytest.mark.faults

GHSYNC = str(Path(sys.executable).parent / "ghsync")
KEYS = 50
ROUNDS = int(os.environ.get("GHSYNC_FAULT_ROUNDS", "2"))


def stored(store: UserStore) -> dict[str, dict[str, Any]]:
    return {found["user_id"]: found for found in store.users.find({}, {"_id": 0})}


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until something outside of this process's reach holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


@contextmanager
def child(topic: Topic, parts: Parts) -> Iterator[subprocess.Popen[bytes]]:
    """Run a consumer as a process of its own."""
    environment = {
        "KAFKA_BOOTSTRAP_SERVERS": topic.kafka.bootstrap_servers,
        "KAFKA_TOPIC": topic.kafka.topic,
        "KAFKA_GROUP_ID": topic.kafka.group_id,
        "GHSYNC_CDC_SESSION_TIMEOUT_SECONDS": "6",
        "MONGODB_URI": parts.uri,
        "MONGODB_DATABASE": parts.database,
    }
    process = subprocess.Popen([GHSYNC, "cdc", "run"], env=environment, cwd=Path.home(), stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


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
            with child(topic, parts) as process:
                until(lambda before=before: topic.committed() > before + 20)  # type: ignore[misc]
                process.kill()
        end()
        parts.drain(topic)
    assert stored(store) == topic.expected
    assert list(read_dead_letters(topic.kafka)) == []


@pytest.mark.parametrize("round_number", range(ROUNDS))
def test_what_a_frozen_consumer_had_in_hand_does_not_stay(
    topic: Topic, parts: Parts, store: UserStore, round_number: int
) -> None:
    with child(topic, parts) as process:
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
