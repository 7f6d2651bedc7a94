"""One member of the group that consumes the topic of changes: single operations, and what becomes of its partitions.

Not here: what records mean, in what batches they are applied, and when offsets are committed.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final

from confluent_kafka import OFFSET_BEGINNING, OFFSET_END, Consumer, KafkaError, KafkaException, Message, TopicPartition

from ghsync_dagster.domain.errors import GhsyncError, PermanentError, UnavailableError
from ghsync_dagster.stopping import leave_behind
from ghsync_dagster.stores.kafka.client import (
    KafkaSettings,
    committed_offset,
    consumer_config,
    kafka_error,
    kafka_errors,
)
from ghsync_dagster.stores.kafka.topics import PARTITION_EOF, bounds_of, partitions_of, place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

_NO_OFFSET: Final = KafkaError._AUTO_OFFSET_RESET  # noqa: SLF001  the library's own name of its local error
_LOOK_SECONDS: Final = 1.0
_SERVE_SECONDS: Final = 10.0
"""How long to poll for the end of the partitions, besides what the ``revoked`` callback takes."""
_SERVE_POLL_SECONDS: Final = 0.1
_LEAVE_SECONDS = 45.0
"""How long leaving the group may take, besides a session time-out, which a command at work may use up."""


class TopicConsumer:
    """One member of the group that consumes the topic.

    ``take`` is for one thread, in which the three callbacks are called too, with partition numbers; ``commit`` may be
    called in another one.

    Args:
        kafka: Topic, group and the way there.
        assigned: These partitions came in addition.
        revoked: These partitions go once this returns: the last moment to commit for them.
        lost: These partitions are gone, and may be another's already.

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
        self.ends_met: dict[int, int] = {}
        """Offsets at which partitions were found to end: what was before them has been taken."""
        self.trouble: GhsyncError | None = None
        """What keeps the brokers away; None since they last answered."""
        self._to_begin: set[int] = set()
        self._gone: set[int] = set()
        """Partitions that went since this was last emptied."""
        self._paused = False
        self._is_leaving = False
        self._assigned, self._revoked, self._lost = assigned, revoked, lost
        with kafka_errors("Opening the consumer"):
            self._consumer = Consumer({**consumer_config(kafka), "error_cb": self._on_error})
            self._consumer.subscribe(
                [kafka.topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
            )

    def _on_error(self, error: KafkaError) -> None:
        self._meet(kafka_error(error, f"Consuming {self.kafka.topic}"))

    def _meet(self, trouble: GhsyncError | None) -> None:
        """Keep what keeps the brokers away, for ``take`` to raise it where it is permanent: a callback must not."""
        # What is permanent must not be covered by what only follows from it.
        if not isinstance(self.trouble, PermanentError):
            self.trouble = trouble

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        consumer.incremental_assign(partitions)
        if self._is_leaving:
            # They are revoked next.
            self.partitions |= {partition.partition for partition in partitions}
            return
        # A partition that comes back is as paused as it was when it went.
        (consumer.pause if self._paused else consumer.resume)(partitions)
        came = {partition.partition for partition in partitions}
        self._meet(None)
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
            self.ends_met.pop(partition.partition, None)
            self._to_begin.discard(partition.partition)
        try:
            consumer.incremental_unassign(partitions)
        except KafkaException:
            if not self._is_leaving:
                raise
            # The client waits for an answer before it closes, be it about none.
            consumer.incremental_unassign([])
        if not self._is_leaving:
            self._fetch_now()

    def take(self, limit: int, seconds: float) -> list[Message]:
        """Return up to ``limit`` records as soon as there is one, or none after ``seconds``.

        Raises:
            UnavailableError: The topic is not there; asking again is safe.
            RefusedError: Credentials or rights.
            PermanentError: The place to go on from is gone from the topic.
        """
        for partition in sorted(self._to_begin):
            self._begin(partition)
        found: list[Message] = []
        with kafka_errors(f"Consuming {self.kafka.topic}"):
            if seconds > 0 and (first := self._consumer.poll(seconds)) is not None:
                found = [first]
            self._gone.clear()
            if seconds <= 0 or found:
                more = self._take_more(limit, found)
                # A partition that went meanwhile is another's, or is read anew from what is committed.
                found = [message for message in found if message.partition() not in self._gone] + more
            if seconds > 0 and not found:
                # Heartbeats leave only when something wakes the library's own thread, otherwise every half a second.
                self._consumer.assignment()
        if isinstance(self.trouble, PermanentError):
            raise self.trouble
        records = [message for message in found if message.error() is None]
        if records:
            self.trouble = None
        if len(records) < len(found):
            for message in found:
                if (error := message.error()) is not None:
                    self._take_error(error, message)
        return records

    def _take_more(self, limit: int, found: list[Message]) -> list[Message]:
        """Return what waits in this process. A failure is no more than noted where something is in hand to be kept."""
        try:
            with kafka_errors(f"Consuming {self.kafka.topic}"):
                return self._consumer.consume(limit, 0)
        except GhsyncError as error:
            if not found:
                raise
            self._meet(error)
            return []

    def _take_error(self, error: KafkaError, message: Message) -> None:
        if error.code() == PARTITION_EOF:
            self.trouble = None
            partition, offset = place(message)
            self.ends_met[partition] = offset
        elif error.code() == _NO_OFFSET:
            self._to_begin.add(message.partition() or 0)
        else:
            failure = kafka_error(error, f"Consuming {self.kafka.topic}")
            if isinstance(failure, PermanentError):
                raise failure
            self.trouble = failure

    def _begin(self, partition: int) -> None:
        """Go to the beginning of a partition that the group has never committed; refuse to skip what is gone."""
        committed = self.committed([partition])[partition]
        if committed is not None:
            raise self._displaced(partition, committed, *self.offsets(partition))
        beginning = TopicPartition(self.kafka.topic, partition, OFFSET_BEGINNING)
        with kafka_errors(f"Beginning {self.kafka.topic}"):
            # A seek is refused in this state.
            self._consumer.incremental_unassign([beginning])
            self._consumer.incremental_assign([beginning])
        self._to_begin.discard(partition)

    def _displaced(self, partition: int, committed: int, low: int, high: int) -> PermanentError:
        return PermanentError(
            f"{self.kafka.topic} partition {partition}: group {self.kafka.group_id} is at offset {committed}, but "
            f"the topic holds {low} to {high}: changes were removed before they were applied, or the topic is new.",
            way_out="Take a new snapshot, and let a new group begin at the beginning; see docs/operate/runbook.md.",
        )

    def ends(self) -> dict[int, int]:
        """Return where each partition ends that holds anything.

        Raises:
            PermanentError: The group is to go on from a place that a partition does not have.
            UnavailableError: No broker can be reached, or there is no such topic.
        """
        # The commits first: the end may have moved on since, never the other way round.
        committed = self.committed(self.all_partitions())
        found = {partition: self.offsets(partition) for partition in committed}
        for partition, (low, high) in found.items():
            place = committed[partition]
            if place is not None and not low <= place <= high:
                raise self._displaced(partition, place, low, high)
        return {partition: high for partition, (low, high) in found.items() if high > low}

    def commit(self, offsets: Mapping[int, int]) -> None:
        """Commit the next offset of each partition, and return when the group has it.

        Success proves that this consumer is in the group.

        Raises:
            UnavailableError: Not now: no broker, a rebalance, or this consumer is out of the group.
            RefusedError: Credentials or rights.
        """
        places = [TopicPartition(self.kafka.topic, partition, offset) for partition, offset in offsets.items()]
        what = f"Committing {self.kafka.group_id}"
        with kafka_errors(what):
            for place in self._consumer.commit(offsets=places, asynchronous=False):
                if place.error is not None:
                    raise kafka_error(place.error, what)

    def committed(self, partitions: Iterable[int]) -> dict[int, int | None]:
        """Return what the group has committed of each partition, None for nothing."""
        places = [TopicPartition(self.kafka.topic, partition) for partition in partitions]
        what = f"Reading offsets of {self.kafka.group_id}"
        with kafka_errors(what):
            found = self._consumer.committed(places, timeout=self.kafka.timeout_seconds)
        return {place.partition: committed_offset(place, what) for place in found}

    def all_partitions(self) -> list[int]:
        """Return the numbers of all partitions of the topic.

        Raises:
            UnavailableError: There is no such topic, or no broker.
        """
        return partitions_of(self._consumer, self.kafka.topic, self.kafka.timeout_seconds)

    def look_again(self) -> None:
        """Ask whether the brokers answer, after ``trouble``.

        Raises:
            PermanentError: They refuse.
        """
        if isinstance(self.trouble, UnavailableError):
            try:
                partitions_of(self._consumer, self.kafka.topic, _LOOK_SECONDS)
            except UnavailableError as away:
                self.trouble = away
            else:
                self.trouble = None

    def offsets(self, partition: int) -> tuple[int, int]:
        """Ask where a partition begins and ends."""
        return bounds_of(self._consumer, self.kafka.topic, partition, self.kafka.timeout_seconds)

    def known_end(self, partition: int) -> int | None:
        """Return where a partition ended at the last answer of its broker, None where there is none.

        While nothing is fetched no answer comes unasked, so the broker is asked, for a second at most.
        """
        if self._paused and self.trouble is None:
            try:
                return bounds_of(self._consumer, self.kafka.topic, partition, _LOOK_SECONDS)[1]
            except UnavailableError as away:
                self.trouble = away
                return None
        end = self._consumer.get_watermark_offsets(TopicPartition(self.kafka.topic, partition), cached=True)[1]
        return end if end >= 0 else None

    def pause(self) -> None:
        """Fetch nothing more, also of partitions that come; ``take`` is still to be called."""
        if not self._paused:
            self._paused = True
            self._consumer.pause(self._places())

    def resume(self) -> None:
        """Fetch again."""
        if self._paused:
            self._paused = False
            self._consumer.resume(self._places())
            self._fetch_now()

    def _fetch_now(self) -> None:
        """Have partitions fetched that were paused, as the library does with those that stay in a rebalance.

        Its thread for a broker sees that they no longer are when something wakes it, such as a question to that
        broker, otherwise up to a second later.
        """
        if self.partitions and not self._paused:
            ends = [TopicPartition(self.kafka.topic, partition, OFFSET_END) for partition in self.partitions]
            try:
                with kafka_errors(f"Reading offsets of {self.kafka.topic}"):
                    self._consumer.offsets_for_times(ends, timeout=_LOOK_SECONDS)
            except GhsyncError as error:
                self._meet(error)

    def _places(self) -> list[TopicPartition]:
        return [TopicPartition(self.kafka.topic, partition) for partition in self.partitions]

    def go_to(self, offsets: Mapping[int, int]) -> None:
        """Go on from other offsets in some of the partitions that this consumer has; none is paused then."""
        self._paused = False
        places = [TopicPartition(self.kafka.topic, partition, offset) for partition, offset in offsets.items()]
        with kafka_errors(f"Moving in {self.kafka.topic}"):
            self._consumer.incremental_unassign(places)
            self._consumer.incremental_assign(places)
            # They are as paused as before.
            self._consumer.resume(self._places())
        self._fetch_now()
        for partition in offsets:
            self.ends_met.pop(partition, None)

    def close(self) -> None:
        """Give the partitions back, the ``revoked`` callback included, and leave the group, in a limited time.

        The client's own close may wait for ever where an assignment comes or waits to be served meanwhile (librdkafka
        #4884, #4527) or the topic is deleted (#4362). So the subscription ends first and what it causes is served by
        polls. Close comes last, and where that does not return it is left behind, see ``stopping.leave_behind``.
        The callbacks are called in another thread, while this one waits.

        Raises:
            UnavailableError: The group could not be left; the brokers notice that by themselves.
        """
        self._is_leaving = True
        failure: list[Exception] = []

        def leave() -> None:
            try:
                with kafka_errors("Leaving the group"):
                    self._leave()
            except Exception as error:  # noqa: BLE001  the thread that closes raises it
                failure.append(error)

        leaving = threading.Thread(target=leave, name="cdc-leave", daemon=True)
        leaving.start()
        leaving.join(self.kafka.session_timeout_seconds + _LEAVE_SECONDS)
        if leaving.is_alive():
            leave_behind(f"the Kafka client does not close: group {self.kafka.group_id} waits for its session to end")
        elif failure:
            raise failure[0]

    def _leave(self) -> None:
        self._consumer.unsubscribe()
        end = time.monotonic() + _SERVE_SECONDS
        while self.partitions and time.monotonic() < end:
            # What is taken here is neither applied nor committed.
            self._consumer.poll(_SERVE_POLL_SECONDS)
        # An assignment that waits to be served is what the client's close can't stand.
        self._consumer.poll(0)
        self._consumer.close()
