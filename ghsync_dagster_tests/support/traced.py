"""What stands in for a store and a lease where a test holds the steps of the real code against the tables; no servers.

Belongs here: the commands of the stream, which repairs give too, and the lease of a load. Not here: the commands of one
flow alone, and what has to hold of a trace.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ghsync_dagster.domain.errors import LeaseLostError
from ghsync_dagster.domain.precedence import StreamStep
from ghsync_dagster.stores.mongo.writer import Refused

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Step = TypeVar("Step")
REFUSED = Refused("validator", "code 121")


class Traced(Generic[Step]):
    """Notes which step each command is, by key."""

    def __init__(self) -> None:
        self.trace: dict[str, list[Step | StreamStep]] = defaultdict(list)
        self.overtaken: dict[str, int] = {}
        """How often a load comes between the write and the second drop of a key."""
        self.refused: set[str] = set()
        """Keys that the database refuses."""

    def note(self, step: Step | StreamStep, keys: Iterable[str]) -> None:
        """Note that a step is taken for keys."""
        for key in keys:
            self.trace[key].append(step)

    def record_deleted(self, keys: Iterable[str]) -> None:
        """As ``UserWriter``."""
        self.note(StreamStep.RECORD_DELETED, keys)

    def drop_versions(self, keys: Iterable[str]) -> set[str]:
        """As ``UserWriter``; the first time there is an entry of each key, which is of no matter."""
        found = set()
        for key in keys:
            is_again = self.trace[key][-1:] == [StreamStep.WRITE_DOCUMENT]
            self.note(StreamStep.DROP_VERSION_AGAIN if is_again else StreamStep.DROP_VERSION, [key])
            left = self.overtaken.get(key, 0)
            if is_again and left:
                self.overtaken[key] = left - 1
            if left or not is_again:
                found.add(key)
        return found

    def upsert(self, upserts: Mapping[str, Any], **_: Any) -> dict[str, Refused]:
        """As ``UserWriter``."""
        self.note(StreamStep.WRITE_DOCUMENT, upserts)
        return {key: REFUSED for key in upserts if key in self.refused}

    def remove(self, keys: Iterable[str]) -> int:
        """As ``UserWriter``."""
        keys = list(keys)
        self.note(StreamStep.REMOVE_DOCUMENT, keys)
        return len(keys)

    def forget_deleted(self, keys: Iterable[str]) -> None:
        """As ``UserWriter``."""
        self.note(StreamStep.FORGET_DELETED, keys)


class TracedLease:
    """A lease that is lost after some commands.

    Args:
        asks: How often it allows a command; None: always.
    """

    def __init__(self, asks: int | None = None) -> None:
        self._asks = asks

    def allow(self) -> None:
        """As a lease in hand, which each command asks."""
        if self._asks is not None:
            self._asks -= 1
            if self._asks < 0:
                raise LeaseLostError("planted", way_out="none")
