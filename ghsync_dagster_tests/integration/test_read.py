"""Reading by real Spark, against the same decision in plain Python: no line lost, doubled or misnumbered."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from py4j.protocol import Py4JNetworkError

from ghsync_dagster import folders
from ghsync_dagster.batch import read
from ghsync_dagster.batch.reports import LeftOut, ReadReport
from ghsync_dagster.defs.batch import metadata
from ghsync_dagster.domain.errors import ConfigError, InputError, PermanentError
from ghsync_dagster.domain.event import RAW_LIMIT, Event, Refused, event_decoder
from ghsync_dagster.domain.user import BUILT_IN_RULES, Rule
from ghsync_dagster.settings import load_settings
from ghsync_dagster.stores.spark import to_arrow
from ghsync_dagster.wiring import batch_flow
from ghsync_dagster_tests.support.cdc_parts import until
from ghsync_dagster_tests.support.odd_lines import GOOD, KINDS

if TYPE_CHECKING:
    import io
    from collections.abc import Callable, Iterator, Sequence

    from pyspark.sql import DataFrame

    from ghsync_dagster.batch.flow import BatchFlow
    from ghsync_dagster.stores.spark import SparkHandle

pytestmark = [pytest.mark.integration, pytest.mark.servers("spark")]

Quarantined = tuple[str, int, str, str]
"""File, line number, reason, raw text."""


@pytest.fixture
def read_files(spark: SparkHandle, tmp_path: Path) -> Callable[..., ReadReport]:
    """Return a function that reads paths into a folder of the test's own."""

    def run(*paths: Path, rules: Sequence[Rule] = BUILT_IN_RULES) -> ReadReport:
        target = tmp_path / "out"
        target.mkdir()
        return read.read_events(spark.session, [str(path) for path in paths], target, rules)

    return run


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "_largest_piece", lambda *_: 4096)


def plain_python(*paths: Path) -> tuple[Counter[Event], list[Quarantined], int]:
    """Return what reading the files must give: events, quarantined lines, and the number of blank lines."""
    decide = event_decoder(BUILT_IN_RULES, "2030")
    events: Counter[Event] = Counter()
    quarantined: list[Quarantined] = []
    blank = 0
    for path in paths:
        content = unpack(path.read_bytes())
        lines = content.split(b"\n")
        numbered = enumerate(lines[: -1 if lines[-1] == b"" else None], start=1)
        for number, line in ((number, value) for number, whole in numbered for value in values_of_line(whole)):
            outcome = decide(line)
            if isinstance(outcome, Event):
                events[outcome] += 1
            elif isinstance(outcome, Refused):
                quarantined.append((str(path), number, outcome.reason, raw_of(line)))
            else:
                blank += 1
    return events, sorted(quarantined), blank


def values_of_line(line: bytes) -> list[bytes]:
    """Return the objects of a line that holds whole ones only, in an array or several; else the line."""
    values: list[bytes] = []
    rest = line.decode("latin-1").strip("[], \t\r")
    try:
        while rest:
            end = json.JSONDecoder().raw_decode(rest)[1]
            values.append(rest[:end].encode("latin-1"))
            rest = rest[end:].lstrip(", \t\r")
    except (ValueError, RecursionError):
        return [line]
    is_several = len(values) > (not line.startswith(b"[")) and all(value.startswith(b"{") for value in values)
    return values if is_several else [line]


def unpack(content: bytes) -> bytes:
    if content.startswith(b"\x1f\x8b"):
        return unpack(gzip.decompress(content))
    if content.startswith(b"BZh"):
        return bz2.decompress(content)
    if content.startswith(b"\x28\xb5\x2f\xfd"):
        return bytes(pa.CompressedInputStream(pa.py_buffer(content), "zstd").read())
    return content.decode("utf-16").encode() if content.startswith(b"\xff\xfe") else content


def zstd(content: bytes) -> bytes:
    return bytes(pa.compress(content, "zstd", asbytes=True))


