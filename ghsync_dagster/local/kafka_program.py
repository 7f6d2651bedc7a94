"""A program of Kafka's jars: the broker or the Connect worker.

Belongs here: how Java runs it, its log and its file of settings. Not here: the settings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster.jvm.jars import ensure_jars, locked_set
from ghsync_dagster.jvm.java import find_java
from ghsync_dagster.local.server import LocalServer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from ghsync_dagster.local.supervisor import ServerSpec

_SEPARATORS: Final = frozenset(":,}")
_LOG4J: Final = """status=warn
appender.out.type=Console
appender.out.name=out
appender.out.layout.type=PatternLayout
appender.out.layout.pattern=%d{ISO8601} %-5p %m [%c]%n
rootLogger.level=WARN
rootLogger.appenderRef.out.ref=out
logger.main.name=kafka.server
logger.main.level=INFO
logger.connect.name=org.apache.kafka.connect.runtime.distributed
logger.connect.level=INFO
logger.debezium.name=io.debezium
logger.debezium.level=INFO
logger.threads.name=io.debezium.util.Threads
logger.threads.level=WARN
"""


class KafkaProgram(LocalServer):
    """A server that is a program of Kafka's jars, with one file of settings."""

    def java_spec(
        self,
        main: str,
        ports: tuple[int, ...],
        values: Callable[..., Mapping[str, object]],
        progress: Callable[[str], None],
        *,
        heap: int,
    ) -> ServerSpec:
        """Return how to run the server.

        Args:
            main: The program's class.
            ports: The ports it gets if they are free.
            values: Returns its settings for its ports.
            progress: Gets a line of text now and then while jars load.
            heap: Its greatest heap in megabytes.

        Raises:
            UnavailableError: A jar is missing and can't be fetched.
            ConfigError: There is no Java 17+, or a path has a character that separates paths.
        """
        java, *program = self.java_program(main, [str(self.settings_file)], progress, heap=heap)

        def command(port: int, *others: int) -> list[str]:
            self.settings_file.write_text(properties(values(port, *others)), encoding="ascii")
            # The supervisor identifies the process by its data folder and port.
            return [java, f"-Dghsync.data={self.data(self.service)}", f"-Dghsync.port={port}", *program]

        return self.spec(self.service, ports, command)

    @property
    def settings_file(self) -> Path:
        """The file of settings that the server was last started with."""
        return self.folder / "server.properties"

    def java_program(self, main: str, arguments: list[str], progress: Callable[[str], None], *, heap: int) -> list[str]:
        """Return the command line that runs a program of Kafka's jars, fetched if they are missing.

        Raises:
            UnavailableError: A jar is missing and can't be fetched.
            ConfigError: There is no Java 17+, or a path has a character that separates paths.
        """
        for variable, folder in (("GHSYNC_HOME", self.settings.home_dir), ("GHSYNC_CACHE", self.settings.cache_dir)):
            if found := set(str(folder)) & _SEPARATORS:
                raise ConfigError(
                    f"The path {folder} has a {found.pop()!r} in it, which separates paths for Java and Kafka.",
                    way_out=f"Set {variable} to another folder.",
                )
        jars = ensure_jars(self.settings, progress, locked_set("kafka"))
        log4j = self.folder / "log4j2.properties"
        log4j.write_text(_LOG4J, encoding="ascii")
        return [
            *(str(find_java(self.settings).command), f"-Xmx{heap}m", "-Xss512k", "-XX:MaxDirectMemorySize=64m"),
            # One compiler takes two thirds of the processor time until the servers are warm, and a little more then.
            *("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:+ExitOnOutOfMemoryError", "-Djava.awt.headless=true"),
            *(f"-Dlog4j2.configurationFile={log4j.as_uri()}", "-cp", ":".join(map(str, jars)), main, *arguments),
        ]


def properties(values: Mapping[str, object]) -> str:
    r"""Return the text of a Java properties file.

    >>> properties({"a": 1, "path": "\\ä"})
    'a=1\npath=\\\\\\u00e4\n'
    """
    return "".join(f"{name}={_escaped(str(value))}\n" for name, value in values.items())


def _escaped(value: str) -> str:
    # java.util.Properties reads Latin-1 with UTF-16 escapes.
    units = value.replace("\\", "\\\\").encode("utf-16-be")
    codes = [int.from_bytes(units[at : at + 2], "big") for at in range(0, len(units), 2)]
    return "".join(chr(code) if 32 <= code < 127 else f"\\u{code:04x}" for code in codes)
