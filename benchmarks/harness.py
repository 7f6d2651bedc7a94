"""What every benchmark needs: a store on tmpfs, a process that is watched and never outlives its run, machine facts.

Belongs here: starting, measuring and ending processes. Not here: what is measured, or what the numbers mean.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import os
import platform
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from pymongo import MongoClient

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

PROJECT = Path(__file__).resolve().parent.parent
SAMPLE_SECONDS = 0.1
SERVER_START_SECONDS = 60
STOP_SECONDS = 30
TMPFS = Path("/dev/shm")  # noqa: S108 -- the machine's tmpfs is the point
MIB = 1024 * 1024
INTERRUPTED = 130
TABLE_WIDTH = 130


class BenchmarkError(Exception):
    """A benchmark can't be run or its contender failed; the text names what, where and the way out."""


# --- processes ------------------------------------------------------------------------------------------------------


@dataclass
class Usage:
    """What a set of processes took: peak resident memory (RSS, MiB) by kind, and CPU seconds.

    RSS counts a page that two processes share in both, so a sum over a tree is an upper bound. It is the same for all
    contenders, and reading it costs microseconds; PSS would walk the page tables of a whole JVM at each sample.

    A process counts from its second sample under one name: a JVM that starts a program shows for an instant a child
    that shares all of its memory, and would be counted twice.
    """

    total_mb: float = 0.0
    java_mb: float = 0.0
    other_mb: float = 0.0
    _names: dict[int, str] = field(default_factory=dict, repr=False)
    _cpu: dict[int, float] = field(default_factory=dict, repr=False)

    @property
    def cpu_seconds(self) -> float:
        """User and system time of all processes, up to the last sample of each."""
        return round(sum(self._cpu.values()), 2)

    def take(self, processes: Sequence[psutil.Process]) -> None:
        """Add one sample of ``processes``."""
        java = other = 0
        names: dict[int, str] = {}
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess), process.oneshot():
                name, resident, cpu = process.name(), process.memory_info().rss, process.cpu_times()
                # A process that has just ended is a zombie for a moment, its times still there.
                self._cpu[process.pid] = cpu.user + cpu.system
                names[process.pid] = name
                if self._names.get(process.pid) != name:
                    continue
                if name == "java":
                    java += resident
                else:
                    other += resident
        self._names = names
        self.total_mb = max(self.total_mb, round((java + other) / MIB, 1))
        self.java_mb = max(self.java_mb, round(java / MIB, 1))
        self.other_mb = max(self.other_mb, round(other / MIB, 1))


@dataclass(frozen=True)
class Finished:
    """One contender's process, ended.

    Attributes:
        seconds: Wall seconds from before its start until its end.
        output: Its standard output.
        usage: Of its whole process tree.
        server_usage: Of the store's process from its start; None where the store is not ours.
        server_cpu_seconds: Of it what fell into this run.
        foreign_cores: Cores that neither of the two kept busy, on average: noise, with a given store its work too.
        load_average: The machine's one-minute load average at its start.
    """

    seconds: float
    output: str
    usage: Usage
    server_usage: Usage | None
    server_cpu_seconds: float | None
    foreign_cores: float
    load_average: float


