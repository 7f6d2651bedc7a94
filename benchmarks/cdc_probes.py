"""Probes: rows that tell, by being there, how far the collection is behind the table. Nobody else is asked.

Belongs here: who commits them, who watches for them, and pairs of the two times. Not here: what is made of the pairs.

Every tenth change of the workload is a probe: an insert of a new row whose number is in its key, in the same connection
and transaction as the changes around it. So probes pass MariaDB, Debezium, Kafka and the consumer as these do, wait
where they wait, have a place of their own in each batch, and are never coalesced: a tenth of the changes, unbiased.

A process of its own asks the collection for probes that it has not seen, every ``POLL_SECONDS``. A probe's latency is
from the answer to its commit until the answer in which it is seen first, on the machine's one clock. It is too long by
no more than the time since the poll before was asked, which is told alongside as its resolution. The consumers are not
touched: they may run anywhere, and be killed. Both processes, ``python -m benchmarks.cdc_probes change`` and ``watch``,
tell by lines of JSON.
"""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.harness import BenchmarkError
from benchmarks.tellers import now_ms, say

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ghsync_dagster.dev.workload import RowChange, Table
    from ghsync_dagster.stores.mysql import Statement

MODULE = "benchmarks.cdc_probes"
EVERY = 10
# The store answers in the thread that also writes: asked every 10 ms, it delayed what was measured.
POLL_SECONDS = 0.05
SEED = 20_150_301
# Above all keys of the workload, and of as many digits: so they are in the order of their numbers as strings too.
FIRST_KEY, LAST_KEY = 4 * 10**18, 5 * 10**18


@dataclass(frozen=True, slots=True)
class Probe:
    """One probe that was seen, in ms since 1970 UTC.

    Attributes:
        committed_ms: When its commit was answered.
        seen_ms: When it was seen first.
        within_ms: How long before that the poll was asked in which it was not there.
    """

    committed_ms: int
    seen_ms: int
    within_ms: int = 0

    @property
    def way(self) -> tuple[int, int]:
        """From when to when it was on its way."""
        return self.committed_ms, self.seen_ms

    @property
    def latency_ms(self) -> int:
        """From commit to document; 0 where it was seen before the commit was answered."""
        return max(self.seen_ms - self.committed_ms, 0)


def paired(commits: Iterable[dict[str, Any]], sightings: Iterable[dict[str, Any]]) -> list[Probe]:
    """Return all probes, in the order of their commits.

    Args:
        commits: Lines of the process that changes the table.
        sightings: Lines of the one that watches.

    Raises:
        BenchmarkError: The two do not tell of the same probes.
    """
    seen = {number: (line["at"], line["within"]) for line in sightings for number in line["seen"]}
    committed = {line["first"] + place: line["at"] for line in commits for place in range(line["records"])}
    if committed.keys() != seen.keys():
        raise BenchmarkError(f"{len(committed):,} probes were committed, but {len(seen):,} seen: no pairs of them.")
    return [Probe(at, *seen[number]) for number, at in sorted(committed.items())]


class ProbedTable:
    """A table whose every tenth change is a probe.

    Args:
        table: The table; a workload must send it nine tenths of the rate that is wanted.
    """

    def __init__(self, table: Table) -> None:
        self._table = table
        self._since = 0
        self.sent = 0
        """Probes that were committed, numbered from 0."""

    @property
    def table(self) -> str:
        """The table's quoted name."""
        return self._table.table

    def execute(self, statements: Sequence[Statement]) -> int:
        """Run statements in one transaction, probes between them; return how many rows the statements touched."""
        probed: list[Statement] = []
        probes = 0
        for statement in statements:
            probed.append(statement)
            self._since += 1
            if self._since == EVERY - 1:
                probed.append(self._probe(self.sent + probes))
                self._since = 0
                probes += 1
        touched = self._table.execute(probed)
        self.sent += probes
        return touched - probes

    def _probe(self, number: int) -> Statement:
        values = (FIRST_KEY + number, "probe", None, None, None)
        return f"INSERT INTO {self.table} VALUES (%s, %s, %s, %s, %s)", values  # noqa: S608  only names


# --- the processes --------------------------------------------------------------------------------------------------


def _change(rate: float, seconds: float) -> int:
    from ghsync_dagster.dev.workload import Workload
    from ghsync_dagster.logging import configure_logging
    from ghsync_dagster.settings import load_settings
    from ghsync_dagster.stopping import stop_on_signals
    from ghsync_dagster.stores.mysql import MySqlStore

    settings = load_settings()
    # Onto standard error: standard output is for the lines.
    configure_logging(settings)
    url = settings.mysql_url
    if url is None:
        raise AssertionError("MYSQL_URL is set for this process")
    stop = threading.Event()
    with stop_on_signals(stop), MySqlStore(url.get_secret_value()) as table:
        table.ensure_table()
        probed = ProbedTable(table)
        told = 0

        def committed(changes: Sequence[RowChange], at_ms: int) -> None:
            del changes
            nonlocal told
            if probed.sent > told:
                say({"first": told, "records": probed.sent - told, "at": at_ms})
                told = probed.sent

        workload = Workload(probed, rate=rate * (EVERY - 1) / EVERY, seed=SEED, on_commit=committed)
        report = workload.run(seconds=seconds, stop=stop)
    say({"report": asdict(report) | {"probes": probed.sent}})
    return 0


def _watch() -> int:
    from ghsync_dagster.settings import load_settings
    from ghsync_dagster.stopping import stop_on_signals
    from ghsync_dagster.wiring import store_opener

    stop = threading.Event()
    with stop_on_signals(stop), store_opener(load_settings())() as store:
        # All below are seen; some above may be.
        low, above = 0, set[int]()
        asked_before = None
        say({"ready": True})
        while not stop.is_set():
            asked = time.time_ns()
            wanted = {"user_id": {"$gte": str(FIRST_KEY + low), "$lt": str(LAST_KEY)}}
            found = {int(user["user_id"]) - FIRST_KEY for user in store.users.find(wanted, {"_id": 0, "user_id": 1})}
            at = now_ms()
            if fresh := sorted(found - above):
                within = 0 if asked_before is None else at - asked_before // 1_000_000
                say({"seen": fresh, "records": len(fresh), "at": at, "within": within})
                above |= found
                while low in above:
                    above.discard(low)
                    low += 1
            asked_before = asked
            stop.wait(max(POLL_SECONDS - (time.time_ns() - asked) / 1e9, 0))
    say({"report": {"seen": low}})
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run one of the processes, and return its exit code."""
    match arguments:
        case ["watch"]:
            return _watch()
        case ["change", rate, seconds]:
            return _change(float(rate), float(seconds))
        case _:
            sys.stderr.write(f"usage: python -m {MODULE} watch | change RATE SECONDS\n")
            return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
