"""MongoDB: the book of repairs: the requests for users, their fences, and their outcomes.

Belongs here: single operations. Not here: their order, which is ``domain.repair``'s and ``cdc.stream``'s.

Two collections alongside the users: ``_ghsync_repairs`` has an entry a user, the newest request and the user's fence in
one; ``_ghsync_readings`` has the places in the binlog to which fences refer.
"""

from __future__ import annotations

import uuid
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pymongo import UpdateOne

from ghsync_dagster.chunks import CHUNK, chunks
from ghsync_dagster.domain.change import Position
from ghsync_dagster.domain.repair import Fence, Outcome, Reading, StoredUser
from ghsync_dagster.domain.user import MARKER_FIELD
from ghsync_dagster.stores.mongo.commands import KEYS, Commands, changed_where, limited
from ghsync_dagster.stores.mongo.guard import TimeLimit

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Mapping

    from ghsync_dagster.stores.mongo.commands import Document
    from ghsync_dagster.stores.mongo.users import UserStore
    from ghsync_dagster.stores.mongo.writer import UserWriter

_REQUESTED: Final = "requested"
_DONE: Final = "done"
_TOKENS_KEPT: Final = 20
"""How many requests for one user may wait for its outcome: each has replaced the one before."""
_READINGS: Final = 100
_TEXT: Final = 300
_COMMAND_SECONDS: Final = 60.0
"""How long a command on very many users may take."""
_FENCES_SECONDS: Final = 600.0
"""The same for reading all fences, which must be known before a batch is applied: a million take 13 s."""


class RepairProgress(NamedTuple):
    """The progress of one request.

    Attributes:
        open: Users that are not repaired yet.
        problem: Why the owner of some users cannot execute their requests now; empty if no reason is recorded.
    """

    open: int
    problem: str = ""


class RefusedUser(NamedTuple):
    """A user whose row the database refuses.

    Attributes:
        user_id: The user.
        why: The kind and the database's own message, shortened.
    """

    user_id: str
    why: str


