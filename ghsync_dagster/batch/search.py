"""Which files a run reads, and which it leaves out and why: by paths and names, before Spark starts.

Belongs here: the search below folders and globs. Not here: the scan of a file's head (``batch.files``).
"""

# Paths are text, as there may be very many.
# ruff: noqa: PTH100, PTH111, PTH112, PTH114, PTH116, PTH118, PTH119

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import re
import shlex
import stat
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urlsplit

from ghsync_dagster.batch.files import InputFile, combine_errors, head_of, names_actors, scan_file
from ghsync_dagster.batch.heads import ENDINGS
from ghsync_dagster.batch.reports import LeftOut
from ghsync_dagster.batch.unpack import packing_of
from ghsync_dagster.batch.versions import FileState, InputState, state_of
from ghsync_dagster.domain.errors import InputError, shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

KNOWN_NAMES: Final = "NAME.json, .jsonl or .ndjson, with or without .gz, .gzip, .bz2 or .zst, or part-*"
OWN_FOLDERS: Final = ("batch", "connect", "dagster", "kafka", "mongo", "mysql", "spark")
"""The folders of ghsync's own state in GHSYNC_HOME, if the events are in it too."""

_NAMED: Final = 20
_PATHS_SHOWN: Final = 5
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
_GET_AGAIN: Final = "get empty files again (an hour of GH Archive may really be empty)"
_NO_FILES: Final = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISREG, "a file without a name"),
)
_TO_FILE: Final = (
    "Write what it gives to a file first: COMMAND > events.jsonl ; then name that. "
    "A packed file needs no command: name it as it is."
)
_Tails = frozenset[tuple[str, ...]]
"""The rest of a glob below a folder, split into parts: one tuple for each possible continuation."""
_ALL: Final[_Tails] = frozenset({("**",)})
"""The whole glob has matched: a file is taken, and so is everything in a folder."""


@dataclass(slots=True)
class Found:
    """The files that paths name.

    Attributes:
        events_paths: The paths, as they were given.
        files: The state of each file to read, by absolute path, sorted.
        left_out: Every other file that the paths name, by reason.
        scanned: How many files have been scanned so far.
    """

    events_paths: Sequence[str] = ()
    files: dict[str, FileState] = field(default_factory=dict)
    left_out: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    scanned: int = 0

    @property
    def state(self) -> InputState:
        """The state of all files to read."""
        return InputState(tuple(self.files.values()))

    def scan(self) -> list[InputFile]:
        """Scan the head of each file to read; packed files without content are left out as empty.

        Raises:
            InputError: Files are of another kind, damaged from their start on, or unreadable; or none is left.
        """
        files: list[InputFile] = []
        refused: list[InputError] = []
        for path, state in self.files.items():
            try:
                file = scan_file(state)
            except InputError as error:
                refused.append(error)
            else:
                if file is not None:
                    files.append(file)
                else:
                    self.left_out[_EMPTY].append(path)
            self.scanned += 1
        if refused:
            raise combine_errors(refused)
        if not files:
            raise _nothing(self)
        return files

    def report(self) -> list[LeftOut]:
        """Return what is left out: for each reason the number, and the first names."""
        return [
            LeftOut(reason, len(set(names)), [shown(name) for name in sorted(set(names))[:_NAMED]])
            for reason, names in self.left_out.items()
        ]


def find_files(events_paths: Sequence[str], home: Path | None = None) -> Found:
    """Return the files that paths, folders and globs name, each once.

    Folders are searched to any depth, also those that a glob matches or a link leads to. A folder, a glob and a list
    of the same files give the same result. The name alone decides whether a file is read, unless it is empty. In a
    list, a single path and a path in a dot folder are always read.

    Args:
        events_paths: Files, folders or globs.
        home: GHSYNC_HOME, which is never input.

    Raises:
        InputError: There is no file, or none that can be read; a folder can't be listed; a link leads to nothing; an
            event file disappears; something is no regular file; or a name is not UTF-8.
    """
    found = Found(events_paths)
    real_home = os.path.realpath(home) if home else None
    # Each may be a link to a larger disk.
    kept = frozenset(os.path.realpath(f"{real_home}/{name}") for name in OWN_FOLDERS) if home else frozenset[str]()
    set_aside: dict[str, str] | None = None
    for spec in events_paths:
        search = _Search(found, real_home, kept)
        try:
            set_aside = _set_aside(events_paths) if set_aside is None else set_aside
            search.search(spec, set_aside)
        except (OSError, RuntimeError, ValueError) as error:
            # RuntimeError: the home folder of ~user is not known. ValueError: a name that no file can have.
            raise _unreadable(spec, error) from None
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
        raise combine_errors(refused)
    found.files = dict(sorted(found.files.items()))
    return found


