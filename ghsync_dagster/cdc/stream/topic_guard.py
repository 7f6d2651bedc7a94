"""Which topic a group consumes: one that was deleted and created again by the same name is another one.

Belongs here: recording the id of a group's topic, its number of partitions, and in which of them the group had a
committed offset; comparing these, and when. Not here: the offsets themselves.

Brokers forget a group's offsets with its topic, or keep those that a consumer still commits as offsets of the new one.
They also forget the offsets of a group that had no member for ``offsets.retention.minutes``. In none of these cases do
the offsets show that changes are gone. If brokers give topics no ids, nothing is recorded and nothing can be compared.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from ghsync_dagster.domain.errors import PermanentError
from ghsync_dagster.logging import get_logger
from ghsync_dagster.stores.kafka.backlog import read_backlog

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from ghsync_dagster.stores.kafka.client import KafkaSettings
    from ghsync_dagster.stores.kafka.consumer import TopicConsumer
    from ghsync_dagster.stores.mongo.users import UserStore

_TOPIC_SECONDS: Final = 10.0
"""How often to check that the topic is still the same."""
_HELD_SECONDS: Final = 0.5
"""How often to check whether partitions that were added may be applied."""

log = get_logger("cdc")


class TopicGuard:
    """The topic of a group, and what is recorded of it.

    Args:
        kafka: The group, the topic and the way to the brokers.
        store: Where the id is recorded.
    """

    def __init__(self, kafka: KafkaSettings, store: UserStore) -> None:
        from ghsync_dagster.stores.kafka.topics import TopicIds
        from ghsync_dagster.stores.mongo.books import GroupBook

        self._kafka = kafka
        self._ids = TopicIds(kafka)
        self._book = GroupBook(store)
        self._recorded: set[int] = set()
        self.held: frozenset[int] = frozenset()
        """Partitions that were added, of which nothing may be applied yet."""
        self._awaited: dict[int, int] = {}
        self._is_known = True

    def connect(self) -> None:
        """Make the connections that ``check`` needs, so that it is quick.

        Raises:
            UnavailableError: A server is away, or there is no such topic.
            RefusedError: Credentials or rights.
        """
        self._ids.of(self._kafka.topic)
        self._book.topic_of(self._kafka.group_name)

    def close(self) -> None:
        """Drop the connection to the brokers."""
        self._ids.close()

    def is_another(self) -> bool:
        """Return whether the topic is another one than the group consumed; False where it consumed none yet.

        Raises:
            UnavailableError: A server is away, or there is no such topic.
            RefusedError: Credentials or rights.
        """
        known = self._book.topic_of(self._kafka.group_name)
        return known is not None and self._ids.of(self._kafka.topic) not in {known.topic_id, ""}

    def committed_partitions(self) -> frozenset[int]:
        """Return the partitions in which the group had a committed offset. Call it before the brokers are queried.

        Raises:
            UnavailableError: The store is away.
            RefusedError: Credentials or rights.
        """
        known = self._book.topic_of(self._kafka.group_name)
        return frozenset() if known is None else known.committed

    def check(self, committed: Callable[[], Mapping[int, int | None]]) -> None:
        """Record the topic and the partitions with a committed offset, or check that neither is gone.

        Args:
            committed: Queries the brokers for the group's offsets, by partition; None for nothing.

        Raises:
            PermanentError: The topic is another one, or an offset is forgotten.
            UnavailableError: A server is away, or there is no such topic.
            RefusedError: Credentials or rights.
        """
        kafka = self._kafka
        found, partitions = self._ids.describe(kafka.topic)
        name = kafka.group_name
        known = self._book.keep_topic(name, found) if found else self._book.topic_of(name)
        self._is_known = known is not None
        if known is None:
            return
        if found and found != known.topic_id:
            raise self._gone(
                f"{kafka.topic} is another topic (id {found}) than the one that group {kafka.group_id} has consumed "
                f"(id {known.topic_id}): it was recreated, and changes of the old one may never have been applied."
            )
        # Queried after the record was read: another consumer may just have begun.
        offsets = committed()
        here = {partition for partition, offset in offsets.items() if offset is not None}
        if forgotten := (offsets.keys() - here) & known.committed:
            raise self._gone(
                f"{kafka.topic} partition {min(forgotten)}: the brokers have forgotten where group {kafka.group_id} "
                "was, as they do when it has no member for long: changes may be gone that were never applied."
            )
        if new := here - known.committed:
            self._book.record_committed(name, new)
        self._recorded |= here
        self._check_partitions(known.partitions, partitions)

    @property
    def is_waiting(self) -> bool:
        """Whether partitions that were added hold records, and wait for those of the others."""
        return bool(self._awaited)

    def _check_partitions(self, known: int | None, number: int) -> None:
        """Hold added partitions until the group has applied the backlog of the others.

        A key may have moved to one of them while its older changes are in the backlog of another one. The backlog ends
        where the others ended once the first record was in an added one: until then the producer may still write by the
        old number of partitions.
        """
        self.held = frozenset() if known is None else frozenset(range(known, number))
        if known is not None and self.held:
            backlog = read_backlog(self._kafka).partitions
            if not self._awaited and any(found.end for found in backlog if found.partition in self.held):
                self._awaited = {
                    found.partition: found.end if found.end > found.low else 0
                    for found in backlog
                    if found.partition < known
                }
                log.warning("partitions added; waiting for the others", held=sorted(self.held))
            committed = {found.partition: found.committed or 0 for found in backlog}
            if not self._awaited or any(committed[partition] < end for partition, end in self._awaited.items()):
                return
        if known != number:
            self._book.keep_partitions(self._kafka.group_name, number)
        self.held, self._awaited = frozenset(), {}

    def has_news(self, partitions: Iterable[int]) -> bool:
        """Return whether ``check`` has something to record, now that the group has an offset in these partitions."""
        return self._is_known and not self._recorded.issuperset(partitions)

    def _gone(self, problem: str) -> PermanentError:
        return PermanentError(
            problem,
            way_out="Take a new snapshot, and let a new group begin at the beginning; see docs/operate/runbook.md.",
        )


class TopicChecks:
    """When the topic of a consumer is checked.

    It is checked now and then, before the first write after partitions came, and once there is something to record.

    Args:
        guard: Checks the topic.
        consumer: The member of the group.
    """

    def __init__(self, guard: TopicGuard, consumer: TopicConsumer) -> None:
        self.guard = guard
        self.is_wanted = False
        """Whether anything was submitted since the topic was checked."""
        self._consumer = consumer
        self._next_at = 0.0

    @property
    def is_time(self) -> bool:
        """Whether the last check is long enough ago for another one."""
        return time.monotonic() >= self._next_at

    @property
    def is_due(self) -> bool:
        """Whether the topic is to be checked now, be it only to record that the group has an offset in it."""
        return self.is_wanted and self.is_time

    def assigned(self) -> None:
        """Have the topic checked before the next write, since partitions came."""
        self._next_at = 0.0

    def committed(self, partitions: Iterable[int]) -> None:
        """Have the topic checked if it is not recorded that the group has an offset in all these partitions."""
        if self.guard.has_news(partitions):
            self._next_at, self.is_wanted = 0.0, True

    def held(self) -> None:
        """Have the topic checked soon, since records of held partitions wait."""
        self._next_at = min(self._next_at, time.monotonic() + _HELD_SECONDS)

    def check(self) -> bool:
        """Check the topic; return whether partitions that were held may be applied from now on.

        Raises:
            PermanentError: The topic is another one, or an offset is forgotten.
            UnavailableError: A server is away, or there is no such topic.
            RefusedError: Credentials or rights.
        """
        held = self.guard.held
        consumer = self._consumer
        self.guard.check(lambda: consumer.committed(consumer.partitions or consumer.all_partitions()))
        self.is_wanted = self.guard.is_waiting
        self._next_at = time.monotonic() + (_HELD_SECONDS if self.is_wanted else _TOPIC_SECONDS)
        return bool(held and not self.guard.held)
