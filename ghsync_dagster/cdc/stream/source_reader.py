"""Reading MySQL again for users that are to be repaired. A thread of its own does it, so that the stream never waits.

Belongs here: carrying out ``READING_STEPS`` of ``domain.repair``. Not here: writing what was read
(``cdc.stream.repair``), who requests a repair (``cdc.health.repair_requests``), the store (``stores.mongo.repairs``).
"""

from __future__ import annotations

import threading
import time
import uuid
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final

from ghsync_dagster.domain.change import Change, Op, Position
from ghsync_dagster.domain.envelope import binlog_position
from ghsync_dagster.domain.errors import WAY_OUT, GhsyncError, PermanentError, TransientError, UnavailableError
from ghsync_dagster.domain.repair import READING_STEPS, Reading, RepairStep, is_current
from ghsync_dagster.logging import get_logger
from ghsync_dagster.retry import waits

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from ghsync_dagster.cdc.stream.batch import Batch
    from ghsync_dagster.cdc.stream.fences import LeftOut
    from ghsync_dagster.domain.user import User
    from ghsync_dagster.stores.mongo.repairs import RepairRequests
    from ghsync_dagster.stores.mysql import MySqlStore

CHUNK: Final = 200
"""Users that are locked, read and written at once, at most."""
_LEAST: Final = 20
_CHUNKS: Final = 10
"""For how many chunks open requests are read at once."""
_HELD_SECONDS: Final = 0.05
"""How long the stream is to wait for the write of a chunk: chunks become smaller where the store is slow."""
_AHEAD: Final = 2
"""Readings that may wait for the writer or be at work."""
_POLL_SECONDS: Final = 1.0
"""How often to look for requests."""
_ONE_CONSUMER: Final = "Let one consumer have all partitions while users are repaired: stop the others of the group."
_DROP_SECONDS: Final = 3_600.0
"""How often to look for fences that nothing needs any more."""
_END_SECONDS: Final = 5.0
"""How long to wait for the thread to end."""
_PERMANENT_SECONDS: Final = 30.0
KEPT_SECONDS: Final = 86_400.0
"""How long a fence is kept at least."""
_LOCKED_SECONDS: Final = 0.02
"""How long to leave users alone at first that another transaction has locked."""
_LONGEST_LOCKED_SECONDS: Final = 5.0
_LOCK_REPORTED_SECONDS: Final = 3.0
"""How long a lock may last before it is reported with the requests."""
_READING: Final = "reading"
_WRITING: Final = "writing"

log = get_logger("repair")


class Claim:
    """Users whose requests were claimed, and what the stream applied of them since.

    Attributes:
        requests: The token of each user.
        polled: The position of the newest record of each partition that had been polled when recording began.
        applied: The position of the last record of a user that was applied since. None where the record has none, was
            refused, or could not be decoded.
    """

    def __init__(self, requests: Mapping[str, str], polled: Iterable[Position | None] = ()) -> None:
        self.requests = dict(requests)
        self.polled = tuple(polled)
        self.applied: dict[str, Position | None] = {}

    def record(self, batch: Batch, left: LeftOut) -> None:
        """Record the positions of a batch that is about to be applied."""
        if batch.first_truncate() is None and self.requests.keys().isdisjoint(batch.keys):
            return
        for at, change in enumerate(batch.changes):
            if type(change) is not Change or at in left.records:
                continue
            if change.op is Op.TRUNCATE:
                kept = left.keep.get(at, frozenset())
                self.applied |= dict.fromkeys(self.requests.keys() - kept, change.position)
            elif change.key in self.requests:
                self.applied[change.key] = change.position


@dataclass(frozen=True, slots=True)
class RepairWork:
    """Users that were read and wait to be written.

    Attributes:
        claim: Their requests.
        reading: Where the reading lies.
        rows: The rows of those that have one.
    """

    claim: Claim
    reading: Reading
    rows: Mapping[str, User]


def _keep_newest(known: dict[int, Position | None], positions: Mapping[int, Position | None]) -> None:
    for partition, position in positions.items():
        before = known.get(partition)
        # A consumer that lags polls older records than the topic's newest.
        if before is None or (position is not None and before.compare(position) != 1):
            known[partition] = position