def _unreadable(spec: str, error: Exception) -> InputError:
    # The error names the very path below the given one.
    where = getattr(error, "filename", None) or spec
    words = getattr(error, "strerror", None) or error
    way_out = "Correct the path, or check the permissions of its folders and the disk or mount that it is on."
    if isinstance(error, FileNotFoundError):
        words, way_out = "it is gone since its folder was listed", "Run again when nothing moves files there."
    return InputError(f"{where} can't be looked at ({words}).", way_out=way_out)


def _absolute(spec: str) -> str:
    return os.path.abspath(Path(spec).expanduser())  # links are not resolved: the user's own path is shown


def _nothing(found: Found) -> InputError:
    where = ", ".join(_absolute(spec) for spec in found.events_paths[:_PATHS_SHOWN])
    where += ", ..." if len(found.events_paths) > _PATHS_SHOWN else ""
    named = [name for names in found.left_out.values() for name in names]
    one = len(named) == 1 and named[0] == shown(named[0]) and Path(named[0]).is_file()
    if one and set(found.left_out) == {_UNKNOWN}:
        return _other_name(named[0])
    reasons = "; ".join(f"{len(set(names))} left out, {reason}" for reason, names in found.left_out.items())
    ways = {
        _UNKNOWN: "rename files of events to NAME.jsonl (packed: NAME.jsonl.gz, .bz2 or .zst)",
        _HIDDEN: "rename files of events so that the name begins with a letter",
        _EMPTY: _GET_AGAIN,
        _OWN: "name another folder: ghsync keeps its state there",
    }
    hidden = found.left_out.get(_HIDDEN, [])
    parts = [ways[reason] for reason in found.left_out if reason != _HIDDEN or not all(map(_is_folder, hidden))]
    if folders := sorted({path for path in hidden if _is_folder(path)}):
        more = ", ..." if len(folders) > _PATHS_SHOWN else ""
        parts.append(f"name a hidden folder of events itself ({', '.join(map(_quoted, folders[:_PATHS_SHOWN]))}{more})")
    way_out = "; ".join(parts)
    return InputError(f"{where} has no file to read ({reasons}).", way_out=f"{way_out[0].upper()}{way_out[1:]}.")


def _other_name(path: str) -> InputError:
    """Return the error of the only file, whose name is of no known kind: what its content is, or how to rename it.

    Raises:
        InputError: It is of a kind that can't be read.
    """
    file = scan_file(state_of(path, os.stat(path)))
    if file is None:
        return InputError(f"{path} is empty.", way_out=f"{_GET_AGAIN[0].upper()}{_GET_AGAIN[1:]}.")
    real = os.path.realpath(path)
    if not names_actors(file):
        way_out = "Name a file or folder of events, or get some: ghsync fetch 2015-01-01-15."
        return InputError(f"{path} has no event at its beginning, and {_UNKNOWN}.", way_out=way_out)
    if _reason(os.path.basename(real)) is None:
        way_out = f"Name the file itself: {shlex.quote(real)}"
    else:
        old = real if path.startswith(("/dev/", "/proc/")) else path
        way_out = f"Rename it: mv {shlex.quote(old)} {_renamed(old)}"
    return InputError(f"{path}: {_UNKNOWN}.", way_out=way_out)


def _is_folder(path: str) -> bool:
    return path.endswith("/")  # as folders are left out


def _quoted(path: str) -> str:
    return shlex.quote(shown(path))


def _renamed(path: str) -> str:
    return shlex.quote(f"{path}.jsonl{ENDINGS[packing_of(head_of(path, 8))]}")


