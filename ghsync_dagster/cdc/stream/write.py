"""Write: one batch at a time reaches the store, and its dead letters their topic; users are repaired in between.

Belongs here: the thread that writes while the next batch is taken, how long it may write for its partitions, and what
becomes of faults. Not here: which records make a batch, and committing offsets, which the consuming thread does.

**Who may write.** A consumer that was held up for longer than the session time-out may have lost its partitions without
knowing it. So before each command to the store the group must have confirmed this consumer, by accepting a commit,
less than a session time-out ago; the command is given no more time than is left of it. A lost partition stops the batch
before its next command.

Still a command may come late: a process can be frozen between this look and the sending, or a server between taking and
doing it. It would write a state that a key had over a newer one. So who gives a batch up and is in doubt of a command
leaves a request in the database to rewind its partitions to an offset, and whoever has them carries it out within a
second or so. A user that was repaired stays as it is then, so it is asked for again too. What remains: a process that
is killed after it sent a command late and before it left the request; a server that does a command after it has refused
or forgotten the connection that it came by; and a command that the network brings to the server only after its time was
over and the batch was written by another one.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Final

from ghsync_dagster import clock
from ghsync_dagster.cdc.dead_letters.record import dead_letter
from ghsync_dagster.cdc.stream.apply import apply
from ghsync_dagster.cdc.stream.batch import Batch
from ghsync_dagster.cdc.stream.listener import (
    APPLIED,
    COALESCED,
    DEAD_LETTER,
    KAFKA,
    LEFT_OUT,
    MONGO,
    SKIPPED,
    AppliedBatch,
)
from ghsync_dagster.cdc.stream.repair import carry_out, left_out
from ghsync_dagster.domain.change import Change, Op, RecordKind
from ghsync_dagster.domain.coalesce import Segment
from ghsync_dagster.domain.errors import GhsyncError, TransientError, UnavailableError
from ghsync_dagster.domain.user import broken_rule_names
from ghsync_dagster.logging import get_logger
from ghsync_dagster.retry import retrying, waits
from ghsync_dagster.stopping import leave_behind
from ghsync_dagster.stores.mongo.guard import WriterGuard

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ghsync_dagster.cdc.stream.batch import Part
    from ghsync_dagster.cdc.stream.letters import DeadLetters
    from ghsync_dagster.cdc.stream.listener import ChangeListener
    from ghsync_dagster.cdc.stream.repair import RepairWork, SourceReader
    from ghsync_dagster.domain.repair import Fence
    from ghsync_dagster.domain.user import RuleTest
    from ghsync_dagster.stores.mongo.books import Rewind
    from ghsync_dagster.stores.mongo.users import UserStore

_UNDECODABLE: Final = "undecodable"
"""What stands for ``Change.kind`` in the counts of records that can't be decoded."""
_REWIND_SECONDS: Final = 1.0
"""How often to look for rewind requests."""
_LAST_ATTEMPTS: Final = 7
"""Tries to leave rewind requests at the end, which take up to a minute."""
_END_SECONDS: Final = 120.0
"""How long the thread may take to end besides the time of a command at work: for letters and for rewind requests."""
_LEAST_SECONDS: Final = 1.0
"""The least time that a command is given."""
_TELLING: Final = 200
"""How many operations tell how many the store takes a second."""
_FIRST_RATE: Final = 2_000.0
"""Operations a second that are assumed of a store before the first batch: a slow disk's."""

log = get_logger("cdc")


class _StoppedError(Exception):
    """The batch must not go on."""


