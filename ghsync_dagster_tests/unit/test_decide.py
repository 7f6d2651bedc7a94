"""What a worker does with one task's files, without Spark: what it holds a file for, and what it tells."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import platform
import shlex
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ghsync_dagster.batch import decide, read, unpack
from ghsync_dagster.batch.decide import (
    EVENTS,
    FAULT,
    PIECE,
    QUARANTINE,
    Piece,
    Tally,
    Task,
    _Progress,
    read_progress,
    write_task,
)
from ghsync_dagster.batch.files import scan_file
from ghsync_dagster.batch.search import find_files
from ghsync_dagster.batch.unpack import values_of
from ghsync_dagster.domain.errors import ConfigError

if TYPE_CHECKING:
    import io
    from collections.abc import Callable, Sequence


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """The folder that tasks write to."""
    for name in (EVENTS, QUARANTINE, "tasks"):
        (tmp_path / "out" / name).mkdir(parents=True)
    return tmp_path / "out"


def told_by(target: Path, number: int, *, host: str | None = None) -> dict[str, list[Any]]:
    """Run a task that has been written; return the names of its tallies by kind."""
    task = Task(str(target), (), "2030", host or platform.node())
    told: dict[str, list[Any]] = {}
    for batch in task.run(iter([pa.record_batch({"id": [number]})])):
        for row in batch.to_pylist():
            told.setdefault(row["kind"], []).append(row["name"])
    told[FAULT] = [msgspec.json.decode(fault) for fault in told.get(FAULT, [])]
    return told


def in_ranges(path: Path, target: Path, cuts: Sequence[int]) -> None:
    """Write a task for each range of a file."""
    (file,) = find_files([str(path)]).scan()
    for number, (start, end) in enumerate(pairwise([0, *cuts, file.size])):
        write_task(target, number, [Piece(0, file, start, end)])


def rewrite(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"octo", b"moby"))


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes().replace(b"octo", b"moby"))
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("change", [rewrite, replaced, os.utime])
def test_a_file_that_is_changed_at_the_same_size_between_two_ranges_is_one_error(
    tmp_path: Path, target: Path, event_line: Callable[..., str], change: Callable[[Path], None]
) -> None:
    path = tmp_path / "a.json"
    path.write_text("".join(event_line(number, "octo") + "\n" for number in range(1, 101)))
    # Of another time than now, whatever the ticks of the file system's clock.
    os.utime(path, ns=(10**18, 10**18))
    in_ranges(path, target, [path.stat().st_size // 2])
    assert told_by(target, 0)[FAULT] == []
    change(path)
    told = told_by(target, 1)
    assert EVENTS not in told
    ((kind, message, way_out),) = told[FAULT]
    assert (kind, str(path) in message, "changed while it was read" in message) == ("InputError", True, True)
    assert "at rest" in way_out


def test_a_file_that_is_changed_at_the_same_size_while_it_is_read_is_one_error(
    tmp_path: Path, target: Path, event_line: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    path.write_text("".join(event_line(number, "octo") + "\n" for number in range(1, 101)))
    os.utime(path, ns=(10**18, 10**18))
    in_ranges(path, target, [])

    def changing(parts: Any) -> Any:
        yield next(iter(parts)).split(b"\n")
        rewrite(path)

    monkeypatch.setattr("ghsync_dagster.batch.decide.lines_of", changing)
    ((_, message, _),) = told_by(target, 0)[FAULT]
    assert "changed while it was read" in message


def test_another_machine_need_not_agree_on_inode_and_change_of_attributes(
    tmp_path: Path, target: Path, event_line: Callable[..., str]
) -> None:
    path = tmp_path / "a.json"
    path.write_text(event_line(1) + "\n")
    os.utime(path, ns=(10**18, 10**18))
    in_ranges(path, target, [])
    path.chmod(0o600)
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(10**18, 10**18))
    copy.replace(path)
    assert len(told_by(target, 0)[FAULT]) == 1
    assert told_by(target, 0, host="another")[FAULT] == []
    rewrite(path)
    assert len(told_by(target, 0, host="another")[FAULT]) == 1


def test_a_bad_value_of_an_array_is_quarantined_and_a_lost_one_is_an_error(
    tmp_path: Path, target: Path, event_line: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    path.write_text(f"[{event_line(1)}, null,\n5, {event_line(2)}][{event_line(3)}]\0\0")
    (file,) = find_files([str(path)]).scan()
    write_task(target, 0, [Piece(0, file)])
    told = told_by(target, 0)
    assert pq.read_table(target / EVENTS / told[EVENTS][0]).num_rows == 3
    rows = pq.read_table(target / QUARANTINE / told[QUARANTINE][0]).to_pylist()
    assert [(row["line"], row["raw"]) for row in rows] == [(1, "null"), (2, "5"), (2, "\\x00\\x00")]

    monkeypatch.setattr("ghsync_dagster.batch.decide.values_of", lambda parts: list(values_of(parts))[1:])
    ((kind, message, _),) = told_by(target, 0)[FAULT]
    assert (kind, "bytes of JSON went in" in message) == ("PermanentError", True)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_how_far_a_task_is_can_be_read_before_it_ends(
    tmp_path: Path, target: Path, event_line: Callable[..., str], pack: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "a.json"
    # Bodies that do not pack, so that both forms come in several parts.
    path.write_bytes(pack(b"".join(b"%s\n" % os.urandom(2_000).hex().encode() for _ in range(2_000))))
    other = tmp_path / "b.json"
    other.write_text(event_line(1))
    found = find_files([str(path), str(other)]).scan()
    write_task(target, 0, [Piece(number, file) for number, file in enumerate(found)])
    seen: list[tuple[int, int]] = []

    class Watching(_Progress):
        def report(self, more: int) -> None:
            super().report(more)
            seen.append(read_progress(target))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(decide, "_Progress", Watching)
        told_by(target, 0)
    sizes = [file.size for file in found]
    assert seen == sorted(seen)
    assert any(files == 0 and 0 < size < sizes[0] for files, size in seen)
    assert (1, sizes[0]) in seen
    assert seen[-1] == (2, sum(sizes))


def read_whole(path: Path, target: Path) -> tuple[int, int, list[tuple[int, str]]]:
    """Read a file in one task; return how many lines and events it has, and the bad ones with their lines."""
    (file,) = find_files([str(path)]).scan()
    write_task(target, 0, [Piece(0, file)])
    task = Task(str(target), (), "2030", platform.node())
    tallies = [Tally(**row) for batch in task.run(iter([pa.record_batch({"id": [0]})])) for row in batch.to_pylist()]
    assert not [tally for tally in tallies if tally.kind == FAULT]
    assert sum(tally.bytes for tally in tallies) == file.size
    rows = {
        tally.kind: pq.read_table(target / tally.kind / tally.name) for tally in tallies if ".parquet" in tally.name
    }
    bad = [(row["line"], row["raw"]) for row in rows[QUARANTINE].to_pylist()] if QUARANTINE in rows else []
    return (
        sum(tally.rows for tally in tallies if tally.kind == PIECE),
        rows[EVENTS].num_rows if EVENTS in rows else 0,
        bad,
    )


def test_many_events_on_a_line_are_read_each_and_count_each(
    tmp_path: Path, target: Path, event_line: Callable[..., str]
) -> None:
    good = [event_line(number) for number in range(1, 1_001)]
    path = tmp_path / "a.json"
    lines = [*good[:300], "".join(good), f"[{','.join(good)}]", f"\ufeff[{', '.join(good)}]\r", "hello", good[0]]
    path.write_text("\n".join(lines) + "\n")
    assert read_whole(path, target) == (3_302, 3_301, [(304, "hello")])
    # Each bad one among them is one, and no good one is lost by it.
    bad = good[1].replace('"type"', '"type')
    path.write_text("\n".join([*good[:2], good[0] + bad + good[2] + good[3][:50], f"[5, {good[4]}]", good[5] + ","]))
    lines_read, events, quarantined = read_whole(path, target)
    assert (lines_read, events) == (9, 5)
    assert quarantined == [(3, bad), (3, good[3][:50]), (4, "5"), (5, good[5] + ",")]
    path.write_text("\r".join(good))
    assert read_whole(path, target) == (1_000, 1_000, [])


def test_a_torn_event_costs_no_good_one_beside_it(tmp_path: Path, target: Path, event_line: Callable[..., str]) -> None:
    good = event_line(2)
    path = tmp_path / "a.json"
    for end in range(1, len(good), 3):
        path.write_text(f"{event_line(1)}\n{good[:end]}{good}\n{event_line(3)}\n")
        lines_read, events, quarantined = read_whole(path, target)
        assert lines_read == events + len(quarantined)
        assert (events, len(quarantined)) == (3, 1), good[:end]


def test_the_lines_of_later_ranges_are_counted_by_their_ends(
    tmp_path: Path, target: Path, event_line: Callable[..., str]
) -> None:
    path = tmp_path / "a.json"
    first = f"{event_line(1)}{event_line(2)}\n" * 10
    path.write_text(first + "bad\n")
    in_ranges(path, target, [len(first)])
    told = [told_by(target, number)[PIECE] for number in (0, 1)]
    size = path.stat().st_size
    assert told == [["0 0", f"0 {size}"], [f"0 {len(first)}"]]


def test_a_line_that_holds_events_is_one_line_whether_it_is_refused_or_accepted(
    tmp_path: Path, target: Path, event_line: Callable[..., str]
) -> None:
    inner = ",".join(event_line(number) for number in (77, 78))
    good = event_line(1).removesuffix("}") + f', "payload": {{"old": [{inner}]}}}}'
    at = json.loads(good)["created_at"]
    path = tmp_path / "a.json"
    for bad in (
        good.replace(at, "9999-01-01T00:00:00Z", 1),
        good.replace('"old"', '"x": 6" disk, "old"'),
        good[: good.index(inner) + 20],
        good[:-1],
        good[:-3],
    ):
        for lines in ([event_line(2), bad, event_line(3)], [event_line(2), bad], [event_line(2), good, bad]):
            path.write_text("\n".join(lines))
            assert read_whole(path, target) == (len(lines), len(lines) - 1, [(lines.index(bad) + 1, bad)])


HIDDEN: dict[str, Callable[[Sequence[str]], str]] = {
    "wrapped": lambda events: f'{{"events":[{",".join(events)}]}}\n',
    "wrapped among lines": lambda events: f'{events[0]}\n{{"events":[{",".join(events[1:])}]}}\n',
    "wrapped, an event a line": lambda events: '{"events": [\n' + ",\n".join(events) + "\n]}\n",
    "wrapped, an event a line, longer than a block": lambda events: (
        '{"events": [\n' + ",\n".join([*events, json.dumps({"x": ["y" * 50] * 50_000})]) + "\n]}\n"
    ),
    "wrapped, the first on its line": lambda events: '{"n": 3, "events": [' + ",\n".join(events) + "]}",
    "wrapped, commas first": lambda events: '{"events":\n[\n' + "\n,".join(events) + "\n]\n}\n",
    "wrapped, pretty": lambda events: json.dumps({"events": [json.loads(event) for event in events]}, indent=1),
    "arrays in an array": lambda events: f"[[{','.join(events)}]]",
    "inside an event": lambda events: f'[{events[0][:-1]},"x":[{events[1]},{events[2]}]}}]',
}
PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "zstd": lambda text: bytes(pa.compress(text, "zstd", asbytes=True)),
    "UTF-16": lambda text: text.decode().encode("utf-16"),
}


def follow(way_out: str) -> Path:
    """Run the command of a way out; return the file that it makes."""
    command = way_out.removeprefix("Make each event a line: ").partition(" ; then name")[0]
    for tool in ("jq", "zstd"):
        if f"{tool} " in command and not shutil.which(tool):
            pytest.skip(f"no {tool}")
    subprocess.run(["bash", "-ec", command], check=True, timeout=60)
    return Path(shlex.split(command)[-1])


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", HIDDEN)
def test_events_inside_another_value_are_one_error_with_a_way_out(
    tmp_path: Path, target: Path, event_line: Callable[..., str], kind: str, packing: str
) -> None:
    path = tmp_path / "it's.json"
    path.write_bytes(PACKINGS[packing](HIDDEN[kind]([event_line(number) for number in (1, 2, 3)]).encode()))
    (file,) = find_files([str(path)]).scan()
    write_task(target, 0, [Piece(0, file)])
    told = told_by(target, 0)
    ((kind, message, way_out),) = told[FAULT]
    assert (kind, QUARANTINE in told) == ("InputError", False)
    assert f"{path}: what begins at line " in message
    assert read_whole(follow(way_out), target) == (3, 3, [])


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_value_of_an_array_that_is_too_long_is_one_error_with_a_way_out(
    tmp_path: Path, target: Path, event_line: Callable[..., str], monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    monkeypatch.setattr(unpack, "_LONGEST_VALUE", 2 << 20)
    path = tmp_path / "a.json"
    text = f"[{event_line(1)},\n{event_line(2, payload=os.urandom(2 << 20).hex())},\n{event_line(3)}]"
    path.write_bytes(PACKINGS[packing](text.encode()))
    (file,) = find_files([str(path)]).scan()
    write_task(target, 0, [Piece(0, file)])
    ((_, message, way_out),) = told_by(target, 0)[FAULT]
    assert message == f"{path}: what begins at line 2 does not end within 2 MiB."
    assert read_whole(follow(way_out), target) == (3, 3, [])


def full_part(target: Path) -> None:
    """Have the part of events lie on a device that is full."""
    (target / EVENTS / ".part-00000-0.parquet").symlink_to("/dev/full")


def no_folder(target: Path) -> None:
    shutil.rmtree(target / EVENTS)


def no_task(target: Path) -> None:
    """Be an executor that does not share the home."""
    (target / "tasks" / "00000.json").unlink()


@pytest.mark.parametrize("rows", [1, 50])
@pytest.mark.parametrize("fault", [full_part, no_folder, no_task])
def test_a_home_that_can_not_be_used_is_no_fault_of_an_input_file(
    tmp_path: Path,
    target: Path,
    event_line: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    fault: Callable[[Path], None],
) -> None:
    # In the midst of a file, or at the end of the part.
    monkeypatch.setattr("ghsync_dagster.batch.decide._ROW_GROUP", rows)
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in paths:
        path.write_text("".join(event_line(number) + "\n" for number in range(1, 10)))
    found = find_files([str(path) for path in paths]).scan()
    write_task(target, 0, [Piece(number, file) for number, file in enumerate(found)])
    fault(target)
    ((kind, message, way_out),) = told_by(target, 0)[FAULT]
    assert kind == "ConfigError"
    assert message.startswith(f"{target}")
    assert "can't be used (No " in message
    assert "GHSYNC_HOME" in way_out
    assert "Detail" not in message
    with pytest.raises(ConfigError, match="can't be used"):
        read._raise_faults([msgspec.json.encode(told).decode() for told in told_by(target, 0)[FAULT]])


def test_a_task_that_can_not_be_written_is_the_same_error(target: Path) -> None:
    (target / "tasks" / "00000.json").symlink_to("/dev/full")
    with pytest.raises(ConfigError, match=r"can't be used \(No space left on device\)"):
        write_task(target, 0, [])


def test_a_long_search_and_a_long_look_are_told(
    tmp_path: Path, event_line: Callable[..., str], logged: Callable[..., io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = logged(GHSYNC_LOG_FORMAT="json")
    (tmp_path / "a.json").write_text(event_line(1))
    monkeypatch.setattr(read, "_PROGRESS_SECONDS", 0.001)

    def told(what: str) -> list[dict[str, Any]]:
        return [line for line in map(json.loads, stream.getvalue().splitlines()) if line["event"] == f"still {what}"]

    def slow(what: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            while not told(what):
                os.sched_yield()
            return work(*arguments)

        return run

    def no_session() -> Any:
        raise InterruptedError

    monkeypatch.setattr(read, "find_files", slow("looking for files", find_files))
    monkeypatch.setattr("ghsync_dagster.batch.search.scan_file", slow("scanning files", scan_file))
    with pytest.raises(InterruptedError):
        read.read_events(no_session, [str(tmp_path)], tmp_path / "out", ())
    assert told("scanning files")[0]["files"] == 0
