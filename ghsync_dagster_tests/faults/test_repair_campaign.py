"""Repairs on the whole stack while the same users change: what is planted is put right, and nothing goes back.

Each row has a counter in its login, which grows with each change. The consumer writes down each state that it gives a
document: a counter that goes down is a newer state that was overwritten. Some changes are hidden from
the binlog, so that only a repair brings them, and older records of the same users come after it.
``TEST_FAULT_ROUNDS=N`` (any N) has 20 rounds, and 100,000 rows of a dropped partition.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from ghsync_dagster.cdc.health.audit import Patience, audit
from ghsync_dagster.stores.mongo.users import UserStore
from ghsync_dagster.stores.mysql import MySqlStore
from ghsync_dagster_tests.support import long_campaign, watched_consumer
from ghsync_dagster_tests.support.builders import user
from ghsync_dagster_tests.support.cdc_parts import GHSYNC, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ghsync_dagster.settings import Settings

FULL = bool(long_campaign.ROUNDS)
ROUNDS = 20 if FULL else 1
USERS = 1_000
RATE = 1_000 if FULL else 300
HIDDEN_SHARE = 0.05
STEADY_SECONDS = 15 if FULL else 5
MOST_TIMES_STEADY = 2
"""How much longer a change may take while repairs go on: its p99 in the median round, over the steady one."""
DROPPED = 100_000 if FULL else 3_000
DROPPED_RATE = 500 if FULL else 100
STATES = "states"
EXTRA = 5_000_000
"""Where the keys begin that MySQL does not have."""
MARKER = 9_000_000

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1_800 if FULL else 600), pytest.mark.servers("stack")]


def _environment(settings: Settings, **more: str) -> dict[str, str]:
    secrets = {"MONGODB_URI": settings.mongodb_uri, "MYSQL_URL": settings.mysql_url}
    return {
        "KAFKA_BOOTSTRAP_SERVERS": str(settings.kafka_bootstrap_servers),
        "KAFKA_GROUP_ID": settings.kafka_group_id,
        "CONNECT_URL": str(settings.connect_url),
        "MONGODB_DATABASE": settings.mongodb_database,
        "GHSYNC_HOME": str(settings.home_dir),
        **{name: secret.get_secret_value() for name, secret in secrets.items() if secret},
        **more,
    }


@contextmanager
def _consumer(settings: Settings, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    log = folder / "consumer.log"
    command = [sys.executable, watched_consumer.__file__, str(folder / STATES)]
    with log.open("ab") as stderr:
        process = subprocess.Popen(command, env=_environment(settings), cwd=Path.home(), stderr=stderr)
    try:
        yield process
    finally:
        process.terminate()
        assert process.wait(60) in (0, 143), log.read_text()[-5_000:]


def _repair(settings: Settings, *options: str) -> dict[str, Any]:
    began = time.monotonic()
    done = subprocess.run(
        [GHSYNC, "cdc", "repair", *options, "--json"],
        env=_environment(settings),
        cwd=Path.home(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found | {"whole_seconds": round(time.monotonic() - began, 2)}


def _mysql(settings: Settings) -> MySqlStore:
    assert settings.mysql_url
    return MySqlStore(settings.mysql_url.get_secret_value())


def _store(settings: Settings) -> UserStore:
    assert settings.mongodb_uri
    return UserStore(settings.mongodb_uri.get_secret_value(), settings.mongodb_database, "Users")


class Counters:
    """Changes rows at a rate, each change a higher counter in the row's login; some leave no record in the binlog."""

    def __init__(self, settings: Settings, chance: random.Random, rate: int, users: int) -> None:
        self.may_hide = threading.Event()
        self.committed: dict[tuple[str, int], float] = {}
        self.sent = 0
        self._settings, self._chance, self._rate, self._users = settings, chance, rate, users
        self._counters = dict.fromkeys(range(1, users + 1), 0)
        self._go_on, self._end = threading.Event(), threading.Event()
        self._is_idle = threading.Event()
        self._errors: list[BaseException] = []
        with _mysql(settings) as mysql:
            rows = [(key, "n0") for key in self._counters]
            for at in range(0, len(rows), 500):
                values = ", ".join(f"({key}, '{login}', 'g', 'a', 'u')" for key, login in rows[at : at + 500])
                mysql.execute([(f"INSERT INTO Users VALUES {values}", ())])  # noqa: S608  numbers only
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Change rows meanwhile."""
        self._is_idle.clear()
        self._go_on.set()
        try:
            yield
        finally:
            self._go_on.clear()
            assert self._is_idle.wait(30) or self._errors
        if self._errors:
            raise self._errors[0]

    def close(self) -> None:
        """End the thread."""
        self._end.set()
        self._go_on.set()
        self._thread.join(30)

    def _run(self) -> None:
        try:
            with _mysql(self._settings) as logged, _mysql(self._settings) as hidden:
                hidden.execute([("SET SESSION sql_log_bin = 0", ())])
                while not self._end.is_set():
                    self._is_idle.set()
                    self._go_on.wait()
                    self._change(logged, hidden)
        except BaseException as error:  # noqa: BLE001  the test raises it
            self._errors.append(error)
            self._is_idle.set()

    def _change(self, logged: MySqlStore, hidden: MySqlStore) -> None:
        began, sent = time.monotonic(), 0
        while self._go_on.is_set() and not self._end.is_set():
            due = int((time.monotonic() - began) * self._rate) - sent
            if due <= 0:
                time.sleep(0.001)
                continue
            keys = self._chance.sample(range(1, self._users + 1), min(due, 20))
            is_hidden = self.may_hide.is_set() and self._chance.random() < HIDDEN_SHARE
            statements = []
            for key in keys:
                self._counters[key] += 1
                login = f"n{self._counters[key]}"
                statements.append(("UPDATE Users SET login = %s WHERE user_id = %s", (login, key)))
            (hidden if is_hidden else logged).execute(statements)
            now = time.time()
            if not is_hidden:
                self.committed |= {(str(key), self._counters[key]): now for key in keys}
            sent += len(keys)
            self.sent += len(keys)


class States:
    """What the consumer wrote, in its order."""

    def __init__(self, file: Path, committed: dict[tuple[str, int], float]) -> None:
        self.count = 0
        self.violations: list[str] = []
        self._latencies: list[tuple[float, float]] = []
        newest: dict[str, int] = {}
        for line in file.read_text(encoding="utf-8").splitlines():
            at, key, login = line.split(" ", 2)
            if not (login.startswith("n") and login[1:].isdigit()):
                continue
            counter = int(login[1:])
            self.count += 1
            if counter < newest.get(key, 0):
                self.violations.append(f"user {key}: {counter} after {newest[key]}")
            newest[key] = max(counter, newest.get(key, 0))
            if (when := committed.get((key, counter))) is not None:
                self._latencies.append((float(at), float(at) - when))

    def p99_ms(self, began: float, ended: float) -> float:
        """Return the p99 in ms from commit to the write, in an interval of ``time.time``."""
        found = [latency for at, latency in self._latencies if began <= at <= ended]
        return round(1000 * statistics.quantiles(found, n=100)[98], 1)


def _plant(settings: Settings, chance: random.Random) -> None:
    """Make 1,000 documents wrong: missing, different, extra, and with values in each other's columns."""
    keys = [str(key) for key in range(1, USERS + 1)]
    chance.shuffle(keys)
    quarter = USERS // 4
    with _store(settings) as store:
        store.users.delete_many({"user_id": {"$in": keys[:quarter]}})
        store.users.update_many({"user_id": {"$in": keys[quarter : 2 * quarter]}}, {"$set": {"login": "planted"}})
        shifted = {"$set": {"login": "planted", "gravatar_id": None, "avatar_url": "g", "url": "a"}}
        store.users.update_many({"user_id": {"$in": keys[2 * quarter : 3 * quarter]}}, shifted)
        store.users.insert_many([user(EXTRA + at, "extra") for at in range(quarter)])


