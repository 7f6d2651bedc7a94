"""The change path alongside its peers: ``python -m benchmarks.cdc`` runs, checks, compares and writes the results.

Belongs here: the order of runs and what is written. Not here: how a contender runs, or what a ratio means.
"""

from __future__ import annotations

import contextlib
import json
import platform
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from benchmarks import cdc_contenders, cdc_latency, cdc_results, harness, results
from benchmarks.cdc_contenders import OURS, Bench
from benchmarks.cdc_events import Case, History, users
from benchmarks.cdc_latency import WARM_UP_SECONDS, LatencyRun
from benchmarks.peers.kafka_sink import Worker
from benchmarks.stack import Stack, local_settings
from ghsync_dagster.domain.errors import GhsyncError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

RESULTS = Path(__file__).with_name("results")
DEFAULT_SIZES = "100000,1000000"
DEFAULT_RATES = "200,1000,5000"
DEFAULT_ROUNDS = 3
MOST_EVENTS_FOR_ALL = 200_000
FEW_KEYS, MANY_KEYS = 0.12, 0.9
LEAST_LATENCY_SECONDS = 24.0
ROOM_BYTES = 4 * 1024**3
ROOM_BYTES_AN_EVENT = 1024
ROOM_BYTES_A_SCHEMA = 3072

console = Console(highlight=False, width=harness.table_width())


def cases(size: int, schemas: Sequence[bool], shares: Sequence[float] | None) -> list[Case]:
    """Return the inputs of one size.

    Args:
        size: Events.
        schemas: Whether records carry their schemas: each that is wanted.
        shares: Keys an event; None: few and many, and few only above ``MOST_EVENTS_FOR_ALL``.
    """
    wanted = shares or ((FEW_KEYS,) if size > MOST_EVENTS_FOR_ALL else (FEW_KEYS, MANY_KEYS))
    return [Case(size, max(round(size * share), 2), each) for each in schemas for share in wanted]


def measure(
    bench: Bench, inputs: Sequence[Case], rounds: int | None, names: Sequence[str]
) -> tuple[list[results.Run], list[str]]:
    """Run all contenders on all inputs, alternating: A B C A B C.

    Args:
        bench: What stays the same.
        inputs: What is applied.
        rounds: Runs of each contender on each input; None: 3, and 1 above ``MOST_EVENTS_FOR_ALL``.
        names: Contenders.

    Returns:
        The runs, and the failures in words: a failed contender does not end the others.
    """
    runs: list[results.Run] = []
    failures: list[str] = []
    people = users(max(case.keys for case in inputs) + 1, bench.scratch)
    for case in inputs:
        history = History(case, people)
        console.print(f"{results.input_words(case.events, case.words)}: {history.due.documents:,} documents are due")
        operations: int | None = None
        many = rounds or (1 if case.events > MOST_EVENTS_FOR_ALL else DEFAULT_ROUNDS)
        for round_number in range(1, many + 1):
            for name in names:
                what = f"{results.input_words(case.events, case.words)}, round {round_number}, {name}"
                try:
                    run = bench.run(name, history, round_number, operations)
                except harness.BenchmarkError as error:
                    failures.append(f"{what}: {error}")
                    console.print(f"{what}: failed\n{error}", markup=False, soft_wrap=True)
                    continue
                if name == OURS:
                    operations = run.counts["operations"]
                runs.append(run)
                console.print(f"{what}: {_told(run)}", soft_wrap=True)
    return runs, failures


def _told(run: results.Run) -> str:
    counts = ", ".join(f"{count:,} {name}" for name, count in run.counts.items() if count)
    return (
        f"{run.seconds:.2f} s, {run.events / run.seconds:,.0f} events/s, CPU {run.cpu_seconds:.1f} s, "
        f"{run.peak_mb:,.0f} MiB, {run.documents:,} documents as due, others' cores {run.foreign_cores:.2f}"
        + (f"; {counts}" if counts else "")
    )


