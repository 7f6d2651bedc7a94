"""Slices under the supervisor, measured: ``python -m benchmarks.cdc_supervised`` runs, judges and writes the results.

Belongs here: the order of a run, and what is written. Not here: how probes are committed and seen (``cdc_probes``),
what they tell (``cdc_timeline``), or how the outcome is shown (``cdc_supervised_results``).

The consumers are slices that ``cdc_supervisor`` starts under ``dagster dev``, unchanged but for the length of a slice.
They say nothing of single changes, and one is killed: so it is the collection that is asked, by a process of its own,
for probes among the changes; see ``cdc_probes`` for what a probe is, and how far its time can be wrong.

A run is a steady workload during which the supervisor hands over some times; then the slice at work is killed -9 while
no other is in the group, and later, if wanted, one is killed while the next is in the group already, as at a hand-over.
"""

from __future__ import annotations

import json
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import psutil
import typer
from rich.console import Console

from benchmarks import cdc_probes, cdc_supervised_results, harness, results
from benchmarks.cdc_latency import CATCH_UP_SECONDS, START_SECONDS
from benchmarks.cdc_probes import paired
from benchmarks.cdc_timeline import (
    AFTER_MS,
    ALONE,
    CAUGHT_UP_MS,
    STANDBY,
    WARM_UP_MS,
    Killing,
    Timeline,
    hand_overs,
    no_hand_over_at,
    timeline,
)
from benchmarks.cores import Cores
from benchmarks.dagster_dev import DagsterDev
from benchmarks.stack import Stack
from benchmarks.tellers import Teller, now_ms
from ghsync_dagster.domain.errors import GhsyncError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ghsync_dagster.defs.cdc.supervisor import Slice

RESULTS = Path(__file__).with_name("results")
ROOM_BYTES = 4 * 1024**3
# Below it the next slice would not be at work yet when the one before ends.
LEAST_SLICE_SECONDS = 40.0
SETTLE_SECONDS = 10.0
STEADY_SECONDS = 5.0
TO_START_SECONDS = 120.0
TO_REPLACE_SECONDS = 180.0
KILLS = (ALONE, STANDBY)

console = Console(highlight=False, width=harness.table_width())


@dataclass(frozen=True)
class Plan:
    """What a run is to do.

    Attributes:
        rate: Changes a second, probes among them.
        hand_overs: How many hand-overs to wait for.
        kills: ``ALONE``, ``STANDBY``, both or neither, in this order.
        slice_seconds: How long a slice consumes.
        session_seconds: How long Kafka waits for a silent consumer.
    """

    rate: float
    hand_overs: int
    kills: tuple[str, ...]
    slice_seconds: float
    session_seconds: float

    @property
    def longest_seconds(self) -> float:
        """How long the workload may go on at most."""
        slices = self.hand_overs + 1 + 2 * len(self.kills)
        return slices * self.slice_seconds + TO_START_SECONDS + len(self.kills) * TO_REPLACE_SECONDS


@dataclass(frozen=True)
class SupervisedRun:
    """One run.

    Attributes:
        plan: What it was to do.
        rate: Changes a second that the database took, probes among them.
        changes: How many there were, probes among them.
        longest_behind_seconds: How late a change was sent, at worst.
        busy_cores: Cores that each kept busy meanwhile, on average: the servers by name, Dagster with its slices, the
            workload, what watches, and others.
        timeline: What was measured.
        equal: Whether table and collection were equal at the end.
    """

    plan: Plan
    rate: float
    changes: int
    longest_behind_seconds: float
    busy_cores: dict[str, float]
    timeline: Timeline
    equal: bool