class LastingFault:
    """Logs a fault that lasts: at once, again after growing times, and its end.

    Args:
        what: What fails, such as ``batch write``.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._since: float | None = None
        self._said = 0.0

    def failed(self, error: GhsyncError) -> None:
        """Log the fault, unless that was done recently."""
        now = time.monotonic()
        if self._since is None:
            self._since, self._said = now, float("-inf")
        if now - self._said >= min(5.0 + (now - self._since) / 2, 300.0):
            self._said = now
            log.warning(f"{self._what} failed; retrying", seconds=round(now - self._since, 1), reason=error.message)

    def recovered(self) -> None:
        """Log that the fault is over, if there was one."""
        if self._since is not None:
            log.info(f"{self._what} recovered", seconds=round(time.monotonic() - self._since, 1))
            self._since = None


class GroupFence:
    """Until when the group is sure to take this consumer for the owner of its partitions.

    Args:
        session_seconds: How long the group waits for a silent consumer.
    """

    def __init__(self, session_seconds: float) -> None:
        self.session_seconds = session_seconds
        self._until = float("-inf")

    def renewed(self, asked: float) -> None:
        """Renew the fence: the group answered to what it was asked at this time of ``clock.now``."""
        self._until = asked + self.session_seconds

    @property
    def remaining(self) -> float:
        """Seconds that remain of the last renewal."""
        return self._until - clock.now()

    @property
    def is_recent(self) -> bool:
        """Whether most of the time remains."""
        return self.remaining > self.session_seconds * 2 / 3


class Writer(WriterGuard):
    """A thread that writes one batch at a time, and the guard of what it writes.

    Args:
        store: Where users are stored.
        letters: Where refused records go.
        listener: Hears of what goes wrong.
        fence: Says how long the thread may write.
        rules: Rules whose breaking is counted.
        name: Names the group and the topic in rewind requests.
        reader: Reads users that are to be repaired.
    """

    def __init__(
        self,
        store: UserStore,
        letters: DeadLetters,
        listener: ChangeListener,
        fence: GroupFence,
        rules: Sequence[RuleTest] = (),
        *,
        name: str = "",
        reader: SourceReader | None = None,
    ) -> None:
        from ghsync_dagster.stores.mongo.books import GroupBook
        from ghsync_dagster.stores.mongo.repairs import RepairWriter
        from ghsync_dagster.stores.mongo.writer import UserWriter

        self.rate = _FIRST_RATE
        """Operations that the store takes a second."""
        self.trouble: TransientError | None = None
        """Why the batch at work is not done yet, if something is in its way."""
        self.failure: BaseException | None = None
        """What ended the work permanently."""
        self._users = UserWriter(store, self)
        self._repairs = RepairWriter(self._users)
        self._book = GroupBook(store)
        self._letters = letters
        self._listener = listener
        self._fence = fence
        self._rules = rules
        self._reader = reader
        self._task: Batch | RepairWork | None = None
        self._written: Written | None = None
        self._asked = MONGO
        self._name = name
        self._partitions: list[int] = []
        self._to_rewind: dict[int, int] = {}
        self._to_repair: set[str] = set()
        """Users that are to be asked for again, since a command that wrote them may come late."""
        self._fences: dict[str, Fence] | None = None
        """The fence of each user that was repaired; None until they are read."""
        self._assignments = 0
        self._pending: dict[int, Rewind] = {}
        self._rewound: dict[int, Rewind] = {}
        self._next_look = 0.0
        self._closing = False
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self._said = LastingFault("batch write")
        self._thread = threading.Thread(target=self._run, name="cdc-write", daemon=True)
        self._thread.start()

    # For the thread that takes records

    @property
    def at_work(self) -> bool:
        """Whether a batch is being written, or users are being repaired."""
        return self._task is not None

    def submit(self, work: Batch | RepairWork) -> None:
        """Begin with a batch, or with users to repair, where nothing is at work."""
        with self._changed:
            if self._task is not None:
                raise AssertionError("one batch at a time")
            self._stopped.clear()
            self._task = work
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Wait until nothing is at work, at most so long; return whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: self._task is None, timeout=max(seconds, 0))

    def forget_fences(self) -> None:
        """Have the fences read again: another consumer may have repaired users of partitions that came."""
        with self._changed:
            self._fences, self._assignments = None, self._assignments + 1

    @property
    def has_written(self) -> bool:
        """Whether ``take_written`` has a batch to return."""
        return self._written is not None

    def take_written(self) -> Written | None:
        """Return the batch that was written since this was last asked, None where it is not yet or was stopped."""
        with self._changed:
            written, self._written = self._written, None
            return written

    def pending_rewinds(self, partitions: Iterable[int]) -> dict[int, Rewind]:
        """Say which partitions this consumer has, and return the rewind requests for them."""
        with self._changed:
            self._partitions = sorted(partitions)
            pending, self._pending = self._pending, {}
            return {partition: rewind for partition, rewind in pending.items() if partition in self._partitions}

    def rewound(self, partition: int, rewind: Rewind) -> None:
        """Have a rewind request cleared that was carried out."""
        with self._changed:
            self._rewound[partition] = rewind

    def keep_truncate(self, partition: int, offset: int, stops: Mapping[int, int]) -> None:
        """Keep the place of a truncate that is about to be applied, and where other partitions are from behind it.

        Raises:
            UnavailableError: The store is away.
        """
        from ghsync_dagster.stores.mongo.books import Truncated

        self._book.keep_truncate(self._name, Truncated(partition, offset, dict(stops)))

    def request_truncate_after(self, partition: int, offset: int) -> None:
        """Have the last truncate applied again where it came after what a partition is to apply again.

        Raises:
            UnavailableError: The store is away.
        """
        last = self._book.last_truncate(self._name)
        if last is not None and last.partition != partition and offset < last.stops.get(partition, 0):
            self._book.request_rewind({self._at(last.partition): last.offset})

    def is_to_rewind(self, places: Mapping[int, int]) -> bool:
        """Whether partitions, each applied up to a place, are to be applied again from before it.

        Raises:
            UnavailableError: The store is away.
        """
        found = self._book.pending_rewinds([self._at(partition) for partition in places])
        left = {partition: found[name].offset for partition in places if (name := self._at(partition)) in found}
        with self._changed:
            left = {p: min(left.get(p, at), at) for p, at in {**left, **self._to_rewind}.items()}
        return any(offset < places.get(partition, 0) for partition, offset in left.items())

    def give_up(self, written: Written) -> None:
        """Forget a batch that is written and can't be committed."""
        self._given_up(written.batch, in_doubt=written.in_doubt)

    def stop_batch(self) -> None:
        """Have the batch at work end before its next command."""
        self._stopped.set()

    def close(self) -> None:
        """End the thread before the next command of the batch at work, with every rewind requested, or ``failure`` set.

        A thread that does not end in time is left behind, see ``stopping.leave_behind``.
        """
        with self._changed:
            self._closing = True
            self._stopped.set()
            self._changed.notify_all()
        self._thread.join(self._fence.session_seconds + _END_SECONDS)
        if not self._thread.is_alive():
            self._letters.close()
            return
        leave_behind("the thread that writes does not end: the database or Kafka does not answer")
        with self._changed:
            is_unfinished = self._task is not None or self._to_rewind or self._to_repair
        if is_unfinished:
            self.failure = self.failure or UnavailableError(
                f"{self._name}: a batch or repair at work did not end in time; its last command may come late.",
                way_out="Check that MongoDB and Kafka answer; see A command may have come late in "
                "docs/operate/runbook.md.",
            )

    # The thread itself

    def _run(self) -> None:
        self._letters.begin()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._task is not None or self._closing, timeout=_REWIND_SECONDS)
                work, closing = self._task, self._closing
            written: Written | None = None
            try:
                if closing or time.monotonic() >= self._next_look:
                    self._look_at_rewinds()
                if isinstance(work, Batch):
                    written = self._work(work)
                elif work is not None:
                    self._repair(work)
                elif closing:
                    retrying("Requesting rewinds", self._request_rewinds, attempts=_LAST_ATTEMPTS)
            except BaseException as error:  # noqa: BLE001  the thread that takes records raises it
                if not isinstance(error, _StoppedError):
                    self.failure = self.failure or error
                if isinstance(work, Batch):
                    self._given_up(work, in_doubt=self._users.commands.in_doubt)
            if work is None and closing:
                return
            if work is not None:
                with self._changed:
                    self._task, self._written = None, written
                    self.trouble = None
                    self._changed.notify_all()

    def _repair(self, work: RepairWork) -> None:
        """Carry out what was read of the source. Where that cannot be done, its requests stay open."""
        assert self._reader is not None  # noqa: S101  it has read the work
        self._users.commands.in_doubt = False
        failure: Exception | None = None
        started = time.monotonic()
        try:
            outcomes = carry_out(self._repairs, work, self._known_fences(), self._letters.resolve_repaired)
        except _StoppedError:
            raise
        except Exception as error:
            failure = error
            self._listener.retried(type(error).__name__)
            if isinstance(error, TransientError):
                self._listener.connection(MONGO, up=False)
            elif not isinstance(error, GhsyncError):
                log.exception("repair failed unexpectedly; retrying")
        else:
            self._reader.wrote(work, time.monotonic() - started)
            for outcome, count in outcomes.items():
                self._listener.repaired(outcome.value, count)
        finally:
            if self._users.commands.in_doubt:
                self._to_repair |= work.claim.requests.keys()
                self._request_rewinds_soon({})
            self._reader.finished(work, failure)

    def _known_fences(self) -> dict[str, Fence]:
        while True:
            with self._changed:
                fences, epoch = self._fences, self._assignments
            if fences is not None:
                return fences
            found = self._repairs.fences()
            with self._changed:
                # Partitions that came meanwhile may bring users that another consumer has repaired since.
                if epoch == self._assignments:
                    self._fences = found

    def _given_up(self, batch: Batch, *, in_doubt: bool) -> None:
        """Have what was not committed applied again, where a command of it may come late."""
        begins = batch.begins
        log.info("batch given up", begins=begins, in_doubt=in_doubt)
        if in_doubt:
            with self._changed:
                self._to_rewind = {p: min(begins.get(p, at), at) for p, at in {**begins, **self._to_rewind}.items()}
            self._to_repair |= {key for key in batch.keys if key is not None}
            self._request_rewinds_soon(begins)

    def _request_rewinds_soon(self, begins: Mapping[int, int]) -> None:
        """Request rewinds before the partitions are another's; where that fails, it is tried again."""
        try:
            self._request_rewinds()
        except GhsyncError as error:
            log.warning("rewind not requested yet; retrying", offsets=dict(begins), reason=error.message)

    def _request_rewinds(self) -> None:
        """Make the rewind requests that are to be made.

        Raises:
            UnavailableError: The store is away.
            RefusedError: The store refuses.
        """
        with self._changed:
            asked = dict(self._to_rewind)
        if asked:
            self._request_rewind(asked)
        if self._to_repair:
            # Users that were never repaired are put right by the records that come again.
            self._repairs.request_fenced(self._to_repair)
            self._to_repair = set()

    def _request_rewind(self, asked: Mapping[int, int]) -> None:
        """Request that each partition is applied again from an offset on."""
        try:
            self._book.request_rewind({self._at(partition): offset for partition, offset in asked.items()})
        except GhsyncError as error:
            places = ", ".join(f"partition {partition} from offset {offset}" for partition, offset in asked.items())
            raise type(error)(
                f"{self._name}: {places} is to be applied again, since a command to the store may have come late, and "
                f"the rewind can't be requested: {error.message}",
                way_out="Set the group back to them where it is beyond, before another consumer runs; see "
                "docs/operate/runbook.md.",
            ) from error
        log.warning("rewind requested: a command may have come late", offsets=dict(asked))
        with self._changed:
            self._to_rewind = {p: offset for p, offset in self._to_rewind.items() if asked.get(p) != offset}

    def _look_at_rewinds(self) -> None:
        """Request rewinds, clear those that were carried out, and look for new ones."""
        self._next_look = time.monotonic() + _REWIND_SECONDS
        with self._changed:
            done, self._rewound = self._rewound, {}
            partitions = self._partitions
        try:
            self._request_rewinds()
            for partition, rewind in done.items():
                self._book.clear_rewind(self._at(partition), rewind)
            if partitions and not self._closing:
                pending = self._book.pending_rewinds([self._at(partition) for partition in partitions])
                found = {p: pending[self._at(p)] for p in partitions if self._at(p) in pending}
                with self._changed:
                    self._pending = {p: rewind for p, rewind in found.items() if self._rewound.get(p) != rewind}
        except TransientError:
            with self._changed:
                self._rewound = done | self._rewound

    def _at(self, partition: int) -> str:
        return f"{self._name}/{partition}"

    def _work(self, batch: Batch) -> Written:
        """Write a batch, however long the servers are away."""
        self._users.commands.in_doubt = False
        written: Written | None = None
        for seconds in waits():
            try:
                if written is None:
                    self._asked = MONGO
                    written = self._apply(batch)
                self._asked = KAFKA
                self._write_letters(written)
            except TransientError as error:
                self.trouble = error
                self._listener.retried(type(error).__name__)
                self._listener.connection(self._asked, up=False)
                self._said.failed(error)
                if self._stopped.wait(seconds):
                    raise _StoppedError from None
            else:
                # One whose partitions were given up meanwhile must not be committed any more.
                self._go_on()
                self._said.recovered()
                written.in_doubt = self._users.commands.in_doubt
                return written
        raise AssertionError("waits have no end")

    def _write_letters(self, written: Written) -> None:
        if written.letters:
            self._go_on()
            written.letters = self._letters.write(written.letters)
            log.warning("records dead-lettered", records=len(written.letters), kinds=dict(written.kinds))
        self._asked = MONGO
        self._letters.settle(written.batch, written.letters)

    def _apply(self, batch: Batch) -> Written:
        """Apply a batch from its beginning: a try that failed may have got anywhere."""
        started = time.monotonic()
        written = Written(batch)
        operations = 0
        left = left_out(batch, self._known_fences())
        batch.left_out, batch.as_deletes = left.records, left.deletes
        written.left_out.update(batch.kinds(left.records))
        if self._reader is not None:
            self._reader.note(batch, left)
            # So far these are the records that cannot be decoded.
            for letter in written.letters:
                self._reader.doubt(self._letters.user_of(letter))
        for part in batch.parts():
            applied = apply(self._users, part.segment, left.keep.get(part.start, frozenset()))
            operations += applied.upserts + applied.deletes + applied.truncated
            written.applied.update([change.kind for change in part.segment.changes.values()])
            if part.segment.truncate:
                written.applied[RecordKind.TRUNCATE] += 1
            for key in applied.refused:
                self._redo(written, part, key)
            if self._rules:
                self._count_broken_rules(written, part)
        if left.request_again:
            self._repairs.request_again(left.request_again)
        written.seconds = time.monotonic() - started
        written.acknowledged_ms = time.time_ns() // 1_000_000
        if operations:
            self._listener.connection(MONGO, up=True)
        # Of few operations the time goes into round trips, which says nothing of many.
        if operations >= _TELLING:
            self.rate += (operations / written.seconds - self.rate) / 2
        return written

    def _count_broken_rules(self, written: Written, part: Part) -> None:
        for change in part.segment.changes.values():
            if change.user is not None:
                written.broken_rules.update(broken_rule_names(change.user, self._rules))

    def _redo(self, written: Written, part: Part, key: str) -> None:
        """Apply the records of one key one by one, since its last state was refused: the others may be good."""
        written.applied[part.segment.changes[key].kind] -= 1
        for message, change in written.batch.history(part, key):
            refused = apply(self._users, Segment(truncate=False, changes={key: change})).refused
            if key in refused:
                if self._reader is not None:
                    self._reader.doubt(key)
                written.letters.append(dead_letter(message, *refused[key]))
                written.refused[change.kind] += 1
            else:
                written.applied[change.kind] += 1

    def allow(self) -> float:
        """Return how long a command to the store may take; see the module's beginning."""
        self._go_on()
        left = self._fence.remaining
        if left < _LEAST_SECONDS:
            self._asked = KAFKA
            raise UnavailableError(
                "Writing: Kafka has not confirmed for some time that this consumer is in its group.",
                way_out="Check that the brokers are up; look for what holds this process up for seconds.",
            )
        return left

    def _go_on(self) -> None:
        if self._stopped.is_set():
            raise _StoppedError


