"""Write: one batch at a time reaches the store, and its dead letters their topic; users are repaired in between.

Belongs here: the thread that writes while the next batch is polled, how long it may write for its partitions, and how
faults are handled. Not here: which records make a batch, and committing offsets, which the consuming thread does.

**Who may write.** A consumer that was held up for longer than the session time-out may have lost its partitions without
noticing. So before each command to the store the fence must hold: the group has accepted a commit of this consumer less
than a session time-out ago. The command gets no more time than remains of it. A lost partition stops the batch before
its next command.

Still a command may come late: a process can be frozen between this check and sending, or a server between receiving a
command and executing it. Such a command would write an older state of a key over a newer one. So if a batch is given up
while a command is in doubt, a rewind request for its partitions is left in the database. Whoever has the partitions
carries it out within a second or so. The rewind leaves a repaired user as it is, so that user is requested again too.

Three cases remain. A process is killed after it sent a command late and before it left the request. A server executes a
command after it has refused or forgotten the connection. Or the network delivers a command only after its time was
over and another consumer has written the batch.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final

from ghsync_dagster.cdc.stream.apply_batch import BatchApplier
from ghsync_dagster.cdc.stream.batch import Batch
from ghsync_dagster.cdc.stream.fences import RepairFences
from ghsync_dagster.cdc.stream.lasting_fault import LastingFault
from ghsync_dagster.cdc.stream.listener import KAFKA, MONGO
from ghsync_dagster.cdc.stream.repair import carry_out
from ghsync_dagster.cdc.stream.rewinds import REWIND_SECONDS, RewindRequests
from ghsync_dagster.domain.errors import GhsyncError, TransientError, UnavailableError
from ghsync_dagster.logging import get_logger
from ghsync_dagster.retry import retrying, waits
from ghsync_dagster.stopping import abandon
from ghsync_dagster.stores.mongo.guard import WriterGuard

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ghsync_dagster.cdc.stream.group import GroupFence
    from ghsync_dagster.cdc.stream.letters import DeadLetters
    from ghsync_dagster.cdc.stream.listener import ChangeListener
    from ghsync_dagster.cdc.stream.source_reader import RepairWork, SourceReader
    from ghsync_dagster.cdc.stream.written import Written
    from ghsync_dagster.domain.user import RuleTest
    from ghsync_dagster.stores.mongo.users import UserStore

_LAST_ATTEMPTS: Final = 7
"""Tries to leave rewind requests at the end, which take up to a minute."""
_END_SECONDS: Final = 120.0
"""How long the thread may take to end besides the time of a command at work: for letters and for rewind requests."""
_LEAST_SECONDS: Final = 1.0
"""The least time that a command is given."""

log = get_logger("cdc")


class _StoppedError(Exception):
    """The batch must not go on."""


class Writer(WriterGuard):
    """A thread that writes one batch at a time, and the guard of what it writes.

    Args:
        store: Where users are stored.
        letters: Where refused records go.
        listener: Hears of what goes wrong.
        fence: How long the thread may write.
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

        self.fault: TransientError | None = None
        """Why the batch at work is not done yet, if something is in its way."""
        self.failure: BaseException | None = None
        """What ended the work permanently."""
        self._users = UserWriter(store, self)
        self._repairs = RepairWriter(self._users)
        self.rewinds = RewindRequests(GroupBook(store), self._repairs, name)
        self.fences = RepairFences(self._repairs.fences)
        self._applier = BatchApplier(self._repairs, self.fences, letters, listener, rules, reader)
        self._letters, self._listener, self._fence = letters, listener, fence
        self._reader = reader
        self._name = name
        self._task: Batch | RepairWork | None = None
        self._written: Written | None = None
        self._server = MONGO
        """Which server the batch at work waits for."""
        self._closing = False
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self._batch_fault = LastingFault("batch write")
        self._thread = threading.Thread(target=self._run, name="cdc-write", daemon=True)
        self._thread.start()

    # For the thread that consumes

    @property
    def rate(self) -> float:
        """Operations that the store takes a second."""
        return self._applier.rate

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

    @property
    def has_written(self) -> bool:
        """Whether ``pop_written`` has a batch to return."""
        return self._written is not None

    def pop_written(self) -> Written | None:
        """Return the batch that was written since the last call; None where it is not yet or was stopped."""
        with self._changed:
            written, self._written = self._written, None
            return written

    def give_up(self, written: Written) -> None:
        """Forget a batch that is written and can't be committed."""
        self._given_up(written.batch, in_doubt=written.in_doubt)

    def stop_batch(self) -> None:
        """Have the batch at work end before its next command."""
        self._stopped.set()

    def close(self) -> None:
        """End the thread before the next command of the batch at work, with every rewind requested, or ``failure`` set.

        A thread that does not end in time is abandoned, see ``stopping.abandon``.
        """
        with self._changed:
            self._closing = True
            self._stopped.set()
            self._changed.notify_all()
        self._thread.join(self._fence.session_seconds + _END_SECONDS)
        if not self._thread.is_alive():
            self._letters.close()
            return
        abandon("the thread that writes does not end: the database or Kafka does not answer")
        # In this order: a batch that is given up leaves its requests before it is no longer at work.
        if self.at_work or self.rewinds.is_unfinished:
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
                self._changed.wait_for(lambda: self._task is not None or self._closing, timeout=REWIND_SECONDS)
                work, closing = self._task, self._closing
            written: Written | None = None
            try:
                self.rewinds.synchronize(closing=closing)
                if isinstance(work, Batch):
                    written = self._write_batch(work)
                elif work is not None:
                    self._repair(work)
                elif closing:
                    retrying("Requesting rewinds", self.rewinds.make_requests, attempts=_LAST_ATTEMPTS)
            except BaseException as error:  # noqa: BLE001  the thread that consumes raises it
                if not isinstance(error, _StoppedError):
                    self.failure = self.failure or error
                if isinstance(work, Batch):
                    self._given_up(work, in_doubt=self._users.commands.in_doubt)
            if work is None and closing:
                return
            if work is not None:
                with self._changed:
                    self._task, self._written = None, written
                    self.fault = None
                    self._changed.notify_all()

    def _repair(self, work: RepairWork) -> None:
        """Carry out what was read of the source. Where that cannot be done, its requests stay open."""
        assert self._reader is not None  # noqa: S101  it has read the work
        self._users.commands.in_doubt = False
        failure: Exception | None = None
        started = time.monotonic()
        try:
            outcomes = carry_out(self._repairs, work, self.fences.current(), self._letters.resolve_repaired)
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
            self._reader.written(work, time.monotonic() - started)
            for outcome, count in outcomes.items():
                self._listener.repaired(outcome.value, count)
        finally:
            if self._users.commands.in_doubt:
                self.rewinds.request({}, work.claim.requests)
            self._reader.finished(work, failure)

    def _given_up(self, batch: Batch, *, in_doubt: bool) -> None:
        """Have what was not committed applied again, where a command of it may come late."""
        log.info("batch given up", begins=batch.starts, in_doubt=in_doubt)
        if in_doubt:
            # Before the partitions are another consumer's.
            self.rewinds.request(batch.starts, {key for key in batch.keys if key is not None})

    def _write_batch(self, batch: Batch) -> Written:
        """Write a batch, however long the servers are away."""
        self._users.commands.in_doubt = False
        written: Written | None = None
        for seconds in waits():
            try:
                if written is None:
                    self._server = MONGO
                    written = self._applier.apply(batch)
                self._write_letters(written)
            except TransientError as error:
                self.fault = error
                self._listener.retried(type(error).__name__)
                self._listener.connection(self._server, up=False)
                self._batch_fault.failed(error)
                if self._stopped.wait(seconds):
                    raise _StoppedError from None
            else:
                # One whose partitions were given up meanwhile must not be committed any more.
                self._refuse_stopped()
                self._batch_fault.recovered()
                written.in_doubt = self._users.commands.in_doubt
                return written
        raise AssertionError("waits have no end")

    def _write_letters(self, written: Written) -> None:
        self._server = KAFKA
        if written.letters:
            self._refuse_stopped()
            written.letters = self._letters.write(written.letters)
            log.warning("records dead-lettered", records=len(written.letters), kinds=dict(written.kinds))
        self._server = MONGO
        self._letters.settle(written.batch, written.letters)

    def allow(self) -> float:
        """Return how long a command to the store may take; see the module's beginning."""
        self._refuse_stopped()
        remaining = self._fence.remaining
        if remaining < _LEAST_SECONDS:
            self._server = KAFKA
            raise UnavailableError(
                "Writing: Kafka has not confirmed for some time that this consumer is in its group.",
                way_out="Check that the brokers are up; look for what holds this process up for seconds.",
            )
        return remaining

    def _refuse_stopped(self) -> None:
        if self._stopped.is_set():
            raise _StoppedError
