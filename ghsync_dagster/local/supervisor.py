"""Starts, finds and stops one local server process, also after a caller was killed.

Belongs here: what is the same for every server: its state file, lock, ports, readiness and end.
Not here: which server, its command line, or its check of readiness.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
import psutil

from ghsync_dagster.domain.errors import ConfigError, UnavailableError
from ghsync_dagster.folders import ensure_folder, write_whole
from ghsync_dagster.process import born
from ghsync_dagster.progress import report_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

State = Literal["up", "down", "failed"]

_HOST = "127.0.0.1"
_READY_SECONDS = 120
_PING_SECONDS = 2.0
_POLL_SECONDS = 0.05
_TERMINATE_SECONDS = 45
_KILL_SECONDS = 15
_LOCK_SECONDS = 240
_STARTS = 3
_LOG_TAIL_BYTES = 2_000
_LOG_LIMIT_BYTES = 16_000_000


@dataclass(frozen=True)
class ServiceStatus:
    """The status of one service.

    Attributes:
        service: Its name, such as ``mongo``.
        state: ``up`` answers; ``down`` was stopped or never started; ``failed`` died or does not answer.
        pid: Its process here, if there is one.
        uri: Where it listens, without credentials.
        server: The program, such as ``mongod`` or ``secantusdb``; ``external`` for a server that a setting names.
        data: Folder of a local server's data.
        log: A local server's log file.
        address_key: The JSON key of the address.
        login: A local server's address with credentials; for JSON only.
        more: Further fields by JSON key.
    """

    service: str
    state: State
    pid: int | None = None
    uri: str | None = None
    server: str | None = None
    data: Path | None = None
    log: Path | None = None
    address_key: str = "uri"
    login: str | None = field(default=None, repr=False)
    more: Mapping[str, object] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """Return all fields but the name, by JSON key."""
        return self._shown(self.login or self.uri)

    def as_text(self) -> str:
        """Return one line for a person, without credentials."""
        known = self._shown(self.uri).items()
        return " ".join([self.service, *(f"{key}={value}" for key, value in known if value is not None)])

    def _shown(self, address: str | None) -> dict[str, object]:
        return {
            "state": self.state,
            "pid": self.pid,
            self.address_key: address,
            "server": self.server,
            "data": str(self.data) if self.data else None,
            "log": str(self.log) if self.log else None,
            **self.more,
        }


@dataclass(frozen=True)
class ServerSpec:
    """How to run one server.

    Attributes:
        server: The program's name, as in ``ServiceStatus.server``.
        data: Folder of its data; made if missing. It must be an argument of the command line, or follow a ``=`` in one.
        log: File that gets its output.
        default_ports: The ports it gets if they are free; it serves on the first.
        command: Returns its command line for its ports; the first must be in it in the same way as the data.
    """

    server: str
    data: Path
    log: Path
    default_ports: tuple[int, ...]
    command: Callable[..., list[str]]


class Record(msgspec.Struct, frozen=True):
    """The state file: the server that was started last.

    Attributes:
        server: The program's name.
        data: Folder of its data.
        log: Its log file.
        port: Where it serves.
        pid: Its process; None before the start and after a stop.
        born: When that process started, see ``process.born``, to distinguish it from a later one with the same pid.
        started: Whether a start was begun and no stop has ended it.
        other_ports: Its further ports.
        folder: Identifies the folder of this file, see ``_folder_id``; None in files of earlier versions.
    """

    server: str
    data: str
    log: str
    port: int
    pid: int | None = None
    born: str | None = None
    started: bool = False
    other_ports: tuple[int, ...] = ()
    folder: str | None = None


class Supervisor:
    """Starts and stops a service's server.

    If a record names another folder that still exists, this folder is a copy, and the server of the original is left
    alone. If that folder is gone, this one was moved or restored from it. Then a server that still runs on the old
    files is stopped, by ``down`` and before ``up`` starts one here.

    Args:
        service: The service's name, such as ``mongo``.
        folder: The folder of its state file and lock.
        answers: Returns whether the server at a port answers within some seconds.
        uri: Returns the address for a port.
        variable: The setting that names an external server instead.
        address_key: The JSON key of the address.
    """

    def __init__(
        self,
        service: str,
        folder: Path,
        answers: Callable[[int, float], bool],
        uri: Callable[[int], str],
        *,
        variable: str,
        address_key: str,
    ) -> None:
        self._service = service
        self._folder = folder
        self._answers = answers
        self._uri = uri
        self._variable = variable
        self._address_key = address_key

    def up(self, choose: Callable[[], ServerSpec], progress: Callable[[str], None]) -> ServiceStatus:
        """Start the server unless it runs; return once it answers.

        Args:
            choose: Returns the server to run; called only if none runs.
            progress: Gets a line of text for each step.

        Raises:
            UnavailableError: It ended early or did not answer in time, with the end of its log; or a server that still
                runs on a moved folder could not be stopped.
            ConfigError: The folder can't be used, or ``choose`` found no server.
        """
        ensure_folder(self._folder, "GHSYNC_HOME")
        with report_progress(progress, f"{self._service}: coming up"), self._locked():
            record = self._read()
            process = self._find(record) if record else None
            if record and process:
                if self._is_here(record):
                    return self._adopt(record, process)
                self._stop(record, process, progress)
            return self._start(choose(), (record.port, *record.other_ports) if record else (), progress)

    def down(self, progress: Callable[[str], None]) -> ServiceStatus:
        """Stop the server if it runs: terminate it, and kill it if it does not end in time.

        Raises:
            UnavailableError: It could not be stopped.
            ConfigError: The folder can't be used.
        """
        if not self._state_file.exists():
            return self._unknown()
        with report_progress(progress, f"{self._service}: going down"), self._locked():
            record = self._read()
            if record is None:
                return self._unknown()
            if process := self._find(record):
                self._stop(record, process, progress)
            stopped = msgspec.structs.replace(record, pid=None, born=None, started=False)
            self._write(stopped)
            return self._status(stopped, "down", None)

    def status(self) -> ServiceStatus:
        """Return the server's status; change nothing."""
        record = self._read()
        if record is None:
            return self._unknown()
        process = self._find(record)
        if process is None:
            return self._status(record, "failed" if record.started else "down", None)
        up = self._is_here(record) and self._ready(process, record)
        return self._status(record, "up" if up else "failed", process.pid)

    def was_set_up(self) -> bool:
        """Return whether a server was ever started here, even if its state file is unreadable or of a copy."""
        return self._state_file.exists() or (self._folder / "data").exists()

    @property
    def _state_file(self) -> Path:
        return self._folder / "state.json"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Let one caller at a time start or stop this service."""
        from filelock import FileLock, Timeout

        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self._folder / "lock", timeout=_LOCK_SECONDS)
            lock.acquire()
        except Timeout:
            raise UnavailableError(
                f"Another process has been starting or stopping {self._service} for {_LOCK_SECONDS} s.",
                way_out="Wait for it or end it, then try again.",
            ) from None
        except OSError as error:
            raise self._unusable_folder(error) from None
        try:
            yield
        finally:
            lock.release()

    def _unusable_folder(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"The folder {self._folder} can't be used: {error.strerror or error}.",
            way_out="Make it writable, or set GHSYNC_HOME to a folder that is.",
        )

    def _read(self) -> Record | None:
        """Return the state file's content; None if it is missing, malformed or of a copied folder."""
        try:
            record = msgspec.json.decode(self._state_file.read_bytes(), type=Record)
        except (OSError, msgspec.MsgspecError):
            return None
        # In a copied folder the record describes the original's server.
        return record if self._is_here(record) or not _folder_exists(record, self._find(record)) else None

    def _is_here(self, record: Record) -> bool:
        """Return whether a record was written in this very folder."""
        return record.folder in (None, _folder_id(self._folder))

    def _write(self, record: Record) -> None:
        content = msgspec.json.encode(msgspec.structs.replace(record, folder=_folder_id(self._folder)))
        write_whole(self._state_file, content, "GHSYNC_HOME")

    def _find(self, record: Record) -> psutil.Process | None:
        """Return the recorded server's process if it is alive, and never another process."""
        if not record.started:
            return None
        try:
            if record.pid is None or record.born is None:
                return _search(record)
            process = psutil.Process(record.pid)
            return process if born(record.pid) == record.born and _is_server(process, record) else None
        except (psutil.Error, PermissionError):
            return None

    def _unknown(self) -> ServiceStatus:
        return ServiceStatus(self._service, "down", address_key=self._address_key)

    def _status(self, record: Record, state: State, pid: int | None) -> ServiceStatus:
        return ServiceStatus(
            self._service,
            state,
            pid,
            self._uri(record.port) if pid else None,
            record.server,
            Path(record.data),
            Path(record.log),
            self._address_key,
        )

    def _ready(self, process: psutil.Process, record: Record) -> bool:
        """Return whether this very process listens on the port and answers."""
        return _listens(process, record.port) and self._answers(record.port, _PING_SECONDS)

    def _adopt(self, record: Record, process: psutil.Process) -> ServiceStatus:
        """Wait for a server that already runs, such as one whose starter was killed."""
        if record.pid is None or record.born is None:
            record = msgspec.structs.replace(record, pid=process.pid, born=born(process.pid))
            self._write(record)
        if self._await_ready(process, record):
            return self._status(record, "up", process.pid)
        what = "runs but does not answer" if _alive(process) else "ended before it answered"
        raise UnavailableError(
            f"{record.server}, process {process.pid}, {what} on port {record.port}. "
            f"End of its log {record.log}:\n{_tail(Path(record.log), 0)}",
            way_out="Run ghsync down, then ghsync up.",
        )

    def _start(self, spec: ServerSpec, last: tuple[int, ...], progress: Callable[[str], None]) -> ServiceStatus:
        for attempt in range(1, _STARTS + 1):
            port, *others = ports = _free_ports(last, spec.default_ports)
            record = Record(spec.server, str(spec.data), str(spec.log), port, started=True, other_ports=tuple(others))
            progress(f"{self._service}: starting {spec.server} on port {port}")
            started = time.monotonic()
            log_start = self._prepare(spec)
            # Written before the start too: if this process is killed in between, the record leads to the server.
            self._write(record)
            process, since = self._spawn(spec, ports)
            record = msgspec.structs.replace(record, pid=process.pid, born=since)
            self._write(record)
            if self._await_ready(process, record):
                progress(f"{self._service}: {spec.server} is up after {time.monotonic() - started:.1f} s")
                return self._status(record, "up", process.pid)
            lost_race = not _alive(process) and not all(map(_is_free, ports))
            if not (lost_race and attempt < _STARTS):
                self._give_up(process, record, log_start)
        raise AssertionError("the last attempt returns or raises")

    def _prepare(self, spec: ServerSpec) -> int:
        """Make the folders, rotate a large log, and return the offset at which this start's log begins."""
        try:
            spec.data.mkdir(parents=True, exist_ok=True)
            spec.log.parent.mkdir(parents=True, exist_ok=True)
            size = spec.log.stat().st_size if spec.log.exists() else 0
            if size > _LOG_LIMIT_BYTES:
                spec.log.replace(spec.log.with_suffix(".old.log"))
                size = 0
        except OSError as error:
            raise self._unusable_folder(error) from None
        return size

    def _spawn(self, spec: ServerSpec, ports: tuple[int, ...]) -> tuple[psutil.Process, str | None]:
        """Start the server in a session of its own, which outlives terminal and parent; return it with its start."""
        command = spec.command(*ports)
        try:
            with spec.log.open("ab") as log:
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=self._folder,
                    start_new_session=True,
                )
        except OSError as error:
            raise ConfigError(
                f"{command[0]} can't be run: {error.strerror or error}.",
                way_out="Make it executable, or take it off PATH.",
            ) from None
        process = psutil.Process(child.pid)
        # Read before anything can reap a server that ended at once, since its pid may be reused then.
        since = born(child.pid)
        # If this process outlives the server, it must reap it; else a zombie stays.
        threading.Thread(target=child.wait, name=f"reap-{child.pid}", daemon=True).start()
        return process, since

    def _await_ready(self, process: psutil.Process, record: Record) -> bool:
        """Wait until the server answers; return False if it ended or the time is over."""
        deadline = time.monotonic() + _READY_SECONDS
        while time.monotonic() < deadline and _alive(process):
            if self._ready(process, record):
                return True
            time.sleep(_POLL_SECONDS)
        return False

    def _give_up(self, process: psutil.Process, record: Record, log_start: int) -> None:
        """Stop the started server and raise an error with the end of its log."""
        what = f"did not answer within {_READY_SECONDS} s" if _alive(process) else "ended while it started"
        if _alive(process):
            self._end(process, record)
        self._write(msgspec.structs.replace(record, pid=None, born=None, started=False))
        raise UnavailableError(
            f"{record.server} {what}. End of its log {record.log}:\n{_tail(Path(record.log), log_start)}",
            way_out=f"Read the log; or set {self._variable} to a server of your own.",
        )

    def _stop(self, record: Record, process: psutil.Process, progress: Callable[[str], None]) -> None:
        progress(f"{self._service}: stopping {record.server}, process {process.pid}")
        self._end(process, record)

    def _end(self, process: psutil.Process, record: Record) -> None:
        try:
            process.terminate()
            if _await_end(process, _TERMINATE_SECONDS):
                return
            process.kill()
            if _await_end(process, _KILL_SECONDS):
                return
            reason = "it does not end"
        except psutil.NoSuchProcess:
            return
        except psutil.AccessDenied:
            reason = "it is not yours"
        raise UnavailableError(
            f"{record.server}, process {process.pid}, can't be stopped: {reason}.",
            way_out=f"End process {process.pid} yourself.",
        )


