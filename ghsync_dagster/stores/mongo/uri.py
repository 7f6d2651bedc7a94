"""What a ``MONGODB_URI`` says that the driver would pass over or say without its name: its options and their files.

Belongs here: what is wrong with them, in words without credentials, and what of a URI may be shown. Not here: a
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
    """Return in words what is wrong with a URI's options; None where nothing is.

    The driver warns of most of it and goes on without the option, as without TLS where ``tls`` is misspelt.

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
        # What looks like an option may be a part of the password.
        return "it is malformed: percent-encode special characters of user and password"
    return "; ".join(problems) or None


def _wrong_option(option: str, name: str, value: str) -> str | None:
    from pymongo.errors import ConfigurationError
    from pymongo.uri_parser import split_options

    if name.lower() == "compressors":
        # Of a known one that is not installed here the driver takes the next.
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
    """Return in words which options don't fit each other, the account or the number of hosts; None where all do.

    Of a ``mongodb+srv://`` URI the driver alone tells, once it has its hosts.
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
                # Without the look into DNS, which may take long.
                query = re.sub(r"(?i)(?<![^&;])srv\w*=[^&;]*[&;]?", "", query).rstrip("&;")
                more = {} if given & {"tls", "ssl"} else {"tls": True}
            # The driver's words are about its options alone: it knows neither account nor hosts.
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
    """Make a client inside: files for TLS are read then.

    Raises:
        ConfigError: One of them is there and can't be used.
    """
    from pymongo.errors import ConfigurationError

    try:
        yield
    except (OSError, ConfigurationError) as error:
        # The driver says ConfigurationError of a key that does not fit too; what TLS said is its context.
        if not isinstance(error, OSError) and not isinstance(error.__context__, ssl.SSLError):
            raise
        raise ConfigError(
            f"A file that MONGODB_URI names for TLS can't be used ({error}).",
            way_out="Correct tlsCAFile, tlsCertificateKeyFile, its tlsCertificateKeyFilePassword, or tlsCRLFile there.",
        ) from None
