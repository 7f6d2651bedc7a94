"""The sample file: the same bytes everywhere, GH Archive's shape, a real hour's spread, flat memory."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ghsync_dagster.dev.sample import MAX_EVENTS, SAMPLE_EVENTS, SampleReport, write_sample
from ghsync_dagster.domain.errors import ConfigError

COMMITTED = Path(__file__).parents[2] / "data" / "sample_data.json"
LOGIN = re.compile(r"[A-Za-z0-9_-]+(\[bot\])?")
URL = re.compile(r"https?://[\x21-\x7e]+")
EVENT_KEYS = ["id", "type", "actor", "repo", "payload", "public", "created_at"]
ACTOR_KEYS = ["id", "login", "gravatar_id", "url", "avatar_url"]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> SampleReport:
    return write_sample(tmp_path_factory.mktemp("sample") / "sample_data.json")


@pytest.fixture(scope="module")
def events(sample: SampleReport) -> list[dict[str, Any]]:
    return [json.loads(line) for line in sample.path.read_text(encoding="utf-8").splitlines()]


def test_the_committed_sample_is_what_the_command_writes_byte_for_byte(sample: SampleReport) -> None:
    assert sample.path.read_bytes() == COMMITTED.read_bytes()


def test_the_report_tells_the_file(sample: SampleReport, events: list[dict[str, Any]]) -> None:
    logins = defaultdict(set)
    for event in events:
        logins[event["actor"]["id"]].add(event["actor"]["login"])
    assert sample.events == SAMPLE_EVENTS == len(events)
    assert sample.users == len(logins)
    assert sample.renames == sum(len(names) > 1 for names in logins.values())
    assert sample.size == sample.path.stat().st_size < 14_000_000


def test_lines_are_compact_json_with_newline_ends(sample: SampleReport, events: list[dict[str, Any]]) -> None:
    lines = sample.path.read_bytes().split(b"\n")
    assert lines.pop() == b""
    for line, event in zip(lines, events, strict=True):
        assert line == json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()


def test_every_event_has_the_archives_shape_and_key_order(events: list[dict[str, Any]]) -> None:
    for event in events:
        assert list(event) in (EVENT_KEYS, [*EVENT_KEYS, "org"])
        assert list(event["actor"]) == ACTOR_KEYS
        assert list(event.get("org", event["actor"])) == ACTOR_KEYS
        assert list(event["repo"]) == ["id", "name", "url"]
        assert event["repo"]["url"] == f"https://api.github.com/repos/{event['repo']['name']}"
        assert isinstance(event["payload"], dict)
        assert event["public"] is True
    assert 0.1 < sum("org" in event for event in events) / len(events) < 0.3


def test_every_actor_keeps_the_rules_of_a_user(events: list[dict[str, Any]]) -> None:
    for actor in (event["actor"] for event in events):
        assert actor["id"] > 0
        assert LOGIN.fullmatch(actor["login"])
        assert actor["gravatar_id"] == ""
        assert actor["url"] == f"https://api.github.com/users/{actor['login']}"
        assert actor["avatar_url"] == f"https://avatars.githubusercontent.com/u/{actor['id']}?"
        assert URL.fullmatch(actor["url"])
        assert URL.fullmatch(actor["avatar_url"])
        assert max(map(len, (actor["login"], actor["url"], actor["avatar_url"]))) <= 255


def test_time_and_event_ids_only_grow_within_one_hour(events: list[dict[str, Any]]) -> None:
    times = [event["created_at"] for event in events]
    assert times == sorted(times)
    assert {datetime.fromisoformat(time).replace(minute=0, second=0) for time in times} == {
        datetime(2015, 3, 1, 17, tzinfo=UTC)
    }
    assert all(re.fullmatch(r"2015-03-01T17:[0-5][0-9]:[0-5][0-9]Z", time) for time in times)
    ids = [event["id"] for event in events]
    assert all(isinstance(event_id, str) and event_id.isdecimal() for event_id in ids)
    gaps = Counter(int(after) - int(before) for before, after in pairwise(ids))
    assert min(gaps) == 1
    assert len(gaps) > 4


def test_users_act_as_in_a_real_hour(events: list[dict[str, Any]]) -> None:
    activity = Counter(event["actor"]["id"] for event in events)
    assert 12_500 < len(activity) < 13_500
    once_or_twice = sum(count <= 2 for count in activity.values())
    assert 0.75 < once_or_twice / len(activity) < 0.85
    logins = {event["actor"]["id"]: event["actor"]["login"] for event in events}
    busiest = [logins[user] for user, _ in activity.most_common(5)]
    assert busiest[0] == "dependabot[bot]"
    assert all(login.endswith(("[bot]", "-bot")) for login in busiest)


def test_a_login_belongs_to_one_user(events: list[dict[str, Any]]) -> None:
    users = defaultdict(set)
    for event in events:
        users[event["actor"]["login"].lower()].add(event["actor"]["id"])
    assert all(len(ids) == 1 for ids in users.values())


def test_renamed_users_change_once_and_keep_their_id(events: list[dict[str, Any]]) -> None:
    logins: defaultdict[int, list[str]] = defaultdict(list)
    for event in events:
        actor = event["actor"]
        if actor["login"] not in logins[actor["id"]][-1:]:
            logins[actor["id"]].append(actor["login"])
    renamed = [names for names in logins.values() if len(names) > 1]
    assert 24 <= len(renamed) <= 60
    assert all(len(names) == 2 for names in renamed)


def test_event_types_have_the_shares_of_a_real_hour(events: list[dict[str, Any]]) -> None:
    kinds = Counter(event["type"] for event in events)
    assert len(kinds) == 14
    assert [kind for kind, _ in kinds.most_common(3)] == ["PushEvent", "CreateEvent", "WatchEvent"]
    assert 0.48 < kinds["PushEvent"] / len(events) < 0.55


def test_payloads_have_the_fields_of_their_type(events: list[dict[str, Any]]) -> None:
    fields = {
        "PushEvent": {"push_id", "size", "distinct_size", "ref"},
        "CreateEvent": {"ref", "ref_type", "master_branch", "description", "pusher_type"},
        "WatchEvent": {"action"},
        "IssueCommentEvent": {"action", "issue", "comment"},
        "IssuesEvent": {"action", "issue"},
        "PullRequestEvent": {"action", "number", "pull_request"},
        "ForkEvent": {"forkee"},
        "DeleteEvent": {"ref", "ref_type", "pusher_type"},
        "PullRequestReviewCommentEvent": {"action", "comment", "pull_request"},
        "CommitCommentEvent": {"comment"},
        "GollumEvent": {"pages"},
        "ReleaseEvent": {"action", "release"},
        "MemberEvent": {"member", "action"},
        "PublicEvent": set(),
    }
    for event in events:
        assert set(event["payload"]) == fields[event["type"]]


def test_another_seed_moves_the_same_users_otherwise(tmp_path: Path) -> None:
    first = write_sample(tmp_path / "1.json", events=2_000, seed=1)
    again = write_sample(tmp_path / "2.json", events=2_000, seed=1)
    other = write_sample(tmp_path / "3.json", events=2_000, seed=2)
    assert first.sha256 == again.sha256 != other.sha256
    names: dict[int, str] = {}
    for report in (first, other):
        for line in report.path.read_text(encoding="utf-8").splitlines():
            actor = json.loads(line)["actor"]
            assert names.setdefault(actor["id"], actor["login"])[:8] == actor["login"][:8]


def test_a_later_hour_has_higher_event_ids_and_its_own_time(tmp_path: Path) -> None:
    later = datetime(2015, 3, 1, 20, tzinfo=timezone(timedelta(hours=2)))
    first = write_sample(tmp_path / "1.json", events=50)
    second = write_sample(tmp_path / "2.json", events=50, hour=later)
    last, *_ = reversed([json.loads(line) for line in first.path.read_text(encoding="utf-8").splitlines()])
    following = json.loads(second.path.read_text(encoding="utf-8").split("\n", 1)[0])
    assert int(last["id"]) < int(following["id"])
    assert following["created_at"].startswith("2015-03-01T18:")


def test_a_one_event_sample_is_possible(tmp_path: Path) -> None:
    report = write_sample(tmp_path / "new" / "one.json", events=1)
    assert (report.events, report.users) == (1, 1)
    assert len(report.path.read_text(encoding="utf-8").splitlines()) == 1


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    peaks, users = [], []
    for count in (20_000, 80_000):
        tracemalloc.start()
        users.append(write_sample(tmp_path / "big.json", events=count).users)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 6_000_000
    assert peaks[1] - peaks[0] < 60_000 * 2  # one byte for each user that may act, never a line
    assert 3.9 < users[1] / users[0] < 4.1


def test_progress_is_told_up_to_the_last_event(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    write_sample(tmp_path / "sample.json", events=10_000, progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert len(told) > 1
    assert told[-1] == (10_000, 10_000)


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "sample.json"
    path.write_text("before", encoding="utf-8")

    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_sample(path, events=10_000, progress=interrupt)
    assert path.read_text(encoding="utf-8") == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("count", [0, -1, MAX_EVENTS + 1])
def test_an_impossible_number_of_events_is_refused(tmp_path: Path, count: int) -> None:
    with pytest.raises(ConfigError, match=r"Ask for 1 to 6,000,000 events"):
        write_sample(tmp_path / "sample.json", events=count)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "hour",
    [
        datetime(2015, 3, 1, 17),  # noqa: DTZ001 - what must be refused
        datetime(2015, 3, 1, 17, 30, tzinfo=UTC),
        datetime(2014, 12, 31, 23, tzinfo=UTC),
    ],
)
def test_what_is_no_hour_of_the_archive_is_refused(tmp_path: Path, hour: datetime) -> None:
    with pytest.raises(ConfigError, match="Give a whole hour with its time zone"):
        write_sample(tmp_path / "sample.json", hour=hour)


def test_a_path_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="can't be written"):
        write_sample(tmp_path / "file" / "sample.json", events=1)
