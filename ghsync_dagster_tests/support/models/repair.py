"""A model of one user that executes the steps of `domain/repair.py` in every order, alongside its source and a load.

Belongs here: the source with its binlog, the owner that applies records and repairs, and the invariants. Not here: the
walk itself (interleavings.py), loads (precedence.py), which scenarios and mutations are tried
(test_repair_model.py).

A state of the row is a number: 0 at the start, and one more by each transaction. A record of the binlog has the number
of the state that it holds, and its place; a transaction that is silent leaves no record.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ghsync_dagster.domain.change import Op, Position
from ghsync_dagster.domain.precedence import DELETE_STEPS, GOES_BACK, UPSERT_STEPS, StreamStep
from ghsync_dagster.domain.repair import (
    REPAIR_STEPS,
    WRITING_STEPS,
    Cure,
    Disposition,
    Fence,
    Overtaken,
    Reading,
    RepairStep,
    StoredUser,
    cure,
    disposition,
    is_current,
    overtaken,
)
from ghsync_dagster_tests.support.models import interleavings, precedence
from ghsync_dagster_tests.support.models.interleavings import Actor
from ghsync_dagster_tests.support.models.precedence import DELETE, Doc, Entry, Load, Loads, Protocol, Store

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

GONE = -1
"""What stands for a row that is not read yet."""
FILES = Store(doc=Doc("file", marked=False), entry=Entry(5, 0))
"""What is stored of a user that a file brought."""
NOTHING = Store()


class Row(NamedTuple):
    """A state of the row: its number, and whether there is one."""

    number: int
    there: bool


THERE = Row(0, there=True)


class Event(NamedTuple):
    """A record of the binlog.

    Attributes:
        row: The state that it holds.
        placed: Whether it tells its place.
        readable: Whether it can be decoded; it becomes a dead letter where not.
        truncates: Whether it is a truncate of the table.
    """

    row: Row
    placed: bool = True
    readable: bool = True
    truncates: bool = False


class Source(NamedTuple):
    """The table and its binlog.

    Attributes:
        visible: What a read sees.
        binlog: Its records, the oldest first; the place of a record is its number in this list.
        pending: The state that the transaction at work leaves, None where none is.
        kind: What that transaction does.
        flushed: Whether its record is in the binlog already.
        left: Transactions that may still come.
    """

    visible: Row
    binlog: tuple[Event, ...] = ()
    pending: Row | None = None
    kind: str = ""
    flushed: bool = False
    left: int = 0


class Books(NamedTuple):
    """What repairs keep.

    Attributes:
        token: The request's newest token.
        is_open: Whether the request is open.
        fence: The position of the newest reading, None before the first.
        has_row: Whether that reading found a row.
        requests_left: How often somebody may still request the user.
        due: The number of the row's state when somebody did so last: a closed request has seen it, or a later one.
        letter: The number of the state in the newest open dead letter; None where none is open.
    """

    token: int = 0
    is_open: bool = False
    fence: int | None = None
    has_row: bool = True
    requests_left: int = 0
    due: int = 0
    letter: int | None = None

    def requested(self) -> Books:
        """Return them with the user requested once more."""
        return self._replace(token=self.token + 1, is_open=True)


class Claimed(NamedTuple):
    """A claimed request, and what is known of it in memory."""

    token: int | None = None
    notes: bool = False
    """Whether the owner notes what it applies."""
    taken: int | None = None
    """The newest record that the owner had taken when that began."""
    read: tuple[int, Row] | None = None
    applied: int | None = None
    """The place of the last record that was applied since; -1 where the record told none, or was not decoded."""
    stored: StoredUser | None = None


class Owner(NamedTuple):
    """The consumer that owns the partition.

    Attributes:
        at: The next record to take.
        op: What is written now: a state, None where nothing is.
        step: The next step of the stream's own, of what is written.
        place: The place of the record that is written, None for a row that was read.
        claim: The request at work.
        repair: The number of the repair's next step, None where none is claimed.
        crashes_left: How often it may die.
        late: A state whose write may come late, after the owner has given up.
        lates_left: How often a write may come late.
        unhealed: Whether a late write has come, and who sent it has not asked again yet.
        late_landed: Whether a late write has ever come.
        floor: The number of the state that a repair wrote last.
        known: The number of the state that was written last.
        last: What was last written, as the precedence model names it.
    """

    at: int = 0
    op: Row | None = None
    step: int = 0
    place: int | None = None
    claim: Claimed = Claimed()
    repair: int | None = None
    crashes_left: int = 0
    late: Row | None = None
    lates_left: int = 0
    unhealed: bool = False
    late_landed: bool = False
    floor: int = 0
    known: int = 0
    last: str | None = None


class World(NamedTuple):
    """All of it."""

    store: Store
    load: Load
    owner: Owner
    source: Source
    books: Books


@dataclass(frozen=True)
class RepairProtocol:
    """The steps and decisions to execute, and the names of deviations within single steps."""

    steps: tuple[RepairStep, ...] = REPAIR_STEPS
    upsert: tuple[StreamStep, ...] = UPSERT_STEPS
    delete: tuple[StreamStep, ...] = DELETE_STEPS
    cure: Callable[..., Cure] = cure
    disposition: Callable[[Fence, Op, Position | None], Disposition] = disposition
    is_current: Callable[[Reading, Sequence[Position | None]], bool] = is_current
    overtaken: Callable[..., Overtaken] = overtaken
    deviations: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Scenario:
    """What a walk starts from and may choose from.

    Attributes:
        start: What is stored.
        row: The row at the start.
        owned: Whether the stream wrote the document.
        transactions: How many there may be.
        kinds: What a transaction may do: ``u``, ``d`` or ``t``, a truncate. Each may be silent (``u-``), without place
            (``u?``), or a record that cannot be decoded (``u!``).
        loads: Event and content of each load.
        crashes: How often the owner may die.
        lates: How often a write of the owner may come late.
        backlog: Records that wait at the start, of states before the row's.
        is_replica: Whether the server that is read may be behind the one that the connector follows.
        requests: How often the user may be requested more.
    """

    start: Store = NOTHING
    row: Row = THERE
    owned: bool = True
    transactions: int = 2
    kinds: tuple[str, ...] = ("u", "d", "u-", "d-")
    loads: tuple[tuple[int, str], ...] = ()
    crashes: int = 0
    lates: int = 0
    backlog: tuple[Event, ...] = ()
    is_replica: bool = False
    requests: int = 0


def content(row: Row) -> str:
    """Return how the precedence model names what is written for a state of the row."""
    return f"s{row.number}" if row.there else DELETE


def number(store: Store) -> int | None:
    """Return the number of the state that the document holds; None for none, or one that a file brought."""
    text = store.doc.content if store.doc else ""
    return int(text[1:]) if text.startswith("s") else None


def place(at: int | None) -> Position | None:
    """Return a place in the binlog."""
    return None if at is None else Position(1, at, 0, "1/bin")


def reading(at: int) -> Reading:
    """Return the reading that lies at a place."""
    return Reading("r", Position(1, at, 0, "1/bin"))


class Sources:
    """Runs transactions: lock and change, write the binlog, commit and unlock."""

    def __init__(self, scenario: Scenario) -> None:
        self.kinds = scenario.kinds

    def moves(self, source: Source) -> list[tuple[str, Source]]:
        """Every next step of the source."""
        if source.pending is None:
            if not source.left:
                return []
            following = source.visible.number + 1
            found = []
            for kind in self.kinds:
                row = Row(following, there=kind.startswith("u"))
                if row.there or source.visible.there:
                    begun = source._replace(pending=row, kind=kind, left=source.left - 1)
                    found.append((f"source: {kind} begins", begun))
            return found
        if not source.kind.endswith("-") and not source.flushed:
            kind, sign = source.kind[0], source.kind[1:]
            record = Event(source.pending, placed=sign != "?", readable=sign != "!", truncates=kind == "t")
            return [("source: binlog", source._replace(binlog=(*source.binlog, record), flushed=True))]
        done = source._replace(visible=source.pending, pending=None, kind="", flushed=False)
        return [("source: commit", done)]


class Owners:
    """Takes records, applies them and repairs."""

    def __init__(self, protocol: RepairProtocol, *, is_replica: bool = False) -> None:
        self.protocol = protocol
        self.is_replica = is_replica
        self.begins = next(at for at, step in enumerate(protocol.steps) if step in WRITING_STEPS)

    def moves(self, world: World) -> list[tuple[str, World]]:
        """Every next step of the owner."""
        owner = world.owner
        moves = self._repairs(world)
        if owner.op is not None:
            moves.append(self._write(world))
        elif not self._is_writing(owner):
            moves += self._take(world)
        return moves + (self._lateness(world) or self._deaths(world))

    def _is_writing(self, owner: Owner) -> bool:
        """Whether the thread that writes is at a repair."""
        if owner.repair is None or owner.repair < self.begins:
            return False
        return owner.repair > self.begins or owner.claim.stored is not None

    # Records

    def _take(self, world: World) -> list[tuple[str, World]]:
        owner, source, books = world.owner, world.source, world.books
        if owner.at >= len(source.binlog):
            return []
        event, label = source.binlog[owner.at], f"take {owner.at}"
        at = owner.at if event.placed and event.readable else None
        taken = owner._replace(at=owner.at + 1)
        noted = taken
        if owner.claim.notes:
            noted = taken._replace(claim=owner.claim._replace(applied=-1 if at is None else at))
        if not event.readable:
            books = books._replace(letter=event.row.number)
            owner = taken if "a dead letter is not noted" in self.protocol.deviations else noted
            return [(f"{label}: dead letter", world._replace(owner=owner, books=books))]
        what, row = Disposition.APPLY, event.row
        if books.fence is not None:
            fence = Fence(reading(books.fence), books.has_row)
            op = Op.TRUNCATE if event.truncates else Op.UPSERT if row.there else Op.DELETE
            what = self.protocol.disposition(fence, op, place(at))
            if what.requests_again:
                books = books.requested()
            if what.is_left_out:
                return [(f"{label}: {what.name}", world._replace(owner=taken, books=books))]
            if not books.has_row and (what.deletes or not row.there):
                # The row is gone, as it was when it was read.
                row = Row(max(row.number, owner.floor), there=False)
        if books.letter is not None and books.letter < event.row.number:
            books = books._replace(letter=None)
        if event.truncates and world.store.doc is None and world.store.entry is None:
            return [(f"{label}: nobody is there", world._replace(owner=noted, books=books))]
        written = noted._replace(op=row, step=0, place=owner.at)
        return [(f"{label}: {what.name}", world._replace(owner=written, books=books))]

    def _write(self, world: World) -> tuple[str, World]:
        """Take one of the stream's own steps."""
        owner, store = world.owner, world.store
        row = owner.op
        assert row is not None
        steps = self.protocol.upsert if row.there else self.protocol.delete
        step = steps[owner.step]
        following = owner.step + 1
        if step is StreamStep.RECORD_DELETED:
            store = store._replace(deleted=True)
        elif step is StreamStep.FORGET_DELETED:
            store = store._replace(deleted=False)
        elif step in (StreamStep.WRITE_DOCUMENT, StreamStep.REMOVE_DOCUMENT):
            store = store._replace(doc=Doc(content(row), marked=False) if row.there else None)
            owner = owner._replace(last=content(row), known=row.number)
            if owner.place is None:
                owner = owner._replace(floor=row.number)
        else:
            if step in GOES_BACK and store.entry is not None:
                following = steps.index(GOES_BACK[step])
            store = store._replace(entry=None)
        owner = owner._replace(step=following)
        if following == len(steps):
            owner = owner._replace(op=None, step=0, place=None)
            if self._step(owner) is RepairStep.WRITE:
                owner = self._after(owner)
        return f"{content(row)}: {step.name}", world._replace(store=store, owner=owner)

    # Repairs

    def _step(self, owner: Owner) -> RepairStep | None:
        return None if owner.repair is None else self.protocol.steps[owner.repair]

    def _after(self, owner: Owner) -> Owner:
        assert owner.repair is not None
        following = owner.repair + 1
        if following == len(self.protocol.steps):
            return owner._replace(repair=None, claim=Claimed())
        return owner._replace(repair=following)

    def _repairs(self, world: World) -> list[tuple[str, World]]:
        owner = world.owner
        if owner.repair is None:
            if not world.books.is_open:
                return []
            owner = owner._replace(repair=0)
        step = self._step(owner)
        if step in WRITING_STEPS and owner.op is not None:
            return []
        name = f"repair: {step.name if step else ''}"
        found = self._repair(world, owner)
        moves = [] if found is None else [(name, found)]
        if self.is_replica and step is RepairStep.READ_SOURCE:
            moves += [(f"{name}, behind", behind) for behind in self._behind(world, owner)]
        return moves

    def _behind(self, world: World, owner: Owner) -> list[World]:
        """Read a server that has not executed the newest records yet."""
        found = []
        for at, event in enumerate(world.source.binlog):
            row = world.source.binlog[at - 1].row if at else THERE
            if event.placed and self.protocol.is_current(reading(at), [place(owner.claim.taken)]):
                claim = owner.claim._replace(read=(at, row))
                found.append(world._replace(owner=self._after(owner._replace(claim=claim))))
        return found

    def _repair(self, world: World, owner: Owner) -> World | None:
        step, claim, books, source = self._step(owner), owner.claim, world.books, world.source
        if step is RepairStep.CLAIM:
            taken = (
                self._taken(world)
                if "what was taken is kept before noting begins" in self.protocol.deviations
                else None
            )
            owner = owner._replace(claim=claim._replace(token=books.token, taken=taken))
        elif step is RepairStep.WATCH:
            taken = self._taken(world) if claim.taken is None else claim.taken
            owner = owner._replace(claim=claim._replace(notes=True, taken=taken, applied=None))
        elif step is RepairStep.READ_SOURCE:
            at, row = len(source.binlog), source.visible
            if source.pending is not None and "reads without locks" not in self.protocol.deviations:
                return None
            if "reads the place before the row" in self.protocol.deviations:
                if claim.read is None or claim.read[1] != Row(GONE, there=False):
                    return world._replace(owner=owner._replace(claim=claim._replace(read=(at, Row(GONE, there=False)))))
                at = claim.read[0]
            if not self.protocol.is_current(reading(at), [place(claim.taken)]):
                return None
            owner = owner._replace(claim=claim._replace(read=(at, row)))
        elif step is RepairStep.READ_STORED:
            judged = self._judge(claim)
            if judged is Overtaken.UNKNOWN:
                return world._replace(owner=owner._replace(repair=None, claim=Claimed()))
            if judged is Overtaken.NEWER:
                return self._close(world, owner)
            owner = owner._replace(claim=claim._replace(stored=self._stored(world.store)))
        elif step is RepairStep.RECORD_FENCE:
            assert claim.read is not None
            if books.is_open and books.token == claim.token:
                books = books._replace(fence=claim.read[0], has_row=claim.read[1].there)
            elif "writes without a fence" not in self.protocol.deviations:
                return world._replace(owner=owner._replace(repair=None, claim=Claimed()))
        elif step is RepairStep.WRITE:
            return self._begin_write(world, owner)
        elif step is RepairStep.RECORD_OUTCOME:
            return self._close(world, owner)
        return world._replace(owner=self._after(owner), books=books)

    def _taken(self, world: World) -> int | None:
        """Return the place of the newest record that was taken and tells one."""
        taken = world.source.binlog[: world.owner.at]
        return max((at for at, event in enumerate(taken) if event.placed and event.readable), default=None)

    def _judge(self, claim: Claimed) -> Overtaken:
        assert claim.read is not None
        if claim.applied is None:
            return Overtaken.NO
        return self.protocol.overtaken(reading(claim.read[0]), place(None if claim.applied < 0 else claim.applied))

    def _stored(self, store: Store) -> StoredUser:
        marked = store.doc is not None and store.doc.marked
        return StoredUser(store.doc is not None, marked, store.entry is not None, store.deleted)

    def _begin_write(self, world: World, owner: Owner) -> World:
        claim = owner.claim
        assert claim.read is not None
        row = claim.read[1]
        stored = claim.stored or StoredUser(document=True, marked=False, versioned=False, deleted=False)
        what = self.protocol.cure(stored, has_row=row.there)
        if what.op is Op.SKIP:
            owner = owner._replace(floor=row.number, known=row.number)
            return world._replace(owner=self._after(owner))
        return world._replace(owner=owner._replace(op=row, step=0, place=None))

    def _close(self, world: World, owner: Owner) -> World:
        books = world.books
        if books.token == owner.claim.token or "closes whatever is open" in self.protocol.deviations:
            books = books._replace(is_open=False)
        if self._step(owner) is not RepairStep.RECORD_OUTCOME:
            # The stream has overtaken it.
            return world._replace(owner=owner._replace(repair=None, claim=Claimed()), books=books)
        return world._replace(owner=self._after(owner), books=books._replace(letter=None))

    # Deaths, and commands that come late

    def _deaths(self, world: World) -> list[tuple[str, World]]:
        owner, found = world.owner, []
        reborn = owner._replace(op=None, step=0, place=None, claim=Claimed(), repair=None)
        books = world.books
        if "the fence is kept in memory" in self.protocol.deviations:
            books = books._replace(fence=None)
        if owner.crashes_left and (owner.op is not None or owner.claim.token is not None or owner.at):
            # What is written still is not committed.
            for again in range((owner.at if owner.place is None else owner.place) + 1):
                dead = reborn._replace(at=again, crashes_left=owner.crashes_left - 1)
                found.append((f"CRASH, again from {again}", world._replace(owner=dead, books=books)))
        if owner.lates_left and owner.op is not None and self._is_document_next(owner.op, owner.step):
            # What the owner was about to write is on its way; others begin where it began.
            again = owner.at if owner.place is None else owner.place
            late = reborn._replace(at=again, late=owner.op, lates_left=owner.lates_left - 1)
            found.append(("GIVES UP, a command is late", world._replace(owner=late)))
        return found

    def _is_document_next(self, row: Row, step: int) -> bool:
        steps = self.protocol.upsert if row.there else self.protocol.delete
        return steps[step] in (StreamStep.WRITE_DOCUMENT, StreamStep.REMOVE_DOCUMENT)

    def _lateness(self, world: World) -> list[tuple[str, World]]:
        """The late command comes; then who gave up asks for its user again, and whoever has the partition goes back."""
        owner = world.owner
        if owner.late is not None:
            doc = Doc(content(owner.late), marked=False) if owner.late.there else None
            landed = owner._replace(late=None, unhealed=True, late_landed=True)
            return [("LATE command", world._replace(store=world.store._replace(doc=doc), owner=landed))]
        if not owner.unhealed or owner.op is not None or self._is_writing(owner):
            return []
        books = world.books
        if books.fence is not None and "a late command is not healed" not in self.protocol.deviations:
            books = books.requested()
        return [("asks again, goes back", world._replace(owner=owner._replace(unhealed=False, at=0), books=books))]


