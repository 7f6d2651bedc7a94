"""The identity of a process, by which another process finds out whether it is gone, even if its pid is reused.

Not here: what is done with it.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil

_GONE_STATES: Final = "ZXx"


def identity(pid: int) -> str:
    """Return what identifies a process among those of all machines: host, process namespace, boot, pid and start."""
    return f"{_machine()}|{pid}|{_started(pid)}"


def is_gone(process: str) -> bool:
    """Return whether the process of an ``identity`` ran on this machine and is gone."""
    machine, _, rest = process.partition("|")
    pid, _, started = rest.partition("|")
    if machine != _machine() or not pid.isdigit():
        return False
    try:
        return _started(int(pid)) != started
    except (psutil.AccessDenied, PermissionError):
        return False


def born(pid: int) -> str | None:
    """Return what distinguishes a process of this machine from others with its pid; None if it is gone.

    Unlike the identity this has no host name, which may change while the process lives.
    """
    started = _started(pid)
    return None if started is None else f"{_boot()}/{started}"


def _machine() -> str:
    namespace = Path("/proc/self/ns/pid")
    return "/".join([socket.gethostname(), str(namespace.readlink()) if namespace.is_symlink() else "", _boot()])


def _boot() -> str:
    """Return the id of this boot; an empty one if it can't be read, as in a sandbox."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return ""


def _started(pid: int) -> str | None:
    """Return when a process started, as a text that stays the same while it lives; None if it is gone.

    Linux counts from the boot (proc(5), field 22 of ``stat``): a time of day would change when the clock is set.
    """
    if Path("/proc/self/stat").exists():
        try:
            # The program's name is in parentheses and may contain any character, also a parenthesis.
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
