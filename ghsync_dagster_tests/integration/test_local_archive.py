"""The class archive: made once by a real batch (set-up has done so), used by the sessions after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil
import pytest

from ghsync_dagster.local.java import archive_file, find_java, jvm_options
from ghsync_dagster.local.java_archive import make_archive

if TYPE_CHECKING:
    from ghsync_dagster.settings import Settings
    from ghsync_dagster.stores.spark import SparkHandle

pytestmark = pytest.mark.integration


def test_the_archive_is_made_once_and_named_to_the_jvm(server_settings: Settings) -> None:
    java = find_java(server_settings)
    archive = archive_file(java, server_settings)
    assert make_archive(server_settings)
    assert archive.stat().st_size > 10_000_000
    assert f"-XX:SharedArchiveFile={archive}" in jvm_options(java, server_settings)
    made = archive.stat().st_mtime_ns
    assert make_archive(server_settings)
    assert archive.stat().st_mtime_ns == made
    assert not [entry for entry in archive.parent.iterdir() if entry.suffix == ".part"]


def test_the_session_runs_from_the_archive(server_settings: Settings, spark: SparkHandle) -> None:
    make_archive(server_settings)
    spark.session()
    archive = str(archive_file(find_java(server_settings), server_settings))
    children = psutil.Process().children(recursive=True)
    alive = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
    mapped = [entry.path for child in alive for entry in child.memory_maps()]
    assert archive in mapped
