"""The decision about one line: every odd kind has its exact outcome, and no bytes whatever make it fail."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster.domain.event import Actor, Event, Refused, Repo, _Pairs, event_decoder, latest_time
from ghsync_dagster.domain.user import BUILT_IN_RULES, Rule
from ghsync_dagster_tests.support.odd_lines import ACTOR, EVENT, GOOD, INT64, KINDS, Odd, encoded, line

if TYPE_CHECKING:
    from collections.abc import Callable

NOW = datetime(2026, 11, 30, 12, tzinfo=UTC)
decide = event_decoder(BUILT_IN_RULES, latest_time(NOW))


@pytest.mark.parametrize("odd", KINDS, ids=lambda odd: odd.name)
def test_each_odd_kind_of_line_has_its_outcome(odd: Odd) -> None:
    outcome = decide(odd.line)
    if not isinstance(odd.outcome, str):
        assert outcome == odd.outcome
        return
    assert isinstance(outcome, Refused)
    wanted = re.escape(odd.outcome).replace(r"\{at\}", "[0-9]+")
    assert re.match(wanted, outcome.reason), outcome.reason
    assert len(outcome.reason) < 250
    assert outcome.reason.isprintable()


def test_a_repeated_key_among_many_is_found_without_comparing_each_with_each(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0

    class Name(str):
        """A key that counts how often it is compared."""

        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    class Pairs(_Pairs):
        """An object's pairs with such keys."""

        def __init__(self, pairs: list[tuple[str, Any]]) -> None:
            super().__init__((Name(name), value) for name, value in pairs)

    monkeypatch.setattr("ghsync_dagster.domain.event._Pairs", Pairs)
    keys = b",".join(b'"k%d":0' % number for number in range(2_000))
    assert decide(b'{"id":1,' + keys + b',"id":0}') == Refused("key id stands more than once")
    assert 1 <= compared < 20_000


def test_the_kinds_are_many_and_told_apart_by_name() -> None:
    assert len({odd.name for odd in KINDS}) == len(KINDS)
    assert sum(isinstance(odd.outcome, str) for odd in KINDS) >= 33


@pytest.mark.parametrize("name", ["id", "type", "actor", "repo", "created_at", "payload", "extra", "naïve", "x" * 300])
@pytest.mark.parametrize("spelling", ["compact", "spaced", "escaped"])
def test_a_repeated_used_key_is_refused_however_it_is_spelled(name: str, spelling: str) -> None:
    value = encoded(EVENT.get(name, 1))
    key = {"compact": f'"{name}"', "spaced": f' "{name}" ', "escaped": f'"\\u{ord(name[0]):04x}{name[1:]}"'}[spelling]
    twice = line(**{name: EVENT.get(name, 1)})[:-1] + b"," + key.encode() + b":" + value + b"}"
    used = Refused(f"key {name} stands more than once")
    assert decide(twice) == (used if name in USED_KEYS else decide(GOOD))


@pytest.mark.parametrize("name", [*ACTOR, "display_login"])
@pytest.mark.parametrize("spelling", ["compact", "spaced", "escaped"])
def test_a_repeated_used_key_of_the_actor_is_refused_however_it_is_spelled(name: str, spelling: str) -> None:
    key = {"compact": f'"{name}"', "spaced": f'\t"{name}" ', "escaped": f'"\\u{ord(name[0]):04X}{name[1:]}"'}[spelling]
    head, actor, tail = line(actor={"display_login": "o"}).partition(encoded(ACTOR | {"display_login": "o"}))
    twice = head + actor[:-1] + b"," + key.encode() + b":" + encoded(ACTOR.get(name, "o")) + b"}" + tail
    assert decide(twice) == (Refused(f"key actor.{name} stands more than once") if name in ACTOR else decide(GOOD))


def test_a_rule_of_a_project_refuses_with_its_words() -> None:
    rule = Rule("no_octo", "login", "login must not be octo", holds=lambda login: login != "octo")
    assert event_decoder([*BUILT_IN_RULES, rule], latest_time(NOW))(GOOD) == Refused(
        'login must not be octo, got "octo" (no_octo)'
    )


def test_a_rule_that_fails_is_named_in_a_clear_error() -> None:
    rule = Rule("first_letter", "login", "login must start with o", holds=lambda login: login[7] == "o")
    with pytest.raises(ConfigError, match=r"Rule first_letter fails on a login of 4 characters .*IndexError"):
        event_decoder([rule], latest_time(NOW))(GOOD)


