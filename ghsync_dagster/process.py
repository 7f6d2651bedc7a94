"""Who a process is, so that another one can tell whether it is gone, even where its number is used again.

Belongs here: the identity of a process of this machine. Not here: what is done with it.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Final

import psutil

_GONE_STATES: Final = "ZXx"


def identity(pid: int) -> str:
    """Return who a process of this machine is: host, boot, process namespace, number and start.

    So another process of the same machine can tell whether it is gone, even where its number is used again.
    """
    return f"{_machine()}|{pid}|{_started(pid)}"


def _machine() -> str:
    namespace = Path("/proc/self/ns/pid")
    boot = Path("/proc/sys/kernel/random/boot_id")
    parts = [socket.gethostname(), str(namespace.readlink()) if namespace.is_symlink() else ""]
    return "/".join([*parts, boot.read_text().strip() if boot.exists() else ""])


def _started(pid: int) -> str | None:
    """Return when a process started, in words that stay the same while it lives; None where it is gone.

    Linux counts from the boot: a wall-clock time would change whenever the clock is set.
    """
    if Path("/proc/self/stat").exists():
        try:
            state, *fields = (
                Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            )
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if state in _GONE_STATES else fields[18]
    try:
        return f"{psutil.Process(pid).create_time():.0f}"
    except psutil.NoSuchProcess:
        return None


def is_gone(process: str) -> bool:
    """Tell whether a process, by its identity, was of this machine and is gone."""
    machine, _, rest = process.partition("|")
    pid, _, started = rest.partition("|")
    if machine != _machine() or not pid.isdigit():
        return False
    try:
        return _started(int(pid)) != started
    except (psutil.AccessDenied, PermissionError):
        return False
