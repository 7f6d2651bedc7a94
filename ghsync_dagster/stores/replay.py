"""MongoDB as the replay of dead letters writes it: adopted documents, and the record of what was replayed.

Belongs here: single operations. Not here: their order, which is ``domain.replay``'s and ``cdc.replay``'s. Filters name
one indexed field only; conditions stand in the updates, see ``stores.mongo``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from msgspec.structs import astuple
from pymongo import UpdateOne

from ghsync_dagster.domain.change import Position
from ghsync_dagster.domain.user import MARKER_FIELD, MARKER_VALUE, USER_FIELDS, User
from ghsync_dagster.stores.mongo import CHUNK, chunks, mongo_errors
from ghsync_dagster.stores.stream import StreamStore

if TYPE_CHECKING:
    from pymongo.collection import Collection

    from ghsync_dagster.stores.mongo import Document, UserStore
    from ghsync_dagster.stores.stream import Refused

_MARKED: Final = {MARKER_FIELD: MARKER_VALUE}


class LetterState(StrEnum):
    """How far the replay of a dead letter is."""

    OPEN = "open"
    """It is to be replayed still."""

    REPLAYING = "replaying"
    """A replay began to write it: perhaps it is applied, perhaps not. To be replayed still."""

    REPLAYED = "replayed"
    """It was applied."""

    SKIPPED = "skipped"
    """It need not be applied any more."""

    @property
    def is_open(self) -> bool:
        """Whether somebody still has to do something."""
        return self in (LetterState.OPEN, LetterState.REPLAYING)


@dataclass(frozen=True, slots=True)
class Resolution:
    """What replays recorded of one dead letter.

    Attributes:
        id: The letter's id.
        topic: The topic of its record.
        partition: The partition of its record.
        offset: The offset of its record.
        topic_id: The id of that topic, of which there may be another one by that name later.
        failed_at: When the letter was made: another letter with the same id is open again.
        state: How far its replay is.
        reason: Why, in words.
        keys: The users that replays of it wrote to, or began to.
        position: The record's place in the binlog, None where unknown.
    """

    id: str
    topic: str
    partition: int
    offset: int
    topic_id: str
    failed_at: str
    state: LetterState
    reason: str
    keys: tuple[str, ...] = ()
    position: Position | None = None

    def as_update(self) -> UpdateOne:
        """Return it as an update."""
        position = self.position
        fields = {
            "topic": self.topic,
            "partition": self.partition,
            "offset": self.offset,
            "topic_id": self.topic_id,
            "failed_at": self.failed_at,
            "state": self.state.value,
            "reason": self.reason,
            "position": None if position is None else [*astuple(position)],
            "keys": [*self.keys],
            "at": datetime.now(UTC),
        }
        return UpdateOne({"_id": self.id}, {"$set": fields}, upsert=True)


class ReplayStore(StreamStore):
    """The users' collection as replays write it, with what they recorded.

    Args:
        store: The open store; its owner closes it.
        may_write: Called before each command, see ``StreamStore``.
    """

    def __init__(self, store: UserStore, *, may_write: Callable[[], float]) -> None:
        super().__init__(store, may_write=may_write)
        self._replayed = replayed_letters(store)

    def record(self, resolutions: Iterable[Resolution]) -> None:
        """Record how far the replays of letters are."""
        for part in chunks(resolutions):
            with self._command("Recording replays"):
                self._replayed.bulk_write([resolution.as_update() for resolution in part], ordered=False)

    def log_old(self, documents: Iterable[Document], load: str) -> None:
        """Log documents under a load's id, so that recovery can put them back."""
        for part in chunks(documents):
            with self._command("Logging users"):
                self.store.undo.insert_many(
                    [{"_id": user["user_id"], "user": user, "load": load} for user in part], ordered=False
                )

    def mark(self, documents: Iterable[Document]) -> None:
        """Put the marker on the documents that still are exactly so, and unmarked."""
        self._send({user["user_id"]: _replace(user, {**user, **_MARKED}, marked=False) for user in documents})

    def insert_marked(self, users: Mapping[str, User]) -> dict[str, Refused]:
        """Insert users, marked, where there is none; return why the database refuses some."""
        return self._send(
            {
                key: UpdateOne(
                    {"user_id": key},
                    {"$setOnInsert": {name: user[name] for name in USER_FIELDS[1:]} | _MARKED},
                    upsert=True,
                )
                for key, user in users.items()
            }
        )

    def write_marked(self, changes: Mapping[str, tuple[User, User]]) -> dict[str, Refused]:
        """For each ``(old, new)`` replace what is still exactly ``old``, and marked, by ``new``, unmarked.

        Returns:
            Why the database refused a user, by key; it kept what it had of that user.
        """
        return self._send({key: _replace(old, new, marked=True) for key, (old, new) in changes.items()})

    def delete_marked(self, keys: Iterable[str]) -> None:
        """Delete those of the users ``keys`` that still carry the marker."""
        for part in chunks(keys):
            with self._command("Deleting users"):
                self.store.users.delete_many({"user_id": {"$in": part}, **_MARKED})

    def _send(self, writes: Mapping[str, UpdateOne]) -> dict[str, Refused]:
        refused: dict[str, Refused] = {}
        for part in chunks(writes.items()):
            # One that loses against another insert of its key leaves that one alone, as it should.
            self._write_once(list(part), refused)
        return refused


def replayed_letters(store: UserStore) -> Collection[Document]:
    """Return the collection in which replays record what they did."""
    return store.database[f"{store.versions.name.removesuffix('versions')}replayed"]


def read_resolutions(store: UserStore) -> dict[str, Resolution]:
    """Return all that replays recorded, by letter."""
    with mongo_errors("Reading replays"):
        return {found["_id"]: _resolution(found) for found in replayed_letters(store).find({}, batch_size=CHUNK)}


def _resolution(found: Document) -> Resolution:
    return Resolution(
        id=found["_id"],
        topic=found["topic"],
        partition=found["partition"],
        offset=found["offset"],
        topic_id=found.get("topic_id", ""),
        failed_at=found.get("failed_at", ""),
        state=LetterState(found["state"]),
        reason=found["reason"],
        keys=tuple(found.get("keys", ())),
        position=None if found["position"] is None else Position(*found["position"]),
    )


def _replace(old: User, new: User, *, marked: bool) -> UpdateOne:
    fields: list[Document] = [{"$eq": [f"${name}", {"$literal": old.get(name)}]} for name in USER_FIELDS]
    condition: Document
    if marked:
        condition = {"$eq": [f"${MARKER_FIELD}", MARKER_VALUE]}
    else:
        condition = {"$eq": [{"$type": f"${MARKER_FIELD}"}, "missing"]}
    # $literal, because a text that starts with $ would be read as a field path.
    body = {"_id": "$_id", **{name: {"$literal": value} for name, value in new.items()}}
    return UpdateOne(
        {"user_id": old["user_id"]}, [{"$replaceWith": {"$cond": [{"$and": [*fields, condition]}, body, "$$ROOT"]}}]
    )
