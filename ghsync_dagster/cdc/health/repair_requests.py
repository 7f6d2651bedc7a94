"""Requests repairs: selects users, and waits until the owner of the partitions has carried the requests out.

Belongs here: what a person or a job asks for, and what became of it. Not here: carrying requests out
(``cdc.stream``); where nobody consumes, a consumer of this process does it for as long as it takes.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Final, NamedTuple

from ghsync_dagster.domain.change import Op
from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster.domain.letters import LetterState
from ghsync_dagster.domain.repair import Outcome, cure
from ghsync_dagster.logging import get_logger
from ghsync_dagster.stopping import killed_when_frozen

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from ghsync_dagster.cdc.stream.consume import ChangeConsumer
    from ghsync_dagster.stores.kafka.client import KafkaSettings
    from ghsync_dagster.stores.mongo.repairs import RefusedUser, RepairProgress, RepairRequests
    from ghsync_dagster.stores.mongo.users import UserStore
    from ghsync_dagster.stores.mysql import MySqlStore

SHOWN: Final = 20
_FIRST_POLL_SECONDS: Final = 0.1
_LONGEST_POLL_SECONDS: Final = 2.0
"""Counting the open requests costs the store time that the stream needs too."""
_ATTEMPTS: Final = 5
_STILL_SECONDS: Final = 60.0
"""After how long without a repaired user the waiting ends."""
_LONGEST_ID: Final = 100
_NO_PROBLEM: Final = "No consumer has reported why; read the log of the group's consumer."
IN_SYNC: Final = "in_sync"
"""The outcome of a dry run for a user whose document equals its row."""
_NO_USER_ID: Final = (
    "A document or row whose user_id is no whole number: remove it, or give it the right user_id; then audit again."
)
_SURPLUS: Final = (
    "Several documents of one user: remove all but one, and create the unique index; then repair the user."
)
_NAMELESS: Final = (
    "A dead letter that names no single user: look at it (ghsync dlq show ID), repair the users that it is about "
    "(--user-id), then close it (ghsync dlq close ID)."
)

log = get_logger("repair")


class Unrepairable(NamedTuple):
    """A fault that no repair can fix.

    Attributes:
        name: The ``user_id`` as the audit shows it, or the id of a dead letter.
        way_out: What to do by hand.
    """

    name: str
    way_out: str


@dataclass(frozen=True, slots=True)
class RepairReport:
    """The result of a request.

    Attributes:
        asked: How many users were requested.
        outcomes: Users by ``domain.repair.Outcome``; of a dry run the expected outcomes, and ``in_sync``.
        open: Users that are not repaired yet; their requests stay.
        refused: Up to 20 users whose row the database refuses.
        problem: Why users are open, where that is known.
        by_itself: Whether a consumer of this process carried requests out, as the group had no other.
        seconds: How long it took.
        planned: The expected outcome by id of each user that is not in sync; of a dry run only.
        dry_run: Whether nothing was requested.
        unrepairable: How many faults no repair can fix.
        by_hand: Up to 20 of these, by name.
        way_out: What to do about these by hand.
    """

    asked: int
    outcomes: dict[str, int]
    open: int = 0
    refused: Sequence[RefusedUser] = ()
    problem: str = ""
    by_itself: bool = False
    seconds: float = 0.0
    planned: Mapping[str, str] = field(default_factory=dict)
    dry_run: bool = False
    unrepairable: int = 0
    by_hand: Sequence[str] = ()
    way_out: str = ""

    @property
    def is_carried_out(self) -> bool:
        """Whether all chosen users are repaired and nothing is left to do by hand."""
        return not self.open and not self.outcomes.get(Outcome.REFUSED.value) and not self.unrepairable

    def with_unrepairable(self, found: Sequence[Unrepairable]) -> RepairReport:
        """Return the report with the faults that no repair can fix."""
        return replace(
            self,
            unrepairable=len(found),
            by_hand=tuple(one.name for one in found[:SHOWN]),
            way_out=" ".join(dict.fromkeys(one.way_out for one in found)),
        )

    def as_json(self) -> dict[str, object]:
        """Return the fields for JSON output; a dry run has no ``carried_out``."""
        carried_out = {} if self.dry_run else {"carried_out": self.is_carried_out}
        return {**asdict(self), "refused": [refused._asdict() for refused in self.refused], **carried_out}

    def summary(self) -> str:
        """Return the outcome in one line."""
        users = "1 user" if self.asked == 1 else f"{self.asked:,} users"
        found = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in sorted(self.outcomes.items()))
        by_hand = f"; {self.unrepairable:,} to be fixed by hand" if self.unrepairable else ""
        if self.dry_run:
            return f"dry run of {users}: would be {found or 'none'}{by_hand}; nothing was changed"
        still = f"; {self.open:,} still open" if self.open else ""
        by = " by a consumer of this command" if self.by_itself else ""
        return f"{users} asked for: {found or 'none repaired'}{still}{by_hand}; {self.seconds:.1f} s{by}"


def refuse_too_many(count: int, limit: int) -> None:
    """Refuse more users than the settings allow without confirmation.

    Raises:
        ConfigError: There are more.
    """
    if count > limit:
        raise ConfigError(
            f"{count:,} users would be repaired, more than GHSYNC_REPAIR_MAX_USERS={limit:,} allows.",
            way_out="Look at them first (--dry-run); then give --yes, or raise GHSYNC_REPAIR_MAX_USERS.",
        )


def plan(mysql: MySqlStore, store: UserStore, repairs: RepairRequests, keys: Collection[str]) -> RepairReport:
    """Return the expected outcomes of a repair of users now; write nothing.

    Raises:
        UnavailableError: A server is away.
        RefusedError: A server refuses.
    """
    from ghsync_dagster.cdc.health.audit import matches
    from ghsync_dagster.chunks import chunks

    started = time.monotonic()
    found: Counter[str] = Counter()
    planned: dict[str, str] = {}
    for part in chunks(keys):
        rows, documents, stored = mysql.rows_by_id(part), store.users_by_id(part), repairs.stored_users(part)
        for key in part:
            what = cure(stored[key], has_row=key in rows)
            is_in_sync = what.op is Op.UPSERT and matches(rows[key], documents.get(key))
            found[IN_SYNC if is_in_sync else what.outcome.value] += 1
            if not is_in_sync:
                planned[key] = what.outcome.value
    seconds = round(time.monotonic() - started, 3)
    return RepairReport(len(keys), dict(found), seconds=seconds, planned=planned, dry_run=True)


def repair(
    kafka: KafkaSettings,
    repairs: RepairRequests,
    keys: Collection[str],
    own_consumer: Callable[[], ChangeConsumer],
    *,
    stop: threading.Event,
    progress: Callable[[int], None] = lambda _: None,
    still_seconds: float = _STILL_SECONDS,
) -> RepairReport:
    """Request the repair of users, and wait until it is done.

    Args:
        kafka: The topic, the group and the connection settings.
        repairs: Stores the requests.
        keys: Users.
        own_consumer: Creates a consumer. If the group is empty it joins, and also applies changes meanwhile.
        stop: Ends the waiting when set; the requests stay.
        progress: Called with the number of repaired users, every second or two.
        still_seconds: After how long without a repaired user the waiting ends.

    Raises:
        GhsyncError: A server is away or refuses; the requests stay.
    """
    started = time.monotonic()
    if not keys:
        return RepairReport(0, {})
    token = repairs.request(keys)
    log.info("repairs requested", users=len(keys))
    waiting = _Waiting(kafka, repairs, token, len(keys), own_consumer, stop, progress, still_seconds)
    found = waiting.until_done()
    outcomes = repairs.outcomes(token)
    return RepairReport(
        asked=len(keys),
        outcomes={outcome.value: count for outcome, count in outcomes.items()},
        open=found.open,
        refused=repairs.refused_users(token, SHOWN) if outcomes[Outcome.REFUSED] else (),
        problem=(found.problem or _NO_PROBLEM) if found.open else "",
        by_itself=waiting.by_itself,
        seconds=round(time.monotonic() - started, 3),
    )


@dataclass(slots=True)
class _Waiting:
    """Waits until the owner of the partitions has carried a request out, or consumes itself."""

    kafka: KafkaSettings
    repairs: RepairRequests
    token: str
    asked: int
    own_consumer: Callable[[], ChangeConsumer]
    stop: threading.Event
    progress: Callable[[int], None]
    still_seconds: float
    by_itself: bool = False

    def until_done(self) -> RepairProgress:
        """Wait until no user is open, the stop is set, or no user is repaired any more."""
        still_seconds = self.kafka.session_timeout_seconds
        while self._members():
            found = self._watch(still_seconds)
            if not found.open or self.stop.is_set() or still_seconds == self.still_seconds:
                return found
            # The consumer may have left the group. One that has not gets more time.
            still_seconds = self.still_seconds
        self.by_itself = True
        with self._consuming() as check:
            return self._watch(self.still_seconds, check)

    def _members(self) -> int:
        from ghsync_dagster.retry import retrying
        from ghsync_dagster.stores.kafka.topics import group_members

        return retrying("Asking who consumes", lambda: group_members(self.kafka), attempts=_ATTEMPTS)

    def _watch(self, still_seconds: float, check: Callable[[], None] = lambda: None) -> RepairProgress:
        """Poll the requests until they are done, the stop is set, or none was repaired for ``still_seconds``."""
        wait, moved, before = _FIRST_POLL_SECONDS, time.monotonic(), -1
        while True:
            check()
            found = self.repairs.progress(self.token)
            self.progress(self.asked - found.open)
            if not found.open or self.stop.is_set():
                return found
            if found.open != before:
                moved, before = time.monotonic(), found.open
            elif time.monotonic() - moved > still_seconds:
                return found
            self.stop.wait(wait)
            wait = min(2 * wait, _LONGEST_POLL_SECONDS)

    @contextmanager
    def _consuming(self) -> Iterator[Callable[[], None]]:
        """Run a consumer in a thread; yield a function that raises its error if it failed."""
        stop = threading.Event()
        failures: list[BaseException] = []
        consumer = self.own_consumer()

        def run() -> None:
            try:
                consumer.run(stop)
            except BaseException as error:  # noqa: BLE001  raised in the thread that waits
                failures.append(error)

        def check() -> None:
            if failures:
                raise failures[0]

        log.info("no consumer in the group; consuming here")
        thread = threading.Thread(target=run, name="cdc-own-consumer", daemon=True)
        with killed_when_frozen():
            thread.start()
            try:
                yield check
            finally:
                stop.set()
                thread.join()
        check()


@dataclass(frozen=True, slots=True)
class Selection:
    """Which users are to be repaired: the union of the attributes.

    Attributes:
        user_ids: These users, as they are stored.
        from_audit: Users that an audit finds to differ, without changes in flight.
        everyone: Users that differ at the first comparison, changes in flight included.
        dead_letters: Users with an open dead letter.
    """

    user_ids: tuple[str, ...] = ()
    from_audit: bool = False
    everyone: bool = False
    dead_letters: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether nothing is chosen."""
        return not (self.user_ids or self.from_audit or self.everyone or self.dead_letters)


