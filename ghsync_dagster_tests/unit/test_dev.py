"""One UI with daemon an instance, on a port that is free: what can't be served is told before anything starts."""

from __future__ import annotations

import http.server
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ghsync_dagster import progress
from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster.local import dev
from ghsync_dagster.settings import load_settings
from ghsync_dagster.stopping import SIGNALS
from ghsync_dagster_tests.support.cdc_parts import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ghsync_dagster.settings import Settings

RUNNER = """
import os, signal, sys
from pathlib import Path
from ghsync_dagster.local import dev
from ghsync_dagster.settings import load_settings
for name in sys.argv[3:]:
    signal.signal(signal.Signals[name], signal.SIG_IGN)
def run(*_, **__):
    print("runs", flush=True)
    os.execv(sys.executable, [sys.executable, "-c", BELOW]) if os.fork() == 0 else signal.pause()
BELOW = "import signal; print(*(int(signal.getsignal(n) == signal.SIG_IGN) for n in (1, 2, 15)), flush=True)"
dev.runpy.run_module = run
dev.serve(load_settings(GHSYNC_HOME=Path(sys.argv[1])), int(sys.argv[2]), "warning")
"""
"""Serves without Dagster, with the signals that are named ignored, and tells which of them stay so below it."""


class RanError(Exception):
    """What would have run."""


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """Settings of an instance of the test's own; to run a module raises."""

    def run(module: str, **_: object) -> None:
        raise RanError(module, *sys.argv[1:])

    monkeypatch.setattr("ghsync_dagster.local.dev.runpy.run_module", run)
    monkeypatch.setattr(sys, "argv", sys.argv)
    # Set and taken away, so that what the code sets is undone.
    monkeypatch.setenv("DAGSTER_HOME", "")
    monkeypatch.delenv("DAGSTER_HOME")
    before = {number: signal.getsignal(number) for number in SIGNALS}
    monkeypatch.setattr(dev, "_report_until_served", lambda *_: None)
    yield load_settings(GHSYNC_HOME=tmp_path)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def test_the_ui_is_served_on_the_instance_under_the_home(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    with pytest.raises(RanError) as ran:
        dev.serve(settings, port, "warning")
    expected = ["dagster", "dev", "-m", "ghsync_dagster.definitions", "--host", "127.0.0.1", "--port", str(port)]
    assert list(ran.value.args) == [*expected, "--log-level", "warning"]
    assert capsys.readouterr().err.startswith(f"The Dagster UI comes up on http://127.0.0.1:{port}")
    assert Path(os.environ["DAGSTER_HOME"]) == settings.home_dir / "dagster"
    assert (settings.home_dir / "dagster" / "dagster.yaml").exists()


def test_a_dagster_home_that_is_set_is_used(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setenv("DAGSTER_HOME", str(own))
    with pytest.raises(RanError):
        dev.serve(settings, free_port(), "warning")
    assert (own / "dev.lock").exists()


def test_a_port_that_is_taken_is_refused_with_another(settings: Settings, taken: int) -> None:
    with pytest.raises(ConfigError, match=f"Port {taken} of 127.0.0.1 can't be served") as caught:
        dev.serve(settings, taken, "warning")
    assert f"make dev PORT={taken + 1}" in caught.value.way_out


def test_a_second_daemon_on_an_instance_is_refused_while_the_first_lives(settings: Settings) -> None:
    lock = settings.home_dir / "dagster" / "dev.lock"
    with runner(settings.home_dir) as holder:
        with pytest.raises(
            ConfigError, match=rf"runs already on {lock.parent}: process {holder.pid}, http://"
        ) as caught:
            dev.serve(settings, free_port(), "warning")
        assert "GHSYNC_HOME" in caught.value.way_out
        # What it starts holds the lock too, until it has become another program.
        assert holder.stdout is not None
        assert holder.stdout.readline() == "0 0 0\n"
        holder.kill()
    with pytest.raises(RanError):
        dev.serve(settings, free_port(), "warning")


@contextmanager
def runner(home: Path, *ignored: str) -> Iterator[subprocess.Popen[str]]:
    """Start RUNNER with these signals ignored and no other, wait until it runs, and end it whatever happens."""
    command = [sys.executable, "-c", RUNNER, str(home), str(free_port()), *ignored]
    # Who starts the tests may ignore signals, as nohup does, and RUNNER would then too.
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    try:
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    with running:
        assert running.stdout is not None
        try:
            assert running.stdout.readline() == "runs\n"
            yield running
        finally:
            running.kill()


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("ignored", [(), ("SIGINT",), ("SIGINT", "SIGTERM")])
def test_each_signal_ends_it_whatever_a_script_had_ignored(tmp_path: Path, ignored: tuple[str, ...], sent: str) -> None:
    with runner(tmp_path, *ignored) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "0 0 0\n"
        running.send_signal(signal.Signals[sent])
        _, told = running.communicate(timeout=30)
    assert "KeyboardInterrupt" in told


def test_a_closed_terminal_is_ignored_where_nohup_says_so(tmp_path: Path) -> None:
    with runner(tmp_path, "SIGHUP") as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "1 0 0\n"


class Late(http.server.BaseHTTPRequestHandler):
    """Serves nothing at first."""

    answers = iter([404, 500, 200])

    def do_GET(self) -> None:
        """Give the next answer."""
        self.send_response(next(self.answers) if self.path == "/server_info" else 400)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def test_it_is_told_that_the_ui_comes_up_and_then_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    told: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr(dev, "_say", told.put)
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.01)
    port = free_port()
    watch = threading.Thread(target=dev._report_until_served, args=(port, []), daemon=True)
    watch.start()
    for _ in range(2):
        assert told.get(timeout=10) == "The Dagster UI comes up: 0 s so far"
    with http.server.HTTPServer(("127.0.0.1", port), Late) as server:
        for _ in range(3):
            server.handle_request()
        watch.join(10)
    *lines, last = [told.get() for _ in range(told.qsize())]
    assert last == f"Dagster UI: http://127.0.0.1:{port}"
    assert last not in lines


def test_nothing_is_told_after_a_signal(capsys: pytest.CaptureFixture[str]) -> None:
    dev._report_until_served(free_port(), [signal.SIGTERM])
    assert capsys.readouterr().err == ""
