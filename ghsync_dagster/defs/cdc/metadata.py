"""Metadata of the change flow: counts, rates, lag, percentiles, dead letters.

Belongs here: the observation of a snapshot of the metrics, and reading its latency back. Not here: judgements, which
are the checks'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import dagster as dg

from ghsync_dagster.cdc.health.checks import Measured, certain_p99

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ghsync_dagster.cdc.dead_letters.index import OpenLetters
    from ghsync_dagster.cdc.health.metrics import MetricsSnapshot, Percentiles
    from ghsync_dagster.stores.kafka.client import KafkaSettings

Metadata = dict[str, Any]

_RECORDS: Final = "interval_records"
_P99: Final = "latency_p99_ms"


def of_observation(now: MetricsSnapshot, kafka: KafkaSettings) -> Metadata:
    """Return the metadata of one observation of ``users_changes``.

    Args:
        now: Its window is the interval since the observation before.
        kafka: The topic and the group.
    """
    return {
        "records": now.records,
        "records_a_minute": now.records_a_minute,
        **{f"records_{outcome}": count for outcome, count in now.outcomes.items()},
        **_lag(now),
        _RECORDS: max(now.commit.window.count, now.kafka.window.count),
        _P99: certain_p99(now.commit, now.kafka),
        **_percentiles("commit_to_write", now.commit.window),
        **_percentiles("kafka_to_write", now.kafka.window),
        "interval_seconds": round(now.window_seconds, 3),
        "retries": sum(now.retries.values()),
        "errors": sum(now.errors.values()),
        "dead_letters": sum(now.dead_letters.values()),
        **({} if now.connector is None else {"connector": now.connector}),
        **({} if now.held_up is None else {"held_up": now.held_up}),
        "details": dg.MetadataValue.json(_details(now, kafka)),
    }


def _lag(now: MetricsSnapshot) -> Metadata:
    if now.lag_records is None or now.lag_seconds is None:
        return {}
    return {"lag_records": now.lag_records, "lag_seconds": round(now.lag_seconds, 3)}


def _percentiles(name: str, found: Percentiles) -> Metadata:
    if not found.count:
        return {}
    return {f"{name}_{part}_ms": getattr(found, part) for part in ("p50", "p95", "p99", "max")}


def _details(now: MetricsSnapshot, kafka: KafkaSettings) -> Metadata:
    return {
        "topic": kafka.topic,
        "group": kafka.group_id,
        "by_operation": now.counts,
        "lag_by_partition": {str(number): lag and lag.records for number, lag in now.lag.items()},
        "retries_by_error": now.retries,
        "errors_by_class": now.errors,
        "dead_letters_by_kind": now.dead_letters,
        "broken_rules": now.broken_rules,
        "unknown_columns": now.unknown_columns,
        "connections": {name: "up" if up else "down" for name, up in now.connections.items()},
        "commit_times_in_whole_seconds": now.commit.grain_ms > 1,
        "commit_times_in_the_future": now.commit.negative,
        "seconds": now.seconds,
    }


def measured(metadata: Mapping[str, Any], *, at: float, run_id: str) -> Measured | None:
    """Return the latency of an observation; None if it has no record."""
    records = _number(metadata, _RECORDS)
    return Measured(at, run_id, int(records), int(_number(metadata, _P99))) if records else None


def _number(metadata: Mapping[str, Any], name: str) -> float:
    value = getattr(metadata.get(name), "value", 0)
    return value if isinstance(value, int | float) else 0


def of_dead_letters(letters: OpenLetters, topic: str) -> Metadata:
    """Return the metadata of ``dead_letters``: exact counts, and the newest of them."""
    kinds = letters.kinds
    rows = [
        {
            "id": letter.id,
            "user_id": letter.user or "",
            "kind": letter.kind,
            "why": letter.text,
            "failed_at": letter.failed_at,
        }
        for letter in letters.newest
    ]
    return {
        "dagster/row_count": kinds.total(),
        "topic": topic,
        "kinds": _table([{"kind": kind, "dead letters": count} for kind, count in kinds.most_common()]),
        "newest": _table(rows),
    }


def _table(rows: Sequence[Mapping[str, str | int]]) -> dg.MetadataValue[Any] | str:
    return dg.MetadataValue.table([dg.TableRecord(dict(row)) for row in rows]) if rows else "none"
