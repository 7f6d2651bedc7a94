"""A webhook that takes alerts, and a Dagster daemon that sends them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import psutil
import pytest
from dagster._core.scheduler.instigation import TickStatus

from ghsync_dagster.dagster_home import ensure_dagster_home
from ghsync_dagster.settings import load_settings
from ghsync_dagster_tests.support.cdc_parts import until

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

SECRET = "T0K3N-of-the-hook"
_LOOKED = {TickStatus.SKIPPED, TickStatus.SUCCESS}
_SECONDS = 120


class Webhook:
    """A server that keeps the documents it takes, and answers with the next of ``statuses``, then 200."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.taken: list[dict[str, Any]] = []
        self.requests = 0
        self.slow = False
        self.released = threading.Event()
        webhook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                assert self.headers["content-type"] == "application/json"
                webhook.requests += 1
                if webhook.slow:
                    webhook.released.wait(30)
                status = webhook.statuses.pop(0) if webhook.statuses else 200
                if status == 200:
                    webhook.taken.append(json.loads(body))
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Keep the test's output for the sensor."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hooks/{SECRET}"


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Webhook]:
    """A webhook that the settings name."""
    started = Webhook()
    serving = threading.Thread(target=started.server.serve_forever, kwargs={"poll_interval": 0.01})
    serving.start()
    monkeypatch.setenv("GHSYNC_ALERT_WEBHOOK_URL", started.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield started
    started.released.set()
    started.server.shutdown()
    started.server.server_close()
    serving.join()


@contextmanager
def daemon(folder: Path, environment: Mapping[str, str], sensors: Collection[str]) -> Iterator[None]:
    """Run Dagster's daemon on an instance of its own, from the first tick of each of ``sensors`` on."""
    home = ensure_dagster_home(load_settings(GHSYNC_HOME=folder))
    command = [str(Path(sys.executable).with_name("dagster-daemon")), "run", "-m", "ghsync_dagster.definitions"]
    with (folder / "daemon.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **environment, "DAGSTER_HOME": str(home)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with dg.DagsterInstance.from_config(str(home)) as instance:
            until(lambda: set(sensors) <= _ticked(instance), _SECONDS)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        # Runs, which end by themselves a while after they are told to.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        until(lambda: not _on(home), 30)


def _ticked(instance: dg.DagsterInstance) -> set[str]:
    return {
        state.instigator_name
        for state in instance.all_instigator_state()
        if any(tick.status in _LOOKED for tick in instance.get_ticks(state.instigator_origin_id, state.selector_id))
    }


def _on(home: Path) -> list[int]:
    """Return the processes that belong to an instance."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("DAGSTER_HOME") == str(home):
                found.append(process.pid)
    return found
