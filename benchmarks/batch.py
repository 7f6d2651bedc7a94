"""The batch load alongside its peers: ``python -m benchmarks.batch`` runs, checks, compares and writes the results.

Belongs here: the order of runs and what is written. Not here: how a process is measured, or what a ratio means.
"""

from __future__ import annotations

import contextlib
import json
import platform
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from benchmarks import contenders, harness, results

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.contenders import Contender, Expected

DEFAULT_SIZES = f"{results.SMALL},{results.MIDDLE},{results.LARGE}"
MOST_EVENTS_FOR_ALL = 1_000_000
DEFAULT_CONTENDERS = ("ours", "before", "ours-dagster", "plain", "floor", "floor-versions")
# Above MOST_EVENTS_FOR_ALL a run of the plain script takes tens of minutes.
DEFAULT_LARGE_CONTENDERS = ("ours", "before", "floor", "floor-versions")
RESULTS = Path(__file__).with_name("results")
PACKAGES = ("pyspark", "pymongo", "msgspec", "dagster", "secantusdb")
ROOM_BYTES = 4 * 1024**3
ROOM_BYTES_AN_EVENT = 3 * 1024

console = Console(highlight=False, width=harness.table_width())


@dataclass(frozen=True)
class Bench:
    """What stays the same through all runs.

    Attributes:
        folder: Where the store's files and the contenders' homes go.
        scratch: Where inputs and outputs of contenders go.
        jar: The connector.
        java_home: The Java of all contenders.
        uri: A MongoDB that runs already, or None for the embedded server.
        timeout_seconds: How long one run may take.
    """

    folder: Path
    scratch: Path
    jar: Path
    java_home: Path
    uri: str | None
    timeout_seconds: float

    @contextlib.contextmanager
    def store(self) -> Iterator[harness.Store]:
        """Give an empty store: a new server process each time, or a new database where the server is given."""
        with harness.given_store(self.uri) if self.uri else harness.embedded_store(self.folder) as store:
            yield store

    def run(self, contender: Contender, events: Path, expected: Expected, round_number: int) -> results.Run:
        """Run a contender once and check what it left.

        Raises:
            BenchmarkError: It failed, took too long, or left something else than was due.
        """
        with self.store() as store, tempfile.TemporaryDirectory(prefix="home-", dir=self.folder) as home:
            environment = contenders.environment(store, events, Path(home), self.java_home)
            finished = harness.run_watched(
                contender.command(events, self.jar),
                environment,
                self.scratch,
                name=contender.name,
                timeout_seconds=self.timeout_seconds,
                server_pid=store.pid,
            )
            stored_mb = store.stored_mb()
            content = contenders.check_end_state(contender, store, expected)
        told = contenders.parse_output(finished.output)
        server = finished.server_usage
        return results.Run(
            contender=contender.name,
            events=expected.events,
            round=round_number,
            seconds=finished.seconds,
            phases={name: float(seconds) for name, seconds in told.get("phases", {}).items()},
            counts={name: value for name, value in told.items() if type(value) is int},
            cpu_seconds=finished.usage.cpu_seconds,
            peak_mb=finished.usage.total_mb,
            peak_java_mb=finished.usage.java_mb,
            peak_other_mb=finished.usage.other_mb,
            store_cpu_seconds=finished.server_cpu_seconds,
            store_peak_mb=server.total_mb if server else None,
            stored_mb=stored_mb,
            documents=content.documents,
            foreign_cores=finished.foreign_cores,
            load_average=finished.load_average,
        )


def measure(
    bench: Bench, sizes: Sequence[int], rounds: int | None, names: Sequence[str] | None
) -> tuple[list[results.Run], list[str]]:
    """Run all contenders on all sizes, alternating: A B C A B C.

    Args:
        bench: What stays the same.
        sizes: Numbers of events.
        rounds: Runs of each contender on each size; None: 3, and 1 above ``MOST_EVENTS_FOR_ALL``.
        names: Contenders; None: all, without the plain script above ``MOST_EVENTS_FOR_ALL``.

    Returns:
        The runs, and the failures in words: a failed contender does not end the others.
    """
    runs: list[results.Run] = []
    failures: list[str] = []
    for size in sizes:
        is_large = size > MOST_EVENTS_FOR_ALL
        wanted = contenders.named(names or (DEFAULT_LARGE_CONTENDERS if is_large else DEFAULT_CONTENDERS))
        events = _write_input(bench.scratch, size)
        expected = contenders.expected_content(events)
        for round_number in range(1, (rounds or (1 if is_large else 3)) + 1):
            for contender in wanted:
                what = f"{size:,} events, round {round_number}, {contender.name}"
                try:
                    run = bench.run(contender, events, expected, round_number)
                except harness.BenchmarkError as error:
                    failures.append(f"{what}: {error}")
                    console.print(f"{what}: failed\n{error}", markup=False, soft_wrap=True)
                    continue
                runs.append(run)
                console.print(
                    f"{what}: {run.seconds:.1f} s, {run.events / run.seconds:,.0f} events/s, "
                    f"CPU {run.cpu_seconds:.1f} s, {run.peak_mb:,.0f} MiB, {run.documents:,} documents as due, "
                    f"others' cores {run.foreign_cores:.2f}",
                    soft_wrap=True,
                )
        events.unlink()
    return runs, failures


