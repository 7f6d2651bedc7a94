"""MongoDB: the books of a consumer group, and of leases. Any process may write them, each entry by itself.

Belongs here: single operations. Not here: what a lease or a rewind means.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from ghsync_dagster.stores.mongo.client import LEASES
from ghsync_dagster.stores.mongo.commands import Commands
from ghsync_dagster.stores.mongo.guard import TimeLimit

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime

    from ghsync_dagster.stores.mongo.users import UserStore

_GROUP_SECONDS: Final = 3.0
"""How long a command may take that a consumer sends between its batches."""
_LEASE_SECONDS: Final = 30.0


class Rewind(NamedTuple):
    """A request to the owner of a partition, to consume it again.

    Attributes:
        offset: The offset to seek to.
        token: Names the newest request. Of several requests the earliest offset counts.
    """

    offset: int
    token: str | None


class RecordedTopic(NamedTuple):
    """What is recorded of the topic that a group consumes.

    Attributes:
        topic_id: The topic's id.
        committed: The partitions in which the group has had a committed offset.
        partitions: How many partitions the group consumes; None if that is not recorded yet.
    """

    topic_id: str
    committed: frozenset[int]
    partitions: int | None = None


class Truncated(NamedTuple):
    """The position of a truncate in a topic of several partitions.

    Attributes:
        partition: Its partition.
        offset: Its offset.
        stops: The first offset of each partition that comes after it.
    """

    partition: int
    offset: int
    stops: Mapping[int, int]


class GroupBook:
    """What a consumer group stores besides its offsets: rewind requests, the last truncate, the topic.

    Args:
        store: The open store; its owner closes it.
    """

    def __init__(self, store: UserStore) -> None:
        self._commands = Commands(TimeLimit(_GROUP_SECONDS))
        on = self._commands.on
        self._rewinds, self._truncates = on(store.book("rewinds")), on(store.book("truncates"))
        self._topics = on(store.book("topics"))

    def request_rewind(self, offsets: Mapping[str, int]) -> None:
        """Request that partitions, by name, are consumed again from an offset on."""
        for name, offset in offsets.items():
            request = {"$min": {"offset": offset}, "$set": {"token": uuid.uuid4().hex}}
            self._rewinds.update({"_id": name}, request, upsert=True)

    def pending_rewinds(self, names: Sequence[str]) -> dict[str, Rewind]:
        """Return the requests for partitions, by name."""
        with self._commands.send("Reading rewind requests"):
            found = self._rewinds.reads.find({"_id": {"$in": list(names)}})
            return {request["_id"]: Rewind(request["offset"], request.get("token")) for request in found}

    def clear_rewind(self, name: str, rewind: Rewind) -> None:
        """Delete a request that was executed, unless another one was made meanwhile."""
        # None stands for a request that has no token.
        self._rewinds.delete({"_id": name, "offset": rewind.offset, "token": rewind.token})

    def keep_truncate(self, name: str, truncated: Truncated) -> None:
        """Store the position of a truncate in a topic of several partitions; it replaces the previous one."""
        stops = {str(partition): stop for partition, stop in truncated.stops.items()}
        fields = {"partition": truncated.partition, "offset": truncated.offset, "stops": stops}
        self._truncates.replace({"_id": name}, fields, upsert=True)

    def last_truncate(self, name: str) -> Truncated | None:
        """Return the position of the last truncate that was stored."""
        with self._commands.send("Reading a truncate's place"):
            found = self._truncates.reads.find_one({"_id": name})
        if found is None:
            return None
        stops = {int(partition): stop for partition, stop in found["stops"].items()}
        return Truncated(found["partition"], found["offset"], stops)

    def topic_of(self, name: str) -> RecordedTopic | None:
        """Return the topic that a group, by name, consumes; None if none is recorded."""
        with self._commands.send("Reading a group's topic"):
            found = self._topics.reads.find_one({"_id": name})
        if found is None:
            return None
        return RecordedTopic(found["topic_id"], frozenset(map(int, found.get("placed", ()))), found.get("partitions"))

    def keep_topic(self, name: str, topic_id: str) -> RecordedTopic:
        """Record the id of the topic that a group consumes, unless there is one; return what is recorded."""
        known = self.topic_of(name)
        if known is None:
            self._topics.insert({"_id": name, "topic_id": topic_id})
            known = self.topic_of(name)
        return known or RecordedTopic(topic_id, frozenset())

    def record_committed(self, name: str, partitions: Iterable[int]) -> None:
        """Record that a group, whose topic is recorded, has a committed offset in these partitions."""
        self._topics.update({"_id": name}, {"$set": {f"placed.{partition}": True for partition in partitions}})

    def keep_partitions(self, name: str, number: int) -> None:
        """Record how many partitions a group, whose topic is recorded, consumes."""
        self._topics.update({"_id": name}, {"$max": {"partitions": number}})


@dataclass(frozen=True, slots=True)
class Lease:
    """The holder of the collection for loading, and the end of the lease by the server's clock.

    Attributes:
        token: Names this lease of this holder.
        holder: The process that holds it.
        writer: Another process that writes for the holder and may outlive it: Spark's driver.
        expires_at: When another process may acquire it.
    """

    token: str
    holder: str
    expires_at: datetime
    writer: str | None = None


class LeaseBook:
    """The leases of a database, by name.

    Args:
        store: The open store; its owner closes it.
    """

    def __init__(self, store: UserStore) -> None:
        self._client = store.client
        self._commands = Commands(TimeLimit(_LEASE_SECONDS))
        self._leases = self._commands.on(store.database[LEASES])

    def server_time(self) -> datetime:
        """Return the server's time, by which leases expire."""
        with self._commands.send("Asking the server's time"):
            # Without the options it would be a time without zone, which can't be compared with a lease's end.
            answer = self._client.admin.command("hello", codec_options=self._client.codec_options)
        now: datetime = answer["localTime"]
        return now

    def current(self, name: str) -> Lease | None:
        """Return the present lease; None if nobody holds it."""
        with self._commands.send("Reading the lease"):
            found = self._leases.reads.find_one({"_id": name})
        return Lease(found["token"], found["holder"], found["expires_at"], found.get("writer")) if found else None

    def acquire(self, name: str, lease: Lease, *, instead_of: Lease | None) -> bool:
        """Acquire a lease that nobody holds, or replace an unrenewed ``instead_of``; return whether it worked."""
        document = {"token": lease.token, "holder": lease.holder, "expires_at": lease.expires_at}
        if instead_of is None:
            return self._leases.insert({"_id": name, **document})
        unrenewed = {"_id": name, "token": instead_of.token, "expires_at": instead_of.expires_at}
        return self._leases.replace(unrenewed, document)

    def name_writer(self, name: str, token: str, writer: str) -> bool:
        """Name a process that writes for the holder; return whether ``token`` still holds the lease."""
        return self._leases.update({"_id": name, "token": token}, {"$set": {"writer": writer}})

    def extend(self, name: str, token: str, expires_at: datetime) -> bool:
        """Move a lease's end; return whether ``token`` still holds it."""
        return self._leases.update({"_id": name, "token": token}, {"$set": {"expires_at": expires_at}})

    def release(self, name: str, token: str) -> None:
        """Release a lease, if ``token`` still holds it."""
        self._leases.delete({"_id": name, "token": token})
