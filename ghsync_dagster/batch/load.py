"""Load: write users to the collection and verify them, under the protocol of ``domain.precedence``.

Belongs here: the order of a load's phases, and the steps that Spark executes. Not here: the order of the steps of a
key, nor single operations of a store. ``docs/explain/precedence.md`` describes the protocol.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ghsync_dagster.batch.lease import hold_lease
from ghsync_dagster.batch.plan import LEFT_TO_SPARK, Plan, make_plan, plan_missing
from ghsync_dagster.batch.reports import LoadReport, count_rows, rows_of, version_entry
from ghsync_dagster.batch.settle import recover, settle_load
from ghsync_dagster.domain.errors import InputError, UnavailableError
from ghsync_dagster.domain.finding import OFFENDERS
from ghsync_dagster.domain.precedence import LoadState, LoadStep, SettleStep
from ghsync_dagster.domain.user import USER_FIELDS
from ghsync_dagster.logging import get_logger
from ghsync_dagster.process import identity
from ghsync_dagster.progress import log_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pyspark.sql import SparkSession

    from ghsync_dagster.batch.lease import HeldLease
    from ghsync_dagster.batch.reports import FlattenReport
    from ghsync_dagster.stores.mongo.users import UserStore
    from ghsync_dagster.stores.mongo.writer import UserWriter

ROUNDS: Final = 3
"""How often missing rows are written again before verification counts as failed."""
_LEASE_CHECK_SECONDS: Final = 1.0
"""How often the lease is checked while Spark writes."""
_STOP_SECONDS: Final = 20.0
"""How long to wait for cancelled tasks to end."""

log = get_logger("load")


class Step(StrEnum):
    """What a load has completed, for its log. Tests inject faults at these points.

    Those up to ``RECOVERED`` come before the protocol. Each later one ends steps of it, for all users.
    """

    LEASED = "leased"
    PREPARED = "prepared"
    RECOVERED = "recovered"
    RECORDED = "recorded"
    PLANNED = "planned"
    INSERTED = "inserted"
    VERSIONED = "versioned"
    COMPARED = "compared"
    RECONCILED = "reconciled"
    CHECKED = "checked"
    UNMARKED = "unmarked"
    DONE = "done"


_SETTLED: Final = {
    SettleStep.RECORD_CHECKED: Step.CHECKED,
    SettleStep.UNMARK: Step.UNMARKED,
    SettleStep.RECORD_DONE: Step.DONE,
}


def load_users(
    store: UserStore,
    spark: Callable[[], SparkSession],
    users: FlattenReport,
    *,
    run_id: str,
    scratch: Path,
    lease_wait_seconds: float,
    lease_quiet_seconds: float,
    on_step: Callable[[Step], None] = lambda _: None,
) -> LoadReport:
    """Load the flattened users into the collection.

    Args:
        store: The target.
        spark: Returns the session.
        users: The report of ``flatten``.
        run_id: The run to name in the report.
        scratch: Empty folder for the plan.
        lease_wait_seconds: How long to wait for another load.
        lease_quiet_seconds: How long the server may still execute the last command of a load that died.
        on_step: Called after each step.

    Returns:
        The report. ``unresolved`` above 0 means that verification failed: the documents keep their marker, and the
        next load settles them.

    Raises:
        LeaseHeldError: Another load is running.
        LeaseLostError: The lease expired during the load.
        RefusedError: The collection is set up in another way, or rights are missing.
        UnavailableError: MongoDB became unavailable. Run again: the next load settles what is unfinished.
    """
    from ghsync_dagster.stores.mongo.writer import UserWriter

    store.check_collection()
    with hold_lease(store, wait_seconds=lease_wait_seconds, quiet_seconds=lease_quiet_seconds) as lease:
        on_step(Step.LEASED)
        return _Load(store, UserWriter(store, lease), spark, users, run_id, scratch, lease, on_step).run()


@dataclass
class _Load:
    store: UserStore
    writer: UserWriter
    spark: Callable[[], SparkSession]
    users: FlattenReport
    run_id: str
    scratch: Path
    lease: HeldLease
    on_step: Callable[[Step], None]
    load_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    phases: dict[str, float] = field(default_factory=dict)
    left: Counter[str] = field(default_factory=Counter)

    def run(self) -> LoadReport:
        started = time.monotonic()
        with self._phase("prepare"):
            self.store.ensure_collection()
            self.on_step(Step.PREPARED)
        with self._phase("recover"):
            recovered = recover(self.writer)
            self.on_step(Step.RECOVERED)
        with self._phase("plan"):
            record = {"started_at": datetime.now(UTC), "run_id": self.run_id, "users": self.users.users}
            self.writer.record_load(self.load_id, state=LoadState.RUNNING.value, **record)
            self.on_step(Step.RECORDED)
            plan = make_plan(self.writer, Path(self.users.users_path), self.scratch / "plan", self.load_id)
            self._assert_all_planned(plan)
            self.left.update(plan.left)
            self.on_step(Step.PLANNED)
        log.info("planned", insert=plan.inserts, replace=plan.replaced, confirm=plan.confirmed, left=dict(plan.left))
        with self._phase("write"):
            self._insert(plan.insert_path, plan.inserts)
        with self._phase("verify"):
            marked = self.store.count_marked() if plan.expected else 0
            outcome = self._verify(plan)
        if outcome.unresolved == 0:
            with self._phase("settle"):
                # Only with nothing replaced or given up is the number of marked documents known in advance.
                untouched = plan.replaced == 0 and outcome.given_up_inserts == 0
                unmarked = settle_load(
                    self.writer,
                    self.load_id,
                    expected_marked=plan.inserts if untouched else None,
                    on_step=lambda step: self.on_step(_SETTLED[step]) if step in _SETTLED else None,
                )
        else:
            unmarked = 0
            log.error("verification failed; markers stay until the next load", unresolved=outcome.unresolved)
        seconds = round(time.monotonic() - started, 3)
        log.info("loaded", unmarked=unmarked, unresolved=outcome.unresolved, seconds=seconds)
        return LoadReport(
            load_id=self.load_id,
            run_id=self.run_id,
            users_path=self.users.users_path,
            users=self.users.users,
            inserted=plan.inserts - outcome.given_up_inserts,
            replaced=plan.replaced - outcome.given_up_replaced,
            confirmed=plan.confirmed,
            left=dict(self.left),
            expected_marked=plan.expected,
            marked=marked,
            marker_lost=len(outcome.marker_lost),
            lost=outcome.marker_lost[:OFFENDERS],
            missing=outcome.missing,
            reconciled=outcome.missing - outcome.unresolved,
            unresolved=outcome.unresolved,
            offenders=outcome.offenders,
            unmarked=unmarked,
            recovered=recovered,
            phases=self.phases,
            seconds=seconds,
        )

    def _assert_all_planned(self, plan: Plan) -> None:
        planned = plan.inserts + plan.replaced + plan.confirmed + sum(plan.left.values())
        if planned != self.users.users:
            raise InputError(
                f"{self.users.users_path} holds {planned} users, not the {self.users.users} that were flattened.",
                way_out="Materialize users again: another run has removed or changed them.",
            )

    def _insert(self, path: Path, rows: int) -> None:
        """Insert new users by Spark, and their version entries alongside it."""
        if rows == 0:
            return
        self._name_writer()
        # Both have ended when this returns or raises, also on Ctrl-C: nothing is written after the lease is released.
        with ThreadPoolExecutor(max_workers=2, thread_name_prefix="insert") as executor:
            commands = {LoadStep.WRITE_DOCUMENT: self._append, LoadStep.WRITE_VERSION: self._write_versions}
            tasks = [executor.submit(commands[step], path) for step in LEFT_TO_SPARK]
            try:
                self._await(*tasks)
            except BaseException:
                self._stop_inserting()
                raise
            self.on_step(Step.INSERTED)
        self.on_step(Step.VERSIONED)

    def _await(self, *tasks: Future[None]) -> None:
        """Wait until all tasks have ended; raise the first error, or that the lease is lost."""
        pending: set[Future[None]] = set(tasks)
        while pending:
            done, pending = wait(pending, timeout=_LEASE_CHECK_SECONDS, return_when=FIRST_EXCEPTION)
            for task in done:
                task.result()
            self.lease.allow()

    def _name_writer(self) -> None:
        """Name Spark's driver in the lease: it may continue to write for a moment after this process was killed."""
        from ghsync_dagster.stores.spark import spark_errors

        with spark_errors("Asking Spark's driver"):
            gateway: Any = self.spark().sparkContext._gateway  # noqa: SLF001  pyspark has no public way
            driver = gateway.jvm.java.lang.ProcessHandle.current().pid()
        self.lease.name_writer(identity(driver))

    def _append(self, path: Path) -> None:
        from ghsync_dagster.stores.spark import VERSIONED_USER_SCHEMA, DuplicateUserError, insert_users, spark_errors

        session = self.spark()
        with spark_errors("Writing users"):
            session.sparkContext.setJobGroup(self.load_id, "Inserting users", interruptOnCancel=True)
        try:
            insert_users(session.read.schema(VERSIONED_USER_SCHEMA).parquet(str(path)), self.store, self.lease)
        except DuplicateUserError:
            # Verification finds what was not written, and why. First wait for the other tasks of the job.
            self._stop_inserting()
            log.warning("users stored meanwhile; verification finds them")

    def _stop_inserting(self) -> None:
        """Cancel the inserts and wait until no task of this Spark application runs any more."""
        from py4j.protocol import Py4JError

        def stop() -> None:
            context = self.spark().sparkContext
            context.cancelJobGroup(self.load_id)
            tracker = context._jsc.sc().statusTracker()  # noqa: SLF001  pyspark's own tracker knows no tasks
            deadline = time.monotonic() + _STOP_SECONDS
            while any(executor.numRunningTasks() for executor in tracker.getExecutorInfos()):
                if time.monotonic() > deadline:
                    raise UnavailableError(
                        f"Spark's tasks still write {_STOP_SECONDS:.0f} s after they were cancelled.",
                        way_out="Run again: the next load settles what this one left.",
                    )
                time.sleep(0.02)

        # In another thread, as this thread's connection to the JVM may be in the middle of a call.
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="stop") as executor:
            try:
                executor.submit(stop).result()
            except Py4JError as error:
                log.warning("Spark driver gone", reason=type(error).__name__)

    def _write_versions(self, path: Path) -> None:
        self.writer.insert_versions(map(version_entry, chain.from_iterable(rows_of(path))), self.load_id)

    def _verify(self, plan: Plan) -> _Outcome:
        """Compare the expected with the stored users, and write the missing ones again, a bounded number of times."""
        outcome = _Outcome()
        expected, count = plan.expected_path, plan.expected
        for round_number in range(ROUNDS + 1):
            missing_path = self.scratch / f"missing-{round_number}"
            missing = self._missing(expected, missing_path) if count else 0
            self.on_step(Step.COMPARED)
            if round_number == 0:
                outcome.missing = missing
            if missing == 0:
                outcome.unresolved, outcome.offenders = 0, []
                return outcome
            outcome.unresolved = missing
            rows = chain.from_iterable(rows_of(missing_path))
            outcome.offenders = [row["user_id"] for row in islice(rows, OFFENDERS)]
            if round_number == ROUNDS:
                return outcome
            log.warning("rows missing; writing them again", missing=missing, round=round_number + 1)
            again = plan_missing(self.writer, missing_path, self.scratch / f"again-{round_number}", self.load_id)
            self.left.update(again.left)
            outcome.given_up_inserts += again.given_up_inserts
            outcome.given_up_replaced += again.given_up_replaced
            outcome.marker_lost += again.marker_lost
            self._insert(again.insert_path, again.inserts)
            self.on_step(Step.RECONCILED)
            expected, count = again.expected_path, again.expected
        return outcome

    def _missing(self, expected: Path, target: Path) -> int:
        """Write the users that ``exceptAll`` finds missing to ``target``; return their number."""
        from pyspark.sql.functions import broadcast

        from ghsync_dagster.stores.spark import VERSIONED_USER_SCHEMA, read_marked, spark_errors

        session = self.spark()
        wanted = session.read.schema(VERSIONED_USER_SCHEMA).parquet(str(expected))
        with spark_errors("Comparing users"):
            missing = wanted.select(*USER_FIELDS).exceptAll(read_marked(session, self.store))
            # Broadcast, because almost nothing is missing in a normal load.
            wanted.join(broadcast(missing.select("user_id")), "user_id", "left_semi").select(
                *VERSIONED_USER_SCHEMA.fieldNames()
            ).write.mode("overwrite").parquet(str(target))
        return count_rows(target)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.lease.allow()
        started = time.monotonic()
        with log_progress(f"at the load's phase {name}"):
            yield
        self.phases[name] = round(time.monotonic() - started, 3)
        log.info("phase done", phase=name, load=self.load_id, seconds=self.phases[name])


@dataclass
class _Outcome:
    """What verification found.

    Attributes:
        missing: Rows missing at first.
        given_up_inserts: Inserts given up, because the user was stored or deleted meanwhile.
        given_up_replaced: The same of replaced users.
        marker_lost: Users stored without the marker though nobody else wrote them.
        unresolved: Rows still missing.
        offenders: The first of these users.
    """

    missing: int = 0
    given_up_inserts: int = 0
    given_up_replaced: int = 0
    marker_lost: list[str] = field(default_factory=list)
    unresolved: int = 0
    offenders: list[str] = field(default_factory=list)