class Written:
    """A batch that is written, and what became of its records.

    Attributes:
        batch: The batch.
        letters: The dead letters among its records.
        applied: Records that were applied, by their kind.
        refused: Records that the database refused, likewise.
        left_out: Records whose users were repaired from a later place, likewise.
        broken_rules: Applied records that break a rule, by rule.
        seconds: How long the store took.
        acknowledged_ms: When it had all, in milliseconds since 1970 UTC.
        in_doubt: Whether a command may still reach the store, or reached it after its time.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.letters = [dead_letter(message, error.kind, error.message) for message, error in batch.undecodable()]
        self.applied: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.broken_rules: Counter[str] = Counter()
        self.seconds = 0.0
        self.acknowledged_ms = 0
        self.in_doubt = False

    @property
    def kinds(self) -> Counter[str]:
        """How many dead letters there are of each kind."""
        return Counter(letter.kind for letter in self.letters)

    def report(self) -> AppliedBatch:
        """Return what a listener is told once the offsets are committed."""
        from ghsync_dagster.stores.kafka.topics import timestamp_ms

        good = [change for change in self.batch.changes if type(change) is Change]
        return AppliedBatch(
            counts=self._counts(good),
            acknowledged_ms=self.acknowledged_ms,
            committed_ms=[change.committed_ms for change in good],
            appended_ms=[timestamp_ms(message) for message in self.batch.messages],
            write_seconds=self.seconds,
            broken_rules=self.broken_rules,
            unknown_columns=Counter(
                [name for change in good if change.unknown_columns for name in change.unknown_columns]
            ),
        )

    def _counts(self, good: Sequence[Change]) -> dict[tuple[str, str], int]:
        skipped = Counter([change.kind for change in good if change.op is Op.SKIP])
        counts: dict[tuple[str, str], int] = {(what, SKIPPED): count for what, count in skipped.items()}
        for what, count in self.batch.seen.items():
            applied, refused, left_out = self.applied[what], self.refused[what], self.left_out[what]
            rest = count - applied - refused - left_out - skipped[what]
            counts |= {(what, APPLIED): applied, (what, DEAD_LETTER): refused, (what, LEFT_OUT): left_out}
            counts[what, COALESCED] = rest
        counts[_UNDECODABLE, DEAD_LETTER] = len(self.batch) - len(good)
        return {what: count for what, count in counts.items() if count}
