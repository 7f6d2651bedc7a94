"""Folders and files of local state: a check that a folder is writable and has room, and atomic writes.

Not here: which folders and files there are.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Final

from ghsync_dagster.domain.errors import ConfigError

ROOM: Final = 256 << 20
"""Bytes that a run or a local server needs at least."""
_MIB: Final = 1 << 20


def ensure_folder(folder: Path, variable: str, *, needed: int = ROOM) -> None:
    """Create a folder if it is missing, and check that files can be kept in it.

    Args:
        folder: The folder.
        variable: The setting that names it.
        needed: Bytes that must be free.

    Raises:
        ConfigError: It can't be created or written to, or its disk is nearly full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ConfigError(
            f"Nothing can be written to {folder} ({error.strerror or error}).",
            way_out=f"Free or fix it, or set {variable} to a folder on a disk that can be written to.",
        ) from None
    if free < needed:
        raise ConfigError(
            f"The disk of {folder} has {free // _MIB} MiB free, and at least {needed // _MIB} MiB are needed.",
            way_out=f"Free some, or set {variable} to a folder on a disk with room.",
        )


def write_whole(path: Path, content: str | bytes, variable: str, *, mode: int = 0o600) -> None:
    """Write a file whole or not at all, its folder too; by default only its owner can read it.

    Args:
        path: The file.
        content: Its content.
        variable: The setting that names its folder.
        mode: Its permissions.

    Raises:
        ConfigError: It can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In a private folder, which is removed in any case.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
            part = Path(folder) / path.name
            part.write_bytes(content.encode() if isinstance(content, str) else content)
            part.chmod(mode)
            part.replace(path)
    except OSError as error:
        raise ConfigError(
            f"{path} can't be written: {error.strerror or error}.",
            way_out=f"Make the folder writable, or set {variable} to a folder that is.",
        ) from None
