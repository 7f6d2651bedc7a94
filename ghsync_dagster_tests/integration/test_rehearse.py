"""``ghsync cdc rehearse`` as a user starts it: it ends as it should, and leaves running what it did not start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from confluent_kafka import Producer

from ghsync_dagster.local import stack
from ghsync_dagster_tests.support.cdc_parts import until
from ghsync_dagster_tests.support.long_campaign import HANG_SECONDS
from ghsync_dagster_tests.support.process_parts import children_of, kill_family, words

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ghsync_dagster.settings import Settings

pytestmark = [pytest.mark.integration, pytest.mark.servers("stream")]

GHSYNC = str(Path(sys.executable).with_name("ghsync"))
SIGTERM_CODE = 143
Rehearse = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def rehearse(stack_settings: Settings, tmp_path: Path) -> Iterator[Rehearse]:
    """Return a function that starts a rehearsal on the running stack, with database and group of the test's own."""
    own = ("GHSYNC_HOME", "MONGODB_DATABASE", "KAFKA_GROUP_ID")
    values = (str(stack_settings.home_dir), stack_settings.mongodb_database, stack_settings.kafka_group_id)
    environment = os.environ | dict(zip(own, values, strict=True))
    started: list[subprocess.Popen[str]] = []

    def start(*options: str, **settings: str) -> subprocess.Popen[str]:
        command = [GHSYNC, "cdc", "rehearse", "--rate", "200", *options]
        with (tmp_path / "err").open("w") as errors:
            started.append(
                subprocess.Popen(
                    command, env=environment | settings, stdout=subprocess.PIPE, stderr=errors, cwd=tmp_path, text=True
                )
            )
        return started[-1]

    before = {name: status.pid for name, status in stack.status(stack_settings).items()}
    yield start
    for process in started:
        if process.poll() is None:
            kill_family(process.pid)
        process.wait()
    assert {name: status.pid for name, status in stack.status(stack_settings).items()} == before


def test_a_rehearsal_with_a_load_beside_it_ends_equal(
    rehearse: Rehearse, tmp_path: Path, event_line: Callable[..., str]
) -> None:
    events = tmp_path / "events.json"
    events.write_text("".join(f"{event_line(key, f'user-{key}', number=key)}\n" for key in range(1, 21)))
    done = rehearse("--seconds", "3", "--json", GHSYNC_EVENTS_PATH=str(events))
    output, _ = done.communicate(timeout=HANG_SECONDS)
    told = (tmp_path / "err").read_text()
    assert done.returncode == 0, told
    found = json.loads(output)
    assert (found["ok"], found["load_exit"], found["consumer"]["dead_letters"]) == (True, 0, {})
    changes = found["workload"]["changes"]
    assert sum(changes.values()) >= 500
    # A key change makes two records.
    assert found["latency"]["count"] == sum(changes.values()) + changes["key_change"]
    assert {limit["name"]: limit["is_met"] for limit in found["limits"] if limit["decides"]} == {
        "audit": True,
        "dead letters": True,
        "load": True,
    }
    assert 0 < found["latency"]["p50"] <= found["latency"]["p99"] <= found["latency"]["max"]
    assert "changes at " in told
    assert "comparing MySQL with MongoDB" in told


def test_a_rehearsal_that_meets_a_dead_letter_ends_with_one(rehearse: Rehearse, stack_settings: Settings) -> None:
    producer = Producer({"bootstrap.servers": str(stack_settings.kafka_bootstrap_servers)})
    producer.produce(stack_settings.kafka_topic, value=b"{", key=b"{}")
    assert producer.flush(20) == 0
    done = rehearse("--seconds", "1", "--no-load")
    output, _ = done.communicate(timeout=HANG_SECONDS)
    assert done.returncode == 1
    lines = dict(line.split(maxsplit=1) for line in output.replace("dead letters", "dead_letters").splitlines() if line)
    assert lines["dead_letters"].startswith("1 ")
    assert lines["audit"].startswith("equal: ")
    assert lines["missed"] == "dead_letters: 1, none wanted"
    assert lines["verdict:"] == "failed"
    assert f"rm -r {stack_settings.home_dir}/mongo " in output


def test_a_rehearsal_that_is_asked_to_stop_ends_the_load_beside_it_too(
    rehearse: Rehearse, tmp_path: Path, event_line: Callable[..., str]
) -> None:
    events = tmp_path / "events.json"
    events.write_text(event_line() + "\n")
    running = rehearse("--seconds", "600", GHSYNC_EVENTS_PATH=str(events))
    until(lambda: "changes at " in (tmp_path / "err").read_text(), 60)
    family = children_of(running.pid)
    assert any("batch" in words(each) for each in family)
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == SIGTERM_CODE, (tmp_path / "err").read_text()
    assert not psutil.wait_procs(family, 30)[1]
    assert "Traceback" not in (tmp_path / "err").read_text()
