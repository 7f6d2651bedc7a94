"""Consume: the loop from the topic to acknowledged writes. Poll, decode, coalesce, apply, acknowledge.

Belongs here: when a batch is submitted to the writer, and what happens when partitions come and go. Not here: what
makes a batch (``cdc.stream.polled``), applying it (``cdc.stream.write``), committing it (``cdc.stream.in_flight``).

While one batch is written, the next is polled and decoded. So a batch is small when there is little. A small one comes
no sooner than ``in_flight._PACE_SECONDS`` after the one before. When the consumer lags, a batch grows up to what the
store takes in some seconds: more of its changes are then of the same keys, and need no write of their own.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ghsync_dagster.cdc.stream.batch import Batch
from ghsync_dagster.cdc.stream.end import EndOfTopic
from ghsync_dagster.cdc.stream.group import GroupFence, GroupOffsets
from ghsync_dagster.cdc.stream.in_flight import InFlight
from ghsync_dagster.cdc.stream.interpreter import tuned_interpreter
from ghsync_dagster.cdc.stream.lag import LagReporter
from ghsync_dagster.cdc.stream.lasting_fault import LastingFault
from ghsync_dagster.cdc.stream.letters import DeadLetters
from ghsync_dagster.cdc.stream.listener import MONGO, AppliedBatch, ChangeListener, Listeners, SilentListener
from ghsync_dagster.cdc.stream.order import topic_ends
from ghsync_dagster.cdc.stream.polled import POLL_RECORDS, PolledRecords
from ghsync_dagster.cdc.stream.source_reader import SourceReader
from ghsync_dagster.cdc.stream.topic_guard import TopicChecks, TopicGuard
from ghsync_dagster.cdc.stream.truncates import TruncateOrdering
from ghsync_dagster.cdc.stream.write import Writer
from ghsync_dagster.domain.errors import TransientError
from ghsync_dagster.domain.user import rule_tests
from ghsync_dagster.logging import get_logger
from ghsync_dagster.retry import retrying, waits

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence

    from ghsync_dagster.domain.user import Rule
    from ghsync_dagster.stores.kafka.client import KafkaSettings
    from ghsync_dagster.stores.mongo.users import UserStore
    from ghsync_dagster.stores.mysql import MySqlStore

_IDLE_SECONDS: Final = 0.1
"""How long to wait for a first record; a signal waits for it too."""
_TURN_SECONDS: Final = 0.005
"""How often to poll while a batch is written."""
_WORK_SECONDS: Final = 0.02
"""How long to wait for a first record while a batch is written."""
_FULL_SECONDS: Final = 5.0
"""How long a full batch waits for the writer before the partitions are paused."""
_ATTEMPTS: Final = 4
"""Tries to find where the topic ends, before a run that is to end there fails."""

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
            PermanentError: Credentials, rights or settings are wrong. Or changes are gone from the topic, or a truncate
                can't be put in order. What was not applied is not committed.
            UnavailableError: ``until_end``: the topic's end or id can't be read. Or a rewind can't be requested, see
                ``cdc.stream.write``.
        """
        tally = _Tally()
        listener = Listeners(tally, self.listener)
        until = _Until(stop, seconds)
        reached_end = False
        try:
            store = _ready_store(self.open_store, until, listener)
            if store is not None:
                with store, tuned_interpreter():
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
    fault = LastingFault("opening the store")
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
            fault.failed(error)
            listener.retried(type(error).__name__)
            listener.connection(MONGO, up=False)
            until.wait(seconds)
        else:
            fault.recovered()
            return store
    raise AssertionError("waits have no end")


