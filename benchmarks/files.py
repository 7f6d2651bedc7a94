"""Reading many files alongside one: ``python -m benchmarks.files`` runs, judges and writes the results.

Belongs here: the inputs, the order of runs, the ratios. Not here: one read (``files_once``).

The same events lie in one plain file, in one packed file and in many, so that what differs is how they lie. The peers
are an earlier build, and Spark's own reader of JSON.
"""

from __future__ import annotations

import gzip
import json
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import harness
from benchmarks.contenders import EARLIER, inherited_environment
from benchmarks.harness import BenchmarkError
from benchmarks.results import Ratio, at_most, ratio_table

if TYPE_CHECKING:
    from collections.abc import Sequence

RESULTS = Path(__file__).with_name("results")
ROOM_BYTES = 4 * 1024**3
DAY, HOURS = 686_000, 24
PIECES, SMALL = 80_000, 50_000
PIECE_FILES = 200
NOISE = 1.05
"""What two builds may differ by in a run on a machine that others use too."""
_SECONDS = 1_800

console = Console(highlight=False, width=harness.table_width())


@dataclass(frozen=True)
class Input:
    """Events, and how they lie.

    Attributes:
        name: In the results.
        path: A file, or a folder.
        events: How many.
    """

    name: str
    path: Path
    events: int


@dataclass(frozen=True)
class Read:
    """What one read took.

    Attributes:
        reader: ``ours``, ``earlier`` or ``spark``.
        files: The input's name.
        seconds: Of the read, Spark being warm.
        cpu_seconds: Of the driver, its JVM and the workers meanwhile.
        peak_mb: Of the whole process tree, its start included.
        foreign_cores: Cores that others kept busy.
    """

    reader: str
    files: str
    seconds: float
    cpu_seconds: float
    peak_mb: float
    foreign_cores: float


