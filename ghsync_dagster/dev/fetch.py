"""Real hours: downloads GH Archive's files, each whole or not at all.

Belongs here: the hours of an argument, the download, its resumption and its verification. Not here: the reading of
events.

An unfinished download of ``HOUR.json.gz`` has two hidden files: ``.part``, the bytes so far, and ``.etag``, the
server's validator of exactly these bytes. A download is resumed only with both.
"""

from __future__ import annotations

import gzip
import os
import re
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from enum import Enum
from typing import TYPE_CHECKING, NoReturn

from ghsync_dagster.domain.errors import ConfigError, InputError, RefusedError, UnavailableError
from ghsync_dagster.logging import get_logger, redact
from ghsync_dagster.retry import retrying

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import BinaryIO

    import httpx

    Progress = Callable[[str, int, int | None], None]

ARCHIVE_URL = "https://data.gharchive.org"
_FIRST_DAY = date(2015, 1, 1)
_FORM = "Write YYYY-MM-DD-H such as 2015-03-01-17, or a range such as 2015-03-01-{0..23} or 2015-03-{01..31}-{0..23}."
_HOUR = re.compile(
    r"(?P<year>[0-9]{4})-(?P<month>[0-9]{2})"
    r"-(?:(?P<day>[0-9]{2})|\{(?P<day_from>[0-9]{2})\.\.(?P<day_to>[0-9]{2})\})"
    r"-(?:(?P<hour>[0-9]{1,2})|\{(?P<hour_from>[0-9]{1,2})\.\.(?P<hour_to>[0-9]{1,2})\})"
)
_STRONG_ETAG = re.compile(r'"[\x21\x23-\x7e]+"')  # a weak one (W/) does not promise the same bytes
_ATTEMPTS = 6
_LONGEST_RETRY_AFTER = 60.0
_BLOCK = 1 << 20

_logger = get_logger("fetch")


class Outcome(Enum):
    """How the file of an hour got into the folder."""

    DOWNLOADED = "downloaded"
    RESUMED = "resumed"
    KEPT = "kept"


@dataclass(frozen=True, slots=True)
class FetchedHour:
    """One verified file.

    Attributes:
        hour: Such as ``2015-03-01-17``.
        path: The gzip file.
        size: Its bytes.
        lines: Lines in it, once unpacked.
        outcome: Downloaded from the start, resumed, or kept.
    """

    hour: str
    path: Path
    size: int
    lines: int
    outcome: Outcome


def expand_hours(hours: list[str]) -> list[str]:
    """Return the hours of the arguments, in their order, each once.

    Raises:
        InputError: An argument is malformed, or names no hour of GH Archive's events.
    """
    return list(dict.fromkeys(hour for argument in hours for hour in _hours_of(argument)))


def fetch_hours(
    hours: list[str],
    target: Path,
    *,
    base_url: str = ARCHIVE_URL,
    progress: Progress | None = None,
) -> list[FetchedHour]:
    """Download hours of GitHub events into a folder; a second call resumes the first.

    Args:
        hours: ``YYYY-MM-DD-H`` in UTC, or ranges ``YYYY-MM-DD-{0..23}`` and ``YYYY-MM-{01..31}-{0..23}``.
        target: The folder, made if it is missing. A whole file in it is verified and kept.
        base_url: GH Archive, or a mirror with the same file names.
        progress: Called with the hour, its bytes so far, and its total bytes if the server reports them.

    Returns:
        One entry for each hour, in the given order.

    Raises:
        InputError: An argument is malformed; the server lacks hours (the others are fetched first); a file arrives
            damaged twice.
        ConfigError: ``base_url`` is not a URL, or ``target`` can't be written.
        RefusedError: The server refuses.
        UnavailableError: The server can't be reached or keeps failing.
    """
    wanted = expand_hours(hours)
    with _client(base_url) as client:
        try:
            target.mkdir(parents=True, exist_ok=True)
            with _alone_in(target):
                return _fetch_all(client, wanted, target, progress)
        except OSError as error:
            raise ConfigError(
                f"{target} can't be used ({error.strerror or type(error).__name__}).",
                way_out="Name a folder that can be written to and has room.",
            ) from error