class Chosen(NamedTuple):
    """The users of a selection.

    Attributes:
        users: Those that are to be repaired, each once.
        unrepairable: Faults that no repair can fix.
    """

    users: list[str]
    unrepairable: list[Unrepairable]


def select(
    selection: Selection, mysql: MySqlStore, store: UserStore, kafka: KafkaSettings, patience_seconds: float
) -> Chosen:
    """Return the users that are to be repaired, and the faults that no repair can fix.

    Args:
        selection: Which users.
        mysql: Open.
        store: Open.
        kafka: The connection to the dead letters, whose index is updated.
        patience_seconds: For how long the audit reads differences again.

    Raises:
        UnavailableError: A server is away.
        RefusedError: A server refuses.
        ConfigError: A user id is no whole number, or there is no such table.
    """
    keys = dict.fromkeys(user_ids(selection.user_ids))
    unrepairable: list[Unrepairable] = []
    if selection.from_audit or selection.everyone:
        found = _differing(mysql, store, 0.0 if selection.everyone else patience_seconds)
        keys |= dict.fromkeys(key for key in found if _is_user_id(key))
        unrepairable += [Unrepairable(key, _NO_USER_ID) for key in found if not _is_user_id(key)]
    if selection.dead_letters:
        users, nameless = _of_open_letters(kafka, store)
        keys |= dict.fromkeys(sorted(users))
        unrepairable += [Unrepairable(letter, _NAMELESS) for letter in nameless]
    surplus = _with_several_documents(store, keys)
    unrepairable += [Unrepairable(key, _SURPLUS) for key in surplus]
    return Chosen([key for key in keys if key not in surplus], unrepairable)


