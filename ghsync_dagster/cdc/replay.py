"""Replay: dead letters are applied after a fix, unless their users have moved on.

Belongs here: which letters, and the order of the steps for many keys at once. Not here: the decision and the steps
themselves (``domain.replay``), reading the topic (``cdc.look``), and how the stream applies changes.

A replay is a load of a few users: it holds the same lease, marks what it touches, and is recovered as a dead load is.
What became of a letter is recorded in ``_ghsync_replayed``, by its id and the time at which the letter was made: a
record that the stream refuses once more, because the group was moved back or the topic was made anew, is open again.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import msgspec

from ghsync_dagster.batch.lease import QUIET_SECONDS, hold_lease
from ghsync_dagster.batch.settle import recover, settle_load
from ghsync_dagster.cdc.dead_letters import DeadLetter, parse
from ghsync_dagster.cdc.look import TopicLook, user_of_key
from ghsync_dagster.domain.change import Change, Op
from ghsync_dagster.domain.envelope import ChangeDecoder
from ghsync_dagster.domain.errors import ConfigError, UndecodableError
from ghsync_dagster.domain.precedence import LoadState
from ghsync_dagster.domain.replay import Candidate, Outcome, ReplayStep, Seen, Sighting, judge
from ghsync_dagster.domain.user import MARKER_FIELD, USER_FIELDS
from ghsync_dagster.observability.logging import get_logger

if TYPE_CHECKING:
    from ghsync_dagster.batch.lease import HeldLease
    from ghsync_dagster.stores.kafka import KafkaSettings
    from ghsync_dagster.stores.mongo import Document, UserStore
    from ghsync_dagster.stores.replay import LetterState, ReplayStore, Resolution

log = get_logger("replay")


class Fate(StrEnum):
    """What becomes of a letter in one replay."""

    APPLY = "to be applied"
    """A dry run would apply it."""

    REPLAYED = "replayed"
    """It is applied."""

    MOVED_ON = "moved on"
    """A newer record has the last word on its user: it is skipped for good."""

    SUPERSEDED = "superseded"
    """A newer dead letter of its user is to be applied instead: skipped for good once that one is resolved."""

    NO_CHANGE = "no change"
    """It can be read now, and is no change of a user: skipped for good."""

    REFUSED = "refused"
    """It still can't be decoded, or the database refuses it: open."""

    NOT_PASSED = "not passed yet"
    """The group must commit past it first: open."""

    UNSURE = "unsure"
    """Something newer may have been there; it is never guessed: open."""

    BUSY = "busy"
    """Its user was written while it was to be replayed: open, for the next replay to decide."""

    @property
    def is_final(self) -> bool:
        """Whether nothing remains to be done."""
        return self in (Fate.REPLAYED, Fate.MOVED_ON, Fate.NO_CHANGE)


_FATES: Final = {
    Outcome.APPLY: Fate.APPLY,
    Outcome.MOVED_ON: Fate.MOVED_ON,
    Outcome.SUPERSEDED: Fate.SUPERSEDED,
    Outcome.NOT_PASSED: Fate.NOT_PASSED,
    Outcome.UNSURE: Fate.UNSURE,
}


@dataclass(frozen=True, slots=True)
class Selection:
    """Which letters to replay: those that are open and fit all that is given.

    Attributes:
        ids: Only these, resolved ones too.
        key: Only of this user, by the record's key or by what it says.
        kind: Only of this kind.
        since: Only what was refused then or later; with a time zone.
    """

    ids: frozenset[str] = frozenset()
    key: str | None = None
    kind: str | None = None
    since: datetime | None = None

    def takes(self, letter: DeadLetter) -> bool:
        """Tell whether a letter fits, the user left aside."""
        return (
            (not self.ids or letter.id in self.ids)
            and (self.kind is None or letter.kind == self.kind)
            and (self.since is None or datetime.fromisoformat(letter.failed_at) >= self.since)
        )


