"""The audit: compares the collection with MySQL's table, key by key, while both may change.

Belongs here: what counts as a difference, and the scans that find differences. Not here: when the audit runs, or how a
check judges its result. The functions `judge` and `differences` are pure. `audit` reads and writes nothing.

**Blocks.** The keys are cut into blocks, in the order of ``user_id`` as text. A block's documents are read and hashed
here. MySQL computes count and sum of the same hashes for the same keys, which are a few ranges of its primary key
(``domain/key_order.py``). Equal blocks are done. The others are compared row by row. Each key is in exactly one block,
and both sides of a block are read within milliseconds, so few blocks differ while changes arrive. A ``user_id`` that is
no text in MongoDB or null in MySQL is in no block and counted separately. Memory is that of a block and of a bounded
set of suspects.

**Changes in flight.** A suspect is a key that differs. It is read again, MySQL first, with growing waits until the
patience ends. It is in sync once its document equals a row that MySQL held at any time during the audit. While few
suspects are left, their documents are polled during the waits, so that a row which changes all the time is no
difference.

**Users from files** are not in MySQL. A document without a row counts as ``from_files`` if it has an entry in
``_ghsync_versions`` or carries a load's marker, and the stream has not recorded its deletion. Any other document
without a row is extra: the stream should have deleted it, or another writer wrote it. A user that has a row is compared
whoever wrote the document.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from ghsync_dagster.domain.errors import RefusedError
from ghsync_dagster.domain.key_order import Stride
from ghsync_dagster.domain.user import MARKER_FIELD, USER_FIELDS, User
from ghsync_dagster.logging import get_logger

if TYPE_CHECKING:
    from ghsync_dagster.stores.mongo.users import UserStore
    from ghsync_dagster.stores.mysql import MySqlStore, Span

OFFENDERS: Final = 20
MOST_OFFENDERS: Final = 100_000
"""How many differences the result holds where all are wanted."""
_BLOCK: Final = 2_000
"""How many documents or rows are in memory at once."""
_FILL: Final = 0.7
"""The intended fill of a block: one that is cut off at its limit is read in part for nothing."""
_SUSPECTS: Final = 10_000
_POLLED_SUSPECTS: Final = 100
"""Up to how many suspects are polled during a wait."""
_POLL_SECONDS: Final = 0.01
_SHOWN: Final = 60
"""How many characters of a value are shown."""
_BEFORE: Final = 10
"""How many of them are before the first character that differs."""
_ABSENT: Final = object()

Document = Mapping[str, Any]
Item = TypeVar("Item", bound=Mapping[str, Any])

log = get_logger("audit")


class Verdict(Enum):
    """The outcome of one key."""

    IN_SYNC = "in sync"
    FROM_FILES = "from files"
    MISSING = "missing"
    EXTRA = "extra"
    DIFFERENT = "different"

    @property
    def is_difference(self) -> bool:
        """Whether it is a difference of the two sides."""
        return self not in (Verdict.IN_SYNC, Verdict.FROM_FILES)


@dataclass(frozen=True, slots=True)
class KeyState:
    """What was read of one key, MySQL before MongoDB.

    Attributes:
        rows: What MySQL held when it was read, oldest first, at least one; None where there was no row.
        document: What MongoDB held after the last of these reads; None where there was no document.
        by_file: Whether a load wrote the document: it has a version entry or the marker, and no recorded deletion.
    """

    rows: Sequence[User | None]
    document: Document | None
    by_file: bool = False


@dataclass(frozen=True, slots=True)
class Offender:
    """One difference.

    Attributes:
        user_id: The key.
        kind: ``missing``, ``extra`` or ``different``.
        fields: For ``different``: by field that differs, the shortened values of ``mysql`` and ``mongodb``.
        shifted: For ``different``: whether values are in each other's columns.
    """

    user_id: str
    kind: str
    fields: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    shifted: bool = False


@dataclass(frozen=True, slots=True)
class AuditResult:
    """What the audit found. The counts are exact for all keys that did not change meanwhile.

    Attributes:
        rows: Rows of MySQL that were compared.
        documents: Documents of MongoDB that were compared.
        missing: Users with a row and no document.
        extra: Documents without a row that no load wrote, and further documents of one user.
        different: Users whose document has other fields than their row.
        shifted: How many of these hold their row's values in each other's columns.
        unusual_keys: How many users with a difference have a row whose key is no signed BIGINT.
        extra_keys: The least and the largest integer among the extra users; None where there is none.
        from_files: Documents without a row that a load wrote; no difference.
        offenders: The first differences, up to the limit.
        reread: Keys that were read again, because they differed at first.
        rounds: How often such keys were read again.
        seconds: How long it took.
    """

    rows: int
    documents: int
    missing: int
    extra: int
    different: int
    from_files: int
    offenders: tuple[Offender, ...]
    reread: int
    rounds: int
    seconds: float
    shifted: int = 0
    unusual_keys: int = 0
    extra_keys: tuple[int, int] | None = None

    @property
    def total(self) -> int:
        """How many differences were found."""
        return self.missing + self.extra + self.different

    @property
    def equal(self) -> bool:
        """Whether no difference was found."""
        return self.total == 0

    def summary(self) -> str:
        """Return the outcome in one line of words."""
        compared = f"{self.rows} rows against {self.documents} documents in {self.seconds:.1f} s"
        files = f"; {self.from_files} documents are from files alone" if self.from_files else ""
        if self.equal:
            return f"equal: {compared}{files}"
        shifted = f" ({self.shifted} shifted)" if self.shifted else ""
        return f"{self.missing} missing, {self.extra} extra, {self.different} different{shifted}: {compared}{files}"


@dataclass(frozen=True, slots=True)
class Patience:
    """How long suspects are read again before they count as differences.

    Attributes:
        seconds: In all, over the whole audit.
        first_wait: The wait before the second reading, in seconds; each further wait is twice as long.
        longest_wait: In seconds.
    """

    seconds: float = 30.0
    first_wait: float = 0.05
    longest_wait: float = 2.0

    def waits(self) -> Iterator[float]:
        """Yield the waits, without end."""
        wait = self.first_wait
        while True:
            yield wait
            wait = min(2 * wait, self.longest_wait)


def matches(row: User | None, document: Document | None) -> bool:
    """Return whether a document equals a row in all five fields, or neither exists."""
    if row is None or document is None:
        return row is None and document is None
    return all(document.get(name, _ABSENT) == row[name] for name in USER_FIELDS)


def judge(state: KeyState) -> Verdict:
    """Return the verdict on a key from all that was read of it."""
    if any(matches(row, state.document) for row in state.rows):
        return Verdict.IN_SYNC
    if state.document is None:
        return Verdict.MISSING
    if state.rows[-1] is not None:
        return Verdict.DIFFERENT
    never_in_mysql = all(row is None for row in state.rows)
    return Verdict.FROM_FILES if never_in_mysql and state.by_file else Verdict.EXTRA


def differences(row: User, document: Document) -> dict[str, dict[str, str]]:
    """Return the fields in which a document differs from its row, each with both values, cut around the difference."""
    found = {}
    for name in USER_FIELDS:
        stored = document.get(name, _ABSENT)
        if stored != row[name]:
            start = _first_difference(row[name], stored)
            found[name] = {"mysql": _shown(row[name], start), "mongodb": _shown(stored, start)}
    return found


def is_shifted(row: User, document: Document) -> bool:
    """Return whether values are in each other's columns, as after a schema change that the connector missed.

    At least two fields differ, and at least half of these hold the row's value of another column, one of them a text.
    """
    names = USER_FIELDS[1:]
    differing = [name for name in names if document.get(name, _ABSENT) != row[name]]
    moved = [
        document[name]
        for name in differing
        if name in document and any(document[name] == row[other] for other in names if other != name)
    ]
    return len(differing) > 1 and len(differing) <= 2 * len(moved) and any(moved)


def _first_difference(one: object, other: object) -> int:
    if not isinstance(one, str) or not isinstance(other, str):
        return 0
    same = (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(same, min(len(one), len(other)))


def _shown(value: object, first_difference: int) -> str:
    if value is _ABSENT:
        return "(absent)"
    if not isinstance(value, str):
        return "null" if value is None else f"{str(value)[:_SHOWN]} ({type(value).__name__})"
    if len(value) <= _SHOWN:
        return ascii(value)
    start = max(0, first_difference - _BEFORE)
    return f"{value[start : start + _SHOWN]!a} from character {start + 1} of {len(value)}"


def audit(
    mysql: MySqlStore,
    mongo: UserStore,
    *,
    patience: Patience | None = None,
    limit: int = OFFENDERS,
    on_difference: Callable[[Offender], object] | None = None,
) -> AuditResult:
    """Compare MySQL's table with the collection; the module's docstring defines a difference.

    Args:
        mysql: Open, not in use elsewhere.
        mongo: Open.
        patience: For changes in flight; 30 s when left out.
        limit: How many differences the result holds.
        on_difference: Called with every difference as it is found. A repeated audit calls it again for each.

    Raises:
        UnavailableError: A server went away; the audit may be repeated.
        RefusedError: A server refused, or does not order text by its bytes.
        ConfigError: There is no such table.
    """
    run = _Audit(mysql, mongo, patience or Patience(), limit, on_difference or (lambda _: None))
    run.count_outside_blocks()
    run.compare_blocks()
    result = run.result()
    log.info("compared", equal=result.equal, summary=result.summary(), reread=result.reread, rounds=result.rounds)
    return result


class _Block(NamedTuple):
    """Documents, and MySQL's count of rows and sum of hashes for the same keys."""

    span: Span
    documents: Sequence[Document]
    digest: Future[tuple[int, int]]


