"""Change events as Debezium writes them: a table's history, its records, and the topic that they are written to.

Belongs here: generating events and knowing the table that they end in, by the standard library alone; producing them.
Not here: who consumes them.

A history begins with a snapshot of half of its users (``op`` ``r``), which is every contender's warm-up, and goes on
with creates, updates and deletes, each of which fits the table as it then is. A delete is followed by its tombstone,
which is a record but no event. The last event deletes a user of the snapshot that nothing else touches: when it is
gone from a collection, all is applied.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from confluent_kafka import KafkaException, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from benchmarks.contenders import FIELDS, Content, Digest
from benchmarks.harness import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

DELETED_SHARE = 0.15
RENAMED_SHARE = 0.1
TRANSACTION_MS = 900_000
REQUEST_SECONDS = 60
SEED = 20_150_301


class User(NamedTuple):
    """A user of the generated sample."""

    user_id: int
    login: str


class Row(NamedTuple):
    """A row of the table."""

    user_id: int
    login: str
    gravatar_id: str
    avatar_url: str
    url: str

    def document(self) -> dict[str, Any]:
        """Return what is to be stored of it."""
        return {"user_id": str(self.user_id), **dict(zip(FIELDS[1:], self[1:], strict=True))}


class Event(NamedTuple):
    """One change of one row."""

    op: str
    before: Row | None
    after: Row | None

    @property
    def user_id(self) -> int:
        """The row's key."""
        row = self.after or self.before
        if row is None:
            raise AssertionError("a change has a row")
        return row.user_id


@dataclass(frozen=True)
class Case:
    """An input.

    Attributes:
        events: Creates, updates and deletes after the snapshot; tombstones are not counted.
        keys: Users that they touch; half of them are in the snapshot.
        schemas: Whether each record carries its schema.
    """

    events: int
    keys: int
    schemas: bool

    @property
    def words(self) -> str:
        """What sets it apart from other inputs of its size."""
        return f"{self.keys:,} keys, schemas {'on' if self.schemas else 'off'}"


