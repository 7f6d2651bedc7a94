"""Loads and the change stream write the same keys at once: where the stream was, its state stands.

The race has the whole stream, from the topic on, and lasts for ``TEST_FAULT_ROUNDS`` loads. Where a change comes at a
certain step of a load, the stream is the real one from the segment on: ``cdc.stream.apply``
over ``stores.mongo.writer``.
"""

from __future__ import annotations

import random
import sys
import threading
from itertools import product
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ghsync_dagster.batch.load import Step
from ghsync_dagster.batch.reports import FlattenReport, LoadReport
from ghsync_dagster.cdc.stream.apply import apply
from ghsync_dagster.domain.coalesce import Segment
from ghsync_dagster.domain.user import USER_FIELDS
from ghsync_dagster_tests.support.builders import delete, upsert, user
from ghsync_dagster_tests.support.cdc_parts import until
from ghsync_dagster_tests.support.guards import writer_of
from ghsync_dagster_tests.support.long_campaign import ROUNDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from ghsync_dagster.batch.flow import BatchFlow
    from ghsync_dagster.domain.change import Change
    from ghsync_dagster.stores.mongo.users import UserStore
    from ghsync_dagster_tests.support.cdc_parts import Parts, Topic

pytestmark = [pytest.mark.faults, pytest.mark.servers("spark")]

KEYS = [str(key) for key in range(1, 1_201)]
LOADS = ROUNDS or 5
_PACE_SECONDS = 0.01

State = dict[str, dict[str, str | None] | None]
"""What the stream wrote last, by key: None where it deleted."""