def measure_latency(
    home: Path, logs: Path, rates: Sequence[float], seconds: float
) -> tuple[list[LatencyRun], list[str]]:
    """Measure the way from commit to document at each rate, on one stack of local servers.

    Args:
        home: Folder of the servers.
        logs: Folder of what the processes say.
        rates: Changes a second.
        seconds: How long the table is changed at each rate.

    Returns:
        The runs, and the failures in words.
    """
    runs: list[LatencyRun] = []
    failures: list[str] = []
    with Stack(home, logs, lambda text: console.print(text, markup=False, soft_wrap=True)) as stack:
        for rate in rates:
            what = f"latency at {rate:,.0f} changes/s"
            try:
                run = cdc_latency.run(stack, rate, seconds)
            except (harness.BenchmarkError, GhsyncError) as error:
                failures.append(f"{what}: {error}")
                console.print(f"{what}: failed\n{error}", markup=False, soft_wrap=True)
                continue
            runs.append(run)
            if not run.equal:
                failures.append(f"{what}: table and collection were not equal at the end.")
            console.print(
                f"{what}: {run.rate:,.0f} reached, steady p50 {run.steady.p50} p99 {run.steady.p99} ms, around the "
                f"hand-over p99 {run.around.p99} ms, longest gap {run.longest_gap_ms} ms, "
                f"{'equal' if run.equal else 'NOT equal'} at the end",
                soft_wrap=True,
            )
    return runs, failures


@contextlib.contextmanager
def _bench(folder: Path, scratch: Path, timeout_seconds: float) -> Iterator[tuple[Bench, dict[str, object]]]:
    """Start a broker on a folder of its own, give the bench and facts on the machine, and stop it again."""
    from ghsync_dagster.jvm.jars import ensure_jars, locked_set
    from ghsync_dagster.jvm.java import find_java
    from ghsync_dagster.local.kafka import KafkaServer

    with tempfile.TemporaryDirectory(prefix="ghsync-broker-", dir=folder) as home:
        settings = local_settings(Path(home))
        server = KafkaServer(settings)
        try:
            java = find_java(settings).command
            (sink,) = ensure_jars(settings, console.print, locked_set("bench"))
            jars = ensure_jars(settings, console.print, locked_set("kafka"))
            broker = server.up(lambda text: console.print(text, markup=False, soft_wrap=True))
            if broker.uri is None or broker.pid is None:
                raise AssertionError("a broker that is up has an address and a process")
            worker = Worker(java, jars, sink)
            yield Bench(folder, scratch, broker.uri, broker.pid, worker, timeout_seconds), _facts(folder, java, sink)
        except GhsyncError as error:
            raise harness.BenchmarkError(str(error)) from error
        finally:
            server.down(console.print)


def _facts(folder: Path, java: Path, sink: Path) -> dict[str, object]:
    with harness.embedded_store(folder) as store:
        server = harness.server_version(store)
    return {
        **harness.machine_facts(java, ("confluent-kafka", "pymongo", "msgspec", "secantusdb")),
        "sink": sink.name,
        "server": f"reports itself as {server}, secantusd-rs, a new process for each run",
        "store_folder": str(folder),
        "host": platform.node(),
    }


def write_results(
    out: Path,
    facts: dict[str, object],
    runs: Sequence[results.Run],
    latencies: Sequence[LatencyRun],
    *,
    warnings: Sequence[str],
    failures: Sequence[str],
) -> None:
    """Write ``cdc.json`` and ``cdc.png`` into ``out`` and print the tables."""
    summaries = results.summarize(runs)
    found = [*cdc_results.ratios(summaries), *cdc_results.latency_ratios(latencies)]
    document = {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": facts,
        "seconds": "from the end of the transaction that holds the changes back until the last change is in the "
        "collection; the snapshot before it is the warm-up",
        "memory": "peak sum of RSS over the process tree, sampled every "
        f"{harness.SAMPLE_SECONDS:g} s; shared pages count in each process",
        "latency_unit": f"ms from the database's commit to the store's acknowledgement; steady: without the first "
        f"{WARM_UP_SECONDS:g} s and the hand-over",
        "warnings": list(warnings),
        "failures": list(failures),
        "ratios": [asdict(ratio) for ratio in found],
        "summary": [asdict(summary) for summary in summaries],
        "runs": [asdict(run) for run in runs],
        "latency": [asdict(run) for run in latencies],
    }
    (out / "cdc.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if summaries or latencies:
        cdc_results.plot(summaries, latencies, cdc_contenders.WORDS, out / "cdc.png")
    if summaries:
        console.print(results.summary_table(summaries, "Changes from Kafka to MongoDB"))
    if latencies:
        console.print(cdc_results.latency_table(latencies))
    console.print(results.ratio_table(found, "Ratios of medians, and limits"))
    for warning in warnings:
        console.print(f"[yellow]{warning}[/]", soft_wrap=True)
    console.print(f"Written: {out / 'cdc.json'}, {out / 'cdc.png'}", soft_wrap=True)


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part]
    except ValueError:
        raise typer.BadParameter(f"{text} is not a list of numbers with commas between.", param_hint=option) from None


