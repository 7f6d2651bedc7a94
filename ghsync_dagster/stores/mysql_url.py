"""Parses a ``MYSQL_URL`` and opens connections by it, for the store and the local servers.

Belongs here: the URL's parts and options, the TLS context that they need, and the driver's call. Not here: the queries,
or how a failure of them is worded.
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, quote, unquote

from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster.logging import redact

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

DEFAULT_PORT: Final = 3306
_NO_LIMIT: Final = 2**64 - 1
_HIGHEST_PORT: Final = 65_535
_SCHEMES: Final = ("mysql", "mariadb", "mysql+pymysql", "mariadb+pymysql")
_MODES: Final = ("DISABLED", "PREFERRED", "REQUIRED", "VERIFY_CA", "VERIFY_IDENTITY")
_OPTIONS: Final = ("ssl_mode", "ssl_ca", "ssl_cert", "ssl_key", "ssl_key_password", "unix_socket")
_QUERY: Final = re.compile(r"@[^/?]*/[^?]*\?(.*)", re.DOTALL)
_URL_FORM: Final = "mysql://user:password@host:port/new_data"


@dataclass(frozen=True, slots=True)
class MySqlAddress:
    """A parsed ``MYSQL_URL``. Its text form shows no credentials.

    Attributes:
        host: Name or address.
        port: TCP port.
        user: The account.
        password: Its password; empty where there is none.
        database: The database of the table.
        unix_socket: Path of a socket in place of host and port, or None.
        ssl_mode: ``DISABLED``, ``PREFERRED`` (TLS where the server has it, unverified), ``REQUIRED`` (TLS, unverified),
            ``VERIFY_CA`` or ``VERIFY_IDENTITY``, as in the mysql client.
        ssl_ca: PEM file of the authorities, or None for the system's.
        ssl_cert: PEM file of the client's certificate, or None.
        ssl_key: PEM file of its key, or None where ``ssl_cert`` holds it.
        ssl_key_password: The key's password, or None.
    """

    host: str
    port: int
    user: str
    password: str
    database: str
    unix_socket: str | None = None
    ssl_mode: str = "PREFERRED"
    ssl_ca: str | None = None
    ssl_cert: str | None = None
    ssl_key: str | None = None
    ssl_key_password: str | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        return f"MySqlAddress({self})"

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"mysql://{self.unix_socket or f'{host}:{self.port}'}/{quote(self.database, safe='')}"

    @property
    def is_verified(self) -> bool:
        """Whether the server's certificate is checked."""
        return self.ssl_mode.startswith("VERIFY")

    @property
    def requires_tls(self) -> bool:
        """Whether a connection without TLS is to be refused."""
        return self.ssl_mode == "REQUIRED" or self.is_verified


def parse_mysql_url(url: str) -> MySqlAddress:
    """Read a ``MYSQL_URL``: ``mysql://user:password@host:port/database?option=value``.

    User, password and database are percent-decoded. Options: ``ssl_mode``, ``ssl_ca``, ``ssl_cert``, ``ssl_key``,
    ``ssl_key_password``, ``unix_socket``. As in the mysql client, an ``ssl_ca`` without a mode means ``VERIFY_CA``.

    Raises:
        ConfigError: It is malformed. The message names the fault and shows no credentials.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parts = make_url(url.strip())
    except (ArgumentError, ValueError):
        raise _malformed("it is no URL, or its port is no number") from None
    if parts.drivername.lower() not in _SCHEMES:
        raise _malformed("it does not begin with mysql:// or mariadb://")
    if "@" in (parts.host or ""):
        raise _malformed("its user or password holds an @ that is not percent-encoded")
    given = _options(url.strip())
    if not parts.username or not parts.database or not (parts.host or "unix_socket" in given):
        raise _malformed("it lacks a host, a user or a database")
    port = DEFAULT_PORT if parts.port is None else parts.port
    if not 0 < port <= _HIGHEST_PORT:
        raise _malformed(f"its port is not between 1 and {_HIGHEST_PORT}")
    mode = given.pop("ssl_mode", "VERIFY_CA" if "ssl_ca" in given else "PREFERRED").upper()
    if mode not in _MODES:
        raise _malformed(f"ssl_mode is none of {', '.join(_MODES)}")
    if "ssl_key" in given and "ssl_cert" not in given:
        raise _malformed("it has an ssl_key without an ssl_cert")
    return MySqlAddress(
        host=parts.host or "localhost",
        port=port,
        user=parts.username,
        password=str(parts.password or ""),
        # SQLAlchemy decodes user and password only.
        database=unquote(parts.database),
        ssl_mode=mode,
        **given,
    )


def _options(url: str) -> dict[str, str]:
    """Return the URL's options. SQLAlchemy would drop those without a value."""
    found = _QUERY.search(url)
    pairs = parse_qsl(found[1], keep_blank_values=True) if found else []
    names = [name for name, _ in pairs]
    if unknown := sorted(set(names) - set(_OPTIONS)):
        raise _malformed(f"unknown option {', '.join(unknown)}; there are {', '.join(_OPTIONS)}")
    for name, value in pairs:
        if not value or names.count(name) > 1:
            raise _malformed(f"{name} has no value" if not value else f"{name} stands there more than once")
    return dict(pairs)


