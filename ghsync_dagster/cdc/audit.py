"""The audit: whether the collection holds what MySQL's table holds, key by key, while both may change.

Belongs here: what counts as a difference, and the two scans that find them. Not here: when the audit runs, or what a
check makes of it. The judgement (`judge`, `differences`) is pure; `audit` reads, and writes nothing.

**How.** MySQL is scanned in key order and its users are looked up in MongoDB: that finds the missing and the
different. The collection is scanned too, in whatever order it has, since a text key orders otherwise than a number,
and its keys are looked up in MySQL: that finds the extra. Memory is that of a chunk and of a bounded set of suspects.

**In flight.** A suspect is read again, MySQL first, with growing waits until the patience ends. It is in step as soon
as its document equals a row that MySQL held at any time during the audit: everything committed before that moment has
arrived. While few are left their documents are looked at closely during the waits, so that a row which changes all the
time is no difference.

**Users that only files brought** are not in MySQL. A document without a row is theirs, and counted as ``from_files``,
where it has an entry in ``_ghsync_versions`` or still carries a load's marker, and the stream has not recorded its
deletion. Any other document without a row is extra: the stream should have deleted it, or somebody else wrote it.
A user that has a row is compared whoever wrote the document.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from ghsync_dagster.domain.user import MARKER_FIELD, USER_FIELDS, User
from ghsync_dagster.observability.logging import get_logger

if TYPE_CHECKING:
    from ghsync_dagster.stores.mongo import UserStore
    from ghsync_dagster.stores.mysql import MySqlStore

OFFENDERS: Final = 20
_SUSPECTS: Final = 10_000
_FEW: Final = 100
"""So many suspects are looked at closely while a wait lasts."""
_CLOSE_SECONDS: Final = 0.01
_SHOWN: Final = 60
"""How many characters of a value are shown."""
_BEFORE: Final = 10
"""How many of them come before the first character that differs."""
_ABSENT: Final = object()

Document = Mapping[str, Any]

log = get_logger("audit")


class Verdict(Enum):
    """What is said of one key."""

    IN_STEP = "in step"
    FROM_FILES = "from files"
    MISSING = "missing"
    EXTRA = "extra"
    DIFFERENT = "different"

    @property
    def is_difference(self) -> bool:
        """Whether the two sides differ by it."""
        return self not in (Verdict.IN_STEP, Verdict.FROM_FILES)


@dataclass(frozen=True, slots=True)
class Sighting:
    """One key as it was read, MySQL before MongoDB.

    Attributes:
        rows: What MySQL held when it was read, oldest first, at least one; None where there was no row.
        document: What MongoDB held after the last of these reads; None where there was no document.
        by_file: Whether the document is known to be a file's: it has a version entry or the marker, and no deletion.
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
        fields: For ``different``: each field that differs to what ``mysql`` and ``mongodb`` hold, cut to size.
    """

    user_id: str
    kind: str
    fields: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AuditResult:
    """What the audit found. The counts are exact for whatever did not change meanwhile.

    Attributes:
        rows: Rows of MySQL that were compared.
        documents: Documents of MongoDB that were looked at.
        missing: Users with a row and no document.
        extra: Documents with no row that no file brought, and further documents of one user.
        different: Users whose document has other fields than their row.
        from_files: Documents with no row that a file brought; no difference.
        offenders: Up to 20 of the differences.
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

    @property
    def equal(self) -> bool:
        """Whether no difference was found."""
        return self.missing == self.extra == self.different == 0

    def summary(self) -> str:
        """Return the outcome in one line of words."""
        compared = f"{self.rows} rows against {self.documents} documents in {self.seconds:.1f} s"
        files = f"; {self.from_files} documents are from files alone" if self.from_files else ""
        if self.equal:
            return f"equal: {compared}{files}"
        return f"{self.missing} missing, {self.extra} extra, {self.different} different: {compared}{files}"


@dataclass(frozen=True, slots=True)
class Patience:
    """How long suspects are read again before they count as differences.

    Attributes:
        seconds: In all, over the whole audit.
        first_wait: Before the second reading, in seconds; each further wait is twice as long.
        longest_wait: In seconds.
        wait: Waits so many seconds. An event's ``wait`` may be given: once it returns true, patience has ended.
    """

    seconds: float = 30.0
    first_wait: float = 0.05
    longest_wait: float = 2.0
    wait: Callable[[float], object] = time.sleep

    def waits(self) -> Iterator[float]:
        """Yield the waits, without end."""
        wait = self.first_wait
        while True:
            yield wait
            wait = min(2 * wait, self.longest_wait)