def server_to_use(offered: Sequence[str], data: Path, variable: str) -> str:
    """Return which of the runnable servers to use: the first one with data, else the first.

    Args:
        offered: Their names, the preferred one first.
        data: The folder with a folder for each by its name.
        variable: The setting that names an external server instead.

    Raises:
        ConfigError: Only a server that can't be run has data here.
    """
    found = [entry.name for entry in sorted(data.glob("[!.]*")) if _holds_something(entry)]
    if having_data := [server for server in offered if server in found]:
        return having_data[0]
    if found:
        raise ConfigError(
            f"The data in {data} is of {found[0]}, which is not here any more; {offered[0]} would begin with none.",
            way_out=f"Put {found[0]} on PATH again, set {variable}, or start over: ghsync down, then move {data} away.",
        )
    return offered[0]


def _holds_something(folder: Path) -> bool:
    try:
        return any(folder.iterdir())
    except OSError:
        # No folder, or not readable, such as lost+found of a file system.
        return False


def _folder_id(folder: Path) -> str:
    """Return what identifies a folder, whatever the path to it, also after a rename."""
    stat = folder.stat()
    return f"{stat.st_dev}:{stat.st_ino}"


def _folder_exists(record: Record, process: psutil.Process | None) -> bool:
    """Return whether the folder of a record exists: above its data, or above its server's working folder.

    A folder without permission to read counts as existing, since it is another user's.
    """
    paths = [Path(record.data)]
    try:
        if process:
            # The system returns the present path of the working folder, also after a rename.
            working = process.cwd()
            # In a container the path may lead elsewhere; on Linux the process's own root is visible below /proc.
            paths += [Path(working), Path(f"/proc/{process.pid}/root/{working}")]
        return any(_is_folder_of(record, folder) for path in paths for folder in (path, *path.parents))
    except psutil.NoSuchProcess:
        return _folder_exists(record, None)
    except (psutil.AccessDenied, OSError):
        return True


