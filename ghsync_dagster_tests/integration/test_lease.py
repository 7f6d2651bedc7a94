"""The lease: one load at a time, a dead holder's place taken soon, and a holder that lost it stops by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from ghsync_dagster.batch import lease as lease_module
from ghsync_dagster.batch.lease import hold_lease
from ghsync_dagster.batch.load import Step
from ghsync_dagster.batch.reports import FlattenReport
from ghsync_dagster.domain.errors import LeaseHeldError, LeaseLostError, UnavailableError
from ghsync_dagster.process import identity
from ghsync_dagster.stores.mongo.books import Lease, LeaseBook
from ghsync_dagster.stores.mongo.client import LEASES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ghsync_dagster.batch.flow import BatchFlow
    from ghsync_dagster.stores.mongo.users import UserStore

pytestmark = [pytest.mark.integration, pytest.mark.servers("spark")]

NAME = "load:Users"
HOLDER = """
import sys
from unittest.mock import patch
from ghsync_dagster.batch import lease
from ghsync_dagster.domain.errors import LeaseLostError
from ghsync_dagster.stores.mongo.users import UserStore

uri, database, ttl = sys.argv[1], sys.argv[2], float(sys.argv[3])
times = {"TTL_SECONDS": ttl, "_RENEW_SECONDS": ttl / 4}
with patch.multiple(lease, **times), UserStore(uri, database, "Users") as store:
    try:
        with lease.hold_lease(store, wait_seconds=0, quiet_seconds=ttl / 4) as held:
            print("held", flush=True)
            for line in sys.stdin:
                held.allow()
                store.database["written"].insert_one({"line": line.strip()})
                print("wrote", flush=True)
    except LeaseLostError:
        print("lost", flush=True)
