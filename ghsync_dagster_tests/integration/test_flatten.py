"""Flattening by real Spark: the newest event of a user wins, text stays as it is, and rules mean the same in Spark."""

from __future__ import annotations

import random
from itertools import permutations
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ghsync_dagster.batch.flatten import check_users
from ghsync_dagster.domain.finding import OFFENDERS
from ghsync_dagster.domain.user import BUILT_IN_RULES, USER_FIELDS, Rule

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from ghsync_dagster.batch.flow import BatchFlow
    from ghsync_dagster.stores.spark import SparkHandle

pytestmark = [pytest.mark.integration, pytest.mark.servers("spark")]

NASTY = [
    None,
    "",
    " ",
    "a",
    "octo",
    "octo\n",
    "\nocto",
    "octo\r",
    "octo\r\n",
    "oc\nto",
    "octo\u2028",
    "octo\u2029",
    "octo\u0085",
    "octo\x00",
    "\x00",
    "octo\x7f",
    "OCTO_cat-9",
    "dependabot[bot]",
    "[bot]",
    "a[bot]b",
    "a[bot][bot]",
    "öcto",
    "oct\u0131",
    "\u212a",
    "o\u0301",
    "\u0661\u0662",
    "\uff11",
    "1",
    "12\n",
    "0",
    "-0",
    "-1",
    "+1",
    "007",
    "9" * 30,
    "1e3",
    "a" * 254,
    "a" * 255,
    "a" * 256,
    "é" * 255,
    "é" * 256,
    "\U0001f642" * 127,
    "\U0001f642" * 128,
    "\U0001f642" * 255,
    "\U0001f642" * 256,
    "e\u0301" * 127,
    "e\u0301" * 128,
    "http://",
    "http://a",
    "https://a.b/c?d=e#f%20[g]",
    "https://a\n",
    "https://a b",
    "https://ö",
    "https://a\u2028",
    "HTTP://a",
    "ftp://a",
    "https://" + "u" * 247,
    "https://" + "u" * 248,
    "'",
    "\\",
    "\\'",
    "${x}",
    "$1",
    "%",
    "\ufeffocto",
    "a\u200bb",
]
"""What has been seen to part one regular expression engine from another."""

OTHER_RULES = [
    Rule("quotes", "login", "must hold a quote or a backslash", pattern=r"['\\]+"),
    Rule("dollar", "login", "must be a placeholder", pattern=r"\$\{x\}|\$\d"),
    Rule("any_line", "login", "must be one line", pattern=".*"),
    Rule("classes", "login", "must be words", pattern=r"[\w\s]*"),
    Rule("digits", "login", "must be digits", pattern=r"\d+"),
    Rule("no_case", "login", "must be octo in any case", pattern="(?i)[k-o]*octo|k"),
    Rule("either", "login", "must be a or octo", pattern="a|octo"),
    Rule("optional", "login", "may be octo", pattern="octo", required=False),
    Rule("short", "login", "must be short", max_length=4),
    Rule("empty", "login", "must be empty", max_length=0, required=False),
]


@pytest.mark.parametrize("rule", [*BUILT_IN_RULES, *OTHER_RULES], ids=lambda rule: rule.name)
def test_a_rule_means_the_same_in_spark_and_in_python(spark: SparkHandle, rule: Rule) -> None:
    from pyspark.sql import functions as F  # noqa: N812

    rows = [(number, value) for number, value in enumerate(NASTY)]
    frame = spark.session().createDataFrame(rows, f"number int, {rule.field} string")
    condition = rule.broken_sql()
    assert condition is not None
    broken = {row.number for row in frame.where(F.expr(condition)).select("number").collect()}
    assert {NASTY[number] for number in broken} == {value for value in NASTY if rule.is_broken_by(value)}


def write_users(folder: Path, rows: Sequence[dict[str, Any]]) -> str:
    fields = [(name, pa.string()) for name in (*USER_FIELDS, "created_at")]
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows, pa.schema([*fields, ("event_id", pa.int64())])), folder / "0.parquet")
    return str(folder)


def user(number: int, **change: str | None) -> dict[str, Any]:
    return {
        "user_id": str(number),
        "login": "octo",
        "gravatar_id": "",
        "avatar_url": "https://a/v",
        "url": "https://a/u",
        "created_at": "2015-01-01T15:00:00Z",
        "event_id": number,
    } | change


def test_good_users_are_valid(spark: SparkHandle, tmp_path: Path) -> None:
    validity = check_users(
        spark.session, write_users(tmp_path / "users", [user(number) for number in range(1, 9)]), BUILT_IN_RULES
    )
    assert validity.valid
    assert (validity.users, validity.broken, validity.repeated, validity.offenders) == (8, {}, 0, [])


def test_broken_rules_and_repeated_users_are_counted_exactly_and_shown(spark: SparkHandle, tmp_path: Path) -> None:
    root = Rule("no_root", "login", "login must not be root", holds=lambda login: login != "root")
    rows = [user(number) for number in range(1, 41)]
    rows += [
        user(1),
        user(1),
        user(2),
        user(-5),
        user(50, login=None),
        user(51, login="ö" * 256),
        user(52, login="root"),
    ]
    validity = check_users(spark.session, write_users(tmp_path / "users", rows), [*BUILT_IN_RULES, root])
    assert not validity.valid
    assert validity.users == 47
    assert validity.repeated == 3
    assert validity.broken == {"user_id_positive": 1, "login_format": 2, "login_length": 1, "no_root": 2}
    shown = {offender["user_id"] for offender in validity.offenders}
    assert shown == {"-5", "50", "51", "52", "1", "2"}


