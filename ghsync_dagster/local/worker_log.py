"""The local Connect worker's log, which warns of statements in the binlog that produce no events.

Belongs here: which part of the log counts. Not here: what a line means (``domain.source``).
"""

from __future__ import annotations

import os
from datetime import datetime
from typing import TYPE_CHECKING, Final

from ghsync_dagster.domain.source import Statements, logged_at, statements_in
from ghsync_dagster.folders import write_whole

if TYPE_CHECKING:
    from pathlib import Path

    from ghsync_dagster.domain.source import Source

_LOG_BLOCK: Final = 1 << 18
_LOG_BYTES: Final = 1 << 23


class WorkerLog:
    """The log of the worker in use.

    Args:
        log: The file.
        closed: The file that holds the time since which statements count.
    """

    def __init__(self, log: Path, closed: Path) -> None:
        self._log = log
        self._closed = closed

    def statements(self, source: Source, since: datetime) -> Statements | None:
        """Return the statements since a time, or since both sides were last equal; None if the log can't be read."""
        if self._closed.exists():
            since = max(since, datetime.fromisoformat(self._closed.read_text(encoding="utf-8")))
        try:
            return statements_in(_end_of(self._log, since), source, since)
        except OSError:
            return None

    def close(self, began: datetime) -> None:
        """Let only later statements count: both sides were equal in a comparison that began then."""
        write_whole(self._closed, began.isoformat(), "GHSYNC_HOME")


def _end_of(log: Path, since: datetime) -> str:
    """Return the end of a log, read backwards by block until one begins before a time, within a limit."""
    end = b""
    with log.open("rb") as file:
        offset = file.seek(0, os.SEEK_END)
        while offset > 0 and len(end) < _LOG_BYTES:
            size = min(_LOG_BLOCK, offset)
            offset = file.seek(offset - size)
            end = file.read(size) + end
            times = (logged_at(line.decode(errors="replace")) for line in end[:_LOG_BLOCK].splitlines())
            if (first := next((at for at in times if at is not None), None)) is not None and first < since:
                break
    return end.decode(errors="replace")
