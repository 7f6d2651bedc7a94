"""Loads and the change stream write the same keys at once: where the stream was, its state stands.

The stream is the real one from the segment on: ``cdc.apply`` over ``stores.stream``.
"""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ghsync_dagster.batch.load import Step
from ghsync_dagster.batch.reports import FlattenReport, LoadReport
from ghsync_dagster.cdc.apply import apply
from ghsync_dagster.domain.change import Change, Op
from ghsync_dagster.domain.coalesce import Segment
from ghsync_dagster.stores.mongo import UserStore
from ghsync_dagster.stores.stream import StreamStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ghsync_dagster.batch.flow import BatchFlow

pytestmark = pytest.mark.faults

FIELDS = ("user_id", "login", "gravatar_id", "avatar_url", "url")
KEYS = [str(key) for key in range(1, 1_201)]
ROUNDS = 5


def user(key: str, login: str) -> dict[str, str | None]:
    return {"user_id": key, "login": login, "gravatar_id": None, "avatar_url": "http://a", "url": "http://u"}


@dataclass
class Stream:
    """Applies random changes to the keys until told to stop, a few keys at a time, as the consumer does."""

    uri: str
    name: str
    seed: int
    state: dict[str, dict[str, str | None] | None] = field(default_factory=dict)
    repeats: int = 0
    stopping: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None

    def run(self) -> None:
        """Apply changes; keep what went wrong for the test."""
        chance = random.Random(self.seed)  # noqa: S311
        try:
            with UserStore(self.uri, self.name, "Users") as store:
                number = 0
                while not self.stopping.is_set():
                    changes: dict[str, str | None] = {}
                    for _ in range(chance.choice((1, 1, 3, 30))):
                        number += 1
                        # Half of the users, so that loads have the rest to themselves.
                        key = chance.choice(KEYS[: len(KEYS) // 2])
                        change = chance.random()
                        # Now and then what a file brings, so that equal content is met too.
                        login = f"load-{chance.randrange(ROUNDS)}" if change < 0.5 else f"stream-{number}"
                        changes[key] = None if change < 0.3 else login
                    self.apply(store, changes)
        except BaseException as error:  # noqa: BLE001  the test raises it
            self.error = error

    def apply(self, store: UserStore, logins: dict[str, str | None]) -> None:
        """Insert or update users by key and login; delete those whose login is None."""
        rows = {key: None if login is None else user(key, login) for key, login in logins.items()}
        applied = apply(StreamStore(store), Segment(truncate=False, changes=dict(map(change_of, rows.items()))))
        assert not applied.refused
        self.repeats += applied.repeated
        self.state |= rows


def change_of(item: tuple[str, dict[str, str | None] | None]) -> tuple[str, Change]:
    key, row = item
    return key, Change(Op.DELETE, key, None, "d") if row is None else Change(Op.UPSERT, key, row, "u")


def load(
    flow: BatchFlow, number: int, logins: dict[str, str], on_step: Callable[[Step], None] = lambda _: None
) -> LoadReport:
    """Load users by key and login, with events newer than those of loads with lower numbers."""
    at = f"2015-01-01T15:00:{number:02}Z"
    rows = [{**user(key, login), "created_at": at, "event_id": 1} for key, login in logins.items()]
    schema = pa.schema([*((name, pa.string()) for name in (*FIELDS, "created_at")), ("event_id", pa.int64())])
    folder = flow.artifacts.new_folder("users")
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "part-0.parquet")
    flow.artifacts.publish(FlattenReport(str(folder), len(rows), 0.0))
    return flow.load(f"run-{number}", on_step)


def test_what_the_stream_wrote_last_stands_through_loads_at_the_same_time(
    flow: BatchFlow, store: UserStore, mongo_uri: str, database: str
) -> None:
    seed = random.SystemRandom().randrange(10**6)
    store.ensure_collection()
    stream = Stream(mongo_uri, database, seed)
    thread = threading.Thread(target=stream.run, name="stream")
    met = dict.fromkeys(("inserted", "replaced", "confirmed"), 0)
    thread.start()
    try:
        for number in range(ROUNDS):
            # Most users change with every load, the rest every other time: replaced and confirmed.
            report = load(flow, number, {key: f"load-{number // (1 if int(key) % 3 else 2)}" for key in KEYS})
            met = {name: count + getattr(report, name) for name, count in met.items()}
            # So that there is something to insert again.
            forget = [key for key in KEYS[len(KEYS) // 2 :] if int(key) % 5 == number]
            store.users.delete_many({"user_id": {"$in": forget}})
    finally:
        stream.stopping.set()
        thread.join()
    if stream.error:
        raise stream.error
    assert len(stream.state) > len(KEYS) // 4
    assert all(met.values()), met

    assert_the_streams_state(store, stream)
    last = load(flow, 50, dict.fromkeys(KEYS, "newest-of-all"))
    assert last.unresolved == 0
    assert_the_streams_state(store, stream)
    assert last.left.get("owned by the stream", 0) == sum(kept is not None for kept in stream.state.values())
    others = {found["user_id"]: found["login"] for found in store.users.find() if found["user_id"] not in stream.state}
    assert others == dict.fromkeys((key for key in KEYS if key not in stream.state), "newest-of-all")
    assert_nothing_half_done(store, others)


def assert_the_streams_state(store: UserStore, stream: Stream) -> None:
    stored = {found["user_id"]: found for found in store.users.find({}, {"_id": 0})}
    assert {key: stored.get(key) for key in stream.state} == stream.state, f"seed {stream.seed}"


CHANGES = ("upsert", "upsert the same", "delete", "delete and upsert")
CASES = ("insert", "replace", "confirm")


@pytest.mark.parametrize("step", [Step.RECORDED, Step.PLANNED, Step.INSERTED, Step.VERSIONED, Step.COMPARED])
def test_a_change_of_the_stream_stands_at_whatever_step_of_a_load_it_comes(
    flow: BatchFlow, store: UserStore, mongo_uri: str, database: str, step: Step
) -> None:
    changed = {str(number): pair for number, pair in enumerate(product(CASES, CHANGES), start=1)}
    left_alone = {str(100 + number): case for number, case in enumerate(CASES)}
    case_of = {key: case for key, (case, _) in changed.items()} | left_alone
    second = {key: "load-0" if case == "confirm" else "load-1" for key, case in case_of.items()}
    load(flow, 0, {key: "load-0" for key, case in case_of.items() if case != "insert"})
    stream = Stream(mongo_uri, database, seed=0)

    def act(done: Step) -> None:
        if done is not step or stream.state:
            return
        for key, (_, change) in changed.items():
            if change.startswith("delete"):
                stream.apply(store, {key: None})
            if change.endswith("upsert"):
                stream.apply(store, {key: f"stream-{key}"})
            if change.endswith("same"):
                stream.apply(store, {key: second[key]})

    report = load(flow, 1, second, act)
    assert (report.unresolved, report.marker_lost) == (0, 0)
    assert stream.state.keys() == changed.keys()
    assert_the_streams_state(store, stream)
    assert_nothing_half_done(store, left_alone.keys())

    load(flow, 2, dict.fromkeys(case_of, "load-2"))
    assert_the_streams_state(store, stream)
    assert {key: found["login"] for key, found in store.users_by_id(list(left_alone)).items()} == dict.fromkeys(
        left_alone, "load-2"
    )
    assert_nothing_half_done(store, left_alone.keys())


def assert_nothing_half_done(store: UserStore, of_loads: Iterable[str]) -> None:
    assert set(store.versions.distinct("_id")) == set(of_loads)
    assert store.users.count_documents({"spark_temp": {"$exists": True}}) == 0
    assert store.undo.count_documents({}) == 0