def matches(row: User | None, document: Document | None) -> bool:
    """Tell whether a document is what a row says: equal text in all five fields, or neither is there."""
    if row is None or document is None:
        return row is None and document is None
    return all(document.get(name, _ABSENT) == row[name] for name in USER_FIELDS)


def judge(sighting: Sighting) -> Verdict:
    """Say what a key is, from all that was read of it."""
    if any(matches(row, sighting.document) for row in sighting.rows):
        return Verdict.IN_STEP
    if sighting.document is None:
        return Verdict.MISSING
    if sighting.rows[-1] is not None:
        return Verdict.DIFFERENT
    never_in_mysql = all(row is None for row in sighting.rows)
    return Verdict.FROM_FILES if never_in_mysql and sighting.by_file else Verdict.EXTRA


def differences(row: User, document: Document) -> dict[str, dict[str, str]]:
    """Return the fields in which a document differs from its row, each with both values, cut around the difference."""
    found = {}
    for name in USER_FIELDS:
        stored = document.get(name, _ABSENT)
        if stored != row[name]:
            start = _first_difference(row[name], stored)
            found[name] = {"mysql": _shown(row[name], start), "mongodb": _shown(stored, start)}
    return found


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


def audit(mysql: MySqlStore, mongo: UserStore, *, patience: Patience | None = None) -> AuditResult:
    """Compare MySQL's table with the collection; see the module's words for what a difference is.

    Args:
        mysql: Open, not in use elsewhere.
        mongo: Open.
        patience: For changes in flight; 30 s when left out.

    Raises:
        UnavailableError: A server went away; the audit may be repeated.
        RefusedError: A server refused.
        ConfigError: There is no such table.
    """
    run = _Audit(mysql, mongo, patience or Patience())
    run.scan_mysql()
    run.scan_mongo()
    result = run.result()
    log.info("compared", equal=result.equal, summary=result.summary(), reread=result.reread, rounds=result.rounds)
    return result