def _await_stream(settings: Settings, number: int) -> None:
    """Wait until the stream has applied all that was committed before."""
    with _mysql(settings) as mysql, _store(settings) as store:
        mysql.execute([("REPLACE INTO Users (user_id, login) VALUES (%s, 'marker')", (MARKER + number,))])
        until(lambda: bool(store.users_by_id([str(MARKER + number)])), 120)


def _assert_equal(settings: Settings) -> None:
    with _mysql(settings) as mysql, _store(settings) as store:
        found = audit(mysql, store, patience=Patience(seconds=20))
    assert found.equal, found


def test_planted_differences_are_put_right_under_changes_of_the_same_users(
    stack_settings: Settings, tmp_path: Path
) -> None:
    seed = random.SystemRandom().randrange(10**6)
    sys.stdout.write(f"seed {seed}\n")
    chance = random.Random(seed)  # noqa: S311
    counters = Counters(stack_settings, chance, RATE, USERS)
    with _store(stack_settings) as store:
        store.ensure_collection()
    rounds = []
    try:
        with _consumer(stack_settings, tmp_path):
            _await_stream(stack_settings, 0)
            with counters.going_on():
                steady_from = time.time()
                time.sleep(STEADY_SECONDS)
                steady_until = time.time()
            for number in range(1, ROUNDS + 1):
                with counters.going_on():
                    counters.may_hide.set()
                    _plant(stack_settings, chance)
                    time.sleep(chance.random())
                    counters.may_hide.clear()
                    began = time.time()
                    report = _repair(stack_settings, "--all")
                    rounds.append((report, began, time.time()))
                _await_stream(stack_settings, number)
                _assert_equal(stack_settings)
    finally:
        counters.close()
    states = States(tmp_path / STATES, counters.committed)
    asked = [report["asked"] for report, _, _ in rounds]
    seconds = [report["whole_seconds"] for report, _, _ in rounds]
    steady = states.p99_ms(steady_from, steady_until)
    p99 = [states.p99_ms(began, ended) for _, began, ended in rounds]
    sys.stdout.write(
        f"{ROUNDS} rounds, {counters.sent:,} changes, {states.count:,} states written, "
        f"{len(states.violations)} newer states overwritten; asked for {min(asked)} to {max(asked)} users; "
        f"seconds {min(seconds)} to {max(seconds)}, median {statistics.median(seconds)}; "
        f"p99 steady {steady} ms, while repairing {min(p99)} to {max(p99)}, median {statistics.median(p99)}\n"
    )
    assert not states.violations, states.violations[:20]
    # The users that MySQL does not have: of the others a change may put right any before they are asked for.
    assert min(asked) >= USERS // 4
    if FULL:
        assert sum(asked) > ROUNDS * USERS // 4
        assert statistics.median(p99) <= MOST_TIMES_STEADY * steady


