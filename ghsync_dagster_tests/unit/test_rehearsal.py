"""The rehearsal's servers are stopped whatever comes. Fakes of the servers: a signal must come in the middle of it."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from ghsync_dagster.cdc.health.metrics import Percentiles
from ghsync_dagster.dev import rehearsal
from ghsync_dagster.local import stack
from ghsync_dagster.local.supervisor import ServiceStatus
from ghsync_dagster.settings import load_settings

if TYPE_CHECKING:
    from pathlib import Path


def test_a_signal_while_the_servers_are_stopped_leaves_none_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped: list[str] = []

    def down(_: Any, services: list[str], **__: Any) -> None:
        for name in services:
            signal.raise_signal(signal.SIGINT)
            stopped.append(name)

    monkeypatch.setattr(stack, "status", lambda _: {name: ServiceStatus(name, "down") for name in stack.SERVICES})
    monkeypatch.setattr(stack, "up", lambda *_, **__: {name: ServiceStatus(name, "up") for name in stack.SERVICES})
    monkeypatch.setattr(stack, "down", down)
    with (
        pytest.raises(KeyboardInterrupt),
        rehearsal._stack(load_settings(GHSYNC_HOME=tmp_path), progress=lambda _: None),
    ):
        pass
    assert stopped == [*stack.SERVICES]


def test_a_server_that_lives_and_does_not_answer_was_not_started_by_the_rehearsal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: ServiceStatus(name, "down") for name in stack.SERVICES}
    before |= {"kafka": ServiceStatus("kafka", "failed", 7), "mysql": ServiceStatus("mysql", "up", 8)}
    stopped: list[str] = []
    monkeypatch.setattr(stack, "status", lambda _: before)
    monkeypatch.setattr(stack, "up", lambda *_, **__: {name: ServiceStatus(name, "up") for name in stack.SERVICES})
    monkeypatch.setattr(stack, "down", lambda _, services, **__: stopped.extend(services))
    with rehearsal._stack(load_settings(GHSYNC_HOME=tmp_path), progress=lambda _: None):
        pass
    assert stopped == ["mongo", "connect"]


def judged(**given: Any) -> rehearsal.Rehearsal:
    """A rehearsal that went well, but for what is given."""
    well = {
        "workload": None,
        "latency": Percentiles(count=1, p99=900),
        "consumer": SimpleNamespace(dead_letters={}),
        "audit": SimpleNamespace(equal=True),
        "load_exit": 0,
        "seconds": 1.0,
        "max_latency_ms": 1_000,
    }
    return rehearsal.Rehearsal(**{**well, **given})


@pytest.mark.parametrize(
    ("given", "missed", "ok"),
    [
        ({}, [], True),
        ({"load_exit": None}, [], True),
        ({"latency": Percentiles(count=1, p99=1_001)}, ["latency"], True),
        ({"audit": SimpleNamespace(equal=False)}, ["audit"], False),
        ({"consumer": SimpleNamespace(dead_letters={"not-json": 2})}, ["dead letters"], False),
        ({"load_exit": 3}, ["load"], False),
    ],
)
def test_each_limit_is_missed_by_its_own_fault(given: dict[str, Any], missed: list[str], ok: bool) -> None:
    found = judged(**given)
    assert [limit.name for limit in found.limits if not limit.is_met] == missed
    assert found.ok is ok