class _Conductor:
    """A run from the first slice to the audit.

    Args:
        stack: The servers.
        plan: What is to be done.
        tell: Gets a line of text for each thing done.
    """

    def __init__(self, stack: Stack, plan: Plan, tell: Callable[[str], None]) -> None:
        self._stack, self._plan, self._tell = stack, plan, tell
        self._admin = stack.admin()
        self._killings: list[Killing] = []
        self._told_to_end = False

    def run(self) -> SupervisedRun:
        """Run.

        Raises:
            BenchmarkError: A process failed, or something did not come in time.
        """
        plan = self._plan
        with ExitStack() as around:
            self._watch = around.enter_context(self._teller("watch", "watch"))
            self._dagster = around.enter_context(
                DagsterDev(self._stack, slice_seconds=plan.slice_seconds, session_seconds=plan.session_seconds)
            )
            self._watch.wait(lambda: self._watch.ready, "watch", START_SECONDS)
            self._dagster.wait(lambda: self._members() == 1, "the first slice is in the group", TO_START_SECONDS)
            self._watch.ended.wait(SETTLE_SECONDS)
            arguments = ("change", f"{plan.rate:g}", f"{plan.longest_seconds:g}")
            self._workload = around.enter_context(self._teller("workload", *arguments))
            self._workload.wait(lambda: self._workload.records > 0, "change the table", START_SECONDS)
            with Cores(self._groups()) as cores:
                self._hand_over()
                for how in plan.kills:
                    {ALONE: self._kill_alone, STANDBY: self._kill_beside}[how]()
                self._pause(STEADY_SECONDS)
            slices, taken_over_ms = self._dagster.slices(), self._dagster.taken_over_ms()
            self._told_to_end = True
            self._workload.end(0)
            self._wait(lambda: self._behind() <= 0, "all changes are applied", CATCH_UP_SECONDS)
            self._watch.end(0)
        return self._outcome(slices, taken_over_ms, cores.shares)

    def _outcome(
        self, slices: Sequence[Slice], taken_over_ms: Sequence[int], busy_cores: dict[str, float]
    ) -> SupervisedRun:
        report = self._workload.report or {}
        changes = sum(report["changes"].values()) + report["probes"]
        return SupervisedRun(
            plan=self._plan,
            rate=round(changes / report["seconds"], 1),
            changes=changes,
            longest_behind_seconds=report["longest_behind_seconds"],
            busy_cores=busy_cores,
            timeline=timeline(paired(self._workload.lines, self._watch.lines), slices, self._killings, taken_over_ms),
            equal=self._stack.is_equal(),
        )

    def _teller(self, name: str, *arguments: str) -> Teller:
        return Teller(name, cdc_probes.MODULE, arguments, self._stack.environment(), self._stack.logs)

    def _groups(self) -> dict[str, Callable[[], list[psutil.Process]]]:
        """Return who takes part, by name."""
        named = {name: [psutil.Process(pid)] for name, pid in self._stack.pids.items()}
        named |= {"workload": [psutil.Process(self._workload.pid)]}
        named |= {"watching": [psutil.Process(self._watch.pid), psutil.Process()]}
        return {name: lambda found=found: found for name, found in named.items()} | {"dagster": self._dagster.processes}

    def _members(self) -> int:
        return self._stack.members(self._admin)

    def _behind(self) -> int:
        """Return how many probes are committed and not seen."""
        return self._workload.records - self._watch.records

    def _wait(self, look: Callable[[], object], what: str, seconds: float) -> None:
        """Wait until something is there, unless a process ends before."""

        def looked() -> object:
            for teller in (self._watch, self._workload):
                # A workload that ends by its own time ends too early as well: what follows would measure nothing.
                told = self._told_to_end and teller is self._workload
                if teller.ended.is_set() and (teller.report is None or not told):
                    raise harness.BenchmarkError(f"The {teller.name} ended early. Its last lines:\n{teller.tail()}")
            return look()

        self._dagster.wait(looked, what, seconds)

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        self._wait(lambda: time.monotonic() >= until, "a pause", seconds + 10)

    def _hand_over(self) -> None:
        from_ms = self._workload.lines[0]["at"]
        done = 0

        def one_more() -> bool:
            return len(hand_overs(self._dagster.slices(), from_ms)) > done

        while done < self._plan.hand_overs:
            self._wait(one_more, "a hand-over", 2 * self._plan.slice_seconds + TO_START_SECONDS)
            done += 1
            self._tell(f"hand-over {done} of {self._plan.hand_overs} is done")
        self._pause(AFTER_MS / 1000)

    def _kill_alone(self) -> None:
        self._wait(
            lambda: no_hand_over_at(now_ms(), self._dagster.slices()) and self._members() == 1,
            "one slice lives",
            2 * self._plan.slice_seconds + TO_START_SECONDS,
        )
        dead = self._kill(ALONE)
        self._wait(
            lambda: any(one.run_id != dead for one in self._dagster.running()), "a replacement runs", TO_REPLACE_SECONDS
        )
        self._recover()

    def _kill_beside(self) -> None:
        self._wait(
            lambda: len(self._dagster.running()) == self._members() == 2,
            "two slices are in the group",
            2 * self._plan.slice_seconds + TO_START_SECONDS,
        )
        self._kill(STANDBY)
        self._recover()

    def _kill(self, how: str) -> str:
        """Kill the slice at work; return its run."""
        # The oldest has the partition: it is sticky.
        at_work = self._dagster.running()[0]
        self._killings.append(Killing(at_work.run_id, self._dagster.kill(at_work), how))
        self._tell(f"the slice at work is killed, {how}")
        return at_work.run_id

    def _recover(self) -> None:
        """Wait until the dead member is out of the group and probes are seen nearly as they are committed."""
        killed_ms = self._killings[-1].at_ms
        a_second = self._plan.rate / cdc_probes.EVERY

        def recovered() -> bool:
            seen_ms = self._watch.lines[-1]["at"] if self._watch.lines else 0
            # A command of the dead process may still have reached the store.
            is_again = seen_ms > killed_ms + self._plan.session_seconds * 1000 / 2
            return is_again and self._behind() < a_second and now_ms() - seen_ms < CAUGHT_UP_MS

        self._wait(recovered, "changes are applied again", TO_REPLACE_SECONDS)
        self._tell(f"changes are applied again {(now_ms() - killed_ms) / 1000:.0f} s after the kill")
        self._pause(AFTER_MS / 1000)


