"""Which files are read, and the look at their heads: folder, glob and list agree, and every refusal has a way out."""

from __future__ import annotations

import bz2
import contextlib
import errno
import glob
import gzip
import io
import json
import lzma
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ghsync_dagster.batch.files import InputFile, scan_file
from ghsync_dagster.batch.search import OWN_FOLDERS, find_files
from ghsync_dagster.batch.unpack import unpacked
from ghsync_dagster.batch.versions import FileState, state_of
from ghsync_dagster.dagster_home import ensure_dagster_home
from ghsync_dagster.domain.errors import InputError
from ghsync_dagster.domain.event import Event, event_decoder
from ghsync_dagster.domain.user import BUILT_IN_RULES
from ghsync_dagster.local.stack import SERVICES
from ghsync_dagster.settings import load_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PACKAGE = Path(__file__).parents[2] / "ghsync_dagster"
LINE = b'{"id":"1","actor":{"id":1,"login":"octo"}}'
LINES = LINE + b"\n" + LINE + b"\n"


def gzipped(content: bytes) -> bytes:
    """Return gzip data that is the same each time, as names of tests are made of it."""
    return gzip.compress(content, mtime=0)


GZIP = gzipped(LINES * 200)
EVENTS = [json.loads(LINE)] * 3


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def found_in(folder: Path, *specs: str, home: Path | None = None) -> list[str]:
    """Return the files that are read, relative to a folder."""
    return [os.path.relpath(path, folder) for path in find_files(specs, home).files]


def left_out_of(folder: Path, *specs: str, home: Path | None = None) -> dict[str, list[str]]:
    """Return what is left out, by the first word of its reason."""
    report = find_files(specs, home).report()
    assert all(entry.files == len(entry.names) for entry in report)
    return {
        entry.reason.split()[0].strip(":"): [name.removeprefix(f"{folder}/") for name in entry.names]
        for entry in report
    }


def look(path: Path) -> InputFile:
    seen = scan_file(state_of(str(path), path.stat()))
    assert seen is not None
    return seen


# Which files


def test_a_file_is_found_as_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.json", LINES)
    monkeypatch.chdir(tmp_path)
    assert find_files(["a.json"]).state.files == (state_of(str(path), path.stat()),)


