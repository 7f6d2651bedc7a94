"""Starts, finds and stops one local server process, whoever asks and whatever was killed before.

Belongs here: what is the same for every server: its state file, lock, ports, readiness and end.
Not here: which server, its command line, or what makes it ready.
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
    """What is known of one service.

    Attributes:
        service: Its name, such as ``mongo``.
        state: ``up`` answers; ``down`` was stopped or never started; ``failed`` died or does not answer.
        pid: Its process here, if there is one.
        uri: Where it listens, without credentials.
        server: Which program: ``mongod``, ``secantusdb``, or ``external`` for one that is not ours.
        data: Folder of its data, if it is ours.
        log: Its log file, if it is ours.
        address_key: What JSON calls the address.
        login: The address with credentials, where it has some and is ours; for JSON only.
        more: What else is known, by the name that JSON gives it.
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
        """Return the fields but the name, as JSON knows them."""
        return self._shown(self.login or self.uri)

    def as_text(self) -> str:
        """Return one line for a person: what is known, without credentials."""
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
        data: Folder of its data; made if missing. It must stand in the command line as an argument, or after a ``=``.
        log: File that gets its output.
        default_ports: The ports it gets if they are free; it serves on the first.
        command: Its command line for its ports, given one by one; the first must stand in it as the data must.
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
        pid: Its process; None before it is started and after it was stopped.
        born: When that process began, see ``process.born``: tells it from a later one of the same pid.
        started: Whether a start was begun that no stop has ended.
        other_ports: Where it listens besides.
        folder: Names the folder that this was written in, see ``_named``; None where it is not told.
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
    """The one who starts and stops a service's server.

    A record that was written in another folder is of a copy while that folder still stands: its server is the other's
    and left alone. Where that folder is gone, this one was moved or restored from it: a server that it left runs on
    files that no path leads to, and is stopped, by ``down`` and before ``up`` starts one here.

    Args:
        service: The service's name, such as ``mongo``.
        folder: Where its state file and lock are kept.
        answers: Asks the server at a port, within some seconds, whether it serves.
        uri: Gives the address for a port.
        variable: The setting that names a server of the user's own instead.
        address_key: What JSON calls the address.
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
            choose: Gives the server to run; asked only if none runs.
            progress: Gets a line of text for each thing done.

        Raises:
            UnavailableError: It ended early or did not answer in time, with the end of its log; or one that a moved
                folder left could not be ended.
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
        """Stop the server if it runs: ask first, kill when it does not end by itself.

        Raises:
            UnavailableError: It could not be ended.
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
        """Tell how the server is; changes nothing."""
        record = self._read()
        if record is None:
            return self._unknown()
        process = self._find(record)
        if process is None:
            return self._status(record, "failed" if record.started else "down", None)
        up = self._is_here(record) and self._ready(process, record)
        return self._status(record, "up" if up else "failed", process.pid)

    def was_set_up(self) -> bool:
        """Return whether a server was ever started here, also where its state file can't be read or is a copy's."""
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
        """Return the state file's content; None where it is missing, half written by something else, or a copy's."""
        try:
            record = msgspec.json.decode(self._state_file.read_bytes(), type=Record)
        except (OSError, msgspec.MsgspecError):
            return None
        # In a copied folder the record is of the original's server.
        return record if self._is_here(record) or not _still_stands(record, self._find(record)) else None

    def _is_here(self, record: Record) -> bool:
        """Return whether a record was written in this very folder."""
        return record.folder in (None, _named(self._folder))

    def _write(self, record: Record) -> None:
        content = msgspec.json.encode(msgspec.structs.replace(record, folder=_named(self._folder)))
        write_whole(self._state_file, content, "GHSYNC_HOME")

    def _find(self, record: Record) -> psutil.Process | None:
        """Return the recorded server's process if it lives, and never somebody else's."""
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
        """Return whether this very process listens on the port and serves."""
        return _listens(process, record.port) and self._answers(record.port, _PING_SECONDS)

    def _adopt(self, record: Record, process: psutil.Process) -> ServiceStatus:
        """Wait for a server that was found running, such as one whose starter was killed."""
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
            # Written before the start too: whoever is killed in between leaves enough to find the server by.
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
        """Make the folders, put an overgrown log aside, and return where this start's log begins."""
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
        """Start the server in a session of its own, which no terminal or parent takes along; tell when it began."""
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
        # Asked while nothing can have reaped a server that ended at once, whose number might be used again.
        since = born(child.pid)
        # A parent that outlives the server must reap it, else it stays as a zombie.
        threading.Thread(target=child.wait, name=f"reap-{child.pid}", daemon=True).start()
        return process, since

    def _await_ready(self, process: psutil.Process, record: Record) -> bool:
        """Wait until the server serves; False once it ended or the time is over."""
        deadline = time.monotonic() + _READY_SECONDS
        while time.monotonic() < deadline and _alive(process):
            if self._ready(process, record):
                return True
            time.sleep(_POLL_SECONDS)
        return False

    def _give_up(self, process: psutil.Process, record: Record, log_start: int) -> None:
        """End what was started and raise what its log says."""
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
            reason = "it lives on"
        except psutil.NoSuchProcess:
            return
        except psutil.AccessDenied:
            reason = "it is not yours"
        raise UnavailableError(
            f"{record.server}, process {process.pid}, can't be stopped: {reason}.",
            way_out=f"End process {process.pid} yourself.",
        )


