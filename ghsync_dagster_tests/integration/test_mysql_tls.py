"""TLS as MYSQL_URL asks for it, against a real server with certificates: for the store and for the connector."""

from __future__ import annotations

import socket
import subprocess
import time
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import TYPE_CHECKING
from urllib.parse import quote

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ghsync_dagster.domain.errors import GhsyncError, RefusedError
from ghsync_dagster.local import mysql, stack
from ghsync_dagster.local.connect import ConnectServer
from ghsync_dagster.settings import load_settings
from ghsync_dagster.stores.mysql import MySqlStore
from ghsync_dagster.stores.mysql_url import parse_mysql_url

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ghsync_dagster.settings import Settings

pytestmark = pytest.mark.integration

PASSWORD = "k3y:p@ss"
OTHER_NAME = "127.1"
"""Leads to 127.0.0.1, and is no name of the certificate."""


class Authority:
    """An authority, and certificates that it signs, as PEM files of one folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.path = folder / f"{name}.pem"
        self.path.write_bytes(self._sign(self.name, self.key, None))

    def issue(self, name: str, *hosts: str, password: str | None = None) -> tuple[Path, Path]:
        """Write a certificate and its key; return both paths."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate, secret = self.folder / f"{name}.pem", self.folder / f"{name}-key.pem"
        certificate.write_bytes(self._sign(subject, key, hosts))
        protection = (
            serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
        )
        encoded = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection)
        secret.write_bytes(encoded)
        return certificate, secret

    def _sign(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, hosts: tuple[str, ...] | None) -> bytes:
        now = datetime.now(UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=hosts is None, path_length=None), critical=True)
        )
        if hosts:
            names: list[x509.GeneralName] = [
                x509.IPAddress(ip_address(host)) if host[0].isdigit() else x509.DNSName(host) for host in hosts
            ]
            made = made.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return made.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