def raw_of(line: bytes) -> str:
    text = line.decode("utf-8", "backslashreplace").replace("\0", "\\x00")
    return text if len(text) <= RAW_LIMIT else f"{text[:RAW_LIMIT]}... ({len(line)} bytes)"


def events_in(report: ReadReport) -> Counter[Event]:
    if report.events == 0:
        return Counter()
    names = ["id", "type", "created_at", "actor", "repo"]
    rows = pq.read_table(report.events_path, columns=names, partitioning=None).to_pylist()
    return Counter(msgspec.convert(row, Event) for row in rows)


def quarantine_in(report: ReadReport) -> list[Quarantined]:
    rows: list[dict[str, Any]] = pq.read_table(report.quarantine_path).to_pylist()
    return sorted((row["file"], row["line"], row["reason"], row["raw"]) for row in rows)


def assert_as_plain_python(report: ReadReport, *paths: Path) -> None:
    events, quarantined, blank = plain_python(*paths)
    assert quarantine_in(report) == quarantined
    assert events_in(report) == events
    assert (report.events, report.quarantined, report.blank) == (events.total(), len(quarantined), blank)
    assert report.lines == report.events + report.quarantined + report.blank
    assert sum(file.lines for file in report.files) == report.lines
    assert sum(report.reasons.values()) == report.quarantined


def mixed(make: Callable[..., str], lines: int, seed: int) -> list[bytes]:
    """Return lines of all kinds and very different lengths, some of many kilobytes."""
    draw = random.Random(seed)  # noqa: S311  a reproducible mix, no secret
    kinds: list[Callable[[int], bytes]] = [
        *[lambda n: make(n + 1, number=n, payload={"x": "y" * draw.randrange(600)}).encode()] * 12,
        lambda n: make(n + 1, number=n, payload={"x": "é" * draw.randrange(12_000)}).encode(),
        lambda _: b"",
        lambda _: b" \t",
        lambda n: b"bad line %d" % n,
        lambda n: b"bad and long %d " % n + b"z" * draw.randrange(15_000),
        lambda n: make(n + 1, number=n, actor_login=None).encode(),
        lambda n: make(-n, number=n).encode(),
        lambda n: make(n + 1, number=n).encode()[:-7],
        lambda n: make(n + 1, number=n).encode().replace(b"octo", b"oct\xff", 1),
        lambda n: make(n + 1, number=n).encode().replace(b"octo", b"o\x00", 1),
        lambda n: make(n + 1, number=n).encode() + b"\r" + make(n + 1, number=n).encode(),
    ]
    return [draw.choice(kinds)(number) for number in range(lines)]


def test_every_odd_kind_of_line_has_its_outcome_through_spark(
    tmp_path: Path, read_files: Callable[..., ReadReport]
) -> None:
    path = tmp_path / "odd.json"
    # A line's end is no part of it, and a byte order mark counts at the start of a file only.
    odd = [kind for kind in KINDS if b"\n" not in kind.line and not kind.line.startswith(b"\xef\xbb\xbf")]
    path.write_bytes(b"\n".join(line for kind in odd for line in (kind.line, GOOD)) + b"\n")
    report = read_files(path)
    refused = {
        2 * place + 1: kind.outcome
        for place, kind in enumerate(odd)
        if isinstance(kind.outcome, str) and values_of_line(kind.line) == [kind.line]
    }
    found = {number: reason for _, number, reason, _ in quarantine_in(report)}
    assert found.keys() == refused.keys()
    assert [
        words for number, words in refused.items() if not found[number].startswith(words.partition("{at}")[0])
    ] == []
    assert len(refused) >= 33
    assert_as_plain_python(report, path)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("last", [True, False], ids=["new line at the end", "none"])
