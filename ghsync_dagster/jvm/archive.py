"""Makes the archive of loaded classes, with which a Spark session starts in half the processor time.

Belongs here: the training run that fills the archive. Not here: the options that use it (``java``).

An archive holds just the classes that were loaded. So the training run is a small batch through the real commands, in a
folder of its own.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil

from ghsync_dagster.domain.errors import GhsyncError
from ghsync_dagster.jvm.java import archive_file, find_java, installed_spark, keeps_own_archive
from ghsync_dagster.logging import get_logger
from ghsync_dagster.settings import environment_without_settings, load_settings
from ghsync_dagster.stopping import exit_on_signals, uninterrupted

if TYPE_CHECKING:
    from ghsync_dagster.settings import Settings

_EVENTS: Final = "2000"
_RUN_SECONDS: Final = 300
_EXIT_SECONDS: Final = 120
log = get_logger("java")


def make_archive(settings: Settings) -> bool:
    """Make the archive for the Java in use, unless it exists; remove unused files of earlier set-ups.

    Returns:
        Whether it exists now. Without it everything works, only slower.
    """
    java = find_java(settings)
    archive = archive_file(java, settings)
    archive.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(archive)
    if archive.exists():
        return True
    with tempfile.TemporaryDirectory(prefix="ghsync-archive-") as folder:
        part = archive if keeps_own_archive(java) else archive.with_suffix(f".{os.getpid()}.part")
        options = [] if keeps_own_archive(java) else [f"-XX:ArchiveClassesAtExit={part}", "-Xlog:cds*=off"]
        environment = {
            # With settings the training run might use real servers or a cluster.
            **environment_without_settings(),
            "GHSYNC_HOME": folder,
            "GHSYNC_CACHE": str(settings.cache_dir),
            "SPARK_DRIVER_JAVA_OPTIONS": shlex.join(options),
        }
        events = str(Path(folder) / "events.json")
        try:
            _ghsync(folder, environment, "sample", "--path", events, "--events", _EVENTS)
            _ghsync(folder, environment, "batch", events)
            # The JVMs write it last.
            psutil.wait_procs(_users(archive), timeout=_EXIT_SECONDS)
        except (OSError, subprocess.SubprocessError) as error:
            part.unlink(missing_ok=True)
            log.warning("training run failed", reason=_last_line(error))
        finally:
            with uninterrupted():
                _stop_server(folder, environment)
        if part != archive and part.exists():
            part.replace(archive)
    remove_leftovers(archive)
    return archive.exists()


def remove_leftovers(archive: Path) -> None:
    """Remove unused archives.

    Those are unfinished ones of dead processes, and those of a Spark that is gone or that no ``.place`` file names.
    Once ``archive`` exists, those of earlier jars at the same location are unused too. One in use stays.
    """
    folder, location = archive.parent, _location(archive)
    (folder / f"{location}.place").write_text(str(installed_spark()), encoding="utf-8")
    for path in folder.glob("classes-*.part"):
        if not _is_being_made(path):
            path.unlink(missing_ok=True)
    for other in folder.glob("classes-*.place"):
        # Another set-up with the same folder may remove it meanwhile.
        with suppress(FileNotFoundError):
            if not Path(other.read_text(encoding="utf-8")).exists():
                other.unlink()
    locations = {path.stem for path in folder.glob("classes-*.place")}
    for path in folder.glob("classes-*.jsa"):
        is_of_earlier_jars = _location(path) == location and path != archive and archive.exists()
        if (is_of_earlier_jars or _location(path) not in locations) and not _users(path):
            path.unlink(missing_ok=True)


def _location(archive: Path) -> str:
    """Return the part of an archive's name that identifies its Java and the location of its Spark."""
    return "-".join(archive.stem.split("-")[:3])


def _is_being_made(part: Path) -> bool:
    process = part.stem.rpartition(".")[2]
    return process.isdecimal() and psutil.pid_exists(int(process))


def _ghsync(folder: str, environment: dict[str, str], *arguments: str) -> None:
    # In the run's own folder, where no .env names a real MongoDB.
    command = [sys.executable, "-m", "ghsync_dagster.cli", *arguments]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, timeout=_RUN_SECONDS)


def _stop_server(folder: str, environment: dict[str, str]) -> None:
    try:
        _ghsync(folder, environment, "down")
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("training run's server not stopped", reason=_last_line(error))


def _last_line(error: Exception) -> str:
    output = (getattr(error, "stderr", None) or b"").decode("utf-8", "replace").strip()
    return output.splitlines()[-1] if output else str(error)


def _users(archive: Path) -> list[psutil.Process]:
    """Return the processes whose command line names an archive, finished or not."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(str(archive.with_suffix("")) in argument for argument in process.cmdline()):
                found.append(process)
    return found


def main() -> int:
    """Make the archive and print the outcome; the exit code is 1 if there is none, though only speed depends on it."""
    exit_on_signals()
    started = time.monotonic()
    try:
        made = make_archive(load_settings())
    except GhsyncError as error:
        sys.stdout.write(f"no class archive: {error}\n")
        return 1
    outcome = "Java's class archive is ready" if made else "no class archive could be made"
    sys.stdout.write(f"{outcome} ({time.monotonic() - started:.1f} s)\n")
    return 0 if made else 1


if __name__ == "__main__":
    sys.exit(main())