SCHEMAS = {"off": (False,), "on": (True,), "both": (False, True)}


def main(
    sizes: Annotated[str, typer.Option(help="Numbers of events, with commas between; empty for none.")] = DEFAULT_SIZES,
    rounds: Annotated[int | None, typer.Option(min=1, help="Runs of each contender; default 3, large sizes 1.")] = None,
    names: Annotated[
        str, typer.Option("--contenders", help=f"Of {', '.join(cdc_contenders.WORDS)}; commas between.")
    ] = ",".join(cdc_contenders.WORDS),
    schemas: Annotated[str, typer.Option(help="Records with their schemas: off, on or both.")] = "both",
    keys: Annotated[
        str, typer.Option(help="Keys an event, with commas between; default 0.12,0.9, large sizes 0.12.")
    ] = "",
    rates: Annotated[
        str, typer.Option(help="Changes a second through the whole stack, commas between; empty for none.")
    ] = DEFAULT_RATES,
    seconds: Annotated[float, typer.Option(min=LEAST_LATENCY_SECONDS, help="How long at each of the rates.")] = 40,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a run, or its warm-up, may take.")] = 900,
    store_folder: Annotated[Path | None, typer.Option(help="Folder of the servers' files; default: tmpfs.")] = None,
) -> None:
    """Measure the change path alongside its peers."""
    harness.interrupt_on_signals()
    wanted_sizes = [int(size) for size in _numbers(sizes, "--sizes")]
    wanted_rates = _numbers(rates, "--rates")
    if schemas not in SCHEMAS:
        raise typer.BadParameter(f"{schemas} is not one of {', '.join(SCHEMAS)}.", param_hint="--schemas")
    wanted_names = names.split(",")
    if unknown := [name for name in wanted_names if name not in cdc_contenders.WORDS]:
        raise typer.BadParameter(f"There is no contender {', '.join(unknown)}.", param_hint="--contenders")
    inputs = [case for size in wanted_sizes for case in cases(size, SCHEMAS[schemas], _numbers(keys, "--keys") or None)]
    folder, warnings = harness.store_folder(store_folder, _room(inputs))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{out} can't be the folder of the results: {error.strerror}.") from None
    runs: list[results.Run] = []
    latencies: list[LatencyRun] = []
    failures: list[str] = []
    try:
        with tempfile.TemporaryDirectory(prefix="ghsync-bench-") as scratch:
            with _bench(folder, Path(scratch), timeout) as (bench, facts):
                if inputs:
                    runs, failures = measure(bench, inputs, rounds, wanted_names)
            if wanted_rates:
                with tempfile.TemporaryDirectory(prefix="ghsync-stack-", dir=folder) as home:
                    latencies, more = measure_latency(Path(home), Path(scratch), wanted_rates, seconds)
                    failures += more
    except KeyboardInterrupt:
        console.print("Interrupted: everything is stopped, nothing is written.")
        raise typer.Exit(harness.INTERRUPTED) from None
    except harness.BenchmarkError as error:
        console.print(str(error), markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    warnings += results.noise_warnings(runs)
    write_results(out, facts, runs, latencies, warnings=warnings, failures=failures)
    if failures:
        raise typer.Exit(1)


def _room(inputs: Sequence[Case]) -> int:
    """Return how many bytes the broker's and the store's files may take at once."""
    return ROOM_BYTES + max(
        (case.events * (ROOM_BYTES_AN_EVENT + (ROOM_BYTES_A_SCHEMA if case.schemas else 0)) for case in inputs),
        default=0,
    )


if __name__ == "__main__":
    typer.run(main)