class Changes:
    """Writes random changes of the keys into the topic until told to stop, a few at a time."""

    def __init__(self, topic: Topic, seed: int) -> None:
        self._topic = topic
        self._chance = random.Random(seed)  # noqa: S311
        self._touched: set[str] = set()
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="changes")

    def __enter__(self) -> Changes:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def end(self) -> State:
        """Stop; return what the stream is to have written last, once all is applied."""
        self.__exit__()
        if self._error:
            raise self._error
        return {key: self._topic.expected.get(key) for key in self._touched}

    def _run(self) -> None:
        try:
            # At a pace that leaves most changes a write of their own.
            while not self._stopping.wait(_PACE_SECONDS):
                for _ in range(self._chance.choice((1, 1, 3, 30))):
                    # Half of the users, so that loads have the rest to themselves.
                    self._change(self._chance.choice(KEYS[: len(KEYS) // 2]))
                self._topic.flush()
        except BaseException as error:  # noqa: BLE001  the test raises it
            self._error = error

    def _change(self, key: str) -> None:
        self._touched.add(key)
        change = self._chance.random()
        if change < 0.3:
            self._topic.delete(key)
            return
        # Now and then what a file brings, so that equal content is met too.
        login = f"load-{self._chance.randrange(LOADS)}" if change < 0.5 else f"stream-{self._topic.written}"
        self._topic.write(key, "u" if key in self._topic.expected else "c", user(key, login))


def stream(store: UserStore, state: State, key: str, login: str | None) -> None:
    """Apply one change as the consumer does: an insert, update, or with None a delete; note it in the state."""
    row = None if login is None else user(key, login)
    created = {key} if row and not state.get(key) else frozenset[str]()
    applied = apply(writer_of(store), Segment(truncate=False, changes=dict([change_of((key, row))]), created=created))
    assert not applied.refused
    state[key] = row


def change_of(item: tuple[str, dict[str, str | None] | None]) -> tuple[str, Change]:
    key, fields = item
    return key, upsert(fields) if fields else delete(key)


def load(
    flow: BatchFlow, number: int, logins: dict[str, str], on_step: Callable[[Step], None] = lambda _: None
) -> LoadReport:
    """Load users by key and login, with events newer than those of loads with lower numbers."""
    at = f"2015-01-01T15:00:{number:02}Z"
    rows = [{**user(key, login), "created_at": at, "event_id": 1} for key, login in logins.items()]
    schema = pa.schema([*((name, pa.string()) for name in (*USER_FIELDS, "created_at")), ("event_id", pa.int64())])
    folder = flow.artifacts.new_folder("users")
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "part-0.parquet")
    flow.artifacts.publish(FlattenReport(str(folder), len(rows), 0.0))
    return flow.load(f"run-{number}", on_step)


def test_what_the_stream_wrote_last_stands_through_loads_at_the_same_time(
    flow: BatchFlow, store: UserStore, topic: Topic, parts: Parts
) -> None:
    seed = random.SystemRandom().randrange(10**6)
    sys.stdout.write(f"seed {seed}\n")
    store.ensure_collection()
    met = dict.fromkeys(("inserted", "replaced", "confirmed"), 0)
    with parts.running(topic) as consumer, Changes(topic, seed) as changes:
        for number in range(LOADS):
            # Most users change with every load, the rest every other time: replaced and confirmed.
            report = load(flow, number, {key: f"load-{number // (1 if int(key) % 3 else 2)}" for key in KEYS})
            met = {name: count + getattr(report, name) for name, count in met.items()}
            # So that there is something to insert again.
            forget = [key for key in KEYS[len(KEYS) // 2 :] if int(key) % 5 == number % 5]
            store.users.delete_many({"user_id": {"$in": forget}})
        state = changes.end()
        until(lambda: topic.committed() == topic.written, 60)
        report_of_stream = consumer.end()
    sys.stdout.write(f"{LOADS} loads: {met}; stream: {report_of_stream.records}\n")
    assert not report_of_stream.dead_letters
    assert len(state) > len(KEYS) // 4
    assert all(met.values()), met

    assert_the_streams_state(store, state)
    last = load(flow, LOADS, dict.fromkeys(KEYS, "newest-of-all"))
    assert last.unresolved == 0
    assert_the_streams_state(store, state)
    assert last.left.get("owned by the stream", 0) == sum(kept is not None for kept in state.values())
    others = {found["user_id"]: found["login"] for found in store.users.find() if found["user_id"] not in state}
    assert others == dict.fromkeys((key for key in KEYS if key not in state), "newest-of-all")
    assert_nothing_half_done(store, others)


def assert_the_streams_state(store: UserStore, state: Mapping[str, object]) -> None:
    stored = {found["user_id"]: found for found in store.users.find({}, {"_id": 0})}
    assert {key: stored.get(key) for key in state} == state


CHANGES = ("upsert", "upsert the same", "delete", "delete and upsert")
CASES = ("insert", "replace", "confirm")


@pytest.mark.parametrize("step", [Step.RECORDED, Step.PLANNED, Step.INSERTED, Step.VERSIONED, Step.COMPARED])
def test_a_change_of_the_stream_stands_at_whatever_step_of_a_load_it_comes(
    flow: BatchFlow, store: UserStore, step: Step
) -> None:
    changed = {str(number): pair for number, pair in enumerate(product(CASES, CHANGES), start=1)}
    left_alone = {str(100 + number): case for number, case in enumerate(CASES)}
    case_of = {key: case for key, (case, _) in changed.items()} | left_alone
    second = {key: "load-0" if case == "confirm" else "load-1" for key, case in case_of.items()}
    load(flow, 0, {key: "load-0" for key, case in case_of.items() if case != "insert"})
    state: State = {}

    def act(done: Step) -> None:
        if done is not step or state:
            return
        for key, (_, change) in changed.items():
            if change.startswith("delete"):
                stream(store, state, key, None)
            if change.endswith("upsert"):
                stream(store, state, key, f"stream-{key}")
            if change.endswith("same"):
                stream(store, state, key, second[key])

    report = load(flow, 1, second, act)
    assert (report.unresolved, report.marker_lost) == (0, 0)
    assert state.keys() == changed.keys()
    assert_the_streams_state(store, state)
    assert_nothing_half_done(store, left_alone.keys())

    load(flow, 2, dict.fromkeys(case_of, "load-2"))
    assert_the_streams_state(store, state)
    assert {key: found["login"] for key, found in store.users_by_id(list(left_alone)).items()} == dict.fromkeys(
        left_alone, "load-2"
    )
    assert_nothing_half_done(store, left_alone.keys())


def assert_nothing_half_done(store: UserStore, of_loads: Iterable[str]) -> None:
    assert set(store.book("versions").distinct("_id")) == set(of_loads)
    assert store.users.count_documents({"spark_temp": {"$exists": True}}) == 0
    assert store.book("undo").count_documents({}) == 0
