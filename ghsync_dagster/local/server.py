"""One server: the external one that a setting names, else a local one.

Belongs here: which of the two is used, and what each server can do. Not here: the program, its command line and its
readiness, which each server's own module knows. ``supervisor`` starts, finds and ends processes.
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
    """A server of this machine, or the external one that a setting names, which is never started or stopped.

    Attributes:
        service: Its name, such as ``mongo``.
        variable: The setting that names an external server.
        address_key: The JSON key of the address.
        folder: The local server's files.
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
    def external(self) -> str | None:
        """The external server's address, with its credentials; None if none is set."""

    @abstractmethod
    def check_external(self, address: str) -> ServiceStatus:
        """Return the status of the external server.

        Raises:
            ConfigError: The setting is malformed.
        """

    @abstractmethod
    def choose(self, progress: Callable[[str], None]) -> ServerSpec:
        """Choose the program to run and make its first files; called only if none runs.

        Raises:
            ConfigError: No program can run on this machine.
            UnavailableError: A file that it needs can't be fetched or made.
        """

    @abstractmethod
    def uri(self, port: int) -> str:
        """Return the local server's address, without credentials."""

    @abstractmethod
    def answers(self, port: int, seconds: float) -> bool:
        """Return whether the local server answers at a port."""

    def with_details(self, status: ServiceStatus) -> ServiceStatus:
        """Add the login, and whatever else JSON holds, to the local server's status."""
        return replace(status, login=status.uri)

    def up(self, progress: Callable[[str], None]) -> ServiceStatus:
        """Start the local server unless it runs; if there is an external one, only check that.

        Raises:
            UnavailableError: It did not start; the message holds the end of its log.
            ConfigError: It can't run on this machine, or a setting is malformed.
        """
        return self.check_external(self.external) if self.external else self.start(progress)

    def start(self, progress: Callable[[str], None]) -> ServiceStatus:
        """Start the local server unless it runs."""
        return self.with_details(self.supervisor.up(lambda: self.choose(progress), progress))

    def ensure(self, progress: Callable[[str], None] | None = None) -> str:
        """Return the address to use, with credentials; start the local server if there is no external one.

        Raises:
            UnavailableError: It did not start.
            ConfigError: It can't run on this machine.
        """
        if self.external:
            return self.external
        log = get_logger(self.service)
        return str(self.up(progress or (lambda text: log.info("local server", detail=text))).login)

    def down(self, progress: Callable[[str], None]) -> ServiceStatus:
        """Stop the local server; never an external one.

        Raises:
            UnavailableError: It could not be ended.
        """
        return self.supervisor.down(progress)

    def status(self) -> ServiceStatus:
        """Return the status of the server in use.

        Raises:
            ConfigError: The setting is malformed.
        """
        return self.check_external(self.external) if self.external else self.local_status()

    def local_status(self) -> ServiceStatus:
        """Return the status of the local server."""
        return self.with_details(self.supervisor.status())

    def spec(self, server: str, ports: tuple[int, ...], command: Callable[..., list[str]]) -> ServerSpec:
        """Return how to run a program, with data and log under its own name.

        Args:
            server: The program's name.
            ports: The ports it gets if they are free; it serves on the first.
            command: Returns its command line for its ports.
        """
        return ServerSpec(server, self.data(server), self.log(server), ports, command)

    def data(self, server: str) -> Path:
        """Return the folder of a program's data: programs can't read each other's."""
        return self.folder / "data" / server

    def log(self, server: str) -> Path:
        """Return a program's log file."""
        return self.folder / "log" / f"{server}.log"

    def external_status(self, address: str, *, is_up: bool, **more: object) -> ServiceStatus:
        """Return the status of an external server, by an address without credentials."""
        return ServiceStatus(
            self.service,
            "up" if is_up else "down",
            uri=address,
            server=EXTERNAL,
            address_key=self.address_key,
            more=more,
        )