READ = ["_day=1/i.json", "a.json", "b.ndjson", "c.JSON", "d.json.gzip", "d/e/f/g.jsonl.GZ", "f.json.zst", "k.json.bz2"]
READ += ["day=2/part-00000-ab12.c000.json.gz", "part-00000", "part-00001-c000.txt"]
OTHERS = {
    "hidden": [".git/", ".h.json", "_SUCCESS", "_g.json", "_metadata", "_temporary/"],
    "the": ["e.json.gz.1", "j.txt", "part-0.snappy.parquet", "x.json.part"],
    "empty": ["z.json"],
}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder with names of all kinds."""
    folder = tmp_path / "in"
    for name in (*READ, *OTHERS["hidden"], *OTHERS["the"]):
        write(folder / name / "x.json" if name.endswith("/") else folder / name, LINES)
    write(folder / "z.json", b"")
    return folder


@pytest.mark.parametrize("way", ["folder", "slash", "glob", "deep glob", "list", "twice", "link"])
def test_folder_glob_and_list_read_and_leave_out_the_very_same(mixed: Path, way: str) -> None:
    link = mixed.parent / "link"
    link.symlink_to(mixed)
    specs = {
        "folder": [str(mixed)],
        "slash": [f"{mixed}/"],
        "glob": [f"{mixed}/*"],
        "deep glob": [f"{mixed}/**"],
        # As a shell gives it, hidden names too.
        "list": [str(path) for path in mixed.iterdir() if path.name not in (".git", "_temporary")],
        "twice": [f"{mixed}/*", str(mixed), str(mixed / "a.json")],
        "link": [str(link)],
    }[way]
    assert found_in(mixed, *specs) == sorted(READ)
    left_out = {
        name: [path.removeprefix(f"{link}/") for path in paths] for name, paths in left_out_of(mixed, *specs).items()
    }
    if way == "list":
        left_out["hidden"] = sorted([*left_out["hidden"], ".git/", "_temporary/"])
    assert left_out == OTHERS


def test_what_is_left_out_is_counted_whole_and_named_in_part(tmp_path: Path) -> None:
    write(tmp_path / "a.json", LINES)
    for number in range(30):
        write(tmp_path / f"{number:02d}.txt", LINES)
    (entry,) = find_files([str(tmp_path)]).report()
    assert (entry.files, entry.names) == (30, [f"{tmp_path}/{number:02d}.txt" for number in range(20)])


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("*.json", ["1.json", "2.json"]),
        ("?.json*", ["1.json", "2.json", "3.json.gz"]),
        ("[12].json", ["1.json", "2.json"]),
        ("**/*.jsonl", ["a/4.jsonl", "a/b/5.jsonl"]),
    ],
)
def test_a_glob_gives_the_files_that_match(tmp_path: Path, pattern: str, wanted: list[str]) -> None:
    for name in ("1.json", "2.json", "3.json.gz", "a/4.jsonl", "a/b/5.jsonl", ".x/6.jsonl"):
        write(tmp_path / name, LINES)
    (tmp_path / "9.json").mkdir()
    assert found_in(tmp_path, f"{tmp_path}/{pattern}") == wanted


PATTERNS = ["*", "**", "*/*", "**/*.json", "a/**/*.json", "*/b/*", "**/b/**/c/*", "**/**/c", "a*/[!b]*", "**/?.json"]
PATTERNS += ["*.json/*", "**/b", "a/b/**", "*a*"]


@pytest.mark.parametrize("pattern", [*PATTERNS, "**/c/*.json", "a/*/c/4.json", "b/**/b/*"])
def test_a_glob_matches_what_pythons_own_does(tmp_path: Path, pattern: str) -> None:
    for name in (
        "1.json",
        "a/2.json",
        "a/b/3.json",
        "a/b/c/4.json",
        "b/5.json",
        "ab/c/6.json",
        "d.json/7.json",
        "b/b/c/8.json",
    ):
        write(tmp_path / name, LINES)
    matches = [Path(path) for path in glob.glob(f"{tmp_path}/{pattern}", recursive=True)]  # noqa: PTH207  the peer
    wanted = {file for path in matches for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()}
    assert found_in(tmp_path, f"{tmp_path}/{pattern}") == sorted(str(path.relative_to(tmp_path)) for path in wanted)


def test_folders_behind_links_and_those_that_a_glob_matches_are_searched_once(tmp_path: Path) -> None:
    for name in ("in/1.json", "elsewhere/2.json", "elsewhere/deep/3.json.gz"):
        write(tmp_path / name, LINES)
    (tmp_path / "in" / "day2").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "in")
    wanted = ["elsewhere/2.json", "elsewhere/deep/3.json.gz", "in/1.json"]
    for path in ("in", "in/*", "in/**", "in/day?/**"):
        assert found_in(tmp_path, f"{tmp_path}/{path}") == wanted


@pytest.mark.parametrize("path", ["in", "in/*", "i?"])
@pytest.mark.parametrize("name", ["2.json.gz", "day2"])
def test_a_link_to_nothing_is_told_and_not_left_out(tmp_path: Path, path: str, name: str) -> None:
    write(tmp_path / "in" / "1.json", LINES)
    (tmp_path / "in" / name).symlink_to(tmp_path / "unmounted")
    with pytest.raises(InputError, match=rf"in/{name} is a link to nothing") as caught:
        find_files([f"{tmp_path}/{path}"])
    assert "Mount" in caught.value.way_out


@pytest.mark.parametrize("path", ["in", "in/*", "in/*.json"])
def test_a_link_to_itself_is_told_and_not_left_out(tmp_path: Path, path: str) -> None:
    write(tmp_path / "in" / "1.json", LINES)
    (tmp_path / "in" / "2.json").symlink_to("2.json")
    with pytest.raises(InputError, match=r"in/2\.json is a link to nothing"):
        find_files([f"{tmp_path}/{path}"])


@pytest.mark.parametrize("path", ["in", "in/*"])
def test_what_is_no_file_is_told_and_not_left_out(tmp_path: Path, path: str) -> None:
    write(tmp_path / "in" / "1.json", LINES)
    os.mkfifo(tmp_path / "in" / "2.json")
    with pytest.raises(InputError, match=r"2\.json is no regular file"):
        find_files([f"{tmp_path}/{path}"])


@pytest.mark.parametrize(
    "name",
    [
        "a b.json",
        "[ab].json",
        "ünï🙂.json",
        "100%20.json",
        "{x,y}.json",
        "a#b?c.json",
        "it's.json",
        "new\nline.json",
        "a:b.json",
    ],
)
def test_odd_names_are_found_as_files_and_by_their_folder(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "in [1]" / name, LINES)
    assert list(find_files([str(path)]).files) == [str(path)]
    assert list(find_files([str(path.parent)]).files) == [str(path)]


def test_the_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(tmp_path / "a.json", LINES)
    assert list(find_files(["~/a.json"]).files) == [str(path)]


@pytest.mark.parametrize("path", ["", "/*", "/**"])
@pytest.mark.parametrize("home", ["state", "deep/state", ".ghsync"])
def test_own_state_inside_the_folder_is_no_input(tmp_path: Path, path: str, home: str) -> None:
    for name in ("a.json", "deep/b.json", f"{home}/batch/read.json", f"{home}/x.json"):
        write(tmp_path / name, LINES)
    assert found_in(tmp_path, f"{tmp_path}{path}", home=tmp_path / home) == ["a.json", "deep/b.json"]
    own = {"hidden" if home.startswith(".") else "ghsync's": [f"{home}/"]}
    assert left_out_of(tmp_path, f"{tmp_path}{path}", home=tmp_path / home) == own


def test_events_inside_the_home_are_input_and_what_it_keeps_is_not(tmp_path: Path) -> None:
    for name in ("events/a.json", "batch/read.json", "mongo/state.json", "b.json"):
        write(tmp_path / name, LINES)
    assert found_in(tmp_path, str(tmp_path), home=tmp_path) == ["b.json", "events/a.json"]
    assert found_in(tmp_path, f"{tmp_path}/events", home=tmp_path) == ["events/a.json"]
    for path in ("batch", "batch/read.json", "batch/*"):
        with pytest.raises(InputError, match=r"has no file to read .*ghsync's own state") as caught:
            find_files([f"{tmp_path}/{path}"], tmp_path)
        assert "another folder" in caught.value.way_out


def test_own_state_is_all_that_is_written_into_the_home(tmp_path: Path) -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    named = set(re.findall(r"home_dir / ([^\s,)]+)", sources))
    # The folders of servers, of a rehearsal's servers, and of Dagster.
    folders = {
        "self.service": {*SERVICES},
        "name": {*SERVICES},
        "_FOLDER": {ensure_dagster_home(load_settings(GHSYNC_HOME=tmp_path)).name},
    }
    written = {folder for name in named for folder in folders.get(name, {name.strip('"')})}
    assert folders.keys() <= named
    assert written == set(OWN_FOLDERS)


@pytest.mark.parametrize("name", OWN_FOLDERS)
@pytest.mark.parametrize("path", ["data", "big", "data/**/*.json", "."])
def test_own_state_behind_a_link_is_no_input(tmp_path: Path, name: str, path: str) -> None:
    home = tmp_path / "data"
    for file in ("data/events/a.json", f"big/{name}/run/report.json", "big/b.json"):
        write(tmp_path / file, LINES)
    (home / name).symlink_to(tmp_path / "big" / name)
    specs = [f"{tmp_path}/{path}", f"{home}/events"]
    found = found_in(tmp_path, *specs, home=home)
    assert found == (["data/events/a.json"] if "data" in path else ["big/b.json", "data/events/a.json"])
    own = left_out_of(tmp_path, *specs, home=home)["ghsync's"]
    assert own == ([f"big/{name}/", "data/"] if path == "." else [f"big/{name}/"])
    # The home itself by a link too.
    (tmp_path / "link").symlink_to(home)
    assert found_in(tmp_path, *specs, home=tmp_path / "link") == found
    with pytest.raises(InputError, match="ghsync's own state"):
        find_files([f"{tmp_path}/big/{name}/run/report.json"], home)


@pytest.mark.parametrize(
    ("path", "way_out"),
    [
        *(
            (path, "for several, name the folder, a glob or a JSON list")
            for path in ('["a",', "['a', 'b']", "[a.json, b.json]", '["a", 1]', "[]")
        ),
        *(
            (path, "for several, name the folder, a glob or a JSON list")
            for path in ("a.json,b.json", "a.json b.json", "a:b", "a;b", "a\nb")
        ),
        ("2015-03-01-{3..4}.json.gz", "Braces are for `ghsync fetch`"),
        ("{a,b}.json", "Braces are for `ghsync fetch`"),
        ("{a,b}*.json", "Braces are for `ghsync fetch`"),
        ("{a}.json", "Correct the path, or run"),
        ("a[12].json", "Correct the glob"),
    ],
)
def test_what_looks_like_several_paths_is_told_how_to_name_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, way_out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"There is no file or folder|No file matches") as caught:
        find_files([path])
    assert way_out in caught.value.way_out


@pytest.mark.parametrize("name", ["a,b c.json", "{a,b}.json", '["a", .json'])
def test_a_file_whose_name_looks_like_several_is_read(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, LINES)
    assert found_in(tmp_path, f"{tmp_path}/{name}") == [name]


@pytest.mark.parametrize(
    ("path", "words", "way_out"),
    [
        ("nowhere.json", "There is no file or folder .*nowhere.json", "Correct the path"),
        ("nowhere/", "There is no file or folder .*nowhere", "ghsync sample"),
        ("no", "no has no file", "ghsync fetch"),
        ("others", "others has no file to read \\(2 left out, the name is not of the kind NAME.json", "Rename"),
        ("*.jsonl", r"No file matches .*\*.jsonl", "Correct the glob"),
        ("_a.json", r"_a\.json has no file to read \(1 left out, hidden", "begins with a letter"),
        ("zero.json", r"zero\.json has no file to read \(1 left out, empty", "Get empty files again"),
        ("x" * 300, "can't be looked at", "Correct the path"),
        ("nowhere/*.json", "There is no file or folder .*nowhere\\.", "Correct the path"),
        ("zero.json/*", "No file matches", "Correct the glob"),
        ("others/**/_g.json", r"has no file to read \(1 left out, hidden", "begins with a letter"),
        (
            "_[t]/*.jsn",
            r"No file matches .*\.jsn outside of hidden folders \(.*/_t/\)\.",
            "Correct the glob",
        ),
        ("pipe.json", r"pipe\.json is no regular file but a pipe", "to a file first"),
        ("/dev/null", "null is no regular file but a device", "to a file first"),
        ("dangling.json", r"dangling\.json is a link to nothing", "Mount or correct"),
        ("dangling.*", r"dangling\.json is a link to nothing", "Mount or correct"),
        ("gone/*.json", "gone is a link to nothing", "Mount or correct"),
        ("gon*/*.json", "gone is a link to nothing", "Mount or correct"),
    ],
)
@pytest.mark.parametrize("alongside", [False, True])
def test_a_path_without_events_is_one_clear_error(
    tmp_path: Path, path: str, words: str, way_out: str, *, alongside: bool
) -> None:
    (tmp_path / "no").mkdir()
    for name in ("others/EVENTS.JSN", "others/a.json.zip", "_a.json", "others/_g.json", "_t/x.jsn"):
        write(tmp_path / name, LINES)
    write(tmp_path / "zero.json", b"")
    write(tmp_path / "alongside" / "a.json", LINES)
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "dangling.json").symlink_to(tmp_path / "unmounted.json")
    (tmp_path / "gone").symlink_to(tmp_path / "unmounted")
    specs = [str(tmp_path / path), *([f"{tmp_path}/alongside"] if alongside else [])]
    if alongside and "left out" in words:
        assert find_files(specs).report()
        return
    with pytest.raises(InputError, match=words) as caught:
        find_files(specs)
    assert way_out in caught.value.way_out


@pytest.mark.parametrize("link", [False, True])
def test_what_a_command_gives_is_no_file_and_told_as_that(tmp_path: Path, *, link: bool) -> None:
    reader, writer = os.pipe()
    path = f"/dev/fd/{reader}"
    if link:
        (tmp_path / "a.json").symlink_to(path)
        path = str(tmp_path / "a.json")
    try:
        with pytest.raises(InputError, match=rf"{path} is no regular file but a pipe") as caught:
            find_files([path])
    finally:
        os.close(reader)
        os.close(writer)
    assert "> events.jsonl" in caught.value.way_out


def test_what_is_behind_standard_input_is_told_by_its_own_name(tmp_path: Path) -> None:
    for name, way_out in (
        ("a.json", f"Name the file itself: {tmp_path}/a.json"),
        ("b.txt", f"Rename it: mv {tmp_path}/b.txt {tmp_path}/b.txt.jsonl"),
    ):
        with write(tmp_path / name, LINES).open() as file:
            with pytest.raises(InputError, match="the name is not of the kind") as caught:
                find_files([f"/dev/fd/{file.fileno()}"])
            assert caught.value.way_out == way_out
            (tmp_path / name).unlink()
            with pytest.raises(InputError, match="is no regular file but a file without a name"):
                find_files([f"/dev/fd/{file.fileno()}"])


def test_each_reason_that_leaves_nothing_has_its_own_way_out(tmp_path: Path) -> None:
    for name, content in (("a.txt", LINES), ("_a.json", LINES), ("z.json", b""), ("own/x.json", LINES)):
        write(tmp_path / name, content)
    with pytest.raises(InputError) as caught:
        find_files([str(tmp_path)], tmp_path / "own")
    ways = caught.value.way_out.rstrip(".").lower().split("; ")
    assert [way.partition(" ")[0] for way in sorted(ways)] == ["get", "name", "rename", "rename"]
    assert sum("to name.jsonl" in way for way in ways) == 1


@pytest.mark.parametrize("name", ["_raw", ".raw", "_it's raw"])
def test_where_all_is_in_a_hidden_folder_the_way_out_names_it(tmp_path: Path, name: str) -> None:
    write(tmp_path / name / "a.json", LINES)
    with pytest.raises(InputError, match="1 left out, hidden") as caught:
        find_files([str(tmp_path)])
    assert "Rename" not in caught.value.way_out
    (named,) = shlex.split(caught.value.way_out.partition("(")[2].rpartition(")")[0])
    assert found_in(tmp_path, named) == [f"{name}/a.json"]


@pytest.mark.parametrize(
    ("content", "words", "way_out"),
    [
        (LINES, r"the name is not of the kind", "Rename it: mv "),
        (b"no json\n" + LINES, r"the name is not of the kind", "Rename it: mv "),
        (GZIP, r"the name is not of the kind", r".*e\.dat\.jsonl\.gz$"),
        (LINES.decode().encode("utf-16"), r"the name is not of the kind", "Rename it: mv "),
        (json.dumps([json.loads(LINE)], indent=1).encode(), r"the name is not of the kind", "Rename it: mv "),
        (b"# Events\n\nThe actor's login, in words.\n", "has no event at its beginning", "Name a file or folder of"),
        (b'{"name": "settings"}\n', "has no event at its beginning", "Name a file or folder of events"),
        (gzipped(b"a log\n"), "has no event at its beginning", "Name a file or folder of events"),
        (b"", r"e\.dat is empty\.", "Get empty files again"),
        (gzipped(b""), r"e\.dat is empty\.", "Get empty files again"),
    ],
)
@pytest.mark.parametrize("by", ["file", "folder"])
def test_a_new_name_is_offered_where_it_helps(
    tmp_path: Path, content: bytes, words: str, way_out: str, by: str
) -> None:
    path = write(tmp_path / "in" / "e.dat", content)
    with pytest.raises(InputError, match=words) as caught:
        find_files([str(path if by == "file" else path.parent)])
    assert re.match(f"(.* )?{way_out}", caught.value.way_out)
    if "Rename" in caught.value.way_out:
        follow(caught.value.way_out)
        assert len(find_files([str(path.parent)]).scan()) == 1


@pytest.mark.parametrize("missing", [0, 50])
def test_a_new_name_is_offered_though_the_data_ends_early(tmp_path: Path, missing: int) -> None:
    noise = random.Random(missing).randbytes(200_000).hex().encode()  # noqa: S311
    content = gzipped(LINES + b'{"noise": "' + noise + b'"}\n')
    path = write(tmp_path / "e.dat", content[: len(content) - missing])
    with pytest.raises(InputError, match="the name is not of the kind") as caught:
        find_files([str(path)])
    assert caught.value.way_out.endswith("e.dat.jsonl.gz")


EVERY_WAY = ["", "/*", "/*/*.json", "/**/*.json", "/**", "/b/*.json", "/b", "/b/**/*.json", "/[ab]/1.json"]


@pytest.mark.parametrize("way", EVERY_WAY)
@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_folder_that_can_not_be_listed_is_told_as_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, number: int
) -> None:
    for name in ("a", "b"):
        write(tmp_path / "in" / name / "1.json", LINES)
    scandir = os.scandir

    def refusing(path: str) -> os._ScandirIterator[str]:
        if path == f"{tmp_path}/in/b":
            raise OSError(number, os.strerror(number), path)
        return scandir(path)

    assert f"{way}/b/1.json".endswith(found_in(tmp_path / "in", f"{tmp_path}/in{way}")[-1])
    monkeypatch.setattr("os.scandir", refusing)
    words = rf"^{tmp_path}/in/b can't be looked at \({os.strerror(number)}\)"
    with pytest.raises(InputError, match=words) as caught:
        find_files([f"{tmp_path}/in{way}"])
    assert "permissions" in caught.value.way_out
    assert "mount" in caught.value.way_out


@pytest.mark.parametrize("way", ["", "/**", "/**/*.json", "/**/**/*.json", "/**/l*/**/*.json", "/*/*/*/*/*/*/*/*/*"])
def test_links_that_lead_back_end_each_search(tmp_path: Path, way: str) -> None:
    for name in ("1.json", "deep/2.json"):
        write(tmp_path / "in" / name, LINES)
    for number in range(5):
        (tmp_path / "in" / f"l{number}").symlink_to(".")
        (tmp_path / "in" / "deep" / f"l{number}").symlink_to("..")
    assert found_in(tmp_path / "in", f"{tmp_path}/in{way}") == ["1.json", "deep/2.json"]


def test_a_chain_of_more_links_than_the_system_follows_is_searched(tmp_path: Path) -> None:
    for number in range(60):
        write(tmp_path / str(number) / "a.json", LINES)
        (tmp_path / str(number) / "next").symlink_to(tmp_path / str(number + 1) if number < 59 else ".")
    assert len(find_files([f"{tmp_path}/0"]).files) == len(find_files([f"{tmp_path}/0/**/*.json"]).files) == 60


@pytest.mark.parametrize("way", ["in", "in/*", "in/**/*", "i*", "**/in"])
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("b.json.gz.tmp", False),
        ("b.tmp -> a", False),
        ("b.json", True),
        ("b.json -> a", True),
        ("b/", True),
        (".b.json", False),
    ],
)
def test_what_comes_and_goes_is_told_by_its_own_path_where_it_may_be_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, name: str, *, told: bool
) -> None:
    write(tmp_path / "in" / "a.json", LINES)
    name, _, link = name.partition(" -> ")
    path = tmp_path / "in" / name
    if link:
        path.symlink_to("a.json")
    elif name.endswith("/"):
        path.mkdir()
    else:
        write(path, LINES)
    scandir = os.scandir

    @contextlib.contextmanager
    def moving(folder: str) -> Iterator[Iterator[os.DirEntry[str]]]:
        with scandir(folder) as listing:
            entries = list(listing)
        if folder == str(path.parent):
            path.rmdir() if name.endswith("/") else path.unlink()
        yield iter(entries)

    monkeypatch.setattr("os.scandir", moving)
    if told:
        with pytest.raises(InputError, match=rf"^{path} can't be looked at \(it is gone") as caught:
            find_files([f"{tmp_path}/{way}"])
        assert "Run again" in caught.value.way_out
    else:
        assert found_in(tmp_path, f"{tmp_path}/{way}") == ["in/a.json"]


TREE = ["a.json", "d/b.json", "_temporary/0/x.json", "_delta_log/0.json", "d/_x/_y/c.json", "_day=1/e.json"]
KEPT = ["_day=1/e.json", "a.json", "d/b.json"]


def test_a_list_leaves_out_the_folders_that_its_folder_leaves_out(tmp_path: Path) -> None:
    for name in TREE:
        write(tmp_path / "t" / name, LINES)
    listed = [str(path) for path in (tmp_path / "t").rglob("*") if path.is_file()]
    by_shell = [str(path) for path in (tmp_path / "t").glob("*")]
    for specs in ([str(tmp_path / "t")], [f"{tmp_path}/t/**"], listed, listed[::-1], by_shell):
        assert found_in(tmp_path / "t", *specs) == KEPT
        assert left_out_of(tmp_path / "t", *specs) == {"hidden": ["_delta_log/", "_temporary/", "d/_x/"]}


@pytest.mark.parametrize(
    "names",
    [
        ["_x/t/a.json"],
        ["_x/t/a.json", "_x/t/b.json"],
        ["_x/t/a.json", "_x/b.json"],
        ["_x/t/a.json", "d/b.json", ".h/c.json"],
        [".x/t/a.json", "b.json"],
        ["_x/*.json", "b.json"],
    ],
)
def test_a_file_that_is_named_in_a_hidden_folder_is_read(tmp_path: Path, names: list[str]) -> None:
    homes = [tmp_path / str(number) if "d/" in "".join(names) else tmp_path for number in range(len(names))]
    paths = [home / name for home, name in zip(homes, names, strict=True)]
    for path in paths:
        write(Path(str(path).replace("*", "a")), LINES)
    assert len(find_files([str(path) for path in paths]).files) == len(paths)


@pytest.mark.parametrize("names", [["_raw", "more"], ["_raw/a.json", "c.json"], ["_raw/**", "_raw/a.json", "more"]])
@pytest.mark.parametrize("alongside", ["not_named.json", "not_named/d.json"])
def test_of_a_choice_from_a_folder_no_path_is_left_out(tmp_path: Path, names: list[str], alongside: str) -> None:
    for name in ("_raw/a.json", "more/b.json", "c.json", "README.md", alongside):
        write(tmp_path / "d" / name, LINES)
    named = [f"{tmp_path}/d/{name}" for name in names]
    for specs in (named, named[::-1]):
        assert found_in(tmp_path / "d", *specs) == ["_raw/a.json", names[-1].replace("more", "more/b.json")]
        assert find_files(specs).report() == []


def test_a_list_by_names_of_events_is_one_of_its_folder(tmp_path: Path) -> None:
    for name in (*TREE, "README.md", "_SUCCESS"):
        write(tmp_path / "t" / name, LINES)
    assert found_in(tmp_path / "t", *map(str, (tmp_path / "t").rglob("*.json"))) == KEPT


def test_a_listed_file_that_is_missing_is_told_in_a_hidden_folder_too(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no file or folder"):
        find_files([str(write(tmp_path / "a.json", LINES)), str(tmp_path / "_x" / "b.json")])


def test_a_glob_is_one_below_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("in [1]/a.json", "in 1/b.json"):
        write(tmp_path / name, LINES)
    monkeypatch.chdir(tmp_path / "in [1]")
    assert found_in(tmp_path, "*.json") == ["in [1]/a.json"]


@pytest.mark.parametrize("content", [gzipped(b""), bz2.compress(b""), pa.compress(b"", "zstd", asbytes=True)])
def test_what_packs_nothing_is_empty(tmp_path: Path, content: bytes) -> None:
    write(tmp_path / "a.json.gz", content)
    with pytest.raises(InputError, match="1 left out, empty"):
        find_files([str(tmp_path)]).scan()
    write(tmp_path / "b.json", LINES)
    found = find_files([str(tmp_path)])
    assert [file.path for file in found.scan()] == [str(tmp_path / "b.json")]
    assert [(entry.reason, entry.names) for entry in found.report()] == [("empty", [str(tmp_path / "a.json.gz")])]


@pytest.mark.parametrize(
    ("address", "way_out"),
    [
        ("https://data.gharchive.org/2015-01-01-15.json.gz", "ghsync fetch 2015-01-01-15 ;"),
        ("https://data.gharchive.org/2015-01-01-{0..23}.json.gz", "ghsync fetch 2015-01-01-{0..23} ;"),
        ("http://example.org/a.json", "curl -gfLo a.json http://example.org/a.json ;"),
        ("https://example.org/a%20b.json?x=1&y", "curl -gfLo 'a b.json' 'https://example.org/a%20b.json?x=1&y' ;"),
        ("https://api.github.com/events", "curl -gfLo events.json https://api.github.com/events ;"),
        ("s3://bucket/events/", "aws s3 cp --recursive s3://bucket/events events/ ;"),
        ("s3a://bucket/events", "aws s3 cp --recursive s3://bucket/events events/ ;"),
        ("s3://bucket", "aws s3 cp --recursive s3://bucket events/ ;"),
        ("s3n://bucket/a b.json.gz", "aws s3 cp 's3://bucket/a b.json.gz' events/ ;"),
        (
            "s3://bucket/day/*.gz",
            "aws s3 cp --recursive s3://bucket/day/ events/ --exclude '*' --include '*.gz' ;",
        ),
        (
            "s3://b/*/x.json",
            "aws s3 cp --recursive s3://b/ events/ --exclude '*' --include '*/x.json' ;",
        ),
        ("gs://bucket/*.json.gz", "gcloud storage cp 'gs://bucket/*.json.gz' events/ ;"),
        ("gs://bucket/day", "gcloud storage cp --recursive gs://bucket/day events/ ;"),
        ("hdfs://name/events", "Copy the files"),
        ("abfss://c@a.dfs.core.windows.net/x", "Copy the files"),
    ],
)
def test_addresses_are_refused_with_the_way_to_get_the_files(address: str, way_out: str) -> None:
    with pytest.raises(InputError, match="is an address; ghsync reads files of this machine") as caught:
        find_files([address])
    assert way_out in caught.value.way_out


@pytest.mark.parametrize("name", ["notes.txt", "data", "_x", "\udcff.txt"])
@pytest.mark.parametrize("alongside", [False, True])
def test_a_pipe_of_another_name_is_left_out_and_never_opened(tmp_path: Path, name: str, *, alongside: bool) -> None:
    os.mkfifo(tmp_path / name)
    if alongside:
        write(tmp_path / "a.json", LINES)
        assert found_in(tmp_path, str(tmp_path)) == ["a.json"]
    else:
        with pytest.raises(InputError, match="1 left out, "):
            find_files([str(tmp_path)])


def test_what_has_become_a_pipe_is_told_and_not_waited_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", LINES)
    found = find_files([str(path)])
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match=r"a\.json can't be read \(no regular file\)"):
        found.scan()


def test_all_refused_files_are_told_at_once_with_their_ways_out(tmp_path: Path) -> None:
    write(tmp_path / "a.json", GZIP[:-20])
    write(tmp_path / "b.json", b"%PDF-1.4")
    write(tmp_path / "c.json", LINES)
    for number in range(5):
        write(tmp_path / f"d{number}.json", b"ORC\x01\x02\x03")
    with pytest.raises(InputError, match=r"^7 files can't be read: .*a\.json is damaged: .*b\.json is a PDF") as caught:
        find_files([str(tmp_path)]).scan()
    assert caught.value.message.endswith("And 2 more.")
    assert "Get the file again" in caught.value.way_out
    assert caught.value.way_out.count("JSON lines") == 1
    (tmp_path / "b.json").unlink()
    for path in [*tmp_path.glob("d*"), tmp_path / "c.json"]:
        path.unlink()
    with pytest.raises(InputError, match=r"^/.*a\.json is damaged: "):
        find_files([str(tmp_path)]).scan()


@pytest.mark.parametrize("name", ["a.json", "a[1]/x.json", "100%25 ü.json", "a?b#c.json"])
@pytest.mark.parametrize("host", ["", "localhost"])
def test_the_way_out_of_a_file_address_is_its_path(tmp_path: Path, name: str, host: str) -> None:
    path = write(tmp_path / name, LINES)
    with pytest.raises(InputError, match="is an address") as caught:
        find_files([path.as_uri().replace("file://", f"file://{host}")])
    assert list(find_files([caught.value.way_out.partition(": ")[2]]).files) == [str(path)]


def test_an_unknown_users_home_is_one_clear_error() -> None:
    with pytest.raises(InputError, match="can't be looked at"):
        find_files(["~no-such-user/a.json"])


def test_a_name_that_is_not_utf8_is_one_clear_error(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.json"))
    write(path, LINES)
    with pytest.raises(InputError, match=r"/\\xff\.json has a name that is not UTF-8"):
        find_files([str(tmp_path)])


@pytest.mark.parametrize("name", [b"\xff.txt", b"\xff.json", b".\xff", b"\xff/a.json", b"link \xff.json", b"\xff*"])
def test_a_name_that_is_not_utf8_can_be_told_whatever_becomes_of_the_file(tmp_path: Path, name: bytes) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/in/" + name))
    if name.startswith(b"link"):
        path.parent.mkdir()
        path.symlink_to(tmp_path / "gone")
    else:
        write(path, b"" if path.suffix == ".json" and path.parent.name == "in" else LINES)
    for specs in ([str(path)], [str(path.parent)], [str(path.parent), str(write(tmp_path / "a.json", LINES))]):
        told = ""
        try:
            for entry in find_files(specs).report():
                assert entry.files == 1
                told += msgspec.json.encode(entry).decode()
        except InputError as error:
            told += str(error)
        told.encode()
        # Where nothing is left, only what was given is named.
        assert "\\xff" in told or specs == [str(path.parent)]


@pytest.mark.parametrize("name", ["a\0b.json", "\ud800.json"])
def test_a_name_that_no_file_can_have_is_one_clear_error(name: str) -> None:
    with pytest.raises(InputError, match=r"There is no file or folder|can't be looked at") as caught:
        find_files([f"/{name}"])
    str(caught.value).encode()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_one_clear_error(tmp_path: Path) -> None:
    path = write(tmp_path / "in" / "a.json", LINES)
    path.chmod(0)
    with pytest.raises(InputError, match=r"a.json can't be read .*Permission denied") as caught:
        look(path)
    assert "permissions" in caught.value.way_out
    path.parent.chmod(0)
    try:
        for way in ("", "/*", "/*/*.json", "/**/*.json", "/in/*.json"):
            with pytest.raises(InputError, match=rf"^{path.parent} can't be looked at .*Permission denied"):
                find_files([f"{tmp_path}{way}"])
    finally:
        path.parent.chmod(0o700)


def test_a_file_that_is_gone_by_now_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a.json can't be read .*No such file"):
        scan_file(FileState(str(tmp_path / "a.json"), 5, 0, 0, 1))


# What is in them


def zipped() -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("a.json", LINES)
    return target.getvalue()


def tarred(mode: str) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode=mode) as archive:  # type: ignore[call-overload]
        entry = tarfile.TarInfo("a.json")
        entry.size = len(LINES)
        archive.addfile(entry, io.BytesIO(LINES))
    return target.getvalue()


def parquet(**columns: object) -> bytes:
    target = io.BytesIO()
    pq.write_table(pa.table({"actor": [{"id": 1, "login": "octo"}] * 2, **columns}), target)
    return target.getvalue()


def zstd(content: bytes) -> bytes:
    return bytes(pa.compress(content, "zstd"))


def lz4(content: bytes) -> bytes:
    return bytes(pa.compress(content, "lz4"))


CONVERTED: dict[str, tuple[str, Callable[[], bytes], str, str]] = {
    "zip": ("a.json", zipped, "is a zip archive", "a.json-unpacked"),
    "tar": ("a.json", lambda: tarred("w"), "is a tar archive", "a.json-unpacked"),
    "tar.gz": ("2015.json.gz", lambda: tarred("w:gz"), "is a tar archive", "2015.json.gz-unpacked"),
    "parquet": ("a b.json", parquet, "is a Parquet file", "a b.json-events.jsonl"),
    "xz": ("a.json", lambda: lzma.compress(LINES), "is compressed with xz", "a.json-events.jsonl"),
    "lz4": ("a.json", lambda: lz4(LINES), "is compressed with lz4", "a.json-events.jsonl"),
    "UTF-32": ("a.json", lambda: LINES.decode().encode("utf-32"), "is UTF-32 text", "a.json-events.jsonl"),
    "UTF-16 without a mark": (
        "a.json",
        lambda: LINES.decode().encode("utf-16-le"),
        "is UTF-16 text without a byte order mark",
        "a.json-events.jsonl",
    ),
    "UTF-16 without a mark, big end first": (
        "a.json",
        lambda: LINES.decode().encode("utf-16-be"),
        "is UTF-16 text without a byte order mark",
        "a.json-events.jsonl",
    ),
    "parquet, odd columns": (
        "a.json",
        lambda: parquet(
            raw=[b"\xff", b"a"],
            day=[date(2015, 1, 1)] * 2,
            took=[timedelta(1)] * 2,
            cost=[Decimal("1.5"), None],
            tags=pa.array([[("a", b"b")]] * 2, pa.map_(pa.string(), pa.binary())),
        ),
        "is a Parquet file",
        "a.json-events.jsonl",
    ),
    "another name": ("a.txt", lambda: LINES, "the name is not of the kind", "a.txt.jsonl"),
    "another name, packed": ("a.txt", lambda: GZIP, "the name is not of the kind", "a.txt.jsonl.gz"),
}


PACKERS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": (".gz", gzipped),
    "bzip2": (".bz2", bz2.compress),
    "zstd": (".zst", zstd),
}


def follow(way_out: str) -> None:
    """Run the command that a way out gives."""
    command = way_out.removeprefix("Rename it: ").partition(" ; then name")[0]
    command = re.sub(r"(^|&& )(\.venv/bin/python|python3) ", rf"\1{shlex.quote(sys.executable)} ", command)
    for tool in re.findall(r"(?:^|&& )(\w+)", command):
        if not shutil.which(tool):
            pytest.skip(f"no {tool}")
    subprocess.run(["bash", "-ec", command], check=True, timeout=60)


def assert_read(path: Path) -> None:
    (file,) = find_files([str(path)]).scan()
    assert file.has_lines
    text = b"".join(unpacked(io.BytesIO(Path(file.path).read_bytes()), file.packing))
    assert [json.loads(line)["actor"]["login"] for line in text.splitlines()][:2] == ["octo", "octo"]


@pytest.mark.parametrize("kind", CONVERTED, ids=str)
def test_the_way_out_of_another_kind_makes_it_one_that_is_read(tmp_path: Path, kind: str) -> None:
    name, content, words, then = CONVERTED[kind]
    path = write(tmp_path / name, content())
    with pytest.raises(InputError, match=words) as caught:
        find_files([str(path)]).scan()
    assert str(path) in caught.value.message
    follow(caught.value.way_out)
    assert_read(tmp_path / then)


PACKED = [(kind, "gzip") for kind, (_, _, words, _) in CONVERTED.items() if words.startswith("is ")]
PACKED += [(kind, packing) for kind in ("zip", "xz") for packing in ("bzip2", "zstd")]


@pytest.mark.parametrize(("kind", "packing"), PACKED)
def test_the_way_out_of_another_kind_in_a_packing_unpacks_that_first(tmp_path: Path, kind: str, packing: str) -> None:
    name, content, words, then = CONVERTED[kind]
    content = (lambda: tarred("w")) if kind == "tar.gz" else content
    path = write(tmp_path / "in" / "it's {path}.json", PACKERS[packing][1](content()))
    with pytest.raises(InputError, match=rf"\.json {words} in {packing} data") as caught:
        look(path)
    follow(caught.value.way_out)
    assert_read(Path(f"{path}{then.removeprefix(name)}"))
    assert sorted(entry.name for entry in path.parent.iterdir()) == [path.name, f"{path.name}{then.removeprefix(name)}"]


@pytest.mark.parametrize("inner", PACKERS)
@pytest.mark.parametrize("outer", PACKERS)
def test_the_way_out_of_what_is_packed_twice_unpacks_it_once(tmp_path: Path, inner: str, outer: str) -> None:
    path = write(tmp_path / "a b.json", PACKERS[outer][1](PACKERS[inner][1](LINES)))
    with pytest.raises(InputError, match=rf"is compressed twice \({inner} in {outer}\)") as caught:
        look(path)
    follow(caught.value.way_out)
    assert_read(Path(f"{path}-events.jsonl{PACKERS[inner][0]}"))


@pytest.mark.parametrize(
    ("zone", "number"),
    [*product(["UTC", None, "Asia/Tokyo"], [pa.string(), pa.int64()]), ("UTC", pa.binary())],
)
def test_the_way_out_of_a_parquet_file_of_events_gives_events(
    tmp_path: Path, zone: str | None, number: pa.DataType
) -> None:
    texts = [("login", pa.string()), ("gravatar_id", pa.string()), ("avatar_url", pa.string()), ("url", pa.string())]
    actor = pa.struct([("id", pa.int64()), *texts])
    repo = pa.struct([("id", pa.int64()), ("name", pa.string()), ("url", pa.string())])
    octo = {"id": 2**53 + 1, "login": "octo", "gravatar_id": "", "avatar_url": "https://a", "url": "https://u"}
    times = pa.array([datetime(2015, 1, 1, 15, 0, second, tzinfo=UTC) for second in (1, 2)], pa.timestamp("us", zone))
    # As BigQuery's githubarchive has them.
    table = {
        "type": ["PushEvent"] * 2,
        "public": [True] * 2,
        "payload": ["{}"] * 2,
        "repo": pa.array([{"id": 7, "name": "a/b", "url": "https://r"}, None], repo),
        "actor": pa.array([octo] * 2, actor),
        "org": pa.array([None, octo], actor),
        "created_at": times,
        "id": pa.array([1, 2]).cast(pa.string()).cast(number),
    }
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table(table), path)
    with pytest.raises(InputError, match="is a Parquet file") as caught:
        find_files([str(path)])
    assert "ghsync fetch" in caught.value.way_out
    follow(caught.value.way_out)
    (file,) = find_files([f"{path}-events.jsonl"]).scan()
    decide = event_decoder(BUILT_IN_RULES, "2030")
    found = [decide(line) for line in Path(file.path).read_bytes().splitlines()]
    assert [event.actor.id for event in found if isinstance(event, Event)] == [2**53 + 1] * 2
    assert [event.created_at for event in found if isinstance(event, Event)] == [
        "2015-01-01T15:00:01Z",
        "2015-01-01T15:00:02Z",
    ]


@pytest.mark.parametrize("content", [zipped, lambda: tarred("w"), lambda: lzma.compress(LINES)])
def test_no_two_files_become_one(tmp_path: Path, content: Callable[[], bytes]) -> None:
    commands = set()
    for name in ("x.json", "x.jsonl", "x.2015.json", "x.2016.json", "x.json.gz", "X.json"):
        path = write(tmp_path / name, content())
        with pytest.raises(InputError) as caught:
            look(path)
        commands.add(caught.value.way_out.replace(shlex.quote(str(path)), "", 1))
    assert len(commands) == 6


XML = b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>NoSuchKey</Code></Error>\n'
PAYLOAD = {"action": "opened", "sender": {"id": 1, "login": "octo"}, "repository": {"id": 7}}
FAULTS: dict[str, tuple[str, Callable[[], bytes], str, str]] = {
    "gzip cut in its header": ("a.json.gz", lambda: GZIP[:5], "is damaged: its gzip data ends early", "ghsync fetch"),
    "gzip broken at its start": (
        "a.json.gz",
        lambda: GZIP[:10] + b"\xff" * 50,
        "is damaged: its gzip data is",
        "ghsync",
    ),
    "gzip cut short": ("a.json.gz", lambda: GZIP[:-20], "is damaged: its gzip data ends early", "ghsync fetch"),
    "gzip without its check sum": ("a.json.gz", lambda: GZIP[:-8], "is damaged: its gzip data ends early", "ghsync"),
    "gzip with a wrong check sum": (
        "a.json.gz",
        lambda: GZIP[:-8] + b"\0\0\0\0" + GZIP[-4:],
        "is damaged: its gzip data is broken .*incorrect data check",
        "ghsync fetch",
    ),
    "gzip with a wrong length": ("a.json.gz", lambda: GZIP[:-4] + b"\0\0\0\1", "is damaged: .*length check", "ghsync"),
    "gzip broken in the middle": (
        "a.json.gz",
        lambda: GZIP[:30] + bytes(255 - byte for byte in GZIP[30:40]) + GZIP[40:],
        "is damaged: its gzip data is broken",
        "ghsync fetch",
    ),
    "junk after the gzip": ("a.json.gz", lambda: GZIP + b"junk", "is damaged: .*incorrect header", "ghsync fetch"),
    "second member cut short": ("a.json.gz", lambda: GZIP + GZIP[:-9], "is damaged: .*ends early", "ghsync fetch"),
    "bzip2 cut short": ("a.json.bz2", lambda: bz2.compress(LINES)[:-5], "is damaged: its bzip2 data ends", "ghsync"),
    "zstd cut short": (
        "a.json.zst",
        lambda: pa.compress(LINES, "zstd", asbytes=True)[:-5],
        "is damaged: its zstd data ends early",
        "ghsync fetch",
    ),
    "UTF-16 cut within a character": (
        "a.json",
        lambda: LINES.decode().encode("utf-16")[:-1],
        "is damaged: its UTF-16 text ends within a character",
        "ghsync fetch",
    ),
    "bzip2 cut in its header": ("a.json.bz2", lambda: bz2.compress(LINES)[:9], "is damaged: its bzip2 data", "ghsync"),
    "zstd of nothing": (
        "a.json.zst",
        lambda: b"\x28\xb5\x2f\xfd0000",
        "is damaged: its zstd data ends",
        "ghsync fetch",
    ),
    "zeros": ("a.json", lambda: bytes(5_000), "is not text: .*NUL", "Get the file again"),
    "XML": (
        "2015-01-01-3.json",
        lambda: XML,
        "is XML, as a server's error",
        "rm .* ; ghsync fetch 2015-01-01-3 --target",
    ),
    "XML in gzip": ("a.json.gz", lambda: gzipped(XML), "is XML, as a server's error message is", "Get the file again"),
    "HTML": (
        "a.json",
        lambda: b"\n<!DOCTYPE html>\n<html><body>Log in</body>",
        "is a web page",
        "Get the file again.* zone .*fetch",
    ),
    "CSV": (
        "a.json",
        lambda: b"id,type,login\n1,PushEvent,octo\n",
        "is a table with separators",
        "lines.* zone .*fetch",
    ),
    "TSV in gzip": ("a.json.gz", lambda: gzipped(b"id\ttype\tactor.login\n1\tP\to\n"), "is a table with", "JSON lines"),
    "ORC": ("a.json", lambda: b"ORC\x01\x02\x03", "is an ORC file", "JSON lines.* zone .*: ghsync fetch"),
    "payload of a webhook": ("a.json", lambda: json.dumps(PAYLOAD).encode(), "holds payloads of a webhook", "gh api"),
    "payloads, a line each": (
        "a.json",
        lambda: json.dumps({"event": "push", "payload": PAYLOAD}).encode() + b"\n" + json.dumps(PAYLOAD).encode(),
        "holds payloads of a webhook",
        "gh api",
    ),
    "payload, pretty": (
        "a.json",
        lambda: json.dumps(PAYLOAD, indent=2).encode(),
        "holds payloads of a webhook",
        "gh api",
    ),
    "payloads, an array": ("a.json", lambda: json.dumps([PAYLOAD]).encode(), "holds payloads of a webhook", "gh api"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_each_fault_of_a_whole_file_is_one_clear_error(tmp_path: Path, fault: str) -> None:
    name, content, words, way_out = FAULTS[fault]
    path = write(tmp_path / name, content())
    with pytest.raises(InputError, match=words) as caught:
        look(path)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message + caught.value.way_out
    assert re.search(way_out, caught.value.way_out)


PRETTY = json.dumps(EVENTS, indent=2)


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(EVENTS).encode(),
        json.dumps(EVENTS).encode() + b"\n\n",
        gzipped(json.dumps(EVENTS).encode()),
        json.dumps([*EVENTS, {"x": "x" * 3_000_000}]).encode(),
        b"[" + b",\n".join([LINE] * 3) + b"]\n",
        b"[" + LINE + b",\n" + LINE + b"\n]",
        b"[\n" + LINE + b"\n]\n",
        PRETTY.encode(),
        b"\xef\xbb\xbf" + PRETTY.encode(),
        PRETTY.replace("\n", "\r\n").encode(),
        PRETTY.encode("utf-16"),
        "\n".join(json.dumps(event, indent=2) for event in EVENTS).encode(),
        json.dumps(EVENTS[0], indent=4).encode(),
        json.dumps({"x": ["y"] * 300_000}, indent=4).encode(),
        b'{ "id": "1",\n  "actor": {\n "id": 1 } }\n',
        b'{"actor":\n{"id":1}\n}\n',
        b"[null, " + LINE + b"]",
        b"[\n5,\n" + LINE + b"\n]",
        b'["x",\n' + LINE + b",\n" + LINE + b"]\n",
        b"[" + LINE + b"][" + LINE + b"]",
        b"[[], " + LINE + b"]\n",
        json.dumps(EVENTS).encode() + bytes(4_096),
        json.dumps(EVENTS).encode() + b"\n" + bytes(4_096),
        PRETTY.encode() + b"\n" + bytes(4_096),
        json.dumps(EVENTS).encode().replace(b'"type"', b'"ty\0e"', 1),
        "\n".join(json.dumps(event, indent=2) for event in EVENTS).encode().replace(b'"id"', b'"id', 1),
        b'{"events": [\n' + b",\n".join([LINE] * 20) + b"\n]}\n",
        # Longer than the head.
        b'{"events": [\n' + b",\n".join([LINE] * 2_000) + b"\n]}\n",
        b'{"n": 2000, "events": [' + b",\n".join([LINE] * 2_000) + b"]}\n",
    ],
)
def test_arrays_and_objects_over_several_lines_are_seen(tmp_path: Path, content: bytes) -> None:
    assert not look(write(tmp_path / "a.json", content)).has_lines


@pytest.mark.parametrize("first", [b'{"actor":', b'{"payload": {"commits": [', b'{"id": "5", "type":'])
@pytest.mark.parametrize("last", [LINE, LINE[:60]])
def test_a_torn_line_at_the_beginning_of_a_small_file_is_one_line(tmp_path: Path, first: bytes, last: bytes) -> None:
    assert look(write(tmp_path / "a.json", first + b"\n" + last)).has_lines


@pytest.mark.parametrize(
    ("content", "packing"),
    [
        (b"\n", None),
        (LINE, None),
        (LINES, None),
        (b"\xef\xbb\xbf" + LINES, None),
        (LINES.replace(b"\n", b"\r\n"), None),
        (LINES.replace(b"\n", b"\r"), None),
        (b"\n\n" + LINES, None),
        (gzipped(LINES), "gzip"),
        (gzipped(LINES) + gzipped(LINE), "gzip"),
        (gzipped(LINE[:20]) + gzipped(LINE[20:] + b"\n"), "gzip"),
        (gzipped(LINES) + bytes(512), "gzip"),
        (bz2.compress(LINES), "bzip2"),
        (pa.compress(LINES, "zstd", asbytes=True), "zstd"),
        (b"bad line\n" + LINES, None),
        (b"[bad line\n" + LINES, None),
        (b"[1,2]\n" + LINES, None),
        (b"[5 apples,\n" + LINES, None),
        (b"[null,\n" + LINES, None),
        (b"[" + LINE + b"]\n[" + LINE + b"]\n", None),
        (b'{"events":[' + LINE + b"]}\n" * 2, None),
        (b"{\n" + LINES, None),
        (b"<html>\n" + LINES, None),
        (b"id,type,login\n1,2,3\n" + LINES, None),
        (b'{"id":"1","actor":\n' + LINES, None),
        (b'{"id":"1","actor":{"id":1,"log\n' + LINES, None),
        (b'{"x":' + b"[" * 100_000 + b"\n" + LINES, None),
        (b"{" + b'"' * 50 + b"\nbad too\n" + LINES, None),
        (b"null\n5\n" + LINES, None),
        (LINE.replace(b"octo", b"o\x00") + b"\n" + LINES, None),
        (LINE + b"\n" + bytes(4_096), None),
        (b"\xff\n" + LINES, None),
        (b"one, two, three\nfour, five, six\n", None),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_file_of_lines_is_never_refused_for_a_bad_one_or_its_suffix(
    tmp_path: Path, name: str, content: bytes, packing: str | None
) -> None:
    path = write(tmp_path / name, content)
    assert look(path) == InputFile(state_of(str(path), path.stat()), packing)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
@pytest.mark.parametrize("pack", [bytes, gzipped])
def test_utf16_is_read_where_its_mark_says_so(tmp_path: Path, encoding: str, pack: Callable[[bytes], bytes]) -> None:
    text = LINES.decode().encode(encoding)
    content = pack(text if encoding == "utf-16" else b"\xfe\xff" + text)
    path = write(tmp_path / "a.json", content)
    packing = "gzip" if pack is gzipped else None
    assert look(path) == InputFile(state_of(str(path), path.stat()), packing, is_utf16=True)