class RepairRequests:
    """The requests for repairs, which any process may make.

    Args:
        store: The open store; its owner closes it.
    """

    def __init__(self, store: UserStore) -> None:
        self._store, self._users = store, store.users
        self._commands = Commands(TimeLimit(_COMMAND_SECONDS))
        self._repairs = self._commands.on(store.book("repairs"))
        self._readings = self._commands.on(store.book("readings"))

    def request(self, keys: Iterable[str]) -> str:
        """Request repairs of users; return the token that names this request. A user may be requested again."""
        token = uuid.uuid4().hex
        self._request(keys, token, is_awaited=True)
        return token

    def request_again(self, keys: Iterable[str]) -> None:
        """Request repairs of users that no caller waits for."""
        self._request(keys, uuid.uuid4().hex, is_awaited=False)

    def request_fenced(self, keys: Iterable[str]) -> None:
        """Request those of ``keys`` again that were repaired before."""
        if fenced := [key for part in chunks(keys) for key in self._fenced_among(part)]:
            self.request_again(fenced)

    def _request(self, keys: Iterable[str], token: str, *, is_awaited: bool) -> None:
        entry = {"state": _REQUESTED, "token": token, "requested_at": datetime.now(UTC)}
        update: Document = {"$set": entry, "$unset": {"problem": ""}}
        if is_awaited:
            update["$push"] = {"asked": {"$each": [token], "$slice": -_TOKENS_KEPT}}
        first = entry | ({"asked": [token]} if is_awaited else {})
        for part in chunks(keys):
            with self._commands.send("Reading repairs"):
                # Far cheaper than an upsert each.
                known = {found["_id"] for found in self._repairs.reads.find({"_id": {"$in": part}}, {"_id": 1})}
            new = [{"_id": key, **first} for key in part if key not in known]
            # Those that are not inserted were requested by another process meanwhile.
            known |= {entry["_id"] for entry in self._repairs.insert_new(new)}
            if known:
                self._repairs.update_all({"_id": {"$in": list(known)}}, update)

    def _fenced_among(self, keys: list[str]) -> list[str]:
        with self._commands.send("Reading fences"):
            found = self._repairs.reads.find({"_id": {"$in": keys}}, {"reading": 1})
            return [entry["_id"] for entry in found if entry.get("reading")]

    def progress(self, token: str) -> RepairProgress:
        """Return the progress of a request; the store reads open requests only."""
        group = {"_id": None, "open": {"$sum": 1}, "problem": {"$max": "$problem"}}
        with self._commands.send("Reading repairs"):
            found = list(
                self._repairs.reads.aggregate([{"$match": {"state": _REQUESTED, "asked": token}}, {"$group": group}])
            )
        return RepairProgress(found[0]["open"], found[0].get("problem") or "") if found else RepairProgress(0)

    def outcomes(self, token: str) -> Counter[Outcome]:
        """Return the outcomes of a request, for the users that are repaired."""
        match = {"state": _DONE, "asked": token}
        with self._commands.send("Reading repairs"):
            # The server counts, as there may be many users.
            found = self._repairs.reads.aggregate(
                [{"$match": match}, {"$group": {"_id": "$outcome", "users": {"$sum": 1}}}]
            )
            return Counter({Outcome(outcome["_id"]): outcome["users"] for outcome in found})

    def is_any_open(self) -> bool:
        """Return whether any request is open."""
        with self._commands.send("Reading repairs"):
            return self._repairs.reads.find_one({"state": _REQUESTED}, {"_id": 1}) is not None

    def refused_users(self, token: str, limit: int) -> list[RefusedUser]:
        """Return users of a request whose row the database refuses."""
        with self._commands.send("Reading repairs"):
            found = self._repairs.reads.find({"asked": token, "outcome": Outcome.REFUSED.value, "state": _DONE}).limit(
                limit
            )
            return [RefusedUser(entry["_id"], entry.get("text", "")) for entry in found]

    def open_requests(self, limit: int, leave_out: Iterable[str] = ()) -> dict[str, str]:
        """Return the token of each user with an open request."""
        others = set(leave_out)
        found: dict[str, str] = {}
        with self._commands.send("Reading repairs"):
            cursor = self._repairs.reads.find({"state": _REQUESTED}, {"token": 1}).limit(limit + len(others))
            for entry in cursor:
                if entry["_id"] not in others and len(found) < limit:
                    found[entry["_id"]] = entry["token"]
        return found

    def record_problem(self, keys: Iterable[str], problem: str) -> None:
        """Record why requests cannot be executed now, for the callers that wait for them."""
        for part in chunks(keys):
            self._repairs.update_all({"_id": {"$in": part}}, {"$set": {"problem": problem[:_TEXT]}})

    def stored_users(self, keys: Iterable[str]) -> dict[str, StoredUser]:
        """Return what is stored of users: their document first, then version entry and deletion."""
        return self._stored_users(self._commands, keys)

    def _stored_users(self, commands: Commands, keys: Iterable[str]) -> dict[str, StoredUser]:
        found: dict[str, StoredUser] = {}
        for part in chunks(keys, KEYS):
            with commands.send("Reading users"):
                cursor = self._users.find({"user_id": {"$in": part}}, {"_id": 0, "user_id": 1, MARKER_FIELD: 1})
                documents = {user["user_id"]: MARKER_FIELD in user for user in cursor}
            versioned, deleted = (commands.among(self._store.book(book), part) for book in ("versions", "deleted"))
            for key in part:
                found[key] = StoredUser(key in documents, documents.get(key, False), key in versioned, key in deleted)
        return found

    def newest_of(self, key: str) -> Document | None:
        """Return the newest request for a user with its outcome; None if there is none."""
        with self._commands.send("Reading repairs"):
            fields = {"_id": 0, "state": 1, "outcome": 1, "requested_at": 1, "at": 1, "text": 1, "problem": 1}
            found: Document | None = self._repairs.reads.find_one({"_id": key}, fields)
        return found

    def fences(self) -> dict[str, Fence]:
        """Return the fence of each user that has one."""
        with limited("Reading fences", _FENCES_SECONDS):
            readings = {found["_id"]: _reading(found) for found in self._readings.reads.find({})}
            if not readings:
                return {}
            cursor = self._repairs.reads.find({}, {"reading": 1, "has_row": 1}, batch_size=CHUNK)
            return {
                entry["_id"]: Fence(readings[name], entry.get("has_row", True))
                for entry in cursor
                if (name := entry.get("reading")) in readings
            }

    def has_fences(self) -> bool:
        """Return whether there is any fence."""
        with self._commands.send("Reading fences"):
            return self._readings.reads.find_one({}, {"_id": 1}) is not None

    def drop_fences(self, is_over: Callable[[Reading], bool], kept_seconds: float) -> int:
        """Drop readings that are no longer needed, with the closed requests that refer to them.

        Args:
            is_over: Returns whether no record from before a reading can arrive any more.
            kept_seconds: How old a reading must be.

        Returns:
            How many readings were dropped.
        """
        # Callers that wait for an outcome have read it by then.
        before = datetime.now(UTC) - timedelta(seconds=kept_seconds)
        with self._commands.send("Reading fences"):
            old = self._readings.reads.find({"at": {"$lt": before}})
            over = [reading.id for found in old if is_over(reading := _reading(found))]
        for part in chunks(over, _READINGS):
            self._repairs.delete({"reading": {"$in": part}, "state": _DONE})
            self._readings.delete({"_id": {"$in": part}})
        return len(over)