def write_inputs(folder: Path, scale: float) -> dict[str, Input]:
    """Write all inputs: the same bytes as one plain file, one packed file and many files."""
    from ghsync_dagster.dev.sample import write_sample

    def named(name: str, path: Path, events: int) -> tuple[str, Input]:
        return name, Input(name, path, events)

    def scaled(size: int) -> int:
        # Never the same for two, and never fewer than there are files.
        return max(PIECE_FILES + size // 1_000, round(size * scale))

    day, pieces, small = map(scaled, (DAY, PIECES, SMALL))
    inputs = []
    for events, count in ((day, HOURS), (pieces, PIECE_FILES)):
        plain = write_sample(folder / f"{events}.json", events=events).path
        inputs.append(named(f"{events:,} events, one plain file", plain, events))
        content = plain.read_bytes()
        one = folder / f"{events}.json.gz"
        one.write_bytes(gzip.compress(content, 6))
        inputs.append(named(f"{events:,} events, one gz file", one, events))
        many = folder / f"{events}-in-{count}"
        many.mkdir()
        lines = content.splitlines(keepends=True)
        for number in range(count):
            part = b"".join(lines[len(lines) * number // count : len(lines) * (number + 1) // count])
            (many / f"{number:03d}.json.gz").write_bytes(gzip.compress(part, 6))
        inputs.append(named(f"{events:,} events, {count} gz files", many, events))
    one_each = folder / f"{small}-files"
    one_each.mkdir()
    for number, line in enumerate(lines * (-(-small // len(lines)))):
        if number == small:
            break
        (one_each / f"{number:05d}.json").write_bytes(line)
    inputs.append(named(f"{small:,} files of one event", one_each, small))
    for size in (28_600, 286_000):
        events = scaled(size)
        plain = write_sample(folder / f"plain-{size}.json", events=events).path
        inputs.append(named(f"{events:,} events, one plain file", plain, events))
    return dict(inputs)


def plan(inputs: Sequence[str]) -> list[tuple[str, str]]:
    """Return who reads what, in the order of a round."""
    small = next(name for name in inputs if "files of one event" in name)
    pairs = [
        (reader, name) for name in inputs if name != small for reader in ("earlier", "ours") if _compared(reader, name)
    ]
    return [*pairs, ("spark", small), ("ours", small)]


def _compared(reader: str, name: str) -> bool:
    return reader == "ours" or "one gz" not in name


class _Conductor:
    """Runs reads, each in a process of its own."""

    def __init__(self, builds: dict[str, Path], home: Path) -> None:
        self._builds, self._home = builds, home

    def read(self, reader: str, files: Input, name: str) -> Read:
        """Read once.

        Raises:
            BenchmarkError: It failed, was of another build, or read another number of events.
        """
        build = self._builds.get(reader, harness.PROJECT)
        with tempfile.TemporaryDirectory(dir=self._home) as scratch:
            which = "spark" if reader == "spark" else "ours"
            done = harness.run_watched(
                [sys.executable, str(Path(__file__).with_name("files_once.py")), which, str(files.path), scratch],
                inherited_environment() | {"PYTHONPATH": str(build)},
                self._home,
                name=name,
                timeout_seconds=_SECONDS,
            )
        found: dict[str, Any] = json.loads(done.output.strip().splitlines()[-1])
        if Path(found["build"]) != build.resolve() or found["events"] != files.events:
            raise BenchmarkError(f"{reader} on {files.name}: {found}, where {files.events} events of {build} are due.")
        return Read(reader, files.name, found["seconds"], found["cpu_seconds"], done.usage.total_mb, done.foreign_cores)


def medians(reads: Sequence[Read], value: str) -> dict[tuple[str, str], float]:
    """Return the medians by reader and input."""
    groups: dict[tuple[str, str], list[float]] = {}
    for read in reads:
        groups.setdefault((read.reader, read.files), []).append(getattr(read, value))
    return {key: statistics.median(values) for key, values in groups.items()}


def judge(reads: Sequence[Read], inputs: Sequence[str]) -> list[Ratio]:
    """Return the ratios of medians of seconds, with their targets."""
    seconds = medians(reads, "seconds")
    day, _, hours, pieces, packed, many, small, *plain = inputs

    def ratio(one: tuple[str, str], other: tuple[str, str], target: float | None) -> Ratio:
        words = f"{one[0]}: {one[1]} / {other[0]}: {other[1]}"
        return at_most(words, seconds[one] / seconds[other], target)

    return [
        ratio(("ours", many), ("ours", pieces), 1.5),
        ratio(("ours", many), ("ours", packed), 1.5),
        ratio(("ours", hours), ("ours", day), 1.1),
        ratio(("ours", small), ("spark", small), 1.5),
        *(ratio(("ours", name), ("earlier", name), NOISE) for name in plain),
        *(ratio(("ours", name), ("earlier", name), None) for name in (day, hours, pieces, many)),
    ]


def main(
    rounds: Annotated[int, typer.Option(min=1, help="How often each reads each.")] = 3,
    scale: Annotated[float, typer.Option(min=0.0001, max=1, help="A part of the events and small files.")] = 1.0,
    commit: Annotated[str, typer.Option(help="The earlier build.")] = EARLIER,
    before: Annotated[Path | None, typer.Option(help="A folder with the earlier build in place of the commit.")] = None,
    folder: Annotated[Path | None, typer.Option(help="For files. Default: on tmpfs.")] = None,
    out: Annotated[Path, typer.Option(help="The results.")] = RESULTS / "files.json",
) -> None:
    """Measure how many files read alongside one, an earlier build, and Spark's own reader."""
    harness.interrupt_on_signals()
    room, warnings = harness.store_folder(folder, ROOM_BYTES)
    reads: list[Read] = []
    try:
        with ExitStack() as around:
            home = Path(around.enter_context(tempfile.TemporaryDirectory(prefix="ghsync-bench-files-", dir=room)))
            (home / "in").mkdir()
            build = before.resolve() if before else harness.earlier_build(commit, home / "earlier")
            inputs = write_inputs(home / "in", scale)
            conductor = _Conductor({"earlier": build}, home)
            for number in range(rounds):
                for reader, name in plan(list(inputs)):
                    read = conductor.read(reader, inputs[name], f"{reader}-{number}")
                    reads.append(read)
                    console.print(
                        f"round {number + 1}, {reader}, {name}: {read.seconds:.1f} s, CPU {read.cpu_seconds:.1f} s, "
                        f"{read.peak_mb:,.0f} MiB, others' cores {read.foreign_cores:.2f}",
                        soft_wrap=True,
                    )
    except KeyboardInterrupt:
        console.print("Interrupted: everything is stopped, nothing is written.")
        raise typer.Exit(harness.INTERRUPTED) from None
    except BenchmarkError as error:
        console.print(f"failed: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    ratios = judge(reads, list(inputs))
    _write(out, reads, ratios, warnings)
    console.print(ratio_table(ratios, "Ratios of median seconds"))
    console.print(f"Written: {out}", soft_wrap=True)


def _write(out: Path, reads: Sequence[Read], ratios: Sequence[Ratio], warnings: Sequence[str]) -> None:
    found = {value: medians(reads, value) for value in ("seconds", "cpu_seconds", "peak_mb")}
    table = Table(title="Medians")
    for title in ("input", "reader", "seconds", "CPU seconds", "peak MiB"):
        table.add_column(title, justify="left" if title in ("input", "reader") else "right")
    summary = []
    for reader, name in sorted(found["seconds"], key=lambda key: (key[1], key[0])):
        row = {value: round(medians_of[reader, name], 2) for value, medians_of in found.items()}
        summary.append({"input": name, "reader": reader, **row})
        table.add_row(name, reader, *(f"{value:,.1f}" for value in row.values()))
    console.print(table)
    document = {
        "warnings": list(warnings),
        "ratios": [asdict(ratio) for ratio in ratios],
        "summary": summary,
        "reads": [asdict(read) for read in reads],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
