"""The reports of the batch flow's steps, for the next step and for people: plain, serializable records.

Belongs here: the records and where they are stored. Not here: how they are shown.
"""

from __future__ import annotations

import shutil
import time
import uuid
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from ghsync_dagster.batch.versions import UNKNOWN
from ghsync_dagster.domain.errors import ConfigError, InputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Row = dict[str, Any]
"""A row of Parquet data; of users: the five fields, ``created_at`` and ``event_id``."""

_ROWS_A_CHUNK: Final = 5_000


class FileCount(msgspec.Struct, frozen=True):
    """One input file and its number of lines."""

    path: str
    lines: int


class LeftOut(msgspec.Struct, frozen=True):
    """Files that the input's paths name and that are not read.

    Attributes:
        reason: Why, in words.
        files: How many; a folder with all that is in it counts as one, and its name ends in a slash.
        names: The first of them.
    """

    reason: str
    files: int
    names: list[str]


class ReadReport(msgspec.Struct, frozen=True):
    """The outcome of ``read``: every line is an event, quarantined, or blank.

    If a file is a JSON array, each of its objects counts as a line.

    Attributes:
        events_path: Parquet folder of the events.
        quarantine_path: Parquet folder of the refused lines.
        reasons: How often each kind of reason occurred, the most frequent first.
        input_version: The version of the files, see ``batch.versions``.
        data_version: The version of what was written.
        bytes: Bytes of the files on disk.
        left_out: Files that were not read, by reason.
    """

    events_path: str
    quarantine_path: str
    files: list[FileCount]
    lines: int
    events: int
    quarantined: int
    blank: int
    reasons: dict[str, int]
    seconds: float
    input_version: str = UNKNOWN
    data_version: str = UNKNOWN
    bytes: int = 0
    left_out: list[LeftOut] = []

    @property
    def quarantined_ratio(self) -> float:
        """The share of refused lines among those that are not blank; 0 if there are none."""
        judged = self.events + self.quarantined
        return self.quarantined / judged if judged else 0.0


class FlattenReport(msgspec.Struct, frozen=True):
    """The outcome of ``flatten``: the newest state of every user in the events.

    Attributes:
        users_path: Parquet folder of the users.
        users: How many users there are.
        input_version: The version of the events that they come from.
        data_version: The version of what was written.
    """

    users_path: str
    users: int
    seconds: float
    input_version: str = UNKNOWN
    data_version: str = UNKNOWN


class LoadReport(msgspec.Struct, frozen=True):
    """The outcome of ``load``.

    Attributes:
        load_id: Names the load in ``_ghsync_loads``.
        run_id: The run that caused it.
        users_path: What was to be loaded.
        users: How many users that was.
        inserted: New users written.
        replaced: Users that an earlier load wrote and a newer event changed.
        confirmed: Users whose stored fields a newer event only confirmed.
        left: Users left as they are stored, by reason.
        expected_marked: How many documents had to carry the marker before verification.
        marked: How many did.
        marker_lost: Users of this load that were stored without the marker though nobody else wrote them.
        lost: Up to 20 of these.
        missing: Rows that ``exceptAll`` found missing at first.
        reconciled: Of these, how many were written again or were found stored or deleted meanwhile.
        unresolved: Rows still missing at the end: verification failed.
        offenders: Up to 20 of the unresolved users.
        unmarked: Documents whose marker was removed at the end.
        recovered: What an unfinished earlier load left and this one settled, by kind.
        phases: Seconds a phase.
        input_version: The version of the users that were loaded.
    """

    load_id: str
    run_id: str
    users_path: str
    users: int
    inserted: int
    replaced: int
    confirmed: int
    left: dict[str, int]
    expected_marked: int
    marked: int
    marker_lost: int
    lost: list[str]
    missing: int
    reconciled: int
    unresolved: int
    offenders: list[str]
    unmarked: int
    recovered: dict[str, int]
    phases: dict[str, float]
    seconds: float
    input_version: str = UNKNOWN


Report = ReadReport | FlattenReport | LoadReport
R = TypeVar("R", ReadReport, FlattenReport, LoadReport)

