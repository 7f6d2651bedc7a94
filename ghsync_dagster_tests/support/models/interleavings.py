"""The walk over every interleaving of the steps of a model: how many there are, or the first state that is wrong.

Belongs here: states as numbers, the count and the shortest way to what is wrong. Not here: who takes steps and what
must hold (precedence.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from functools import cache
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

World = TypeVar("World", bound=tuple[Any, ...])
"""A named tuple of the parts of a state, what is stored first."""

BITS = 32
"""How many bits the number of each part has in the number of a state."""


class Actor(NamedTuple, Generic[World]):
    """Somebody who takes steps.

    Attributes:
        moves: What may be done next in a world.
        parts: The parts of the world that this reads or changes.
        idle: A part, and what of it is enough to know that nothing may be done.
    """

    moves: Callable[[World], list[tuple[str, World]]]
    parts: frozenset[str]
    idle: tuple[str, Callable[[Any], bool]] | None = None


class Counted(NamedTuple):
    """What a walk came to: distinct interleavings and states, or the invariant that broke."""

    interleavings: int
    states: int
    broken: str | None


class Parts:
    """Gives every value of one part a small number, and back."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._numbers: dict[Any, int] = {}

    def of(self, value: Any) -> int:
        """Return the number of a value, a new one if it was never seen."""
        number = self._numbers.setdefault(value, len(self.values))
        if number == len(self.values):
            self.values.append(value)
        return number


class Walk(ABC, Generic[World]):
    """All interleavings from one world on, which must have no cycle.

    A state is one number, made of the numbers of its parts, since hundreds of thousands are compared. What somebody may
    do is found once for the parts that it reads, and is then what is to be added to the state.
    """

    def __init__(self, first: World, actors: Sequence[Actor[World]]) -> None:
        self._type = cast("Any", type(first))
        self._names: tuple[str, ...] = self._type._fields
        self._parts = [Parts() for _ in self._names]
        self._moves = [self._numbered(actor) for actor in actors]
        self._first = self._number(first)
        self.labels: set[str] = set()

    @abstractmethod
    def broken(self, world: World) -> str | None:
        """Return the first invariant that does not hold in this world, or None."""

    @abstractmethod
    def ends(self, world: World, *, goes_on: bool) -> bool:
        """Whether an interleaving ends here, perhaps alongside others that go on."""

    def _numbered(self, actor: Actor[World]) -> tuple[int, Callable[[int], list[tuple[str, int]]]]:
        mask = self._mask(actor.parts)

        @cache
        def moves(state: int) -> list[tuple[str, int]]:
            # The other parts are not there, so that to read or change one which is missing in `parts` is an error.
            whole = zip(self._names, self._world(state), strict=True)
            world = self._type(*(part if name in actor.parts else None for name, part in whole))
            found = actor.moves(world)
            assert not any(self._number(new) & ~mask for _, new in found)
            self.labels.update(label for label, _ in found)
            return [(label, self._number(new) - state) for label, new in found]

        if actor.idle is None:
            return mask, moves
        name, is_idle = actor.idle
        at, one = self._names.index(name), self._mask({name})

        @cache
        def idle(part: int) -> bool:
            return is_idle(self._world(part)[at])

        return mask, lambda state: [] if idle(state & one) else moves(state)

    def _mask(self, parts: Collection[str]) -> int:
        return sum(((1 << BITS) - 1) << BITS * at for at, name in enumerate(self._names) if name in parts)

    def _number(self, world: World) -> int:
        numbers = (0 if part is None else self._parts[at].of(part) for at, part in enumerate(world))
        return sum(number << BITS * at for at, number in enumerate(numbers))

    def _world(self, state: int) -> World:
        low = (1 << BITS) - 1
        world: World = self._type(*[part.values[state >> BITS * at & low] for at, part in enumerate(self._parts)])
        return world

    def _following(self, state: int) -> list[tuple[str, int]]:
        return [(label, state + change) for mask, moves in self._moves for label, change in moves(state & mask)]

    def count(self) -> Counted:
        """Walk every interleaving once: how many there are, or the first broken invariant.

        Paths are summed up over the states.
        """
        paths: dict[int, int] = {}
        stack: list[tuple[int, Iterator[tuple[str, int]], list[int]]] = [
            (self._first, iter(self._following(self._first)), [0])
        ]
        while stack:
            state, following, total = stack[-1]
            for _, nxt in following:
                known = paths.get(nxt)
                if known is None:
                    world = self._world(nxt)
                    broken = self.broken(world)
                    if broken:
                        return Counted(0, len(paths), broken)
                    ahead = self._following(nxt)
                    stack.append((nxt, iter(ahead), [int(self.ends(world, goes_on=bool(ahead)))]))
                    break
                total[0] += known
            else:
                stack.pop()
                paths[state] = total[0]
                if stack:
                    stack[-1][2][0] += total[0]
        return Counted(paths[self._first], len(paths), None)

    def shortest_break(self) -> list[str] | None:
        """Return the steps of a shortest run to what is wrong, what is stored then, and the invariant; or None."""
        came: dict[int, tuple[int, str]] = {}
        queue = deque([self._first])
        while queue:
            state = queue.popleft()
            for label, nxt in self._following(state):
                if nxt in came:
                    continue
                came[nxt] = (state, label)
                world = self._world(nxt)
                broken = self.broken(world)
                if broken:
                    return [*self._trace(came, nxt), str(world[0]), broken]
                queue.append(nxt)
        return None

    def _trace(self, came: dict[int, tuple[int, str]], state: int) -> list[str]:
        trace: list[str] = []
        while state != self._first:
            state, label = came[state]
            trace.append(label)
        return trace[::-1]
