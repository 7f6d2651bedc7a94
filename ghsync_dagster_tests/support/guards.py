"""Guards of tests: one that always allows, and one that a test decides on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ghsync_dagster.stores.mongo.guard import WriterGuard
from ghsync_dagster.stores.mongo.writer import UserWriter

if TYPE_CHECKING:
    from collections.abc import Callable

    from ghsync_dagster.stores.mongo.users import UserStore


@dataclass(frozen=True)
class AskedGuard(WriterGuard):
    """Answers what it is given: seconds, or an error.

    Attributes:
        answer: Called before each command.
    """

    answer: Callable[[], float | None] = lambda: 30.0

    def allow(self) -> float | None:
        """Return the answer."""
        return self.answer()


def writer_of(store: UserStore, answer: Callable[[], float | None] = lambda: 30.0) -> UserWriter:
    """Return what writes users, allowed as the answer says."""
    return UserWriter(store, AskedGuard(answer))