def test_the_rows_of_a_dropped_partition_are_removed_by_one_command(stack_settings: Settings, tmp_path: Path) -> None:
    chance = random.Random(1)  # noqa: S311
    counters = Counters(stack_settings, chance, DROPPED_RATE, USERS)
    first = 10_000_000
    with _mysql(stack_settings) as mysql, _store(stack_settings) as store:
        store.ensure_collection()
        try:
            partitions = f"PARTITION p0 VALUES LESS THAN ({first}), PARTITION p1 VALUES LESS THAN MAXVALUE"
            mysql.execute([(f"ALTER TABLE Users PARTITION BY RANGE (user_id) ({partitions})", ())])
            for at in range(0, DROPPED, 1_000):
                values = ", ".join(f"({first + at + one}, 'gone', 'g', 'a', 'u')" for one in range(1_000))
                mysql.execute([(f"INSERT INTO Users VALUES {values}", ())])  # noqa: S608  numbers only
            with _consumer(stack_settings, tmp_path) as consumer:
                until(lambda: store.users.count_documents({}) == DROPPED + USERS, 240)
                mysql.execute([("ALTER TABLE Users DROP PARTITION p1", ())])
                mysql.execute([("ALTER TABLE Users ADD PARTITION (PARTITION p1 VALUES LESS THAN MAXVALUE)", ())])
                before = psutil.Process(consumer.pid).memory_info().rss
                with counters.going_on():
                    report = _repair(stack_settings, "--all", "--yes")
                after = psutil.Process(consumer.pid).memory_info().rss
                _await_stream(stack_settings, 1)
                _assert_equal(stack_settings)
        finally:
            mysql.execute([("ALTER TABLE Users REMOVE PARTITIONING", ())])
    counters.close()
    sys.stdout.write(
        f"{DROPPED:,} rows of a dropped partition, under {DROPPED_RATE} changes a second: {report['outcomes']} in "
        f"{report['whole_seconds']} s; the consumer's memory {before >> 20} MiB before, {after >> 20} MiB after\n"
    )
    assert report["outcomes"]["removed"] >= DROPPED
