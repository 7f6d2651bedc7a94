"""One member of the group that consumes the topic of changes: single operations, and what becomes of its partitions.

Not here: what records mean, in what batches they are applied, and when offsets are committed.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final

from confluent_kafka import OFFSET_BEGINNING, OFFSET_END, Consumer, KafkaError, KafkaException, Message, TopicPartition

from ghsync_dagster.domain.errors import GhsyncError, PermanentError, UnavailableError
from ghsync_dagster.stopping import abandon
from ghsync_dagster.stores.kafka.client import KafkaSettings, consumer_config, kafka_error, kafka_errors
from ghsync_dagster.stores.kafka.topics import PARTITION_EOF, committed_offsets, location, partitions_of, watermarks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

_NO_OFFSET: Final = KafkaError._AUTO_OFFSET_RESET  # noqa: SLF001  the library's own name of its local error
_CHECK_SECONDS: Final = 1.0
_SERVE_SECONDS: Final = 10.0
"""How long to poll until all partitions are revoked, in addition to the time of the ``revoked`` callback."""
_SERVE_POLL_SECONDS: Final = 0.1
_LEAVE_SECONDS = 45.0
"""How long leaving the group may take, in addition to a session time-out, which a running command may use up."""


class TopicConsumer:
    """One member of the group that consumes the topic.

    One thread calls ``poll``, which calls the three callbacks with partition numbers. Another thread may call
    ``commit``.

    Args:
        kafka: Topic, group and the connection settings.
        assigned: These partitions were added to the assignment.
        revoked: These partitions are revoked once this returns: the last moment to commit for them.
        lost: These partitions are lost, and another consumer may have them already.

    Raises:
        ConfigError: A setting is wrong.
    """

    def __init__(
        self,
        kafka: KafkaSettings,
        *,
        assigned: Callable[[set[int]], None],
        revoked: Callable[[set[int]], None],
        lost: Callable[[set[int]], None],
    ) -> None:
        self.kafka = kafka
        self.partitions: set[int] = set()
        self.eof_offsets: dict[int, int] = {}
        """Offsets at which partitions were found to end: all records before them were polled."""
        self.fault: GhsyncError | None = None
        """The brokers' last error; None once they answered again."""
        self._to_begin: set[int] = set()
        self._gone: set[int] = set()
        """Partitions that were revoked or lost during the present poll."""
        self._paused = False
        self._is_leaving = False
        self._assigned, self._revoked, self._lost = assigned, revoked, lost
        with kafka_errors("Opening the consumer"):
            self._consumer = Consumer({**consumer_config(kafka), "error_cb": self._on_error})
            self._consumer.subscribe(
                [kafka.topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
            )

    def _on_error(self, error: KafkaError) -> None:
        self._record_fault(kafka_error(error, f"Consuming {self.kafka.topic}"))

    def _record_fault(self, fault: GhsyncError | None) -> None:
        """Record an error of the brokers. ``poll`` raises a permanent one, as a callback must not raise."""
        # A permanent error must not be replaced by its consequences.
        if not isinstance(self.fault, PermanentError):
            self.fault = fault

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        consumer.incremental_assign(partitions)
        if self._is_leaving:
            # They are revoked next.
            self.partitions |= {partition.partition for partition in partitions}
            return
        # The client remembers for each partition whether it was paused when it was revoked.
        (consumer.pause if self._paused else consumer.resume)(partitions)
        came = {partition.partition for partition in partitions}
        self._record_fault(None)
        self._fetch_now()
        self.partitions |= came
        self._assigned(came)

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._revoked({partition.partition for partition in partitions})
        self._forget(consumer, partitions)

    def _on_lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._lost({partition.partition for partition in partitions})
        self._forget(consumer, partitions)

    def _forget(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        for partition in partitions:
            self.partitions.discard(partition.partition)
            self._gone.add(partition.partition)
            self.eof_offsets.pop(partition.partition, None)
            self._to_begin.discard(partition.partition)
        try:
            consumer.incremental_unassign(partitions)
        except KafkaException:
            if not self._is_leaving:
                raise
            # The client does not close before an unassignment, be it of no partition.
            consumer.incremental_unassign([])
        if not self._is_leaving:
            self._fetch_now()

    def poll(self, limit: int, seconds: float) -> list[Message]:
        """Return up to ``limit`` records as soon as there is one, or none after ``seconds``.

        Raises:
            UnavailableError: The topic is not there; polling again is safe.
            RefusedError: Credentials or rights.
            PermanentError: The committed offset is no longer in the topic.
        """
        for partition in sorted(self._to_begin):
            self._seek_to_beginning(partition)
        found: list[Message] = []
        with kafka_errors(f"Consuming {self.kafka.topic}"):
            if seconds > 0 and (first := self._consumer.poll(seconds)) is not None:
                found = [first]
            self._gone.clear()
            if seconds <= 0 or found:
                more = self._consume_buffered(limit, found)
                # A partition that was revoked meanwhile is another's, or is read again from its committed offset.
                found = [message for message in found if message.partition() not in self._gone] + more
            if seconds > 0 and not found:
                # A call wakes the library's thread, which otherwise sends heartbeats every half a second only.
                self._consumer.assignment()
        if isinstance(self.fault, PermanentError):
            raise self.fault
        records = [message for message in found if message.error() is None]
        if records:
            self.fault = None
        if len(records) < len(found):
            for message in found:
                if (error := message.error()) is not None:
                    self._handle_error(error, message)
        return records

    def _consume_buffered(self, limit: int, found: list[Message]) -> list[Message]:
        """Return records that the client has fetched already. If ``found`` must not be lost, only record a failure."""
        try:
            with kafka_errors(f"Consuming {self.kafka.topic}"):
                return self._consumer.consume(limit, 0)
        except GhsyncError as error:
            if not found:
                raise
            self._record_fault(error)
            return []

    def _handle_error(self, error: KafkaError, message: Message) -> None:
        if error.code() == PARTITION_EOF:
            self.fault = None
            partition, offset = location(message)
            self.eof_offsets[partition] = offset
        elif error.code() == _NO_OFFSET:
            self._to_begin.add(message.partition() or 0)
        else:
            failure = kafka_error(error, f"Consuming {self.kafka.topic}")
            if isinstance(failure, PermanentError):
                raise failure
            self.fault = failure

    def _seek_to_beginning(self, partition: int) -> None:
        """Seek to the beginning of a partition without committed offset; refuse to skip removed records."""
        committed = self.committed([partition])[partition]
        if committed is not None:
            raise self._out_of_range(partition, committed, *self.offsets(partition))
        beginning = TopicPartition(self.kafka.topic, partition, OFFSET_BEGINNING)
        with kafka_errors(f"Beginning {self.kafka.topic}"):
            # A seek is refused in this state.
            self._consumer.incremental_unassign([beginning])
            self._consumer.incremental_assign([beginning])
        self._to_begin.discard(partition)

    def _out_of_range(self, partition: int, committed: int, low: int, high: int) -> PermanentError:
        return PermanentError(
            f"{self.kafka.topic} partition {partition}: group {self.kafka.group_id} is at offset {committed}, but "
            f"the topic holds {low} to {high}: changes were removed before they were applied, or the topic is new.",
            way_out="Take a new snapshot, and let a new group begin at the beginning; see docs/operate/runbook.md.",
        )

    def ends(self) -> dict[int, int]:
        """Return where each partition ends that holds anything.

        Raises:
            PermanentError: The committed offset is outside of a partition.
            UnavailableError: No broker can be reached, or there is no such topic.
        """
        # Committed offsets first: the end may move on afterwards, so a commit is never beyond the end read here.
        committed = self.committed(self.all_partitions())
        found = {partition: self.offsets(partition) for partition in committed}
        for partition, (low, high) in found.items():
            offset = committed[partition]
            if offset is not None and not low <= offset <= high:
                raise self._out_of_range(partition, offset, low, high)
        return {partition: high for partition, (low, high) in found.items() if high > low}

    def commit(self, offsets: Mapping[int, int]) -> None:
        """Commit the next offset of each partition, and return when the group has it.

        Success proves that this consumer is in the group.

        Raises:
            UnavailableError: Not now: no broker, a rebalance, or this consumer is out of the group.
            RefusedError: Credentials or rights.
        """
        what = f"Committing {self.kafka.group_id}"
        with kafka_errors(what):
            for answer in self._consumer.commit(offsets=self._at(offsets), asynchronous=False):
                if answer.error is not None:
                    raise kafka_error(answer.error, what)

    def committed(self, partitions: Iterable[int]) -> dict[int, int | None]:
        """Return the group's committed offset by partition, None where it has none."""
        return committed_offsets(self._consumer, self.kafka, partitions, f"Reading offsets of {self.kafka.group_id}")

    def all_partitions(self) -> list[int]:
        """Return the numbers of all partitions of the topic.

        Raises:
            UnavailableError: There is no such topic, or no broker.
        """
        return partitions_of(self._consumer, self.kafka.topic, self.kafka.timeout_seconds)

    def check_brokers(self) -> None:
        """After a ``fault``, check whether the brokers answer again.

        Raises:
            PermanentError: They refuse.
        """
        if isinstance(self.fault, UnavailableError):
            try:
                partitions_of(self._consumer, self.kafka.topic, _CHECK_SECONDS)
            except UnavailableError as error:
                self.fault = error
            else:
                self.fault = None

    def offsets(self, partition: int) -> tuple[int, int]:
        """Return a partition's low and high watermark."""
        return watermarks(self._consumer, self.kafka.topic, partition, self.kafka.timeout_seconds)

    def known_end(self, partition: int) -> int | None:
        """Return a partition's high watermark by the last fetch; None where it is not known.

        While the consumer is paused it fetches nothing. The broker is then asked, for a second at most.
        """
        if self._paused and self.fault is None:
            try:
                return watermarks(self._consumer, self.kafka.topic, partition, _CHECK_SECONDS)[1]
            except UnavailableError as error:
                self.fault = error
                return None
        end = self._consumer.get_watermark_offsets(TopicPartition(self.kafka.topic, partition), cached=True)[1]
        return end if end >= 0 else None

    def pause(self) -> None:
        """Fetch nothing more, also of partitions that are assigned later; ``poll`` is still to be called."""
        if not self._paused:
            self._paused = True
            self._consumer.pause(self._assignment())

    def resume(self) -> None:
        """Fetch again."""
        if self._paused:
            self._paused = False
            self._consumer.resume(self._assignment())
            self._fetch_now()

    def _fetch_now(self) -> None:
        """Wake the library's threads, so that they fetch resumed partitions at once.

        A request to a broker wakes the thread for that broker. Otherwise it notices a resumed partition up to a second
        later.
        """
        if self.partitions and not self._paused:
            ends = [TopicPartition(self.kafka.topic, partition, OFFSET_END) for partition in self.partitions]
            try:
                with kafka_errors(f"Reading offsets of {self.kafka.topic}"):
                    self._consumer.offsets_for_times(ends, timeout=_CHECK_SECONDS)
            except GhsyncError as error:
                self._record_fault(error)

    def _assignment(self) -> list[TopicPartition]:
        return [TopicPartition(self.kafka.topic, partition) for partition in self.partitions]

    def _at(self, offsets: Mapping[int, int]) -> list[TopicPartition]:
        return [TopicPartition(self.kafka.topic, partition, offset) for partition, offset in offsets.items()]

    def seek(self, offsets: Mapping[int, int]) -> None:
        """Go on from other offsets in some of the assigned partitions; resume all of them."""
        self._paused = False
        with kafka_errors(f"Moving in {self.kafka.topic}"):
            self._consumer.incremental_unassign(self._at(offsets))
            self._consumer.incremental_assign(self._at(offsets))
            # An assignment does not resume what was paused.
            self._consumer.resume(self._assignment())
        self._fetch_now()
        for partition in offsets:
            self.eof_offsets.pop(partition, None)

    def close(self) -> None:
        """Give the partitions back, the ``revoked`` callback included, and leave the group, in a limited time.

        The client's own close may block forever: if an assignment arrives or is pending meanwhile (librdkafka #4884,
        #4527), or if the topic is deleted (#4362). So this unsubscribes first, and polls until the partitions are
        revoked. Close comes last. If it does not return, it is left behind, see ``stopping.abandon``.
        Another thread calls the callbacks, while this one waits.

        Raises:
            UnavailableError: The group could not be left; the brokers notice that by themselves.
        """
        self._is_leaving = True
        failure: list[Exception] = []

        def leave() -> None:
            try:
                with kafka_errors("Leaving the group"):
                    self._leave()
            except Exception as error:  # noqa: BLE001  the thread that waits raises it
                failure.append(error)

        leaving = threading.Thread(target=leave, name="cdc-leave", daemon=True)
        leaving.start()
        leaving.join(self.kafka.session_timeout_seconds + _LEAVE_SECONDS)
        if leaving.is_alive():
            abandon(f"the Kafka client does not close: group {self.kafka.group_id} waits for its session to end")
        elif failure:
            raise failure[0]

    def _leave(self) -> None:
        self._consumer.unsubscribe()
        end = time.monotonic() + _SERVE_SECONDS
        while self.partitions and time.monotonic() < end:
            # What is polled here is neither applied nor committed.
            self._consumer.poll(_SERVE_POLL_SECONDS)
        # A pending assignment would block the client's close.
        self._consumer.poll(0)
        self._consumer.close()
