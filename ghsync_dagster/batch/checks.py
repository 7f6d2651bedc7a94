"""The checks of the batch flow, on data only, with exact counts and the way to recover.

Belongs here: the judgement, used by the Dagster checks, the command line and the audit alike. Not here: faults of
servers: these raise, and never appear as failed data.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghsync_dagster.batch.lease import current_holder
from ghsync_dagster.batch.reports import rows_of
from ghsync_dagster.domain.finding import OFFENDERS, Finding
from ghsync_dagster.domain.precedence import Version
from ghsync_dagster.domain.user import MARKER_FIELD, USER_FIELDS

if TYPE_CHECKING:
    from ghsync_dagster.batch.flatten import UsersValidity
    from ghsync_dagster.batch.reports import LoadReport, ReadReport
    from ghsync_dagster.stores.mongo.users import UserStore


def quarantined_ratio(read: ReadReport, max_ratio: float) -> Finding:
    """Check that there is an event, and that the share of bad lines is within the limit."""
    first_rows = next(rows_of(Path(read.quarantine_path)), [])
    if read.events == 0:
        summary = f"no event in {read.lines} lines of {len(read.files)} files"
    else:
        decided = read.events + read.quarantined
        share = f"{read.quarantined} of {decided} lines quarantined ({read.quarantined_ratio:.2%})"
        summary = f"{share}, at most {max_ratio:.2%} allowed"
    return Finding.judged(
        "quarantined_ratio",
        summary,
        {
            "lines": read.lines,
            "events": read.events,
            "quarantined": read.quarantined,
            "blank": read.blank,
            "ratio": round(read.quarantined_ratio, 6),
            "allowed": max_ratio,
        },
        passed=read.events > 0 and read.quarantined_ratio <= max_ratio,
        offenders=({name: row[name] for name in ("file", "line", "reason")} for row in first_rows),
        way_out="Look at quarantined_events (file, line, reason); correct the source, or name other files of GitHub "
        "events by GHSYNC_EVENTS_PATH"
        # Without any event no ratio is high enough.
        + (", or raise GHSYNC_MAX_QUARANTINED_RATIO if these lines may be left out." if read.events else "."),
    )


def users_valid(validity: UsersValidity) -> Finding:
    """Check that every flattened user conforms to schema and rules, with one row a user."""
    problems = [f"{count} break {name}" for name, count in validity.broken.items()]
    if validity.repeated:
        problems.append(f"{validity.repeated} rows repeat a user_id")
    if validity.schema_problem:
        problems.append(f"wrong schema: {validity.schema_problem}")
    return Finding.judged(
        "users_valid",
        "; ".join(problems) or f"all {validity.users} users keep every rule",
        {"users": validity.users, "repeated": validity.repeated, **validity.broken},
        passed=validity.valid,
        offenders=validity.offenders,
        way_out="Materialize raw_events and users again with the present code and rules; nothing has been loaded.",
    )


def spark_temp_marked(load: LoadReport) -> Finding:
    """Check that every row of the load carried the marker before verification."""
    return Finding.judged(
        "spark_temp_marked",
        f"{load.marked} of {load.expected_marked} written users carried the marker"
        + (f"; {load.marker_lost} lost it while nobody else wrote them" if load.marker_lost else ""),
        {"expected": load.expected_marked, "marked": load.marked, "lost": load.marker_lost},
        passed=load.marker_lost == 0 and load.marked <= load.expected_marked,
        offenders=[{"user_id": key} for key in load.lost],
        way_out="Another program changes spark_temp in this collection: stop it, then run users_batch_job again.",
    )


def users_complete(load: LoadReport) -> Finding:
    """Check that after reconciliation ``exceptAll`` finds nothing missing."""
    return Finding.judged(
        "users_complete",
        f"{load.unresolved} of {load.users} users missing after reconciliation ({load.missing} before)",
        {
            "users": load.users,
            "missing": load.missing,
            "reconciled": load.reconciled,
            "unresolved": load.unresolved,
        },
        passed=load.unresolved == 0,
        offenders=[{"user_id": key} for key in load.offenders],
        way_out="Run users_batch_job again: it settles this load first. If users go missing again, find out who else "
        "deletes from the collection.",
    )


def audit_users(store: UserStore, users_path: Path) -> Finding:
    """Hold, reading only, that the newest flattened users are stored, or that something newer is."""
    offenders: list[dict[str, Any]] = []
    total = wrong = 0
    for rows in rows_of(users_path):
        keys = [row["user_id"] for row in rows]
        documents, versions, deleted = store.users_by_id(keys), store.versions_by_id(keys), store.deleted_among(keys)
        for row in rows:
            key = row["user_id"]
            entry = versions.get(key)
            version = Version(entry.created_at, entry.event_id) if entry else None
            problem = _audit(row, documents.get(key), version, deleted=key in deleted)
            total += 1
            if problem:
                wrong += 1
                offenders += [{"user_id": key, "problem": problem}] if len(offenders) < OFFENDERS else []
    return Finding.judged(
        "users_complete",
        f"{wrong} of {total} flattened users are not stored as they should be",
        {"users": total, "wrong": wrong},
        passed=wrong == 0,
        offenders=offenders,
        way_out="Run users_batch_job: it writes what is missing and leaves what is newer.",
    )


def _audit(
    row: dict[str, Any], document: dict[str, Any] | None, version: Version | None, *, deleted: bool
) -> str | None:
    mine = Version(row["created_at"], row["event_id"])
    if document is None:
        return None if deleted else "not stored"
    if version is None or version > mine:
        return None
    if version < mine:
        return f"stored from an older event ({version.created_at}, {version.event_id})"
    differing = [name for name in USER_FIELDS if document.get(name) != row[name]]
    return f"stored otherwise: {', '.join(differing)}" if differing else None


def no_spark_temp_left(store: UserStore) -> Finding:
    """Check that no document carries the marker, except those of a load that is running at this moment."""
    # In this order: a load that ends in between has removed its markers by then.
    loading = current_holder(store)
    left = store.count_marked()
    return Finding.judged(
        "no_spark_temp_left",
        f"{left} documents carry {MARKER_FIELD}" + (f", while a load is on: {loading}" if left and loading else ""),
        {"marked": left},
        passed=left == 0 or loading is not None,
        offenders=[_plain(user) for user in store.marked(limit=OFFENDERS)] if left else [],
        way_out="A load did not finish. Run users_batch_job again: it settles the unfinished load first.",
    )


def unique_user_id_index(store: UserStore) -> Finding:
    """Check that ``user_id`` has a unique index that covers every document."""
    there = store.has_unique_index()
    return Finding.judged(
        "unique_user_id_index",
        "user_id has a unique index" if there else "user_id has no unique index over every document",
        {"indexes": int(there)},
        passed=there,
        way_out="Remove duplicate users, then create it: "
        f"db.{store.users.name}.createIndex({{user_id: 1}}, {{unique: true}}).",
    )


def documents_conform(store: UserStore) -> Finding:
    """Check that every stored document conforms to the contract."""
    broken, offenders = store.nonconforming(OFFENDERS)
    return Finding.judged(
        "documents_conform",
        f"{broken} stored documents break the contract of a user",
        {"broken": broken},
        passed=broken == 0,
        offenders=[_plain(document) for document in offenders],
        way_out="Another program writes to this collection around its validator: correct or remove these documents.",
    )


def _plain(document: dict[str, Any]) -> dict[str, Any]:
    """Return a stored document with values that JSON can hold, whatever another program put into it."""
    return {
        name: value if value is None or isinstance(value, str | int) else str(value) for name, value in document.items()
    }
