"""What a MYSQL_URL means, to the store and to the local servers alike, and what the connector makes of it."""

from __future__ import annotations

import ssl
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pymysql
import pytest

from ghsync_dagster import connector
from ghsync_dagster.domain.errors import ConfigError, UnavailableError
from ghsync_dagster.domain.source import Source
from ghsync_dagster.local import mysql, tls_stores
from ghsync_dagster.settings import load_settings
from ghsync_dagster.stores.mysql import MySqlStore
from ghsync_dagster.stores.mysql_url import MySqlAddress, parse_mysql_url

if TYPE_CHECKING:
    from pathlib import Path

PLAIN = MySqlAddress("db", 3306, "app", "pw", "new_data")
URLS = {
    "mysql://app:pw@db:3306/new_data": PLAIN,
    "mysql://app:pw@db/new_data": PLAIN,
    "MYSQL://app:pw@db/new_data\n": PLAIN,
    "mariadb://app:pw@db/new_data": PLAIN,
    "mysql+pymysql://app:pw@db/new_data": PLAIN,
    "mysql://app@db/new_data": replace(PLAIN, password=""),
    "mysql://app:@db/new_data": replace(PLAIN, password=""),
    "mysql://app:p%40ss%2F%3A%23%25@db.example:3307/new_data": replace(
        PLAIN, host="db.example", port=3307, password="p@ss/:#%"
    ),
    "mysql://app:p+s?x#y/z@db/new_data": replace(PLAIN, password="p+s?x#y/z"),
    "mysql://app:p?ssl_mode=DISABLED@db/new_data": replace(PLAIN, password="p?ssl_mode=DISABLED"),
    "mysql://%C3%BCser:%E2%82%AC@db/new_data": replace(PLAIN, user="üser", password="€"),
    "mysql://app:pw@[::1]:33060/x%20y": replace(PLAIN, host="::1", port=33060, database="x y"),
    "mysql://app:pw@db/100%2525": replace(PLAIN, database="100%25"),
    "mysql://app:pw@db/other": replace(PLAIN, database="other"),
    "mysql://app:pw@/new_data?unix_socket=/run/m.sock": replace(PLAIN, host="localhost", unix_socket="/run/m.sock"),
    "mysql://app:pw@db/new_data?ssl_mode=REQUIRED": replace(PLAIN, ssl_mode="REQUIRED"),
    "mysql://app:pw@db/new_data?ssl_mode=disabled": replace(PLAIN, ssl_mode="DISABLED"),
    "mysql://app:pw@db/new_data?ssl_ca=/a%20b/ca.pem": replace(PLAIN, ssl_mode="VERIFY_CA", ssl_ca="/a b/ca.pem"),
    "mysql://app:pw@db/new_data?ssl_ca=/ca.pem&ssl_mode=verify_identity": replace(
        PLAIN, ssl_mode="VERIFY_IDENTITY", ssl_ca="/ca.pem"
    ),
    "mysql://app:pw@db/new_data?ssl_mode=VERIFY_CA&ssl_cert=/c.pem&ssl_key=/k.pem&ssl_key_password=a%2Bb%26c": replace(
        PLAIN, ssl_mode="VERIFY_CA", ssl_cert="/c.pem", ssl_key="/k.pem", ssl_key_password="a+b&c"
    ),
}
MALFORMED = {
    "": "it is no URL",
    "s3cret": "it is no URL",
    "db1:3306": "it is no URL",
    "postgres://app:s3cret@db/new_data": "does not begin with mysql://",
    "mysql+mysqldb://app:s3cret@db/new_data": "does not begin with mysql://",
    "mysql://app:s3cret@db:33o6/new_data": "its port is no number",
    "mysql://app:s3cret@db:/new_data": "its port is no number",
    "mysql://app:s3cret@db:0/new_data": "its port is not between",
    "mysql://app:s3cret@db:99999/new_data": "its port is not between",
    "mysql://app:s3cret@db": "lacks a host, a user or a database",
    "mysql://app:s3cret@db/": "lacks a host, a user or a database",
    "mysql://app:s3cret@/new_data": "lacks a host, a user or a database",
    "mysql://db/new_data": "lacks a host, a user or a database",
    "mysql://app:a@s3cret@db/new_data": "an @ that is not percent-encoded",
    "mysql://app:s3cret@db/new_data?sslmode=require": "unknown option sslmode",
    "mysql://app:s3cret@db/new_data?ssl_mode=maybe": "ssl_mode is none of",
    "mysql://app:s3cret@db/new_data?ssl_mode": "ssl_mode has no value",
    "mysql://app:s3cret@db/new_data?ssl_mode=": "ssl_mode has no value",
    "mysql://app:s3cret@db/new_data?ssl_mode=REQUIRED&ssl_mode=DISABLED": "ssl_mode stands there more than once",
    "mysql://app:s3cret@db/new_data?ssl_key=/k.pem": "an ssl_key without an ssl_cert",
}


