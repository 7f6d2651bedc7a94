"""The class archive: made once by a real batch (set-up has done so), used by the sessions after it."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import psutil
import pytest

from ghsync_dagster.jvm import archive
from ghsync_dagster.jvm.archive import make_archive
from ghsync_dagster.jvm.java import archive_file, find_java, jvm_options

if TYPE_CHECKING:
    from pathlib import Path

    from ghsync_dagster.settings import Settings
    from ghsync_dagster.stores.spark import SparkHandle

pytestmark = [pytest.mark.integration, pytest.mark.servers("spark")]


def test_the_archive_is_made_once_and_named_to_the_jvm(server_settings: Settings) -> None:
    java = find_java(server_settings)
    file = archive_file(java, server_settings)
    assert make_archive(server_settings)
    assert file.stat().st_size > 10_000_000
    assert f"-XX:SharedArchiveFile={file}" in jvm_options(java, server_settings)
    made = file.stat().st_mtime_ns
    assert make_archive(server_settings)
    assert file.stat().st_mtime_ns == made
    assert not file.with_suffix(f".{os.getpid()}.part").exists()


def test_the_session_runs_from_the_archive(server_settings: Settings, spark: SparkHandle) -> None:
    make_archive(server_settings)
    spark.session()
    file = str(archive_file(find_java(server_settings), server_settings))
    children = psutil.Process().children(recursive=True)
    alive = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
    mapped = [entry.path for child in alive for entry in child.memory_maps()]
    assert file in mapped


def test_a_signal_in_the_training_run_leaves_no_server(
    server_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def run(_folder: str, _environment: dict[str, str], command: str, *_: str) -> None:
        asked.append(command)
        signal.raise_signal(signal.SIGTERM)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(archive, "_ghsync", run)
    monkeypatch.setattr(archive, "archive_file", lambda *_: tmp_path / "none.jsa")
    monkeypatch.setattr(archive, "load_settings", lambda: server_settings)
    try:
        with pytest.raises(SystemExit, match="143"):
            archive.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert asked == ["sample", "down"]


def test_usual_names_beside_a_setting_do_not_end_the_training_run(
    server_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["MONGO_URL", "MONGODB_URL", "KAFKA_BROKERS", "EVENTS_PATH", "SPARK_MASTER_URL", "mongo_uri", "EVENTS"]
    for name in (*names, "MONGODB_URI", "GHSYNC_EVENTS_PATH", "KAFKA_BOOTSTRAP_SERVERS", "SPARK_MASTER"):
        monkeypatch.setenv(name, "mongodb://elsewhere")
    really, ran = archive._ghsync, []

    def run(folder: str, environment: dict[str, str], command: str, *arguments: str) -> None:
        # To make the sample needs no Java, and all settings.
        if command == "sample":
            really(folder, environment, command, *arguments)
        ran.append(command)

    monkeypatch.setattr(archive, "_ghsync", run)
    monkeypatch.setattr(archive, "archive_file", lambda *_: tmp_path / "none.jsa")
    make_archive(server_settings)
    assert ran == ["sample", "batch", "down"]


def test_an_archive_that_could_not_be_made_is_no_success(
    server_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(archive, "exit_on_signals", lambda: None)
    monkeypatch.setattr(archive, "_ghsync", lambda *_: None)
    monkeypatch.setattr(archive, "archive_file", lambda *_: tmp_path / "none.jsa")
    monkeypatch.setattr(archive, "load_settings", lambda: server_settings)
    assert archive.main() == 1
    assert "no class archive could be made" in capsys.readouterr().out