class _Run:
    """The loop, from joining the group to leaving it."""

    def __init__(self, owner: ChangeConsumer, store: UserStore, listener: ChangeListener, until: _Until) -> None:
        from ghsync_dagster.stores.kafka.consumer import TopicConsumer
        from ghsync_dagster.stores.mongo.repairs import RepairRequests

        kafka = owner.kafka
        self._until, self._listener = until, listener
        self._to_connect = False
        """Whether this consumer has only just joined the group, and waits for partitions."""
        self._to_own = False
        """Whether partitions came since the reader was last informed of them."""
        self._fault = LastingFault("consuming")
        self._unacknowledged = LastingFault("acknowledging")
        guard = TopicGuard(kafka, store)
        self._consumer = TopicConsumer(kafka, assigned=self._assigned, revoked=self._revoked, lost=self._lost)
        self._topic = TopicChecks(guard, self._consumer)
        self._offsets = GroupOffsets(self._consumer, GroupFence(kafka.session_timeout_seconds), self._topic)
        self._reader = (
            None
            if owner.open_source is None
            else SourceReader(
                RepairRequests(store), owner.open_source, owner.repair_users_a_second, lambda: topic_ends(kafka)
            )
        )
        self._letters = DeadLetters(kafka, store)
        self._writer = Writer(
            store,
            self._letters,
            listener,
            self._offsets.fence,
            owner.rules,
            name=kafka.group_name,
            reader=self._reader,
        )
        rewinds = self._writer.rewinds
        self._in_flight = InFlight(self._writer, self._offsets, listener)
        self._polled = PolledRecords(self._consumer, self._writer, self._in_flight, self._reader)
        self._lags = LagReporter(self._consumer, self._offsets, listener, self._fault, self._polled.oldest)
        self._end = EndOfTopic(self._consumer, self._offsets, self._in_flight, rewinds, self._reader)
        self._truncates = TruncateOrdering(
            self._consumer,
            self._in_flight,
            rewinds.record_truncate,
            lambda: until.over,
            owner.truncate_wait_seconds,
        )

    def consume(self, *, until_end: bool) -> bool:
        """Go round until told to stop, or until all is applied that was there at the start; return which."""
        reached = False
        try:
            ends = retrying("Finding the topic's end", self._consumer.ends, attempts=_ATTEMPTS) if until_end else None
            if until_end:
                # Where nothing is left to consume, no partition would come to be checked.
                retrying("Checking that the topic is the same", self._check_topic, attempts=_ATTEMPTS)
            while not (reached or self._until.over):
                try:
                    self._turn()
                    self._lags.report()
                    # What is to be recorded of the topic is recorded before the end.
                    reached = (
                        ends is not None and not self._topic.is_due and not self._is_busy and self._end.is_reached(ends)
                    )
                except TransientError as error:
                    self._fault.failed(error)
                    self._listener.retried(type(error).__name__)
        finally:
            # Gives the partitions back, for which the batch at work is finished.
            try:
                self._consumer.close()
            finally:
                self._writer.close()
                self._topic.guard.close()
                if self._reader is not None:
                    self._reader.close()
        self._in_flight.raise_failure()
        return reached

    @property
    def _is_busy(self) -> bool:
        """Whether anything that was polled is not acknowledged yet."""
        return (
            bool(len(self._polled.batch))
            or self._in_flight.is_writing
            or self._polled.is_stale
            or self._topic.guard.is_waiting
        )

    def _turn(self) -> None:
        """Acknowledge what is written, submit what is pending if the writer is free, and poll more."""
        self._in_flight.raise_failure()
        held_up = not self._advance() or self._writer.fault is not None or self._polled.is_stale
        full = self._polled.is_full
        if held_up or (full and not self._is_free_soon()):
            # Polling goes on, since a consumer that does not poll is put out of the group.
            self._consumer.pause()
            self._polled.poll(1, _IDLE_SECONDS)
        elif not full:
            self._consumer.resume()
            if len(self._polled.batch):
                if self._writer.at_work:
                    self._writer.wait(_TURN_SECONDS)
                elif not self._in_flight.is_writing and not self._polled.is_ready:
                    self._until.wait(min(max(self._in_flight.next_batch_at - time.monotonic(), 0), _IDLE_SECONDS))
                self._polled.poll(POLL_RECORDS, 0)
            elif self._reader is not None and self._reader.is_busy:
                self._writer.wait(_TURN_SECONDS)
                self._polled.poll(POLL_RECORDS, 0 if self._writer.at_work or self._reader.is_ready else _TURN_SECONDS)
            else:
                self._polled.poll(POLL_RECORDS, _WORK_SECONDS if self._writer.at_work else _IDLE_SECONDS)

    def _is_free_soon(self) -> bool:
        """Wait some seconds for the writer; return whether it is free. The batch at work may go on."""
        end = time.monotonic() + _FULL_SECONDS
        while not self._writer.wait(_IDLE_SECONDS):
            if time.monotonic() > end:
                return False
            self._in_flight.renew_fence()
        return True

    def _advance(self) -> bool:
        """Acknowledge and submit; return whether that could be done as far as there was something to do."""
        try:
            self._in_flight.acknowledge()
            if not self._in_flight.is_writing:
                # What comes after a batch that failed must not be committed.
                self._in_flight.raise_failure()
                self._carry_out_rewinds()
                self._polled.go_to_committed()
                if self._topic.is_wanted:
                    self._check_topic()
                self._get_ready()
                is_ready = self._polled.is_ready
                is_repair_due = self._reader is not None and self._reader.is_ready
                if (is_ready or is_repair_due) and not self._topic.is_wanted:
                    self._check_topic()
                    self._topic.is_wanted = True
                if is_repair_due and not (is_ready and self._in_flight.was_repair):
                    assert self._reader is not None  # noqa: S101
                    self._in_flight.submit_repair(self._reader)
                elif is_ready:
                    self._submit_pending()
        except TransientError as error:
            self._unacknowledged.failed(error)
            self._listener.retried(type(error).__name__)
            return False
        self._unacknowledged.recovered()
        return True

    def _carry_out_rewinds(self) -> None:
        """Rewind partitions for which another consumer, or this one before, left a request."""
        rewinds = self._writer.rewinds
        for partition, rewind in rewinds.pending(self._consumer.partitions).items():
            committed = self._consumer.committed([partition])[partition] or 0
            if rewind.offset < committed:
                offset = max(rewind.offset, self._consumer.offsets(partition)[0])
                log.warning("rewinding: a command may have come late", partition=partition, offset=offset)
                rewinds.repeat_truncate(partition, offset)
                # Before the commit, whose answer may be lost.
                self._polled.is_stale = True
                # Committed, so that whoever has the partition next goes back too.
                self._offsets.commit({partition: offset})
            rewinds.carried_out(partition, rewind)

    def _check_topic(self) -> None:
        """Check that topic and offsets are those that the group began with: now and then, and when partitions came."""
        if self._topic.is_time:
            if self._topic.guard.is_waiting:
                self._commit_ends_met()
            # Dropped records of partitions that are no longer held are polled again from the committed offsets.
            self._polled.is_stale = self._topic.check() or self._polled.is_stale

    def _commit_ends_met(self) -> None:
        """Commit where partitions end whose records are all applied: the last thing in them may be no record."""
        offsets, rest = self._offsets.current(), self._polled.batch.offsets.keys() | self._topic.guard.held
        ends = self._consumer.eof_offsets.items()
        if met := {at: end for at, end in ends if at not in rest and offsets.get(at, end) < end}:
            self._offsets.commit(met)

    def _get_ready(self) -> None:
        """Once there is nothing to do but to wait for partitions, do what would hold them up when they come."""
        if self._to_own and self._reader is not None and self._consumer.partitions:
            # Nobody else may apply records of users that are repaired, and a key does not show its partition.
            self._reader.assigned(self._consumer.partitions, self._consumer.all_partitions())
            self._to_own = False
        if self._to_connect:
            self._to_connect = False
            # The topic is checked before the first write.
            with suppress(TransientError):
                self._topic.guard.connect()

    def _submit_pending(self) -> None:
        held = self._topic.guard.held
        if not held.isdisjoint(self._polled.batch.offsets):
            self._polled.batch = self._polled.batch.without(held)
            self._topic.held()
        if self._polled.is_stale or not len(self._polled.batch):
            return
        truncate = self._polled.batch.first_truncate()
        if truncate is not None and len(self._consumer.all_partitions()) > 1:
            self._polled.is_stale = True
            self._truncates.apply(self._polled.batch, truncate)
        else:
            self._in_flight.submit(self._polled.batch)
            self._polled.batch = Batch()

    # Partitions that come and go

    def _assigned(self, partitions: set[int]) -> None:
        self._truncates.interrupt()
        self._topic.assigned()
        self._to_connect = not self._consumer.partitions
        self._writer.fences.forget()
        self._to_own = True
        self._letters.reload()
        log.info("partitions assigned", partitions=sorted(partitions), all=sorted(self._consumer.partitions))
        self._listener.assigned(self._consumer.partitions)

    def _revoked(self, partitions: set[int]) -> None:
        self._give_up(partitions, lost=False)

    def _lost(self, partitions: set[int]) -> None:
        log.warning(
            "partitions lost: the group has not heard from this consumer for too long",
            partitions=sorted(partitions),
        )
        self._give_up(partitions, lost=True)

    def _give_up(self, partitions: set[int], *, lost: bool) -> None:
        """Finish what is in flight, or stop it; forget what is pending of these partitions."""
        self._truncates.interrupt()
        self._to_own = True
        if self._reader is not None:
            self._reader.assigned((), ())
        if not self._in_flight.release(partitions, lost=lost):
            self._polled.batch = self._in_flight.batch.joined(self._polled.batch)
        self._offsets.forget(partitions)
        self._polled.batch = self._polled.batch.without(partitions)
        log.info("partitions revoked", partitions=sorted(partitions))
        self._listener.assigned(self._consumer.partitions - partitions)
