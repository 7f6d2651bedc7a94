"""Which files a run reads, which it leaves out and why, and whether each is of a kind that can be read.

Belongs here: paths, names, and the look at the head of each file, all before any Spark starts. Not here: the content
beyond the head, which the workers read (``batch.decide``), nor how bytes are unpacked (``batch.unpack``).
"""

from __future__ import annotations

import contextlib
import errno
import glob
import io
import os
import re
import shlex
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Final
from urllib.parse import unquote, urlsplit

from ghsync_dagster.batch.heads import ENDINGS, has_lines
from ghsync_dagster.batch.reports import LeftOut
from ghsync_dagster.batch.unpack import DamagedError, as_utf8, is_utf16, packing_of, unpacked
from ghsync_dagster.batch.versions import FileState, InputState, state_of
from ghsync_dagster.domain.errors import InputError, shown

KNOWN_NAMES: Final = "NAME.json, .jsonl or .ndjson, with or without .gz, .gzip, .bz2 or .zst, or part-*"
OWN_FOLDERS: Final = ("batch", "connect", "dagster", "kafka", "mongo", "mysql", "spark")
"""What GHSYNC_HOME holds, where the events are in it too."""

_NAMED: Final = 20
_FAULTS_SHOWN: Final = 5
_PATHS_SHOWN: Final = 5
_HEAD: Final = 1 << 16
_LONG_HEAD: Final = 1 << 21
_KNOWN: Final = re.compile(
    r".*\.(json|jsonl|ndjson)(\.(gz|gzip|bz2|zst))?|part-[\w-]+(\.c\d+)?(\.txt)?(\.(gz|gzip|bz2|zst))?",
    re.IGNORECASE | re.DOTALL,
)
_HOUR: Final = re.compile(r"//data\.gharchive\.org/([0-9-]+(?:\{[0-9]+\.\.[0-9]+\})?)\.json\.gz$")
_STORES: Final = {"s3": "s3", "s3a": "s3", "s3n": "s3", "gs": "gs"}
_MAGIC: Final = re.compile(r"[*?[]")
_BRACES: Final = re.compile(r"\{[^{}]*(,|\.\.)[^{}]*\}")
_SEVERAL: Final = re.compile(r"[,;:\s]")
_A_LIST: Final = 'a JSON list, ["a.json", "b.json"].'
_SCHEME: Final = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_HIDDEN: Final = "hidden: the name begins with a dot or an underscore"
_UNKNOWN: Final = f"the name is not of the kind {KNOWN_NAMES}"
_OWN: Final = "ghsync's own state"
_EMPTY: Final = "empty"


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file that has been looked at.

    Attributes:
        state: What tells its content, from before the look.
        packing: ``gzip``, ``bzip2``, ``zstd``, or None for a plain file.
        is_utf16: Whether its text is UTF-16, by its byte order mark.
        has_lines: Whether an event is a line; else it is an object of a JSON array, or of objects one after the other.
    """

    state: FileState
    packing: str | None = None
    is_utf16: bool = False
    has_lines: bool = True

    @property
    def path(self) -> str:
        """Absolute path."""
        return self.state.path

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self.state.size


@dataclass(slots=True)
class Found:
    """The files that paths name.

    Attributes:
        events_paths: The paths, as they were given.
        files: What tells the content of each file to read, by absolute path, sorted.
        left_out: Every other file that the paths name, by reason.
        looked: How many files have been looked at so far.
    """

    events_paths: Sequence[str] = ()
    files: dict[str, FileState] = field(default_factory=dict)
    left_out: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    looked: int = 0

    @property
    def state(self) -> InputState:
        """The state of all files to read."""
        return InputState(tuple(self.files.values()))

    def look(self) -> list[InputFile]:
        """Look at the head of each file to read; those whose packing holds nothing are left out as empty.

        Raises:
            InputError: Files are of another kind, damaged from their start on, or unreadable; or none is left.
        """
        files: list[InputFile] = []
        refused: list[InputError] = []
        for path, state in self.files.items():
            try:
                file = look_at(state)
            except InputError as error:
                refused.append(error)
            else:
                if file is not None:
                    files.append(file)
                else:
                    self.left_out[_EMPTY].append(path)
            self.looked += 1
        if refused:
            raise together(refused)
        if not files:
            raise _nothing(self)
        return files

    def report(self) -> list[LeftOut]:
        """Return what is left out: for each reason how many, and the first names."""
        return [
            LeftOut(reason, len(set(names)), [shown(name) for name in sorted(set(names))[:_NAMED]])
            for reason, names in self.left_out.items()
        ]


def find_files(events_paths: Sequence[str], home: Path | None = None) -> Found:
    """Return the files that paths, folders and globs name, each once, however often it is named.

    Folders, also those that a glob matches or a link leads to, are searched to any depth. A folder, a glob and a list
    of the same files agree: a name alone decides whether a file is read or left out, but for an empty one.

    Args:
        events_paths: Files, folders or globs.
        home: GHSYNC_HOME, which is never input.

    Raises:
        InputError: Nothing is there, nothing that can be read, a link to nothing, or a name that is not UTF-8.
    """
    found = Found(events_paths)
    for spec in events_paths:
        search = _Search(found, home)
        try:
            search.take(spec)
        except (OSError, RuntimeError, ValueError) as error:
            # RuntimeError: the home folder of ~user is not known. ValueError: a name that no file can have.
            raise InputError(
                f"{spec} can't be looked at ({getattr(error, 'strerror', None) or error}).",
                way_out="Correct the path, or the permissions of its folders.",
            ) from None
        if not search.entries:
            raise InputError(
                f"{_absolute(spec)} has no file.",
                way_out="Name a folder with GH Archive files, or get some: ghsync fetch 2015-01-01-15.",
            )
    if not found.files:
        raise _nothing(found)
    if refused := [
        InputError(f"{path} has a name that is not UTF-8.", way_out="Rename it, then run again.")
        for path in found.files
        if path != shown(path)
    ]:
        raise together(refused)
    found.files = dict(sorted(found.files.items()))
    return found


def _absolute(spec: str) -> str:
    return os.path.abspath(Path(spec).expanduser())  # noqa: PTH100  not through links: the user's own words


def _nothing(found: Found) -> InputError:
    where = ", ".join(_absolute(spec) for spec in found.events_paths[:_PATHS_SHOWN])
    where += ", ..." if len(found.events_paths) > _PATHS_SHOWN else ""
    named = [name for names in found.left_out.values() for name in names]
    one = len(named) == 1 and named[0] == shown(named[0]) and Path(named[0]).is_file()
    if one and set(found.left_out) == {_UNKNOWN}:
        # One of another kind is told by its kind; what can be read needs another name only.
        look_at(state_of(named[0], Path(named[0]).stat()))
        return InputError(
            f"{named[0]}: {_UNKNOWN}.", way_out=f"Rename it: mv {shlex.quote(named[0])} {_renamed(named[0])}"
        )
    reasons = "; ".join(f"{len(set(names))} left out, {reason}" for reason, names in found.left_out.items())
    ways = {
        _UNKNOWN: "rename files of events so",
        _HIDDEN: "rename files of events so that the name begins with a letter",
        _EMPTY: "get empty files again (an hour of GH Archive may really be empty)",
        _OWN: "name another folder: ghsync keeps its state there",
    }
    way_out = "; ".join(ways[reason] for reason in found.left_out)
    return InputError(f"{where} has no file to read ({reasons}).", way_out=f"{way_out[0].upper()}{way_out[1:]}.")


def _renamed(path: str) -> str:
    return shlex.quote(f"{path}.jsonl{ENDINGS[packing_of(_head(path, 8))]}")


class _Search:
    """The search below one path; folders that a link leads back to are searched once.

    Args:
        found: Takes what is found.
        home: GHSYNC_HOME.
    """

    def __init__(self, found: Found, home: Path | None) -> None:
        self.entries = 0
        self._found = found
        self._home = os.path.realpath(home) if home else None
        self._own: frozenset[str] = frozenset()
        self._searched: set[str] = set()

    def take(self, spec: str) -> None:
        """Take what a path, a folder or a glob names."""
        if scheme := _SCHEME.match(spec):
            raise _no_path(spec, scheme.group(1).lower())
        path = _absolute(spec)
        real = os.path.realpath(path)
        if os.path.isdir(real):  # noqa: PTH112  a stat less for each of many files
            self._set_own(real)
            self._folder(path, real)
        elif os.path.isfile(real):  # noqa: PTH113
            self._set_own(real)
            self._file(path, real)
        elif glob.has_magic(spec):
            self._glob(path, spec)
        else:
            # Raises where there is one that may not be looked at.
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.stat(path)  # noqa: PTH116
            raise InputError(
                f"There is no file or folder {path}.",
                way_out=_meant(spec) or "Correct the path, or run `ghsync sample` to write the sample.",
            )

    def _set_own(self, root: str) -> None:
        """Say what is ghsync's own below a root: all of its home, or where the root is in there, what home holds."""
        if self._home:
            inside = _is_in(root, (self._home,))
            self._own = frozenset(f"{self._home}/{name}" for name in OWN_FOLDERS) if inside else frozenset({self._home})

    def _glob(self, pattern: str, spec: str) -> None:
        plain = pattern
        while glob.has_magic(plain):
            plain = os.path.dirname(plain)  # noqa: PTH120
        self._set_own(os.path.realpath(plain))
        matches = glob.glob(pattern, recursive=True, include_hidden=True)  # noqa: PTH207  absolute
        if not matches:
            raise InputError(f"No file matches {pattern}.", way_out=_meant(spec) or "Correct the glob.")
        for path in sorted(matches):
            above = _hidden_above(path, plain)
            real = os.path.realpath(path)
            if above is not None:
                self._leave_out(_HIDDEN, above)
            elif os.path.isdir(real):  # noqa: PTH112
                self._folder(path, real)
            else:
                self._entry(path, real)

    def _folder(self, path: str, real: str) -> None:
        if real in self._searched:
            return
        self._searched.add(real)
        if self._is_own(real):
            return
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                is_link = entry.is_symlink()
                inner = os.path.realpath(entry.path) if is_link else f"{real}/{entry.name}"
                if os.path.isdir(inner) if is_link else entry.is_dir():  # noqa: PTH112
                    if _is_hidden(entry.name):
                        self._leave_out(_HIDDEN, f"{entry.path}/")
                    else:
                        self._folder(entry.path, inner)
                elif not is_link and entry.is_file():
                    self._file(entry.path, inner, entry.stat())
                else:
                    self._entry(entry.path, inner)

    def _entry(self, path: str, real: str) -> None:
        """Take what is no folder; what is no file either raises where its name says events, and is named elsewhere."""
        name = os.path.basename(path)  # noqa: PTH119
        if os.path.isfile(real) or _is_hidden(name):  # noqa: PTH113
            self._file(path, real)
        elif os.path.islink(path):  # noqa: PTH114
            # Through more links than the system follows, in a circle: a shorter path leads to the same file.
            if not _leads_to_something(path):
                raise InputError(
                    f"{path} is a link to nothing.", way_out="Mount or correct what it leads to, or remove the link."
                )
        elif (reason := _reason(name)) is not None:
            self._leave_out(reason, path)
        else:
            raise InputError(f"{path} is no regular file.", way_out="Remove it, or name the files by a glob.")

    def _file(self, path: str, real: str, seen: os.stat_result | None = None) -> None:
        if self._is_own(real):
            return
        reason = _reason(path.rpartition("/")[2])
        if reason is None:
            seen = seen or os.stat(real)  # noqa: PTH116
            if seen.st_size:
                # By links a file may be found more than once.
                self._found.files[real] = state_of(real, seen)
                self.entries += 1
                return
            reason = _EMPTY
        self._leave_out(reason, path)

    def _is_own(self, real: str) -> bool:
        """Tell whether something is ghsync's own state, and leave that out, as one folder."""
        for folder in self._own:
            if _is_in(real, (folder,)):
                self._leave_out(_OWN, f"{folder}/")
                return True
        return False

    def _leave_out(self, reason: str, path: str) -> None:
        self._found.left_out[reason].append(path)
        self.entries += 1


