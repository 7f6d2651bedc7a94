"""Global transaction ids (GTIDs) of MySQL and MariaDB: which sequence one belongs to, and whether a set contains it.

Belongs here: reading what the servers write
(https://dev.mysql.com/doc/refman/8.4/en/replication-gtids-concepts.html,
https://mariadb.com/docs/server/ha-and-performance/standard-replication/gtid). Not here: positions in a binlog's files,
which are ``domain.change``'s, and asking a server.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

_UUID: Final = re.compile(r"\{?([0-9a-f]{8})-?([0-9a-f]{4})-?([0-9a-f]{4})-?([0-9a-f]{4})-?([0-9a-f]{12})\}?", re.ASCII)
_TAG: Final = re.compile(r"[a-z_][a-z0-9_]{0,31}", re.ASCII)
_NUMBER: Final = re.compile(r"[0-9]{1,20}", re.ASCII)
_MARIADB: Final = re.compile(r"([0-9]{1,10})-([0-9]{1,10})-([0-9]{1,20})", re.ASCII)


class Gtid(NamedTuple):
    """One transaction.

    Attributes:
        sequence: Which sequence of transactions it belongs to: `uuid`, `uuid:tag` or MariaDB's `domain-server`, in
            lower case.
        number: Its number in that sequence, which grows from each transaction to the next.
    """

    sequence: str
    number: int


def read_gtid(text: str | None) -> Gtid | None:
    """Read one GTID, in the form of Debezium's `source.gtid`; None where the text is none."""
    if text is None:
        return None
    text = text.strip().lower()
    if found := _MARIADB.fullmatch(text):
        return Gtid(f"{int(found[1])}-{int(found[2])}", int(found[3]))
    uuid, *rest = (part.strip() for part in text.split(":"))
    origin = _read_uuid(uuid)
    if origin is None or not rest or not _NUMBER.fullmatch(rest[-1]):
        return None
    match rest:
        case [number]:
            return Gtid(origin, int(number))
        case [tag, number] if _TAG.fullmatch(tag):
            return Gtid(f"{origin}:{tag}", int(number))
    return None


class GtidSet:
    """The transactions that a server has executed.

    A set of MySQL lists them (`gtid_executed`: `uuid:1-5:7,uuid:tag:1-3`). A position of MariaDB (`gtid_binlog_pos`:
    `0-1-100,1-2-5`) has the last number of each domain, and contains all numbers of the domain up to it.
    """

    def __init__(self, intervals: dict[str, list[tuple[int, int]]], domains: dict[str, int]) -> None:
        self._intervals = {sequence: _merged(found) for sequence, found in intervals.items()}
        self._domains = domains

    @classmethod
    def parse(cls, text: str | None) -> GtidSet:
        """Read a set. A text that is none, or an empty one, gives a set for which ``contains`` is None."""
        members = [member for part in (text or "").split(",") if (member := part.strip().lower())]
        domains: dict[str, int] = {}
        intervals: dict[str, list[tuple[int, int]]] = {}
        for member in members:
            if found := _MARIADB.fullmatch(member):
                domain, number = str(int(found[1])), int(found[3])
                domains[domain] = max(domains.get(domain, 0), number)
                continue
            ranges = _read_member(member)
            if ranges is None:
                return cls({}, {})
            for sequence, low, high in ranges:
                intervals.setdefault(sequence, []).append((low, high))
        return cls({}, {}) if domains and intervals else cls(intervals, domains)

    def contains(self, gtid: str | None) -> bool | None:
        """Return whether a transaction is in the set; None where either text can't be read, or they are of two kinds.

        Args:
            gtid: The transaction, in the form of Debezium's `source.gtid`.
        """
        transaction = read_gtid(gtid)
        if transaction is None:
            return None
        domain, is_mariadb, _ = transaction.sequence.partition("-")
        if is_mariadb:
            return transaction.number <= self._domains.get(domain, -1) if self._domains else None
        if not self._intervals:
            return None
        intervals = self._intervals.get(transaction.sequence, [])
        at = bisect_right(intervals, transaction.number, key=lambda interval: interval[0])
        return at > 0 and transaction.number <= intervals[at - 1][1]


def _read_uuid(text: str) -> str | None:
    # Without dashes, so that no sequence of MySQL looks like one of MariaDB.
    found = _UUID.fullmatch(text)
    return "".join(found.groups()) if found else None


def _read_member(text: str) -> list[tuple[str, int, int]] | None:
    """Read `uuid:1-5:7:tag:1-3`: each interval with its sequence; None where it is something else."""
    uuid, *rest = (part.strip() for part in text.split(":"))
    origin = _read_uuid(uuid)
    if origin is None or not rest:
        return None
    found, sequence, awaits_interval = [], origin, True
    for part in rest:
        if _TAG.fullmatch(part):
            sequence, awaits_interval = f"{origin}:{part}", True
            continue
        low, dash, high = (side.strip() for side in part.partition("-"))
        if not _NUMBER.fullmatch(low) or (dash and not _NUMBER.fullmatch(high)):
            return None
        awaits_interval = False
        found.append((sequence, int(low), int(high or low)))
    return None if awaits_interval else found


def _merged(intervals: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the intervals in order, with those joined that overlap or touch."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(interval for interval in intervals if interval[0] <= interval[1]):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(merged[-1][1], high)
        else:
            merged.append((low, high))
    return merged