def test_a_file_in_many_blocks_reads_as_in_plain_python(
    tmp_path: Path, event_line: Callable[..., str], read_files: Callable[..., ReadReport], end: bytes, last: bool
) -> None:
    path = tmp_path / "in.json"
    lines = [*mixed(event_line, 200, seed=len(end) * 2 + last), b"bad last line"]
    path.write_bytes(end.join(lines) + (end if last else b""))
    assert path.stat().st_size > 20 * 4096
    assert_as_plain_python(read_files(path), path)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_a_line_that_ends_at_a_block_border_is_read_once(
    tmp_path: Path, read_files: Callable[..., ReadReport], shift: int
) -> None:
    path = tmp_path / "in.json"
    # Every line but the first has 128 bytes, so that line ends fall on the borders, one byte before, or one after.
    path.write_bytes(b"x" * (127 + shift) + b"\n" + b"".join(b"%0127d\n" % number for number in range(320)))
    report = read_files(path)
    assert [line for _, line, _, _ in quarantine_in(report)] == list(range(1, 322))
    assert_as_plain_python(report, path)


@pytest.mark.usefixtures("small_pieces")
def test_several_files_of_every_form_read_as_in_plain_python(
    tmp_path: Path, event_line: Callable[..., str], read_files: Callable[..., ReadReport]
) -> None:
    folder = tmp_path / "in [1] %20"
    folder.mkdir()
    packings: dict[str, Callable[[bytes], bytes]] = {
        "a b.json": bytes,
        "[x]{y}*.jsonl": bytes,
        "100%20.NDJSON": bytes,
        "ünï🙂.json": bytes,
        "a#b?c.json": bytes,
        "it's \\ odd:.json": bytes,
        "packed é.json.gz": gzip.compress,
        "_day=2015-01-01/part-00000": gzip.compress,
        "x.json.gzip": bz2.compress,
        "x.json.ZST": zstd,
        "two frames.json": lambda content: zstd(content[:5_000]) + zstd(content[5_000:]),
        "two streams.json.bz2": lambda content: bz2.compress(content[:5_000]) + bz2.compress(content[5_000:]),
        "many members.json.gz": lambda content: (
            b"".join(gzip.compress(content[at : at + 100]) for at in range(0, len(content), 100)) + bytes(100_000)
        ),
    }
    paths = [folder / name for name in packings]
    for seed, (path, pack) in enumerate(zip(paths, packings.values(), strict=True)):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pack(b"\n".join([GOOD, *mixed(event_line, 30, seed=seed)])))
    utf16 = "\n".join([event_line(1, "wide", payload="ü🙂"), "bad ü", "", event_line(2)])
    (folder / "utf16.json").write_bytes(utf16.encode("utf-16"))
    (folder / "utf16.json.gz").write_bytes(gzip.compress(utf16.encode("utf-16")))
    two = folder / "two members.jsonl.gz"
    two.write_bytes(gzip.compress(b"bad 1\nbad") + gzip.compress(b" 2\n\n" + event_line().encode()))
    (folder / "mark.json").write_bytes(b"\xef\xbb\xbf" + event_line().encode() + b"\nbad\n")
    everything = sorted((path for path in folder.rglob("*") if path.is_file()), key=str)
    (folder / "empty.json").write_bytes(b"")
    (folder / "empty.json.gz").write_bytes(gzip.compress(b""))
    (folder / "notes.txt").write_bytes(b"")
    report = read_files(folder, paths[0])
    assert {entry.reason.split()[0]: entry.files for entry in report.left_out} == {"empty": 2, "the": 1}
    assert metadata.of_events(report)["files_left_out"] == 3
    assert "notes.txt" in str(metadata.of_events(report)["left_out"].records)
    assert report.bytes == sum(path.stat().st_size for path in everything)
    assert [file.path for file in report.files] == [str(path) for path in everything]
    marked = folder / "mark.json"
    assert_as_plain_python(report, *everything)
    assert (str(marked), 2) in {(file, line) for file, line, _, _ in quarantine_in(report)}


