"""The batch flow from top to bottom: read -> flatten -> load -> verify, each step gated, each step repeatable.

Belongs here: the order of steps and gates, and what passes between them. Not here: how a step works, nor Dagster.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from ghsync_dagster.batch import checks
from ghsync_dagster.batch.flatten import check_users, flatten_users
from ghsync_dagster.batch.load import Step, load_users
from ghsync_dagster.batch.read import read_events
from ghsync_dagster.batch.reports import Artifacts, FlattenReport, LoadReport, ReadReport
from ghsync_dagster.batch.search import find_files
from ghsync_dagster.batch.versions import UNKNOWN, InputState, version_of
from ghsync_dagster.domain.errors import TransientError
from ghsync_dagster.domain.event import FUTURE_WORDS
from ghsync_dagster.folders import ensure_folder
from ghsync_dagster.logging import bind_run, get_logger
from ghsync_dagster.progress import log_progress
from ghsync_dagster.retry import retrying

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ghsync_dagster.domain.finding import Finding
    from ghsync_dagster.domain.user import Rule
    from ghsync_dagster.stores.mongo.users import UserStore
    from ghsync_dagster.stores.spark import SparkHandle

log = get_logger("batch")


@dataclass(frozen=True)
class BatchFlow:
    """The flow, wired to its stores.

    Attributes:
        artifacts: Where materialized data and reports are kept.
        spark: The Spark session, perhaps still starting.
        open_store: Opens the users' collection. Each step opens and closes its own client.
        rules: The user rules that gate files.
        max_quarantined_ratio: The allowed share of bad lines.
        attempts: How often a step is tried while a server is unavailable.
        lease_wait_seconds: How long a load waits for another.
        lease_quiet_seconds: How long the server may still execute the last command of a load that died.
        code_version: The version of the code, see ``batch.versions``.
        home: GHSYNC_HOME, which is never input.
        open_for_check: Opens the users' collection for the check before a run; None: as for any step.
    """

    artifacts: Artifacts
    spark: SparkHandle
    open_store: Callable[[], UserStore]
    rules: Sequence[Rule]
    max_quarantined_ratio: float
    attempts: int
    lease_wait_seconds: float
    lease_quiet_seconds: float
    code_version: str = UNKNOWN
    home: Path | None = None
    open_for_check: Callable[[], UserStore] | None = None

    def find_input(self, events_paths: Sequence[str]) -> InputState:
        """Return the state of the files that would be read, none of them opened.

        Raises:
            InputError: A path can't be read.
        """
        with log_progress("looking for files"):
            return find_files(events_paths, self.home).state

    def check_first(self, events_paths: Sequence[str], *, has_target: bool = True) -> None:
        """Check, before any work, for what would end a run later on; write nothing to the target.

        Args:
            events_paths: What the run reads.
            has_target: Whether it loads.

        Raises:
            InputError: A path can't be read.
            ConfigError: There is no room for the run's data, or the target's address is malformed.
            RefusedError: The target refuses the account, or can't hold users as it is set up.
            UnavailableError: The target can't be reached.
        """
        log.info("checking paths, folders and the target")
        self.find_input(events_paths)
        ensure_folder(self.artifacts.root, "GHSYNC_HOME")
        if has_target:
            with (self.open_for_check or self.open_store)() as store:
                store.check_collection()

    def read(self, events_paths: Sequence[str]) -> ReadReport:
        """Read the files into events and quarantine, and make that the newest data."""
        target = self.artifacts.new_folder("events")
        report = read_events(self.spark.session, events_paths, target, self.rules, self.home)
        # An event from the future is refused today, but not on a later day.
        clock = UNKNOWN if FUTURE_WORDS in report.reasons else "any"
        report = replace(report, data_version=version_of(self.code_version, "read", report.input_version, clock))
        self.artifacts.publish(report)
        return report

    def flatten(self) -> FlattenReport:
        """Flatten the newest events into users, and make these the newest."""
        read = self.artifacts.newest(ReadReport)
        report = flatten_users(self.spark.session, read, self.artifacts.new_folder("users"))
        report = replace(
            report,
            input_version=read.data_version,
            data_version=version_of(self.code_version, "flatten", read.data_version),
        )
        self.artifacts.publish(report)
        return report

    def load(self, run_id: str, on_step: Callable[[Step], None] = lambda _: None) -> LoadReport:
        """Load the newest users; after a transient fault try again, from the recovery on."""
        users = self.artifacts.newest(FlattenReport)

        def attempt() -> LoadReport:
            with self.open_store() as store:
                return load_users(
                    store,
                    self.spark.session,
                    users,
                    run_id=run_id,
                    scratch=self.artifacts.new_folder("load"),
                    lease_wait_seconds=self.lease_wait_seconds,
                    lease_quiet_seconds=self.lease_quiet_seconds,
                    on_step=on_step,
                )

        report = replace(retrying("load", attempt, attempts=self.attempts), input_version=users.data_version)
        self.artifacts.publish(report)
        return report

    def count_users(self) -> int | None:
        """Return the server's own count of users; None if it does not answer: no work is left that needs it."""
        try:
            with self.open_store() as store:
                return store.estimated_count()
        except TransientError:
            return None

    def check_read(self, max_ratio: float | None = None) -> Finding:
        """Judge the newest events."""
        allowed = self.max_quarantined_ratio if max_ratio is None else max_ratio
        return checks.quarantined_ratio(self.artifacts.newest(ReadReport), allowed)

    def check_users(self) -> Finding:
        """Judge the newest users."""
        users = self.artifacts.newest(FlattenReport)
        return checks.users_valid(check_users(self.spark.session, users.users_path, self.rules))

    def check_marked(self) -> Finding:
        """Judge the markers of the newest load."""
        return checks.spark_temp_marked(self.artifacts.newest(LoadReport))

    def check_complete(self, run_id: str | None) -> Finding:
        """Judge the verification of ``run_id``'s load; if the newest is another run's, read the stored users again."""
        load = self.artifacts.newest(LoadReport)
        if load.run_id == run_id:
            return checks.users_complete(load)
        users = self.artifacts.newest(FlattenReport)
        return self.on_store(lambda store: checks.audit_users(store, Path(users.users_path)))

    def audit(self) -> list[Finding]:
        """Run every check on the present data; write nothing."""
        with (self.open_for_check or self.open_store)() as store:
            store.ping()
        return [
            self.check_read(),
            self.check_users(),
            self.check_marked(),
            self.check_complete(run_id=None),
            *(self.on_store(check) for check in STORE_CHECKS.values()),
        ]

    def on_store(self, check: Callable[[UserStore], Finding]) -> Finding:
        """Judge the stored documents; try again after a transient fault, a bounded number of times."""

        def attempt() -> Finding:
            with self.open_store() as store:
                return check(store)

        return retrying("check", attempt, attempts=self.attempts)