def measure(home: Path, logs: Path, plan: Plan, tell: Callable[[str], None]) -> SupervisedRun:
    """Run on a stack of local servers.

    Args:
        home: Folder of the servers and of Dagster.
        logs: Folder of what the processes say.
        plan: What is to be done.
        tell: Gets a line of text for each thing done.

    Raises:
        BenchmarkError: A process failed, or something did not come in time.
    """
    with Stack(home, logs, tell) as stack:
        try:
            return _Conductor(stack, plan, tell).run()
        except GhsyncError as error:
            raise harness.BenchmarkError(str(error)) from error


def write_results(out: Path, facts: dict[str, object], run: SupervisedRun, warnings: Sequence[str]) -> None:
    """Write ``cdc-supervised.json`` and ``cdc-supervised.png`` into ``out`` and print the tables."""
    found = cdc_supervised_results.ratios(run)
    document = {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": facts,
        "latency_unit": "ms from the answer to the database's commit until the document was seen in the collection; "
        f"every {cdc_probes.EVERY}th change is a probe; steady: without the first {WARM_UP_MS // 1000} s, the "
        "hand-overs and the kills",
        "longest_gap_unit": "ms between two sightings of probes that follow each other",
        "warnings": list(warnings),
        "ratios": [asdict(ratio) for ratio in found],
        "run": asdict(run),
    }
    (out / "cdc-supervised.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    cdc_supervised_results.plot(run, out / "cdc-supervised.png")
    console.print(cdc_supervised_results.latency_table(run))
    if run.timeline.kills:
        console.print(cdc_supervised_results.kill_table(run))
    console.print(results.ratio_table(found, "Limits"))
    console.print(cdc_supervised_results.words(run), soft_wrap=True)
    for warning in warnings:
        console.print(f"[yellow]{warning}[/]", soft_wrap=True)
    console.print(f"Written: {out / 'cdc-supervised.json'}, {out / 'cdc-supervised.png'}", soft_wrap=True)


def _facts(folder: Path) -> dict[str, object]:
    from ghsync_dagster.jvm.java import find_java
    from ghsync_dagster.settings import load_settings

    packages = ("dagster", "confluent-kafka", "pymongo", "secantusdb")
    return {
        **harness.machine_facts(find_java(load_settings()).command, packages),
        "store_folder": str(folder),
    }


def main(
    rate: Annotated[float, typer.Option(min=10, help="Changes a second.")] = 1_000,
    wanted: Annotated[int, typer.Option("--hand-overs", min=1, help="Hand-overs to wait for.")] = 3,
    kills: Annotated[str, typer.Option(help="Who is killed -9 then: alone, standby, both or none.")] = "both",
    slice_seconds: Annotated[
        float, typer.Option(min=LEAST_SLICE_SECONDS, help="How long a slice consumes: GHSYNC_CDC_SLICE_SECONDS.")
    ] = 60,
    session_seconds: Annotated[
        float, typer.Option(min=6, help="When Kafka gives a consumer up: GHSYNC_CDC_SESSION_TIMEOUT_SECONDS.")
    ] = 10,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
    store_folder: Annotated[Path | None, typer.Option(help="Folder of the servers' files; default: tmpfs.")] = None,
) -> None:
    """Measure slices under the supervisor."""
    harness.interrupt_on_signals()
    chosen = {"alone": (ALONE,), "standby": (STANDBY,), "both": KILLS, "none": ()}
    if kills not in chosen:
        raise typer.BadParameter(f"{kills} is not one of {', '.join(chosen)}.", param_hint="--kills")
    plan = Plan(rate, wanted, chosen[kills], slice_seconds, session_seconds)
    folder, warnings = harness.store_folder(store_folder, ROOM_BYTES)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{out} can't be the folder of the results: {error.strerror}.") from None
    try:
        with (
            tempfile.TemporaryDirectory(prefix="ghsync-bench-") as scratch,
            tempfile.TemporaryDirectory(prefix="ghsync-stack-", dir=folder) as home,
        ):
            run = measure(
                Path(home), Path(scratch), plan, lambda text: console.print(text, markup=False, soft_wrap=True)
            )
    except KeyboardInterrupt:
        console.print("Interrupted: everything is stopped, nothing is written.")
        raise typer.Exit(harness.INTERRUPTED) from None
    except harness.BenchmarkError as error:
        console.print(str(error), markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    write_results(out, _facts(folder), run, warnings)
    if not run.equal:
        console.print("Table and collection were not equal at the end.")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
