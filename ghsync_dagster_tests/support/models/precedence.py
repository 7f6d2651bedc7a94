"""A model of one key that executes the steps of `domain/precedence.py` in every order.

Belongs here: what is stored for the key, the load machine, the stream machine and the invariants. Not here: the walk
itself (interleavings.py), which scenarios and mutations are tried (test_precedence.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from ghsync_dagster.domain.precedence import (
    DELETE_STEPS,
    GOES_BACK,
    INSERT_AGAIN_STEPS,
    PLAN_STEPS,
    READ_STEPS,
    SETTLE_STEPS,
    UPSERT_STEPS,
    WRITE_STEPS,
    Action,
    Found,
    Incoming,
    LoadState,
    LoadStep,
    Repair,
    SettleStep,
    Stored,
    StreamStep,
    Version,
    classify,
    classify_missing,
    steps_left,
)
from ghsync_dagster.domain.precedence import settle as settle_key
from ghsync_dagster_tests.support.models import interleavings
from ghsync_dagster_tests.support.models.interleavings import Actor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

DELETE = "delete"
"""The stream operation that deletes; any other text is an upsert of that content."""

LATER = (99, "later")
"""The load that runs alone at the end of every run: event and content."""

FINDS = (SettleStep.FIND_MARKED, SettleStep.FIND_VERSION, SettleStep.FIND_DELETED)
REPAIRS = (SettleStep.REPAIR_DOCUMENT, SettleStep.REPAIR_VERSION)
MISSING_ROUNDS = 1
"""How often a load of the model writes again what it finds missing."""
NOT_FOUND = Found(marked=False, replaced=False, versioned=False, deleted=False)
NOT_READ = Stored(content=None, version=None, deleted=False)


class Doc(NamedTuple):
    """The document."""

    content: str
    marked: bool


class Entry(NamedTuple):
    """The version entry: the event, and the load that wrote the document."""

    event: int
    load: int


class Store(NamedTuple):
    """Everything stored for the key. `old` is the load's log, `record` the newest load's id and state."""

    doc: Doc | None = None
    entry: Entry | None = None
    deleted: bool = False
    old: str | None = None
    record: tuple[int, LoadState] | None = None


class Load(NamedTuple):
    """The load machine: number in the plan, the steps ahead (none: not begun), and what it holds in memory.

    Without an action it recovers a dead load. `again` counts the rounds for what was missing. `done` are the events of
    the loads that came to their end.
    """

    number: int = 1
    ahead: tuple[LoadStep | SettleStep, ...] = ()
    read: Stored = NOT_READ
    marked: bool = False
    action: Action | None = None
    again: int = 0
    found: Found = NOT_FOUND
    done: frozenset[int] = frozenset()
    crashes_left: int = 0
    finished: bool = False

    @property
    def step(self) -> LoadStep | SettleStep | None:
        """The next step."""
        return self.ahead[0] if self.ahead else None

    def after(self) -> Load:
        """Return the machine with its next step done."""
        return self._replace(ahead=self.ahead[1:])


class Stream(NamedTuple):
    """The stream machine: operations so far, the one at work, its next step, and what it last did to the document."""

    ops: tuple[str, ...] = ()
    at: int = 0
    step: int = 0
    crashes_left: int = 0
    last: str | None = None

    @property
    def idle(self) -> bool:
        """Whether every operation so far is acknowledged."""
        return self.step == 0 and self.at == len(self.ops)


class World(NamedTuple):
    """All of it."""

    store: Store
    load: Load
    stream: Stream


class Progress(NamedTuple):
    """How far both machines are, as the invariants ask for it.

    Attributes:
        done: The events of the loads that came to their end.
        last: What the stream last did to the document, None if it never touched the key.
        idle: Whether the stream has acknowledged all of its operations.
        complete: Whether it is idle and no load is left to run.
    """

    done: frozenset[int]
    last: str | None
    idle: bool
    complete: bool


@dataclass(frozen=True)
class Protocol:
    """The steps to execute, the decision at the end, and the names of deviations within single steps."""

    reads: tuple[LoadStep, ...] = READ_STEPS
    late: tuple[LoadStep, ...] = PLAN_STEPS[len(READ_STEPS) :]
    writes: Mapping[Action, tuple[LoadStep, ...]] = field(default_factory=lambda: WRITE_STEPS)
    again: tuple[LoadStep, ...] = INSERT_AGAIN_STEPS
    settle: tuple[SettleStep, ...] = SETTLE_STEPS
    upsert: tuple[StreamStep, ...] = UPSERT_STEPS
    delete: tuple[StreamStep, ...] = DELETE_STEPS
    decide: Callable[[LoadState | None, Found], Repair] = settle_key
    deviations: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Scenario:
    """What a walk starts from and may choose from.

    Attributes:
        start: What is stored.
        owner: The stream's last operation before the start, None where the key is not the stream's.
        loads: Event and content of each load in turn; each starts when the one before ended or died.
        alphabet: The operations that the stream chooses from, freely, at any time.
        max_ops: How many operations the stream chooses at most.
        load_crashes: How many times loads and recoveries may die.
        stream_crashes: How many times the stream may die; it then repeats from any operation on.
    """

    start: Store
    owner: str | None
    loads: tuple[tuple[int, str], ...]
    alphabet: tuple[str, ...]
    max_ops: int
    load_crashes: int
    stream_crashes: int


def _version(event: int) -> Version:
    return Version("2015-01-01T15:00:00Z", event)


class Loads:
    """Executes the steps of loads, recoveries included."""

    def __init__(self, protocol: Protocol, loads: tuple[tuple[int, str], ...]) -> None:
        self.protocol = protocol
        self.plan = (*loads, LATER)
        first = next(at for at, step in enumerate(protocol.settle) if step not in FINDS + REPAIRS)
        self.closing = protocol.settle[first:]
        self.beginning = (LoadStep.RECORD_RUNNING, *protocol.reads, *protocol.late)

    def moves(self, store: Store, load: Load) -> list[tuple[str, Store, Load]]:
        """Every next step of the load, a crash before it included."""
        if load.finished:
            return []
        moves = self.steps(store, load)
        if load.crashes_left and load.step is not None:
            number = load.number if load.action is None and load.step in self.protocol.settle else load.number + 1
            dead = Load(min(number, len(self.plan)), done=load.done, crashes_left=load.crashes_left - 1)
            moves.append((f"CRASH before {load.step.name}", store, dead))
        return [(f"load {load.number}: {label}", stored, new) for label, stored, new in moves]

    def steps(self, store: Store, load: Load) -> list[tuple[str, Store, Load]]:
        """The next step of the load; reading back has two outcomes."""
        step = load.step
        if step is None:
            return [self._begin(store, load)]
        if isinstance(step, SettleStep):
            return [(self._settle_label(store, load), *self._settle(store, load, step))]
        if step in PLAN_STEPS:
            return [self._read(store, load, step)]
        if step is LoadStep.READ_BACK:
            return self._read_back(store, load)
        return [(step.name, self._write(store, load, step), load.after())]

    def _begin(self, store: Store, load: Load) -> tuple[str, Store, Load]:
        if store.record is None or store.record[1] is LoadState.DONE or "no recovery" in self.protocol.deviations:
            return "begin", store, self._enter(load)
        left = steps_left(store.record[1], self.protocol.settle)
        return f"recover, {store.record[1].value}", store, load._replace(ahead=left)

    def _enter(self, load: Load) -> Load:
        if load.number >= len(self.plan):
            return self._end(load)
        return Load(load.number, self.beginning, done=load.done, crashes_left=load.crashes_left)

    def _end(self, load: Load) -> Load:
        return Load(len(self.plan), done=load.done, finished=True)

    def _read(self, store: Store, load: Load, step: LoadStep) -> tuple[str, Store, Load]:
        read = load.read
        if step is LoadStep.READ_DOCUMENT:
            read = read._replace(content=store.doc.content if store.doc else None)
            load = load._replace(marked=store.doc is not None and store.doc.marked)
        elif step is LoadStep.READ_VERSION:
            read = read._replace(version=_version(store.entry.event) if store.entry else None)
        elif step is LoadStep.REMOVE_LATE:
            if load.marked and read.version is None:
                store, read = self._without_marked(store), read._replace(content=None)
        else:
            read = read._replace(deleted=store.deleted)
        load = load._replace(read=read).after()
        if load.ahead:
            return step.name, store, load
        event, content = self.plan[load.number - 1]
        if load.again:
            action = classify_missing(read, marked=load.marked)
            ahead = self.protocol.settle if action.is_skip else (*self.protocol.again, *self._rest())
        else:
            action = classify(read, Incoming(content, _version(event)))
            ahead = self.closing if action.is_skip else self.protocol.writes[action]
            ahead = (*ahead, *(self.closing if action is Action.BUMP else ()))
            ahead = (*ahead, *(self._rest() if action.writes_document else ()))
        kept = read.content if action is Action.REPLACE else None
        load = load._replace(action=action, ahead=ahead, marked=False, read=NOT_READ._replace(content=kept))
        return f"{step.name}: {action.name}", store, load

    def _rest(self) -> tuple[LoadStep | SettleStep, ...]:
        return (LoadStep.READ_BACK, *self.protocol.settle)

    def _write(self, store: Store, load: Load, step: LoadStep) -> Store:
        event, content = self.plan[load.number - 1]
        if step is LoadStep.RECORD_RUNNING:
            return store._replace(record=(load.number, LoadState.RUNNING))
        if step is LoadStep.REMOVE_WRONG:
            return self._without_marked(store)
        if step is LoadStep.DROP_STALE:
            return store._replace(entry=None)
        if step is LoadStep.FORGET_LOGGED:
            return store._replace(old=None)
        if step is LoadStep.LOG_OLD:
            return store._replace(old=str(load.read.content))
        if step is LoadStep.WRITE_VERSION:
            late = "version is written late" in self.protocol.deviations
            return store if late else store._replace(entry=self._written_entry(store.entry, load, event))
        return store._replace(doc=self._written_doc(store.doc, load, content))

    def _without_marked(self, store: Store) -> Store:
        return store._replace(doc=None if store.doc and store.doc.marked else store.doc)

    def _written_doc(self, doc: Doc | None, load: Load, content: str) -> Doc | None:
        if load.action is Action.INSERT:
            return Doc(content, marked=True) if doc is None else doc
        if "replaces whatever is there" in self.protocol.deviations and doc is not None:
            return Doc(content, marked=True)
        return Doc(content, marked=True) if doc == Doc(str(load.read.content), marked=False) else doc

    def _written_entry(self, entry: Entry | None, load: Load, event: int) -> Entry | None:
        if load.action is Action.INSERT:
            return entry or Entry(event, load.number)
        if entry is None and "version is upserted" not in self.protocol.deviations:
            return None
        if load.action is Action.BUMP and "bump names its load" not in self.protocol.deviations:
            return Entry(event, entry.load if entry else load.number)
        return Entry(event, load.number)

    def _read_back(self, store: Store, load: Load) -> list[tuple[str, Store, Load]]:
        enough = ("READ_BACK: enough", store, load._replace(read=NOT_READ).after())
        if (store.doc and store.doc.marked) or load.again == MISSING_ROUNDS:
            return [enough]
        again = load._replace(ahead=self.protocol.reads, read=NOT_READ, again=load.again + 1)
        return [enough, ("READ_BACK: missing", store, again)]

    def _settle_label(self, store: Store, load: Load) -> str:
        assert load.step is not None
        assert store.record is not None
        repair = self.protocol.decide(store.record[1], load.found)
        return f"{load.step.name}: {repair.name}" if load.step in REPAIRS else load.step.name

    def _settle(self, store: Store, load: Load, step: SettleStep) -> tuple[Store, Load]:
        assert store.record is not None
        owner, state = store.record
        if step in FINDS:
            if (
                step is SettleStep.FIND_VERSION
                and load.action
                and "version is written late" in self.protocol.deviations
            ):
                event = self.plan[load.number - 1][0]
                store = store._replace(entry=self._written_entry(store.entry, load, event))
            load = load._replace(found=self._find(store, load, step))
        elif step is SettleStep.REPAIR_DOCUMENT:
            store = self._repair_document(store, self.protocol.decide(state, load.found))
        elif step is SettleStep.REPAIR_VERSION:
            repair = self.protocol.decide(state, load.found)
            if repair is Repair.DROP_VERSION or (repair is Repair.REMOVE and load.found.versioned):
                store = store._replace(entry=None)
        elif step is SettleStep.RECORD_CHECKED:
            store = store._replace(record=(owner, LoadState.CHECKED))
        elif step is SettleStep.UNMARK:
            store = store._replace(doc=store.doc and store.doc._replace(marked=False))
        elif step is SettleStep.FORGET_OLD:
            store = store._replace(old=None)
        else:
            store = store._replace(record=(owner, LoadState.DONE))
        load = load.after()
        if load.step is None:
            return store, self._next_load(load)
        if step not in FINDS and load.step not in REPAIRS:
            load = load._replace(found=NOT_FOUND, read=NOT_READ)
        return store, load

    def _find(self, store: Store, load: Load, step: SettleStep) -> Found:
        assert store.record is not None
        found = load.found._replace(replaced=store.old is not None)
        if step is SettleStep.FIND_MARKED:
            return found._replace(marked=store.doc is not None and store.doc.marked)
        if step is SettleStep.FIND_DELETED:
            return found._replace(deleted=store.deleted)
        if load.action is Action.INSERT and "inserts are taken as versioned" in self.protocol.deviations:
            return found._replace(versioned=True)
        return found._replace(versioned=store.entry is not None and store.entry.load == store.record[0])

    def _repair_document(self, store: Store, repair: Repair) -> Store:
        if store.doc is None or not (store.doc.marked or "repairs what is unmarked" in self.protocol.deviations):
            return store
        if repair is Repair.PUT_BACK:
            return store._replace(doc=Doc(str(store.old), marked=False))
        return store._replace(doc=None) if repair is Repair.REMOVE else store

    def _next_load(self, load: Load) -> Load:
        if load.action is None:
            return self._enter(load)
        done = load.done | {self.plan[load.number - 1][0]}
        if load.number + 1 >= len(self.plan):
            return self._end(load._replace(done=done))
        return Load(load.number + 1, done=done, crashes_left=load.crashes_left)


class Streams:
    """Executes the steps of the stream."""

    def __init__(self, protocol: Protocol, alphabet: tuple[str, ...], max_ops: int) -> None:
        self.protocol = protocol
        self.alphabet = alphabet
        self.max_ops = max_ops

    def moves(self, store: Store, stream: Stream) -> list[tuple[str, Store, Stream]]:
        """Every next step: a new operation, the one at work, one to repeat, or a crash."""
        ops, at = stream.ops, stream.at
        moves: list[tuple[str, Store, Stream]] = []
        if stream.idle and len(ops) < self.max_ops:
            moves = [self._step(store, stream._replace(ops=(*ops, op))) for op in self.alphabet]
        elif stream.step:
            moves = [self._step(store, stream)]
        else:  # what is delivered again may be coalesced, so operations but the last may be passed over
            moves = [self._step(store, stream._replace(at=again)) for again in range(at, len(ops))]
        if stream.crashes_left and (stream.step or stream.idle):
            dead = stream._replace(step=0, crashes_left=stream.crashes_left - 1)
            again_from = range(min(at + 1, len(ops)))
            moves += [(f"CRASH, again from {again}", store, dead._replace(at=again)) for again in again_from]
        return [(f"stream: {label}", stored, new) for label, stored, new in moves]

    def _step(self, store: Store, stream: Stream) -> tuple[str, Store, Stream]:
        op = stream.ops[stream.at]
        steps = self.protocol.delete if op == DELETE else self.protocol.upsert
        step = steps[stream.step]
        following = stream.step + 1
        if step is StreamStep.RECORD_DELETED:
            store = store._replace(deleted=True)
        elif step is StreamStep.FORGET_DELETED:
            store = store._replace(deleted=False)
        elif step is StreamStep.WRITE_DOCUMENT:
            store, stream = store._replace(doc=Doc(op, marked=False)), stream._replace(last=op)
        elif step is StreamStep.REMOVE_DOCUMENT:
            store, stream = store._replace(doc=None), stream._replace(last=op)
        else:
            if step in GOES_BACK and store.entry is not None and "no repeat" not in self.protocol.deviations:
                following = steps.index(GOES_BACK[step])
            store = store._replace(entry=None)
        stream = stream._replace(step=following)
        if following == len(steps):
            stream = stream._replace(at=stream.at + 1, step=0)
        return f"{op if op == DELETE else 'upsert ' + op}: {step.name}", store, stream


class Invariants:
    """What must hold, at every moment and at the end.

    What the stream wrote stays as it is at every moment, or carries the marker of a load that will put it back. With
    two loads that is asked for when the operation is acknowledged: an upsert that stands still before its write, while
    one load inserts the key, and again after it, while another load replaces it, writes once more when it goes on.
    """

    def __init__(self, scenario: Scenario, loads: Loads) -> None:
        self.start = scenario.start
        self.loads = loads
        self.at_every_moment = len(scenario.loads) == 1
        self.contents = dict(scenario.loads)
        self.reached: frozenset[int] = frozenset()
        if self.start.doc and self.start.entry:
            self.contents[self.start.entry.event] = self.start.doc.content
            self.reached = frozenset({self.start.entry.event})

    def broken(self, store: Store, progress: Progress) -> str | None:
        """The first invariant that does not hold in this state, or None."""
        last = progress.last
        if last is not None and (self.at_every_moment or progress.idle):
            broken = self._of_stream(store, last)
        elif last is None and progress.idle:
            broken = self._of_loads(store, progress.done)
        else:
            broken = None
        if broken or not progress.complete:
            return broken
        return self._at_end(store, last) or self._after_later_load(store, last) or self._untidy(store, last)

    def _of_stream(self, store: Store, last: str) -> str | None:
        if last == DELETE:
            return "a deleted user is back" if store.doc and not store.doc.marked else None
        if store.doc is None:
            return "the stream's document is lost"
        if not store.doc.marked and store.doc.content != last:
            return "the stream's document is overwritten"
        return None

    def _of_loads(self, store: Store, done: frozenset[int]) -> str | None:
        reached = self.reached | done
        if store.doc is None:
            return "a loaded document is lost" if reached else None
        if store.doc.marked:
            return None
        if store.entry is None:
            return "a loaded document has no version"
        if reached and store.entry.event < max(reached):
            return "an older event replaced a newer one"
        if self.contents.get(store.entry.event) != store.doc.content:
            return "content and version do not belong together"
        return None

    def _at_end(self, store: Store, last: str | None) -> str | None:
        if store.doc and store.doc.marked:
            return "a marker is left"
        if store.record and store.record[1] is not LoadState.DONE:
            return "a load is left open"
        if last not in (None, DELETE) and store.entry:
            return "the stream's document has a version"
        return None

    def _after_later_load(self, store: Store, last: str | None) -> str | None:
        load = Load(len(self.loads.plan), self.loads.beginning)
        while not load.finished:
            _, store, load = self.loads.steps(store, load)[0]
        if last is None:
            right = store.doc == Doc(LATER[1], marked=False) and store.entry == Entry(LATER[0], len(self.loads.plan))
        else:
            right = store.doc == (None if last == DELETE else Doc(last, marked=False))
        return None if right else "a later load takes the key for somebody else's"

    def _untidy(self, store: Store, last: str | None) -> str | None:
        if store.old is not None:
            return "untidy: old content is left in the log"
        if store.deleted and last != DELETE:
            return "untidy: a deletion is left recorded"
        if store.doc is None and store.entry and store.entry != self.start.entry:
            return "untidy: a version is left without document"
        return None


class Walk(interleavings.Walk[World]):
    """All interleavings of one scenario.

    One is a sequence of steps from the start to a state where the loads are finished and the stream is idle.
    """

    def __init__(self, protocol: Protocol, scenario: Scenario) -> None:
        loads = Loads(protocol, scenario.loads)
        streams = Streams(protocol, scenario.alphabet, scenario.max_ops)
        self.judged = cache(Invariants(scenario, loads).broken)

        def load_moves(world: World) -> list[tuple[str, World]]:
            moves = loads.moves(world.store, world.load)
            return [(label, world._replace(store=store, load=load)) for label, store, load in moves]

        def stream_moves(world: World) -> list[tuple[str, World]]:
            moves = streams.moves(world.store, world.stream)
            return [(label, world._replace(store=store, stream=stream)) for label, store, stream in moves]

        load = Load(crashes_left=scenario.load_crashes)
        stream = Stream(crashes_left=scenario.stream_crashes, last=scenario.owner)
        actors = [
            Actor(load_moves, frozenset({"store", "load"})),
            Actor(stream_moves, frozenset({"store", "stream"})),
        ]
        super().__init__(World(scenario.start, load, stream), actors)

    def broken(self, world: World) -> str | None:
        """Return the first invariant that does not hold in this world, or None."""
        load, stream = world.load, world.stream
        complete = load.finished and stream.idle
        return self.judged(world.store, Progress(load.done, stream.last, stream.idle, complete))

    def ends(self, world: World, *, goes_on: bool) -> bool:  # noqa: ARG002
        """Whether the loads are finished and the stream is idle."""
        return world.load.finished and world.stream.idle