class History:
    """What happens to the table; the same arguments give the same history.

    Args:
        case: How much happens.
        users: At least ``case.keys + 1`` users.
    """

    def __init__(self, case: Case, users: list[User]) -> None:
        if len(users) <= case.keys:
            raise AssertionError("there must be a user for each key, and one to end with")
        self.case = case
        self._users = users[: case.keys]
        self._last = _row(users[case.keys], 0)

    @property
    def last_key(self) -> str:
        """The ``user_id`` of the user that the snapshot's last event creates, and the last event deletes."""
        return str(self._last.user_id)

    @property
    def snapshot_size(self) -> int:
        """The number of the snapshot's events, each of another key."""
        return len(self._users) // 2 + 1

    def snapshot(self) -> Iterator[Event]:
        """Yield the events of the snapshot."""
        for user in self._users[: len(self._users) // 2]:
            yield Event("r", None, _row(user, 0))
        yield Event("r", None, self._last)

    def changes(self) -> Iterator[Event]:
        """Yield the events after the snapshot: each user is changed at least once, while there are enough events."""
        chance = random.Random(SEED)  # noqa: S311  a repeatable history is what it is for
        table = {event.user_id: event.after for event in self.snapshot()}
        # The last event deletes the last user.
        count = self.case.events - 1
        touched = self._users[:count] + chance.choices(self._users, k=max(count - len(self._users), 0))
        chance.shuffle(touched)
        for number, user in enumerate(touched, start=1):
            before = table.get(user.user_id)
            if before is None:
                event = Event("c", None, _row(user, number))
            elif chance.random() < DELETED_SHARE:
                event = Event("d", before, None)
            else:
                login = f"{user.login}-{number}" if chance.random() < RENAMED_SHARE else before.login
                event = Event("u", before, _row(User(user.user_id, login), number))
            table[user.user_id] = event.after
            yield event
        yield Event("d", self._last, None)

    @cached_property
    def due(self) -> Content:
        """The table at the end, as the collection must hold it."""
        table = {event.user_id: event.after for part in (self.snapshot(), self.changes()) for event in part}
        users = Digest()
        for row in table.values():
            if row is not None:
                users.add(row.document())
        return users.content()

    def batches(self, size: int) -> Iterator[dict[int, Row | None]]:
        """Yield the changes coalesced, so many events at a time: the last row of each key, None where it is deleted."""
        batch: dict[int, Row | None] = {}
        for number, event in enumerate(self.changes(), start=1):
            batch[event.user_id] = event.after
            if number % size == 0:
                yield batch
                batch = {}
        if batch:
            yield batch

    def write_operations(self, path: Path, size: int) -> int:
        """Write the snapshot, then the coalesced changes, a batch a line; return how many operations these are."""
        operations = 0
        with path.open("w", encoding="utf-8") as lines:
            lines.write(_batch_line({event.user_id: event.after for event in self.snapshot()}))
            for batch in self.batches(size):
                operations += len(batch)
                lines.write(_batch_line(batch))
        return operations

    def batch_size(self, operations: int) -> int:
        """Return how many events at a time coalesce to about so many operations."""
        low, high = 1, self.case.events
        while low < high:
            middle = (low + high) // 2
            if sum(map(len, self.batches(middle))) > operations:
                low = middle + 1
            else:
                high = middle
        return low


def _batch_line(batch: dict[int, Row | None]) -> str:
    return json.dumps([[str(key), row and row.document()] for key, row in batch.items()]) + "\n"


def _row(user: User, version: int) -> Row:
    number, login = user
    avatar = f"https://avatars.githubusercontent.com/u/{number}?v={version}"
    return Row(number, login, "", avatar, f"https://api.github.com/users/{login}")


def users(count: int, scratch: Path) -> list[User]:
    """Return so many users of the generated sample of events, ids and logins as they are there."""
    from ghsync_dagster.dev.sample import write_sample

    found: dict[int, str] = {}
    events = 2 * count + 1_000
    while len(found) < count:
        path = write_sample(scratch / "users.json", events=events).path
        with path.open(encoding="utf-8") as lines:
            actors = (json.loads(line)["actor"] for line in lines)
            found = {actor["id"]: actor["login"] for actor in actors}
        path.unlink()
        events *= 2
    return [User(*user) for user in list(found.items())[:count]]


# --- records --------------------------------------------------------------------------------------------------------


def _struct(fields: list[dict[str, Any]], name: str, **more: Any) -> dict[str, Any]:  # noqa: ANN401
    return {"type": "struct", "fields": fields, "optional": False, "name": name, **more}


def _field(field: str, kind: str, *, optional: bool = True, **more: Any) -> dict[str, Any]:  # noqa: ANN401
    return {"type": kind, "optional": optional, "field": field, **more}


TABLE = "mysql-server.new_data.Users"
_COLUMNS = [
    _field("user_id", "int64", optional=False),
    _field("login", "string", optional=False),
    *(_field(name, "string") for name in FIELDS[2:]),
]
_SNAPSHOT_VALUES = {"allowed": "true,first,first_in_data_collection,last_in_data_collection,last,false,incremental"}
_SOURCE = [
    *(_field(name, "string", optional=False) for name in ("version", "connector", "name")),
    _field("ts_ms", "int64", optional=False),
    _field("snapshot", "string", name="io.debezium.data.Enum", version=1, parameters=_SNAPSHOT_VALUES, default="false"),
    _field("db", "string", optional=False),
    _field("sequence", "string"),
    *(_field(name, "int64") for name in ("ts_us", "ts_ns")),
    _field("table", "string"),
    _field("server_id", "int64", optional=False),
    _field("gtid", "string"),
    _field("file", "string", optional=False),
    _field("pos", "int64", optional=False),
    _field("row", "int32", optional=False),
    *(_field(name, kind) for name, kind in (("thread", "int64"), ("query", "string"))),
]
_TRANSACTION = [
    _field("id", "string", optional=False),
    *(_field(name, "int64", optional=False) for name in ("total_order", "data_collection_order")),
]
# As the JSON converter of Kafka Connect writes the schema of a Debezium envelope.
_VALUE_SCHEMA = _struct(
    [
        _struct(_COLUMNS, f"{TABLE}.Value", field="before") | {"optional": True},
        _struct(_COLUMNS, f"{TABLE}.Value", field="after") | {"optional": True},
        _struct(_SOURCE, "io.debezium.connector.mysql.Source", version=1, field="source"),
        _struct(_TRANSACTION, "event.block", version=1, field="transaction") | {"optional": True},
        _field("op", "string", optional=False),
        *(_field(name, "int64") for name in ("ts_ms", "ts_us", "ts_ns")),
    ],
    f"{TABLE}.Envelope",
    version=2,
)
_KEY_SCHEMA = _struct([_field("user_id", "int64", optional=False)], f"{TABLE}.Key")


def _wrap(schema: dict[str, Any]) -> tuple[str, str]:
    head = json.dumps(schema, separators=(",", ":"))
    return f'{{"schema":{head},"payload":', "}"


class Records:
    """Makes records of events.

    Args:
        schemas: Whether each record carries its schema, as with ``schemas.enable`` of the JSON converter.
    """

    def __init__(self, *, schemas: bool) -> None:
        self._key = _wrap(_KEY_SCHEMA) if schemas else ("", "")
        self._value = _wrap(_VALUE_SCHEMA) if schemas else ("", "")
        self._began_ms = time.time_ns() // 1_000_000

    def of(self, event: Event, number: int) -> list[tuple[str, str | None]]:
        """Return key and value of the event's record, and of the tombstone that follows a delete."""
        at = self._began_ms + number // 100
        snapshot = "true" if event.op == "r" else "false"
        payload = (
            f'{{"before":{_row_json(event.before)},"after":{_row_json(event.after)},"source":{{"version":"3.6.1.Final",'
            f'"connector":"mysql","name":"mysql-server","ts_ms":{at},"snapshot":"{snapshot}","db":"new_data",'
            f'"sequence":null,"ts_us":{at}000,"ts_ns":{at}000000,"table":"Users","server_id":223344,"gtid":null,'
            f'"file":"mysql-bin.000003","pos":{4 + 310 * number},"row":0,"thread":7,"query":null}},"transaction":null,'
            f'"op":"{event.op}","ts_ms":{at + 9},"ts_us":{at + 9}123,"ts_ns":{at + 9}123456}}'
        )
        key = f'{self._key[0]}{{"user_id":{event.user_id}}}{self._key[1]}'
        records: list[tuple[str, str | None]] = [(key, f"{self._value[0]}{payload}{self._value[1]}")]
        return [*records, (key, None)] if event.op == "d" else records


def _row_json(row: Row | None) -> str:
    if row is None:
        return "null"
    # No text of a generated row needs an escape.
    return (
        f'{{"user_id":{row[0]},"login":"{row[1]}","gravatar_id":"{row[2]}","avatar_url":"{row[3]}","url":"{row[4]}"}}'
    )


# --- the topic ------------------------------------------------------------------------------------------------------


class Topic:
    """A new topic of one partition, its history's snapshot in it and its changes behind a transaction's end.

    Who reads committed records only, sees the snapshot at once and the changes from ``open`` on, all of them.

    Args:
        bootstrap: The brokers.
        name: The topic's name, new.
    """

    def __init__(self, bootstrap: str, name: str) -> None:
        self.name = name
        self._admin = AdminClient({"bootstrap.servers": bootstrap})
        self._producer = Producer(
            {
                "bootstrap.servers": bootstrap,
                "transactional.id": name,
                "transaction.timeout.ms": TRANSACTION_MS,
                "queue.buffering.max.messages": 1_000_000,
                "linger.ms": 5,
                # What matters comes as errors.
                "log_level": 2,
            }
        )

    def __enter__(self) -> Topic:
        with _kafka_errors(self.name):
            for made in self._admin.create_topics([NewTopic(self.name, 1, 1)]).values():
                made.result()
        return self

    def __exit__(self, *_: object) -> None:
        with _kafka_errors(self.name):
            self._producer.purge()
            for gone in self._admin.delete_topics([self.name]).values():
                gone.result()

    def fill(self, history: History) -> None:
        """Write the snapshot, to be read at once, and the changes, not to be read before ``open``."""
        records = Records(schemas=history.case.schemas)
        with _kafka_errors(self.name):
            self._producer.init_transactions(REQUEST_SECONDS)
            self._producer.begin_transaction()
            self._write(records, history.snapshot())
            self._producer.commit_transaction(REQUEST_SECONDS)
            self._producer.begin_transaction()
            self._write(records, history.changes())

    def _write(self, records: Records, events: Iterable[Event]) -> None:
        for number, event in enumerate(events):
            for key, value in records.of(event, number):
                while True:
                    try:
                        self._producer.produce(self.name, key=key, value=value)
                    except BufferError:
                        self._producer.poll(0.1)
                    else:
                        break
        if left := self._producer.flush(REQUEST_SECONDS):
            raise BenchmarkError(
                f"{left:,} records could not be written to {self.name}. Way out: read the log of Kafka."
            )

    def open(self) -> None:
        """Let the changes be read."""
        with _kafka_errors(self.name):
            self._producer.commit_transaction(REQUEST_SECONDS)


@contextlib.contextmanager
def _kafka_errors(topic: str) -> Iterator[None]:
    try:
        yield
    except KafkaException as error:
        raise BenchmarkError(f"Kafka failed at the topic {topic}: {error}. Way out: read the log of Kafka.") from error