def _is_folder_of(record: Record, folder: Path) -> bool:
    try:
        return _folder_id(folder) == record.folder
    except (FileNotFoundError, NotADirectoryError):
        return False


def _await_end(process: psutil.Process, seconds: float) -> bool:
    """Wait until a process has ended; a zombie, which its parent may reap late, has ended too."""
    deadline = time.monotonic() + seconds
    while _alive(process):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _is_server(process: psutil.Process, record: Record) -> bool:
    """Return whether a process is alive and was started with the record's data folder and port."""
    try:
        arguments = process.cmdline()
        return _is_given(record.data, arguments) and _is_given(str(record.port), arguments) and _alive(process)
    except psutil.Error:
        return False


def _is_given(text: str, arguments: list[str]) -> bool:
    return any(argument == text or argument.endswith(f"={text}") for argument in arguments)


def _search(record: Record) -> psutil.Process | None:
    """Find the server of a start whose starter was killed before it could record the pid."""
    own = os.getuid()
    for process in psutil.process_iter(["uids"]):
        uids = process.info["uids"]
        if uids and uids.real == own and _is_server(process, record):
            return psutil.Process(process.pid)
    return None


def _alive(process: psutil.Process) -> bool:
    return bool(process.is_running()) and born(process.pid) is not None


def _listens(process: psutil.Process, port: int) -> bool:
    try:
        sockets = process.net_connections(kind="tcp")
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        # Some systems hide a process's sockets; then the server's own answer is enough.
        return True
    return any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in sockets)


def _free_ports(last: tuple[int, ...], defaults: tuple[int, ...]) -> tuple[int, ...]:
    """Return a free port for each that is needed: that of the last start, else the default, else any."""
    taken: list[int] = []
    for number, default in enumerate(defaults):
        wanted = [port for port in (*last[number : number + 1], default) if port not in taken and _is_free(port)]
        taken.append(wanted[0] if wanted else _any_free_port(taken))
    return tuple(taken)


def _any_free_port(excluded: list[int]) -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port = int(probe.getsockname()[1])
        return port if port not in excluded else _any_free_port(excluded)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: a port in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError:
            return False
    return True


def _tail(log: Path, start: int) -> str:
    """Return the end of a log after the offset ``start``."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - _LOG_TAIL_BYTES))
            return file.read().decode("utf-8", errors="replace").strip() or "(empty)"
    except OSError as error:
        return f"(it can't be read: {error.strerror})"
