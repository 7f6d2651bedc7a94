"""One audit in a process of its own: ``python -m audit_once`` in this folder prints what it took as JSON.

Belongs here: what runs on any build of ghsync, which is the one on PYTHONPATH. Not here: anything of this build alone.

Bytes are what the kernel has received on each connection (``tcpi_bytes_received``), asked just before the stores are
closed: the same for all builds, and at no cost while they run.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

_BYTES_RECEIVED = 128
"""Where Linux keeps it in ``struct tcp_info``."""


def received(port: int) -> int:
    """Return how many bytes this process's connections to a port of this machine have received."""
    total = 0
    for name in Path("/proc/self/fd").iterdir():
        with suppress(OSError), socket.socket(fileno=os.dup(int(name.name))) as one:
            if one.getpeername()[1] == port:
                info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED + 8)
                total += struct.unpack_from("<Q", info, _BYTES_RECEIVED)[0]
    return total


def main() -> None:
    """Compare once; arguments: MySQL's URL, MongoDB's, its database, seconds of patience."""
    import ghsync_dagster
    from ghsync_dagster.cdc.health.audit import Patience, audit
    from ghsync_dagster.stores.mongo.users import UserStore
    from ghsync_dagster.stores.mysql import MySqlStore

    mysql_url, mongo_uri, database, patience = sys.argv[1:]
    began = time.perf_counter()
    with MySqlStore(mysql_url) as mysql, UserStore(mongo_uri, database, "Users") as mongo:
        found = audit(mysql, mongo, patience=Patience(seconds=float(patience)))
        seconds = time.perf_counter() - began
        taken = {
            "build": str(Path(ghsync_dagster.__file__).parent.parent),
            "seconds": round(seconds, 3),
            "mysql_bytes": received(urlsplit(mysql_url).port or 3306),
            "mongo_bytes": received(urlsplit(mongo_uri).port or 27017),
            "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
            "rows": found.rows,
            "documents": found.documents,
            "missing": found.missing,
            "extra": found.extra,
            "different": found.different,
            "read_again": found.reread,
        }
    sys.stdout.write(f"\n{json.dumps(taken)}\n")


if __name__ == "__main__":
    main()
