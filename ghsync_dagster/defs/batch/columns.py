"""The columns of the tables of the batch flow for the UI: type, description, and lineage.

Belongs here: descriptions and lineage. Names and types come from the domain's declarations. Not here: counts and
samples, which are ``defs.batch.metadata``'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import dagster as dg

from ghsync_dagster.domain.event import event_shape
from ghsync_dagster.domain.user import USER_FIELDS, json_schema

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

EVENT_FILES: Final = "event_files"
RAW_EVENTS: Final = "raw_events"
QUARANTINED_EVENTS: Final = "quarantined_events"
USERS: Final = "users"
MONGO_USERS: Final = "mongo_users"
USERS_CHANGES: Final = "users_changes"

_SPARK: Final = {int: "bigint", str: "string"}
_JSON: Final = {int: "integer", str: "string"}
_KEY: Final = USER_FIELDS[0]

OF_USERS: Final = {
    "user_id": "GitHub's number of the user, as decimal text: the key.",
    "login": "The user's name on GitHub; it may change.",
    "gravatar_id": "Old id of the picture at Gravatar, mostly empty.",
    "avatar_url": "Address of the user's picture.",
    "url": "Address of the user in GitHub's API.",
}
"""The description of each field of a user."""
_OF_EVENTS: Final = {
    "id": "The event's number, as decimal text; the higher is the newer among events of one second.",
    "type": "Kind of event, such as PushEvent.",
    "created_at": "When it happened, ISO 8601, UTC; the newest event of a user gives the fields.",
    "actor.id": "GitHub's number of the user who acted.",
    "actor.login": OF_USERS["login"],
    "actor.gravatar_id": OF_USERS["gravatar_id"],
    "actor.url": OF_USERS["url"],
    "actor.avatar_url": OF_USERS["avatar_url"],
    "repo.id": "GitHub's number of the repository.",
    "repo.name": "OWNER/NAME of the repository.",
    "repo.url": "Address of the repository in GitHub's API.",
}
_OF_VERSION: Final = {
    "created_at": "When the event happened that gave the fields.",
    "event_id": "Number of the event that gave the fields.",
}
_NEVER_NULL: Final = ("id", "type", "created_at", "actor.id", "event_id", _KEY)


def leaves(shape: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, type]]:
    """Yield the dotted name and the type of each value in what ``event_shape`` gives."""
    for name, part in shape.items():
        if isinstance(part, dict):
            yield from leaves(part, f"{prefix}{name}.")
        else:
            yield prefix + name, part


class Table(NamedTuple):
    """A table's schema and lineage, which the UI shows also for an empty table.

    Attributes:
        schema: Its columns.
        lineage: For each of them, the asset and column that it comes from.
    """

    schema: dg.TableSchema
    lineage: Mapping[str, list[tuple[str, str]]]

    def metadata(self) -> dict[str, Any]:
        """Return the metadata of definition and materialization."""
        deps = {
            column: [dg.TableColumnDep(asset, origin) for asset, origin in origins]
            for column, origins in self.lineage.items()
        }
        return {
            "dagster/column_schema": self.schema,
            **({"dagster/column_lineage": dg.TableColumnLineage(deps)} if deps else {}),
        }


def _schema(columns: Iterable[tuple[str, str, str]]) -> dg.TableSchema:
    return dg.TableSchema(
        [
            dg.TableColumn(
                name,
                kind,
                description=words,
                constraints=dg.TableColumnConstraints(nullable=name not in _NEVER_NULL, unique=name == _KEY),
            )
            for name, kind, words in columns
        ]
    )


def _of_events(types: Mapping[type, str]) -> dg.TableSchema:
    return _schema((name, types[kind], _OF_EVENTS[name]) for name, kind in leaves(event_shape()))


def _of_stored() -> Iterator[tuple[str, str, str]]:
    # Without the marker, which documents have during a load only.
    yield "_id", "objectId", "MongoDB's own key; a load leaves it as it is."
    properties = json_schema()["properties"]
    for name in USER_FIELDS:
        kinds = properties[name]["bsonType"]
        yield name, kinds if isinstance(kinds, str) else kinds[0], OF_USERS[name]


TABLES: Final = {
    EVENT_FILES: Table(_of_events(_JSON), {}),
    RAW_EVENTS: Table(_of_events(_SPARK), {name: [(EVENT_FILES, name)] for name, _ in leaves(event_shape())}),
    QUARANTINED_EVENTS: Table(
        dg.TableSchema(
            [
                dg.TableColumn("file", "string", description="Absolute path of the file."),
                dg.TableColumn("line", "bigint", description="The line's number in it, from 1."),
                dg.TableColumn("reason", "string", description="Why it is no usable event, in words."),
                dg.TableColumn("raw", "string", description="The line as it stands there, up to 2,000 characters."),
            ]
        ),
        {},
    ),
    USERS: Table(
        _schema(
            [
                *((name, "string", words) for name, words in OF_USERS.items()),
                ("created_at", "string", _OF_VERSION["created_at"]),
                ("event_id", "bigint", _OF_VERSION["event_id"]),
            ]
        ),
        {
            _KEY: [(RAW_EVENTS, "actor.id")],
            **{name: [(RAW_EVENTS, f"actor.{name}")] for name in USER_FIELDS[1:]},
            "created_at": [(RAW_EVENTS, "created_at")],
            "event_id": [(RAW_EVENTS, "id")],
        },
    ),
    MONGO_USERS: Table(_schema(_of_stored()), {name: [(USERS, name), (USERS_CHANGES, name)] for name in USER_FIELDS}),
}
"""The tables by their assets. Fields within fields have dotted names, as in a query."""