def test_usual_blocks_read_the_sample_whole(read_files: Callable[..., ReadReport]) -> None:
    path = Path(__file__).parents[2] / "data" / "sample_data.json"
    report = read_files(path)
    assert (report.lines, report.events, report.quarantined, report.blank) == (28_600, 28_600, 0, 0)
    assert report.quarantined_ratio == 0


def test_the_raw_text_of_a_long_bad_line_is_capped(tmp_path: Path, read_files: Callable[..., ReadReport]) -> None:
    path = tmp_path / "in.json"
    path.write_bytes(b"\n" + b"x" * RAW_LIMIT + b"\n" + b"y" * 3_000_000 + b"\n")
    (_, second, _, whole), (_, third, _, capped) = quarantine_in(read_files(path))
    assert (second, whole) == (2, "x" * RAW_LIMIT)
    assert (third, capped) == (3, "y" * RAW_LIMIT + "... (3000000 bytes)")


def test_reasons_are_counted_by_kind(
    tmp_path: Path, event_line: Callable[..., str], read_files: Callable[..., ReadReport]
) -> None:
    path = tmp_path / "in.json"
    path.write_text("\n".join([event_line(-1), event_line(-2), event_line(), "5", event_line(1, "ö"), ""]))
    report = read_files(path)
    assert report.quarantined_ratio == pytest.approx(0.8)
    assert next(iter(report.reasons.items())) == ("actor.id must be greater than 0", 2)
    assert sorted(report.reasons.values()) == [1, 1, 2]


def test_a_projects_rule_gates_the_lines(
    tmp_path: Path, event_line: Callable[..., str], read_files: Callable[..., ReadReport]
) -> None:
    path = tmp_path / "in.json"
    path.write_text(event_line(1, "root") + "\n" + event_line(2, "octo"))
    rule = Rule("no_root", "login", "login must not be root", holds=lambda login: login != "root")
    report = read_files(path, rules=[*BUILT_IN_RULES, rule])
    assert quarantine_in(report)[0][1:3] == (1, 'login must not be root, got "root" (no_root)')
    assert report.events == 1


def test_a_rule_that_fails_is_named(
    tmp_path: Path, event_line: Callable[..., str], read_files: Callable[..., ReadReport]
) -> None:
    path = tmp_path / "in.json"
    path.write_text(event_line(1, "octo"))
    rule = Rule("tenth_letter", "login", "the tenth letter must be o", holds=lambda login: login[9] == "o")
    with pytest.raises(PermanentError, match="Rule tenth_letter fails on a login of 4 characters"):
        read_files(path, rules=[rule])


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_arrays_and_objects_over_several_lines_are_read(
    tmp_path: Path,
    event_line: Callable[..., str],
    read_files: Callable[..., ReadReport],
    indent: int | None,
    pack: Callable[[bytes], bytes],
) -> None:
    events = [json.loads(event_line(number, number=number, payload={"x": '}]"\\{'})) for number in range(1, 2_001)]
    events[500]["actor"]["id"] = "bad"
    text = json.dumps(events, indent=indent)
    (tmp_path / "array.json").write_bytes(pack(text.encode()))
    (tmp_path / "utf16.json").write_bytes(pack(text.encode("utf-16")))
    (tmp_path / "objects.json").write_bytes(pack("\n".join(json.dumps(e, indent=indent or 2) for e in events).encode()))
    report = read_files(tmp_path)
    assert (report.lines, report.events, report.quarantined, report.blank) == (6_000, 5_997, 3, 0)
    assert [file.lines for file in report.files] == [2_000] * 3
    assert set(events_in(report).values()) == {3}
    for path, line, reason, raw in quarantine_in(report):
        assert reason == "actor.id: expected a whole number, got a string"
        assert json.loads(raw) == events[500]
        content = unpack(Path(path).read_bytes())
        before, found, _ = b"".join(content.splitlines(keepends=True)[line - 1 :]).partition(raw.encode())
        assert found
        assert b"\n" not in before


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda text: gzip.compress(text)[:-20],
    "gzip with junk": lambda text: gzip.compress(text) + b"junk",
    "bzip2": lambda text: bz2.compress(text)[:-20],
    "bzip2 broken": lambda text: bz2.compress(text)[:-200] + bytes(200),
    "zstd": lambda text: zstd(text)[:-20],
    "UTF-16": lambda text: text.decode().encode("utf-16")[:-1],
    "array": lambda text: b"[" + b",".join(text.splitlines()),
    "second array": lambda text: b"[" + b",".join(text.splitlines()) + b"][",
}


