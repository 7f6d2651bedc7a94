"""Plan: decide what a load does with each of its users, chunk by chunk, so that memory stays bounded.

Belongs here: which command executes which step of a load, except inserts, which Spark executes. Not here: the order of
the steps and the decisions between them, which are ``domain.precedence``'s, and verification.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ghsync_dagster.batch.reports import Row, count_rows, rows_of, version_entry
from ghsync_dagster.domain.precedence import (
    INSERT_AGAIN_STEPS,
    PLAN_STEPS,
    READ_STEPS,
    WRITE_STEPS,
    Action,
    Incoming,
    LoadStep,
    Stored,
    Version,
    classify,
    classify_missing,
)
from ghsync_dagster.domain.user import MARKER_FIELD, USER_FIELDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    import pyarrow.parquet as pq

    from ghsync_dagster.stores.mongo.commands import Document
    from ghsync_dagster.stores.mongo.users import StoredVersion
    from ghsync_dagster.stores.mongo.writer import UserWriter

LEFT_TO_SPARK: Final = frozenset({LoadStep.WRITE_DOCUMENT, LoadStep.WRITE_VERSION})
"""The steps of inserts that are executed for all users at once, after their plan is made."""


@dataclass
class Plan:
    """What a load has to do.

    Attributes:
        insert_path: Parquet folder of the users that Spark inserts.
        expected_path: Parquet folder of the users that must carry the marker afterwards.
        left: Users that are left as they are, by reason.
        given_up_inserts: Of these, how many were to be inserted when another writer stored or deleted them.
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


def make_plan(writer: UserWriter, users: Path, target: Path, load_id: str) -> Plan:
    """Decide about every user, and execute what needs no Spark."""
    store = writer.store
    if store.is_empty() and not store.any_deleted():
        writer.drop_all_versions()
        return Plan(insert_path=users, expected_path=users, inserts=count_rows(users))
    with _Sorter(target) as sorter:
        deletions = store.any_deleted()
        for rows in rows_of(users):
            _Planning(writer, rows, sorter, load_id, deletions=deletions).decide()
        return sorter.plan


def plan_missing(writer: UserWriter, missing: Path, target: Path, load_id: str) -> Plan:
    """Decide about the users that verification found missing, and execute what needs no Spark.

    A user that another writer stored or deleted meanwhile is left. One that this load stored wrongly is removed if it
    still carries the marker. It is then inserted again, as is one that is not stored at all.
    """
    with _Sorter(target) as sorter:
        for rows in rows_of(missing):
            _Planning(writer, rows, sorter, load_id, deletions=True).decide_again()
        return sorter.plan