class Walk(interleavings.Walk[World]):
    """All interleavings of one scenario."""

    def __init__(self, protocol: RepairProtocol, scenario: Scenario) -> None:
        self.scenario = scenario
        loads = Loads(Protocol(), scenario.loads)
        owners, sources = Owners(protocol, is_replica=scenario.is_replica), Sources(scenario)
        self.later = (*scenario.loads, precedence.LATER)

        def load_moves(world: World) -> list[tuple[str, World]]:
            if not scenario.loads:
                return []
            moves = loads.moves(world.store, world.load)
            return [(label, world._replace(store=store, load=load)) for label, store, load in moves]

        def source_moves(world: World) -> list[tuple[str, World]]:
            return [(label, world._replace(source=source)) for label, source in sources.moves(world.source)]

        def request_moves(world: World) -> list[tuple[str, World]]:
            if not world.books.requests_left:
                return []
            left, due = world.books.requests_left - 1, world.source.visible.number
            books = world.books.requested()._replace(requests_left=left, due=due)
            return [("requested again", world._replace(books=books))]

        first = World(
            scenario.start,
            Load(finished=not scenario.loads),
            Owner(
                crashes_left=scenario.crashes,
                lates_left=scenario.lates,
                last=content(scenario.row) if scenario.owned and scenario.start.doc else None,
            ),
            Source(scenario.row, scenario.backlog, left=scenario.transactions),
            Books(token=1, is_open=True, requests_left=scenario.requests),
        )
        actors = [
            Actor(load_moves, frozenset({"store", "load"})),
            Actor(owners.moves, frozenset({"store", "load", "owner", "source", "books"})),
            Actor(source_moves, frozenset({"source"})),
            Actor(request_moves, frozenset({"books", "source"})),
        ]
        super().__init__(first, actors)

    def broken(self, world: World) -> str | None:
        """Return the first invariant that does not hold in this world, or None."""
        owner, store, source = world.owner, world.store, world.source
        if owner.late is None and not owner.late_landed and owner.known < owner.floor:
            return "an older state is written over what was repaired"
        if not self._is_over(world):
            return None
        return self._at_end(store, source, owner, world.books)

    def _is_over(self, world: World) -> bool:
        owner, source = world.owner, world.source
        idle = owner.op is None and owner.repair is None and owner.late is None and not owner.unhealed
        idle = idle and not world.books.is_open
        return idle and owner.at == len(source.binlog) and source.pending is None and world.load.finished

    def _at_end(self, store: Store, source: Source, owner: Owner, books: Books) -> str | None:
        logged = max((event.row.number for event in source.binlog), default=0)
        told = max(logged, owner.floor, books.due)
        if source.visible.number > told or books.letter == source.visible.number:
            # A silent change since the last repair, which the next audit finds; or a dead letter tells of it.
            return None
        if store.doc is not None and store.doc.marked:
            return "a marker is left"
        if source.visible.there:
            if number(store) != source.visible.number:
                return "a user is not what the source holds"
            return "the stream's document has a version" if store.entry is not None else None
        if source.binlog and source.binlog[-1].truncates and store.doc is not None and not self.scenario.loads:
            return "a user has outlived a truncate"
        if self.scenario.start == FILES and not source.binlog and source.visible == self.scenario.row and not store.doc:
            return "a file's user is lost"
        if source.binlog and not source.binlog[-1].row.there and store.doc is None and not store.deleted:
            return "a file may bring a deleted user back"
        if owner.last == DELETE:
            if store.doc is not None:
                return "a deleted user is back"
            return None if store.deleted else "a file may bring a deleted user back"
        left_over = store.doc is not None and (number(store) is not None or store.entry is None)
        return "a user that the source does not have is left" if left_over else None

    def ends(self, world: World, *, goes_on: bool) -> bool:
        """Whether all that was asked for and all that came is done."""
        return not goes_on or self._is_over(world)
