"""PEM files as the key stores that Java programs read.

Belongs here: the conversion. Not here: which files are meant, or who may read the stores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from ghsync_dagster.stores.mysql_url import MySqlAddress, unusable_tls_files

TRUST: Final = "truststore"
KEY: Final = "keystore"


def pem_texts(address: MySqlAddress) -> dict[str, bytes]:
    """Return the content of the PEM files that a Java program needs, by the store that it goes into.

    If the server's certificate is not verified, its authorities are left out: Java would verify it all the same.

    Raises:
        ConfigError: A file can't be read.
    """
    files: dict[str, list[str]] = {}
    if address.is_verified and address.ssl_ca:
        files[TRUST] = [address.ssl_ca]
    if address.ssl_cert and address.ssl_mode != "DISABLED":
        files[KEY] = [address.ssl_cert, *([address.ssl_key] if address.ssl_key else [])]
    try:
        return {store: b"\n".join(Path(path).read_bytes() for path in paths) for store, paths in files.items()}
    except OSError as error:
        raise unusable_tls_files(error) from None


def java_stores(address: MySqlAddress, password: str) -> dict[str, bytes]:
    """Return the PKCS#12 stores ``truststore`` and ``keystore``, if the address has files for them.

    Args:
        address: Names the PEM files.
        password: Protects the stores; Java requires one.

    Raises:
        ConfigError: A file can't be read or has the wrong content.
    """
    from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, load_pem_private_key, pkcs12
    from cryptography.x509 import load_pem_x509_certificates

    texts = pem_texts(address)
    encryption = BestAvailableEncryption(password.encode())
    made: dict[str, bytes] = {}
    try:
        if TRUST in texts:
            authorities = load_pem_x509_certificates(texts[TRUST])
            named = [pkcs12.PKCS12Certificate(one, b"authority-%d" % number) for number, one in enumerate(authorities)]
            made[TRUST] = pkcs12.serialize_java_truststore(named, encryption)
        if KEY in texts:
            chain = load_pem_x509_certificates(texts[KEY])
            secret = address.ssl_key_password
            key: Any = load_pem_private_key(texts[KEY], secret.encode() if secret else None)
            made[KEY] = pkcs12.serialize_key_and_certificates(b"client", key, chain[0], chain[1:], encryption)
    except (ValueError, TypeError) as error:
        raise unusable_tls_files(error) from None
    return made
