"""A finding: the outcome of one check.

Belongs here: what every check reports, for files and changes alike. Not here: the checks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

OFFENDERS: Final = 20
"""How many offenders a finding names."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: The check's name.
        passed: Whether the check passed.
        summary: The outcome in one line of text.
        counts: Exact numbers behind it.
        offenders: Up to ``OFFENDERS`` items that failed it.
        way_out: How to recover, or to end a risk; empty if there is nothing to do.
    """

    check: str
    passed: bool
    summary: str
    counts: dict[str, int | float] = field(default_factory=dict)
    offenders: list[dict[str, Any]] = field(default_factory=list)
    way_out: str = ""

    @classmethod
    def judged(
        cls,
        check: str,
        summary: str,
        counts: dict[str, int | float],
        *,
        passed: bool,
        offenders: Iterable[dict[str, Any]] = (),
        way_out: str,
    ) -> Finding:
        """Return the finding of a check: with offenders and way out only if it failed."""
        if passed:
            return cls(check, passed, summary, counts)
        return cls(check, passed, summary, counts, list(islice(offenders, OFFENDERS)), way_out)