@dataclass
class Watched:
    """A child process in a session of its own, with every descendant that was ever seen."""

    child: subprocess.Popen[bytes]
    seen: dict[int, psutil.Process] = field(default_factory=dict)

    def tree(self) -> list[psutil.Process]:
        """Return the child and its living descendants, orphans of its session too."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.child.pid)
            for process in (root, *root.children(recursive=True)):
                self.seen.setdefault(process.pid, process)
        return [process for process in self.seen.values() if process.is_running()]

    def leftovers(self) -> list[psutil.Process]:
        """Return what still runs of the tree, orphans of its session that were never seen included."""
        alive = {process.pid: process for process in self.tree()}
        for pid in psutil.pids():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                if pid not in alive and os.getsid(pid) == self.child.pid:
                    alive[pid] = psutil.Process(pid)
        return [p for p in alive.values() if _is_alive(p)]

    def stop(self) -> None:
        """End the whole tree: ask, wait up to ``STOP_SECONDS``, then kill."""
        alive = self.leftovers()
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        psutil.wait_procs(alive, timeout=STOP_SECONDS)
        alive = self.leftovers()
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=STOP_SECONDS)
        self.child.wait(timeout=STOP_SECONDS)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def watched(
    command: Sequence[str], environment: Mapping[str, str], stdout: Path, stderr: Path, cwd: Path = PROJECT
) -> Iterator[Watched]:
    """Start ``command`` in a session of its own and end its whole tree on the way out, whatever happened inside."""
    with stdout.open("wb") as out, stderr.open("wb") as err:
        child = subprocess.Popen(
            list(command),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=cwd,
            start_new_session=True,
        )
        process = Watched(child)
        try:
            yield process
        finally:
            process.stop()


@dataclass(frozen=True)
class Mark:
    """What had been spent at one moment; the difference of two is what happened between them.

    Attributes:
        at: Seconds of a clock that only moves forward.
        busy_seconds: CPU seconds that all cores had spent.
        cpu_seconds: Of them the contender's.
        server_cpu_seconds: Of them the store's.
        beside_cpu_seconds: Of them those of processes that serve the contender, or watch it.
    """

    at: float
    busy_seconds: float
    cpu_seconds: float
    server_cpu_seconds: float
    beside_cpu_seconds: float

    def foreign_cores(self, since: Mark) -> float:
        """Return how many cores were kept busy by nobody of this run, on average."""
        foreign = self._foreign_seconds - since._foreign_seconds
        return round(max(0.0, foreign) / (self.at - since.at), 2)

    @property
    def _foreign_seconds(self) -> float:
        return self.busy_seconds - self.cpu_seconds - self.server_cpu_seconds - self.beside_cpu_seconds


@dataclass(frozen=True)
class Measured:
    """A contender's process at work, which a thread samples.

    Attributes:
        name: Names the run in files and errors.
        process: It and its descendants.
        output: File that gets its standard output.
        errors: File that gets its standard error.
        usage: Of its whole process tree.
        server_usage: Of the store's process; empty where it is not ours.
        load_average: The machine's one-minute load average at its start.
    """

    name: str
    process: Watched
    output: Path
    errors: Path
    usage: Usage
    server_usage: Usage
    load_average: float
    _beside_usage: Usage
    _server: Sequence[psutil.Process]
    _beside: Sequence[psutil.Process]
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def mark(self) -> Mark:
        """Take a sample, and return what has been spent so far."""
        at = time.perf_counter()
        with self._lock:
            self.usage.take(self.process.tree())
            self.server_usage.take(self._server)
            self._beside_usage.take(self._beside)
            return Mark(
                at,
                busy_seconds(),
                self.usage.cpu_seconds,
                self.server_usage.cpu_seconds,
                self._beside_usage.cpu_seconds,
            )

    def tail(self) -> str:
        """Return the last lines of its standard error."""
        return tail(self.errors)

    def check_alive(self) -> None:
        """Raise where it has ended.

        Raises:
            BenchmarkError: It has ended.
        """
        if (code := self.process.child.poll()) is not None:
            raise BenchmarkError(f"{self.name} ended early with {code}. Its last lines:\n{self.tail()}")


@contextlib.contextmanager
def measured(
    command: Sequence[str],
    environment: Mapping[str, str],
    logs: Path,
    *,
    name: str,
    server_pid: int | None = None,
    alongside: Sequence[int] = (),
) -> Iterator[Measured]:
    """Start ``command``, sample it until the way out, and end its whole tree there.

    Args:
        command: Program and arguments.
        environment: Its whole environment.
        logs: Folder that gets ``NAME.out`` and ``NAME.err``.
        name: Names the run in files and errors.
        server_pid: The store's process, measured alongside.
        alongside: Processes that serve it or watch it: their work is not others'.
    """
    stdout, stderr = logs / f"{name}.out", logs / f"{name}.err"
    load_average = os.getloadavg()[0]
    server = [psutil.Process(server_pid)] if server_pid else []
    ended = threading.Event()
    with watched(command, environment, stdout, stderr) as process:
        found = Measured(
            *(name, process, stdout, stderr, Usage(), Usage(), load_average, Usage()),
            *(server, [psutil.Process(pid) for pid in alongside]),
        )

        def sample() -> None:
            while not ended.wait(SAMPLE_SECONDS):
                found.mark()

        sampler = threading.Thread(target=sample, name=f"memory of {name}", daemon=True)
        sampler.start()
        try:
            yield found
        finally:
            ended.set()
            sampler.join()


def run_watched(
    command: Sequence[str],
    environment: Mapping[str, str],
    logs: Path,
    *,
    name: str,
    timeout_seconds: float,
    server_pid: int | None = None,
) -> Finished:
    """Run ``command`` to its end and measure it.

    Args:
        command: Program and arguments.
        environment: Its whole environment.
        logs: Folder that gets ``NAME.out`` and ``NAME.err``.
        name: Names the run in files and errors.
        timeout_seconds: After this the run is ended and is an error.
        server_pid: The store's process, measured alongside.

    Raises:
        BenchmarkError: It exited with another code than 0, or took too long.
    """
    server_before = Usage()
    if server_pid:
        server_before.take([psutil.Process(server_pid)])
    before = Mark(time.perf_counter(), busy_seconds(), 0.0, server_before.cpu_seconds, 0.0)
    with measured(command, environment, logs, name=name, server_pid=server_pid) as run:
        try:
            code = run.process.child.wait(timeout=timeout_seconds)
            after = run.mark()
        except subprocess.TimeoutExpired:
            raise BenchmarkError(
                f"{name} did not end within {timeout_seconds:.0f} s. "
                f"Way out: raise --timeout, or see its last lines:\n{run.tail()}"
            ) from None
    if code != 0:
        raise BenchmarkError(f"{name} exited with {code}. Its last lines:\n{run.tail()}")
    return Finished(
        seconds=round(after.at - before.at, 3),
        output=run.output.read_text(encoding="utf-8", errors="replace"),
        usage=run.usage,
        server_usage=run.server_usage if server_pid else None,
        server_cpu_seconds=round(after.server_cpu_seconds - before.server_cpu_seconds, 2) if server_pid else None,
        foreign_cores=after.foreign_cores(before),
        load_average=round(run.load_average, 2),
    )


def busy_seconds() -> float:
    """Return the CPU seconds that all cores have spent on work since the machine started."""
    times = psutil.cpu_times()
    # `guest` is inside `user` already.
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


def earlier_build(commit: str, folder: Path) -> Path:
    """Unpack a commit's package into a folder.

    Raises:
        BenchmarkError: The commit is not in this repository.
    """
    command = ["git", "archive", commit, "ghsync_dagster"]
    done = subprocess.run(command, capture_output=True, cwd=PROJECT, check=False, timeout=60)
    if done.returncode != 0:
        raise BenchmarkError(
            f"There is no commit {commit} here: {done.stderr.decode(errors='replace').strip()}. "
            "Way out: fetch it: git fetch --unshallow."
        )
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def tail(path: Path, lines: int = 30) -> str:
    """Return the last lines of a file."""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


# --- the store ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Store:
    """Where contenders write.

    Attributes:
        uri: MongoDB connection string.
        database: A database that nothing has used before.
        pid: Its process, where this harness started it.
        folder: Its storage, where this harness started it.
    """

    uri: str
    database: str
    pid: int | None = None
    folder: Path | None = None

    def stored_mb(self) -> float | None:
        """Return the size of its storage in MiB, its log included; None where it is not ours."""
        if self.folder is None:
            return None
        blocks = (path.stat().st_blocks for path in self.folder.rglob("*") if path.is_file())
        return round(sum(blocks) * 512 / MIB, 1)


@contextlib.contextmanager
def embedded_store(folder: Path) -> Iterator[Store]:
    """Run the embedded Mongo-wire server with new, empty storage under ``folder``; end it and delete the storage after.

    Raises:
        BenchmarkError: It is not installed, or not ready in time.
    """
    program = Path(sys.executable).with_name("secantusd-rs")
    if not program.exists():
        raise BenchmarkError(
            f"There is no secantusd-rs alongside {sys.executable}. "
            "Way out: install the extra `embedded`, or pass --uri with a MongoDB."
        )
    with tempfile.TemporaryDirectory(prefix="store-", dir=folder) as home:
        config = Path(home, "server.toml")
        config.touch()
        # Port 0: the server takes a free one and prints it.
        command = [
            *(str(program), "--config", str(config), "--host", "127.0.0.1", "--port", "0"),
            *("--storage-path", str(Path(home, "data")), "--standalone", "--sync-on-commit", "--cache-size", "256M"),
        ]
        stdout, stderr = Path(home, "server.out"), Path(home, "server.err")
        with watched(command, os.environ, stdout, stderr) as process:
            port = _announced_port(process, stdout, stderr)
            # Its streamed heartbeats now and then answer the Java driver out of turn, which fails the load.
            uri = f"mongodb://127.0.0.1:{port}/?serverMonitoringMode=poll"
            yield Store(uri, _new_database(), process.child.pid, Path(home, "data"))


def _announced_port(process: Watched, stdout: Path, stderr: Path) -> int:
    deadline = time.monotonic() + SERVER_START_SECONDS
    while time.monotonic() < deadline:
        if found := re.search(r"listening on [\d.]+:(\d+)", stdout.read_text(encoding="utf-8", errors="replace")):
            return int(found.group(1))
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.child.wait(timeout=0.05)
            raise BenchmarkError(f"The embedded server ended with {code} at its start:\n{tail(stderr)}")
    raise BenchmarkError(f"The embedded server was not ready in {SERVER_START_SECONDS} s:\n{tail(stderr)}")


@contextlib.contextmanager
def given_store(uri: str) -> Iterator[Store]:
    """Give a new database on a MongoDB that runs already, and drop it after."""
    store = Store(uri, _new_database())
    try:
        yield store
    finally:
        with MongoClient[dict[str, object]](uri) as client:
            client.drop_database(store.database)


def _new_database() -> str:
    return f"ghsync_bench_{secrets.token_hex(6)}"


def store_folder(asked: Path | None, needed_bytes: int) -> tuple[Path, list[str]]:
    """Choose the folder for the store's files and the contenders' homes.

    Args:
        asked: A folder that was asked for, which is taken as it is.
        needed_bytes: Room that the benchmark may take.

    Returns:
        The folder, and warnings that belong alongside the results.
    """
    if asked:
        return asked, []
    if TMPFS.is_dir() and os.access(TMPFS, os.W_OK):
        # A page on tmpfs is a page of memory.
        free = min(shutil.disk_usage(TMPFS).free, psutil.virtual_memory().available)
        if free >= needed_bytes:
            return TMPFS, []
        reason = f"{TMPFS} has room for {free / MIB:,.0f} MiB, {needed_bytes / MIB:,.0f} are needed"
    else:
        reason = f"{TMPFS} does not exist or can't be written to"
    folder = Path(tempfile.gettempdir())
    return folder, [f"{reason}: the store's files are under {folder}, so the disk is measured too."]


# --- the caller -----------------------------------------------------------------------------------------------------


def table_width() -> int | None:
    """Return the width that tables need where no terminal tells its own; None where one does."""
    return None if sys.stdout.isatty() else TABLE_WIDTH


def interrupt_on_signals() -> None:
    """Have SIGTERM and Ctrl-C raise ``KeyboardInterrupt``, once: the ending of processes must not be cut short."""
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, _frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt(signal.Signals(number).name)


# --- machine --------------------------------------------------------------------------------------------------------


def machine_facts(java: Path, packages: Sequence[str]) -> dict[str, object]:
    """Return what a reader needs to compare these numbers with others, versions of ``packages`` among it."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_mb": round(psutil.virtual_memory().total / MIB),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "java": java_version(java),
        **{package: importlib.metadata.version(package) for package in packages if _is_installed(package)},
    }


def java_version(java: Path) -> str:
    """Return the first line that ``java -version`` prints."""
    done = subprocess.run([str(java), "-version"], capture_output=True, text=True, timeout=60, check=True)
    return (done.stderr or done.stdout).splitlines()[0]


def server_version(store: Store) -> str:
    """Return the version that the store reports of itself."""
    with MongoClient[dict[str, object]](store.uri) as client:
        return str(client.server_info()["version"])


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
