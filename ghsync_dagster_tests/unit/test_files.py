"""The look at whole files: every fault is one clear error with the way out, and no good file is refused."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ghsync_dagster.batch.files import find_files, inspect_file
from ghsync_dagster.domain.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK = 1 << 21
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


def names(folder: Path, found: list[Path]) -> list[str]:
    return [str(path.relative_to(folder)) for path in found]


# Which files


def test_a_file_is_found_as_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.json", LINES)
    monkeypatch.chdir(tmp_path)
    assert find_files("a.json") == [tmp_path / "a.json"]


def test_a_folder_gives_its_event_files_at_any_depth_sorted(tmp_path: Path) -> None:
    for name in ("b/2.json.gz", "b/1.jsonl", "a.json", "c.jsonl.gz", "notes.txt", "b/x.json.part", "d/e/f/g.json"):
        write(tmp_path / name, LINES)
    found = names(tmp_path, find_files(str(tmp_path)))
    assert found == ["a.json", "b/1.jsonl", "b/2.json.gz", "c.jsonl.gz", "d/e/f/g.json"]


def test_hidden_files_of_a_folder_are_no_input(tmp_path: Path) -> None:
    for name in ("a.json", ".b.json", "_c.json", "_temporary/d.json", ".git/e.json"):
        write(tmp_path / name, LINES)
    assert names(tmp_path, find_files(str(tmp_path))) == ["a.json"]


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("*.json", ["1.json", "2.json"]),
        ("?.json*", ["1.json", "2.json", "3.json.gz"]),
        ("[12].json", ["1.json", "2.json"]),
        ("**/*.jsonl", ["a/b/5.jsonl", "a/4.jsonl"]),
    ],
)
def test_a_glob_gives_the_files_that_match(tmp_path: Path, pattern: str, wanted: list[str]) -> None:
    for name in ("1.json", "2.json", "3.json.gz", "a/4.jsonl", "a/b/5.jsonl"):
        write(tmp_path / name, LINES)
    (tmp_path / "9.json").mkdir()
    assert names(tmp_path, find_files(f"{tmp_path}/{pattern}")) == sorted(wanted, key=Path)


def test_folders_behind_links_and_those_that_a_glob_matches_are_searched_once(tmp_path: Path) -> None:
    for name in ("in/1.json", "elsewhere/2.json", "elsewhere/deep/3.json.gz"):
        write(tmp_path / name, LINES)
    (tmp_path / "in" / "day2").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "in")
    wanted = ["in/1.json", "elsewhere/2.json", "elsewhere/deep/3.json.gz"]
    for path in ("in", "in/*", "in/**", "in/day?/**"):
        assert sorted(names(tmp_path, find_files(f"{tmp_path}/{path}"))) == sorted(wanted)


@pytest.mark.parametrize("path", ["in", "in/*", "i?"])
@pytest.mark.parametrize("name", ["2.json.gz", "day2"])
def test_a_link_to_nothing_is_told_and_not_left_out(tmp_path: Path, path: str, name: str) -> None:
    write(tmp_path / "in" / "1.json", LINES)
    (tmp_path / "in" / name).symlink_to(tmp_path / "unmounted")
    with pytest.raises(InputError, match=rf"in/{name} is a link to nothing") as caught:
        find_files(f"{tmp_path}/{path}")
    assert "Mount" in caught.value.way_out


@pytest.mark.parametrize("path", ["in", "in/*", "in/*.json"])
def test_a_link_to_itself_is_told_and_not_left_out(tmp_path: Path, path: str) -> None:
    write(tmp_path / "in" / "1.json", LINES)
    (tmp_path / "in" / "2.json").symlink_to("2.json")
    with pytest.raises(InputError, match=r"in/2\.json is a link to nothing"):
        find_files(f"{tmp_path}/{path}")


def test_hidden_folders_that_a_glob_matches_are_no_input(tmp_path: Path) -> None:
    for name in ("in/a.json", "in/_temporary/0/d.json", "in/.git/e.json"):
        write(tmp_path / name, LINES)
    assert names(tmp_path, find_files(f"{tmp_path}/in/*")) == ["in/a.json"]


@pytest.mark.parametrize("path", ["in", "in/*"])
def test_what_is_no_file_is_told_and_not_left_out(tmp_path: Path, path: str) -> None:
    write(tmp_path / "in" / "1.json", LINES)
    os.mkfifo(tmp_path / "in" / "2.json")
    with pytest.raises(InputError, match=r"2\.json is no regular file"):
        find_files(f"{tmp_path}/{path}")


@pytest.mark.parametrize(
    "name",
    ["a b.json", "[ab].json", "ünï🙂.json", "100%20.json", "{x,y}.json", "a#b?c.json", "it's.json", "new\nline.json"],
)
def test_odd_names_are_found_as_files_and_by_their_folder(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "in [1]" / name, LINES)
    assert find_files(str(path)) == [path]
    assert find_files(str(path.parent)) == [path]


def test_the_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(tmp_path / "a.json", LINES)
    assert find_files("~/a.json") == [path]


@pytest.mark.parametrize(
    ("path", "words", "way_out"),
    [
        ("nowhere.json", "There is no file or folder .*nowhere.json", "Correct GHSYNC_EVENTS_PATH"),
        ("nowhere/", "There is no file or folder .*nowhere/", "Correct GHSYNC_EVENTS_PATH"),
        ("empty", "The folder .*empty has no file that ends in .json, .jsonl, .json.gz, .jsonl.gz", "ghsync fetch"),
        ("others", "The folder .*others has no file that ends in", "ghsync fetch"),
        ("*.jsonl", r"No file matches .*\*.jsonl", "Correct the glob"),
        ("notes.txt", "notes.txt does not end in .json", "Rename it"),
        ("*.txt", "notes.txt does not end in .json", "Rename it"),
        ("others/EVENTS.JSON", "EVENTS.JSON does not end in .json", "Rename it"),
        ("_a.json", "_a.json' begins with a dot or an underscore", "Rename it"),
        ("a:b.json", "a:b.json' has a colon in its name", "Rename it"),
        ("x" * 300, "can't be looked at", "Correct GHSYNC_EVENTS_PATH"),
        ("pipe.json", "There is no file or folder", "Correct GHSYNC_EVENTS_PATH"),
        ("dangling.json", "There is no file or folder", "Correct GHSYNC_EVENTS_PATH"),
    ],
)
def test_a_path_without_events_is_one_clear_error(tmp_path: Path, path: str, words: str, way_out: str) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("notes.txt", "others/EVENTS.JSON", "others/a.json.zip", "_a.json", "a:b.json"):
        write(tmp_path / name, LINES)
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "dangling.json").symlink_to(tmp_path / "gone.json")
    with pytest.raises(InputError, match=words) as caught:
        find_files(f"{tmp_path}/{path}")
    assert way_out in caught.value.way_out


def test_an_unknown_users_home_is_one_clear_error() -> None:
    with pytest.raises(InputError, match="can't be looked at"):
        find_files("~no-such-user/a.json")


def test_a_name_that_is_not_utf8_is_one_clear_error(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.json"))
    write(path, LINES)
    with pytest.raises(InputError, match="has a name that is not UTF-8") as caught:
        find_files(str(tmp_path))
    caught.value.message.encode()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_one_clear_error(tmp_path: Path) -> None:
    path = write(tmp_path / "in" / "a.json", LINES)
    path.chmod(0)
    with pytest.raises(InputError, match=r"a.json can't be read .*Permission denied") as caught:
        inspect_file(path, BLOCK)
    assert "permissions" in caught.value.way_out
    path.parent.chmod(0)
    try:
        with pytest.raises(InputError, match=r"can't be looked at .*Permission denied"):
            find_files(str(tmp_path))
    finally:
        path.parent.chmod(0o700)


def test_a_file_that_is_gone_by_now_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a.json can't be read .*No such file"):
        inspect_file(tmp_path / "a.json", BLOCK)


# What is in them


def zipped() -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("a.json", LINES)
    return target.getvalue()


def parquet() -> bytes:
    target = io.BytesIO()
    pq.write_table(pa.table({"id": [1]}), target)
    return target.getvalue()


FAULTS: dict[str, tuple[str, Callable[[], bytes], str, str]] = {
    "gzip cut short": ("a.json.gz", lambda: GZIP[:-20], "is damaged: .*ended before", "ghsync fetch"),
    "gzip cut in its header": ("a.json.gz", lambda: GZIP[:5], "is damaged: ", "ghsync fetch"),
    "gzip without its check sum": ("a.json.gz", lambda: GZIP[:-8], "is damaged: ", "ghsync fetch"),
    "gzip with a wrong check sum": (
        "a.json.gz",
        lambda: GZIP[:-8] + b"\0\0\0\0" + GZIP[-4:],
        "is damaged: .*CRC check failed",
        "ghsync fetch",
    ),
    "gzip with a wrong length": ("a.json.gz", lambda: GZIP[:-4] + b"\0\0\0\1", "is damaged: ", "ghsync fetch"),
    "gzip broken in the middle": (
        "a.json.gz",
        lambda: GZIP[:30] + bytes(255 - byte for byte in GZIP[30:40]) + GZIP[40:],
        "is damaged: ",
        "ghsync fetch",
    ),
    "junk after the gzip": ("a.json.gz", lambda: GZIP + b"junk", "is damaged: .*Not a gzipped file", "ghsync fetch"),
    "second member cut short": ("a.json.gz", lambda: GZIP + GZIP[:-9], "is damaged: ", "ghsync fetch"),
    "gzip without the suffix": (
        "a.json",
        lambda: GZIP,
        "a.json is gzip-compressed but its name does not end in .gz",
        r"Rename it to a\.json\.gz\.",
    ),
    "suffix without gzip": (
        "a.json.gz",
        lambda: LINES,
        "a.json.gz ends in .gz but is not gzip-compressed",
        r"Rename it to a\.json\.",
    ),
    "zip": ("a.json", zipped, "is a zip archive, not JSON lines", "Convert it to JSON lines"),
    "parquet": ("a.json", parquet, "is a Parquet file, not JSON lines", "Convert it to JSON lines"),
    "zstd": ("a.json", lambda: pa.compress(LINES, "zstd", asbytes=True), "is compressed with zstd", "Convert it"),
    "bzip2": ("a.json", lambda: bz2.compress(LINES), "is compressed with bzip2", "Convert it"),
    "xz": ("a.json", lambda: lzma.compress(LINES), "is compressed with xz", "Convert it"),
    "UTF-16": ("a.json", lambda: LINES.decode().encode("utf-16"), "is UTF-16 text", "Convert it .*UTF-8"),
    "UTF-16, big end first": ("a.json", lambda: b"\xfe\xff" + LINES.decode().encode("utf-16-be"), "is UTF-16", "UTF-8"),
    "UTF-16 without a mark": ("a.json", lambda: LINES.decode().encode("utf-16-le"), "is not text: .*NUL", "UTF-8"),
    "UTF-16 in gzip": (
        "a.json.gz",
        lambda: gzipped(LINES.decode().encode("utf-16-be")),
        "is not text: .*NUL",
        "UTF-8",
    ),
    "zeros": ("a.json", lambda: bytes(5_000), "is not text: .*NUL", "UTF-8"),
    "compact array": ("a.json", lambda: json.dumps(EVENTS).encode(), "is one JSON array", r"cat .*a\.json \| jq -c"),
    "compact array, new line at the end": ("a.json", lambda: json.dumps(EVENTS).encode() + b"\n\n", "JSON array", "jq"),
    "compact array in gzip": (
        "a.json.gz",
        lambda: gzipped(json.dumps(EVENTS).encode()),
        "is one JSON array",
        r"gunzip -c .*a\.json\.gz \| jq -c '\.\[\]'",
    ),
    "array of 3 MB on one line": ("a.json", lambda: json.dumps([*EVENTS, "x" * 3_000_000]).encode(), "array", "jq"),
    "array, an event a line": (
        "a.json",
        lambda: b"[" + b",\n".join([LINE] * 3) + b"]\n",
        "is one JSON array",
        "jq",
    ),
    "array of two, an event a line": ("a.json", lambda: b"[" + LINE + b",\n" + LINE + b"\n]", "JSON array", "jq"),
    "array of one, bracket first": ("a.json", lambda: b"[\n" + LINE + b"\n]\n", "is one JSON array", "jq"),
    "pretty array": ("a.json", lambda: json.dumps(EVENTS, indent=2).encode(), "is one JSON array", "jq"),
    "pretty array after a mark": (
        "a.json",
        lambda: b"\xef\xbb\xbf" + json.dumps(EVENTS, indent=1).encode(),
        "array",
        "",
    ),
    "pretty array, CRLF": (
        "a.json",
        lambda: json.dumps(EVENTS, indent=2).replace("\n", "\r\n").encode(),
        "is one JSON array",
        "jq",
    ),
    "pretty objects": (
        "a.json",
        lambda: "\n".join(json.dumps(event, indent=2) for event in EVENTS).encode(),
        "is pretty-printed JSON: an event spans several lines",
        r"cat .*a\.json \| jq -c \.",
    ),
    "one pretty object": ("a.json", lambda: json.dumps(EVENTS[0], indent=4).encode(), "is pretty-printed", "jq -c"),
    "pretty object of 3 MB": (
        "a.json",
        lambda: json.dumps({"x": ["y"] * 300_000}, indent=4).encode(),
        "is pretty-printed",
        "jq -c",
    ),
    "pretty object, its key on the first line": (
        "a.json",
        lambda: b'{ "id": "1",\n  "actor": {\n "id": 1 } }\n',
        "is pretty-printed",
        "jq -c",
    ),
    "pretty object, an object on the second line": ("a.json", lambda: b'{"actor":\n{"id":1}\n}\n', "pretty", "jq -c"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_each_fault_of_a_whole_file_is_one_clear_error(tmp_path: Path, fault: str) -> None:
    name, content, words, way_out = FAULTS[fault]
    path = write(tmp_path / name, content())
    with pytest.raises(InputError, match=words) as caught:
        inspect_file(path, BLOCK)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message + caught.value.way_out
    assert re.search(way_out, caught.value.way_out)


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("a.json", b"", 0),
        ("a.json.gz", b"", 0),
        ("a.json.gz", gzipped(b""), 0),
        ("a.json", b"\n", 1),
        ("a.json", LINE, 1),
        ("a.json", LINES, 2),
        ("a.jsonl", LINES + LINE, 3),
        ("a.json", b"\xef\xbb\xbf" + LINES, 2),
        ("a.json", LINES.replace(b"\n", b"\r\n"), 2),
        ("a.json", LINES.replace(b"\n", b"\r"), 1),
        ("a.json", b"\n\n" + LINES, 4),
        ("a.json.gz", gzipped(LINES), 2),
        ("a.json.gz", gzipped(LINES) + gzipped(LINE), 3),
        ("a.json.gz", gzipped(LINE[:20]) + gzipped(LINE[20:] + b"\n"), 1),
        ("a.json.gz", gzipped(LINES) + bytes(512), 2),
        ("a.json", b"bad line\n" + LINES, 3),
        ("a.json", b"[bad line\n" + LINES, 3),
        ("a.json", b"[1,2]\n" + LINES, 3),
        ("a.json", b"{\n" + LINES, 3),
        ("a.json", b'{"id":"1","actor":\n' + LINES, 3),
        ("a.json", b'{"id":"1","actor":{"id":1,"log\n' + LINES, 3),
        ("a.json", b'{"x":' + b"[" * 100_000 + b"\n" + LINES, 3),
        ("a.json", b"{" + b'"' * 50 + b"\nbad too\n" + LINES, 4),
        ("a.json", b"null\n5\n" + LINES, 4),
        ("a.json", LINE.replace(b"octo", b"o\x00") + b"\n" + LINES, 3),
        ("a.json", b"\xff\n" + LINES, 3),
    ],
)
def test_a_file_of_lines_is_never_refused_for_a_bad_one(tmp_path: Path, name: str, content: bytes, lines: int) -> None:
    path = write(tmp_path / name, content)
    looked_at = inspect_file(path, BLOCK)
    assert (looked_at.path, looked_at.size, looked_at.lines) == (path, len(content), lines)


def test_line_ends_before_each_block_are_counted(tmp_path: Path) -> None:
    content = b"".join(b"x" * (number * 7 % 40) + b"\n" for number in range(1_000))
    found = inspect_file(write(tmp_path / "a.json", content), 512)
    assert found.block_lines == tuple(content[:start].count(b"\n") for start in range(0, len(content) + 1, 512))
    assert found.lines == 1_000


def test_a_compressed_file_is_one_block(tmp_path: Path) -> None:
    assert inspect_file(write(tmp_path / "a.json.gz", GZIP), 512).block_lines == (0,)
