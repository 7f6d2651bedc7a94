"""Which topic a group consumes: one that was deleted and made again by the same name is another one.

Belongs here: keeping the id of a group's topic beside the users, and comparing. Not here: places within a topic.
Brokers forget a group's places with its topic, or take those that a consumer still commits for places in the new one:
neither tells that changes are gone. Where brokers give topics no ids nothing is kept, and nothing can be seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ghsync_dagster.domain.errors import PermanentError

if TYPE_CHECKING:
    from ghsync_dagster.stores.kafka import KafkaSettings
    from ghsync_dagster.stores.mongo import UserStore


def group_name(kafka: KafkaSettings) -> str:
    """Return what names the group and its topic in the database."""
    return f"{kafka.group_id}/{kafka.topic}"


class KnownTopic:
    """The topic of a group, and what is kept of it.

    Args:
        kafka: The group, the topic and the way to the brokers.
        store: Where the id is kept.
    """

    def __init__(self, kafka: KafkaSettings, store: UserStore) -> None:
        from ghsync_dagster.stores.kafka_topics import TopicIds
        from ghsync_dagster.stores.stream import StreamStore

        self._kafka = kafka
        self._ids = TopicIds(kafka)
        self._store = StreamStore(store)

    def reach(self) -> None:
        """Make the connections that ``see`` needs, so that it is quick.

        Raises:
            UnavailableError: A server is away, or there is no such topic.
            RefusedError: Credentials or rights.
        """
        self._ids.of(self._kafka.topic)
        self._store.topic_of(group_name(self._kafka))

    def close(self) -> None:
        """Drop the connection to the brokers."""
        self._ids.close()

    def is_another(self) -> bool:
        """Tell whether the topic is another than the one that the group consumed; False where it consumed none yet.

        Raises:
            UnavailableError: A server is away, or there is no such topic.
            RefusedError: Credentials or rights.
        """
        known = self._store.topic_of(group_name(self._kafka))
        return known is not None and self._ids.of(self._kafka.topic) not in {known, ""}

    def see(self) -> None:
        """Keep which topic the group consumes, or see that it is still the same.

        Raises:
            PermanentError: It is another one.
            UnavailableError: A server is away, or there is no such topic.
            RefusedError: Credentials or rights.
        """
        kafka = self._kafka
        found = self._ids.of(kafka.topic)
        if not found:
            return
        known = self._store.keep_topic(group_name(kafka), found)
        if found != known:
            raise PermanentError(
                f"{kafka.topic} is another topic (id {found}) than the one that group {kafka.group_id} has consumed "
                f"(id {known}): it was made anew, and changes of the old one may never have been applied.",
                way_out="Take a new snapshot, and let a new group begin at the beginning; see docs/operations.md.",
            )
