"""Guards: what a process has to hold to write to MongoDB.

Belongs here: what a guard is. Not here: the guards that are a load's lease (``batch.lease``) and the ownership of
partitions (``cdc.stream.write``), and how a command passes one (``commands``). Needs no driver.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


class Guard(ABC):
    """Says whether a process may send a command."""

    @abstractmethod
    def allow(self) -> float | None:
        """Return how many seconds the next command may take; None for no limit.

        Raises:
            GhsyncError: This process must write no more.
        """


class WriterGuard(Guard):
    """A guard whose holder may write users and what is known of them: a load's lease, or the owner of partitions."""


@dataclass(frozen=True, slots=True)
class TimeLimit(Guard):
    """Lets everybody write, for books in which one entry does not depend on another.

    Attributes:
        seconds: How long one command may take.
    """

    seconds: float

    def allow(self) -> float:
        """Return the limit."""
        return self.seconds