def _write_input(scratch: Path, size: int) -> Path:
    from ghsync_dagster.dev.sample import write_sample

    report = write_sample(scratch / f"events-{size}.json", events=size)
    console.print(f"{size:,} events of {report.users:,} users, {report.size / harness.MIB:,.0f} MiB")
    return report.path


def _connector_jar(given: Path | None) -> Path:
    from ghsync_dagster.jvm.jars import ensure_jars
    from ghsync_dagster.settings import load_settings

    if given:
        return given.resolve()
    jars = ensure_jars(load_settings(), console.print)
    return next(jar for jar in jars if jar.name.startswith("mongo-spark-connector"))


def _java_home() -> Path:
    from ghsync_dagster.jvm.java import find_java
    from ghsync_dagster.settings import load_settings

    return find_java(load_settings()).home


def _facts(bench: Bench) -> dict[str, object]:
    with bench.store() as store:
        server = harness.server_version(store)
    return {
        **harness.machine_facts(bench.java_home / "bin" / "java", PACKAGES),
        "connector": bench.jar.name,
        "server": f"reports itself as {server}" + ("" if bench.uri else ", secantusd-rs, a new process for each run"),
        "store_folder": "given server" if bench.uri else str(bench.folder),
        "host": platform.node(),
    }


def write_results(
    out: Path,
    facts: dict[str, object],
    runs: Sequence[results.Run],
    *,
    warnings: Sequence[str],
    failures: Sequence[str],
) -> None:
    """Write ``batch.json`` and ``batch.png`` into ``out`` and print the tables."""
    summaries = results.summarize(runs)
    found = results.ratios(summaries)
    document = {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": facts,
        "memory": "peak sum of RSS over the process tree, sampled every "
        f"{harness.SAMPLE_SECONDS:g} s; shared pages count in each process",
        "warnings": list(warnings),
        "failures": list(failures),
        "ratios": [asdict(ratio) for ratio in found],
        "summary": [asdict(summary) for summary in summaries],
        "runs": [asdict(run) for run in runs],
    }
    (out / "batch.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if summaries:
        words = {name: contender.words for name, contender in contenders.CONTENDERS.items()}
        results.plot(summaries, words, out / "batch.png")
    for table in (results.summary_table(summaries), results.phase_table(summaries), results.ratio_table(found)):
        console.print(table)
    for warning in warnings:
        console.print(f"[yellow]{warning}[/]", soft_wrap=True)
    console.print(f"Written: {out / 'batch.json'}, {out / 'batch.png'}", soft_wrap=True)


def main(
    sizes: Annotated[str, typer.Option(help="Numbers of events, with commas between.")] = DEFAULT_SIZES,
    rounds: Annotated[int | None, typer.Option(min=1, help="Runs of each contender; default 3, large sizes 1.")] = None,
    names: Annotated[
        str | None, typer.Option("--contenders", help=f"Of {', '.join(contenders.CONTENDERS)}; commas between.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
    uri: Annotated[
        str | None, typer.Option(help="A MongoDB to measure on, in a new database each run; default: embedded.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that one run may take.")] = 1800,
    store_folder: Annotated[Path | None, typer.Option(help="Folder of the store's files; default: tmpfs.")] = None,
    connector_jar: Annotated[Path | None, typer.Option(help="The connector; default: the locked one.")] = None,
) -> None:
    """Measure the batch load alongside its peers."""
    harness.interrupt_on_signals()
    try:
        wanted_sizes = [int(size) for size in sizes.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{sizes} is not a list of numbers such as {DEFAULT_SIZES}.") from None
    wanted_names = names.split(",") if names else None
    needed = ROOM_BYTES + ROOM_BYTES_AN_EVENT * max(wanted_sizes)
    folder, warnings = harness.store_folder(store_folder, needed)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{out} can't be the folder of the results: {error.strerror}.") from None
    try:
        contenders.named(wanted_names or ())
        with tempfile.TemporaryDirectory(prefix="ghsync-bench-") as scratch:
            jar, java_home = _connector_jar(connector_jar), _java_home()
            bench = Bench(folder, Path(scratch), jar, java_home, uri, timeout)
            facts = _facts(bench)
            runs, failures = measure(bench, wanted_sizes, rounds, wanted_names)
    except KeyboardInterrupt:
        console.print("Interrupted: everything is stopped, nothing is written.")
        raise typer.Exit(harness.INTERRUPTED) from None
    except harness.BenchmarkError as error:
        console.print(str(error), markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    write_results(out, facts, runs, warnings=[*warnings, *results.noise_warnings(runs)], failures=failures)
    if failures:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
