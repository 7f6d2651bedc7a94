"""Who a process is: another one of its number is told from it, and one that has ended counts as gone."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ghsync_dagster.process import born, identity, is_gone

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives until it is killed."""
    with subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]) as running:
        yield running
        running.kill()


def test_a_process_is_itself_until_it_ends_also_where_nobody_has_reaped_it(child: subprocess.Popen[bytes]) -> None:
    mine, since = identity(child.pid), born(child.pid)
    assert (is_gone(mine), born(child.pid)) == (False, since)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert (is_gone(mine), born(child.pid)) == (True, None)
    child.wait()
    assert (is_gone(mine), born(child.pid)) == (True, None)


def test_another_process_of_the_same_number_is_another_and_one_of_another_machine_is_unknown() -> None:
    mine = identity(os.getpid())
    machine, number, _ = mine.split("|")
    assert is_gone(f"{machine}|{number}|0")
    assert not is_gone(f"elsewhere|{number}|0")


def test_state_files_of_earlier_builds_are_understood(child: subprocess.Popen[bytes]) -> None:
    ticks = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19]
    assert born(child.pid) == f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{ticks}"


def test_a_machine_that_is_renamed_makes_no_stranger_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    since = born(os.getpid())
    monkeypatch.setattr(socket, "gethostname", lambda: "renamed")
    assert born(os.getpid()) == since


def test_a_boot_that_is_not_told_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    read_text = Path.read_text

    def refuse(path: Path, *arguments: Any, **more: Any) -> str:
        if path.name == "boot_id":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read_text(path, *arguments, **more)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert str(born(os.getpid())).startswith("/")
    assert not is_gone(identity(os.getpid()))