def _meant(spec: str) -> str | None:
    """Return the way out of what shells and lists would be and no path is; None where it looks like one path."""
    if _BRACES.search(spec):
        return "Braces are for `ghsync fetch`: name the folder, a glob as hours/2015-03-01-*.json.gz, or " + _A_LIST
    if spec.lstrip().startswith("[") or _SEVERAL.search(spec):
        return "Correct the path; for several, name the folder, a glob or " + _A_LIST
    return None


def _leads_to_something(path: str) -> bool:
    try:
        Path(path).resolve(strict=True)
    except (OSError, RuntimeError):
        return False
    return True


def _is_in(path: str, folders: Iterable[str]) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders)


def _reason(name: str) -> str | None:
    """Return why a file of this name is left out."""
    if _is_hidden(name):
        return _HIDDEN
    return None if _KNOWN.fullmatch(name) else _UNKNOWN


def _is_hidden(name: str) -> bool:
    """Tell whether Spark takes a name for no data: ``_name=value`` is a partition."""
    return name.startswith(".") or (name.startswith("_") and "=" not in name)


def _hidden_above(path: str, plain: str) -> str | None:
    """Return the first hidden folder on the way from a glob's plain part to a path, the path itself included."""
    at = plain.rstrip("/")
    for part in path[len(at) :].strip("/").split("/"):
        at = f"{at}/{part}"
        if _is_hidden(part) and os.path.isdir(at):  # noqa: PTH112
            return f"{at}/"
    return None