@dataclass(frozen=True, slots=True)
class Edit:
    """What to take for a letter's own, None for its own.

    Attributes:
        key: The record's key.
        value: The record's value.
    """

    key: bytes | None = None
    value: bytes | None = None


@dataclass(slots=True)
class ReplayedLetter:
    """One letter, and what becomes of it.

    Attributes:
        letter: The letter.
        fate: What becomes of it.
        reason: Why, in words.
        change: The change that it decodes to, None where it does not.
        by: The id of the letter that supersedes it.
        resolved: Whether this replay has done all that was asked for it.
        state: What it was recorded as before, None where it was open.
    """

    letter: DeadLetter
    fate: Fate
    reason: str
    change: Change | None = None
    by: str | None = None
    resolved: bool = False
    state: LetterState | None = None

    @property
    def key(self) -> str:
        """The user; only of letters that change one."""
        if self.change is None or self.change.key is None:
            raise AssertionError("only changes of one user get here")
        return self.change.key

    def settle(self, fate: Fate, reason: str) -> None:
        """Note what becomes of it."""
        self.fate, self.reason = fate, reason

    def as_json(self) -> dict[str, Any]:
        """Return it for a program to read."""
        change = self.change
        return {
            "id": self.letter.id,
            "kind": self.letter.kind,
            "user_id": change.key if change else None,
            "operation": change.op.value if change else None,
            "fate": self.fate.value,
            "reason": self.reason,
            "resolved": self.resolved,
        }


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """What a replay did, or would do.

    Attributes:
        applied: Whether it was more than a dry run.
        letters: Each letter that was selected.
        recovered: What earlier, dead loads and replays had left, by kind of repair.
        to_resolve: Of a dry run, how many letters a replay would resolve.
    """

    applied: bool
    letters: tuple[ReplayedLetter, ...]
    recovered: Mapping[str, int] = field(default_factory=dict)
    to_resolve: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """How many letters, by fate."""
        return dict(Counter(found.fate.value for found in self.letters))

    @property
    def left_open(self) -> int:
        """How many of the letters are not resolved; all of them, where it was a dry run."""
        return sum(not found.resolved for found in self.letters)

    def as_json(self) -> dict[str, Any]:
        """Return it for a program to read."""
        return {
            "applied": self.applied,
            "counts": self.counts,
            "left_open": self.left_open,
            "recovered": dict(self.recovered),
            "letters": [found.as_json() for found in self.letters],
        }


# How far letters are


def read_letters(kafka: KafkaSettings) -> Iterator[DeadLetter]:
    """Yield the dead letters that there are now, of those of one record only the last, in the order of the first.

    Raises:
        UnavailableError: No broker can be reached.
        RefusedError: The credentials or rights are refused.
    """
    from ghsync_dagster.stores.kafka_topics import read_to_end

    letters: dict[str, DeadLetter] = {}
    for message in read_to_end(kafka, kafka.dead_letter_topic):
        if (letter := parse(message)) is not None:
            letters[letter.id] = letter
    yield from letters.values()


def letter_states(kafka: KafkaSettings, store: UserStore) -> Iterator[tuple[DeadLetter, LetterState, str]]:
    """Yield each dead letter, how far its replay is, and why.

    Raises:
        UnavailableError: Kafka or MongoDB can't be reached.
        RefusedError: Credentials or rights are refused.
    """
    from ghsync_dagster.stores.replay import read_resolutions

    resolutions = read_resolutions(store)
    for letter in read_letters(kafka):
        yield letter, *_state(letter, resolutions.get(letter.id))


def open_dead_letters(kafka: KafkaSettings, store: UserStore) -> Iterator[DeadLetter]:
    """Yield the dead letters that were neither replayed nor skipped.

    Raises:
        UnavailableError: Kafka or MongoDB can't be reached.
        RefusedError: Credentials or rights are refused.
    """
    return (letter for letter, state, _ in letter_states(kafka, store) if state.is_open)