def test_rules_are_tried_in_the_order_of_fields_and_declaration() -> None:
    both = line(actor={"id": -1, "login": "ö" * 300})
    assert isinstance(outcome := decide(both), Refused)
    assert outcome.reason.endswith("(user_id_positive)")
    assert isinstance(outcome := decide(line(actor={"login": "ö" * 300})), Refused)
    assert outcome.reason.endswith("(login_format)")


@pytest.mark.parametrize(
    ("text", "utc"),
    [
        ("2015-01-01T15:00:00.000Z", "2015-01-01T15:00:00Z"),
        ("2015-01-01T15:00:00.999999999Z", "2015-01-01T15:00:00Z"),
        ("2015-01-01T15:00:00,5Z", "2015-01-01T15:00:00Z"),
        ("2015-01-01T15:00:00z", "2015-01-01T15:00:00Z"),
        ("2015-01-01T15:00:00+00:00", "2015-01-01T15:00:00Z"),
        ("2015-01-01T00:30:00+01:00", "2014-12-31T23:30:00Z"),
        ("2015-01-01T15:00:00-0330", "2015-01-01T18:30:00Z"),
        ("2015-01-01 15:00:00 UTC", "2015-01-01T15:00:00Z"),
        ("2015-01-01 15:00:00.123456 UTC", "2015-01-01T15:00:00Z"),
        ("2015-01-01 15:00:00.123+00", "2015-01-01T15:00:00Z"),
        ("0999-01-01T15:00:00.1Z", "0999-01-01T15:00:00Z"),
    ],
)
def test_times_as_exports_have_them_are_the_times_of_github(text: str, utc: str) -> None:
    assert decide(line(created_at=text)) == decide(line(created_at=utc))
    assert isinstance(outcome := decide(line(created_at=text)), Event)
    assert outcome.created_at == utc


def test_events_of_the_future_are_refused_by_the_callers_clock() -> None:
    def outcome(at: datetime) -> Event | Refused | None:
        return decide(line(created_at=at.strftime("%Y-%m-%dT%H:%M:%SZ")))

    assert isinstance(outcome(NOW), Event)
    assert isinstance(outcome(NOW + timedelta(days=1)), Event)
    for late in (NOW + timedelta(days=1, seconds=1), datetime(9999, 12, 31, tzinfo=UTC)):
        assert isinstance(refused := outcome(late), Refused)
        assert refused.reason.startswith("created_at must not be more than a day in the future, got ")
        assert refused.reason.endswith("(event_not_in_future)")
    # The zone counts.
    assert isinstance(decide(line(created_at="2026-12-01T13:30:00+02:00")), Event)
    assert isinstance(decide(line(created_at="2026-12-01T11:30:00-02:00")), Refused)


LONE = [rb"\ud83d", rb"\uDE00", rb"\ud83d\ud83d\ude00", rb"\\\ud800", rb"\udc00x\ud800"]


@pytest.mark.parametrize("lone", LONE)
@pytest.mark.parametrize(
    "place", [b'"payload":"%s"', b'"payload":{"a":["%s"]}', b'"extra%s":1', b'"x%s":1,"x\\ue000":2']
)
def test_a_lone_surrogate_in_what_nobody_uses_is_no_reason(lone: bytes, place: bytes) -> None:
    event = {name: value for name, value in EVENT.items() if name != "payload"}
    assert decide(encoded(event)[:-1] + b"," + place.replace(b"%s", lone) + b"}") == decide(encoded(event))


@pytest.mark.parametrize("lone", LONE)
@pytest.mark.parametrize("name", ["login", "url", "gravatar_id"])
def test_a_lone_surrogate_in_a_used_field_is_refused(lone: bytes, name: str) -> None:
    outcome = decide(line(actor={name: "XX"}, payload="YY").replace(b"XX", lone).replace(b"YY", lone))
    assert isinstance(outcome, Refused)
    assert outcome.reason.startswith("malformed JSON: ")