class _Audit:
    """One audit's counts and suspects."""

    def __init__(
        self,
        mysql: MySqlStore,
        mongo: UserStore,
        patience: Patience,
        limit: int,
        on_difference: Callable[[Offender], object],
    ) -> None:
        self._mysql = mysql
        self._mongo = mongo
        self._patience = patience
        self._patience_left = patience.seconds
        self._limit = limit
        self._on_difference = on_difference
        self._started = time.monotonic()
        self._rows = 0
        self._documents = 0
        self._reread = 0
        self._rounds = 0
        self._shifted = 0
        self._unusual_keys = 0
        self._extra_keys: tuple[int, int] | None = None
        self._counts: Counter[Verdict] = Counter()
        self._offenders: list[Offender] = []
        self._suspects: dict[str, list[User | None]] = {}

    def count_outside_blocks(self) -> None:
        """Count rows and documents that can have no counterpart, as their key is null or no text."""
        count, keys = self._mysql.rows_outside(_BLOCK)
        self._rows += count
        for key in keys:
            self._count(Verdict.MISSING, key)
        self._counts[Verdict.MISSING] += count - len(keys)
        self._unusual_keys += count - len(keys)
        for odd in self._mongo.ids_that_are_no_text():
            self._documents += 1
            self._count(Verdict.EXTRA, f"{odd!r} ({type(odd).__name__})"[:_SHOWN])

    def compare_blocks(self) -> None:
        """Compare all keys block by block, in the order of their text.

        MySQL hashes a block while the documents of the next one are read.
        """
        before: _Block | None = None
        with ThreadPoolExecutor(1, "audit-mysql") as mysql:
            for span, documents in self._blocks():
                block = _Block(span, documents, mysql.submit(self._mysql.digest, span, len(documents) + 1))
                if before is not None:
                    self._compare_block(before, block)
                before = block
            if before is not None:
                self._compare_block(before)
        self._settle()

    def _blocks(self) -> Iterator[tuple[Span, Sequence[Document]]]:
        from ghsync_dagster.stores.mysql import Span

        stride = Stride(self._mongo.estimated_count(), int(_FILL * _BLOCK))
        after: str | None = None
        while True:
            upto = stride.bound(after)
            documents, is_cut = _whole_keys(partial(self._page, after, upto))
            if is_cut:
                upto = documents[-1]["user_id"]
            stride.learn(after, upto, len(documents))
            self._documents += len(documents)
            yield Span(after, upto), documents
            if upto is None:
                return
            after = upto

    def _page(self, after: str | None, upto: str | None, limit: int) -> Sequence[Document]:
        """Read documents in the order of text.

        Raises:
            RefusedError: The server orders them otherwise, so the two sides of a block would have different keys.
        """
        found = self._mongo.page(after, upto, limit)
        keys = [document["user_id"] for document in found if isinstance(document["user_id"], str)]
        if keys and (keys != sorted(keys) or (after is not None and keys[0] <= after) or keys[-1] > (upto or keys[-1])):
            raise RefusedError(
                f"{self._mongo.users.full_name} does not order user_id by its bytes: it has a collation.",
                way_out="Create the collection without a collation, and load it again.",
            )
        return found

    def _compare_block(self, block: _Block, following: _Block | None = None) -> None:
        from ghsync_dagster.stores.mysql import hash_sum

        count, total = block.digest.result()
        if count == len(block.documents):
            # A document without the contract's fields has no hash.
            with suppress(KeyError, AttributeError, UnicodeEncodeError):
                if total == hash_sum(block.documents):
                    self._rows += count
                    return
        if following is not None:
            # One connection runs one query at a time.
            wait([following.digest])
        self._compare_rows(block.span, block.documents)

    def _compare_rows(self, span: Span, documents: Sequence[Document]) -> None:
        """Compare a block's rows with its documents; keys that differ become suspects."""
        by_key: dict[str, list[Document]] = {}
        for document in documents:
            by_key.setdefault(document["user_id"], []).append(document)
        self._count_repeated(by_key)
        unknown = set(by_key)
        above: User | None = None
        while True:
            rows, is_cut = _whole_keys(partial(self._mysql.rows_within, span, above))
            self._rows += len(rows)
            before = None
            for row in rows:
                key = str(row["user_id"])
                unknown.discard(key)
                if key == before:
                    # Two rows of one key, in a table without a unique key: one of them has no document.
                    self._count(Verdict.MISSING, key)
                elif not any(matches(row, document) for document in by_key.get(key, ())):
                    self._suspect(key, row)
                before = key
            if len(self._suspects) >= _SUSPECTS:
                self._settle()
            if not is_cut:
                break
            above = rows[-1]
        by_file = self._by_file(unknown, {})
        self._counts[Verdict.FROM_FILES] += len(by_file)
        for key in unknown - by_file:
            self._suspect(key, None)
        if len(self._suspects) >= _SUSPECTS:
            self._settle()

    def _count_repeated(self, by_key: Mapping[str, Sequence[Document]]) -> None:
        """Count further documents of one user, which a collection without the unique index may hold."""
        for key, documents in by_key.items():
            # A document that was deleted and inserted meanwhile may be read twice.
            if len(documents) > 1 and self._mongo.count_of(key) > 1:
                for _ in documents[1:]:
                    self._count(Verdict.EXTRA, key)

    def _by_file(self, keys: set[str], documents: Mapping[str, Document]) -> set[str]:
        """Return those of ``keys`` that a load wrote, by their version or marker, and the stream did not delete."""
        found = self._mongo.versioned_among(list(keys)) if keys else set()
        found |= {key for key in keys if MARKER_FIELD in documents.get(key, {})}
        return found - self._mongo.deleted_among(list(found)) if found else found

    def _suspect(self, key: str, row: User | None) -> None:
        rows = self._suspects.setdefault(key, [])
        if row not in rows[-1:]:
            rows.append(row)

    def _settle(self) -> None:
        """Read the suspects again until all are in sync or the patience ends; count their verdicts."""
        from ghsync_dagster.chunks import chunks

        self._reread += len(self._suspects)
        waits = self._patience.waits()
        while self._suspects:
            began = time.monotonic()
            last = self._patience_left <= 0
            self._rounds += 1
            for part in chunks(list(self._suspects)):
                self._read_again(part, last=last)
            if not last:
                self._wait(min(next(waits), self._patience_left))
            self._patience_left -= time.monotonic() - began

    def _wait(self, seconds: float) -> None:
        """Wait; if the suspects are few, poll their documents meanwhile.

        If a user changes all the time, its document equals a row that was read for a moment only.
        """
        ends = time.monotonic() + seconds
        while self._suspects and (left := ends - time.monotonic()) > 0:
            if len(self._suspects) > _POLLED_SUSPECTS:
                time.sleep(left)
                return
            time.sleep(min(left, _POLL_SECONDS))
            documents = self._mongo.users_by_id(list(self._suspects))
            for key, rows in list(self._suspects.items()):
                if judge(KeyState(rows, documents.get(key))) is Verdict.IN_SYNC:
                    del self._suspects[key]

    def _read_again(self, keys: list[str], *, last: bool) -> None:
        rows = self._mysql.rows_by_id(keys)
        documents = self._mongo.users_by_id(keys)
        rowless = {key for key in documents if key not in rows}
        by_file = self._by_file(rowless, documents)
        for key in keys:
            self._suspect(key, rows.get(key))
            state = KeyState(self._suspects[key], documents.get(key), key in by_file)
            verdict = judge(state)
            if last or not verdict.is_difference:
                del self._suspects[key]
                self._count(verdict, key, state)

    def _count(self, verdict: Verdict, key: str, state: KeyState | None = None) -> None:
        from ghsync_dagster.stores.mysql import is_key

        self._counts[verdict] += 1
        if not verdict.is_difference:
            return
        offender = _offender(key, verdict, state)
        self._shifted += offender.shifted
        if verdict is not Verdict.EXTRA:
            self._unusual_keys += not is_key(key)
        elif is_key(key):
            least, largest = self._extra_keys or (int(key), int(key))
            self._extra_keys = min(least, int(key)), max(largest, int(key))
        if len(self._offenders) < self._limit:
            self._offenders.append(offender)
        self._on_difference(offender)

    def result(self) -> AuditResult:
        """Return what was found."""
        return AuditResult(
            rows=self._rows,
            documents=self._documents,
            missing=self._counts[Verdict.MISSING],
            extra=self._counts[Verdict.EXTRA],
            different=self._counts[Verdict.DIFFERENT],
            from_files=self._counts[Verdict.FROM_FILES],
            offenders=tuple(self._offenders),
            reread=self._reread,
            rounds=self._rounds,
            seconds=round(time.monotonic() - self._started, 3),
            shifted=self._shifted,
            unusual_keys=self._unusual_keys,
            extra_keys=self._extra_keys,
        )


def _whole_keys(read: Callable[[int], Sequence[Item]]) -> tuple[Sequence[Item], bool]:
    """Read up to a block's size without splitting the items of one key; return them, and whether there is more."""
    limit = _BLOCK
    while True:
        found = read(limit)
        # Keys that are no text are in no block.
        items = [item for item in found if isinstance(item["user_id"], str)]
        if len(found) < limit:
            return items, False
        # The last key may have more items beyond the limit.
        whole = [item for item in items if item["user_id"] != items[-1]["user_id"]]
        if whole:
            return whole, True
        limit *= 2


def _offender(key: str, verdict: Verdict, state: KeyState | None) -> Offender:
    row, document = (state.rows[-1], state.document) if state else (None, None)
    if row is None or document is None:
        return Offender(key, verdict.value)
    return Offender(key, verdict.value, differences(row, document), is_shifted(row, document))
