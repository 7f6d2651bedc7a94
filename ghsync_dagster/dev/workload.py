"""A workload against MySQL: inserts, updates, deletes and key changes at a chosen rate.

Belongs here: the changes (`plan`, pure and seeded), and the schedule by which they are sent. Not here: their consumer.

Each run has a range of keys of its own. So it knows its rows without a read, and can run alongside others on a table
with rows.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster.domain.user import USER_FIELDS
from ghsync_dagster.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ghsync_dagster.stores.mysql import Statement

INSERT: Final = "insert"
UPDATE: Final = "update"
DELETE: Final = "delete"
KEY_CHANGE: Final = "key_change"

_KEYS_A_SECOND: Final = 1_000_000
_LATEST_BASE: Final = 2**62
_COLUMNS: Final = USER_FIELDS[1:]
_WIDTH: Final = 255

ODD_TEXTS: Final = (
    "",
    " ",
    "ends with a space ",
    "nul\0inside",
    "line\u2028separator\u2029and\x85next",
    "tab\tnew\nline\rreturn",
    "\U0001f980 crab \U0001f469\u200d\U0001f4bb",
    "e\u0301 combining, \u202e turned",
    "$set",
    "$$ROOT",
    "a.b",
    "null",
    '{"schema":null,"payload":null}',
    "%s %(name)s %",
    "back\\slash \\' \\0",
    "quote ' and \" and `",
    "; DROP TABLE `Users`; --",
    "x" * _WIDTH,
    "\U0001f980" * _WIDTH,
)
"""Texts that must arrive unchanged."""

log = get_logger("workload")


@dataclass(frozen=True, slots=True)
class RowChange:
    """One change of one row.

    Attributes:
        kind: ``INSERT``, ``UPDATE``, ``DELETE`` or ``KEY_CHANGE``.
        key: The row's key before the change; of an insert, the new one.
        fields: The columns that are written, without the key.
        new_key: Of a key change: the key from now on.
    """

    kind: str
    key: int
    fields: dict[str, str | None] = field(default_factory=dict)
    new_key: int | None = None

    def statement(self, table: str) -> Statement:
        """Return the change as SQL on ``table``, a quoted name."""
        where = "WHERE `user_id` = %s"
        if self.kind == INSERT:
            names = ", ".join(f"`{name}`" for name in ("user_id", *self.fields))
            marks = ", ".join(["%s"] * (1 + len(self.fields)))
            return f"INSERT INTO {table} ({names}) VALUES ({marks})", (self.key, *self.fields.values())  # noqa: S608
        if self.kind == DELETE:
            return f"DELETE FROM {table} {where}", (self.key,)  # noqa: S608  only names
        if self.kind == KEY_CHANGE:
            return f"UPDATE {table} SET `user_id` = %s {where}", (self.new_key, self.key)  # noqa: S608  only names
        sets = ", ".join(f"`{name}` = %s" for name in self.fields)
        return f"UPDATE {table} SET {sets} {where}", (*self.fields.values(), self.key)  # noqa: S608  only names


@dataclass(frozen=True, slots=True)
class Mix:
    """The mixture of changes; the shares of the four kinds are weights.

    Attributes:
        insert: Weight of inserts.
        update: Weight of updates.
        delete: Weight of deletes.
        key_change: Weight of updates of the key.
        rows: The most rows that the workload keeps; above it, inserts become deletes.
        odd: Share of texts (0 to 1) from ``ODD_TEXTS``.
        transaction: Share of transactions (0 to 1) that hold several changes, 2 to 10.
        again: Share of inserts and key changes (0 to 1) that reuse a key which was deleted or changed before.
        negative: Share of new keys (0 to 1) that are negative.
    """

    insert: float = 40
    update: float = 40
    delete: float = 15
    key_change: float = 5
    rows: int = 10_000
    odd: float = 0.05
    transaction: float = 0.02
    again: float = 0.1
    negative: float = 0.01


_LONGEST_TRANSACTION: Final = 10
_REMEMBERED: Final = 1_000
"""How many former keys may be reused."""


def plan(seed: int, base_id: int, mix: Mix | None = None) -> Iterator[tuple[RowChange, ...]]:
    """Yield transactions without end; the same arguments give the same ones.

    Every change is of a row that exists at that point, so that each one touches exactly one row.

    Args:
        seed: Selects the history.
        base_id: Keys are above it, negative ones below minus it; at least 0.
        mix: The mixture of changes.
    """
    history = _History(random.Random(seed), base_id, mix or Mix())  # noqa: S311  a repeatable history is the purpose
    while True:
        yield history.transaction()


class _History:
    """The workload's rows and former keys."""

    def __init__(self, chance: random.Random, base_id: int, mix: Mix) -> None:
        self._chance = chance
        self._mix = mix
        self._next = base_id
        self._rows: list[int] = []
        self._left: list[int] = []
        self._kinds = (INSERT, UPDATE, DELETE, KEY_CHANGE)
        self._weights = (mix.insert, mix.update, mix.delete, mix.key_change)

    def transaction(self) -> tuple[RowChange, ...]:
        several = self._chance.random() < self._mix.transaction
        return tuple(self._change() for _ in range(self._chance.randint(2, _LONGEST_TRANSACTION) if several else 1))

    def _change(self) -> RowChange:
        kind = self._chance.choices(self._kinds, self._weights)[0]
        if not self._rows:
            kind = INSERT
        elif kind == INSERT and len(self._rows) >= self._mix.rows:
            kind = DELETE
        if kind == INSERT:
            key = self._free_key()
            self._rows.append(key)
            return RowChange(INSERT, key, {name: self._text(name) for name in _COLUMNS})
        at = self._chance.randrange(len(self._rows))
        key = self._rows[at]
        if kind == UPDATE:
            names = self._chance.sample(_COLUMNS, self._chance.randint(1, len(_COLUMNS)))
            # One column always gets a new text: MySQL logs no update that changes nothing.
            return RowChange(UPDATE, key, {name: self._text(name) for name in names} | {names[0]: self._new(names[0])})
        if kind == KEY_CHANGE:
            self._rows[at] = self._free_key()
            self._leave(key)
            return RowChange(KEY_CHANGE, key, new_key=self._rows[at])
        self._rows[at] = self._rows[-1]
        self._rows.pop()
        self._leave(key)
        return RowChange(DELETE, key)

    def _leave(self, key: int) -> None:
        if len(self._left) < _REMEMBERED:
            self._left.append(key)
        else:
            self._left[self._chance.randrange(_REMEMBERED)] = key

    def _free_key(self) -> int:
        if self._left and self._chance.random() < self._mix.again:
            return self._left.pop(self._chance.randrange(len(self._left)))
        self._next += 1
        return -self._next if self._chance.random() < self._mix.negative else self._next

    def _text(self, name: str) -> str | None:
        if self._chance.random() >= self._mix.odd:
            return self._new(name)
        odd = self._chance.choice((None, *ODD_TEXTS))
        return f"{name}-odd" if odd is None and name == "login" else odd

    def _new(self, name: str) -> str:
        return f"{name}-{self._chance.getrandbits(48):x}"


