"""The rehearsal's servers are stopped whatever comes. Fakes of the servers: a signal must come in the middle of it."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import pytest

from ghsync_dagster import rehearsal
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
        rehearsal._stack(load_settings(GHSYNC_HOME=tmp_path), tell=lambda _: None),
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
    with rehearsal._stack(load_settings(GHSYNC_HOME=tmp_path), tell=lambda _: None):
        pass
    assert stopped == ["mongo", "connect"]