class Server:
    """A MariaDB with a certificate for 127.0.0.1 and localhost."""

    def __init__(self, folder: Path, authority: Authority, settings: Settings) -> None:
        self.authority = authority
        self.other = Authority(folder, "other-authority")
        self.client = authority.issue("client", password=PASSWORD)
        program = mysql._locked_mariadb(settings, print)
        mysql._make_data(program, folder / "data")
        setup = mysql._write_setup(program, folder)
        certificate, key = authority.issue("server", "127.0.0.1", "localhost")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = mysql._command(program, folder / "data", setup, self.port)
        command.remove("--skip-ssl")
        command += [f"--ssl-ca={authority.path}", f"--ssl-cert={certificate}", f"--ssl-key={key}"]
        self.password = mysql._password(folder)
        with (folder / "server.log").open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while not mysql._logs_in(parse_mysql_url(self.url()), 3):
            assert self.process.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def url(self, host: str = "127.0.0.1", /, **options: object) -> str:
        """Return a MYSQL_URL."""
        user = options.pop("user", "ghsync")
        query = "&".join(f"{name}={quote(str(value), safe='')}" for name, value in options.items())
        return f"mysql://{user}:{self.password}@{host}:{self.port}/new_data{f'?{query}' if query else ''}"

    def with_client(self) -> dict[str, object]:
        """The options of the client's certificate."""
        return {"ssl_cert": self.client[0], "ssl_key": self.client[1], "ssl_key_password": PASSWORD}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server, with an account that must show a certificate."""
    folder = tmp_path_factory.mktemp("tls")
    made = Server(folder, Authority(folder, "authority"), load_settings(GHSYNC_HOME=folder / "home"))
    with MySqlStore(made.url()) as admin:
        admin.execute([(f"CREATE USER known IDENTIFIED BY '{made.password}' REQUIRE X509", ())])
        # The local account may grant nothing.
        right = "INSERT INTO mysql.tables_priv (Host, Db, User, Table_name, Table_priv) VALUES (%s, %s, %s, %s, %s)"
        admin.execute([(right, ("%", "new_data", "known", "Users", "Select")), ("FLUSH PRIVILEGES", ())])
    yield made
    made.process.terminate()
    made.process.wait(30)


def encrypted(url: str) -> bool:
    with MySqlStore(url, timeout_seconds=5) as store:
        assert store.count() >= 0
        return store.source().encrypted


def test_each_mode_gets_the_connection_that_it_asks_for(server: Server) -> None:
    ca = server.authority.path
    assert not encrypted(server.url(ssl_mode="DISABLED"))
    assert encrypted(server.url())
    assert encrypted(server.url(ssl_mode="REQUIRED"))
    assert encrypted(server.url(ssl_ca=ca))
    assert encrypted(server.url(ssl_mode="VERIFY_IDENTITY", ssl_ca=ca))
    # The name is none of the certificate's.
    assert encrypted(server.url(OTHER_NAME, ssl_mode="VERIFY_CA", ssl_ca=ca))


@pytest.mark.parametrize("case", ["another authority", "the system's authorities", "another name"])
def test_a_server_that_is_not_verified_is_refused_by_the_store_and_the_status(server: Server, case: str) -> None:
    url = {
        "another authority": server.url(ssl_ca=server.other.path),
        "the system's authorities": server.url(ssl_mode="VERIFY_CA"),
        "another name": server.url(OTHER_NAME, ssl_mode="VERIFY_IDENTITY", ssl_ca=server.authority.path),
    }[case]
    with MySqlStore(url, timeout_seconds=5) as store, pytest.raises(RefusedError, match="certificate is not trusted"):
        store.count()
    found = mysql.MysqlServer(load_settings(MYSQL_URL=url)).status()
    assert found.state == "down"
    assert "certificate is not trusted" in str(found.more["error"])


def test_a_server_without_tls_is_refused_where_tls_is_required(server: Server, tmp_path: Path) -> None:
    plain = stack.up(load_settings(GHSYNC_HOME=tmp_path / "plain"), ["mysql"], progress=print)["mysql"]
    try:
        assert not encrypted(str(plain.login))
        for query in ("ssl_mode=REQUIRED", f"ssl_ca={server.authority.path}"):
            url = f"{plain.login}?{query}"
            with MySqlStore(url, timeout_seconds=5) as store, pytest.raises(RefusedError, match="do not agree on TLS"):
                store.count()
    finally:
        stack.down(load_settings(GHSYNC_HOME=tmp_path / "plain"), progress=print)


def test_an_account_that_must_show_a_certificate_is_let_in_with_it_alone(server: Server) -> None:
    ca = server.authority.path
    assert encrypted(server.url(user="known", ssl_ca=ca, **server.with_client()))
    with MySqlStore(server.url(user="known", ssl_ca=ca), timeout_seconds=5) as store, pytest.raises(RefusedError):
        store.count()
    wrong = {**server.with_client(), "ssl_key_password": "another"}
    with pytest.raises(GhsyncError, match="TLS files of MYSQL_URL can't be used"):
        MySqlStore(server.url(user="known", ssl_ca=ca, **wrong))


def test_the_connector_follows_over_tls_that_it_verifies(server: Server, tmp_path: Path) -> None:
    ca = server.authority.path
    home = tmp_path / "home"

    def up(**options: object) -> dict[str, str]:
        settings = load_settings(GHSYNC_HOME=home, MYSQL_URL=server.url("localhost", **options))
        found = ConnectServer(settings).up(print)
        assert found.more["connector"] == "RUNNING"
        return dict(httpx.get(f"{found.uri}/connectors/ghsync-users/config").json())

    try:
        config = up(ssl_mode="VERIFY_IDENTITY", ssl_ca=ca, **server.with_client())
        assert config["database.ssl.mode"] == "verify-full"
        assert PASSWORD not in str(config)
        stores = {config["database.ssl.truststore"], config["database.ssl.keystore"]}
        secrets = home / "connect" / "secrets"
        assert {path.parent.parent for path in map(type(home), stores)} == {secrets}
        assert {path.stat().st_mode & 0o777 for path in secrets.glob("*/*")} == {0o600}
        with MySqlStore(server.url()) as admin:
            question = "SELECT ID FROM information_schema.PROCESSLIST WHERE COMMAND LIKE 'Binlog%'"
            assert len(admin._run("Asking", question)) == 1
        # The same files again: nothing is changed.
        assert up(ssl_mode="VERIFY_IDENTITY", ssl_ca=ca, **server.with_client()) == config
        plain = up(ssl_mode="DISABLED")
        assert plain["database.ssl.mode"] == "disable"
        assert "database.ssl.truststore" not in plain
        with pytest.raises(RefusedError, match="certificate is not trusted"):
            up(ssl_ca=server.other.path)
    finally:
        stack.down(load_settings(GHSYNC_HOME=home), progress=print)