def _state(letter: DeadLetter, resolution: Resolution | None) -> tuple[LetterState, str]:
    from ghsync_dagster.stores.replay import LetterState

    if resolution is None:
        return LetterState.OPEN, ""
    if not resolution.state.is_open and letter.failed_at != resolution.failed_at:
        return LetterState.OPEN, "the stream refused a record at this place once more"
    return resolution.state, resolution.reason


# Replaying


def plan_replay(kafka: KafkaSettings, store: UserStore, selection: Selection, edit: Edit | None = None) -> ReplayReport:
    """Tell what a replay would do, and write nothing.

    Args:
        kafka: Topic, group, and the way to the brokers.
        store: Open.
        selection: Which letters.
        edit: For the one letter that is selected by its id.

    Raises:
        ConfigError: There is no letter with a selected id, or an edit for more than one.
        UnavailableError: Kafka or MongoDB can't be reached.
        RefusedError: Credentials or rights are refused.
    """
    chosen = _Chosen(kafka, store, selection, edit)
    chosen.judge(chosen.look())
    resolved = chosen.resolved(as_if_applied=True)
    to_resolve = sum(found.state is None or found.fate is Fate.APPLY for found in resolved)
    return ReplayReport(applied=False, letters=tuple(chosen.letters), to_resolve=to_resolve)


def replay(
    kafka: KafkaSettings,
    store: UserStore,
    selection: Selection,
    edit: Edit | None = None,
    *,
    lease_wait_seconds: float,
    lease_quiet_seconds: float = QUIET_SECONDS,
    on_step: Callable[[ReplayStep], None] = lambda _: None,
) -> ReplayReport:
    """Apply the selected letters whose users have not moved on. Safe beside the stream, and to repeat.

    Args:
        kafka: Topic, group, and the way to the brokers.
        store: Open.
        selection: Which letters.
        edit: For the one letter that is selected by its id.
        lease_wait_seconds: How long to wait for a load.
        lease_quiet_seconds: How long the server may still be at work on the last command of a load that died.
        on_step: Told each step when it is done for all letters.

    Raises:
        ConfigError: There is no letter with a selected id, or an edit for more than one.
        LeaseHeldError: A load is on.
        LeaseLostError: The lease ran out under way.
        UnavailableError: Kafka or MongoDB went away: replay again.
        RefusedError: Credentials or rights are refused, or the collection is set up in another way.
    """
    with hold_lease(store, wait_seconds=lease_wait_seconds, quiet_seconds=lease_quiet_seconds) as lease:
        store.ensure_collection()
        recovered = recover(store, lease.assert_held)
        # Under the lease, since another replay may have resolved some a moment ago.
        chosen = _Chosen(kafka, store, selection, edit)
        look = chosen.look()
        chosen.judge(look)
        _Run(store, lease, chosen, look, on_step).run()
    report = ReplayReport(applied=True, letters=tuple(chosen.letters), recovered=recovered)
    log.info("replayed", letters=len(report.letters), counts=report.counts)
    return report


def no_such_letter(missing: Iterable[str]) -> ConfigError:
    """Return the error of ids that no dead letter has."""
    return ConfigError(f"There is no dead letter {', '.join(sorted(missing))}.", way_out="See: ghsync dlq list.")


