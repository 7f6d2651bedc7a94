"""Three hours loaded one by one, in whatever order, give the same collection: the newest state of every user.

The newest state is reckoned here from the lines alone, with ``json`` and nothing of ours.
"""

from __future__ import annotations

import gzip
import json
import os
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pymongo import MongoClient

from ghsync_dagster.batch.reports import Artifacts, FlattenReport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ghsync_dagster.batch.flow import BatchFlow

pytestmark = [pytest.mark.integration, pytest.mark.servers("spark")]

REAL = Path(os.environ.get("TEST_REAL_HOURS") or Path(__file__).parents[3] / "shared" / "data")
ORDERS = list(permutations(range(3)))
ROTATIONS = [(0, 1, 2), (1, 2, 0), (2, 0, 1)]
"""In these each hour comes before each other, and once at each place."""
Users = dict[str, dict[str, str | None]]


def newest_users(lines: Iterable[str]) -> Users:
    """Return the newest state of every user, by time and then by number."""
    newest: dict[int, tuple[tuple[str, int], dict[str, Any]]] = {}
    for line in lines:
        event = json.loads(line)
        actor, version = event["actor"], (event["created_at"], int(event["id"]))
        if actor["id"] not in newest or newest[actor["id"]][0] < version:
            newest[actor["id"]] = version, actor
    return {
        str(key): {
            "user_id": str(key),
            **{name: actor.get(name) for name in ("login", "gravatar_id", "avatar_url", "url")},
        }
        for key, (_, actor) in newest.items()
    }


def stored_users(uri: str, database: str) -> Users:
    """Return what is stored; hold that it is one unmarked document a user under a unique index."""
    with MongoClient[dict[str, Any]](uri) as client:
        users = client[database]["Users"]
        found = list(users.find({}, {"_id": 0}))
        indexes = users.index_information().values()
    assert any(index["key"] == [("user_id", 1)] and index.get("unique") for index in indexes)
    by_id = {user["user_id"]: user for user in found}
    assert len(by_id) == len(found)
    return by_id


def assert_orders_agree(
    flow: BatchFlow, uri: str, database: str, hours: Sequence[Path], expected: Users, orders: Sequence[tuple[int, ...]]
) -> None:
    """Load the hours in some orders, each order from nothing, and hold the result against ``expected``."""
    flattened: list[FlattenReport] = []
    for number, hour in enumerate(hours):
        # A folder of its own keeps the users of each hour for all orders.
        artifacts = Artifacts(flow.artifacts.root / f"hour-{number}")
        for_hour = type(flow)(**{**vars(flow), "artifacts": artifacts})
        for_hour.read([str(hour)])
        flattened.append(for_hour.flatten())
    for order in orders:
        with MongoClient[dict[str, Any]](uri) as client:
            client.drop_database(database)
        for number in order:
            flow.artifacts.publish(flattened[number])
            report = flow.load(f"hour-{number}")
            assert (report.unresolved, report.marker_lost, report.recovered) == (0, 0, {})
            handled = report.inserted + report.replaced + report.confirmed + sum(report.left.values())
            assert handled == report.users
        assert stored_users(uri, database) == expected, order


def test_hours_in_any_order_give_the_newest_state(
    flow: BatchFlow, mongo_uri: str, database: str, tmp_path: Path, event_line: Callable[..., str]
) -> None:
    def hour(at: int, *logins: tuple[int, str, int]) -> list[str]:
        return [event_line(key, login, f"2015-01-01T{at:02}:30:00Z", number) for key, login, number in logins]

    everywhere = range(100, 160)
    lines = [
        # User 1 is renamed each hour, 2 within an hour, 3 only in the middle one; 4 ties on the second across files.
        hour(3, (1, "a", 5), (2, "old", 7), (2, "new", 8), (4, "tie-9", 9), (5, "first-only", 1)),
        hour(4, (1, "b", 4), (3, "middle-only", 3), (2, "new", 2), (6, "back", 2)),
        hour(3, (1, "tie-of-a", 6), (4, "tie-10", 10)) + hour(15, (1, "c", 1), (2, "last", 1), (6, "again", 1)),
    ]
    for number, at in enumerate((3, 4, 15)):
        lines[number] += [
            event_line(key, f"user-{key}-{number if key % 3 else 0}", f"2015-01-01T{at:02}:00:00Z", 1000 + key)
            for key in everywhere
            if key % 4 != number
        ]
    files = [tmp_path / f"hour-{number}.json" for number in range(3)]
    for file, text in zip(files, lines, strict=True):
        file.write_text("\n".join(text) + "\n")
    expected = newest_users(line for hour_lines in lines for line in hour_lines)
    assert {key: expected[key]["login"] for key in "1234"} == {
        "1": "c",
        "2": "last",
        "3": "middle-only",
        "4": "tie-10",
    }
    assert_orders_agree(flow, mongo_uri, database, files, expected, ORDERS)


def test_real_hours_in_any_order_give_the_newest_state(flow: BatchFlow, mongo_uri: str, database: str) -> None:
    hours = sorted(REAL.glob("2015-*.json.gz"))
    if len(hours) != len(ORDERS[0]):
        pytest.skip(f"no three real hours in {REAL}; name another folder with TEST_REAL_HOURS")
    lines: list[str] = []
    for hour in hours:
        with gzip.open(hour, "rt", encoding="utf-8", newline="\n") as file:
            lines += [line for line in file if line.strip()]
    expected = newest_users(lines)
    assert expected["6078139"]["login"] == "michaelschramek"
    assert_orders_agree(flow, mongo_uri, database, hours, expected, ROTATIONS)
