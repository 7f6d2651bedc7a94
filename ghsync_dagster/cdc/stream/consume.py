"""Consume: the loop from the topic to acknowledged writes. Take, decode, coalesce, apply, acknowledge.

Belongs here: what makes a batch, when it is handed to the writer and committed, and what happens when partitions come
and go. Not here: decoding (``domain.envelope``), applying (``cdc.stream.write``), the client
(``stores.kafka.consumer``).

While one batch is written, the next is taken and decoded. So a batch is small when there is little, though a small one
comes no sooner than ``_PACE_SECONDS`` after the one before; and when the consumer is behind it grows up to what the
store takes in about a second: more of its changes are then of the same keys, and need no write of their own.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ghsync_dagster import clock
from ghsync_dagster.cdc.stream.batch import Batch, RecordDecoder, newest_positions
from ghsync_dagster.cdc.stream.interpreter import quick_turns, short_collections
from ghsync_dagster.cdc.stream.letters import DeadLetters
from ghsync_dagster.cdc.stream.listener import KAFKA, MONGO, AppliedBatch, ChangeListener, Listeners, SilentListener
from ghsync_dagster.cdc.stream.order import OrderedTruncates, Truncate, nexts, topic_ends
from ghsync_dagster.cdc.stream.repair import SourceReader
from ghsync_dagster.cdc.stream.topic_guard import TopicGuard
from ghsync_dagster.cdc.stream.write import GroupFence, LastingFault, Writer, Written
from ghsync_dagster.domain.change import Change
from ghsync_dagster.domain.envelope import ChangeDecoder
from ghsync_dagster.domain.errors import GhsyncError, TransientError
from ghsync_dagster.domain.user import rule_tests
from ghsync_dagster.logging import get_logger
from ghsync_dagster.retry import retrying, waits

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Mapping, Sequence

    from ghsync_dagster.domain.user import Rule
    from ghsync_dagster.stores.kafka.client import KafkaSettings
    from ghsync_dagster.stores.mongo.users import UserStore
    from ghsync_dagster.stores.mysql import MySqlStore

_TAKE: Final = 5_000
"""Records that are taken at once."""
_IDLE_SECONDS: Final = 0.1
"""How long to wait for a first record; a signal waits for it too."""
_TURN_SECONDS: Final = 0.005
"""How often to take more while a batch is written."""
_WORK_SECONDS: Final = 0.02
"""How long to wait for a first record while a batch is written."""
_PACE_SECONDS: Final = 0.05
"""How soon after a batch the next one may follow: a batch of few changes costs nearly what one of fifty does."""
_WRITE_SECONDS: Final = 3.0
"""How long the write of one batch should take at most."""
_LEAST_KEYS: Final = 500
_MOST_KEYS: Final = 50_000
_MOST_RECORDS: Final = 100_000
_MOST_BYTES: Final = 64_000_000
_PATIENCE_SECONDS: Final = 5.0
"""How long a full batch waits for the writer before the partitions are paused."""
_GIVE_UP_SECONDS: Final = 5.0
"""How long a batch at work may still take when its partitions are to be given up."""
_LAG_SECONDS: Final = 1.0
_TOPIC_SECONDS: Final = 10.0
"""How often to see that the topic is still the same."""
_HELD_SECONDS: Final = 0.5
"""How often to see whether partitions that were added may be applied."""
_END_LOOK_SECONDS: Final = 0.5
_ATTEMPTS: Final = 4
"""Tries to learn where the topic ends, before a run that is to end there fails."""

log = get_logger("cdc")


@dataclass(frozen=True, slots=True)
class ConsumerReport:
    """What one run of the consumer did.

    Attributes:
        seconds: How long it ran.
        batches: Batches acknowledged.
        records: Records by what became of them, see ``cdc.stream.listener.OUTCOMES``.
        dead_letters: Records that went to the dead letters, by kind.
        retries: Steps tried again, by the error's class.
        reached_end: Whether it ended because the group had applied all that was to be applied.
    """

    reached_end: bool
    seconds: float
    batches: int
    records: dict[str, int]
    dead_letters: dict[str, int]
    retries: dict[str, int]


class ChangeConsumer:
    """A consumer of the topic of changes.

    Args:
        kafka: Topic, group, and the way to the brokers.
        open_store: Opens the users' collection.
        listener: Hears of all that happens.
        rules: Rules whose breaking is counted.
        truncate_wait_seconds: With several partitions, how long a truncate waits for the others to pass it.
        open_source: Opens MySQL for repairs; without it they wait for another consumer.
        repair_users_a_second: How many users are repaired a second at most.
    """

    def __init__(
        self,
        kafka: KafkaSettings,
        open_store: Callable[[], UserStore],
        *,
        listener: ChangeListener | None = None,
        rules: Sequence[Rule] = (),
        truncate_wait_seconds: float = 30.0,
        open_source: Callable[[], MySqlStore] | None = None,
        repair_users_a_second: float = float("inf"),
    ) -> None:
        self.kafka = kafka
        self.open_store = open_store
        self.listener = listener or SilentListener()
        self.rules = rule_tests(rules)
        self.truncate_wait_seconds = truncate_wait_seconds
        self.open_source = open_source
        self.repair_users_a_second = repair_users_a_second

    def run(self, stop: threading.Event, *, until_end: bool = False, seconds: float | None = None) -> ConsumerReport:
        """Consume until told to stop; then finish the batch at work, commit, and leave the group.

        Args:
            stop: Ends it when set.
            until_end: Whether to end once the group has applied all that the topic held at the start.
            seconds: How long to go on at most.

        Raises:
            PermanentError: Credentials, rights or settings are wrong, changes are gone from the topic, or a truncate
                can't be put in order. What was not applied is not committed.
            UnavailableError: ``until_end``: nobody tells where the topic ends, or which topic it is. Or a rewind
                can't be requested, see ``cdc.stream.write``.
        """
        tally = _Tally()
        listener = Listeners(tally, self.listener)
        until = _Until(stop, seconds)
        reached_end = False
        try:
            store = _ready_store(self.open_store, until, listener)
            if store is not None:
                with store, quick_turns(), short_collections():
                    reached_end = _Run(self, store, listener, until).consume(until_end=until_end)
        except Exception as error:
            listener.failed(type(error).__name__)
            raise
        return ConsumerReport(
            reached_end=reached_end,
            seconds=round(until.seconds, 3),
            batches=tally.batches,
            records=dict(tally.records),
            dead_letters=dict(tally.dead_letters),
            retries=dict(tally.retries),
        )


class _Tally(SilentListener):
    """Counts for the report."""

    def __init__(self) -> None:
        self.batches = 0
        self.records: Counter[str] = Counter()
        self.dead_letters: Counter[str] = Counter()
        self.retries: Counter[str] = Counter()

    def batch_applied(self, batch: AppliedBatch) -> None:
        self.batches += 1
        for (_, outcome), count in batch.counts.items():
            self.records[outcome] += count

    def retried(self, kind: str) -> None:
        self.retries[kind] += 1

    def dead_letter(self, kind: str, count: int = 1) -> None:
        self.dead_letters[kind] += count


class _Until:
    """When to end."""

    def __init__(self, stop: threading.Event, seconds: float | None) -> None:
        self._stop = stop
        self._started = time.monotonic()
        self._limit = float("inf") if seconds is None else seconds

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def over(self) -> bool:
        return self._stop.is_set() or self.seconds >= self._limit

    def wait(self, seconds: float) -> bool:
        """Wait so long or until the end; return whether it is the end."""
        self._stop.wait(min(seconds, max(self._limit - self.seconds, 0)))
        return self.over


def _ready_store(open_store: Callable[[], UserStore], until: _Until, listener: ChangeListener) -> UserStore | None:
    """Open and prepare the store, however long it is away; None where the end comes first."""
    trouble = LastingFault("opening the store")
    for seconds in waits():
        if until.over:
            return None
        try:
            store = open_store()
            try:
                store.ensure_collection()
            except BaseException:
                store.close()
                raise
        except TransientError as error:
            trouble.failed(error)
            listener.retried(type(error).__name__)
            listener.connection(MONGO, up=False)
            until.wait(seconds)
        else:
            trouble.recovered()
            return store
    raise AssertionError("waits have no end")


class _InterruptedError(Exception):
    """Partitions came or went, or the end has come, in the middle of what needs all of them."""


class _Run:
    """The loop, from joining the group to leaving it."""

    def __init__(self, owner: ChangeConsumer, store: UserStore, listener: ChangeListener, until: _Until) -> None:
        from ghsync_dagster.stores.kafka.consumer import TopicConsumer
        from ghsync_dagster.stores.mongo.repairs import RepairRequests

        self._until = until
        self._topic = TopicGuard(owner.kafka, store)
        self._listener = listener
        self._truncate_wait = owner.truncate_wait_seconds
        self._decoder = RecordDecoder(ChangeDecoder(), owner.kafka)
        self._pending = Batch()
        self._batch = Batch()
        """The batch that is at work, or was last; none while users are repaired."""
        self._begins: dict[int, int] = {}
        """Where what is at work begins in each partition: to commit that changes nothing."""
        self._written: Written | None = None
        """A batch that is written and not yet committed."""
        self._more = False
        """Whether more records wait in this process to be taken."""
        self._to_rewind = False
        """Whether what was taken is forgotten, so that the committed places are to be gone to before anything else."""
        self._assignment = 0
        """How often partitions came or went."""
        self._committed: dict[int, int] = {}
        """Where the group is in the partitions that this consumer has, as far as it was asked or told."""
        self._next_lag = self._next_look = self._next_topic = self._next_batch = 0.0
        self._to_see = False
        """Whether anything was handed over since the topic was seen to be the same."""
        self._to_reach = False
        """Whether this consumer has only just joined the group, and waits for partitions."""
        self._to_own = False
        """Whether partitions came since it was last seen whether this consumer has all of them."""
        self._trouble = LastingFault("consuming")
        self._unacknowledged = LastingFault("acknowledging")
        self._consumer = TopicConsumer(owner.kafka, assigned=self._assigned, revoked=self._revoked, lost=self._lost)
        self._fence = GroupFence(owner.kafka.session_timeout_seconds)
        self._reader = (
            None
            if owner.open_source is None
            else SourceReader(
                RepairRequests(store),
                owner.open_source,
                owner.repair_users_a_second,
                lambda: topic_ends(owner.kafka),
            )
        )
        self._was_repair = False
        """Whether users were repaired last, so that it is a batch's turn."""
        self._letters = DeadLetters(owner.kafka, store)
        self._writer = Writer(
            store,
            self._letters,
            listener,
            self._fence,
            owner.rules,
            name=owner.kafka.group_name,
            reader=self._reader,
        )

    def consume(self, *, until_end: bool) -> bool:
        """Go round until told to stop, or until all is applied that was there at the start; return which."""
        reached = False
        try:
            ends = (
                retrying("Looking for the topic's end", self._consumer.ends, attempts=_ATTEMPTS) if until_end else None
            )
            if until_end:
                # Where nothing is left to consume, no partition would come to be looked at.
                retrying("Looking whether the topic is the same", self._see_topic, attempts=_ATTEMPTS)
            while not (reached or self._until.over):
                try:
                    self._turn()
                    self._tell()
                    # What is to be kept of the topic is kept before the end.
                    reached = ends is not None and not self._is_look_due and self._reached(ends)
                except TransientError as error:
                    self._trouble.failed(error)
                    self._listener.retried(type(error).__name__)
        finally:
            # Gives the partitions back, for which the batch at work is finished.
            try:
                self._consumer.close()
            finally:
                self._writer.close()
                self._topic.close()
                if self._reader is not None:
                    self._reader.close()
        self._raise_failure()
        return reached

    def _turn(self) -> None:
        """Acknowledge what is written, hand over what is pending if the writer is free, and take more."""
        self._raise_failure()
        held_up = not self._advance() or self._writer.trouble is not None or self._to_rewind
        full = self._is_full()
        if held_up or (full and not self._is_free_soon()):
            # Asking goes on, since who does not ask is put out of the group.
            self._consumer.pause()
            self._take(1, _IDLE_SECONDS)
        elif not full:
            self._consumer.resume()
            if len(self._pending):
                if self._writer.at_work:
                    self._writer.wait(_TURN_SECONDS)
                elif not self._is_writing and not self._is_ready():
                    self._until.wait(min(max(self._next_batch - time.monotonic(), 0), _IDLE_SECONDS))
                self._take(_TAKE, 0)
            elif self._reader is not None and self._reader.is_busy:
                self._writer.wait(_TURN_SECONDS)
                self._take(_TAKE, 0 if self._writer.at_work or self._reader.is_ready else _TURN_SECONDS)
            else:
                self._take(_TAKE, _WORK_SECONDS if self._writer.at_work else _IDLE_SECONDS)

    def _is_free_soon(self) -> bool:
        """Wait for the writer as long as patience lasts; return whether it is free. The batch at work may go on."""
        end = time.monotonic() + _PATIENCE_SECONDS
        while not self._writer.wait(_IDLE_SECONDS):
            if time.monotonic() > end:
                return False
            self._confirm()
        return True

    def _advance(self) -> bool:
        """Acknowledge and hand over; return whether that could be done as far as there was something to do."""
        try:
            self._acknowledge()
            if not self._is_writing:
                # What comes after a batch that failed must not be committed.
                self._raise_failure()
                self._go_back()
                self._rewind()
                if self._to_see:
                    self._see_topic()
                self._get_ready()
                is_ready = self._is_ready()
                if (is_ready or self._is_repair_due) and not self._to_see:
                    self._see_topic()
                    self._to_see = True
                if self._is_repair_due and not (is_ready and self._was_repair):
                    self._hand_over_repair()
                elif is_ready:
                    self._hand_over()
        except TransientError as error:
            self._unacknowledged.failed(error)
            self._listener.retried(type(error).__name__)
            return False
        self._unacknowledged.recovered()
        return True

    def _get_ready(self) -> None:
        """Once there is nothing to do but to wait for partitions, do what would hold them up when they come."""
        if self._to_own and self._reader is not None and self._consumer.partitions:
            # Nobody else may apply records of users that are repaired, and a key does not tell its partition.
            self._reader.owns(self._consumer.partitions, self._consumer.all_partitions())
            self._to_own = False
        if self._to_reach:
            self._to_reach = False
            # Whether the topic is the same is seen before the first write.
            with suppress(TransientError):
                self._topic.reach()

    def _is_ready(self) -> bool:
        """Return whether what is pending is to be written now: a larger batch means fewer writes."""
        pending = len(self._pending)
        if pending >= _TAKE or self._is_full():
            # The store is not to stand idle.
            return True
        return pending > 0 and not self._more and time.monotonic() >= self._next_batch

    def _see_topic(self) -> None:
        """See that topic and places are those that the group began with: now and then, and when partitions came."""
        if self._is_time_to_look:
            held = self._topic.held
            if self._topic.is_waiting:
                self._commit_ends_met()
            self._topic.see(
                lambda: self._consumer.committed(self._consumer.partitions or self._consumer.all_partitions())
            )
            # What was taken of partitions that are held no more is forgotten: they go on from what is committed.
            self._to_rewind = self._to_rewind or bool(held and not self._topic.held)
            self._to_see = self._topic.is_waiting
            self._next_topic = time.monotonic() + (_HELD_SECONDS if self._to_see else _TOPIC_SECONDS)

    def _commit_ends_met(self) -> None:
        """Commit where partitions end whose records are all applied: the last thing in them may be no record."""
        places, rest = self._places(), self._pending.offsets.keys() | self._topic.held
        ends = self._consumer.ends_met.items()
        if met := {at: end for at, end in ends if at not in rest and places.get(at, end) < end}:
            self._commit(met)

    def _go_back(self) -> None:
        """Rewind partitions for which another consumer, or this one before, left a request."""
        for partition, asked in self._writer.pending_rewinds(self._consumer.partitions).items():
            committed = self._consumer.committed([partition])[partition] or 0
            if asked.offset < committed:
                offset = max(asked.offset, self._consumer.offsets(partition)[0])
                log.warning("rewinding: a command may have come late", partition=partition, offset=offset)
                self._writer.request_truncate_after(partition, offset)
                # Before the commit, whose answer may be lost.
                self._to_rewind = True
                # Committed, so that whoever has the partition next goes back too.
                self._commit({partition: offset})
            self._writer.rewound(partition, asked)

    def _rewind(self) -> None:
        """Go on from what is committed, where what was taken since is forgotten."""
        if self._to_rewind:
            self._pending = Batch()
            if partitions := sorted(self._consumer.partitions):
                self._consumer.go_to(nexts(self._consumer, partitions))
            self._to_rewind = False

    def _take(self, limit: int, seconds: float) -> None:
        messages = self._consumer.take(limit, seconds)
        self._more = len(messages) >= limit > 1
        if messages and not self._to_rewind:
            changes = self._decoder.decode(messages)
            if self._reader is not None:
                self._reader.took(newest_positions(messages, changes))
            self._pending.add(messages, changes)

    def _is_full(self) -> bool:
        pending = self._pending
        most = min(max(self._writer.rate * _WRITE_SECONDS, _LEAST_KEYS), _MOST_KEYS)
        return len(pending.keys) >= most or len(pending) >= _MOST_RECORDS or pending.size >= _MOST_BYTES

    def _hand_over(self) -> None:
        if not self._topic.held.isdisjoint(self._pending.offsets):
            self._pending = self._pending.without(self._topic.held)
            self._next_topic = min(self._next_topic, time.monotonic() + _HELD_SECONDS)
        if self._to_rewind or not len(self._pending):
            return
        truncate = self._pending.first_truncate()
        if truncate is not None and len(self._consumer.all_partitions()) > 1:
            self._truncate_in_order(truncate)
        else:
            self._submit(self._pending)
            self._pending = Batch()

    @property
    def _is_repair_due(self) -> bool:
        return self._reader is not None and self._reader.is_ready

    def _hand_over_repair(self) -> None:
        """Have users repaired, one reading between two batches."""
        assert self._reader is not None  # noqa: S101
        self._was_repair = True
        self._batch = Batch()
        self._begins = self._places()
        self._confirm()
        # Last, since work that is taken has to be carried out.
        if (work := self._reader.next_work()) is not None:
            self._writer.submit(work)

    def _places(self) -> dict[int, int]:
        """Return where the group is in the partitions that this consumer has."""
        if unknown := sorted(self._consumer.partitions - self._committed.keys()):
            self._committed |= nexts(self._consumer, unknown)
        return {partition: self._committed[partition] for partition in self._consumer.partitions}

    def _submit(self, batch: Batch) -> None:
        self._was_repair = False
        self._batch, self._begins = batch, batch.begins
        self._next_batch = time.monotonic() + _PACE_SECONDS
        self._confirm()
        self._writer.submit(batch)

    def _confirm(self) -> None:
        """Have the group confirm now and then that this consumer is in it, for the batch at work to go on."""
        if not self._fence.is_recent:
            # What stands before the batch is committed already, or there is nothing before it. What went meanwhile is
            # another's to commit.
            begins = self._begins
            if offsets := {partition: begins[partition] for partition in begins.keys() & self._consumer.partitions}:
                self._commit(offsets)

    def _commit(self, offsets: Mapping[int, int]) -> None:
        asked = clock.now()
        self._consumer.commit(offsets)
        self._committed |= offsets
        if self._topic.is_to_keep(offsets):
            self._next_topic, self._to_see = 0.0, True
        self._fence.renewed(asked)

    def _acknowledge(self) -> None:
        """Commit the batch that is written, if there is one, and tell of it; else see that the writer may go on."""
        self._written = self._written or self._writer.take_written()
        if (written := self._written) is not None:
            self._commit(written.batch.offsets)
            self._written = None
            for kind, count in written.kinds.items():
                self._listener.dead_letter(kind, count)
            self._listener.connection(KAFKA, up=True)
            self._listener.batch_applied(written.report())
        elif self._writer.at_work:
            self._confirm()

    def _raise_failure(self) -> None:
        if self._writer.failure is not None:
            raise self._writer.failure

    # Partitions that come and go

    def _assigned(self, partitions: set[int]) -> None:
        self._assignment += 1
        self._next_topic, self._to_reach = 0.0, not self._consumer.partitions
        self._writer.forget_fences()
        self._to_own = True
        self._letters.reload()
        log.info("partitions assigned", partitions=sorted(partitions), all=sorted(self._consumer.partitions))
        self._listener.assigned(self._consumer.partitions)

    def _revoked(self, partitions: set[int]) -> None:
        self._give_up(partitions, _GIVE_UP_SECONDS)

    def _lost(self, partitions: set[int]) -> None:
        log.warning(
            "partitions lost: the group has not heard from this consumer for too long",
            partitions=sorted(partitions),
        )
        self._give_up(partitions, 0)

    def _give_up(self, partitions: set[int], seconds: float) -> None:
        """Finish the batch at work within some seconds, or stop it; forget what is pending of these partitions."""
        self._assignment += 1
        self._to_own = True
        if self._reader is not None:
            self._reader.owns((), ())
        is_repair = self._writer.at_work and not len(self._batch)
        if (is_repair or not partitions.isdisjoint(self._batch.offsets)) and not self._finished(seconds):
            self._pending = _joined(self._batch, self._pending)
        for partition in partitions:
            self._committed.pop(partition, None)
        self._pending = self._pending.without(partitions)
        log.info("partitions revoked", partitions=sorted(partitions))
        self._listener.assigned(self._consumer.partitions - partitions)

    def _finished(self, seconds: float) -> bool:
        """Finish and commit the batch at work, if there is one; return whether that could be done in time."""
        if not self._is_writing:
            return True
        in_time = self._writer.wait(0 if self._writer.trouble is not None else seconds)
        if not in_time:
            self._writer.stop_batch()
            if not self._writer.wait(self._consumer.kafka.session_timeout_seconds + _GIVE_UP_SECONDS):
                log.error("store does not answer; a command may still arrive")
        if in_time and seconds > 0:
            try:
                self._acknowledge()
            except GhsyncError as error:
                log.warning("commit failed after the batch was written", reason=error.message)
        finished = in_time and not self._is_writing
        if (written := self._written or self._writer.take_written()) is not None:
            self._writer.give_up(written)
        self._written = None
        return finished

    # Truncates in a topic of several partitions

    def _truncate_in_order(self, at: int) -> None:
        """Apply what is pending before a truncate, and it in the order of the binlog; then go on from there."""
        from ghsync_dagster.stores.kafka.topics import place

        message, change = self._pending.messages[at], self._pending.changes[at]
        position = change.position if isinstance(change, Change) else None
        truncate = Truncate(self._consumer.kafka.topic, *place(message), position)
        first, self._to_rewind = self._pending.cut(at), True
        assignment = self._assignment

        def breathe(seconds: float) -> None:
            self._raise_failure()
            # What comes is read again afterwards, from what is committed.
            self._consumer.take(1, seconds)
            if self._assignment != assignment or self._until.over:
                raise _InterruptedError

        def write(batch: Batch) -> None:
            if len(batch):
                self._submit(batch)
                while self._is_writing:
                    self._acknowledge()
                    self._writer.wait(_TURN_SECONDS)
                    breathe(_TURN_SECONDS)
                self._raise_failure()

        log.info("ordering a truncate", partition=truncate.partition, offset=truncate.offset)
        truncates = OrderedTruncates(self._consumer, write, breathe, self._writer.keep_truncate, self._truncate_wait)
        self._consumer.pause()
        try:
            write(first)
            truncates.apply(truncate)
        except _InterruptedError:
            log.info("truncate ordering interrupted", partition=truncate.partition)

    # The end, and the lag

    def _reached(self, ends: Mapping[int, int]) -> bool:
        """Return whether the group has applied everything up to ``ends``, whichever of its consumers did."""
        if self._is_busy or time.monotonic() < self._next_look:
            return False
        # A batch that failed is at work no more; the writer notes the failure first.
        self._raise_failure()
        self._next_look = time.monotonic() + _END_LOOK_SECONDS
        committed = self._consumer.committed(ends)
        # The last thing in a partition may be no record, such as the mark of a transaction.
        met = {
            partition: end
            for partition, end in self._consumer.ends_met.items()
            if end >= ends.get(partition, end + 1) and (committed[partition] or 0) < end
        }
        if met:
            self._commit(met)
        places = {partition: met.get(partition) or committed[partition] or 0 for partition in ends}
        if any(places[partition] < end for partition, end in ends.items()) or self._writer.is_to_rewind(places):
            return False
        # Another consumer may have carried a rewind out, and cleared it, since the places were asked for.
        now = self._consumer.committed(ends)
        is_applied = all((now[partition] or 0) >= end for partition, end in ends.items())
        # What was left out of the last records may have requested users again.
        return is_applied and not (self._reader is not None and self._reader.is_wanted())

    @property
    def _is_busy(self) -> bool:
        """Whether anything that was taken is not acknowledged yet."""
        return bool(len(self._pending)) or self._is_writing or self._to_rewind or self._topic.is_waiting

    @property
    def _is_time_to_look(self) -> bool:
        return time.monotonic() >= self._next_topic

    @property
    def _is_look_due(self) -> bool:
        """Whether the topic is to be seen now, be it only to keep that the group has a place in it."""
        return self._to_see and self._is_time_to_look

    @property
    def _is_writing(self) -> bool:
        """Whether a batch that was handed over is not acknowledged yet."""
        return self._writer.at_work or self._writer.has_written or self._written is not None

    def _tell(self) -> None:
        """Tell the lag and how Kafka is, now and then."""
        now = time.monotonic()
        if now < self._next_lag:
            return
        self._next_lag = now + _LAG_SECONDS
        self._consumer.look_again()
        if (trouble := self._consumer.trouble) is not None:
            self._trouble.failed(trouble)
        else:
            self._trouble.recovered()
        self._listener.connection(KAFKA, up=trouble is None)
        for partition in sorted(self._consumer.partitions if trouble is None else ()):
            self._tell_lag(partition)

    def _tell_lag(self, partition: int) -> None:
        from ghsync_dagster.stores.kafka.topics import timestamp_ms

        end = self._consumer.known_end(partition)
        if end is None:
            return
        first = self._pending.firsts.get(partition)
        if self._is_writing:
            first = self._batch.firsts.get(partition, first)
        if first is None:
            # What waits, if anything, has only just come.
            self._listener.lag(partition, max(end - self._places()[partition], 0), 0.0)
        else:
            appended = timestamp_ms(first)
            seconds = 0.0 if appended is None else max(time.time() - appended / 1000, 0.0)
            self._listener.lag(partition, max(end - (first.offset() or 0), 0), seconds)


def _joined(first: Batch, second: Batch) -> Batch:
    batch = Batch()
    batch.add(first.messages, first.changes)
    batch.add(second.messages, second.changes)
    return batch
