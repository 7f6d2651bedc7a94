"""The data version of a step: equal only if input files and code are certainly equal.

Belongs here: what distinguishes files and builds of the code, and how a version is computed from that. Not here: where
versions are stored or shown.

In doubt a version differs although the data is the same, never the other way round.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import uuid
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import os

UNKNOWN: Final = ""
"""An unknown version: equal to no other, itself included."""

_PACKAGE: Final = Path(__file__).parents[1]
_ROOMS: Final = ("domain", "batch", "stores")
"""The folders whose code decides what a step writes."""
_LIBRARIES: Final = ("msgspec", "pyarrow", "pyspark", "pymongo")


@dataclass(frozen=True, slots=True, order=True)
class FileState:
    """What distinguishes the content of a file from any other that was or will be at its path.

    Two changes within a tick of the file system's clock, some milliseconds, are distinguished by size and inode alone.

    Attributes:
        path: Absolute path.
        size: Bytes.
        modified_ns: When the content was changed last, as the file says, in ns since 1970. A program may set it back.
        changed_ns: When content or attributes were changed last, in ns since 1970. No program can set it.
        inode: The file's number in its file system: if it differs, another file is at the path.
    """

    path: str
    size: int
    modified_ns: int
    changed_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class InputState:
    """The state of all input files at one moment, in the order of their paths."""

    files: tuple[FileState, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def version(self) -> str:
        """The version of the input."""
        return version_of(*(repr(file) for file in self.files))


def state_of(path: str, found: os.stat_result) -> FileState:
    """Return the state of a file from its ``stat``."""
    return FileState(path, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def version_of(*parts: str) -> str:
    """Return the version that results from others; a unique one if one of them is unknown.

    >>> version_of("a", "b") == version_of("a", "b")
    True
    >>> version_of("a", UNKNOWN) == version_of("a", UNKNOWN)
    False
    """
    if UNKNOWN in parts:
        return uuid.uuid4().hex
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode(errors="surrogateescape")
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()[:32]


@cache
def code_version(rules_module: str | None) -> str:
    """Return the version of the code that decides what a step writes.

    That is the source of this package's flows, their libraries, Python, and the project's own rules: their module with
    its whole package. A change that alters no data, as of a comment, makes another version too.

    Args:
        rules_module: Name of the module with the project's own rules, or None.
    """
    libraries = [f"{name} {version(name)}" for name in _LIBRARIES]
    sources = [file for room in _ROOMS for file in sorted((_PACKAGE / room).rglob("*.py"))]
    own = _sources_of(rules_module) if rules_module else []
    if own is None:
        return version_of(UNKNOWN)
    return version_of(
        sys.version,
        *libraries,
        *(f"{file.relative_to(_PACKAGE)}\n{_digest(file)}" for file in sources),
        *(_digest(file) for file in own),
    )


def _sources_of(module: str) -> list[Path] | None:
    """Return the files of a module and of its package; None if it can't be found."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return None
    file = Path(spec.origin)
    return sorted(file.parent.rglob("*.py")) if "." in module or spec.submodule_search_locations else [file]


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
