"""The load's lease: one writer of the collection at a time, across processes, hosts and deployments.

Belongs here: acquiring, renewing and releasing the lease. Not here: what is done under it.

The lease expires by the server's clock and is renewed in the background. A holder measures the time since its last
renewal by its own clock, which is monotonic and counts sleep. It treats the lease as lost before the server would let
another process acquire it. So a process that was suspended stops by itself. If the holder ran on this machine and is
dead, and Spark's driver, which writes for it, is dead too, its lease is replaced before it expires.

A server continues a command whose client is gone. So another process acquires a lease only after a quiet time since
the holder's last command. That time starts when the holder died, ended with a command perhaps unanswered, or stopped
by itself because its lease expired.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from ghsync_dagster import clock
from ghsync_dagster.domain.errors import GhsyncError, LeaseHeldError, LeaseLostError, TransientError
from ghsync_dagster.logging import get_logger
from ghsync_dagster.process import identity, is_gone
from ghsync_dagster.stores.mongo.guard import WriterGuard

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ghsync_dagster.stores.mongo.books import Lease, LeaseBook
    from ghsync_dagster.stores.mongo.users import UserStore

TTL_SECONDS: Final = 30.0
QUIET_SECONDS: Final = 6.0
"""How long a server may take for one command of a load: a thousand writes, or a bulk of five thousand inserts."""
_RENEW_SECONDS: Final = 8.0
_POLL_SECONDS: Final = 0.5
log = get_logger("lease")


@dataclass
class HeldLease(WriterGuard):
    """A lease that this process holds: the guard of everything that a load writes.

    Attributes:
        quiet_seconds: How long the server may still execute the last command of a holder that is gone.
        renewed_at: When the last renewal was requested, by ``clock.now``.
        is_lost: Whether another holds the lease.
    """

    book: LeaseBook
    name: str
    token: str
    quiet_seconds: float = QUIET_SECONDS
    renewed_at: float = field(default_factory=clock.now)
    is_lost: bool = False

    def allow(self) -> None:
        """Raise if another process may hold the lease by now; a command has no limit, since the lease is renewed.

        Raises:
            LeaseLostError: Another process acquired it, or it could not be renewed in time.
        """
        if self.is_lost or clock.now() - self.renewed_at > TTL_SECONDS - self.quiet_seconds:
            raise LeaseLostError(
                "The load's lease ran out before the load was done; nothing was written after that.",
                way_out="Run again: the next load settles what this one left.",
            )

    def name_writer(self, writer: str) -> None:
        """Name a process that writes for the holder and may outlive it.

        Args:
            writer: Its identity, see ``process``.

        Raises:
            LeaseLostError: Another holds the lease.
        """
        self.allow()
        if not self.book.name_writer(self.name, self.token, writer):
            self.is_lost = True
            self.allow()


def current_holder(store: UserStore) -> str | None:
    """Return a description of the collection's present lease holder; None if no load is running."""
    from ghsync_dagster.stores.mongo.books import LeaseBook

    book = LeaseBook(store)
    current = book.current(_name(store))
    if current is None or current.expires_at < book.server_time() or _is_dead(current):
        return None
    return _describe(current)


def _name(store: UserStore) -> str:
    return f"load:{store.users.name}"


@contextmanager
def hold_lease(store: UserStore, *, wait_seconds: float, quiet_seconds: float = QUIET_SECONDS) -> Iterator[HeldLease]:
    """Hold the collection's lease.

    Args:
        store: The store whose collection is to be written.
        wait_seconds: How long to wait for another holder.
        quiet_seconds: How long the server may still execute the last command of a holder that is gone.

    Raises:
        LeaseHeldError: Another load still holds it after ``wait_seconds``.
    """
    name = _name(store)
    held = _acquire(store, name, wait_seconds, quiet_seconds)
    stop = threading.Event()
    renewer = threading.Thread(target=_renew, args=(held, stop), name="lease", daemon=True)
    renewer.start()
    answered = False
    try:
        yield held
        answered = True
    finally:
        stop.set()
        renewer.join()
        _release(held, answered=answered)


def _release(held: HeldLease, *, answered: bool) -> None:
    """Release the lease: at once if every command was answered, else after the quiet time."""
    try:
        if answered:
            held.book.release(held.name, held.token)
        else:
            held.book.extend(held.name, held.token, held.book.server_time() + timedelta(seconds=held.quiet_seconds))
    except GhsyncError as error:
        log.warning("lease not released; it expires by itself", reason=error.message)


def _acquire(store: UserStore, name: str, wait_seconds: float, quiet_seconds: float) -> HeldLease:
    from ghsync_dagster.stores.mongo.books import Lease, LeaseBook

    book = LeaseBook(store)
    deadline = clock.now() + wait_seconds
    token = uuid.uuid4().hex
    announced = False
    dead_since: dict[str, float] = {}
    last: Lease | None = None
    while True:
        requested_at = clock.now()
        now = book.server_time()
        current = book.current(name)
        dead = current is not None and _is_dead(current)
        if current is not None and dead:
            dead_since.setdefault(current.token, requested_at)
        quiet = dead and current is not None and requested_at - dead_since[current.token] >= quiet_seconds
        if current is None or current.expires_at < now or quiet:
            mine = Lease(token, identity(os.getpid()), now + timedelta(seconds=TTL_SECONDS))
            if book.acquire(name, mine, instead_of=current):
                return HeldLease(book, name, token, quiet_seconds, requested_at)
            continue
        if not dead and clock.now() >= deadline:
            last = last or current
            # A lease that its holder gave up expires within the quiet time, and is not renewed.
            if current != last or current.expires_at - now > timedelta(seconds=quiet_seconds):
                raise LeaseHeldError(
                    f"Another load holds {store.users.full_name}: {_describe(current)}.",
                    way_out="Wait for it to end, or raise GHSYNC_LEASE_WAIT_SECONDS. A dead holder's lease runs out "
                    f"within {TTL_SECONDS:.0f} s by itself.",
                )
        if not announced:
            event = "waiting for the last command of a dead load" if dead else "waiting for another load"
            log.info(event, holder=_describe(current), up_to_seconds=quiet_seconds if dead else wait_seconds)
            announced = True
        time.sleep(_POLL_SECONDS)


def _renew(held: HeldLease, stop: threading.Event) -> None:
    while not stop.wait(_RENEW_SECONDS):
        requested_at = clock.now()
        try:
            end = held.book.server_time() + timedelta(seconds=TTL_SECONDS)
            if not held.book.extend(held.name, held.token, end):
                held.is_lost = True
                return
        except TransientError as error:
            log.warning("lease renewal failed", reason=error.message)
        else:
            held.renewed_at = requested_at


def _is_dead(lease: Lease) -> bool:
    """Return whether the holder was a process of this machine that is gone, and so is its writer."""
    return is_gone(lease.holder) and (lease.writer is None or is_gone(lease.writer))


def _describe(lease: Lease) -> str:
    machine, _, rest = lease.holder.partition("|")
    return f"process {rest.partition('|')[0]} on {machine.partition('/')[0]}, until {lease.expires_at:%H:%M:%S} UTC"
