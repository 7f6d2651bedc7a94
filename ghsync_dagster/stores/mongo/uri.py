"""Checks of the options in ``MONGODB_URI`` and of their files, which the driver would ignore or not name.

Belongs here: what is wrong with them, without credentials, and the part of a URI that may be shown. Not here: a
connection, or how it fails.
"""

from __future__ import annotations

import re
import ssl
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from ghsync_dagster.domain.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

_COMPRESSORS: Final = frozenset({"snappy", "zlib", "zstd"})
_MAY_REPEAT: Final = "readpreferencetags"
_HOLDS_TOKENS: Final = "authmechanismproperties"
_SCHEME: Final = re.compile(r"^(mongodb(?:\+srv)?://)")
_HOSTS: Final = re.compile(r"^[\w.\-:,\[\]%]+")


def without_credentials(uri: str) -> str:
    """Return a MongoDB URI's scheme and hosts: no user, no password, no options.

    >>> without_credentials("mongodb://app:s3cret@db1:27017,db2:27017/x?tls=true")
    'mongodb://db1:27017,db2:27017'
    """
    scheme = _SCHEME.match(uri)
    hosts = _HOSTS.match((uri[scheme.end() :] if scheme else uri).rpartition("@")[2])
    return f"{scheme[0] if scheme else ''}{hosts[0] if hosts else ''}"


def wrong_options(uri: str) -> str | None:
    """Return a description of what is wrong with a URI's options; None if nothing is.

    For most problems the driver only warns and ignores the option: without TLS, for example, if ``tls`` is misspelt.

    >>> wrong_options("mongodb://app:s3cret@db/?tls=maybe")
    "The value of tls must be 'true' or 'false'"
    """
    query = uri.partition("?")[2]
    given: set[str] = set()
    problems: list[str] = []
    for option in re.split("[&;]", query) if query else ():
        name, _, value = option.partition("=")
        if name.lower() in given - {_MAY_REPEAT}:
            problems.append(f"{name} is given twice")
        given.add(name.lower())
        if problem := _wrong_option(option, name, value):
            problems.append(problem)
    if not problems and (problem := _conflict(uri, given)):
        problems.append(problem)
    if problems and "@" in query:
        # An apparent option may be a part of the password.
        return "it is malformed: percent-encode special characters of user and password"
    return "; ".join(problems) or None


def _wrong_option(option: str, name: str, value: str) -> str | None:
    from pymongo.errors import ConfigurationError
    from pymongo.uri_parser import split_options

    if name.lower() == "compressors":
        # If a known one is not installed here, the driver uses the next.
        unknown = sorted(set(value.split(",")) - _COMPRESSORS)
        return f"compressors has {unknown[0]!r}: known are {', '.join(sorted(_COMPRESSORS))}" if unknown else None
    try:
        split_options(option)
    except OSError as error:
        return f"{name} names {error.filename}, which can't be read ({error.strerror})"
    except (ConfigurationError, TypeError, ValueError) as error:
        return f"{name} is malformed" if name.lower() == _HOLDS_TOKENS else str(error).partition(" or maybe ")[0]
    return None


def _conflict(uri: str, given: set[str]) -> str | None:
    """Return which options conflict with each other, the account or the number of hosts; None if none do.

    Of a ``mongodb+srv://`` URI only the driver can check the hosts, once it has resolved them.
    """
    from pymongo import MongoClient
    from pymongo.errors import ConfigurationError
    from pymongo.uri_parser import split_options

    scheme, _, rest = uri.partition("://")
    authority, _, query = rest.partition("?")
    account, at, hosts = authority.rpartition("@")
    account = ("user:password" if ":" in account else "user") if at else ""
    hosts = ",".join("db" for _ in hosts.split(","))
    more: dict[str, Any] = {}
    try:
        with warnings.catch_warnings():
            # A compressor that is not installed is no conflict.
            warnings.simplefilter("ignore")
            if query:
                split_options(query)
            if scheme.endswith("+srv"):
                # Without the DNS query, which may take long.
                query = re.sub(r"(?i)(?<![^&;])srv\w*=[^&;]*[&;]?", "", query).rstrip("&;")
                more = {} if given & {"tls", "ssl"} else {"tls": True}
            # The driver's message concerns the options alone: it gets neither account nor hosts.
            MongoClient[dict[str, object]](f"mongodb://{account}{at}{hosts}/?{query}", connect=False, **more).close()
    except OSError:
        return None  # of a file, see tls_files
    except (ConfigurationError, ValueError) as error:
        if isinstance(error.__context__, ssl.SSLError):
            return None
        return "its options don't fit each other" if _HOLDS_TOKENS in given else str(error)
    return None


@contextmanager
def tls_files() -> Iterator[None]:
    """Translate the errors of TLS files, which the driver reads when it makes a client.

    Raises:
        ConfigError: One of them can't be used.
    """
    from pymongo.errors import ConfigurationError

    try:
        yield
    except (OSError, ConfigurationError) as error:
        # The driver raises ConfigurationError for a key that does not match too; the error of TLS is its context.
        if not isinstance(error, OSError) and not isinstance(error.__context__, ssl.SSLError):
            raise
        raise ConfigError(
            f"A file that MONGODB_URI names for TLS can't be used ({error}).",
            way_out="Correct tlsCAFile, tlsCertificateKeyFile, its tlsCertificateKeyFilePassword, or tlsCRLFile there.",
        ) from None
