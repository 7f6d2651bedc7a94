"""MONGODB_URI: no option is passed over, a file is told with its option, and TLS is named where it may be the cause."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import dns.resolver
import pytest

from ghsync_dagster.domain.errors import ConfigError, UnavailableError
from ghsync_dagster.local.mongo import MongoServer
from ghsync_dagster.settings import load_settings
from ghsync_dagster.stores.mongo.users import UserStore
from ghsync_dagster.wiring import batch_flow

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("tls=maybe", "The value of tls must be 'true' or 'false'."),
        ("tsl=true", "Unknown option: tsl. Did you mean one of (tls, ssl, tlscafile)."),
        ("foo=bar", "Unknown option: foo."),
        ("w=1&foo=b;tls=", "Unknown option: foo."),
        ("foo=bar&tls=maybe", "; The value of tls must be"),
        ("tls", "options are key=value pairs"),
        ("tls=true&", "options are key=value pairs"),
        ("tls=true&TLS=false", "TLS is given twice"),
        ("connectTimeoutMS=soon", "connecttimeoutms must be an integer"),
        ("readPreference=foo", "foo is not a valid read preference"),
        ("authMechanism=foo", "authmechanism must be in"),
        ("compressors=zlib,foo", "compressors has 'foo'"),
        ("authSource=", "authSource database cannot be an empty string"),
        ("authMechanismProperties=PLANTED:x", "authMechanismProperties is malformed."),
        *(
            (f"tls=true&{option}=/there/is/none", f"{option} names /there/is/none, which can't be read (No such file")
            for option in ("tlsCAFile", "tlsCertificateKeyFile", "tlsCRLFile")
        ),
        ("tlsCAFile=/", "tlsCAFile names /, which can't be read (Is a directory)"),
    ],
)
def test_an_option_that_the_driver_passes_over_is_refused_without_the_password(options: str, words: str) -> None:
    with pytest.raises(ConfigError, match="Settings are wrong: MONGODB_URI: ") as caught:
        load_settings(MONGODB_URI=f"mongodb://app:PLANTED@127.0.0.1:1/x?{options}")
    assert words in caught.value.message
    assert "PLANTED" not in repr(caught.value)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("app:PLANTED@db/?tls=true&ssl=false", "conflicting values for URI options ssl and tls"),
        ("app:PLANTED@db/?tlsInsecure=true&tlsAllowInvalidCertificates=true", "tlsInsecure and tlsAllowInvalidCert"),
        ("app:PLANTED@db/?w=1;tls=true&retryWrites=true", "Can not mix '&' and ';'"),
        ("app:PLANTED@db/?w=0&journal=true", "Cannot set w to 0 and j to True"),
        ("app:PLANTED@db/?readPreference=primary&readPreferenceTags=a:b", "primary cannot be combined with tags"),
        ("app:PLANTED@db/?minPoolSize=9&maxPoolSize=5", "minPoolSize must be smaller or equal to maxPoolSize"),
        ("app:PLANTED@db/?tls=false&tlsCAFile=/dev/null", "TLS has not been enabled"),
        ("app:PLANTED@db/?loadBalanced=true&replicaSet=x", "Cannot specify replicaSet with loadBalanced=true"),
        ("app:PLANTED@db1,db2/?directConnection=true", "Cannot specify multiple hosts with directConnection=true"),
        ("app:PLANTED@db/?srvMaxHosts=1", "srvMaxHosts option is only allowed with 'mongodb+srv://'"),
        ("db/?authMechanism=SCRAM-SHA-256", "SCRAM-SHA-256 requires a username"),
        ("app@db/", "A password is required"),
        (
            "app:x@db/?authMechanism=MONGODB-OIDC&authMechanismProperties=ENVIRONMENT:PLANTED",
            "its options don't fit each other",
        ),
        ("app:x@db/?tls=true&ssl=false&tlsCertificateKeyFilePassword=PLANTED", "conflicting values"),
    ],
)
def test_options_that_do_not_fit_each_other_are_named(uri: str, words: str) -> None:
    # A name of DNS is one, and takes srvMaxHosts.
    for scheme in ("mongodb",) if "," in uri or "srv" in uri else ("mongodb", "mongodb+srv"):
        with pytest.raises(ConfigError, match="Settings are wrong: MONGODB_URI: ") as caught:
            load_settings(MONGODB_URI=f"{scheme}://{uri}")
        assert words in caught.value.message
        assert "PLANTED" not in repr(caught.value)


@pytest.mark.parametrize("uri", ["mongodb://app:1?PLANTED=maybe@db/", "mongodb://app:1?tls=PLANTED&x=@db/"])
def test_of_a_password_that_looks_like_options_nothing_is_told(uri: str) -> None:
    with pytest.raises(ConfigError, match="percent-encode special characters") as caught:
        load_settings(MONGODB_URI=uri)
    assert "PLANTED" not in repr(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "mongodb://db",
        "mongodb://app:p%3Fw@db:1,db2/x",
        "mongodb://db?tls=true",
        "mongodb://db/?",
        "mongodb://db/?readPreference=nearest&readPreferenceTags=a:b&readPreferenceTags=",
        "mongodb://db/?compressors=zstd,snappy,zlib",
        "mongodb://db/?ssl=true&replicaSet=globaldb&retrywrites=false&maxIdleTimeMS=120000&appName=@db@",
        "mongodb+srv://app:secret@db.example.com/?retryWrites=true&w=majority&appName=Cluster0",
        "mongodb+srv://db.example.com/?srvMaxHosts=2&tlsCAFile=/dev/null&srvServiceName=db",
        "mongodb+srv://app:secret@db.example.com/?tlsInsecure=true&srvMaxHosts=0",
        "mongodb://app:secret@db1:1,db2:2/?loadBalanced=false&replicaSet=x&readPreference=secondary&maxStalenessSeconds=90",
    ],
)
def test_options_that_the_driver_takes_are_taken(uri: str) -> None:
    given = load_settings(MONGODB_URI=uri).mongodb_uri
    assert given is not None
    assert given.get_secret_value() == uri


@pytest.mark.parametrize("option", ["tlsCAFile", "tlsCertificateKeyFile"])
def test_a_file_that_holds_no_certificate_is_told_with_the_setting(tmp_path: Path, option: str) -> None:
    (tmp_path / "file").write_text("no certificate")
    uri = f"mongodb://app:PLANTED@127.0.0.1:1/?tls=true&{option}={tmp_path / 'file'}"
    settings = load_settings(GHSYNC_HOME=tmp_path, MONGODB_URI=uri)
    for use in (lambda: UserStore(uri, "x", "Users"), MongoServer(settings).status):
        with pytest.raises(ConfigError, match="A file that MONGODB_URI names for TLS can't be used") as caught:
            use()
        assert option in caught.value.way_out
        assert "PLANTED" not in repr(caught.value)


@pytest.fixture(params=["closes", "waits"])
def without_tls(request: pytest.FixtureRequest) -> Iterator[int]:
    """The port of a server that takes a hello of TLS for none of its own: it closes, or waits for more."""
    held: list[socket.socket] = []

    def serve(server: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = server.accept()
                connection.recv(1)
                if request.param == "closes":
                    connection.close()
                else:
                    held.append(connection)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        yield int(server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    for connection in held:
        connection.close()


@pytest.mark.parametrize("look", ["first", "audit"])
def test_a_name_server_that_does_not_answer_is_not_awaited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: str
) -> None:
    (tmp_path / "a.json").write_text("{}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        resolver = dns.resolver.Resolver(configure=False)
        resolver.nameservers, resolver.port = ["127.0.0.1"], silent.getsockname()[1]
        monkeypatch.setattr(dns.resolver, "default_resolver", resolver)
        # The driver's own is 20 s.
        uri = "mongodb+srv://app:PLANTED@db.example.com/"
        flow = batch_flow(
            load_settings(GHSYNC_HOME=tmp_path / "home", MONGODB_URI=uri, GHSYNC_SERVER_TIMEOUT_SECONDS="0.5")
        )
        began = time.monotonic()
        with pytest.raises(UnavailableError, match="can't be looked up in DNS") as caught:
            flow.check_first([str(tmp_path)]) if look == "first" else flow.audit()
        assert time.monotonic() - began < 5
        assert silent.recv(512)
    assert "PLANTED" not in repr(caught.value)


def test_tls_is_named_where_the_server_has_none(without_tls: int) -> None:
    uri = f"mongodb://127.0.0.1:{without_tls}/?tls=true"
    with UserStore(uri, "x", "Users", timeout_seconds=0.5) as store, pytest.raises(UnavailableError) as caught:
        store.check_collection()
    assert "its TLS options (tls, tlsCAFile) fit the server" in caught.value.way_out
