"""Dagster's own storage on this machine: its folder under GHSYNC_HOME and the settings of its instance.

Belongs here: what a local instance needs. Not here: how Dagster is deployed elsewhere.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster.folders import ensure_folder, write_whole

if TYPE_CHECKING:
    from ghsync_dagster.settings import Settings

_FOLDER: Final = "dagster"
_ROOM: Final = 32 << 20
"""Bytes that the event log of a run needs at least."""
INSTANCE: Final = """\
# Written once; edit as you like.
telemetry:
  enabled: false
nux:
  enabled: false
concurrency:
  # The pool mongo_users has no limit: the load's own lease admits one load at a time, and ends with its process.
  runs:
    tag_concurrency_limits:
      # While one slice of the change consumer takes over from another, two run, and never more.
      - key: ghsync/flow
        value: cdc
        limit: 2
run_queue:
  # A slice that ended too early is replaced sooner.
  dequeue_interval_seconds: 1
run_monitoring:
  enabled: true
  # A run that does not start, or does not end when it is cancelled, is marked as failed.
  start_timeout_seconds: 180
  cancel_timeout_seconds: 120
  poll_interval_seconds: 30
retention:
  sensor:
    purge_after_days:
      # The supervisor of the change consumer ticks every five seconds, mostly to skip.
      skipped: 1
"""


def use_dagster_home(settings: Settings) -> Path:
    """Return DAGSTER_HOME; if the environment has none, set it to the folder under GHSYNC_HOME.

    Raises:
        ConfigError: It names no folder, or nothing can be written there.
    """
    home = dagster_home_of(settings)
    if "DAGSTER_HOME" not in os.environ:
        ensure_dagster_home(settings)
        os.environ["DAGSTER_HOME"] = str(home)
    if not home.is_absolute() or not home.is_dir():
        raise ConfigError(
            f"DAGSTER_HOME is {str(home)!r}, which is no absolute path of a folder that exists.",
            way_out="Create the folder and name it by its absolute path, or unset DAGSTER_HOME.",
        )
    ensure_folder(home, "DAGSTER_HOME", needed=_ROOM)
    return home


def dagster_home_of(settings: Settings) -> Path:
    """Return DAGSTER_HOME of the environment, else the folder under GHSYNC_HOME, whether or not it exists."""
    return Path(os.environ["DAGSTER_HOME"]) if "DAGSTER_HOME" in os.environ else settings.home_dir / _FOLDER


def ensure_dagster_home(settings: Settings) -> Path:
    """Return the folder for DAGSTER_HOME; create it and its ``dagster.yaml`` if they are missing."""
    home = settings.home_dir / _FOLDER
    ensure_folder(home, "GHSYNC_HOME")
    instance = home / "dagster.yaml"
    if not instance.exists():
        write_whole(instance, INSTANCE, "GHSYNC_HOME", mode=0o644)
    return home