class _Chosen:
    """The selected letters, decoded, and what is known of all others."""

    def __init__(self, kafka: KafkaSettings, store: UserStore, selection: Selection, edit: Edit | None) -> None:
        from ghsync_dagster.stores.replay import read_resolutions

        if edit is not None and len(selection.ids) != 1:
            raise ConfigError("Another key or value is for one letter.", way_out="Name that letter by its id.")
        self._kafka = kafka
        self.topic = kafka.topic
        self.resolutions = read_resolutions(store)
        self.dead: set[tuple[int, int]] = set()
        """The places of all records that are dead letters."""
        self.open: set[str] = set()
        """The ids of all letters that are open."""
        self.letters: list[ReplayedLetter] = []
        self._decoder = ChangeDecoder()
        self._edit = edit or Edit()
        self._written = self._written_letters()
        missing = set(selection.ids)
        for letter in read_letters(kafka):
            if letter.topic == kafka.topic:
                self.dead.add((letter.partition, letter.offset))
            state, _ = _state(letter, self.resolutions.get(letter.id))
            if state.is_open:
                self.open.add(letter.id)
            if selection.takes(letter) and letter.id in (selection.ids or self.open):
                missing.discard(letter.id)
                self._add(letter, selection.key, None if state.is_open else state)
        if missing:
            raise no_such_letter(missing)

    @cached_property
    def topic_id(self) -> str:
        """The id of the topic that there is now."""
        from ghsync_dagster.stores.kafka_topics import TopicIds

        return TopicIds(self._kafka).of(self.topic)

    def _add(self, letter: DeadLetter, only: str | None, state: LetterState | None) -> None:
        found = self._decoded(letter)
        found.state = state
        users = {found.change.key if found.change else None, user_of_key(self._decoder, letter.key)}
        if only is None or only in users:
            self.letters.append(found)

    def _decoded(self, letter: DeadLetter) -> ReplayedLetter:
        if letter.topic != self.topic:
            return ReplayedLetter(letter, Fate.UNSURE, f"it came from {letter.topic}, and KAFKA_TOPIC is {self.topic}")
        key = letter.key if self._edit.key is None else self._edit.key
        value = letter.value if self._edit.value is None else self._edit.value
        try:
            change = self._decoder.decode(key, value)
        except UndecodableError as error:
            return ReplayedLetter(letter, Fate.REFUSED, f"{error.kind}: {error.message} {error.way_out}")
        if change.op is Op.SKIP:
            return ReplayedLetter(letter, Fate.NO_CHANGE, f"it is a {change.what}, no change of a user", change)
        if change.op is Op.TRUNCATE:
            words = "a truncate is never replayed, since newer users are there: take a new snapshot"
            return ReplayedLetter(letter, Fate.REFUSED, words, change)
        if self._edit.value is not None:
            # Nobody vouches for a place that was typed in.
            change = msgspec.structs.replace(change, position=None)
        return ReplayedLetter(letter, Fate.APPLY, "", change)

    def candidates(self) -> list[ReplayedLetter]:
        """Return the letters that are to be applied, as far as it is known."""
        return [found for found in self.letters if found.fate is Fate.APPLY]

    def look(self) -> TopicLook:
        """Read what bears on the candidates, up to where the topic ends now."""
        candidates = self.candidates()
        keys = {found.key for found in candidates}
        look = TopicLook(self._kafka, [found.letter for found in candidates], keys, self.dead)
        look.go_on()
        return look

    def judge(self, look: TopicLook) -> None:
        """Decide about the candidates by what was read of the topic."""
        for found in self.candidates():
            self._judge(found, look)
        per_user = Counter(found.key for found in self.candidates())
        for found in self.candidates():
            if per_user[found.key] > 1:
                found.settle(Fate.UNSURE, "nothing tells which of the user's letters is the newest")

    def _judge(self, found: ReplayedLetter, look: TopicLook) -> None:
        letter, change = found.letter, found.change
        candidate = Candidate(
            letter.partition,
            letter.offset,
            change.position if change else None,
            intact=(letter.partition, letter.offset) in look.intact,
            keyed=user_of_key(self._decoder, letter.key) == found.key,
        )
        sightings = [*look.sightings(found.key), *self._written.get(found.key, ())]
        judgement = judge(candidate, sightings, look.stretches)
        found.settle(_FATES[judgement.outcome], judgement.reason)
        if judgement.by is not None and judgement.outcome is Outcome.SUPERSEDED:
            found.by = f"{self.topic}-{judgement.by.partition}-{judgement.by.offset}"

    def resolved(self, *, as_if_applied: bool = False) -> list[ReplayedLetter]:
        """Return the letters for which nothing remains to be done, or would if what is to be applied were applied."""
        done = {
            found.letter.id
            for found in self.letters
            if found.fate.is_final or (as_if_applied and found.fate is Fate.APPLY)
        }
        still_open = self.open - done
        return [
            found
            for found in self.letters
            if found.letter.id in done or (found.fate is Fate.SUPERSEDED and found.by not in still_open)
        ]

    def _written_letters(self) -> dict[str, list[Sighting]]:
        """Return the letters that replays have written, or began to, by user; offsets of another topic say nothing."""
        from ghsync_dagster.stores.replay import LetterState

        written: dict[str, list[Sighting]] = {}
        for found in self.resolutions.values():
            is_of_topic = found.topic == self.topic and found.topic_id == self.topic_id
            if found.state in (LetterState.REPLAYING, LetterState.REPLAYED) and is_of_topic:
                sighting = Sighting(Seen.REPLAYED, found.partition, found.offset, found.position, letter=True)
                for key in found.keys:
                    written.setdefault(key, []).append(sighting)
        return written


