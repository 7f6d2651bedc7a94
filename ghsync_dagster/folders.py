"""A folder that is about to be written into: it is there, it can be written to, and it has room.

Belongs here: what is asked of the file system before any work. Not here: which folders there are.
"""

from __future__ import annotations

import shutil
import tempfile
from typing import TYPE_CHECKING, Final

from ghsync_dagster.domain.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

ROOM: Final = 256 << 20
"""Bytes that a run or a local server needs at the least."""
_MIB: Final = 1 << 20


def ensure_folder(folder: Path, variable: str, *, needed: int = ROOM) -> None:
    """Create a folder where there is none, and see that files can be kept in it.

    Args:
        folder: The folder.
        variable: The setting that decides on it.
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
