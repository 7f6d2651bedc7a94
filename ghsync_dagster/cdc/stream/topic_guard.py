"""Which topic a group consumes: one that was deleted and made again by the same name is another one.

Belongs here: keeping the id of a group's topic, how many partitions it had, and in which of them the group had a
committed offset, and comparing. Not here: the offsets themselves. Brokers forget a group's offsets with its topic, or
take those that a consumer still commits for offsets in the new one. They also forget those of a group that was without
a member for ``offsets.retention.minutes``. None of it shows that changes are gone. Where brokers give topics no ids
nothing is kept, and nothing can be seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ghsync_dagster.domain.errors import PermanentError
from ghsync_dagster.logging import get_logger
from ghsync_dagster.stores.kafka.backlog import read_backlog

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from ghsync_dagster.stores.kafka.client import KafkaSettings
    from ghsync_dagster.stores.mongo.users import UserStore

log = get_logger("cdc")


class TopicGuard:
    """The topic of a group, and what is kept of it.

    Args:
        kafka: The group, the topic and the way to the brokers.
        store: Where the id is kept.
    """

    def __init__(self, kafka: KafkaSettings, store: UserStore) -> None:
        from ghsync_dagster.stores.kafka.topics import TopicIds
        from ghsync_dagster.stores.mongo.books import GroupBook

        self._kafka = kafka
        self._ids = TopicIds(kafka)
        self._book = GroupBook(store)
        self._kept: set[int] = set()
        self.held: frozenset[int] = frozenset()
        """Partitions that were added, of which nothing may be applied yet."""
        self._awaited: dict[int, int] = {}
        self._is_known = True

    def reach(self) -> None:
        """Make the connections that ``see`` needs, so that it is quick.

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
        """Return whether the topic is another than the one that the group consumed; False where it consumed none yet.

        Raises:
            UnavailableError: A server is away, or there is no such topic.
            RefusedError: Credentials or rights.
        """
        known = self._book.topic_of(self._kafka.group_name)
        return known is not None and self._ids.of(self._kafka.topic) not in {known.topic_id, ""}

    def placed(self) -> frozenset[int]:
        """Return the partitions in which the group has had a place; ask before the brokers are asked for the places.

        Raises:
            UnavailableError: The store is away.
            RefusedError: Credentials or rights.
        """
        known = self._book.topic_of(self._kafka.group_name)
        return frozenset() if known is None else known.placed

    def see(self, committed: Callable[[], Mapping[int, int | None]]) -> None:
        """Keep which topic the group consumes and where it has a place, or see that neither is gone.

        Args:
            committed: Asks the brokers for the group's places, by partition; None for nothing.

        Raises:
            PermanentError: The topic is another one, or a place is forgotten.
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
        # Asked for after what is kept was read: another consumer may just have begun.
        places = committed()
        here = {partition for partition, offset in places.items() if offset is not None}
        if forgotten := (places.keys() - here) & known.placed:
            raise self._gone(
                f"{kafka.topic} partition {min(forgotten)}: the brokers have forgotten where group {kafka.group_id} "
                "was, as they do when it has no member for long: changes may be gone that were never applied."
            )
        if new := here - known.placed:
            self._book.keep_places(name, new)
        self._kept |= here
        self._see_partitions(known.partitions, partitions)

    @property
    def is_waiting(self) -> bool:
        """Whether partitions that were added hold records, and wait for those of the others."""
        return bool(self._awaited)

    def _see_partitions(self, known: int | None, number: int) -> None:
        """Hold added partitions until the group has applied what the others held once the first record was in them.

        A key may have moved to one of them, and its older changes be in the backlog of another one. Until there is a
        record in an added partition, the producer may still write by the old number.
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

    def is_to_keep(self, partitions: Iterable[int]) -> bool:
        """Return whether ``see`` has something to keep, the group having a place in these partitions now."""
        return self._is_known and not self._kept.issuperset(partitions)

    def _gone(self, problem: str) -> PermanentError:
        return PermanentError(
            problem,
            way_out="Take a new snapshot, and let a new group begin at the beginning; see docs/operate/runbook.md.",
        )