class _Run:
    """One replay, from the record that it runs to its end."""

    def __init__(
        self,
        store: UserStore,
        lease: HeldLease,
        chosen: _Chosen,
        look: TopicLook,
        on_step: Callable[[ReplayStep], None],
    ) -> None:
        from ghsync_dagster.stores.replay import ReplayStore

        self._store = store
        self._lease = lease
        self._chosen = chosen
        self._look = look
        self._on_step = on_step
        self._writes: ReplayStore = ReplayStore(store, may_write=self._may_write)
        self._load_id = uuid.uuid4().hex
        self._old: dict[str, Document] = {}
        """What the documents are, by user, before the letters are applied; without those that are inserted."""

    def _may_write(self) -> float:
        self._lease.assert_held()
        return self._lease.quiet_seconds

    def run(self) -> None:
        """Adopt, look again, write, settle; then record what was skipped."""
        if candidates := self._chosen.candidates():
            self._lease.assert_held()
            self._store.record_load(
                self._load_id, state=LoadState.RUNNING.value, started_at=datetime.now(UTC), replay=len(candidates)
            )
            self._on_step(ReplayStep.RECORD_RUNNING)
            try:
                self._adopt(candidates)
                self._look.go_on()
                self._chosen.judge(self._look)
                self._on_step(ReplayStep.LOOK)
                self._write(self._chosen.candidates())
            finally:
                self._settle()
        self._record_skipped()

    def _adopt(self, candidates: Sequence[ReplayedLetter]) -> None:
        """Mark what is stored, insert what is not; a letter whose user is written meanwhile drops out."""
        users = {found.key: found for found in candidates}
        self._old = self._documents(users)
        plain = [document for document in self._old.values() if MARKER_FIELD not in document]
        self._writes.log_old(plain, self._load_id)
        self._on_step(ReplayStep.LOG_OLD)
        self._writes.mark(plain)
        absent = {key: self._new(found) for key, found in users.items() if key not in self._old}
        refused = self._writes.insert_marked({key: user for key, user in absent.items() if user is not None})
        for key, why in refused.items():
            users[key].settle(Fate.REFUSED, f"{why.kind}: the database refuses it: {why.text}")
        stored = self._documents(users)
        for key, found in users.items():
            wanted = self._old.get(key, absent.get(key))
            taken = stored.get(key) == (None if wanted is None else _marked(wanted))
            if key not in refused and not (taken and MARKER_FIELD not in (wanted or {})):
                found.settle(Fate.BUSY, "the user was written this very moment: replay again")
        self._on_step(ReplayStep.ADOPT)

    def _documents(self, keys: Iterable[str]) -> dict[str, Document]:
        from ghsync_dagster.stores.mongo import chunks

        return {key: found for part in chunks(keys) for key, found in self._store.users_by_id(part).items()}

    def _new(self, found: ReplayedLetter) -> Document | None:
        """Return the user as the letter leaves it, None where it deletes it."""
        if found.change is None or found.change.user is None:
            return None
        whole = {**self._old.get(found.key, {}), **found.change.user}
        return {name: whole.get(name) for name in USER_FIELDS}

    def _write(self, candidates: Sequence[ReplayedLetter]) -> None:
        """Write the letters whose users are adopted and have not moved on."""
        from ghsync_dagster.stores.replay import LetterState

        if not candidates:
            return
        self._writes.record(self._resolution(found, LetterState.REPLAYING) for found in candidates)
        self._on_step(ReplayStep.RECORD_INTENT)
        news = {found.key: self._new(found) for found in candidates}
        deletes = [key for key, new in news.items() if new is None]
        self._writes.record_deleted(deletes)
        self._on_step(ReplayStep.RECORD_DELETED)
        self._writes.drop_versions(news)
        self._on_step(ReplayStep.DROP_VERSION)
        refused = self._writes.write_marked(
            {key: (self._old.get(key, new), new) for key, new in news.items() if new is not None}
        )
        self._writes.delete_marked(key for key in deletes if key in self._old)
        self._on_step(ReplayStep.WRITE)
        stored = self._documents(news)
        for found in candidates:
            if (why := refused.get(found.key)) is not None:
                found.settle(Fate.REFUSED, f"{why.kind}: the database refuses it: {why.text}")
            elif stored.get(found.key) == news[found.key]:
                found.settle(Fate.REPLAYED, "deleted" if news[found.key] is None else "written")
            else:
                found.settle(Fate.BUSY, "the user was written this very moment: replay again")
        self._writes.record(self._resolution(found, self._state_after(found)) for found in candidates)
        self._on_step(ReplayStep.RECORD_OUTCOME)

    def _state_after(self, found: ReplayedLetter) -> LetterState:
        """Return how far a letter is whose writing was begun."""
        from ghsync_dagster.stores.replay import LetterState

        if found.fate is Fate.REPLAYED:
            return LetterState.REPLAYED
        before = self._chosen.resolutions.get(found.letter.id)
        if found.fate is Fate.REFUSED and (before is None or before.state is LetterState.OPEN):
            return LetterState.OPEN
        # Perhaps it was applied before its user was written again, or by a replay that died.
        return LetterState.REPLAYING

    def _resolution(self, found: ReplayedLetter, state: LetterState) -> Resolution:
        from ghsync_dagster.stores.replay import LetterState, Resolution

        letter, change = found.letter, found.change
        before = self._chosen.resolutions.get(letter.id)
        keys = set(before.keys) if before is not None and before.topic_id == self._chosen.topic_id else set()
        if state in (LetterState.REPLAYING, LetterState.REPLAYED):
            keys.add(found.key)
        return Resolution(
            id=letter.id,
            topic=letter.topic,
            partition=letter.partition,
            offset=letter.offset,
            topic_id=self._chosen.topic_id,
            failed_at=letter.failed_at,
            state=state,
            reason=found.reason,
            keys=tuple(sorted(keys)),
            position=change.position if change else None,
        )

    def _settle(self) -> None:
        """Put back or remove what is still marked, and end the load."""

        def nothing() -> None:
            """Stand in for callbacks that nobody needs."""

        settle_load(
            self._store,
            self._load_id,
            expected_marked=None,
            assert_held=self._lease.assert_held,
            on_checked=nothing,
            on_unmarked=nothing,
            on_done=nothing,
        )

    def _record_skipped(self) -> None:
        """Record the letters that need not be applied any more."""
        from ghsync_dagster.stores.replay import LetterState

        skipped = []
        for found in self._chosen.resolved():
            found.resolved = True
            if found.fate is not Fate.REPLAYED and found.state is None:
                skipped.append(self._resolution(found, LetterState.SKIPPED))
        self._writes.record(skipped)


def _marked(document: Document) -> Document:
    from ghsync_dagster.domain.user import MARKER_VALUE

    return {**document, MARKER_FIELD: MARKER_VALUE}