def test_files_that_are_damaged_beyond_their_heads_are_named_and_nothing_is_published(
    tmp_path: Path, event_line: Callable[..., str], flow: BatchFlow
) -> None:
    draw = random.Random(1)  # noqa: S311  what can't be packed, no secret
    lines = [event_line(n, number=n, payload=draw.randbytes(300).hex()) for n in range(1, 1_001)]
    text = "\n".join(lines).encode() + b"\n"
    (tmp_path / "in").mkdir()
    good = tmp_path / "in" / "good.json"
    good.write_bytes(text)
    before = flow.read([str(good)])
    for kind, damage in BROKEN.items():
        (tmp_path / "in" / f"{kind}.json").write_bytes(damage(text))
        with pytest.raises(InputError, match=f"/in/{kind}.json is damaged: ") as caught:
            flow.read([str(good), str(tmp_path / "in" / f"{kind}.json")])
        assert "Get the file again" in caught.value.way_out
    # The first block of bzip2 is all of it, so that the look sees them.
    for kind in ("bzip2", "bzip2 broken"):
        (tmp_path / "in" / f"{kind}.json").unlink()
    with pytest.raises(InputError, match="6 files can't be read: ") as caught:
        flow.read([str(tmp_path / "in")])
    assert caught.value.message.count(" is damaged: ") == 5
    assert caught.value.message.endswith("And 1 more.")
    assert flow.artifacts.newest(ReadReport) == before


def test_what_a_run_keeps_is_no_input_of_the_next_one(
    tmp_path: Path, event_line: Callable[..., str], flow: BatchFlow
) -> None:
    (tmp_path / "a.json").write_text(event_line())
    at_home = replace(flow, home=tmp_path)
    for _ in range(2):
        report = at_home.read([str(tmp_path)])
        assert [file.path for file in report.files] == [str(tmp_path / "a.json")]
    assert report.left_out == [LeftOut("ghsync's own state", 1, [f"{tmp_path}/batch/"])]
    assert batch_flow(load_settings(GHSYNC_HOME=tmp_path)).home == tmp_path


def test_a_damaged_small_file_is_refused_before_spark_is_asked(tmp_path: Path, event_line: Callable[..., str]) -> None:
    good, bad = tmp_path / "a.json", tmp_path / "b.json.gz"
    good.write_text(event_line())
    bad.write_bytes(gzip.compress(event_line().encode() * 50)[:-9])

    def no_session() -> Any:
        pytest.fail("Spark was started")

    with pytest.raises(InputError, match=r"b\.json\.gz is damaged"):
        read.read_events(no_session, [str(good), str(bad)], tmp_path / "out", BUILT_IN_RULES)