def _malformed(why: str) -> ConfigError:
    return ConfigError(
        f"MYSQL_URL is malformed: {why}.",
        way_out=f"Write it as {_URL_FORM}, with special characters of user and password percent-encoded.",
    )


def tls_context(address: MySqlAddress) -> ssl.SSLContext | None:
    """Return the TLS context of an address; None where TLS is left to the server or disabled.

    Raises:
        ConfigError: A file can't be read.
    """
    if not address.requires_tls and not (address.ssl_mode == "PREFERRED" and address.ssl_cert):
        return None
    try:
        context = ssl.create_default_context(cafile=address.ssl_ca)
        if address.ssl_cert:
            # Without a password OpenSSL would prompt at the terminal, so an empty one is given.
            context.load_cert_chain(address.ssl_cert, address.ssl_key, address.ssl_key_password or "")
    except (OSError, ssl.SSLError) as error:
        raise unusable_tls_files(error) from None
    # Certificates that MySQL generates do not pass the strict mode of newer Pythons.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.check_hostname = address.ssl_mode == "VERIFY_IDENTITY"
    context.verify_mode = ssl.CERT_REQUIRED if address.is_verified else ssl.CERT_NONE
    return context


def unusable_tls_files(error: Exception) -> ConfigError:
    """Return the error of TLS files that can't be read or don't belong together."""
    return ConfigError(
        f"The TLS files of MYSQL_URL can't be used ({type(error).__name__}: {error}).",
        way_out="Check that ssl_ca, ssl_cert and ssl_key name readable PEM files that belong together.",
    )


def connect(
    address: MySqlAddress,
    tls: ssl.SSLContext | None,
    *,
    seconds: float,
    answer_seconds: float,
    database: str | None = None,
    client_flag: int = 0,
) -> Connection[Cursor]:
    """Open a connection with autocommit.

    Args:
        address: The server and the account.
        tls: From ``tls_context``.
        seconds: How long connecting may take.
        answer_seconds: How long an answer may take.
        database: The default database, if any.
        client_flag: The driver's capability flags.

    Raises:
        pymysql.MySQLError: The driver's own.
        OSError: The driver's own.
    """
    import pymysql

    # With a context the driver refuses a server without TLS; without one it uses TLS if the server has it.
    wants: dict[str, Any] = {"ssl_disabled": True} if address.ssl_mode == "DISABLED" else {"ssl": tls} if tls else {}
    return pymysql.connect(
        host=address.host,
        port=address.port,
        user=address.user,
        # The driver would encode text as Latin-1, while MySQL uses UTF-8.
        password=address.password.encode(),
        database=database,
        unix_socket=address.unix_socket,
        charset="utf8mb4",
        autocommit=True,
        client_flag=client_flag,
        connect_timeout=seconds,
        read_timeout=answer_seconds,
        write_timeout=answer_seconds,
        program_name="ghsync",
        # A default limit of the server would cut rows off, and their users would count as removed.
        init_command=f"SET SESSION sql_select_limit = {_NO_LIMIT}",
        **wants,
    )


def tls_problem(error: Exception) -> tuple[str, str] | None:
    """Return why a connection failed and the way out, if TLS is the reason; else None."""
    from pymysql.constants import CR

    cause = getattr(error, "original_exception", error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return (
            f"MySQL's certificate is not trusted ({cause.verify_message})",
            "Point ssl_ca in MYSQL_URL at its authority's PEM file; for VERIFY_IDENTITY name its host.",
        )
    if isinstance(cause, ssl.SSLError) or (error.args and error.args[0] == CR.CR_SSL_CONNECTION_ERROR):
        return (
            f"MySQL and ghsync do not agree on TLS ({redact(str(error.args[-1] if error.args else error))})",
            "Check ssl_mode, ssl_cert and ssl_key in MYSQL_URL and the server's TLS settings.",
        )
    return None