def test_at_most_so_many_offenders_are_shown(spark: SparkHandle, tmp_path: Path) -> None:
    path = write_users(tmp_path / "users", [user(-number) for number in range(1, 100)])
    validity = check_users(spark.session, path, BUILT_IN_RULES)
    assert validity.broken == {"user_id_positive": 99}
    assert len(validity.offenders) == OFFENDERS


def test_another_schema_is_a_finding_in_words(spark: SparkHandle, tmp_path: Path) -> None:
    (tmp_path / "users").mkdir()
    pq.write_table(pa.table({"user_id": [1], "login": ["octo"]}), tmp_path / "users" / "0.parquet")
    validity = check_users(spark.session, str(tmp_path / "users"), BUILT_IN_RULES)
    assert not validity.valid
    assert validity.schema_problem is not None
    assert "found user_id bigint, login string" in validity.schema_problem


def flattened(flow: BatchFlow, tmp_path: Path, lines: Sequence[str]) -> dict[str, dict[str, Any]]:
    path = tmp_path / "in.json"
    path.write_text("\n".join(lines), encoding="utf-8")
    assert flow.read([str(path)]).quarantined == 0
    report = flow.flatten()
    rows: list[dict[str, Any]] = pq.read_table(report.users_path).to_pylist()
    users = {row["user_id"]: row for row in rows}
    assert len(users) == len(rows) == report.users
    return users


def test_the_newest_event_of_a_user_wins_whatever_the_order_of_lines(
    flow: BatchFlow, tmp_path: Path, event_line: Callable[..., str]
) -> None:
    lines = [
        # By time first,
        event_line(1, "late", "2015-01-01T15:00:02Z", 5),
        event_line(1, "early", "2015-01-01T15:00:01Z", 900),
        # among these by number, not by text,
        event_line(2, "nine", number=9),
        event_line(2, "ten", number=10),
        event_line(2, "two", number=2),
        # and leading zeros count for nothing.
        event_line(3, "low", id="0099"),
        event_line(3, "high", id="100"),
        event_line(4, "highest", id=str(2**63 - 1)),
        event_line(4, "high", id=str(2**63 - 2)),
        event_line(5, "only"),
        event_line(10, "other"),
    ]
    expected = {"1": "late", "2": "ten", "3": "high", "4": "highest", "5": "only", "10": "other"}
    random.Random(7).shuffle(lines)  # noqa: S311  an order, no secret
    users = flattened(flow, tmp_path, lines)
    assert {key: row["login"] for key, row in users.items()} == expected
    assert (users["2"]["created_at"], users["2"]["event_id"]) == ("2015-01-01T15:00:00Z", 10)
    assert users["4"]["event_id"] == 2**63 - 1


def test_events_of_one_time_and_id_have_one_winner_whatever_the_order_of_files(
    flow: BatchFlow, tmp_path: Path, event_line: Callable[..., str]
) -> None:
    states = [
        event_line(1, "a", actor_gravatar_id="z"),
        event_line(1, "b", actor_gravatar_id=None),
        event_line(1, "b", actor_gravatar_id="y"),
    ]
    paths = [tmp_path / f"{number}.json" for number in range(len(states))]
    winners = set()
    for order in permutations(states):
        for path, state in zip(paths, order, strict=True):
            path.write_text(state)
        flow.read([str(path) for path in paths])
        (row,) = pq.read_table(flow.flatten().users_path).to_pylist()
        winners.add((row["login"], row["gravatar_id"]))
    assert winners == {("b", "y")}


def test_text_is_kept_as_it_is_and_null_stays_null(
    flow: BatchFlow, tmp_path: Path, event_line: Callable[..., str]
) -> None:
    texts = ["", " ", "\u2028", "a\x00b", "$set", "\U0001f642é", "e\u0301", "null", "\n", "\\", "'\"", "x" * 255]
    lines = [event_line(number, actor_gravatar_id=text) for number, text in enumerate(texts, start=1)]
    lines.append(event_line(99, actor_gravatar_id=None, actor_url="https://a/%20'\"\\u2028{}|^`~"))
    users = flattened(flow, tmp_path, lines)
    assert [users[str(number)]["gravatar_id"] for number in range(1, len(texts) + 1)] == texts
    assert users["99"]["gravatar_id"] is None
    assert users["99"]["url"] == "https://a/%20'\"\\u2028{}|^`~"
    assert all(set(row) == {*USER_FIELDS, "created_at", "event_id"} for row in users.values())


def test_the_fields_of_a_user_come_from_one_event(
    flow: BatchFlow, tmp_path: Path, event_line: Callable[..., str]
) -> None:
    older = event_line(1, "octo", number=1, actor_gravatar_id="abc")
    newer = event_line(1, "cat", number=2, actor_gravatar_id=None)
    row = flattened(flow, tmp_path, [newer, older])["1"]
    assert (row["login"], row["gravatar_id"], row["url"]) == ("cat", None, "https://api.github.com/users/cat")
