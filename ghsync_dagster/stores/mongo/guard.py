"""Guards: what a process must hold to write to MongoDB.

Belongs here: what a guard is. Not here: the guards that are a load's lease (``batch.lease``) and the ownership of
partitions (``cdc.stream.write``), and how a command passes one (``commands``). Needs no driver.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


class Guard(ABC):
    """Decides whether a process may send a command."""

    @abstractmethod
    def allow(self) -> float | None:
        """Return how many seconds the next command may take; None for no limit.

        Raises:
            GhsyncError: This process must not write any more.
        """


class WriterGuard(Guard):
    """A guard whose holder may write users and their books: a load's lease, or the ownership of partitions."""


@dataclass(frozen=True, slots=True)
class TimeLimit(Guard):
    """Allows every write, for books in which no entry depends on another.

    Attributes:
        seconds: How long one command may take.
    """

    seconds: float

    def allow(self) -> float:
        """Return the limit."""
        return self.seconds
