"""Metadata of the batch flow's materializations: counts, rates, samples, versions, locations.

Not here: judgements, which are the checks', and the columns of the tables (``defs.batch.columns``).
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import dagster as dg

from ghsync_dagster.batch.reports import rows_of
from ghsync_dagster.defs.batch.columns import MONGO_USERS, QUARANTINED_EVENTS, RAW_EVENTS, TABLES, USERS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ghsync_dagster.batch.reports import FlattenReport, LoadReport, ReadReport
    from ghsync_dagster.batch.versions import InputState
    from ghsync_dagster.settings import Settings

_SAMPLE: Final = 5
_FILES: Final = 50
_RAW: Final = 200
Metadata = dict[str, Any]


def of_input(state: InputState) -> Metadata:
    """Return the metadata of ``event_files``."""
    newest = max((file.modified_ns for file in state.files), default=None)
    return {
        "files": len(state.files),
        "bytes": state.size,
        **({} if newest is None else {"newest": dg.MetadataValue.timestamp(_time(newest))}),
        "list": _table(
            {"file": "string", "bytes": "integer", "modified": "string"},
            (
                {"file": file.path, "bytes": file.size, "modified": f"{_time(file.modified_ns):%Y-%m-%dT%H:%M:%SZ}"}
                for file in state.files[:_FILES]
            ),
        ),
    }


def of_paths(events_paths: Sequence[str]) -> dg.MetadataValue[Any]:
    """Return paths, folders or globs as the UI shows them: one as a path, several as a list."""
    return dg.MetadataValue.path(events_paths[0]) if len(events_paths) == 1 else dg.MetadataValue.json([*events_paths])


def of_events(report: ReadReport) -> Metadata:
    """Return the metadata of ``raw_events``."""
    from ghsync_dagster.batch.plots import events_over_time

    return {
        **TABLES[RAW_EVENTS].metadata(),
        "dagster/row_count": report.events,
        "lines": report.lines,
        "quarantined": report.quarantined,
        "blank": report.blank,
        "files": len(report.files),
        "files_left_out": sum(entry.files for entry in report.left_out),
        "left_out": _table(
            {"reason": "string", "files": "integer", "first": "string"},
            (
                {"reason": entry.reason, "files": entry.files, "first": ", ".join(entry.names)}
                for entry in report.left_out
            ),
        ),
        **_speed(report.events, report.seconds),
        "location": dg.MetadataValue.path(report.events_path),
        "input": _table(
            {"file": "string", "lines": "integer"},
            ({"file": file.path, "lines": file.lines} for file in report.files[:_FILES]),
        ),
        "events_over_time": dg.MetadataValue.md(events_over_time(Path(report.events_path))),
    }


def of_quarantine(report: ReadReport) -> Metadata:
    """Return the metadata of ``quarantined_events``."""
    columns = TABLES[QUARANTINED_EVENTS]
    rows = _first(Path(report.quarantine_path))
    return {
        **columns.metadata(),
        "dagster/row_count": report.quarantined,
        "ratio": round(report.quarantined_ratio, 6),
        "location": dg.MetadataValue.path(report.quarantine_path),
        "reasons": _table(
            {"reason": "string", "lines": "integer"},
            ({"reason": reason, "lines": lines} for reason, lines in report.reasons.items()),
        ),
        "sample": _rows(columns.schema, ({**row, "raw": str(row["raw"])[:_RAW]} for row in rows)),
    }


def of_users(report: FlattenReport) -> Metadata:
    """Return the metadata of ``users``."""
    columns = TABLES[USERS]
    return {
        **columns.metadata(),
        "dagster/row_count": report.users,
        **_speed(report.users, report.seconds),
        "location": dg.MetadataValue.path(report.users_path),
        "sample": _rows(columns.schema, _first(Path(report.users_path))),
    }


def of_load(report: LoadReport, settings: Settings, stored: int | None) -> Metadata:
    """Return the metadata of ``mongo_users``.

    Args:
        report: What the load did.
        settings: Where it went.
        stored: How many users the collection holds after it, whoever wrote them; None where that is not known.
    """
    return {
        **TABLES[MONGO_USERS].metadata(),
        **({} if stored is None else {"dagster/row_count": stored}),
        "dagster/table_name": f"{settings.mongodb_database}.{settings.mongodb_collection}",
        "users_in_files": report.users,
        "inserted": report.inserted,
        "replaced": report.replaced,
        "confirmed": report.confirmed,
        "left_as_stored": sum(report.left.values()),
        "missing": report.missing,
        "reconciled": report.reconciled,
        "unresolved": report.unresolved,
        **_speed(report.users, report.seconds),
        "load": report.load_id,
        "left_by_reason": _counts("reason", report.left),
        "phases": _table(
            {"phase": "string", "seconds": "float"},
            ({"phase": phase, "seconds": seconds} for phase, seconds in report.phases.items()),
        ),
        **({"recovered": _counts("kind", report.recovered)} if report.recovered else {}),
    }


def _speed(rows: int, seconds: float) -> Metadata:
    return {"seconds": seconds, "rows_per_second": round(rows / seconds, 1) if seconds else 0.0}


def _counts(what: str, counts: Mapping[str, int]) -> dg.MetadataValue[Any]:
    return _table(
        {what: "string", "users": "integer"}, ({what: name, "users": count} for name, count in counts.items())
    )


def _table(columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> dg.MetadataValue[Any]:
    return _rows(dg.TableSchema([dg.TableColumn(name, kind) for name, kind in columns.items()]), rows)


def _rows(schema: dg.TableSchema, rows: Iterable[Mapping[str, Any]]) -> dg.MetadataValue[Any]:
    # Dagster allows no null in a table's cell.
    records: Sequence[dg.TableRecord] = [
        dg.TableRecord({name: "" if value is None else value for name, value in row.items()}) for row in rows
    ]
    return dg.MetadataValue.table(records, schema=schema)


def _time(nanoseconds: int) -> datetime:
    return datetime.fromtimestamp(nanoseconds / 1e9, UTC)


def _first(folder: Path) -> list[dict[str, Any]]:
    return next(iter(rows_of(folder)), [])[:_SAMPLE]