class _Planning:
    """Executes the steps of a load for some of its users, except LEFT_TO_SPARK."""

    def __init__(
        self,
        writer: UserWriter,
        rows: Sequence[Row],
        sorter: _Sorter,
        load_id: str,
        *,
        deletions: bool,
    ) -> None:
        self._writer, self._store, self._sorter, self._load_id = writer, writer.store, sorter, load_id
        self._rows = {row["user_id"]: row for row in rows}
        self._deletions = deletions
        self._documents: dict[str, Document] = {}
        self._versions: dict[str, StoredVersion] = {}
        self._deleted: set[str] = set()
        self._beginning: dict[LoadStep, Callable[[], None]] = {
            LoadStep.READ_DOCUMENT: self._read_documents,
            LoadStep.READ_VERSION: self._read_versions,
            LoadStep.READ_DELETED: self._read_deleted,
            LoadStep.REMOVE_LATE: self._remove_late,
        }
        self._writes: dict[tuple[Action, LoadStep], Callable[[Sequence[Row]], None]] = {
            (Action.INSERT, LoadStep.REMOVE_WRONG): self._remove_wrong,
            (Action.INSERT, LoadStep.DROP_STALE): self._drop_stale,
            (Action.INSERT, LoadStep.FORGET_LOGGED): lambda rows: writer.forget_undo(_keys(rows)),
            (Action.BUMP, LoadStep.WRITE_VERSION): lambda rows: self._move_versions(rows, None),
            (Action.REPLACE, LoadStep.LOG_OLD): lambda rows: writer.write_undo(self._old(rows), load_id),
            (Action.REPLACE, LoadStep.WRITE_DOCUMENT): self._replace,
            (Action.REPLACE, LoadStep.WRITE_VERSION): lambda rows: self._move_versions(rows, load_id),
        }

    def decide(self) -> None:
        """Read, decide and write, except inserts."""
        for step in PLAN_STEPS:
            self._beginning[step]()
        by_action: dict[Action, list[Row]] = {action: [] for action in Action}
        for key, row in self._rows.items():
            incoming = Incoming(_content(row), Version(row["created_at"], row["event_id"]))
            by_action[classify(self._stored(key), incoming)].append(row)
        for action, steps in WRITE_STEPS.items():
            self._write(action, steps, by_action[action])
        self._sorter.add(by_action)

    def decide_again(self) -> None:
        """Read what verification found missing, decide, and write, except inserts."""
        replaced = self._store.undo_by_id(list(self._rows))
        for step in READ_STEPS:
            self._beginning[step]()
        again: list[Row] = []
        for key, row in self._rows.items():
            is_marked = MARKER_FIELD in self._documents.get(key, {})
            action = classify_missing(self._stored(key), marked=is_marked)
            if action is Action.INSERT:
                again.append(row)
                continue
            self._sorter.give_up(action.value, replaced=key in replaced)
            # For an insert this proves nothing: the stream may have stored the same before the entry was written.
            is_ours = key in replaced and key in self._versions and self._versions[key].load == self._load_id
            if is_ours and _content(self._documents.get(key)) == _content(row):
                self._sorter.plan.marker_lost.append(key)
        self._write(Action.INSERT, INSERT_AGAIN_STEPS, again)
        self._sorter.add({Action.INSERT: again})

    def _write(self, action: Action, steps: Iterable[LoadStep], rows: Sequence[Row]) -> None:
        for step in steps:
            if rows and not (action is Action.INSERT and step in LEFT_TO_SPARK):
                self._writes[action, step](rows)

    def _stored(self, key: str) -> Stored:
        return Stored(_content(self._documents.get(key)), _version(self._versions.get(key)), key in self._deleted)

    def _read_documents(self) -> None:
        self._documents = self._store.users_by_id(list(self._rows))

    def _read_versions(self) -> None:
        self._versions = self._store.versions_by_id(list(self._rows))

    def _read_deleted(self) -> None:
        self._deleted = self._store.deleted_among(list(self._rows)) if self._deletions else set()

    def _remove_late(self) -> None:
        late = [key for key, found in self._documents.items() if MARKER_FIELD in found and key not in self._versions]
        self._writer.delete_marked(late)
        for key in late:
            del self._documents[key]

    def _remove_wrong(self, rows: Sequence[Row]) -> None:
        self._writer.delete_marked(key for key in _keys(rows) if key in self._documents)

    def _drop_stale(self, rows: Sequence[Row]) -> None:
        self._writer.drop_versions([key for key in _keys(rows) if key in self._versions])

    def _old(self, rows: Sequence[Row]) -> list[Document]:
        return [self._documents[key] for key in _keys(rows)]

    def _replace(self, rows: Sequence[Row]) -> None:
        self._writer.replace_unchanged(zip(self._old(rows), map(_user, rows), strict=True))

    def _move_versions(self, rows: Sequence[Row], load: str | None) -> None:
        self._writer.move_versions(map(version_entry, rows), load)


class _Sorter:
    """Writes the users of a plan to Parquet, by action."""

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
        """Count a user that is left because another writer stored or deleted it."""
        self.plan.left[reason] += 1
        self.plan.given_up_replaced += replaced
        self.plan.given_up_inserts += not replaced

    def add(self, by_action: dict[Action, list[Row]]) -> None:
        """Add the decided users of one chunk."""
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


def _keys(rows: Sequence[Row]) -> list[str]:
    return [row["user_id"] for row in rows]


def _user(row: Row) -> dict[str, str | None]:
    return {name: row[name] for name in USER_FIELDS}


def _content(user: Row | None) -> tuple[str | None, ...] | None:
    return None if user is None else tuple(user.get(name) for name in USER_FIELDS)


def _version(stored: StoredVersion | None) -> Version | None:
    return None if stored is None else Version(stored.created_at, stored.event_id)
