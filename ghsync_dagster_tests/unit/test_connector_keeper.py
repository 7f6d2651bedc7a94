"""The keeper of the connector: registers, corrects, restarts what failed, and leaves alone what somebody stopped."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import pytest

from ghsync_dagster import connector
from ghsync_dagster.connector import ConnectorKeeper, login_by_files
from ghsync_dagster.domain.connector import CONNECTOR, FAILED, NONE, RUNNING
from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster.settings import load_settings
from ghsync_dagster.stores import connect
from ghsync_dagster.stores.connect import ConnectWorker
from ghsync_dagster.wiring import connector_keeper

WANTED = {"tasks.max": "1", **login_by_files("/run/secrets")}


class Worker:
    """A Connect worker in memory, with one connector or none."""

    def __init__(self) -> None:
        self.config: dict[str, str] | None = None
        self.state = RUNNING
        self.task_state = RUNNING
        self.is_away = False
        self.sent: list[str] = []

    def answer(self, request: httpx.Request) -> httpx.Response:
        """Answer as Connect does."""
        if self.is_away:
            raise httpx.ConnectError("refused", request=request)
        if request.method != "GET":
            self.sent.append(f"{request.method} {request.url.path.rpartition('/')[2]}")
        if request.method == "PUT":
            self.config = json.loads(request.content) | {"name": CONNECTOR}
            return httpx.Response(200, json={"name": CONNECTOR})
        if request.method == "POST":
            return httpx.Response(202, json={})
        if self.config is None:
            return httpx.Response(404, json={"error_code": 404, "message": "not found"})
        if request.url.path.endswith("config"):
            return httpx.Response(200, json=self.config)
        task: dict[str, Any] = {"id": 0, "state": self.task_state, "trace": "a.B: broken"}
        return httpx.Response(200, json={"connector": {"state": self.state}, "tasks": [task]})


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    """A worker without a connector."""
    made = Worker()

    def client(url: str, seconds: float = 1) -> httpx.Client:
        return httpx.Client(base_url=url, timeout=seconds, transport=httpx.MockTransport(made.answer))

    monkeypatch.setattr(connect, "client_of", client)
    return made


@pytest.fixture
def keeper(worker: Worker) -> ConnectorKeeper:
    """A keeper of the worker's connector."""
    del worker
    return ConnectorKeeper(opened, lambda: dict(WANTED))


def opened() -> ConnectWorker:
    return ConnectWorker("http://connect:8083", 1, 0)


def test_a_missing_connector_is_registered_and_then_left_as_it_is(worker: Worker, keeper: ConnectorKeeper) -> None:
    assert keeper.check(opened()).state == NONE
    assert worker.config == WANTED | {"name": CONNECTOR}
    assert keeper.check(opened()).state == RUNNING
    assert worker.sent == ["PUT config"]


def test_a_configuration_that_somebody_changed_is_corrected(worker: Worker, keeper: ConnectorKeeper) -> None:
    worker.config = WANTED | {"name": CONNECTOR, "tasks.max": "7", "skipped.operations": "d"}
    keeper.check(opened())
    assert worker.config == WANTED | {"name": CONNECTOR}


def test_a_failed_connector_is_restarted_after_pauses_that_grow(
    worker: Worker, keeper: ConnectorKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("ghsync_dagster.connector.time.monotonic", lambda: now)
    keeper.check(opened())
    worker.sent.clear()
    worker.task_state = FAILED
    restarted = []
    for _ in range(100):
        worker.sent.clear()
        assert keeper.check(opened()).state == FAILED
        if worker.sent:
            assert worker.sent == ["POST restart"]
            restarted.append(now - 1000)
        now += 10
    assert restarted == [0, 10, 30, 70, 150, 310, 630]
    worker.task_state = RUNNING
    now += 1000
    keeper.check(opened())
    worker.task_state = FAILED
    worker.sent.clear()
    keeper.check(opened())
    now += 10
    keeper.check(opened())
    assert worker.sent == ["POST restart", "POST restart"]


@pytest.mark.parametrize("state", ["PAUSED", "STOPPED"])
def test_what_somebody_stopped_is_left_alone(worker: Worker, keeper: ConnectorKeeper, state: str) -> None:
    keeper.check(opened())
    worker.sent.clear()
    worker.state = worker.task_state = state
    assert keeper.check(opened()).state == state
    worker.task_state = FAILED
    keeper.check(opened())
    assert worker.sent == []


def test_it_goes_on_while_the_worker_is_away_and_says_so_once(
    worker: Worker, keeper: ConnectorKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connector, "_KEEP_SECONDS", 0)
    logged: list[str] = []
    monkeypatch.setattr(connector.log, "warning", lambda text, **_: logged.append(text), raising=False)
    worker.is_away = True
    stop, looks = threading.Event(), []

    def check(opened: ConnectWorker) -> Any:
        looks.append(worker.is_away)
        if len(looks) == 3:
            worker.is_away = False
        return ConnectorKeeper.check(keeper, opened)

    monkeypatch.setattr(keeper, "check", check)
    keeper.keep(stop, on_running=stop.set)
    assert looks[:4] == [True, True, True, False]
    assert sum("does not answer" in text for text in logged) == 1
    assert keeper._state.state == RUNNING


@pytest.mark.parametrize("missing", ["CONNECT_URL", "CONNECT_SECRETS"])
def test_it_needs_a_worker_and_a_folder_of_secrets(missing: str) -> None:
    given = {"CONNECT_URL": "http://connect:8083", "CONNECT_SECRETS": "/run/secrets"}
    del given[missing]
    with pytest.raises(ConfigError, match="CONNECT_SECRETS"):
        connector_keeper(load_settings(**given))