class RepairWriter(RepairRequests):
    """The requests, with the fences and outcomes that their owner writes under its guard.

    Args:
        users: Writes the users under the owner's guard.
    """

    def __init__(self, users: UserWriter) -> None:
        super().__init__(users.store)
        self.users = users
        self._owned = users.commands.on(self._repairs.reads)
        self._owned_readings = users.commands.on(self._readings.reads)

    def stored_users(self, keys: Iterable[str]) -> dict[str, StoredUser]:
        """Return what is stored of users: their document first, then version entry and deletion."""
        return self._stored_users(self.users.commands, keys)

    def record_fence(self, requests: Mapping[str, str], reading: Reading, rows: Container[str]) -> set[str]:
        """Give users the fence of a reading, if their request is still open with its token.

        Args:
            requests: The token of each user.
            reading: What was read.
            rows: The users that have a row.

        Returns:
            The users that have the fence now.
        """
        position = reading.position
        fields = {
            "server": position.server,
            "file": position.file,
            "pos": position.pos,
            "gtids": reading.gtids,
            "read_ms": reading.read_ms,
            "at": datetime.now(UTC),
        }
        self._owned_readings.update({"_id": reading.id}, {"$set": fields}, upsert=True)
        for has_row in (True, False):
            of_kind = {key: token for key, token in requests.items() if (key in rows) == has_row}
            for token, keys in _by_token(of_kind):
                is_open = {"$and": [{"$eq": ["$token", token]}, {"$eq": ["$state", _REQUESTED]}]}
                self._owned.update_all(
                    {"_id": {"$in": keys}}, changed_where(is_open, {"reading": reading.id, "has_row": has_row})
                )
        with self.users.commands.send("Reading fences"):
            found = self._owned.reads.find({"_id": {"$in": list(requests)}}, {"reading": 1})
            return {entry["_id"] for entry in found if entry.get("reading") == reading.id}

    def record_outcomes(
        self, requests: Mapping[str, str], outcome: Outcome, fences: Mapping[str, Fence | None]
    ) -> None:
        """Close requests whose token is still the same.

        Args:
            requests: The token of each user.
            outcome: The outcome of the repairs.
            fences: The fence of a user from now on, or None to remove it: an earlier owner's late command may have
                changed it. A user that is not in it keeps its own.
        """
        closed: Document = {
            "state": _DONE,
            "outcome": outcome.value,
            "at": datetime.now(UTC),
            "text": "",
            "problem": "",
        }
        alike: dict[tuple[bool, Fence | None], dict[str, str]] = {}
        for key, token in requests.items():
            alike.setdefault((key in fences, fences.get(key)), {})[key] = token
        for (has_changed, fence), of_kind in alike.items():
            fields = dict(closed)
            if has_changed:
                fields["reading"], fields["has_row"] = (fence.reading.id, fence.has_row) if fence else (None, None)
            for token, keys in _by_token(of_kind):
                is_same = {"$eq": ["$token", token]}
                self._owned.update_all({"_id": {"$in": keys}}, changed_where(is_same, fields))

    def record_reasons(self, reasons: Mapping[str, str]) -> None:
        """Record in closed requests why the database refused their users."""
        for part in chunks(reasons.items()):
            self._owned.bulk([UpdateOne({"_id": key}, {"$set": {"text": why[:_TEXT]}}) for key, why in part])


def _by_token(requests: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Yield the users of each token, at most ``CHUNK`` at once."""
    keys: dict[str, list[str]] = {}
    for key, token in requests.items():
        keys.setdefault(token, []).append(key)
    for token, of_token in keys.items():
        for part in chunks(of_token):
            yield token, part


def _reading(found: Mapping[str, Any]) -> Reading:
    position = Position(found["file"], found["pos"], 0, found["server"])
    return Reading(found["_id"], position, found["gtids"], found.get("read_ms"))
