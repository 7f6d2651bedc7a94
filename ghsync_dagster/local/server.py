"""One server: the one that a setting names, else one of our own on this machine.

Belongs here: what is the same for each, so which of the two counts, and what can be done with either. Not here: which
program it is, its command line, or what makes it ready: each server's own module knows that. How a process is started,
found and ended is the supervisor's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Final

from ghsync_dagster.local.supervisor import ServerSpec, ServiceStatus, Supervisor
from ghsync_dagster.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ghsync_dagster.settings import Settings

EXTERNAL: Final = "external"


class LocalServer(ABC):
    """A server of this machine, or the one that a setting names in its place, which is only ever asked.

    Attributes:
        service: Its name, such as ``mongo``.
        variable: The setting that names a server of the user's own.
        address_key: What JSON calls the address.
        folder: Where the local server's files are.
    """

    service: ClassVar[str]
    variable: ClassVar[str]
    address_key: ClassVar[str] = "url"

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.folder = settings.home_dir / self.service
        self.supervisor = Supervisor(
            self.service,
            self.folder,
            self.answers,
            self.uri,
            variable=self.variable,
            address_key=self.address_key,
        )

    @property
    @abstractmethod
    def named(self) -> str | None:
        """The address of the user's own server, with its credentials; None where none is set."""

    @abstractmethod
    def ask_named(self, address: str) -> ServiceStatus:
        """Tell how the server is that the setting names.

        Raises:
            ConfigError: The setting is malformed.
        """

    @abstractmethod
    def choose(self, progress: Callable[[str], None]) -> ServerSpec:
        """Choose the program to run and make its first files; asked only where none runs.

        Raises:
            ConfigError: No program can run on this machine.
            UnavailableError: What it needs can't be fetched or made.
        """

    @abstractmethod
    def uri(self, port: int) -> str:
        """Return the local server's address, without credentials."""

    @abstractmethod
    def answers(self, port: int, seconds: float) -> bool:
        """Return whether the local server serves at a port."""

    def known(self, status: ServiceStatus) -> ServiceStatus:
        """Add to the local server's status what else is known of it."""
        return replace(status, login=status.uri)

    def up(self, progress: Callable[[str], None]) -> ServiceStatus:
        """Start the local server unless it runs; where the setting names one, only ask that.

        Raises:
            UnavailableError: It did not start; holds the end of its log.
            ConfigError: It can't run on this machine, or a setting is malformed.
        """
        return self.ask_named(self.named) if self.named else self.start(progress)

    def start(self, progress: Callable[[str], None]) -> ServiceStatus:
        """Start the local server unless it runs."""
        return self.known(self.supervisor.up(lambda: self.choose(progress), progress))

    def ensure(self, progress: Callable[[str], None] | None = None) -> str:
        """Return the address to use, with credentials; start the local server where none is named.

        Raises:
            UnavailableError: It did not start.
            ConfigError: It can't run on this machine.
        """
        if self.named:
            return self.named
        log = get_logger(self.service)
        return str(self.up(progress or (lambda text: log.info("local_server", detail=text))).login)

    def down(self, progress: Callable[[str], None]) -> ServiceStatus:
        """Stop the local server; never one that the setting names.

        Raises:
            UnavailableError: It could not be ended.
        """
        return self.supervisor.down(progress)

    def status(self) -> ServiceStatus:
        """Tell how the server in use is.

        Raises:
            ConfigError: The setting is malformed.
        """
        return self.ask_named(self.named) if self.named else self.local_status()

    def local_status(self) -> ServiceStatus:
        """Tell how the local server is."""
        return self.known(self.supervisor.status())

    def spec(self, server: str, ports: tuple[int, ...], command: Callable[..., list[str]]) -> ServerSpec:
        """Return how to run a program, whose data and log have a place of their own.

        Args:
            server: The program's name.
            ports: The ports it gets if they are free; it serves on the first.
            command: Returns its command line for its ports.
        """
        return ServerSpec(server, self.data(server), self.log(server), ports, command)

    def data(self, server: str) -> Path:
        """Return the folder of a program's data: none can read another's."""
        return self.folder / "data" / server

    def log(self, server: str) -> Path:
        """Return a program's log file."""
        return self.folder / "log" / f"{server}.log"

    def told(self, address: str, *, is_up: bool, **more: object) -> ServiceStatus:
        """Return the status of a server that the setting names, by an address that may be shown."""
        return ServiceStatus(
            self.service,
            "up" if is_up else "down",
            uri=address,
            server=EXTERNAL,
            address_key=self.address_key,
            more=more,
        )
