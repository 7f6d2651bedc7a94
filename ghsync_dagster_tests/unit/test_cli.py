"""The command line: every command explains itself, and every error is one message with its exit code."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import typer
from typer.testing import CliRunner, Result

from ghsync_dagster import wiring
from ghsync_dagster.cdc.health.connector import ConnectorReport
from ghsync_dagster.cdc.health.metrics import ChangeMetrics
from ghsync_dagster.cdc.stream.listener import APPLIED, AppliedBatch
from ghsync_dagster.cli import app as cli
from ghsync_dagster.cli import cdc as cli_cdc
from ghsync_dagster.domain.connector import ConnectorState, Sample
from ghsync_dagster.domain.errors import (
    ConfigError,
    GhsyncError,
    InputError,
    LeaseHeldError,
    RefusedError,
    UnavailableError,
)
from ghsync_dagster.local.kafka import KafkaServer
from ghsync_dagster.settings import load_settings
from ghsync_dagster_tests.support.cdc_parts import until

if TYPE_CHECKING:
    from collections.abc import Callable

COMMITTED = Path(__file__).parents[2] / "data" / "sample_data.json"
CALLBACKS = [(command.name, command.callback) for command in cli.app.registered_commands]
COMMANDS = sorted(name or callback.__name__ for name, callback in CALLBACKS if callback)


@pytest.fixture
def ghsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Return a function that runs the command in an empty folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GHSYNC_HOME", str(tmp_path / "home"))

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(cli.app, list(arguments))

    return run


def test_the_commands_of_the_batch_part_are_there() -> None:
    assert {"run", "batch", "audit", "report", "sample", "fetch", "up", "down", "status"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(ghsync: Callable[..., Result], command: str) -> None:
    result = ghsync(command, "--help")
    assert result.exit_code == 0
    assert f"ghsync {command}" in result.output or f"root {command}" in result.output
    assert "--help" in result.output
    assert result.output.count("\n") > 5


def test_without_a_command_the_help_lists_all(ghsync: Callable[..., Result]) -> None:
    result = ghsync()
    assert result.exit_code == 2
    assert all(command in result.output for command in COMMANDS)


@pytest.mark.parametrize(
    ("name", "value", "error", "way_out"),
    [
        (
            "GHSYNC_EVENT_PATH",
            "x",
            "GHSYNC_EVENT_PATH in the environment is no setting",
            "Did you mean GHSYNC_EVENTS_PATH",
        ),
        ("MONGODB_URI", "mongodb://u:s3cret@h", "No events are named", "ghsync run --events PATH"),
        ("MONGODB_DATABASE", "my db", "MONGODB_DATABASE: MongoDB allows no ' '", "see .env.example"),
    ],
)
def test_a_setting_that_is_wrong_ends_a_run_before_it_starts(
    ghsync: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, name: str, value: str, error: str, way_out: str
) -> None:
    monkeypatch.setenv(name, value)
    result = ghsync("run")
    assert result.exit_code == 2
    assert f"error: {error}" in result.output or f"error: Settings are wrong: {error}" in result.output
    assert way_out in result.output
    assert "s3cret" not in result.output
    assert list(Path.cwd().iterdir()) == []


def test_status_tells_which_file_and_folders_count(
    ghsync: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    lines = ghsync("status").stdout.splitlines()
    assert lines[0] == "settings from the environment alone: there is no .env in this folder"
    assert lines[1:3] == [f"GHSYNC_HOME={tmp_path / 'home'}", f"DAGSTER_HOME={tmp_path / 'home' / 'dagster'}"]
    assert not (tmp_path / "home" / "dagster").exists()
    (tmp_path / ".env").write_text("GHSYNC_LOG_LEVEL=INFO\n")
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    lines = ghsync("status").stdout.splitlines()
    assert (lines[0], lines[2]) == (f"settings {tmp_path / '.env'}", f"DAGSTER_HOME={tmp_path}")


def test_the_dagster_home_to_export_is_made_ready(
    ghsync: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Set and taken away, so that what the command sets is undone.
    monkeypatch.setenv("DAGSTER_HOME", "")
    monkeypatch.delenv("DAGSTER_HOME")
    told = ghsync("status", "--dagster-home")
    assert told.stdout == f"{tmp_path / 'home' / 'dagster'}\n"
    assert (tmp_path / "home" / "dagster" / "dagster.yaml").is_file()


def test_an_unknown_command_or_option_is_refused(ghsync: Callable[..., Result]) -> None:
    for arguments in (["unknown"], ["batch"], ["sample", "--unknown"], ["sample", "--events", "0"]):
        result = ghsync(*arguments)
        assert result.exit_code == 2
        assert "Traceback" not in result.output


def test_the_sample_is_written_byte_for_byte(ghsync: Callable[..., Result], tmp_path: Path) -> None:
    result = ghsync("sample")
    assert result.exit_code == 0
    assert (tmp_path / "data" / "sample_data.json").read_bytes() == COMMITTED.read_bytes()
    assert "28,600 events" in result.output


def test_another_seed_and_size_give_another_sample(ghsync: Callable[..., Result], tmp_path: Path) -> None:
    for seed in ("1", "1", "2"):
        assert ghsync("sample", "--events", "50", "--seed", seed, "--path", f"{seed}.json").exit_code == 0
    one, two = ((tmp_path / f"{seed}.json").read_bytes() for seed in (1, 2))
    assert one.count(b"\n") == two.count(b"\n") == 50
    assert one != two


def test_a_report_of_nothing_yet_says_what_to_run(ghsync: Callable[..., Result]) -> None:
    result = ghsync("report", "--json")
    assert result.exit_code == 2
    assert "nothing has been materialized" in result.stderr
    assert "make run" in result.stderr


ERRORS: list[tuple[GhsyncError, int]] = [
    (ConfigError("A setting is wrong.", way_out="Correct it."), 2),
    (InputError("A file is wrong.", way_out="Mend it."), 2),
    (RefusedError("Refused.", way_out="Check the password."), 2),
    (UnavailableError("Away.", way_out="Wait."), 3),
    (LeaseHeldError("Held.", way_out="Wait."), 3),
]


@pytest.mark.parametrize(("error", "code"), ERRORS, ids=lambda value: getattr(type(value), "__name__", str(value)))
def test_each_error_is_one_message_with_its_way_out_and_exit_code(error: GhsyncError, code: int) -> None:
    result = CliRunner().invoke(_raising(error), [])
    assert result.exit_code == code
    assert result.stderr == f"error: {error.message}\nway out: {error.way_out}\n"
    assert result.stdout == ""


def test_credentials_in_an_error_are_masked() -> None:
    error = UnavailableError("No mongodb://app:s3cr3t@db.", way_out="Look at mongodb://app:s3cr3t@db.")
    result = CliRunner().invoke(_raising(error), [])
    assert "s3cr3t" not in result.output
    assert "mongodb://***@db" in result.stderr


def _raising(error: BaseException) -> typer.Typer:
    """Return a command of the real group that fails."""
    app = typer.Typer(cls=cli.app.info.cls, invoke_without_command=True)

    @app.callback()
    def fail() -> None:
        raise error

    @app.command()
    def unused() -> None:
        """Make it a group."""

    return app


def test_an_interrupt_is_told_in_one_word() -> None:
    result = CliRunner().invoke(_raising(KeyboardInterrupt()), [])
    assert result.exit_code == 130
    assert result.stderr == "stopped\n"


PRINTS = """
from ghsync_dagster.cli import app as cli
from ghsync_dagster.cli.common import console
cli.app.command("rich")(lambda: console().print("x"))
cli.app.command("plain")(lambda: cli.typer.echo("x" * 100_000))
cli.main()
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["plain", "rich"])
def test_a_pipe_that_nobody_reads_any_more_ends_the_command_quietly(command: str, unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = subprocess.run(
            [sys.executable, "-c", PRINTS, command],
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=writer,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_a_server_s_broken_pipe_is_an_error() -> None:
    result = CliRunner().invoke(_raising(BrokenPipeError(errno.EPIPE, "Broken pipe")), [])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: [Errno 32] Broken pipe")


def test_malformed_settings_end_any_command_at_once(
    ghsync: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GHSYNC_RETRY_ATTEMPTS", "few")
    for arguments in (
        ["batch", "x.json"],
        ["cdc", "run"],
        ["cdc", "drain"],
        ["status"],
        ["audit"],
        ["report"],
        ["sample"],
        ["run"],
    ):
        result = ghsync(*arguments)
        assert result.exit_code == 2
        assert "error: Settings are wrong: GHSYNC_RETRY_ATTEMPTS: " in result.stderr
        assert "way out: " in result.stderr


def test_sigterm_ends_the_command_with_143(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    environment = {**os.environ, "GHSYNC_HOME": str(tmp_path / "home"), "MONGODB_URI_FILE": str(tmp_path / "pipe")}
    # Reading its setting from a pipe, the command waits for as long as nobody writes.
    with subprocess.Popen(
        [sys.executable, "-m", "ghsync_dagster.cli", "report"], env=environment, stderr=subprocess.PIPE
    ) as process:
        writer = _opened_by_a_reader(tmp_path / "pipe")
        try:
            # Python acts on a signal between two steps or in a call that it interrupts: one just before waits with it.
            until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_SLEEPING)
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 143
        finally:
            os.close(writer)
            process.kill()
    assert process.stderr is not None


def _opened_by_a_reader(pipe: Path) -> int:
    """Open a pipe for writing as soon as somebody reads it."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


@pytest.mark.parametrize(
    "command",
    ["cdc run", "cdc drain", "cdc audit", "dlq list", "dlq show t-0-0", "dlq close t-0-0", "dlq close --superseded"],
)
def test_what_needs_kafka_starts_none_where_there_is_none(
    ghsync: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("GHSYNC_HOME", str(tmp_path))
    monkeypatch.delenv("KAFKA_BOOTSTRAP_SERVERS", raising=False)
    monkeypatch.setattr(KafkaServer, "up", lambda *_: pytest.fail("Kafka was started"))
    result = ghsync(*command.split())
    assert result.exit_code == 3
    assert "There is no Kafka: KAFKA_BOOTSTRAP_SERVERS is not set" in result.stderr
    assert "ghsync up" in result.stderr
    assert not (tmp_path / "kafka").exists()


def test_a_consumer_s_line_has_no_figure_for_what_is_not_known() -> None:
    metrics = ChangeMetrics()
    found = cli_cdc._brief(metrics.snapshot())
    unknown = {name for name, value in found.items() if value is None}
    assert unknown == {"p50_ms", "p99_ms", "max_ms", "lag", "lag_seconds", "connector"}
    metrics.assigned([0])
    metrics.lag(0, 7, 1.54)
    now = 1_700_000_000_000
    batch = AppliedBatch({("c", APPLIED): 1}, now, committed_ms=[now - 80], appended_ms=[now - 40], write_seconds=0.1)
    metrics.batch_applied(batch)
    found = cli_cdc._brief(metrics.snapshot())
    assert (found["p50_ms"], found["lag"], found["lag_seconds"]) == (80, 7, 1.5)


def test_the_report_goes_on_after_an_error_and_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, hangs, left = threading.Event(), threading.Event(), threading.Event()
    errors = [RefusedError("Refused.", way_out="Check the password.")]

    class Probe:
        def report(self, *, with_log: bool) -> ConnectorReport:
            assert not with_log
            if errors:
                raise errors.pop()
            asked.set()
            hangs.wait(60)
            left.set()
            return ConnectorReport(ConnectorState("RUNNING"), Sample(0))

    monkeypatch.setattr(wiring, "connector_probe", lambda _: Probe())
    monkeypatch.setattr(cli_cdc, "_REPORT_END_SECONDS", 0.05)
    settings = load_settings(GHSYNC_HOME=tmp_path, GHSYNC_CDC_REPORT_SECONDS="0.1")
    with cli_cdc._reporting(ChangeMetrics(), settings):
        assert asked.wait(10)
    assert not left.is_set()
    hangs.set()
    assert left.wait(10)


@pytest.mark.parametrize(("before", "after", "code"), [("FAILED", "RUNNING", 0), ("RUNNING", "PAUSED", 3)])
def test_a_drain_goes_by_the_connector_at_its_end(
    ghsync: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, before: str, after: str, code: int
) -> None:
    states = [before, after]
    monkeypatch.setattr(cli_cdc, "_connector", lambda _: ConnectorState(states.pop(0)))
    monkeypatch.setattr(cli_cdc, "_check_source", lambda: None)
    monkeypatch.setattr(cli_cdc, "_consume", lambda **_: None)
    result = ghsync("cdc", "drain")
    assert (result.exit_code, states) == (code, [])
    assert (f"is {before}" in result.stderr) == (before != "RUNNING")
