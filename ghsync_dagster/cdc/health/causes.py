"""Why table and collection differ: the likely causes, by the pattern of an audit's differences.

Belongs here: the pure judgement. Not here: what finds the differences or queries the servers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from ghsync_dagster.cdc.health.audit import AuditResult

CURE: Final = "ghsync cdc repair --from-audit"
_BULK: Final = 100
"""From how many extra users on one statement may have deleted their rows."""
_NEARLY_ALL: Final = 0.9
_NO_PATTERN: Final = (
    "No cause shows: look for sessions with sql_log_bin=0 or binlog_format other than ROW, and for who else writes to "
    "the collection."
)


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What else may explain differences. Each attribute is optional.

    Attributes:
        connector: Why the connector sends no changes, as a sentence; empty where it runs or is not known.
        settings: Faults of the server's settings or the table's shape, a sentence each.
        with_letters: Users with open dead letters.
    """

    connector: str = ""
    settings: Sequence[str] = ()
    with_letters: Collection[str] = ()


def likely_causes(result: AuditResult, known: Circumstances) -> list[str]:
    """Return the likely causes of an audit's differences, a sentence each, the most certain first.

    Args:
        result: An audit's, with at least one difference.
        known: What else may explain differences.
    """
    causes = [known.connector] if known.connector else []
    causes += known.settings
    if result.shifted:
        causes.append(
            f"{result.shifted} users hold values in each other's columns: stale schema: take a new snapshot, "
            "see docs/operate/runbook.md, A new snapshot."
        )
    if result.unusual_keys:
        causes.append(
            f"{result.unusual_keys} users have a row whose user_id is no signed BIGINT, which the stream can't carry: "
            "give the column that type, then take a new snapshot."
        )
    lettered = sum(offender.user_id in known.with_letters for offender in result.offenders)
    if lettered:
        of_how_many = f" of the {len(result.offenders)} named" if len(result.offenders) < result.total else ""
        causes.append(f"{lettered} users{of_how_many} have open dead letters: ghsync dlq list.")
    if deletes := _unlogged_deletes(result):
        causes.append(deletes)
    return causes or [_NO_PATTERN]


def _unlogged_deletes(result: AuditResult) -> str:
    """Return the cause if most differences look like a bulk delete that is not in the binlog; else an empty text."""
    if result.extra < max(_BULK, _NEARLY_ALL * result.total):
        return ""
    if not result.rows:
        how = "the table is empty: DROP TABLE, or TRUNCATE in a session with sql_log_bin=0"
    elif result.extra_keys and result.extra >= _NEARLY_ALL * (result.extra_keys[1] - result.extra_keys[0] + 1):
        least, largest = result.extra_keys
        how = f"nearly all keys from {least} to {largest}: partition maintenance (DROP or TRUNCATE PARTITION)"
    else:
        how = "a foreign key's cascade, partition maintenance, or a session with sql_log_bin=0"
    return f"{result.extra} users have no row any more, and the binlog has no event of it: {how}."
