"""Which records supersede a dead letter, and whose a refused record is."""

from __future__ import annotations

import json

import pytest

from ghsync_dagster.cdc.dead_letters.index import user_of
from ghsync_dagster.domain.change import Change, RecordKind
from ghsync_dagster.domain.envelope import ChangeDecoder, Refusal
from ghsync_dagster.domain.letters import Applied, Letter, Mark
from ghsync_dagster.domain.user import USER_FIELDS
from ghsync_dagster_tests.support.builders import change, delete, upsert

WHOLE = dict.fromkeys(USER_FIELDS, "x")
ROW = {"user_id": 1, "login": "a", "gravatar_id": "", "avatar_url": "", "url": ""}


def letter(user: str | None = "1", *, topic: str = "t", partition: int = 0, timestamp_ms: int | None = 50) -> Letter:
    return Letter(topic, partition, 5, timestamp_ms, user, "not-json", "", "2026-01-01", (0, 0))


def applied(change: Change, offset: int, partition: int = 0, timestamp_ms: int | None = 60) -> Applied:
    found = Applied("t")
    found.add(change, partition, Mark(offset, timestamp_ms))
    return found


@pytest.mark.parametrize(
    ("change", "offset", "superseded"),
    [
        (change(), 6, True),
        (change(), 5, False),
        (change(), 4, False),
        (change(2), 6, False),
        (upsert({"user_id": "1", "login": "a"}), 6, False),
        (delete(), 6, True),
        (change(kind=RecordKind.TOMBSTONE), 6, True),
        (change(kind=RecordKind.TRUNCATE), 6, True),
        (change(kind=RecordKind.TRUNCATE), 4, False),
        (change(kind=RecordKind.HEARTBEAT), 6, False),
    ],
)
def test_a_letter_is_superseded_by_the_whole_state_of_its_user_or_a_truncate_after_it(
    change: Change, offset: int, *, superseded: bool
) -> None:
    assert bool(applied(change, offset).supersedes(letter())) is superseded


def test_a_letter_of_no_user_is_superseded_by_a_truncate_only() -> None:
    assert applied(change(), 6).supersedes(letter(None)) is None
    assert applied(change(kind=RecordKind.TRUNCATE), 6).supersedes(letter(None))


def test_offsets_tell_nothing_of_another_partition_or_topic() -> None:
    assert applied(change(), 6, partition=1).supersedes(letter()) is None
    assert applied(change(), 6).supersedes(letter(topic="other")) is None


@pytest.mark.parametrize(
    ("of_letter", "of_record", "superseded"),
    [(50, 49, False), (50, 50, True), (None, 1, True), (50, None, True)],
)
def test_a_record_that_was_written_before_the_letter_s_is_no_newer_one(
    of_letter: int | None, of_record: int | None, *, superseded: bool
) -> None:
    found = applied(change(), 6, timestamp_ms=of_record).supersedes(letter(timestamp_ms=of_letter))
    assert bool(found) is superseded


def test_the_newest_record_of_a_user_counts() -> None:
    found = applied(change(), 6)
    found.add(change(), 0, Mark(9, 70))
    found.add(upsert({"user_id": "1"}), 0, Mark(12, 80))
    assert "offset 9" in (found.supersedes(letter()) or "")


def event(**row: object) -> bytes:
    return json.dumps({"op": "c", "after": ROW | row}).encode()


@pytest.mark.parametrize(
    ("key", "value", "kind", "user"),
    [
        (b'{"user_id": 7}', b"{", Refusal.NOT_JSON.kind, "7"),
        (b'{"payload": {"user_id": 7}, "schema": {}}', b"{", Refusal.NOT_JSON.kind, "7"),
        (b'{"user_id": 7}', event(user_id=1), Refusal.KEY_MISMATCH.kind, None),
        (b'{"user_id": 7}', event(user_id=7), Refusal.KEY_CHANGED.kind, None),
        (None, event(), "validator", "1"),
        (b'{"user_id": 1}', event(), "validator", "1"),
        (None, b"{", Refusal.NOT_JSON.kind, None),
        (b"\x00\x01", b"{", Refusal.BAD_KEY.kind, None),
        (b'{"id": 7}', event(), Refusal.BAD_KEY.kind, None),
        (b'{"user_id": "007"}', b"{", Refusal.NOT_JSON.kind, None),
    ],
)
def test_a_refused_record_s_user_is_told_by_its_key_or_else_its_row_and_never_guessed(
    key: bytes | None, value: bytes, kind: str, user: str | None
) -> None:
    assert user_of(ChangeDecoder(), key, value, kind) == user
