"""MongoDB as repairs use it: who asked for which user, the fences, and what came of it.

Belongs here: single operations. Not here: their order, which is ``domain.repair``'s and ``cdc.repair``'s.

Two collections beside the users: ``_ghsync_repairs`` has an entry a user, the newest request and the user's fence in
one; ``_ghsync_readings`` has the places in the binlog to which fences refer.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pymongo import UpdateOne

from ghsync_dagster.domain.change import Position
from ghsync_dagster.domain.repair import Fence, Outcome, Reading, StoredUser
from ghsync_dagster.domain.user import MARKER_FIELD
from ghsync_dagster.stores.mongo import CHUNK, chunks, mongo_errors
from ghsync_dagster.stores.stream import StreamStore, limited

if TYPE_CHECKING:
    from ghsync_dagster.stores.mongo import Document, UserStore

_REQUESTED: Final = "requested"
_DONE: Final = "done"
_ASKED_KEPT: Final = 20
"""How many of the requests for a user, of which each had others before it, are told what became of it."""
_READINGS: Final = 100
_TEXT: Final = 300
_LIST_SECONDS: Final = 60.0
"""How long a command may take that is about very many users."""
_FENCES_SECONDS: Final = 600.0
"""The same for all fences, without which no batch may be applied: a million take 13 s."""


class RepairProgress(NamedTuple):
    """How far the users of one request are.

    Attributes:
        outcomes: Users by what their repair came to.
        problem: Why the owner of some users cannot carry their requests out now; empty where nothing is known.
    """

    outcomes: Mapping[Outcome, int]
    problem: str = ""

    @property
    def done(self) -> int:
        """Users that are repaired, or whose row the database refuses."""
        return sum(self.outcomes.values())


class RefusedUser(NamedTuple):
    """A user whose row the database refuses.

    Attributes:
        user_id: The user.
        why: The kind and the database's own words, cut to size.
    """

    user_id: str
    why: str


class RepairStore(StreamStore):
    """The users' collection as the stream writes it, with the requests and fences of repairs.

    Args:
        store: The open store; its owner closes it.
        may_write: Called before each command, see ``StreamStore``.
    """

    def __init__(self, store: UserStore, *, may_write: Callable[[], float] | None = None) -> None:
        super().__init__(store, **({} if may_write is None else {"may_write": may_write}))
        self._repairs = store.repairs
        self._readings = store.companion("readings")

    # Asking, which anybody may do

    def request(self, keys: Iterable[str]) -> str:
        """Request repairs of users; return the token that names this request. A user may be requested again."""
        token = uuid.uuid4().hex
        self._request(keys, token, {"$push": {"asked": {"$each": [token], "$slice": -_ASKED_KEPT}}})
        return token

    def request_again(self, keys: Iterable[str]) -> None:
        """Have users repaired once more, on behalf of nobody who waits."""
        self._request(keys, uuid.uuid4().hex, {})

    def request_fenced(self, keys: Iterable[str]) -> None:
        """Request those of ``keys`` again that were repaired before."""
        if fenced := [key for part in chunks(keys) for key in self._fenced_among(part)]:
            self.request_again(fenced)

    def _request(self, keys: Iterable[str], token: str, more: Document) -> None:
        update = {
            "$set": {"state": _REQUESTED, "token": token, "requested_at": datetime.now(UTC)},
            "$unset": {"problem": ""},
            **more,
        }
        with limited("Requesting repairs", _LIST_SECONDS):
            for part in chunks(keys):
                self._repairs.bulk_write([UpdateOne({"_id": key}, update, upsert=True) for key in part], ordered=False)

    def _fenced_among(self, keys: list[str]) -> list[str]:
        with mongo_errors("Reading fences"):
            found = self._repairs.find({"_id": {"$in": keys}}, {"reading": 1})
            return [entry["_id"] for entry in found if "reading" in entry]

    def progress(self, token: str) -> RepairProgress:
        """Return how far the users of a request are."""
        group = {
            "_id": {"state": "$state", "outcome": "$outcome"},
            "users": {"$sum": 1},
            "problem": {"$max": "$problem"},
        }
        outcomes: Counter[Outcome] = Counter()
        problem = ""
        with mongo_errors("Reading repairs"):
            # A long list of users is counted by the server.
            for found in self._repairs.aggregate([{"$match": {"asked": token}}, {"$group": group}]):
                if found["_id"].get("state") == _DONE:
                    outcomes[Outcome(found["_id"]["outcome"])] += found["users"]
                else:
                    problem = found.get("problem") or problem
        return RepairProgress(outcomes, problem)

    def is_any_open(self) -> bool:
        """Tell whether any user is still to be repaired."""
        with mongo_errors("Reading repairs"):
            return self._repairs.find_one({"state": _REQUESTED}, {"_id": 1}) is not None

    def refused_users(self, token: str, limit: int) -> list[RefusedUser]:
        """Return users of a request whose row the database refuses."""
        with mongo_errors("Reading repairs"):
            found = self._repairs.find({"asked": token, "outcome": Outcome.REFUSED.value, "state": _DONE}).limit(limit)
            return [RefusedUser(entry["_id"], entry.get("text", "")) for entry in found]

    # Carrying out, which is the owner's alone

    def open_requests(self, limit: int, leave_out: Iterable[str] = ()) -> dict[str, str]:
        """Return the token of each user that is still to be repaired."""
        others = set(leave_out)
        found: dict[str, str] = {}
        with mongo_errors("Reading repairs"):
            cursor = self._repairs.find({"state": _REQUESTED}, {"token": 1}).limit(limit + len(others))
            for entry in cursor:
                if entry["_id"] not in others and len(found) < limit:
                    found[entry["_id"]] = entry["token"]
        return found

    def note_problem(self, keys: Iterable[str], problem: str) -> None:
        """Note why requests cannot be carried out now, for who waits for them."""
        with mongo_errors("Noting a problem"):
            for part in chunks(keys):
                self._repairs.update_many({"_id": {"$in": part}}, {"$set": {"problem": problem[:_TEXT]}})

    def stored_users(self, keys: Iterable[str]) -> dict[str, StoredUser]:
        """Return what is stored of users: their document first, then version entry and deletion."""
        found: dict[str, StoredUser] = {}
        for part in chunks(keys):
            with self._command("Reading users"):
                cursor = self.store.users.find({"user_id": {"$in": part}}, {"_id": 0, "user_id": 1, MARKER_FIELD: 1})
                documents = {user["user_id"]: MARKER_FIELD in user for user in cursor}
            versioned = self._among(self.store.versions, part, "versions")
            deleted = self._among(self.store.deleted, part, "deletions")
            for key in part:
                found[key] = StoredUser(key in documents, documents.get(key, False), key in versioned, key in deleted)
        return found

    def record_fence(self, requests: Mapping[str, str], reading: Reading, rows: Container[str]) -> set[str]:
        """Let users have the fence of a reading, where their request is still open with its token.

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
        with self._command("Recording fences"):
            self._readings.update_one({"_id": reading.id}, {"$set": fields}, upsert=True)
        for has_row in (True, False):
            of_kind = {key: token for key, token in requests.items() if (key in rows) == has_row}
            for token, keys in _by_token(of_kind):
                with self._command("Recording fences"):
                    self._repairs.update_many(
                        {"_id": {"$in": keys}, "token": token, "state": _REQUESTED},
                        {"$set": {"reading": reading.id, "has_row": has_row}},
                    )
        with self._command("Reading fences"):
            found = self._repairs.find({"_id": {"$in": list(requests)}}, {"reading": 1})
            return {entry["_id"] for entry in found if entry.get("reading") == reading.id}

    def record_outcomes(
        self, requests: Mapping[str, str], outcome: Outcome, fences: Mapping[str, Fence | None]
    ) -> None:
        """Close requests, where their token is still the same.

        Args:
            requests: The token of each user.
            outcome: What the repairs came to.
            fences: What fence a user has from now on: an earlier owner's command may have come late in between. None
                takes it away. A user that is not there keeps its own.
        """
        closed: Document = {"state": _DONE, "outcome": outcome.value, "at": datetime.now(UTC)}
        alike: dict[tuple[bool, Fence | None], dict[str, str]] = {}
        for key, token in requests.items():
            alike.setdefault((key in fences, fences.get(key)), {})[key] = token
        for (has_changed, fence), of_kind in alike.items():
            update: Document = {"$set": dict(closed), "$unset": {"text": "", "problem": ""}}
            if fence is not None:
                update["$set"] |= {"reading": fence.reading.id, "has_row": fence.has_row}
            elif has_changed:
                update["$unset"] |= {"reading": "", "has_row": ""}
            for token, keys in _by_token(of_kind):
                with self._command("Recording outcomes"):
                    self._repairs.update_many({"_id": {"$in": keys}, "token": token}, update)

    def record_reasons(self, reasons: Mapping[str, str]) -> None:
        """Add to closed requests why the database refused their users."""
        for part in chunks(reasons.items()):
            with self._command("Recording outcomes"):
                self._repairs.bulk_write(
                    [UpdateOne({"_id": key}, {"$set": {"text": why[:_TEXT]}}) for key, why in part], ordered=False
                )

    def fences(self) -> dict[str, Fence]:
        """Return the fence of each user that has one."""
        with limited("Reading fences", _FENCES_SECONDS):
            readings = {found["_id"]: _reading(found) for found in self._readings.find({})}
            if not readings:
                return {}
            cursor = self._repairs.find({}, {"reading": 1, "has_row": 1}, batch_size=CHUNK)
            return {
                entry["_id"]: Fence(readings[name], entry.get("has_row", True))
                for entry in cursor
                if (name := entry.get("reading")) in readings
            }

    def has_fences(self) -> bool:
        """Tell whether there is any fence."""
        with mongo_errors("Reading fences"):
            return self._readings.find_one({}, {"_id": 1}) is not None

    def drop_fences(self, is_over: Callable[[Reading], bool], kept_seconds: float) -> int:
        """Drop readings that nothing needs any more, with the closed requests that refer to them.

        Args:
            is_over: Says of a reading whether no record from before it can come any more.
            kept_seconds: How old a reading must be.

        Returns:
            How many readings were dropped.
        """
        # Who waits for an outcome has read it by then.
        before = datetime.now(UTC) - timedelta(seconds=kept_seconds)
        with mongo_errors("Dropping fences"):
            old = self._readings.find({"at": {"$lt": before}})
            over = [reading.id for found in old if is_over(reading := _reading(found))]
            for part in chunks(over, _READINGS):
                self._repairs.delete_many({"reading": {"$in": part}, "state": _DONE})
                self._readings.delete_many({"_id": {"$in": part}})
        return len(over)


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