SOURCE = Source("11.4.5-MariaDB-log", "new_data", "Users", {}, None)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the driver is called with, in place of a connection."""
    made: list[dict[str, Any]] = []

    def connect(**arguments: Any) -> None:
        made.append(arguments)
        raise pymysql.OperationalError(2003, "nobody is there")

    monkeypatch.setattr(pymysql, "connect", connect)
    # The PEM files are not there.
    monkeypatch.setattr(ssl, "create_default_context", lambda **_: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", lambda *_: None)
    return made


@pytest.mark.parametrize(("url", "meant"), URLS.items(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_url_means_one_thing_to_the_store_and_the_status(
    calls: list[dict[str, Any]], url: str, meant: MySqlAddress
) -> None:
    assert parse_mysql_url(url) == meant
    with MySqlStore(url) as store, pytest.raises(UnavailableError):
        store.count()
    assert mysql.MysqlServer(load_settings(MYSQL_URL=url)).status().uri == str(meant)
    of_store, of_status = ({**call, "ssl": _tls(call)} for call in calls)
    for name in ("host", "port", "user", "password", "unix_socket", "ssl", "charset"):
        assert of_store[name] == of_status[name], name
    assert tuple(of_status[name] for name in ("host", "port", "user", "password")) == (
        *(meant.host, meant.port, meant.user),
        meant.password.encode(),
    )


def _tls(call: dict[str, Any]) -> tuple[Any, ...]:
    context = call.get("ssl")
    return (call.get("ssl_disabled"), context and (context.verify_mode, context.check_hostname))


@pytest.mark.parametrize(("url", "why"), MALFORMED.items())
def test_a_malformed_url_is_refused_by_all_without_its_password(url: str, why: str) -> None:
    for read in (parse_mysql_url, MySqlStore):
        with pytest.raises(ConfigError, match="MYSQL_URL is malformed") as told:
            read(url)
        assert why in str(told.value)
        assert "s3cret" not in str(told.value)


def test_the_text_of_an_address_has_no_credentials() -> None:
    address = parse_mysql_url("mysql://app:s3cret@[::1]/x%2Fy?ssl_cert=/c&ssl_key_password=s3cret")
    assert repr(address) == "MySqlAddress(mysql://[::1]:3306/x%2Fy)"


@pytest.mark.parametrize(
    ("mode", "mariadb", "mariadb_with_tls", "of_mysql"),
    [
        ("DISABLED", "disable", "disable", "disabled"),
        ("PREFERRED", "disable", "trust", "preferred"),
        ("REQUIRED", "trust", "trust", "required"),
        ("VERIFY_CA", "verify-ca", "verify-ca", "verify_ca"),
        ("VERIFY_IDENTITY", "verify-full", "verify-full", "verify_identity"),
    ],
)
def test_the_connector_gets_the_mode_in_its_own_word(
    mode: str, mariadb: str, mariadb_with_tls: str, of_mysql: str
) -> None:
    address = replace(PLAIN, ssl_mode=mode)
    assert connector.ssl_mode(address, SOURCE) == mariadb
    assert connector.ssl_mode(address, replace(SOURCE, encrypted=True)) == mariadb_with_tls
    assert connector.ssl_mode(address, replace(SOURCE, version="9.7.4")) == of_mysql


def test_the_connector_refuses_a_socket_in_words(tmp_path: Path) -> None:
    url = "mysql://app:s3cret@/new_data?unix_socket=/run/m.sock"
    with pytest.raises(ConfigError, match=r"host and port only.*without unix_socket") as told:
        connector.config_of(load_settings(GHSYNC_HOME=tmp_path), "127.0.0.1:9", url, SOURCE)
    assert "s3cret" not in str(told.value)


def test_authorities_go_to_java_only_where_the_server_is_checked(tmp_path: Path) -> None:
    pem = tmp_path / "any.pem"
    pem.write_bytes(b"text")
    files = replace(PLAIN, ssl_ca=str(pem), ssl_cert=str(pem), ssl_key=str(pem))
    assert set(tls_stores.pem_texts(replace(files, ssl_mode="VERIFY_CA"))) == {"truststore", "keystore"}
    assert set(tls_stores.pem_texts(replace(files, ssl_mode="REQUIRED"))) == {"keystore"}
    assert tls_stores.pem_texts(replace(files, ssl_mode="DISABLED")) == {}


@pytest.mark.parametrize("make", [lambda at: MySqlStore(_url(at)), lambda at: tls_stores.java_stores(at, "pw")])
@pytest.mark.parametrize("content", [None, b"", b"no PEM"])
def test_tls_files_that_cannot_be_used_are_told(tmp_path: Path, make: Any, content: bytes | None) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="TLS files of MYSQL_URL"):
        make(replace(PLAIN, ssl_mode="VERIFY_CA", ssl_ca=str(path)))


def _url(address: MySqlAddress) -> str:
    return f"mysql://app@db/new_data?ssl_mode={address.ssl_mode}&ssl_ca={address.ssl_ca}"