def test_what_is_wrong_beside_a_lone_surrogate_is_told() -> None:
    def with_lone(text: bytes) -> str:
        outcome = decide(text.replace(b"YY", rb"\ud800"))
        assert isinstance(outcome, Refused)
        return outcome.reason

    assert with_lone(line(payload="YY", actor={"id": "9"})) == "actor.id: expected a whole number, got a string"
    assert with_lone(line(payload="YY")[:-1] + b',"id":"2"}') == "key id stands more than once"
    assert with_lone(line(payload="YY")[:-3]).startswith("malformed JSON: ")


# Times depend on what else the machine does.
patient = settings(suppress_health_check=[HealthCheck.too_slow])
characters = st.characters(exclude_categories=["Cs"])
texts = st.text(characters)
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
logins = st.from_regex(r"[A-Za-z0-9_-]{1,40}(\[bot\])?", fullmatch=True)
urls = st.from_regex(r"https?://[!-~]{1,100}", fullmatch=True)
good_events = st.fixed_dictionaries(
    {
        "id": st.integers(0, INT64).map(str),
        "type": st.text(characters, min_size=1),
        "created_at": st.datetimes(max_value=NOW.replace(tzinfo=None)).map(
            lambda at: at.strftime("%Y-%m-%dT%H:%M:%SZ").rjust(20, "0")
        ),
        "actor": st.fixed_dictionaries(
            {"id": st.integers(1, INT64), "login": logins, "url": urls, "avatar_url": urls},
            optional={"gravatar_id": st.none() | st.text(characters, max_size=255)},
        ),
    },
    optional={
        "repo": st.none()
        | st.fixed_dictionaries(
            {}, optional={"id": st.none() | st.integers(-INT64, INT64), "name": st.none() | texts, "url": texts}
        )
    },
)
USED_KEYS = {"id", "type", "created_at", "actor", "repo"}
layouts: st.SearchStrategy[Callable[[object], bytes]] = st.sampled_from(
    [
        encoded,
        lambda value: json.dumps(value).encode(),
        lambda value: json.dumps(value, indent=2).replace("\n", "\t").encode() + b"\r",
        lambda value: b"\xef\xbb\xbf" + encoded(value),
    ]
)


@patient
@given(good_events, layouts)
def test_every_used_field_is_kept(event: dict[str, Any], layout: Callable[[object], bytes]) -> None:
    actor = Actor(**event["actor"])
    repo = Repo(**event["repo"]) if event.get("repo") is not None else None
    assert decide(layout(event)) == Event(event["id"], event["type"], event["created_at"], actor, repo)


@patient
@given(good_events, st.dictionaries(texts, values, max_size=4), st.dictionaries(texts, values, max_size=3), layouts)
def test_extra_fields_never_matter(
    event: dict[str, Any], more: dict[str, Any], more_actor: dict[str, Any], layout: Callable[[object], bytes]
) -> None:
    extra = {name: value for name, value in more.items() if name not in USED_KEYS}
    extra_actor = {name: value for name, value in more_actor.items() if name not in ACTOR}
    widened = {**extra, **event, "actor": {**extra_actor, **event["actor"]}}
    assert decide(layout(widened)) == decide(encoded(event))


@patient
@given(st.binary(max_size=200))
def test_any_bytes_get_a_decision(text: bytes) -> None:
    outcome = decide(text)
    assert outcome is None or isinstance(outcome, Event | Refused)


@patient
@given(st.integers(0, len(GOOD) - 1), st.integers(0, 30), st.binary(max_size=8))
def test_any_damage_to_a_line_gets_a_decision(start: int, cut: int, put: bytes) -> None:
    outcome = decide(GOOD[:start] + put + GOOD[start + cut :])
    assert isinstance(outcome, Event | Refused) or start == 0
    if isinstance(outcome, Refused):
        assert outcome.reason


JSON_SPACE = st.text(" \t\r", max_size=3).map(str.encode)


@patient
@given(st.sampled_from([odd.line for odd in KINDS if isinstance(odd.outcome, str)]), JSON_SPACE, st.integers(1, 3))
def test_no_refused_line_becomes_an_event_by_white_space(refused: bytes, around: bytes, indent: int) -> None:
    assert isinstance(decide(around + _spread(refused, indent) + around), Refused)


def _spread(line: bytes, indent: int) -> bytes:
    """Return a line with white space between its tokens, or as it is where it has none."""
    try:
        return msgspec.json.format(line, indent=indent).replace(b"\n", b" ")
    except (msgspec.DecodeError, RecursionError):
        return line