@dataclass
class BatchRun:
    """One pass through the flow without Dagster, with the same gates.

    Attributes:
        findings: The checks that ran, in order; the last one may have failed and ended the run.
    """

    flow: BatchFlow
    events_paths: Sequence[str]
    run_id: str
    findings: list[Finding] = field(default_factory=list)

    def run(self) -> bool:
        """Run every step until a gate fails; return whether all gates passed."""
        bind_run(self.run_id)
        try:
            for finding in self._steps():
                self.findings.append(finding)
                if not finding.passed:
                    return False
            return True
        finally:
            bind_run(None)

    def _steps(self) -> Iterator[Finding]:
        self.flow.check_first(self.events_paths)
        self.flow.read(self.events_paths)
        yield self.flow.check_read()
        self.flow.flatten()
        yield self.flow.check_users()
        self.flow.load(self.run_id)
        yield self.flow.check_marked()
        yield self.flow.check_complete(self.run_id)
        for check in STORE_CHECKS.values():
            yield self.flow.on_store(check)


STORE_CHECKS = {
    "no_spark_temp_left": checks.no_spark_temp_left,
    "unique_user_id_index": checks.unique_user_id_index,
    "documents_conform": checks.documents_conform,
}
"""The checks that need nothing but the stored documents, by name."""
