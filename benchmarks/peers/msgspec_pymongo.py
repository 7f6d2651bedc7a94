"""The floor of the batch load: one Python process, msgspec and pymongo, no Spark, no recovery, no lease.

Belongs here: the least work that ends in the same collection. Not here: anything of ghsync.

The steps: decode, keep the newest event of a user, create the collection with its validator and unique index, insert
unordered with the marker, read back what carries the marker, compare, insert what is missing, remove the marker. With
``--versions`` it also stores the ``created_at`` and ``id`` each user came from, which is what lets a later load tell
newer from older.

Usage: ``MONGODB_URI=... MONGODB_DATABASE=... python msgspec_pymongo.py EVENTS [--versions]``, prints one JSON line.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from pymongo import MongoClient

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

COLLECTION = "Users"
VERSIONS = "_ghsync_versions"
MARKER = {"spark_temp": "spark_write"}
CHUNK_BYTES = 8 * 1024 * 1024
INSERT_BATCH = 50_000
TEXT_OR_NULL = {"bsonType": ["string", "null"]}
CONTRACT = {
    "$jsonSchema": {
        "bsonType": "object",
        "required": ["user_id", "login", "gravatar_id", "avatar_url", "url"],
        "properties": {
            "_id": {},
            "user_id": {"bsonType": "string", "pattern": "^-?[0-9]+$"},
            "login": TEXT_OR_NULL,
            "gravatar_id": TEXT_OR_NULL,
            "avatar_url": TEXT_OR_NULL,
            "url": TEXT_OR_NULL,
            "spark_temp": {"enum": ["spark_write"]},
        },
        "additionalProperties": False,
    }
}


class Actor(msgspec.Struct, gc=False):
    """The fields of an event's actor that end in a user."""

    id: int
    login: str | None = None
    gravatar_id: str | None = None
    url: str | None = None
    avatar_url: str | None = None


class Event(msgspec.Struct, gc=False):
    """The fields of an event that decide a user's newest state."""

    id: str
    created_at: str
    actor: Actor


def chunks_of_lines(path: Path) -> Iterator[bytes]:
    """Yield the file's bytes in chunks that end with a whole line."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk + stream.readline()


def newest_events(path: Path) -> tuple[int, dict[int, Event]]:
    """Return the number of events, and the newest event of each user by ``created_at``, then numeric ``id``."""
    decoder = msgspec.json.Decoder(Event)
    newest: dict[int, Event] = {}
    events = 0
    for chunk in chunks_of_lines(path):
        for event in decoder.decode_lines(chunk):
            events += 1
            held = newest.get(event.actor.id)
            if held is None or (event.created_at, int(event.id)) >= (held.created_at, int(held.id)):
                newest[event.actor.id] = event
    return events, newest


def as_document(actor: Actor) -> dict[str, Any]:
    """Return the user's five fields as they are stored."""
    return {
        "user_id": str(actor.id),
        "login": actor.login,
        "gravatar_id": actor.gravatar_id,
        "avatar_url": actor.avatar_url,
        "url": actor.url,
    }


def in_batches(documents: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield the documents in lists of up to ``INSERT_BATCH``."""
    batch: list[dict[str, Any]] = []
    for document in documents:
        batch.append(document)
        if len(batch) == INSERT_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def main(path: Path, uri: str, database: str, *, versions: bool) -> dict[str, object]:
    """Load the events of ``path`` and return the seconds of each phase and the counts."""
    phases: dict[str, float] = {}
    started = time.perf_counter()

    def done(phase: str) -> None:
        nonlocal started
        now = time.perf_counter()
        phases[phase] = round(now - started, 3)
        started = now

    events, newest = newest_events(path)
    done("read")

    with MongoClient[dict[str, Any]](uri) as client:
        users = client[database].create_collection(COLLECTION, validator=CONTRACT)
        users.create_index("user_id", unique=True)
        done("prepare")

        for batch in in_batches({**as_document(event.actor), **MARKER} for event in newest.values()):
            users.insert_many(batch, ordered=False)
        done("write")

        missing = dict(newest)
        for stored in users.find(MARKER, {"_id": False, "spark_temp": False}):
            event = missing.get(int(stored["user_id"]))
            if event is not None and as_document(event.actor) == stored:
                del missing[int(stored["user_id"])]
        done("compare")

        for batch in in_batches({**as_document(event.actor), **MARKER} for event in missing.values()):
            users.insert_many(batch, ordered=False)
        done("write_missing")

        if versions:
            entries = (
                {"_id": str(user), "created_at": event.created_at, "event_id": event.id}
                for user, event in newest.items()
            )
            for batch in in_batches(entries):
                client[database][VERSIONS].insert_many(batch, ordered=False)
            done("versions")

        users.update_many(MARKER, {"$unset": {"spark_temp": ""}})
        done("unset")

    return {"phases": phases, "events": events, "users": len(newest), "missing": len(missing)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("events", type=Path)
    parser.add_argument("--versions", action="store_true", help="also store what each user came from")
    options = parser.parse_args()
    print(
        json.dumps(
            main(
                options.events,
                os.environ["MONGODB_URI"],
                os.environ["MONGODB_DATABASE"],
                versions=options.versions,
            )
        )
    )