def _as_ours(error: Exception) -> GhsyncError:
    if isinstance(error, GhsyncError):
        return error
    return PermanentError(
        f"A repair failed unexpectedly ({type(error).__name__}).", way_out="Read the consumer's log, and report it."
    )


class SourceReader:
    """Claims requests and reads the source, in a thread of its own.

    Args:
        requests: Not used by another thread.
        open_source: Opens MySQL, or raises what is in the way.
        users_a_second: How many users are read a second at most.
        ends: Returns the oldest record in each partition of the topic, and the position of the newest one; None where
            there is none.
    """

    def __init__(
        self,
        requests: RepairRequests,
        open_source: Callable[[], MySqlStore],
        users_a_second: float = float("inf"),
        ends: Callable[[], tuple[Sequence[Change | None], Mapping[int, Position | None]]] = lambda: ((), {}),
    ) -> None:
        self._requests = requests
        self._open_source = open_source
        self._users_a_second = users_a_second
        self._ends = ends
        self._newest: dict[int, Position | None] | None = None
        """The position of the newest record of each partition; None until the topic was queried for it."""
        self._locked: dict[str, tuple[float, float]] = {}
        """Users that others have locked: until when to leave them alone, and since when they are locked."""
        self._next_drop = 0.0
        self._source: MySqlStore | None = None
        self._changed = threading.Condition()
        self._closing = False
        self._assignment = 0
        """Counts assignments; what was claimed under an earlier one is not this consumer's to write."""
        self._is_owner = False
        self._shared = ""
        """Why this consumer, which has some of the partitions, carries nothing out."""
        self._claims: list[Claim] = []
        self._works: list[RepairWork] = []
        self._problems: dict[str, str] = {}
        """What is in the way of reading, and of writing."""
        self._delays = {_READING: waits(), _WRITING: waits()}
        self._next_at = self._not_before = 0.0
        self._chunk = CHUNK // 4
        self._open: dict[str, str] = {}
        """The tokens of users that are to be claimed next."""
        self._commands: dict[RepairStep, Callable[[int], None]] = {
            RepairStep.CLAIM: self._claim,
            RepairStep.WATCH: self._watch,
            RepairStep.READ_SOURCE: self._read_source,
        }
        self._claimed: Claim | None = None
        self._thread = threading.Thread(target=self._run, name="cdc-repair", daemon=True)
        self._thread.start()

    # For the thread that consumes

    def assigned(self, partitions: Collection[int], everything: Collection[int]) -> None:
        """Adopt a new assignment.

        Args:
            partitions: Those that this consumer has now.
            everything: All partitions of the topic.
        """
        with self._changed:
            self._assignment += 1
            self._is_owner = bool(partitions) and set(everything) <= set(partitions)
            self._shared = (
                f"A consumer has partitions {sorted(partitions)} of {sorted(everything)} only. Nobody else may apply "
                "records of a user that is repaired, and a user id does not show its partition."
                if partitions and not self._is_owner
                else ""
            )
            self._claims, self._works, self._newest = [], [], None
            self._changed.notify_all()

    def polled(self, positions: Mapping[int, Position]) -> None:
        """Record the position of the newest record of partitions, before it is applied."""
        with self._changed:
            if self._newest is not None:
                _keep_newest(self._newest, positions)

    def has_requests(self) -> bool:
        """Return whether this consumer has requests to carry out, and can.

        Raises:
            UnavailableError: The store is away.
        """
        if not self._is_owner or self._problems:
            return False
        now = time.monotonic()
        locked = [key for key, (_, since) in list(self._locked.items()) if now - since > _LOCK_REPORTED_SECONDS]
        return bool(self._requests.open_requests(1, leave_out=locked))

    @property
    def is_ready(self) -> bool:
        """Whether there is work for ``next_work``."""
        return bool(self._works)

    @property
    def is_busy(self) -> bool:
        """Whether work is there, or on its way."""
        return bool(self._claims)

    def next_work(self) -> RepairWork | None:
        """Return users that were read, None where there are none."""
        with self._changed:
            return self._works.pop(0) if self._works else None

    def written(self, work: RepairWork, seconds: float) -> None:
        """Record that the store took what was read: nothing is in the way of writing."""
        self._clear(_WRITING)
        users = len(work.claim.requests)
        # What is left of a chunk that met locks shows little.
        if users >= _LEAST:
            self._chunk = min(max(int(users * _HELD_SECONDS / seconds), _LEAST), CHUNK)

    def finished(self, work: RepairWork, error: Exception | None = None) -> None:
        """Release work that was carried out or given up: what is open still is claimed again.

        Args:
            work: The work.
            error: Why it could not be carried out. Nothing more is handed out for a while then.
        """
        seconds = 0.0 if error is None else self._report(_WRITING, _as_ours(error), work.claim)
        with self._changed:
            given_up = [work.claim]
            if error is not None:
                self._not_before = time.monotonic() + seconds
                given_up += [other.claim for other in self._works]
                self._works = []
            self._release(*given_up)
            self._changed.notify_all()

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        # It ends with the process where a server does not answer.
        self._thread.join(_END_SECONDS)

    # For the thread that writes

    def record_refused(self, key: str | None) -> None:
        """Record that a record of a user was not applied: the user is to be read again."""
        with self._changed:
            for claim in self._claims:
                if key in claim.requests:
                    claim.applied[key] = None

    def record_applied(self, batch: Batch, left: LeftOut) -> None:
        """Record which records of claimed users a batch is about to apply."""
        with self._changed:
            for claim in self._claims:
                claim.record(batch, left)

    # The thread itself

    def _run(self) -> None:
        while not self._closing:
            try:
                is_at_work = self._go_on()
            except Exception as error:
                if not isinstance(error, GhsyncError):
                    log.exception("repair failed unexpectedly; retrying")
                self._wait(self._report(_READING, _as_ours(error), self._claimed))
            else:
                if not is_at_work:
                    self._wait(_POLL_SECONDS)
        self._close_source()

    def _go_on(self) -> bool:
        """Claim and read some users; return whether there may be more."""
        self._wait(self._not_before - time.monotonic())
        with self._changed:
            self._changed.wait_for(lambda: len(self._claims) < _AHEAD or self._closing)
            assignment, is_owner = self._assignment, self._is_owner
        if not is_owner or self._closing:
            self._claimed = None
            if self._shared and (requests := self._requests.open_requests(CHUNK)):
                self._requests.record_problem(requests, f"{self._shared}{WAY_OUT}{_ONE_CONSUMER}")
            return False
        self._check_ends()
        for step in READING_STEPS:
            self._commands[step](assignment)
            if self._claimed is None:
                self._close_source()
                return False
        return True

    def _check_ends(self) -> None:
        """Read once what the topic holds; drop now and then the fences that no record is from before."""
        is_due = time.monotonic() >= self._next_drop and self._requests.has_fences()
        if not is_due and (self._newest is not None or not self._requests.is_any_open()):
            return
        with self._changed:
            # From here on every record that is polled is recorded.
            known = self._newest = {} if self._newest is None else self._newest
        try:
            oldest, newest = self._ends()
        except BaseException:
            with self._changed:
                self._newest = None
            raise
        with self._changed:
            _keep_newest(known, newest)
        if is_due and oldest:
            self._next_drop = time.monotonic() + _DROP_SECONDS
            dropped = self._requests.drop_fences(
                lambda reading: all(
                    record is not None and reading.includes(record.position, record.committed_ms) is False
                    for record in oldest
                ),
                KEPT_SECONDS,
            )
            log.info("fences dropped", readings=dropped)

    def _claim(self, assignment: int) -> None:
        del assignment
        now = time.monotonic()
        if not self._open:
            with self._changed:
                leave_out = [key for claim in self._claims for key in claim.requests]
            leave_out += [key for key, (until, _) in self._locked.items() if until > now]
            # Finding open requests costs the store more than returning many of them.
            self._open = self._requests.open_requests(_CHUNKS * CHUNK, leave_out=leave_out)
        keys = list(islice(self._open, self._chunk))
        # A token that is old by now gets no fence: its user is claimed again.
        self._claimed = Claim({key: self._open.pop(key) for key in keys}) if keys else None

    def _watch(self, assignment: int) -> None:
        claim = self._claimed
        assert claim is not None  # noqa: S101
        with self._changed:
            # At once: a record was polled before, or it is recorded.
            if assignment == self._assignment and self._newest is not None:
                claim.polled = tuple(self._newest.values())
                self._claims.append(claim)
            else:
                self._claimed = None

    def _read_source(self, assignment: int) -> None:
        claim = self._claimed
        assert claim is not None  # noqa: S101
        self._keep_to_rate(len(claim.requests))
        try:
            works = list(self._read(claim))
            for work in works:
                self._refuse_stale(work)
        except BaseException:
            self._release(claim)
            raise
        self._clear(_READING)
        with self._changed:
            if assignment == self._assignment:
                at = self._claims.index(claim)
                # What the stream applied meanwhile is recorded on the whole claim.
                for work in works:
                    applied = claim.applied.keys() & work.claim.requests.keys()
                    work.claim.applied |= {key: claim.applied[key] for key in applied}
                self._claims[at : at + 1] = [work.claim for work in works]
                self._works += works
        read = {key for work in works for key in work.claim.requests}
        self._locked = {key: entry for key, entry in self._locked.items() if key not in read}
        self._leave_alone(claim.requests.keys() - read)

    def _read(self, claim: Claim) -> Iterable[RepairWork]:
        """Read the users of a claim; those that others have locked are left out, by halves."""
        if self._source is None:
            self._source = self._open_source()
        parts = [sorted(claim.requests)]
        while parts and not self._closing:
            keys = parts.pop()
            found = self._source.read_locked(keys)
            if found is not None:
                position = binlog_position(found.server_id, found.file, found.pos)
                reading = Reading(uuid.uuid4().hex, position, found.gtids, found.read_ms)
                of_part = Claim({key: claim.requests[key] for key in keys}, claim.polled)
                yield RepairWork(of_part, reading, found.rows)
            elif len(keys) > 1:
                middle = len(keys) // 2
                parts += [keys[middle:], keys[:middle]]

    def _refuse_stale(self, work: RepairWork) -> None:
        """Refuse a reading of a server that lags behind the stream, or that the connector does not follow."""
        if not is_current(work.reading, work.claim.polled):
            with self._changed:
                # Queried again: the server may have started a new binlog.
                self._newest = None
            raise UnavailableError(
                f"MySQL's binlog ends at {work.reading.position.origin}, and that does not include the newest record "
                "of the topic: MYSQL_URL names a server that is behind, or another one.",
                way_out="Let MYSQL_URL name the server that the connector follows; a replica needs time, and GTIDs.",
            )

    def _leave_alone(self, locked: Collection[str]) -> None:
        """Leave users alone for a while that others have locked, longer each time."""
        now = time.monotonic()
        for key in locked:
            _, since = self._locked.get(key, (now, now))
            self._locked[key] = (now + min(max(now - since, _LOCKED_SECONDS), _LONGEST_LOCKED_SECONDS), since)
        if old := [key for key in locked if now - self._locked[key][1] > _LOCK_REPORTED_SECONDS]:
            self._requests.record_problem(old, "Another transaction in MySQL has the row locked, or alters the table.")

    def _release(self, *claims: Claim) -> None:
        with self._changed:
            self._claims = [claim for claim in self._claims if claim not in claims]

    def _keep_to_rate(self, users: int) -> None:
        now = time.monotonic()
        self._wait(self._next_at - now)
        self._next_at = max(self._next_at, now) + users / self._users_a_second

    def _wait(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closing, timeout=max(seconds, 0))

    def _report(self, part: str, error: GhsyncError, claim: Claim | None) -> float:
        """Report a problem: once in the log, and with the requests that wait. Return how many seconds to wait."""
        seconds = next(self._delays[part]) if isinstance(error, TransientError) else _PERMANENT_SECONDS
        if self._closing:
            return 0
        if error.message != self._problems.get(part):
            self._problems[part] = error.message
            log.warning("repairs wait; retrying", at=part, reason=error.message, way_out=error.way_out)
        if claim is not None:
            try:
                self._requests.record_problem(claim.requests, str(error))
            except GhsyncError:
                log.debug("problem not recorded")
        return seconds

    def _clear(self, part: str) -> None:
        if self._problems.pop(part, None) is not None:
            self._delays[part] = waits()
            log.info("repairs resumed", at=part)

    def _close_source(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            source.close()
