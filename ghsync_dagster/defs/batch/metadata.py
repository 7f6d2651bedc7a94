"""What a person wants to see beside a materialization: counts, rates, schemas, samples, where the data is.

Not here: any judgement, which is a check's.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from ghsync_dagster.batch.reports import rows_of
from ghsync_dagster.domain.event import event_shape

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ghsync_dagster.batch.reports import FlattenReport, LoadReport, ReadReport
    from ghsync_dagster.settings import Settings

_SAMPLE = 5
Metadata = dict[str, Any]


def of_events(report: ReadReport) -> Metadata:
    """Return the metadata of ``raw_events``."""
    from ghsync_dagster.observability.plots import events_over_time

    return {
        "dagster/row_count": report.events,
        "lines": report.lines,
        "quarantined": report.quarantined,
        "blank": report.blank,
        "files": len(report.files),
        **_speed(report.events, report.seconds),
        "location": dg.MetadataValue.path(report.events_path),
        "dagster/column_schema": _columns({name: _type(part) for name, part in event_shape().items()}),
        "input": _table([{"file": file.path, "lines": file.lines} for file in report.files[:50]]),
        "events_over_time": dg.MetadataValue.md(events_over_time(Path(report.events_path))),
    }


def of_quarantine(report: ReadReport) -> Metadata:
    """Return the metadata of ``quarantined_events``."""
    rows = _first(Path(report.quarantine_path))
    return {
        "dagster/row_count": report.quarantined,
        "ratio": round(report.quarantined_ratio, 6),
        "location": dg.MetadataValue.path(report.quarantine_path),
        "reasons": _table([{"reason": reason, "lines": lines} for reason, lines in report.reasons.items()]),
        "sample": _table([{**row, "raw": str(row["raw"])[:200]} for row in rows]),
    }


def of_users(report: FlattenReport) -> Metadata:
    """Return the metadata of ``users``."""
    rows = _first(Path(report.users_path))
    names = list(rows[0]) if rows else []
    return {
        "dagster/row_count": report.users,
        **_speed(report.users, report.seconds),
        "location": dg.MetadataValue.path(report.users_path),
        "dagster/column_schema": _columns({name: "bigint" if name == "event_id" else "string" for name in names}),
        "sample": _table(rows),
    }


def of_load(report: LoadReport, settings: Settings) -> Metadata:
    """Return the metadata of ``mongo_users``."""
    left = [{"reason": reason, "users": users} for reason, users in report.left.items()]
    phases = [{"phase": phase, "seconds": seconds} for phase, seconds in report.phases.items()]
    return {
        "dagster/row_count": report.users,
        "inserted": report.inserted,
        "replaced": report.replaced,
        "confirmed": report.confirmed,
        "missing": report.missing,
        "reconciled": report.reconciled,
        "unresolved": report.unresolved,
        **_speed(report.users, report.seconds),
        "collection": f"{settings.mongodb_database}.{settings.mongodb_collection}",
        "load": report.load_id,
        "left_as_stored": _table(left),
        "phases": _table(phases),
        **({"recovered": _table([dict(report.recovered)])} if report.recovered else {}),
    }


def _speed(rows: int, seconds: float) -> Metadata:
    return {"seconds": seconds, "rows_per_second": round(rows / seconds, 1) if seconds else 0.0}


def _type(shape: Any) -> str:  # noqa: ANN401  as event_shape gives it
    if isinstance(shape, dict):
        return f"struct<{', '.join(f'{name} {_type(part)}' for name, part in shape.items())}>"
    return {int: "bigint", str: "string"}[shape]


def _columns(types: Mapping[str, str]) -> dg.TableSchema:
    return dg.TableSchema(columns=[dg.TableColumn(name, kind) for name, kind in types.items()])


def _table(rows: Sequence[Mapping[str, Any]]) -> dg.MetadataValue[Any] | str:
    if not rows:
        return "none"
    head = "| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0])
    lines = ["| " + " | ".join(_cell(value) for value in row.values()) + " |" for row in rows]
    return dg.MetadataValue.md("\n".join([head, *lines]))


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ").replace("`", "'")


def _first(folder: Path) -> list[dict[str, Any]]:
    return next(iter(rows_of(folder)), [])[:_SAMPLE]