def _no_path(spec: str, scheme: str) -> InputError:
    if scheme == "file":
        way_out = f"Name the path itself: {unquote(urlsplit(spec).path)}"
    elif hour := _HOUR.search(spec):
        way_out = f"Get it first: ghsync fetch {hour.group(1)} ; then name the file."
    elif scheme in ("http", "https"):
        name = PurePosixPath(unquote(urlsplit(spec).path)).name
        name = name if _KNOWN.fullmatch(name) else "events.json"
        way_out = f"Get it first: curl -gfLo {shlex.quote(name)} {shlex.quote(spec)} ; then name the file."
    elif (store := _STORES.get(scheme)) is not None:
        way_out = f"Get it first: mkdir -p events && {_copy(store, spec)} ; then name the folder events."
    else:
        way_out = "Copy the files to a folder of this machine, or mount them; then name the folder."
    return InputError(f"{spec} is an address; ghsync reads files of this machine.", way_out=way_out)


def _copy(store: str, spec: str) -> str:
    """Return the command that copies one file, what matches a glob, or a folder from a store to the folder events."""
    rest = spec.partition("://")[2].rstrip("/")
    has_magic = glob.has_magic(rest)
    one = "/" in rest and not has_magic and _KNOWN.fullmatch(rest.rpartition("/")[2])
    url = shlex.quote(f"{store}://{rest}")
    if store == "gs":
        return f"gcloud storage cp {'' if one or has_magic else '--recursive '}{url} events/"
    if one:
        return f"aws s3 cp {url} events/"
    if not has_magic:
        return f"aws s3 cp --recursive {url} events/"
    # aws knows globs as filters alone.
    folder = _MAGIC.split(rest)[0].rpartition("/")[0]
    pattern = shlex.quote(rest[len(folder) + 1 :])
    return f"aws s3 cp --recursive {shlex.quote(f's3://{folder}/')} events/ --exclude '*' --include {pattern}"