class _Audit:
    """One audit's counts and suspects."""

    def __init__(self, mysql: MySqlStore, mongo: UserStore, patience: Patience) -> None:
        self._mysql = mysql
        self._mongo = mongo
        self._patience = patience
        self._patience_left = patience.seconds
        self._started = time.monotonic()
        self._rows = 0
        self._documents = 0
        self._reread = 0
        self._rounds = 0
        self._counts: Counter[Verdict] = Counter()
        self._offenders: list[Offender] = []
        self._suspects: dict[str, list[User | None]] = {}

    def scan_mysql(self) -> None:
        """Look up every row's document; note what differs."""
        from ghsync_dagster.stores.mongo import CHUNK

        after: int | None = None
        while rows := self._mysql.rows(after, CHUNK):
            after = int(str(rows[-1]["user_id"]))
            self._rows += len(rows)
            by_key = {str(row["user_id"]): row for row in rows}
            documents = self._mongo.users_by_id(list(by_key))
            for key, row in by_key.items():
                if not matches(row, documents.get(key)):
                    self._suspect(key, row)
            if len(self._suspects) >= _SUSPECTS:
                # The other scan finds what turns out to have no row.
                self._settle(leave_out=(Verdict.EXTRA, Verdict.FROM_FILES))

    def scan_mongo(self) -> None:
        """Look up every document's row; note what has none and is not known to be a file's."""
        from ghsync_dagster.stores.mongo import chunks

        once: set[str] | None = None if self._mongo.has_unique_index() else set()
        for part in chunks(self._stored_keys()):
            self._documents += len(part)
            keys = {key for key in part if isinstance(key, str)}
            if once is not None:
                self._sort_out_repeated([key for key in part if isinstance(key, str)], once)
            for odd in (key for key in part if not isinstance(key, str)):
                self._count(Verdict.EXTRA, Offender(f"{odd!r} ({type(odd).__name__})"[:_SHOWN], Verdict.EXTRA.value))
            self._sort_out(keys - self._mysql.ids_among(keys))
            if len(self._suspects) >= _SUSPECTS:
                self._settle()
        self._settle()

    def _sort_out_repeated(self, keys: Sequence[str], once: set[str]) -> None:
        """Count documents whose user has another one, which only the unique index rules out."""
        for key in keys:
            # One that was met again may have been deleted and inserted meanwhile.
            if key in once and self._mongo.count_of(key) > 1:
                self._count(Verdict.EXTRA, Offender(key, Verdict.EXTRA.value))
            once.add(key)

    def _stored_keys(self) -> Iterator[object]:
        from ghsync_dagster.stores.mongo import CHUNK, mongo_errors

        with (
            mongo_errors("Reading users"),
            self._mongo.users.find({}, {"_id": 0, "user_id": 1}, batch_size=CHUNK) as cursor,
        ):
            for found in cursor:
                yield found.get("user_id")

    def _sort_out(self, unknown: set[str]) -> None:
        """Count those keys without a row that a file brought; suspect the others."""
        by_file = self._by_file(unknown)
        self._counts[Verdict.FROM_FILES] += len(by_file)
        for key in unknown - by_file:
            self._suspect(key, None)

    def _by_file(self, keys: set[str]) -> set[str]:
        versioned = set(self._mongo.versions_by_id(list(keys))) if keys else set()
        return versioned - self._mongo.deleted_among(list(versioned)) if versioned else versioned

    def _suspect(self, key: str, row: User | None) -> None:
        seen = self._suspects.setdefault(key, [])
        if row not in seen[-1:]:
            seen.append(row)

    def _settle(self, *, leave_out: Sequence[Verdict] = ()) -> None:
        """Read the suspects again until all are in step or the patience ends; count what they are then."""
        from ghsync_dagster.stores.mongo import chunks

        self._reread += len(self._suspects)
        waits = self._patience.waits()
        while self._suspects:
            began = time.monotonic()
            last = self._patience_left <= 0
            self._rounds += 1
            for part in chunks(list(self._suspects)):
                self._read_again(part, last=last, leave_out=leave_out)
            ended = not last and self._watch(min(next(waits), self._patience_left))
            self._patience_left = 0.0 if ended else self._patience_left - (time.monotonic() - began)

    def _watch(self, seconds: float) -> bool:
        """Wait; look closely at the documents of few suspects meanwhile. Return whether patience was ended early.

        What a row held a moment ago is in a document that is written all the time for a moment only.
        """
        ends = time.monotonic() + seconds
        while self._suspects and (left := ends - time.monotonic()) > 0:
            close = len(self._suspects) <= _FEW
            if self._patience.wait(min(left, _CLOSE_SECONDS) if close else left):
                return True
            if close:
                self._look_at_documents(list(self._suspects))
        return False

    def _look_at_documents(self, keys: list[str]) -> None:
        documents = self._mongo.users_by_id(keys)
        for key in keys:
            if judge(Sighting(self._suspects[key], documents.get(key))) is Verdict.IN_STEP:
                del self._suspects[key]

    def _read_again(self, keys: list[str], *, last: bool, leave_out: Sequence[Verdict]) -> None:
        rows = self._mysql.rows_by_id(keys)
        documents = self._mongo.users_by_id(keys)
        rowless = {key for key in documents if key not in rows}
        by_file = self._by_file(rowless) | self._marked(documents, rowless)
        for key in keys:
            self._suspect(key, rows.get(key))
            sighting = Sighting(self._suspects[key], documents.get(key), key in by_file)
            verdict = judge(sighting)
            if last or not verdict.is_difference:
                del self._suspects[key]
                if verdict not in leave_out:
                    self._count(verdict, _offender(key, verdict, sighting))

    def _marked(self, documents: Mapping[str, Document], keys: set[str]) -> set[str]:
        """Return those of ``keys`` that a load has not finished with, but for those that the stream deleted."""
        marked = [key for key in keys if MARKER_FIELD in documents[key]]
        return set(marked) - self._mongo.deleted_among(marked) if marked else set()

    def _count(self, verdict: Verdict, offender: Offender) -> None:
        self._counts[verdict] += 1
        if verdict.is_difference and len(self._offenders) < OFFENDERS:
            self._offenders.append(offender)

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
        )


def _offender(key: str, verdict: Verdict, sighting: Sighting) -> Offender:
    row, document = sighting.rows[-1], sighting.document
    fields = differences(row, document) if row is not None and document is not None else {}
    return Offender(key, verdict.value, fields)
