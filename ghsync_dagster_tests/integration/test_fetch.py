"""Fetching real hours, against a real HTTP server on this machine that misbehaves on demand."""

from __future__ import annotations

import gzip
import http.server
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
import stamina

from ghsync_dagster import retry
from ghsync_dagster.dev.fetch import Outcome, expand_hours, fetch_hours
from ghsync_dagster.domain.errors import (
    ConfigError,
    InputError,
    PermanentError,
    RefusedError,
    TransientError,
    UnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.integration

HOUR = "2015-03-01-17"
NAME = f"{HOUR}.json.gz"
LINES = 4_000


def gzipped(content: bytes) -> bytes:
    """Return gzip data that is the same each time, as names of tests are made of it."""
    return gzip.compress(content, mtime=0)


BODY = gzipped("".join(f'{{"id":"{n}","n":{n * 7919 % 1_000_003}}}\n' for n in range(LINES)).encode())
DAMAGED = BODY[:-40] + b"\0" * 40


@dataclass
class Archive:
    """What the server holds, how it fails, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    etag: str | None = '"one"'
    ranges: bool = True
    wrong_range: bool = False
    cuts: int = 0
    damaged: int = 0
    failures: list[int] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    authorization: str | None = None
    url: str = ""


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the archive of its server, with byte ranges."""

    archive: Archive

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name of the base class
        """Keep the test's output clean."""

    def do_GET(self) -> None:
        """Answer one request as the archive says."""
        archive, name = self.archive, self.path.removeprefix("/")
        archive.asked.append((name, self.headers["Range"], self.headers["If-Range"]))
        archive.authorization = self.headers["Authorization"]
        if archive.failures:
            self._empty(archive.failures.pop(0))
        elif name not in archive.files:
            self._empty(404)
        else:
            self._file(archive.files[name])

    def _file(self, body: bytes) -> None:
        archive = self.archive
        if archive.damaged:
            archive.damaged -= 1
            body = DAMAGED
        first = self._first_byte()
        if first is None:
            self.send_response(200)
            first = 0
        elif first >= len(body):
            self._empty(416, {"Content-Range": f"bytes */{len(body)}"})
            return
        else:
            self.send_response(206)
            start = first + archive.wrong_range
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if archive.etag:
            self.send_header("ETag", archive.etag)
        self.send_header("Content-Length", str(len(body) - first))
        self.end_headers()
        if archive.cuts:
            archive.cuts -= 1
            self.wfile.write(body[first : first + (len(body) - first) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self.wfile.write(body[first:])

    def _first_byte(self) -> int | None:
        archive, asked = self.archive, self.headers["Range"]
        if not asked or not archive.ranges or self.headers["If-Range"] != archive.etag:
            return None
        return int(asked.removeprefix("bytes=").removesuffix("-"))

    def _empty(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {**self.archive.headers, **(headers or {}), "Content-Length": "0"}.items():
            self.send_header(key, value)
        self.end_headers()


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> Iterator[Archive]:
    """A server of its own for each test; the waits between tries are left out."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    held = Archive(files={NAME: BODY})
    handler = type("OneArchive", (Handler,), {"archive": held})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        held.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        with stamina.set_testing(True, attempts=100, cap=True):
            yield held
        server.shutdown()
        thread.join()


def leftovers(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".ghsync-fetch.lock"}


def cut_midway(archive: Archive, folder: Path) -> int:
    """Leave a part of the file in the folder, as a process that died would; return its size."""
    archive.cuts = 6
    archive.etag, etag = '"changing"', archive.etag
    archive.ranges = False
    with pytest.raises(UnavailableError):
        fetch_hours([HOUR], folder, base_url=archive.url)
    (folder / f".{NAME}.etag").write_text(etag or "", encoding="ascii")
    archive.etag, archive.ranges = etag, True
    archive.asked.clear()
    return (folder / f".{NAME}.part").stat().st_size


def test_an_hour_is_fetched_whole_and_told(archive: Archive, tmp_path: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    target = tmp_path / "new" / "folder"
    (hour,) = fetch_hours([HOUR], target, base_url=archive.url, progress=lambda *step: told.append(step))
    assert hour.path == target / NAME
    assert hour.path.read_bytes() == BODY
    assert (hour.hour, hour.size, hour.lines, hour.outcome) == (HOUR, len(BODY), LINES, Outcome.DOWNLOADED)
    assert told[-1] == (HOUR, len(BODY), len(BODY))
    assert leftovers(target) == {NAME}


def test_a_connection_cut_midway_is_resumed_by_range(archive: Archive, tmp_path: Path) -> None:
    archive.cuts = 1
    (hour,) = fetch_hours([HOUR], tmp_path, base_url=archive.url)
    assert hour.path.read_bytes() == BODY
    assert hour.outcome is Outcome.RESUMED
    assert archive.asked == [(NAME, None, None), (NAME, f"bytes={len(BODY) // 2}-", '"one"')]
    assert leftovers(tmp_path) == {NAME}


def test_a_later_run_goes_on_where_a_dead_one_stopped(archive: Archive, tmp_path: Path) -> None:
    kept = cut_midway(archive, tmp_path)
    (hour,) = fetch_hours([HOUR], tmp_path, base_url=archive.url)
    assert kept > 0
    assert hour.path.read_bytes() == BODY
    assert archive.asked == [(NAME, f"bytes={kept}-", '"one"')]


def test_a_file_that_changed_meanwhile_is_fetched_from_its_start(archive: Archive, tmp_path: Path) -> None:
    cut_midway(archive, tmp_path)
    archive.etag = '"two"'
    archive.files[NAME] = changed = gzipped(b'{"id":"1"}\n' * 50)
    (hour,) = fetch_hours([HOUR], tmp_path, base_url=archive.url)
    assert hour.path.read_bytes() == changed
    assert hour.outcome is Outcome.DOWNLOADED


def test_a_server_that_ignores_ranges_restarts_the_file(archive: Archive, tmp_path: Path) -> None:
    archive.ranges, archive.cuts = False, 2
    (hour,) = fetch_hours([HOUR], tmp_path, base_url=archive.url)
    assert hour.path.read_bytes() == BODY
    assert hour.outcome is Outcome.DOWNLOADED
    assert len(archive.asked) == 3


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_strong_validator_nothing_is_resumed(archive: Archive, tmp_path: Path, etag: str | None) -> None:
    archive.etag, archive.cuts = etag, 1
    (hour,) = fetch_hours([HOUR], tmp_path, base_url=archive.url)
    assert hour.path.read_bytes() == BODY
    assert archive.asked == [(NAME, None, None)] * 2


def test_another_range_than_asked_for_is_not_appended(archive: Archive, tmp_path: Path) -> None:
    archive.cuts, archive.wrong_range = 1, True
    (hour,) = fetch_hours([HOUR], tmp_path, base_url=archive.url)
    assert hour.path.read_bytes() == BODY
    assert [asked[1] for asked in archive.asked] == [None, f"bytes={len(BODY) // 2}-", None]


def test_a_part_that_is_whole_already_is_only_checked(archive: Archive, tmp_path: Path) -> None:
    (tmp_path / f".{NAME}.part").write_bytes(BODY)
    (tmp_path / f".{NAME}.etag").write_text('"one"', encoding="ascii")
    (hour,) = fetch_hours([HOUR], tmp_path, base_url=archive.url)
    assert hour.path.read_bytes() == BODY
    assert hour.outcome is Outcome.RESUMED
    assert len(archive.asked) == 1


@pytest.mark.parametrize(("part", "etag"), [(BODY + b"too long", '"one"'), (b"x" * 100, "\0\0\0"), (b"y" * 100, None)])
def test_a_useless_part_is_thrown_away(archive: Archive, tmp_path: Path, part: bytes, etag: str | None) -> None:
    (tmp_path / f".{NAME}.part").write_bytes(part)
    if etag:
        (tmp_path / f".{NAME}.etag").write_text(etag, encoding="ascii")
    (hour,) = fetch_hours([HOUR], tmp_path, base_url=archive.url)
    assert hour.path.read_bytes() == BODY
    assert leftovers(tmp_path) == {NAME}


def test_hours_that_are_missing_are_all_named_after_the_others_came(archive: Archive, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no file for 2015-03-01-16, 2015-03-01-18\.") as caught:
        fetch_hours(["2015-03-01-{16..18}"], tmp_path, base_url=archive.url)
    assert isinstance(caught.value, PermanentError)
    assert "Leave these hours out" in caught.value.way_out
    assert leftovers(tmp_path) == {NAME}
    assert len(archive.asked) == 3


def test_a_server_that_is_busy_twice_is_asked_again_and_that_is_told(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(retry.log, "warning", lambda _, *, what, reason, **__: told.append(f"{what}: {reason}"))
    archive.failures = [503, 503]
    (hour,) = fetch_hours([HOUR], tmp_path, base_url=archive.url)
    assert hour.path.read_bytes() == BODY
    assert len(archive.asked) == 3
    assert told == [f"Fetching {NAME}: HTTPStatusError: status 503"] * 2


def test_the_wait_that_a_busy_server_asks_for_is_kept(archive: Archive, tmp_path: Path) -> None:
    archive.failures, archive.headers = [429], {"Retry-After": "1"}
    with stamina.set_testing(False):
        started = time.monotonic()
        (hour,) = fetch_hours([HOUR], tmp_path, base_url=archive.url)
    assert hour.path.read_bytes() == BODY
    assert time.monotonic() - started >= 1


def test_a_server_that_stays_broken_is_a_transient_error(archive: Archive, tmp_path: Path) -> None:
    archive.failures = [500] * 50
    with pytest.raises(UnavailableError, match=f"answers 500 for {NAME}") as caught:
        fetch_hours([HOUR], tmp_path, base_url=archive.url)
    assert isinstance(caught.value, TransientError)
    assert len(archive.asked) == 6


def test_a_server_that_is_away_is_a_transient_error_and_keeps_the_part(archive: Archive, tmp_path: Path) -> None:
    kept = cut_midway(archive, tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        with pytest.raises(UnavailableError, match="it goes on where it stopped"):
            fetch_hours([HOUR], tmp_path, base_url=f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert (tmp_path / f".{NAME}.part").stat().st_size == kept


def test_a_refusal_is_not_tried_again(archive: Archive, tmp_path: Path) -> None:
    archive.failures = [403] * 5
    with pytest.raises(RefusedError, match="status 403"):
        fetch_hours([HOUR], tmp_path, base_url=archive.url)
    assert len(archive.asked) == 1


def test_a_file_that_came_damaged_once_is_fetched_again(archive: Archive, tmp_path: Path) -> None:
    archive.damaged = 1
    (hour,) = fetch_hours([HOUR], tmp_path, base_url=archive.url)
    assert hour.path.read_bytes() == BODY
    assert archive.asked == [(NAME, None, None)] * 2


@pytest.mark.parametrize("body", [DAMAGED, BODY[:-9], b"", b"<html>no gzip</html>", BODY + b"trailing", gzipped(b"")])
def test_a_file_that_is_always_damaged_is_an_error_and_leaves_nothing(
    archive: Archive, tmp_path: Path, body: bytes
) -> None:
    archive.files[NAME] = body
    with pytest.raises(InputError, match=f"{NAME} from .* is damaged") as caught:
        fetch_hours([HOUR], tmp_path, base_url=archive.url)
    assert "mirror" in caught.value.way_out
    assert leftovers(tmp_path) == set()
    assert len(archive.asked) == 2


def test_a_whole_file_is_kept_without_a_request(archive: Archive, tmp_path: Path) -> None:
    fetch_hours([HOUR], tmp_path, base_url=archive.url)
    archive.asked.clear()
    (hour,) = fetch_hours([HOUR], tmp_path, base_url=archive.url)
    assert (hour.outcome, hour.lines, hour.size) == (Outcome.KEPT, LINES, len(BODY))
    assert archive.asked == []


def test_a_stored_file_that_is_damaged_is_fetched_again(archive: Archive, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(BODY[: len(BODY) // 2])
    (hour,) = fetch_hours([HOUR], tmp_path, base_url=archive.url)
    assert hour.path.read_bytes() == BODY
    assert hour.outcome is Outcome.DOWNLOADED


def test_two_fetches_at_once_fetch_each_file_once(archive: Archive, tmp_path: Path) -> None:
    outcomes: list[Outcome] = []

    def fetch() -> None:
        outcomes.extend(hour.outcome for hour in fetch_hours([HOUR], tmp_path, base_url=archive.url))

    threads = [threading.Thread(target=fetch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcome.value for outcome in outcomes) == ["downloaded", "kept", "kept"]
    assert len(archive.asked) == 1


def test_credentials_of_a_mirror_are_sent_and_never_shown(archive: Archive, tmp_path: Path) -> None:
    url = archive.url.replace("http://", "http://app:s3cret@")
    fetch_hours([HOUR], tmp_path, base_url=url)
    assert (archive.authorization or "").startswith("Basic ")
    for failures in ([403], [500] * 6, []):
        archive.failures = failures
        with pytest.raises((RefusedError, UnavailableError, InputError)) as caught:
            fetch_hours(["2015-03-01-1"], tmp_path, base_url=url)
        assert "s3cret" not in str(caught.value)


def test_a_mirrors_folder_is_part_of_the_url(archive: Archive, tmp_path: Path) -> None:
    archive.files[f"mirror/gh/{NAME}"] = archive.files.pop(NAME)
    (hour,) = fetch_hours([HOUR], tmp_path, base_url=f"{archive.url}/mirror/gh/")
    assert hour.path.read_bytes() == BODY


@pytest.mark.parametrize("url", ["", "data.gharchive.org", "ftp://host/x", "http://", "http://host:port"])
def test_what_is_no_url_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match="is not a URL to fetch from"):
        fetch_hours([HOUR], tmp_path / "new", base_url=url)
    assert not (tmp_path / "new").exists()


def test_a_target_that_is_no_folder_is_one_clear_error(archive: Archive, tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="can't be used"):
        fetch_hours([HOUR], target, base_url=archive.url)


def test_ranges_name_their_hours_in_order_and_once() -> None:
    assert expand_hours(["2015-03-01-{9..11}", "2015-03-01-10", "2015-03-01-07"]) == [
        "2015-03-01-9", "2015-03-01-10", "2015-03-01-11", "2015-03-01-7",
    ]  # fmt: skip
    assert expand_hours(["2015-02-{27..28}-{0..1}"]) == [
        "2015-02-27-0", "2015-02-27-1", "2015-02-28-0", "2015-02-28-1",
    ]  # fmt: skip
    assert len(expand_hours(["2015-01-{01..31}-{0..23}"])) == 744


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("", "not of that form"),
        ("2015-03-01", "not of that form"),
        ("2015-3-1-17", "not of that form"),
        ("2015-03-01T17", "not of that form"),
        ("2015-03-01-17/../x", "not of that form"),
        ("2015-03-01-17\n", "not of that form"),
        ("2015-03-01-{0..}", "not of that form"),
        ("2015-03-01-24", "hours of a day are 0 to 23"),
        ("2015-03-01-{0..24}", "hours of a day are 0 to 23"),
        ("2015-03-01-{5..4}", "runs backwards"),
        ("2015-02-30-1", "2015-02 has no day 30"),
        ("2015-02-{01..31}-1", "2015-02 has no day 29"),
        ("2015-13-01-1", "2015-13 has no day 01"),
        ("2014-12-31-23", "another shape"),
    ],
)
def test_a_malformed_hour_is_refused_before_anything_is_asked(
    archive: Archive, tmp_path: Path, argument: str, reason: str
) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        fetch_hours([HOUR, argument], tmp_path / "new", base_url=archive.url)
    assert "YYYY-MM-DD-H" in caught.value.way_out
    assert archive.asked == []
    assert not (tmp_path / "new").exists()