class _Search:
    """The search below one path; a folder that links lead back to is searched once.

    Args:
        found: Collects the results.
        home: The real path of GHSYNC_HOME.
        kept: The real paths of its own folders.
    """

    def __init__(self, found: Found, home: str | None, kept: frozenset[str]) -> None:
        self.entries = 0
        self._found = found
        self._home = home
        self._kept = kept
        self._own: frozenset[str] = frozenset()
        self._walked: set[tuple[str, _Tails]] = set()
        self._hidden: list[str] = []

    def search(self, spec: str, set_aside: Mapping[str, str]) -> None:
        """Add the files of a path, a folder or a glob, except paths that are set aside as hidden."""
        if scheme := _SCHEME.match(spec):
            raise _no_path(spec, scheme.group(1).lower())
        path = _absolute(spec)
        if glob.has_magic(spec) and not os.path.lexists(path):
            self._glob(path, spec)
            return
        seen = _stat(path)
        if seen is None:
            raise _missing(path, spec)
        real = os.path.realpath(path)
        self._set_own(real)
        is_folder = stat.S_ISDIR(seen.st_mode)
        hidden = set_aside.get(path, "")
        if hidden and (is_folder or hidden != path):
            self._leave_out(_HIDDEN, f"{hidden}/")
        elif is_folder:
            self._walk(path, real, _ALL)
        elif not stat.S_ISREG(seen.st_mode) or (path != real and _stat(real) is None):
            raise _no_file(path, seen, _TO_FILE)
        else:
            self._file(path, real, seen)

    def _set_own(self, root: str) -> None:
        """Set which folders below a root are ghsync's own: those in home, and all of home if the root is outside."""
        if self._home:
            inside = _is_in(root, self._home)
            elsewhere = frozenset(folder for folder in self._kept if not _is_in(folder, self._home))
            self._own = self._kept if inside else elsewhere | {self._home}

    def _glob(self, pattern: str, spec: str) -> None:
        plain, parts = "/", tuple(pattern.strip("/").split("/"))
        # An existing folder of that very name is no glob; the working directory may be one.
        while len(parts) > 1 and (not glob.has_magic(parts[0]) or os.path.isdir(os.path.join(plain, parts[0]))):
            plain, parts = os.path.join(plain, parts[0]), parts[1:]
        seen = _stat(plain)
        if seen is None:
            raise _missing(plain, spec)
        real = os.path.realpath(plain)
        self._set_own(real)
        if stat.S_ISDIR(seen.st_mode):
            self._walk(plain, real, _opened({parts}))
        if not self.entries:
            hidden = f" outside of hidden folders ({', '.join(self._hidden[:_PATHS_SHOWN])})" if self._hidden else ""
            raise InputError(f"No file matches {pattern}{hidden}.", way_out=_meant(spec) or "Correct the glob.")

    def _walk(self, path: str, real: str, tails: _Tails) -> None:
        """Add what matches below a folder; raise if something can't be listed or read."""
        if (real, tails) in self._walked:
            return
        self._walked.add((real, tails))
        if self._is_own(real):
            return
        with os.scandir(real) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
        for entry in entries:
            if below := tails if tails == _ALL else _below(tails, entry.name):
                self._entry(os.path.join(path, entry.name), entry, below)

    def _entry(self, path: str, entry: os.DirEntry[str], tails: _Tails) -> None:
        """Add an entry of a folder. Only a file with the name of events is looked up: others may come and go."""
        is_link = entry.is_symlink()
        if _is_hidden(entry.name):
            if os.path.isdir(entry) if is_link else entry.is_dir():
                self._leave_out(_HIDDEN, f"{path}/", is_match=tails == _ALL)
            elif tails == _ALL:
                self._leave_out(_HIDDEN, path)
            return
        seen = _stat(entry.path) if is_link else None
        if is_link and seen is None and os.path.lexists(entry.path):
            raise _missing(path)
        real = os.path.realpath(entry.path) if is_link else entry.path
        if stat.S_ISDIR(seen.st_mode) if seen else entry.is_dir():
            self._walk(path, real, tails)
        elif tails == _ALL:
            self._file(path, real, seen)

    def _file(self, path: str, real: str, seen: os.stat_result | None) -> None:
        if self._is_own(real):
            return
        reason = _reason(path.rpartition("/")[2])
        if reason is None:
            seen = seen or os.stat(real)
            if not stat.S_ISREG(seen.st_mode):
                raise _no_file(path, seen, "Remove it, or name the files by a glob.")
            if seen.st_size:
                # Because of links a file may be found more than once.
                self._found.files[real] = state_of(real, seen)
                self.entries += 1
                return
            reason = _EMPTY
        self._leave_out(reason, path)

    def _is_own(self, real: str) -> bool:
        """Return whether a path is ghsync's own state; if so, leave it out, as one folder."""
        for folder in self._own:
            if _is_in(real, folder):
                self._leave_out(_OWN, f"{folder}/")
                return True
        return False

    def _leave_out(self, reason: str, path: str, *, is_match: bool = True) -> None:
        """Leave out a match, or a hidden folder that a glob would pass through."""
        self._found.left_out[reason].append(path)
        if is_match:
            self.entries += 1
        else:
            self._hidden.append(path)