@pytest.mark.parametrize("change", ["grows", "shrinks", "goes", "is rewritten"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_file_that_changes_meanwhile_is_one_error_that_names_it(
    tmp_path: Path, event_line: Callable[..., str], spark: SparkHandle, change: str, pack: Callable[[bytes], bytes]
) -> None:
    path, target = tmp_path / "in.json", tmp_path / "out"
    path.write_bytes(pack(event_line(1).encode() + b"\n"))
    # Of another time than now, whatever the ticks of the file system's clock.
    os.utime(path, ns=(10**18, 10**18))
    target.mkdir()

    def change_and_start() -> Any:
        if change == "goes":
            path.unlink()
        elif change == "is rewritten":
            size = path.stat().st_size
            path.write_bytes(path.read_bytes())
            assert path.stat().st_size == size
        else:
            path.write_bytes(pack((event_line(2) + "\n").encode() * (2 if change == "grows" else 0)))
        return spark.session()

    with pytest.raises(
        InputError, match=r"in\.json (changed while it was read: |can't be read .No such file)"
    ) as caught:
        read.read_events(change_and_start, [str(path)], target, BUILT_IN_RULES)
    assert "at rest" in caught.value.way_out or "executors" in caught.value.way_out


def test_a_disk_without_room_for_the_files_is_told_before_spark_starts(
    tmp_path: Path, event_line: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "in.json"
    path.write_text(f"{event_line()}\n" * 9_000)
    # A disk of the right size can't be had without root.
    usage = shutil.disk_usage(tmp_path)._replace(free=folders.ROOM + path.stat().st_size // 2 - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ConfigError, match="MiB free, and at least"):
        read.read_events(lambda: pytest.fail("Spark was asked for"), [str(path)], tmp_path / "out", BUILT_IN_RULES)


def test_progress_is_logged_with_files_megabytes_and_seconds_left(
    tmp_path: Path,
    event_line: Callable[..., str],
    read_files: Callable[..., ReadReport],
    logged: Callable[..., io.StringIO],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(read, "_PROGRESS_SECONDS", 0.01)
    monkeypatch.setattr(read, "_largest_piece", lambda *_: 1_000_000)
    stream = logged(GHSYNC_LOG_FORMAT="json")
    for number in range(6):
        (tmp_path / f"{number}.json").write_text((event_line(number + 1) + "\n") * 3_000)
    report = read_files(tmp_path)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    progress = [line for line in lines if line["event"] == "still reading" and "seconds_left" in line]
    assert progress
    size = report.bytes >> 20
    for line in progress:
        done, _, total = line["files"].partition(" of ")
        assert (0 <= int(done) <= 6, total) == (True, "6")
        assert line["megabytes"].endswith(f" of {size}")
        assert line["seconds_left"] >= 0


def test_a_signal_cancels_the_job_that_is_waited_for(spark: SparkHandle) -> None:
    session = spark.session()
    tracker = session.sparkContext.statusTracker()

    def ask_to_end() -> None:
        until(lambda: bool(tracker.getActiveJobsIds()), 60)
        os.kill(os.getpid(), signal.SIGUSR1)

    def end(*_: object) -> None:
        raise SystemExit(143)

    def for_ever(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            time.sleep(600)
            yield batch

    frame = session.range(1).mapInArrow(for_ever, "id long")
    before = signal.signal(signal.SIGUSR1, end)
    asking = threading.Thread(target=ask_to_end)
    asking.start()
    try:
        with pytest.raises(SystemExit):
            to_arrow(frame)
    finally:
        asking.join()
        signal.signal(signal.SIGUSR1, before)
    # Spark's own list of jobs comes after.
    until(lambda: not tracker.getActiveJobsIds(), 30)


def test_a_signal_stays_what_is_told_where_it_ended_the_jvm_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ghsync_dagster.stores.spark._CANCEL_SECONDS", 0.0)
    waited_for = threading.Event()

    class Gone:
        """A frame whose JVM is gone once the signal has come."""

        def toArrow(self) -> None:  # noqa: N802
            os.kill(os.getpid(), signal.SIGUSR1)
            waited_for.wait()

        @property
        def sparkSession(self) -> Any:  # noqa: N802
            raise Py4JNetworkError("planted")

    def end(*_: object) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGUSR1, end)
    try:
        with pytest.raises(SystemExit) as caught:
            to_arrow(cast("DataFrame", Gone()))
    finally:
        signal.signal(signal.SIGUSR1, before)
        waited_for.set()
    assert caught.value.code == 143