@contextmanager
def _alone_in(target: Path) -> Iterator[None]:
    """Lock the folder: two downloads into one part file would mix their bytes."""
    from filelock import FileLock, Timeout

    lock = FileLock(target / ".ghsync-fetch.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _logger.info("waiting for another fetch into this folder", folder=str(target))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch_all(client: httpx.Client, hours: list[str], target: Path, progress: Progress | None) -> list[FetchedHour]:
    fetched, missing = [], []
    for hour in hours:
        try:
            fetched.append(_Download(client, hour, target, progress).run())
        except _MissingError:
            missing.append(hour)
    if missing:
        raise InputError(
            f"{redact(str(client.base_url))} has no file for {', '.join(missing)}.",
            way_out="Leave these hours out: GH Archive has gaps, and an hour appears some minutes after its end (UTC).",
        )
    return fetched


def _hours_of(argument: str) -> Iterator[str]:
    match = _HOUR.fullmatch(argument.removesuffix(".json.gz"))
    if match is None:
        _malformed(argument, "it is not of that form")
    for day in _numbers(match, "day", argument):
        try:
            at = date(int(match["year"]), int(match["month"]), day)
        except ValueError:
            _malformed(argument, f"{match['year']}-{match['month']} has no day {day:02}")
        if at < _FIRST_DAY:
            _malformed(argument, f"events before {_FIRST_DAY} have another shape, without an actor record")
        for hour in _numbers(match, "hour", argument):
            if hour > 23:
                _malformed(argument, "the hours of a day are 0 to 23")
            yield f"{at}-{hour}"


def _numbers(match: re.Match[str], part: str, argument: str) -> range:
    if match[part] is not None:
        return range(int(match[part]), int(match[part]) + 1)
    first, last = int(match[f"{part}_from"]), int(match[f"{part}_to"])
    if first > last:
        _malformed(argument, f"the range {first}..{last} runs backwards")
    return range(first, last + 1)


def _malformed(argument: str, reason: str) -> NoReturn:
    raise InputError(f"{argument!r} names no hour to fetch: {reason}.", way_out=_FORM)


def _client(base_url: str) -> httpx.Client:
    """Return a client of the archive; credentials in the URL are sent as a header and never shown."""
    import httpx

    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in {"http", "https"} or not url.host:
        raise ConfigError(
            f"{redact(base_url)} is not a URL to fetch from.", way_out=f"Give http(s)://host/folder, or {ARCHIVE_URL}."
        )
    return httpx.Client(
        auth=(url.username, url.password) if url.username else None,
        base_url=url.copy_with(userinfo=b""),
        follow_redirects=True,
        headers={"Accept-Encoding": "identity"},  # the file itself is gzip: no second encoding
        timeout=httpx.Timeout(30, connect=10),
    )


class _MissingError(Exception):
    """The server has no such file."""


class _Download:
    """The download of one hour."""

    def __init__(self, client: httpx.Client, hour: str, target: Path, progress: Progress | None) -> None:
        self._client = client
        self._hour = hour
        self._name = f"{hour}.json.gz"
        self._final = target / self._name
        self._part = target / f".{self._name}.part"
        self._etag = target / f".{self._name}.etag"
        self._progress = progress
        self._resumed = False

    def run(self) -> FetchedHour:
        """Return the verified file, from the folder or from the server."""
        if self._final.exists():
            lines = count_lines(self._final)
            if lines is not None:
                self._discard()
                return self._fetched(lines, Outcome.KEPT)
            _logger.warning("damaged file removed, fetched again", file=str(self._final))
            self._final.unlink()
        for _ in range(2):
            self._complete()
            lines = count_lines(self._part)
            if lines is not None:
                return self._publish(lines)
            _logger.warning("download came damaged, removed", hour=self._hour, size=self._part.stat().st_size)
            self._discard()
        raise InputError(
            f"{self._name} from {self._client.base_url} is damaged: it came twice, and is no whole gzip file.",
            way_out="Try again later or fetch it from a mirror; leave the hour out until then.",
        )

    def _complete(self) -> None:
        """Download the whole body into the part file, with retries."""
        import httpx

        try:
            retrying(f"Fetching {self._name}", self._receive, attempts=_ATTEMPTS, retry_on=_retry_wait)
        except httpx.HTTPStatusError as error:
            self._refused(error.response.status_code)
        except httpx.RequestError as error:
            raise UnavailableError(
                f"{self._name} can't be fetched from {self._client.base_url} ({type(error).__name__}: {error}).",
                way_out="Check the network and run the command again: it goes on where it stopped.",
            ) from error

    def _refused(self, status: int) -> NoReturn:
        if status == 404:
            raise _MissingError from None
        if _is_transient(status):
            raise UnavailableError(
                f"{self._client.base_url} answers {status} for {self._name}, again and again.",
                way_out="Run the command again later: it goes on where it stopped.",
            ) from None
        raise RefusedError(
            f"{self._client.base_url} refuses {self._name} with status {status}.",
            way_out="Check the URL and the rights it needs, or leave the base URL out to use GH Archive.",
        ) from None

    def _receive(self) -> None:
        """Send one request, and append its answer to the part file or overwrite that."""
        import httpx

        offset, headers = self._resumption()
        with self._client.stream("GET", f"/{self._name}", headers=headers) as response:
            if response.status_code == 416 and offset:
                if response.headers.get("Content-Range") == f"bytes */{offset}":
                    self._resumed = True
                    return  # the part is complete: the last try ended between the last byte and the check
                self._discard()
            if response.status_code == 206 and not (offset and _continues(response, offset)):
                self._discard()
                raise httpx.RemoteProtocolError(
                    "the answer has another range than the request", request=response.request
                )
            if not response.is_success:
                # The library's own message has the URL, and a redirect's URL may contain a signature.
                text = f"status {response.status_code}"
                raise httpx.HTTPStatusError(text, request=response.request, response=response)
            self._resumed = response.status_code == 206
            if not self._resumed:
                offset = 0
                self._start(response)
            self._store(response, offset)

    def _resumption(self) -> tuple[int, dict[str, str]]:
        """Return how many bytes are kept, and the headers that request the rest of the very same file."""
        if not (self._part.exists() and self._etag.exists()):
            return 0, {}
        offset, etag = self._part.stat().st_size, self._etag.read_text(encoding="ascii", errors="replace")
        if not offset or not _STRONG_ETAG.fullmatch(etag):
            return 0, {}
        return offset, {"Range": f"bytes={offset}-", "If-Range": etag}

    def _start(self, response: httpx.Response) -> None:
        """Empty the part file, then store the validator of its coming content: in this order a crash is safe."""
        self._etag.unlink(missing_ok=True)
        self._part.write_bytes(b"")
        etag = response.headers.get("ETag", "")
        if _STRONG_ETAG.fullmatch(etag):
            self._etag.write_text(etag, encoding="ascii")

    def _store(self, response: httpx.Response, offset: int) -> None:
        length = response.headers.get("Content-Length", "")
        total = offset + int(length) if length.isdecimal() else None
        with self._part.open("ab") as file:
            for block in response.iter_raw():
                file.write(block)
                offset += len(block)
                if self._progress is not None:
                    self._progress(self._hour, offset, total)
            _sync(file)

    def _publish(self, lines: int) -> FetchedHour:
        self._part.replace(self._final)
        self._etag.unlink(missing_ok=True)
        _sync_folder(self._final.parent)
        return self._fetched(lines, Outcome.RESUMED if self._resumed else Outcome.DOWNLOADED)

    def _discard(self) -> None:
        self._etag.unlink(missing_ok=True)
        self._part.unlink(missing_ok=True)

    def _fetched(self, lines: int, outcome: Outcome) -> FetchedHour:
        size = self._final.stat().st_size
        _logger.info("hour is there", hour=self._hour, outcome=outcome.value, size=size, lines=lines)
        return FetchedHour(self._hour, self._final, size, lines, outcome)


def count_lines(path: Path) -> int | None:
    """Unpack a whole gzip file by block; return its number of lines, or None if it is damaged or empty."""
    lines, last = 0, b""
    try:
        with gzip.open(path) as file:
            while block := file.read(_BLOCK):
                lines += block.count(b"\n")
                last = block[-1:]
    except (EOFError, gzip.BadGzipFile, zlib.error):
        return None
    return lines + (last != b"\n") if last else None


def _is_transient(status: int) -> bool:
    return status >= 500 or status in {408, 416, 429}


def _retry_wait(error: Exception) -> bool | float:
    """Return whether to retry, or after how many seconds if the server says it."""
    import httpx

    if isinstance(error, httpx.HTTPStatusError):
        after = error.response.headers.get("Retry-After", "")
        if _is_transient(error.response.status_code) and after.isdecimal():
            return min(float(after), _LONGEST_RETRY_AFTER)
        return _is_transient(error.response.status_code)
    return isinstance(error, httpx.TransportError) and not isinstance(error, httpx.UnsupportedProtocol)


def _continues(response: httpx.Response, offset: int) -> bool:
    return str(response.headers.get("Content-Range", "")).startswith(f"bytes {offset}-")


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
