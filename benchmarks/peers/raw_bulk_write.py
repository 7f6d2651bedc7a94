"""Raw ``bulk_write``: coalesced operations that are in memory already go to the collection, batch by batch.

Belongs here: the least work that ends in the same collection. Not here: Kafka, decoding, anything of ghsync.

The first line of the file is written before the clock starts, as a warm-up.

Usage: ``MONGODB_URI=... MONGODB_DATABASE=... python raw_bulk_write.py OPERATIONS``, where each line of OPERATIONS is a
JSON list of ``[user_id, user or null]``, null for a delete. Prints one JSON line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from pymongo import DeleteOne, MongoClient, ReplaceOne

if TYPE_CHECKING:
    from pymongo.collection import Collection

COLLECTION = "Users"

User = dict[str, str | None]
Operation = tuple[str, User | None]


def write(users: Collection[dict[str, Any]], batch: list[Operation]) -> None:
    """Replace or insert, and delete, in any order."""
    users.bulk_write(
        [
            DeleteOne({"user_id": key}) if user is None else ReplaceOne({"user_id": key}, user, upsert=True)
            for key, user in batch
        ],
        ordered=False,
    )


def main(path: Path) -> None:
    """Write all batches of a file, the first one as a warm-up."""
    decoder = msgspec.json.Decoder(list[Operation])
    with path.open("rb") as lines:
        warm_up, *batches = (decoder.decode(line) for line in lines)
    with MongoClient[dict[str, Any]](os.environ["MONGODB_URI"]) as client:
        users = client[os.environ["MONGODB_DATABASE"]][COLLECTION]
        write(users, warm_up)
        started, cpu = time.perf_counter(), time.process_time()
        for batch in batches:
            write(users, batch)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    told = {"seconds": seconds, "cpu_seconds": cpu_seconds, "operations": sum(map(len, batches))}
    print(json.dumps(told | {"batches": len(batches)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