def server_to_use(offered: Sequence[str], data: Path, variable: str) -> str:
    """Return which of the servers that can be run is to be: the first one that has data, else the first.

    Args:
        offered: Their names, the preferred one first.
        data: Where each has a folder by its name.
        variable: The setting that names a server of the user's own instead.

    Raises:
        ConfigError: Only a server that is not offered has data here.
    """
    found = [entry.name for entry in sorted(data.glob("[!.]*")) if _holds_something(entry)]
    if having_data := [server for server in offered if server in found]:
        return having_data[0]
    if found:
        raise ConfigError(
            f"The data in {data} is of {found[0]}, which is not here any more; {offered[0]} would begin with none.",
            way_out=f"Put {found[0]} on PATH again, set {variable}, or begin anew: ghsync down, then move {data} away.",
        )
    return offered[0]


def _holds_something(folder: Path) -> bool:
    try:
        return any(folder.iterdir())
    except OSError:
        # No folder, or not ours, such as a file system's own.
        return False


def _named(folder: Path) -> str:
    """Return what names a folder by whatever path it is reached, also after it was renamed."""
    stat = folder.stat()
    return f"{stat.st_dev}:{stat.st_ino}"


def _still_stands(record: Record, process: psutil.Process | None) -> bool:
    """Return whether the folder that a record was written in is there: above its data, or where its server works.

    One that may not be looked at counts as there, since it is another user's.
    """
    places = [Path(record.data)]
    try:
        if process:
            # The system tells a server's working folder by its present path, also after it was renamed.
            works = process.cwd()
            # What a process sees by a path need not be what is here: in Linux there is a way through its own root.
            places += [Path(works), Path(f"/proc/{process.pid}/root/{works}")]
        return any(_is_named(folder, record) for place in places for folder in (place, *place.parents))
    except psutil.NoSuchProcess:
        return _still_stands(record, None)
    except (psutil.AccessDenied, OSError):
        return True


def _is_named(folder: Path, record: Record) -> bool:
    try:
        return _named(folder) == record.folder
    except (FileNotFoundError, NotADirectoryError):
        return False


def _await_end(process: psutil.Process, seconds: float) -> bool:
    """Wait until a process has ended; one that its parent has not reaped yet, which may take long, has ended too."""
    deadline = time.monotonic() + seconds
    while _alive(process):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _is_server(process: psutil.Process, record: Record) -> bool:
    """Return whether a process lives and was started with the record's data folder and port."""
    try:
        arguments = process.cmdline()
        return _stands_in(record.data, arguments) and _stands_in(str(record.port), arguments) and _alive(process)
    except psutil.Error:
        return False


def _stands_in(text: str, arguments: list[str]) -> bool:
    return any(argument == text or argument.endswith(f"={text}") for argument in arguments)


def _search(record: Record) -> psutil.Process | None:
    """Find the server of a start whose starter was killed before it could note the pid."""
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
        # Some systems do not show a process's sockets; then the server's own answer has to do.
        return True
    return any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in sockets)


def _free_ports(last: tuple[int, ...], defaults: tuple[int, ...]) -> tuple[int, ...]:
    """Return, for each port that is needed, that of the last start, else the default, else any: the first free one."""
    taken: list[int] = []
    for number, default in enumerate(defaults):
        wanted = [port for port in (*last[number : number + 1], default) if port not in taken and _is_free(port)]
        taken.append(wanted[0] if wanted else _any_free_port(taken))
    return tuple(taken)


def _any_free_port(but: list[int]) -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port = int(probe.getsockname()[1])
        return port if port not in but else _any_free_port(but)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: a port that only waits for late packets of an ended server is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError:
            return False
    return True


def _tail(log: Path, start: int) -> str:
    """Return the end of what a log got since ``start``, in bytes from its beginning."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - _LOG_TAIL_BYTES))
            return file.read().decode("utf-8", errors="replace").strip() or "(empty)"
    except OSError as error:
        return f"(it can't be read: {error.strerror})"