def _stat(path: str) -> os.stat_result | None:
    """Return the ``stat`` of a path; None if nothing is there."""
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise


def _missing(path: str, spec: str = "") -> InputError:
    if os.path.islink(path):
        return InputError(
            f"{path} is a link to nothing.", way_out="Mount or correct what it leads to, or remove the link."
        )
    return InputError(
        f"There is no file or folder {path}.",
        way_out=_meant(spec) or "Correct the path, or run `ghsync sample` to write the sample.",
    )


def _meant(spec: str) -> str | None:
    """Return the way out if the text is a shell pattern or a list, and no path; None if it looks like one path."""
    if _BRACES.search(spec):
        return "Braces are for `ghsync fetch`: name the folder, a glob as hours/2015-03-01-*.json.gz, or " + _A_LIST
    if spec.lstrip().startswith("[") or _SEVERAL.search(spec):
        return "Correct the path; for several, name the folder, a glob or " + _A_LIST
    return None


def _no_file(path: str, seen: os.stat_result, way_out: str) -> InputError:
    kind = next((words for is_kind, words in _NO_FILES if is_kind(seen.st_mode)), "something else")
    return InputError(f"{path} is no regular file but {kind}.", way_out=way_out)


def _opened(tails: set[tuple[str, ...]]) -> _Tails:
    """Return the possible continuations: ``**`` matches no folder too."""
    ways = set(tails)
    for tail in tails:
        folders = next((at for at, part in enumerate(tail) if part != "**"), len(tail) - 1)
        ways |= {tail[at:] for at in range(folders + 1)}
    return _ALL if ("**",) in ways else frozenset(ways)


def _below(tails: _Tails, name: str) -> _Tails:
    """Return the rest of a glob below a name; empty if the name does not match."""
    kept = {tail for tail in tails if tail[0] == "**"}
    return _opened(kept | {tail[1:] or ("**",) for tail in tails - kept if fnmatch.fnmatchcase(name, tail[0])})


def _set_aside(specs: Sequence[str]) -> dict[str, str]:
    """Return the paths in hidden folders such as ``_temporary``, each with that folder, if a list names a whole folder.

    If a list has all files that a search of a folder would read, it gives the same result as the folder: it leaves
    hidden folders out. A selection from a folder is read as it is, and so is a single path, or a glob. Dot folders are
    exempt: people store events in ``~/.cache`` or ``.ghsync``, and name them.
    """
    if not any("_" in spec for spec in specs):
        return {}
    paths = [spec if _SCHEME.match(spec) else os.path.abspath(os.path.expanduser(spec)) for spec in specs]
    inside: Counter[str] = Counter()
    folders: list[tuple[str, str]] = []
    for path in dict.fromkeys(paths):
        at = ""
        for part in path.split("/")[1:]:
            inside[at] += 1
            at = f"{at}/{part}"
            if part.startswith("_") and _is_hidden(part):
                folders.append((path, at))
        inside[at] += 1
    listed = {folder: _is_listed(folder, inside) for folder in {at.rpartition("/")[0] for _, at in folders}}
    # The outermost hidden folder counts, as in a search.
    return {
        path: at
        for path, at in reversed(folders)
        if inside[at.rpartition("/")[0]] > inside[at] and listed[at.rpartition("/")[0]]
    }


def _is_listed(folder: str, inside: Mapping[str, int]) -> bool:
    """Return whether the paths cover each file and subfolder that a search of a folder would read."""
    try:
        with os.scandir(folder or "/") as listing:
            return all(
                f"{folder}/{entry.name}" in inside
                for entry in listing
                if not _is_hidden(entry.name) and (_reason(entry.name) is None or entry.is_dir())
            )
    except OSError:
        return False  # reported when its paths are searched


def _is_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


def _reason(name: str) -> str | None:
    """Return why a file of this name is left out."""
    if _is_hidden(name):
        return _HIDDEN
    return None if _KNOWN.fullmatch(name) else _UNKNOWN


def _is_hidden(name: str) -> bool:
    """Return whether Spark ignores files of this name: ``_name=value`` is a partition."""
    return name.startswith(".") or (name.startswith("_") and "=" not in name)


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
    # aws supports globs as filters only.
    folder = _MAGIC.split(rest)[0].rpartition("/")[0]
    pattern = shlex.quote(rest[len(folder) + 1 :])
    return f"aws s3 cp --recursive {shlex.quote(f's3://{folder}/')} events/ --exclude '*' --include {pattern}"