def _differing(mysql: MySqlStore, store: UserStore, patience_seconds: float) -> list[str]:
    from ghsync_dagster.cdc.health.audit import Patience, audit

    found: list[str] = []
    audit(
        mysql,
        store,
        patience=Patience(seconds=patience_seconds),
        on_difference=lambda offender: found.append(offender.user_id),
    )
    return found


def _of_open_letters(kafka: KafkaSettings, store: UserStore) -> tuple[set[str], list[str]]:
    """Return the users of open dead letters, and the ids of those that name no single user."""
    from ghsync_dagster.cdc.dead_letters.index import caught_up_index

    users: set[str] = set()
    nameless: list[str] = []
    for letter in caught_up_index(kafka, store).find(state=LetterState.OPEN):
        if letter.user is None:
            nameless.append(letter.id)
        else:
            users.add(letter.user)
    return users, nameless


def _with_several_documents(store: UserStore, keys: Iterable[str]) -> set[str]:
    from ghsync_dagster.chunks import chunks

    if store.has_unique_index():
        return set()
    return {key for part in chunks(keys) for key in store.repeated_among(part)}


def _is_user_id(text: str) -> bool:
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdigit() and len(digits) <= _LONGEST_ID


def user_ids(given: Collection[str]) -> list[str]:
    """Return user ids unchanged, each once. They are not normalized, as the document of 007 is not that of row 7.

    Raises:
        ConfigError: One is no whole number.
    """
    if wrong := [text for text in given if not _is_user_id(text)]:
        raise ConfigError(
            f"No user id: {', '.join(repr(text[:40]) for text in wrong[:5])}.",
            way_out="Give user ids as MySQL has them: whole numbers.",
        )
    return list(dict.fromkeys(given))