def look_at(state: FileState) -> InputFile | None:
    """Look at the head of a file: how it is packed, how its text is encoded, and what its events stand in.

    Args:
        state: The file, as it was found.

    Returns:
        What was seen; None: there is nothing in it.

    Raises:
        InputError: The file is damaged from its start on, or of a kind that can't be read.
    """
    path, size = state.path, state.size
    head = _head(path, _HEAD)
    packing = packing_of(head)
    try:
        text = _first(head, packing, is_whole=len(head) == size)
        # A line that is longer, or a block that is packed as one, says nothing yet.
        if len(head) == _HEAD and (b"\n" not in text if packing is None else not text):
            head = _head(path, _LONG_HEAD)
            text = _first(head, packing, is_whole=len(head) == size)
        utf16 = is_utf16(text)
        if utf16:
            text = _drained(as_utf8([text]), is_whole=len(head) == size)
    except DamagedError as error:
        raise damaged(path, str(error)) from None
    if not text and len(head) < size:
        raise damaged(path, f"its {packing} data holds nothing in {len(head)} bytes")
    return InputFile(state, packing, utf16, has_lines(path, packing, text)) if text else None


def open_file(path: str, buffering: int = -1) -> IO[bytes]:
    """Open a regular file for reading; never wait for one that is none, such as a pipe that nobody writes to.

    Raises:
        OSError: It can't be opened, or is no regular file.
    """
    return open(path, "rb", buffering, opener=_open_regular)


def _open_regular(path: str, flags: int) -> int:
    number = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "no regular file")
    return number


def _head(path: str, size: int) -> bytes:
    try:
        # Unbuffered: there may be very many files.
        with open_file(path, buffering=0) as raw:
            return raw.read(size) or b""
    except OSError as error:
        raise unreadable(path, error) from None


def _first(head: bytes, packing: str | None, *, is_whole: bool) -> bytes:
    return _drained(unpacked(io.BytesIO(head), packing), is_whole=is_whole) if packing else head


def _drained(parts: Iterator[bytes], *, is_whole: bool) -> bytes:
    """Return what the head of a file becomes; that it ends there is no damage where the file goes on."""
    taken: list[bytes] = []
    try:
        for part in parts:
            taken.append(part)  # noqa: PERF402  what came before the end counts
    except DamagedError as error:
        if is_whole or (not taken and "early" not in str(error)):
            raise
    return b"".join(taken)


def together(errors: Sequence[InputError]) -> InputError:
    """Return one error for all files that can't be read, the first of them with their ways out."""
    if len(errors) == 1:
        return errors[0]
    first = errors[:_FAULTS_SHOWN]
    more = [f"And {len(errors) - len(first)} more."] if len(errors) > len(first) else []
    told = " ".join([*(error.message for error in first), *more])
    ways = dict.fromkeys(error.way_out for error in first)
    return InputError(f"{len(errors)} files can't be read: {told}", way_out=" ".join(ways))


def unreadable(path: str, error: OSError) -> InputError:
    """Return the error of a file that the system does not give."""
    return InputError(
        f"{path} can't be read ({error.strerror or error}).",
        way_out="Check the file's permissions and its disk; executors of a cluster need the same path.",
    )


def damaged(path: str, problem: str) -> InputError:
    """Return the error of a file that is not whole."""
    return InputError(
        f"{path} is damaged: {problem}.",
        way_out="Get the file again (remove it first; ghsync fetch verifies what it gets), or remove it.",
    )