def fresh_base_id() -> int:
    """Return a base for keys that no earlier run of this machine has used; it grows by a million a second."""
    return int(time.time() * _KEYS_A_SECOND)


class Table(Protocol):
    """The target of changes: ``stores.mysql.MySqlStore``, or a test's."""

    @property
    def table(self) -> str:
        """The table's quoted name."""

    def execute(self, statements: Sequence[Statement]) -> int:
        """Run statements in one transaction; return how many rows they touched."""


@dataclass(frozen=True, slots=True)
class WorkloadReport:
    """The result of a workload.

    Attributes:
        changes: By kind.
        transactions: As sent: late planned ones are sent together.
        missed: Changes whose row was missing: something else changes the same keys.
        seconds: From the first change to the last.
        rate: Changes a second, as measured.
        wanted_rate: Changes a second, as requested.
        longest_behind_seconds: The longest delay of a change.
        base_id: Keys are above it.
        seed: Selects the history.
    """

    changes: dict[str, int]
    transactions: int
    missed: int
    seconds: float
    rate: float
    wanted_rate: float
    longest_behind_seconds: float
    base_id: int
    seed: int

    @property
    def total(self) -> int:
        """The number of changes."""
        return sum(self.changes.values())


class Workload:
    """Sends a planned history to MySQL by a schedule: change ``n`` is due ``n / rate`` seconds after the start.

    After a stall it catches up at full speed, so that the mean rate holds. ``report`` may be called from another thread
    during ``run``.

    Args:
        table: The target of the changes; not in use elsewhere.
        rate: Changes a second, above 0.
        seed: Selects the history.
        base_id: Keys are above it; by default a new one.
        mix: The mixture of changes.
        longest_transaction: The most due changes in one transaction.
        on_commit: Called after each transaction with its changes and the time of the commit's answer, in ms since
            the epoch.
        clock: The monotonic clock of the schedule, in seconds.

    Raises:
        ConfigError: A number is out of range.
    """

    def __init__(
        self,
        table: Table,
        *,
        rate: float,
        seed: int = 0,
        base_id: int | None = None,
        mix: Mix | None = None,
        longest_transaction: int = 100,
        on_commit: Callable[[Sequence[RowChange], int], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._base_id = fresh_base_id() if base_id is None else base_id
        if rate <= 0 or longest_transaction < 1 or not 0 <= self._base_id <= _LATEST_BASE:
            raise ConfigError(
                f"The workload can't run with rate {rate}, {longest_transaction} changes a transaction and keys above "
                f"{self._base_id}.",
                way_out=f"Give a rate above 0, at least 1 change a transaction, and keys from 0 to {_LATEST_BASE}.",
            )
        self._table = table
        self._rate = rate
        self._seed = seed
        self._longest = longest_transaction
        self._on_commit = on_commit or (lambda _changes, _at: None)
        self._plan = plan(seed, self._base_id, mix)
        self._lock = threading.Lock()
        self._kinds: Counter[str] = Counter()
        self._transactions = 0
        self._missed = 0
        self._longest_delay = 0.0
        self._began: float | None = None
        self._last = 0.0

    def run(
        self, *, changes: int | None = None, seconds: float | None = None, stop: threading.Event | None = None
    ) -> WorkloadReport:
        """Send changes until there are ``changes``, ``seconds`` have passed or ``stop`` is set; return the report.

        Without ``changes`` and ``seconds``, only ``stop`` ends it. The last planned transaction is sent whole, so that
        there may be a few more changes than requested.

        Raises:
            UnavailableError: MySQL went away. The history ends here: the last commit is in doubt.
            RefusedError: MySQL refused a change.
        """
        stop = stop or threading.Event()
        began = self._began = self._last = self._clock()
        sent = 0
        while not stop.is_set() and (changes is None or sent < changes):
            now = self._clock() - began
            if seconds is not None and now >= seconds:
                break
            next_due = sent / self._rate
            if next_due > now:
                stop.wait((next_due if seconds is None else min(next_due, seconds)) - now)
                continue
            with self._lock:
                self._longest_delay = max(self._longest_delay, now - next_due)
            due = int(now * self._rate) + 1
            sent += self._send((due if changes is None else min(due, changes)) - sent)
        result = self.report()
        log.info("workload done", changes=result.changes, seconds=result.seconds, rate=result.rate)
        return result

    def _send(self, due: int) -> int:
        """Send due changes, up to the size of a transaction; return their number."""
        batch: list[RowChange] = []
        while len(batch) < min(due, self._longest):
            batch.extend(next(self._plan))
        touched = self._table.execute([change.statement(self._table.table) for change in batch])
        self._on_commit(batch, time.time_ns() // 1_000_000)
        with self._lock:
            self._last = self._clock()
            self._transactions += 1
            self._kinds.update(change.kind for change in batch)
            self._missed += len(batch) - touched
        if touched != len(batch):
            log.warning("changes missed their rows", sent=len(batch), touched=touched)
        return len(batch)

    def report(self) -> WorkloadReport:
        """Return the result so far."""
        with self._lock:
            seconds = 0.0 if self._began is None else self._last - self._began
            total = self._kinds.total()
            return WorkloadReport(
                changes=dict(sorted(self._kinds.items())),
                transactions=self._transactions,
                missed=self._missed,
                seconds=round(seconds, 3),
                rate=round(total / seconds, 1) if seconds else 0.0,
                wanted_rate=self._rate,
                longest_behind_seconds=round(self._longest_delay, 3),
                base_id=self._base_id,
                seed=self._seed,
            )
