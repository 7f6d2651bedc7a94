"""Plan: what a load does with each of its users, decided chunk by chunk, so that memory stays flat.

Belongs here: reading what is stored, the decision, and the writes that need no Spark (versions that only move on, and
the load's own older documents). Not here: inserts, which Spark does, and verification.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ghsync_dagster.batch.reports import Row, count_rows, rows_of
from ghsync_dagster.domain.precedence import Action, Incoming, Stored, Version, classify
from ghsync_dagster.domain.user import MARKER_FIELD, USER_FIELDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pyarrow.parquet as pq

    from ghsync_dagster.batch.lease import HeldLease
    from ghsync_dagster.stores.mongo import StoredVersion, UserStore

STORED_MEANWHILE: Final = "stored meanwhile"
"""The reason to leave a user that another stored after the plan was made."""


@dataclass
class Plan:
    """What a load is to do.

    Attributes:
        insert_path: Parquet folder of the users that Spark inserts.
        expected_path: Parquet folder of the users that must carry the marker afterwards.
        left: Users that are left as they are, by reason.
        given_up_inserts: Of these, how many were to be inserted before another stored or deleted them.
        given_up_replaced: Of these, how many were to be replaced.
        marker_lost: Users that this load replaced and that are stored without the marker though nobody else wrote them.
    """

    insert_path: Path
    expected_path: Path
    inserts: int = 0
    replaced: int = 0
    confirmed: int = 0
    left: Counter[str] = field(default_factory=Counter)
    given_up_inserts: int = 0
    given_up_replaced: int = 0
    marker_lost: list[str] = field(default_factory=list)

    @property
    def expected(self) -> int:
        """How many documents must carry the marker."""
        return self.inserts + self.replaced


def make_plan(store: UserStore, users: Path, target: Path, load_id: str, lease: HeldLease) -> Plan:
    """Decide on every user, and carry out what needs no Spark."""
    if store.is_empty() and not store.any_deleted():
        lease.assert_held()
        store.drop_all_versions()
        return Plan(insert_path=users, expected_path=users, inserts=count_rows(users))
    with _Sorter(target) as sorter:
        deletions = store.any_deleted()
        for rows in rows_of(users):
            _decide(store, rows, sorter, load_id, lease, deletions=deletions)
        return sorter.plan


def _decide(
    store: UserStore, rows: Sequence[Row], sorter: _Sorter, load_id: str, lease: HeldLease, *, deletions: bool
) -> None:
    from ghsync_dagster.stores.mongo import VersionMove

    keys = [row["user_id"] for row in rows]
    documents = store.users_by_id(keys)
    versions = store.versions_by_id(keys)
    lease.assert_held()
    # Spark's executors of a dead load may write for a moment longer; nobody else has seen these.
    late = _late_inserts(documents, versions)
    store.delete_marked(late)
    for key in late:
        del documents[key]
    deleted = store.deleted_among(keys) if deletions else set()
    by_action: dict[Action, list[Row]] = {action: [] for action in Action}
    for row in rows:
        stored = Stored(
            _content(documents.get(row["user_id"])), _version(versions.get(row["user_id"])), row["user_id"] in deleted
        )
        by_action[classify(stored, Incoming(_content(row), Version(row["created_at"], row["event_id"])))].append(row)

    lease.assert_held()
    store.drop_versions([row["user_id"] for row in by_action[Action.INSERT] if row["user_id"] in versions])
    lease.assert_held()
    store.move_versions(
        VersionMove(row["user_id"], row["created_at"], row["event_id"]) for row in by_action[Action.BUMP]
    )
    replaced = by_action[Action.REPLACE]
    old = [documents[row["user_id"]] for row in replaced]
    lease.assert_held()
    store.write_undo(old, load_id)
    lease.assert_held()
    store.replace_unchanged(zip(old, map(_user, replaced), strict=True))
    lease.assert_held()
    store.move_versions(VersionMove(row["user_id"], row["created_at"], row["event_id"], load_id) for row in replaced)
    sorter.add(by_action)


def _late_inserts(documents: dict[str, Row], versions: dict[str, StoredVersion]) -> list[str]:
    """Return the users that are marked without a version entry, before this load has written any."""
    return [key for key, found in documents.items() if MARKER_FIELD in found and key not in versions]


def plan_missing(store: UserStore, missing: Path, target: Path, load_id: str, lease: HeldLease) -> Plan:
    """Decide on the users that verification found missing.

    A user that another stored or deleted meanwhile is left; one that is stored wrongly by this load is removed where
    it still carries the marker, and inserted again, as is one that is not stored at all.
    """
    with _Sorter(target) as sorter:
        for rows in rows_of(missing):
            lease.assert_held()
            keys = [row["user_id"] for row in rows]
            documents = store.users_by_id(keys)
            versions = store.versions_by_id(keys)
            deleted = store.deleted_among(keys)
            replaced = store.undo_by_id(keys)
            again: list[Row] = []
            for row in rows:
                key = row["user_id"]
                document = documents.get(key)
                if document is not None and MARKER_FIELD not in document:
                    sorter.give_up(STORED_MEANWHILE, replaced=key in replaced)
                    # Of an insert it proves nothing: the stream may have stored the same before the entry was written.
                    ours = key in replaced and key in versions and versions[key].load == load_id
                    if ours and _content(document) == _content(row):
                        sorter.plan.marker_lost.append(key)
                elif document is None and key in deleted:
                    sorter.give_up(Action.DELETED_BY_STREAM.value, replaced=key in replaced)
                else:
                    again.append(row)
            lease.assert_held()
            store.delete_marked(row["user_id"] for row in again if row["user_id"] in documents)
            lease.assert_held()
            store.drop_versions(row["user_id"] for row in again)
            # From here on they are inserts: settling must not put an old document back, and must look at deletions.
            store.forget_undo(row["user_id"] for row in again if row["user_id"] in replaced)
            sorter.add({Action.INSERT: again})
        return sorter.plan


class _Sorter:
    """Writes the users of a plan to Parquet, by what is done with them."""

    def __init__(self, target: Path) -> None:
        self.plan = Plan(insert_path=target / "insert", expected_path=target / "expected")
        self._writers: dict[Path, pq.ParquetWriter] = {}

    def __enter__(self) -> _Sorter:
        import pyarrow as pa
        import pyarrow.parquet as pq

        fields = [(name, pa.string()) for name in (*USER_FIELDS, "created_at")]
        self._schema = pa.schema([*fields, ("event_id", pa.int64())])
        for folder in (self.plan.insert_path, self.plan.expected_path):
            folder.mkdir(parents=True)
            self._writers[folder] = pq.ParquetWriter(folder / "part-00000.parquet", self._schema)
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self._writers.values():
            writer.close()

    def give_up(self, reason: str, *, replaced: bool) -> None:
        """Count a user that is left as another stored or deleted it."""
        self.plan.left[reason] += 1
        self.plan.given_up_replaced += replaced
        self.plan.given_up_inserts += not replaced

    def add(self, by_action: dict[Action, list[Row]]) -> None:
        """Take the decided users of one chunk."""
        import pyarrow as pa

        inserts, replaced = by_action.get(Action.INSERT, []), by_action.get(Action.REPLACE, [])
        for folder, rows in ((self.plan.insert_path, inserts), (self.plan.expected_path, inserts + replaced)):
            if rows:
                self._writers[folder].write_batch(pa.RecordBatch.from_pylist(rows, schema=self._schema))
        self.plan.inserts += len(inserts)
        self.plan.replaced += len(replaced)
        self.plan.confirmed += len(by_action.get(Action.BUMP, []))
        self.plan.left.update(
            {action.value: len(rows) for action, rows in by_action.items() if action.is_skip and rows}
        )


def _user(row: Row) -> dict[str, str | None]:
    return {name: row[name] for name in USER_FIELDS}


def _content(user: Row | None) -> tuple[str | None, ...] | None:
    return None if user is None else tuple(user.get(name) for name in USER_FIELDS)


def _version(stored: StoredVersion | None) -> Version | None:
    return None if stored is None else Version(stored.created_at, stored.event_id)
