"""One UI with daemon an instance, on a port that is free: what can't be served is told before anything starts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cdc_parts import free_port

from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster.local import dev
from ghsync_dagster.settings import load_settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ghsync_dagster.settings import Settings

HOLDER = """
import os, sys
from pathlib import Path
from ghsync_dagster.local import dev
dev._claim(Path(sys.argv[1]), 3000)
os.execv(sys.executable, [sys.executable, "-c", "print('is another program now', flush=True); input()"])
"""


class BecameError(Exception):
    """What the process would have become."""


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of an instance of the test's own; to become another program raises."""

    def become(program: str, command: list[str]) -> None:
        assert program == command[0]
        raise BecameError(*command[1:])

    monkeypatch.setattr(os, "execv", become)
    # Set and taken away, so that what the code sets is undone.
    monkeypatch.setenv("DAGSTER_HOME", "")
    monkeypatch.delenv("DAGSTER_HOME")
    return load_settings(GHSYNC_HOME=tmp_path)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def test_the_ui_is_served_on_the_instance_under_the_home(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    with pytest.raises(BecameError) as became:
        dev.serve(settings, port, "warning")
    ignored, *command = became.value.args[1:]
    assert ignored.startswith("ignore:Function `dev_command`")
    expected = ["-m", "dagster", "dev", "-m", "ghsync_dagster.definitions", "--host", "127.0.0.1", "--port", str(port)]
    assert command == [*expected, "--log-level", "warning"]
    assert capsys.readouterr().err.startswith(f"The Dagster UI comes up on http://127.0.0.1:{port}")
    assert Path(os.environ["DAGSTER_HOME"]) == settings.home_dir / "dagster"
    assert (settings.home_dir / "dagster" / "dagster.yaml").exists()


def test_a_dagster_home_that_is_set_is_used(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setenv("DAGSTER_HOME", str(own))
    with pytest.raises(BecameError):
        dev.serve(settings, free_port(), "warning")
    assert (own / "dev.lock").exists()


def test_a_port_that_is_taken_is_refused_with_another(settings: Settings, taken: int) -> None:
    with pytest.raises(ConfigError, match=f"Port {taken} of 127.0.0.1 can't be served") as caught:
        dev.serve(settings, taken, "warning")
    assert f"make dev PORT={taken + 1}" in caught.value.way_out


def test_a_second_daemon_on_an_instance_is_refused_while_the_first_lives(settings: Settings) -> None:
    lock = settings.home_dir / "dagster" / "dev.lock"
    lock.parent.mkdir(parents=True)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "is another program now\n"
        with pytest.raises(
            ConfigError, match=rf"runs already on {lock.parent}: process {holder.pid}, http://"
        ) as caught:
            dev.serve(settings, free_port(), "warning")
        assert "GHSYNC_HOME" in caught.value.way_out
        holder.communicate("\n")
    with pytest.raises(BecameError):
        dev.serve(settings, free_port(), "warning")
