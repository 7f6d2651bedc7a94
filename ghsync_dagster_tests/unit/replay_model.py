"""A model of one key, its topic, the stream, loads and replays of dead letters, in every order of their steps.

Belongs here: the machines and the invariants. The loads and the recovery are those of precedence_model.py; the decision
is the real `judge`. Not here: the walk itself (interleavings.py), which scenarios and deviations are tried
(test_replay_model.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import interleavings
from interleavings import Actor
from precedence_model import DELETE, Doc, Entry, Load, Loads, Protocol, Store

from ghsync_dagster.domain.precedence import DELETE_STEPS, UPSERT_STEPS, LoadState, StreamStep
from ghsync_dagster.domain.replay import (
    REPLAY_STEPS,
    Candidate,
    Outcome,
    ReplayStep,
    Seen,
    Sighting,
    Stretch,
    judge,
)

REPLAY = 50
"""The load id of replays."""


class Record(NamedTuple):
    """A record of the topic: an upsert of some content, or `DELETE`; a letter is one that the stream refuses."""

    what: str
    letter: bool = False


class Topic(NamedTuple):
    """The topic, how far the group has committed, and how often each letter was written to the dead letters."""

    records: tuple[Record, ...]
    committed: int = 0
    written: tuple[int, ...] = ()

    def dead(self) -> set[int]:
        """Return the offsets of the dead letters."""
        return {at for at, times in enumerate(self.written) if times}

    def refused(self, letters: set[int]) -> Topic:
        """Return it with these letters written, perhaps once more."""
        count = len(self.records)
        times = (*self.written, *([0] * (count - len(self.written))))
        return self._replace(written=tuple(n + (at in letters) for at, n in enumerate(times)))


class Stream(NamedTuple):
    """The stream: where it goes on, the record at work, its next step, and the highest offset it ever began."""

    next: int = 0
    at: int | None = None
    step: int = 0
    high: int = -1
    crashes_left: int = 0
    backs_left: int = 0


class Replay(NamedTuple):
    """The replay: whose letter, how often that was written, the next step, the load machine that settles."""

    letter: int | None = None
    times: int = 0
    step: ReplayStep | None = None
    settling: Load | None = None
    last: bool = False
    old: str | None = None
    runs_left: int = 0
    crashes_left: int = 0

    @property
    def active(self) -> bool:
        """Whether it is between its beginning and its end."""
        return self.letter is not None


class Books(NamedTuple):
    """What replays recorded: the letters they began to write, and those they are done with, as often as written then.

    `taken` is recorded nowhere: the letters whose write took place, since the group last went back past them.
    """

    begun: frozenset[int] = frozenset()
    done: frozenset[tuple[int, int]] = frozenset()
    taken: frozenset[int] = frozenset()


class World(NamedTuple):
    """All of it."""

    store: Store
    topic: Topic
    stream: Stream
    replay: Replay
    load: Load
    books: Books = Books()


Moves = list[tuple[str, World]]
"""What somebody may do next, and what comes of it."""


@dataclass(frozen=True)
class Scenario:
    """What a walk starts from and may choose from.

    Attributes:
        start: What is stored.
        records: The topic at the start; nothing of it is consumed.
        more: What may be appended at any time.
        appended: How many records are appended at most.
        loads: Event and content of each load.
        replays: How many replays are run at most.
        replay_crashes: How many times a replay may die.
        stream_crashes: How many times the stream may die.
        stream_backs: How many times the group may go back to what it had committed past.
        load_crashes: How many times a load may die.
    """

    start: Store
    records: tuple[Record, ...]
    more: tuple[str, ...] = ()
    appended: int = 1
    loads: tuple[tuple[int, str], ...] = ()
    replays: int = 1
    replay_crashes: int = 0
    stream_crashes: int = 0
    stream_backs: int = 0
    load_crashes: int = 0


def _cannot_begin(replay: Replay) -> bool:
    return replay.active or not replay.runs_left


def _is_not_settling(replay: Replay) -> bool:
    return replay.settling is None


def _is_at_no_other_step(replay: Replay) -> bool:
    return replay.step is None or replay.step is ReplayStep.WRITE


def _is_at_no_write(replay: Replay) -> bool:
    return replay.step is not ReplayStep.WRITE


class Machine:
    """Executes the steps of everybody."""

    def __init__(self, scenario: Scenario, deviations: frozenset[str]) -> None:
        self.scenario = scenario
        self.deviations = deviations
        self.loads = Loads(Protocol(), scenario.loads)
        self.settler = Loads(Protocol(), ())
        steps = list(REPLAY_STEPS)
        for step, name in (
            (ReplayStep.LOOK, "looks before it adopts"),
            (ReplayStep.DROP_VERSION, "drops the version last"),
            (ReplayStep.RECORD_DELETED, "records the deletion last"),
        ):
            if name in deviations:
                steps.remove(step)
                at = steps.index(ReplayStep.LOG_OLD if step is ReplayStep.LOOK else ReplayStep.RECORD_OUTCOME)
                steps.insert(at, step)
        self.steps = steps

    def first(self) -> World:
        """Return where every run starts."""
        some = self.scenario
        return World(
            some.start,
            Topic(some.records),
            Stream(crashes_left=some.stream_crashes, backs_left=some.stream_backs),
            Replay(runs_left=some.replays, crashes_left=some.replay_crashes),
            Load(crashes_left=some.load_crashes, finished=not some.loads),
        )

    def actors(self) -> list[Actor[World]]:
        """Return everybody who takes steps."""
        return [
            Actor(self._produce, frozenset({"topic"})),
            Actor(self._stream, frozenset({"store", "topic", "stream"})),
            Actor(self._go_back, frozenset({"topic", "stream", "books"})),
            Actor(self._load, frozenset({"store", "replay", "load"})),
            Actor(self._die, frozenset({"replay"})),
            Actor(self._begin, frozenset({"store", "topic", "replay", "load", "books"}), ("replay", _cannot_begin)),
            Actor(self._settle, frozenset({"store", "replay"}), ("replay", _is_not_settling)),
            Actor(self._step, frozenset({"store", "topic", "replay", "books"}), ("replay", _is_at_no_other_step)),
            Actor(self._step, frozenset(World._fields) - {"load"}, ("replay", _is_at_no_write)),
        ]

    def _produce(self, world: World) -> Moves:
        topic = world.topic
        if len(topic.records) >= len(self.scenario.records) + self.scenario.appended:
            return []
        return [
            (f"append {what}", world._replace(topic=topic._replace(records=(*topic.records, Record(what)))))
            for what in self.scenario.more
        ]

    def resolved(self, world: World) -> set[int]:
        """Return the letters that are not open: a letter that was written once more since is."""
        if "forgets that it is refused again" in self.deviations:
            return {at for at, _ in world.books.done}
        return {at for at, times in world.books.done if world.topic.written[at] == times}

    # The stream

    def _stream(self, world: World) -> Moves:
        stream, topic = world.stream, world.topic
        moves: Moves = []
        if stream.at is not None:
            moves.append(self._stream_step(world))
        else:
            # What lies between is coalesced, and letters of the same batch are written before it is committed.
            for at in range(stream.next, len(topic.records)):
                if not topic.records[at].letter:
                    begun = stream._replace(at=at, high=max(stream.high, at))
                    moves.append(self._stream_step(world._replace(stream=begun)))
            if stream.next < len(topic.records) and topic.records[stream.next].letter:
                passed = topic.refused({stream.next})
                moved = stream._replace(next=stream.next + 1)
                moves.append((f"stream: letter {stream.next}", world._replace(topic=passed, stream=moved)))
            if stream.next > topic.committed:
                moves.append(("stream: commit", world._replace(topic=topic._replace(committed=stream.next))))
        if stream.crashes_left and (stream.at is not None or stream.next > topic.committed):
            dead = stream._replace(next=topic.committed, at=None, step=0, crashes_left=stream.crashes_left - 1)
            moves.append(("stream: CRASH", world._replace(stream=dead)))
        return moves

    def _go_back(self, world: World) -> Moves:
        if world.stream.at is not None or not world.stream.backs_left:
            return []
        return [self._gone_back(world, offset) for offset in range(world.topic.committed)]

    def _gone_back(self, world: World, offset: int) -> tuple[str, World]:
        stream = world.stream._replace(next=offset, backs_left=world.stream.backs_left - 1)
        topic = world.topic._replace(committed=offset)
        books = world.books._replace(taken=frozenset(at for at in world.books.taken if at < offset))
        return f"stream: back to {offset}", world._replace(stream=stream, topic=topic, books=books)

    def _stream_step(self, world: World) -> tuple[str, World]:
        store, topic, stream, at = world.store, world.topic, world.stream, world.stream.at
        assert at is not None
        what = topic.records[at].what
        steps = DELETE_STEPS if what == DELETE else UPSERT_STEPS
        step, following = steps[stream.step], stream.step + 1
        if step is StreamStep.RECORD_DELETED:
            store = store._replace(deleted=True)
        elif step is StreamStep.FORGET_DELETED:
            store = store._replace(deleted=False)
        elif step is StreamStep.WRITE_DOCUMENT:
            store = store._replace(doc=Doc(what, marked=False))
        elif step is StreamStep.REMOVE_DOCUMENT:
            store = store._replace(doc=None)
        else:
            if step is StreamStep.DROP_VERSION_AGAIN and store.entry:
                following = steps.index(StreamStep.WRITE_DOCUMENT)
            store = store._replace(entry=None)
        if following < len(steps):
            stream = stream._replace(step=following)
        else:
            letters = {between for between in range(stream.next, at) if topic.records[between].letter}
            topic = topic.refused(letters)
            stream = stream._replace(next=at + 1, at=None, step=0)
        return f"stream: {what} {step.name}", world._replace(store=store, topic=topic, stream=stream)

    # Loads, under the lease

    def _load(self, world: World) -> Moves:
        if world.load.step is None and world.replay.active and "ignores the lease" not in self.deviations:
            return []
        return [
            (label, world._replace(store=store, load=load))
            for label, store, load in self.loads.moves(world.store, world.load)
        ]

    # Replays, under the lease

    def _begin(self, world: World) -> Moves:
        replay = world.replay
        at_work = world.load.step is not None and "ignores the lease" not in self.deviations
        if at_work:
            return []
        begun = replay._replace(settling=Load(), runs_left=replay.runs_left - 1)
        return [
            self._settled(world._replace(replay=begun._replace(letter=at, times=times)))
            for at, times in enumerate(world.topic.written)
            if times and at not in self.resolved(world)
        ]

    def _die(self, world: World) -> Moves:
        replay = world.replay
        if not replay.active or not replay.crashes_left:
            return []
        dead = Replay(runs_left=replay.runs_left + 1, crashes_left=replay.crashes_left - 1)
        return [("replay: CRASH", world._replace(replay=dead))]

    def _settle(self, world: World) -> Moves:
        return [self._settled(world)]

    def _settled(self, world: World) -> tuple[str, World]:
        """Take one step of recovery, before the replay or at its end."""
        replay = world.replay
        assert replay.settling is not None
        [(label, store, load)] = self.settler.steps(world.store, replay.settling)
        if not load.finished:
            replay = replay._replace(settling=load)
        elif replay.last:
            replay = Replay(runs_left=replay.runs_left, crashes_left=replay.crashes_left)
        else:
            replay = replay._replace(settling=None, step=self.steps[0])
        return f"replay: {label}", world._replace(store=store, replay=replay)

    def _step(self, world: World) -> Moves:
        step = world.replay.step
        assert step is not None
        label, world, goes_on = self._do(world, step)
        last = step is self.steps[-1]
        if last or not goes_on:
            replay = world.replay._replace(step=None, settling=Load(), last=True)
        else:
            replay = world.replay._replace(step=self.steps[self.steps.index(step) + 1])
        return [(f"replay: {label}", world._replace(replay=replay))]

    def _do(self, world: World, step: ReplayStep) -> tuple[str, World, bool]:
        store, replay, books, letter = world.store, world.replay, world.books, world.replay.letter
        assert letter is not None
        what = world.topic.records[letter].what
        if step is ReplayStep.LOOK:
            outcome = self._look(world)
            return f"LOOK: {outcome.name}", world, outcome is Outcome.APPLY
        if step is ReplayStep.ADOPT:
            return self._adopt(world, what)
        if step is ReplayStep.WRITE:
            return self._write(world, what)
        if step is ReplayStep.RECORD_RUNNING:
            store = store._replace(record=(REPLAY, LoadState.RUNNING))
        elif step is ReplayStep.LOG_OLD:
            old = store.doc.content if store.doc else None
            replay = replay._replace(old=old)
            store = store if "logs nothing" in self.deviations else store._replace(old=old)
        elif step is ReplayStep.RECORD_INTENT:
            begun = books.begun if "records no intent" in self.deviations else books.begun | {letter}
            books = books._replace(begun=begun)
        elif step is ReplayStep.RECORD_DELETED:
            recorded = what == DELETE and "records no deletion" not in self.deviations
            store = store._replace(deleted=store.deleted or recorded)
        elif step is ReplayStep.DROP_VERSION:
            store = store if "keeps the version" in self.deviations else store._replace(entry=None)
        else:
            if "forgets the deletion" in self.deviations and what != DELETE:
                store = store._replace(deleted=False)
            books = books._replace(done=books.done | {(letter, replay.times)})
        return step.name, world._replace(store=store, replay=replay, books=books), True

    def _look(self, world: World) -> Outcome:
        """Judge by the topic as it is now."""
        letter, topic = world.replay.letter, world.topic
        assert letter is not None
        sightings = []
        for offset, record in enumerate(topic.records):
            if not record.letter:
                sightings.append(Sighting(Seen.CHANGE, 0, offset))
            elif offset in world.books.begun:
                sightings.append(Sighting(Seen.REPLAYED, 0, offset, letter=True))
            elif offset not in topic.dead():
                sightings.append(Sighting(Seen.UNREAD, 0, offset))
        candidate = Candidate(0, letter, None, intact=True, keyed=True)
        committed = len(topic.records) if "asks for no commit" in self.deviations else topic.committed
        found = judge(candidate, sightings, {0: Stretch(0, committed)}).outcome
        return Outcome.APPLY if found is Outcome.MOVED_ON and "looks at nothing" in self.deviations else found

    def _adopt(self, world: World, what: str) -> tuple[str, World, bool]:
        doc, old = world.store.doc, world.replay.old
        if old is None:
            if what == DELETE:
                return "ADOPT: nothing", world, True
            marked = "inserts unmarked" not in self.deviations
            taken = doc is None
            new = Doc(what, marked) if doc is None else doc
        else:
            taken = doc == Doc(old, marked=False)
            if "marks whatever is there" in self.deviations and doc:
                taken = True
            if taken and doc:
                doc = doc._replace(marked=True)
            return f"ADOPT: {taken}", world._replace(store=world.store._replace(doc=doc)), taken
        return f"ADOPT: {taken}", world._replace(store=world.store._replace(doc=new)), taken

    def _write(self, world: World, what: str) -> tuple[str, World, bool]:
        doc, old = world.store.doc, world.replay.old
        if what == DELETE and old is None:
            taken, new = doc is None, doc
        else:
            adopted = Doc(what if old is None else old, marked=True)
            taken = doc == adopted or "writes whatever is there" in self.deviations
            new = (None if what == DELETE else Doc(what, marked=False)) if taken else doc
        world = world._replace(store=world.store._replace(doc=new))
        letter, stream = world.replay.letter or 0, world.stream
        if taken and stream.next > letter and (stream.at is None or stream.at > letter):
            world = world._replace(books=world.books._replace(taken=world.books.taken | {letter}))
        return f"WRITE: {taken}", world, taken


class Invariants:
    """What must hold whenever the stream stands still with all that it ever began applied."""

    def __init__(self, scenario: Scenario, machine: Machine) -> None:
        self.scenario = scenario
        self.machine = machine
        self.files = {content for _, content in scenario.loads}

    def broken(self, world: World) -> str | None:
        """Return the first invariant that does not hold in this state, or None."""
        stream = world.stream
        if stream.at is not None or stream.next <= stream.high:
            return None
        allowed = self._allowed(world)
        doc = world.store.doc
        if doc is None or not doc.marked:
            content = doc.content if doc else None
            if content not in allowed:
                return f"{content} is stored, not one of {sorted(map(str, allowed))}"
        caught_up = not world.replay.active and stream.next == len(world.topic.records)
        if caught_up and self._is_done_but_not_applied(world):
            return "a letter is not open, and not applied"
        return self._at_end(world, allowed) if caught_up and world.load.finished else None

    def _is_done_but_not_applied(self, world: World) -> bool:
        books, topic = world.books, world.topic
        done = {at for at in self.machine.resolved(world) if at > world.stream.high}
        if not done or (world.store.doc and world.store.doc.marked):
            return False
        letters = [topic.records[at].what for at in done | books.begun if at >= max(done)]
        return world.store.doc not in [None if what == DELETE else Doc(what, marked=False) for what in letters]

    def _allowed(self, world: World) -> set[str | None]:
        """Return what may be stored, None for no document."""
        states = {at: None if record.what == DELETE else record.what for at, record in enumerate(world.topic.records)}
        high = world.stream.high
        begun = {at for at in world.books.begun if at > high}
        taken = {at for at in world.books.taken if at > high}
        if taken:
            return {states[at] for at in begun | taken if at >= max(taken)}
        allowed = {states[at] for at in begun}
        if high >= 0:
            return allowed | {states[high]}
        start = self.scenario.start.doc
        return allowed | {start.content if start else None} | self.files

    def _at_end(self, world: World, allowed: set[str | None]) -> str | None:
        """Let a later load run, and look whether it leaves alone what is not its own, and nothing half done."""
        store, loads = world.store, self.machine.loads
        load = Load(len(loads.plan))
        while not load.finished:
            _, store, load = loads.steps(store, load)[0]
        load = Load(len(loads.plan), loads.order[0])
        while not load.finished:
            _, store, load = loads.steps(store, load)[0]
        if store.doc and store.doc.marked:
            return "a marker is left"
        if store.old is not None or (store.record and store.record[1] is not LoadState.DONE):
            return "a load is left open"
        owned = world.stream.high >= 0 or world.books.taken
        content = store.doc.content if store.doc else None
        if owned and content not in allowed:
            return f"a later load stores {content} for a user of the stream"
        return None


class Walk(interleavings.Walk[World]):
    """All interleavings of one scenario."""

    def __init__(self, scenario: Scenario, deviations: frozenset[str] = frozenset()) -> None:
        machine = Machine(scenario, deviations)
        self.invariants = Invariants(scenario, machine)
        super().__init__(machine.first(), machine.actors())

    def broken(self, world: World) -> str | None:
        """Return the first invariant that does not hold in this world, or None."""
        return self.invariants.broken(world)

    def ends(self, world: World, *, goes_on: bool) -> bool:  # noqa: ARG002
        """Whether nobody has a step left."""
        return not goes_on


def loaded(content: str) -> Store:
    """Return a store in which a file's load wrote the document."""
    return Store(Doc(content, marked=False), Entry(2, 0))
