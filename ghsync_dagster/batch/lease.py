"""The load's lease: one writer of the collection at a time, across processes, hosts and deployments.

Belongs here: taking, keeping and giving back the lease. Not here: what is done under it.

The lease runs by the server's clock and is renewed in the background. A holder counts it as lost, by its own clock
that never goes back and counts sleep, before the server would let another take it; so a process that was suspended
stops by itself. A holder of this machine that is dead, and Spark's driver, which writes for it, with it, is replaced
before its lease runs out.

A server goes on with a command whose client is gone. So a lease changes hands only a quiet time after its holder sent
its last command: after it died, after it gave up with a command perhaps unanswered, or, where it only ran out, after
its holder stopped by itself.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil

from ghsync_dagster import clock
from ghsync_dagster.domain.errors import GhsyncError, LeaseHeldError, LeaseLostError, TransientError
from ghsync_dagster.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ghsync_dagster.stores.mongo.users import Lease, UserStore

TTL_SECONDS: Final = 30.0
QUIET_SECONDS: Final = 6.0
"""How long a server may take for one command of a load: a thousand writes, or a bulk of five thousand inserts."""
_RENEW_SECONDS: Final = 8.0
_POLL_SECONDS: Final = 0.5
_GONE_STATES: Final = "ZXx"
log = get_logger("lease")


@dataclass
class HeldLease:
    """A lease in hand. ``assert_held`` before each write."""

    name: str
    token: str
    quiet_seconds: float = QUIET_SECONDS
    _renewed: float = field(default_factory=clock.now)
    _lost: bool = False

    def assert_held(self) -> None:
        """Raise if the lease may belong to another by now.

        Raises:
            LeaseLostError: It was taken, or could not be renewed in time.
        """
        if self._lost or clock.now() - self._renewed > TTL_SECONDS - self.quiet_seconds:
            raise LeaseLostError(
                "The load's lease ran out before the load was done; nothing was written after that.",
                way_out="Run again: the next load settles what this one left.",
            )

    def renewed(self, at: float) -> None:
        """Note a renewal that was asked for at the time ``at`` of ``clock.now``."""
        self._renewed = at

    def lose(self) -> None:
        """Note that another holds the lease."""
        self._lost = True


def holder_at_work(store: UserStore) -> str | None:
    """Return who holds the collection's lease now, in words; None where no load is on."""
    standing = store.lease(_name(store))
    if standing is None or standing.expires_at < store.server_time() or _is_dead(standing):
        return None
    return _words(standing)


def _name(store: UserStore) -> str:
    return f"load:{store.users.name}"


@contextmanager
def hold_lease(store: UserStore, *, wait_seconds: float, quiet_seconds: float = QUIET_SECONDS) -> Iterator[HeldLease]:
    """Hold the collection's lease.

    Args:
        store: The store whose collection is to be written.
        wait_seconds: How long to wait for another holder.
        quiet_seconds: How long the server may still be at work on the last command of a holder that is gone.

    Raises:
        LeaseHeldError: Another load still holds it after ``wait_seconds``.
    """
    name = _name(store)
    held = _acquire(store, name, wait_seconds, quiet_seconds)
    stop = threading.Event()
    renewer = threading.Thread(target=_renew, args=(store, held, stop), name="lease", daemon=True)
    renewer.start()
    answered = False
    try:
        yield held
        answered = True
    finally:
        stop.set()
        renewer.join()
        _give_back(store, held, answered=answered)


def _give_back(store: UserStore, held: HeldLease, *, answered: bool) -> None:
    """Give the lease back: at once where every command was answered, else after the quiet time."""
    try:
        if answered:
            store.release_lease(held.name, held.token)
        else:
            store.extend_lease(held.name, held.token, store.server_time() + timedelta(seconds=held.quiet_seconds))
    except GhsyncError as error:
        log.warning("the lease was not given back; it runs out by itself", reason=error.message)


def _acquire(store: UserStore, name: str, wait_seconds: float, quiet_seconds: float) -> HeldLease:
    from ghsync_dagster.stores.mongo.users import Lease

    deadline = clock.now() + wait_seconds
    token = uuid.uuid4().hex
    announced = False
    dead_since: dict[str, float] = {}
    last: Lease | None = None
    while True:
        asked = clock.now()
        now = store.server_time()
        standing = store.lease(name)
        dead = standing is not None and _is_dead(standing)
        if standing is not None and dead:
            dead_since.setdefault(standing.token, asked)
        quiet = dead and standing is not None and asked - dead_since[standing.token] >= quiet_seconds
        if standing is None or standing.expires_at < now or quiet:
            mine = Lease(token, identity(os.getpid()), now + timedelta(seconds=TTL_SECONDS))
            if store.take_lease(name, mine, instead_of=standing):
                return HeldLease(name, token, quiet_seconds, asked)
            continue
        if not dead and clock.now() >= deadline:
            last = last or standing
            # A lease that was given up has no longer than this to go; one that is renewed meanwhile was not given up.
            if standing != last or standing.expires_at - now > timedelta(seconds=quiet_seconds):
                raise LeaseHeldError(
                    f"Another load holds {store.users.full_name}: {_words(standing)}.",
                    way_out="Wait for it to end, or raise GHSYNC_LEASE_WAIT_SECONDS. A dead holder's lease runs out "
                    f"within {TTL_SECONDS:.0f} s by itself.",
                )
        if not announced:
            what = "waiting for the last command of a dead load" if dead else "waiting for another load"
            log.info(what, holder=_words(standing), up_to_seconds=quiet_seconds if dead else wait_seconds)
            announced = True
        time.sleep(_POLL_SECONDS)


def _renew(store: UserStore, held: HeldLease, stop: threading.Event) -> None:
    while not stop.wait(_RENEW_SECONDS):
        asked = clock.now()
        try:
            end = store.server_time() + timedelta(seconds=TTL_SECONDS)
            if not store.extend_lease(held.name, held.token, end):
                held.lose()
                return
        except TransientError as error:
            log.warning("the lease could not be renewed", reason=error.message)
        else:
            held.renewed(asked)


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


def _is_dead(lease: Lease) -> bool:
    """Tell whether the holder was a process of this very machine that is gone, and its writer with it."""
    return _is_gone(lease.holder) and (lease.writer is None or _is_gone(lease.writer))


def _is_gone(process: str) -> bool:
    machine, _, rest = process.partition("|")
    pid, _, started = rest.partition("|")
    if machine != _machine() or not pid.isdigit():
        return False
    try:
        return _started(int(pid)) != started
    except (psutil.AccessDenied, PermissionError):
        return False


def _words(lease: Lease) -> str:
    machine, _, rest = lease.holder.partition("|")
    return f"process {rest.partition('|')[0]} on {machine.partition('/')[0]}, until {lease.expires_at:%H:%M:%S} UTC"