_KEPT: Final = 3
_AGE_SECONDS: Final = 24 * 3600


def _changed(folder: Path) -> float:
    """Return when a folder changed last, in seconds since 1970; now, if another run has removed it meanwhile."""
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return time.time()


class Artifacts:
    """The folder of the flow's materialized data: one sub-folder a run and step, and the newest report of each step.

    A step writes into its own folder and publishes its report at the end, so a killed run leaves the last good data in
    place. The steps of one run find each other's reports, whatever other runs publish meanwhile.

    Args:
        root: The folder.
        run_id: The run whose reports come first; None: the newest of any run.
    """

    def __init__(self, root: Path, run_id: str | None = None) -> None:
        self.root = root
        self.run_id = run_id
        self._run = root / "runs" / run_id if run_id else None

    def new_folder(self, step: str) -> Path:
        """Return a new folder for one run of ``step``; remove old ones, except the newest few and published ones."""
        parent = self.root / step
        parent.mkdir(parents=True, exist_ok=True)
        published = b"".join(report.read_bytes() for report in self.root.glob("*.json"))
        folders = sorted(parent.iterdir(), key=_changed, reverse=True)[_KEPT - 1 :]
        aged = time.time() - _AGE_SECONDS
        for old in (*folders, *(self.root / "runs").glob("*")):
            # A younger folder may belong to a run that waits for its turn.
            if _changed(old) < aged and old.name.encode() not in published:
                shutil.rmtree(old, ignore_errors=True)
        folder = parent / uuid.uuid4().hex
        folder.mkdir()
        return folder

    def publish(self, report: Report) -> None:
        """Make ``report`` the newest of its step, and its run's own, atomically."""
        for folder in filter(None, (self.root, self._run)):
            folder.mkdir(parents=True, exist_ok=True)
            target = folder / _file_name(type(report))
            part = target.with_suffix(f".{uuid.uuid4().hex}.part")
            part.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))
            part.replace(target)

    def newest(self, kind: type[R]) -> R:
        """Return the newest report of a step.

        Raises:
            ConfigError: The step has not run here yet.
        """
        report = self.find(kind)
        if report is None:
            raise ConfigError(
                f"There is no {kind.__name__} in {self.root}: nothing has been materialized there yet.",
                way_out="Materialize the batch assets first: make run, or users_batch_job.",
            )
        return report

    def find(self, kind: type[R]) -> R | None:
        """Return the newest report of a step, or None if it has not run here yet.

        Raises:
            ConfigError: The report can't be read.
        """
        return self._read(kind, self._run) or self._read(kind, self.root)

    def own(self, kind: type[R]) -> R | None:
        """Return the present run's report of a step, or None if it has none."""
        return self._read(kind, self._run)

    def _read(self, kind: type[R], folder: Path | None) -> R | None:
        if folder is None:
            return None
        file = folder / _file_name(kind)
        try:
            return msgspec.json.decode(file.read_bytes(), type=kind)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as error:
            raise ConfigError(
                f"{file} is damaged ({error}).", way_out="Remove it and run users_batch_job again."
            ) from None


def _file_name(kind: type[Report]) -> str:
    return f"{kind.__name__.removesuffix('Report').lower()}.json"


def count_rows(folder: Path) -> int:
    """Return the number of rows in a folder of Parquet files, from their footers."""
    import pyarrow.parquet as pq

    return sum(pq.read_metadata(file).num_rows for file in folder.glob("*.parquet"))


def version_entry(row: Row) -> tuple[str, str, int]:
    """Return a user's version entry: ``(user_id, created_at, event id)``."""
    return row["user_id"], row["created_at"], row["event_id"]


def rows_of(folder: Path) -> Iterator[list[Row]]:
    """Yield the rows of a folder of Parquet files in chunks.

    Raises:
        InputError: The folder has no Parquet file, not even an empty one: its data was removed.
    """
    import pyarrow.parquet as pq

    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise InputError(f"{folder} has no data any more.", way_out="Run users_batch_job again from raw_events on.")
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=_ROWS_A_CHUNK):
            yield batch.to_pylist()