"""


@contextmanager
def holder(mongo_uri: str, database: str, ttl: float = 30) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lease, and writes a line for each that it is told."""
    command = [sys.executable, "-c", HOLDER, mongo_uri, database, str(ttl)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert said(process) == "held"
            yield process
        finally:
            process.kill()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def put_lease(store: UserStore, holder: str, seconds: float, writer: str | None = None) -> None:
    """Store a lease that ends in so many seconds."""
    end = LeaseBook(store).server_time() + timedelta(seconds=seconds)
    store.database[LEASES].insert_one(
        {"_id": NAME, "token": "theirs", "holder": holder, "writer": writer, "expires_at": end}
    )


def test_a_second_load_waits_and_then_goes_on(mongo_uri: str, database: str, store: UserStore) -> None:
    with holder(mongo_uri, database) as process:
        threading.Timer(1.0, process.stdin.close if process.stdin else process.kill).start()
        began = time.monotonic()
        with hold_lease(store, wait_seconds=30) as held:
            assert 0.5 < time.monotonic() - began < 20
            held.allow()
    assert LeaseBook(store).current(NAME) is None


def test_a_load_that_waited_long_enough_gives_up_and_names_the_holder(
    flow: BatchFlow, mongo_uri: str, database: str, store: UserStore
) -> None:
    flow.artifacts.publish(FlattenReport("nowhere", 1, 0.0))
    with holder(mongo_uri, database) as process:
        before = LeaseBook(store).current(NAME)
        with pytest.raises(LeaseHeldError, match=rf"process {process.pid} on \S+, until ") as raised:
            replace(flow, lease_wait_seconds=0.7).load("run")
        assert "GHSYNC_LEASE_WAIT_SECONDS" in raised.value.way_out
        after = LeaseBook(store).current(NAME)
        assert before is not None
        assert after is not None
        assert after.token == before.token
    assert store.book("loads").count_documents({}) == 0


def test_a_killed_holder_of_this_machine_is_replaced_once_its_last_command_must_have_ended(
    mongo_uri: str, database: str, store: UserStore
) -> None:
    with holder(mongo_uri, database) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        standing = LeaseBook(store).current(NAME)
        assert standing is not None
        assert standing.expires_at > LeaseBook(store).server_time() + timedelta(seconds=10)
        asked = time.monotonic()
        with hold_lease(store, wait_seconds=0, quiet_seconds=1.5) as held:
            assert 1.5 <= time.monotonic() - asked < 10
            held.allow()


def test_a_killed_holder_is_replaced_before_its_parent_has_asked_for_its_end(
    mongo_uri: str, database: str, store: UserStore
) -> None:
    with holder(mongo_uri, database) as process:
        process.send_signal(signal.SIGKILL)
        assert said(process) == ""
        with hold_lease(store, wait_seconds=1, quiet_seconds=0) as held:
            held.allow()
        assert process.returncode is None


def test_a_killed_holder_is_replaced_only_when_its_sparks_driver_is_gone_too(store: UserStore) -> None:
    dead = identity(os.getpid()).rpartition("|")[0] + "|0"
    with subprocess.Popen(["sleep", "60"]) as driver:
        put_lease(store, dead, 30, writer=identity(driver.pid))
        with pytest.raises(LeaseHeldError), hold_lease(store, wait_seconds=0):
            pass
        driver.kill()
        driver.wait()
        with hold_lease(store, wait_seconds=0, quiet_seconds=0) as held:
            held.allow()


def test_a_process_number_that_is_used_again_is_not_taken_for_the_holder(store: UserStore) -> None:
    put_lease(store, identity(os.getpid()).rpartition("|")[0] + "|0", 30)
    with hold_lease(store, wait_seconds=0, quiet_seconds=0) as held:
        held.allow()


def test_this_very_process_counts_as_alive(store: UserStore) -> None:
    put_lease(store, identity(os.getpid()), 30)
    with pytest.raises(LeaseHeldError), hold_lease(store, wait_seconds=0):
        pass


def test_the_lease_of_another_machine_is_taken_when_it_ran_out_and_not_before(store: UserStore) -> None:
    put_lease(store, "elsewhere/pid:[1]/boot|1|1", 30)
    with pytest.raises(LeaseHeldError, match="process 1 on elsewhere"), hold_lease(store, wait_seconds=0):
        pass
    store.database[LEASES].update_one(
        {"_id": NAME}, {"$set": {"expires_at": LeaseBook(store).server_time() - timedelta(seconds=1)}}
    )
    with hold_lease(store, wait_seconds=0) as held:
        held.allow()
        standing = LeaseBook(store).current(NAME)
        assert standing is not None
        assert standing.holder == identity(os.getpid())


def test_a_lease_that_was_renewed_since_it_was_read_is_not_taken(store: UserStore) -> None:
    put_lease(store, "elsewhere/pid:[1]/boot|1|1", -1)
    standing = LeaseBook(store).current(NAME)
    assert standing is not None
    assert LeaseBook(store).extend(NAME, "theirs", LeaseBook(store).server_time() + timedelta(seconds=30))
    mine = Lease("mine", "me", LeaseBook(store).server_time() + timedelta(seconds=30))
    assert not LeaseBook(store).acquire(NAME, mine, instead_of=standing)
    assert LeaseBook(store).extend(NAME, "theirs", LeaseBook(store).server_time())


def test_a_lease_outlives_its_time_while_its_holder_renews_it(
    store: UserStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "TTL_SECONDS", 2.0)
    monkeypatch.setattr(lease_module, "_RENEW_SECONDS", 0.3)
    with hold_lease(store, wait_seconds=0, quiet_seconds=0.5) as held:
        with pytest.raises(LeaseHeldError), hold_lease(store, wait_seconds=3.5):
            pass
        held.allow()


def test_a_holder_whose_lease_was_taken_notices(store: UserStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "_RENEW_SECONDS", 0.1)
    with hold_lease(store, wait_seconds=0) as held:
        held.allow()
        store.database[LEASES].update_one({"_id": NAME}, {"$set": {"token": "another's"}})
        with pytest.raises(LeaseLostError):
            assert_until_lost(held, seconds=5)
    standing = LeaseBook(store).current(NAME)
    assert standing is not None
    assert standing.token == "another's"


def assert_until_lost(held: lease_module.HeldLease, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        held.allow()
        time.sleep(0.05)


def test_a_holder_that_was_suspended_writes_nothing_more(mongo_uri: str, database: str, store: UserStore) -> None:
    written = store.database["written"]
    with holder(mongo_uri, database, ttl=2) as process:
        tell(process, "before")
        assert said(process) == "wrote"
        process.send_signal(signal.SIGSTOP)
        tell(process, "after")
        with hold_lease(store, wait_seconds=20) as held:
            process.send_signal(signal.SIGCONT)
            assert said(process) == "lost"
            held.allow()
            standing = LeaseBook(store).current(NAME)
            assert standing is not None
            assert standing.token == held.token
    assert [found["line"] for found in written.find()] == ["before"]


@pytest.mark.parametrize("error", [ValueError, UnavailableError, KeyboardInterrupt, SystemExit])
def test_a_load_that_fails_keeps_the_lease_until_its_last_command_must_have_ended(
    flow: BatchFlow, store: UserStore, error: type[BaseException]
) -> None:
    flow.artifacts.publish(FlattenReport("nowhere", 1, 0.0))

    def fail(step: Step) -> None:
        assert step is Step.LEASED
        assert LeaseBook(store).current(NAME) is not None
        raise error("the server is away", way_out="Wait.") if error is UnavailableError else error

    with pytest.raises(error):
        flow.load("run", fail)
    standing = LeaseBook(store).current(NAME)
    assert standing is not None
    left = (standing.expires_at - LeaseBook(store).server_time()).total_seconds()
    assert flow.lease_quiet_seconds - 1.5 < left <= flow.lease_quiet_seconds
    assert not [thread for thread in threading.enumerate() if thread.name == "lease"]
    with hold_lease(store, wait_seconds=10):
        assert LeaseBook(store).server_time() > standing.expires_at


def test_the_lease_is_given_back_at_once_when_all_went_well(store: UserStore) -> None:
    with hold_lease(store, wait_seconds=0):
        assert LeaseBook(store).current(NAME) is not None
    assert LeaseBook(store).current(NAME) is None


def test_what_a_dead_load_sent_last_is_done_before_another_begins(
    mongo_uri: str, database: str, store: UserStore
) -> None:
    written = store.database["written"]
    written.insert_many([{"_id": number, "by": "before"} for number in range(1_000)])
    sending = """
import sys
from pymongo import MongoClient, UpdateOne
written = MongoClient(sys.argv[1])[sys.argv[2]]["written"]
written.bulk_write([UpdateOne({"_id": number}, {"$set": {"by": "dead"}}) for number in range(1_000)], ordered=False)
"""
    with subprocess.Popen([sys.executable, "-c", sending, mongo_uri, database]) as process:
        put_lease(store, identity(process.pid), 30)
        deadline = time.monotonic() + 60
        # The server has the whole command, and is at work on it.
        while not written.count_documents({"by": "dead"}):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
        process.wait(60)
        with hold_lease(store, wait_seconds=0, quiet_seconds=6):
            assert written.count_documents({"by": "dead"}) == 1_000
