"""What the audit says of one key, from all that was read of it."""

from __future__ import annotations

from itertools import islice

import pytest

from ghsync_dagster.cdc.health.audit import KeyState, Patience, Verdict, differences, is_shifted, judge, matches
from ghsync_dagster.domain.user import MARKER_FIELD, MARKER_VALUE, User
from ghsync_dagster_tests.support.builders import user

OLD, NEW, NEWEST = user(1, "old"), user(1, "new"), user(1, "newest")


@pytest.mark.parametrize(
    ("rows", "document", "by_file", "verdict"),
    [
        ([NEW], NEW, False, Verdict.IN_SYNC),
        ([None], None, False, Verdict.IN_SYNC),
        ([NEW], None, False, Verdict.MISSING),
        ([NEW], OLD, False, Verdict.DIFFERENT),
        ([None], NEW, False, Verdict.EXTRA),
        ([None], NEW, True, Verdict.FROM_FILES),
        # A row that changes all the time: what was there at one moment of the audit has arrived.
        ([NEW, NEWEST], NEW, False, Verdict.IN_SYNC),
        ([NEW, NEWEST], OLD, False, Verdict.DIFFERENT),
        ([NEW, NEWEST], None, False, Verdict.MISSING),
        ([None, NEW], None, False, Verdict.IN_SYNC),
        ([NEW, None], NEW, False, Verdict.IN_SYNC),
        ([NEW, None], OLD, False, Verdict.EXTRA),
        # A file's document is compared where MySQL has had a row.
        ([NEW], OLD, True, Verdict.DIFFERENT),
        ([NEW, None], OLD, True, Verdict.EXTRA),
    ],
)
def test_a_key_is_judged_by_what_mysql_held_during_the_audit(
    rows: list[User | None], document: User | None, by_file: bool, verdict: Verdict
) -> None:
    assert judge(KeyState(rows, document, by_file)) is verdict


def test_only_missing_extra_and_different_are_differences() -> None:
    assert {verdict for verdict in Verdict if verdict.is_difference} == {
        Verdict.MISSING,
        Verdict.EXTRA,
        Verdict.DIFFERENT,
    }


@pytest.mark.parametrize(
    "other",
    [
        user(1, "Octo"),
        user(1, "octo "),
        user(1, None),
        user(1, ""),
        user(gravatar_id=None),
        {name: value for name, value in user().items() if name != "gravatar_id"},
    ],
)
def test_text_is_compared_as_it_is(other: dict[str, str | None]) -> None:
    assert not matches(user(), other)


def test_composed_and_decomposed_text_differ() -> None:
    assert not matches(user(1, "\u00e9"), user(1, "e\u0301"))


def test_other_fields_of_the_document_are_no_matter_of_the_audit() -> None:
    assert matches(user(), {**user(), MARKER_FIELD: MARKER_VALUE})


def test_differences_name_the_fields_and_both_values() -> None:
    stored = {**user(1, "other", url=None), "gravatar_id": 7}
    del stored["avatar_url"]
    assert differences(user(gravatar_id=None, avatar_url="a", url="u"), stored) == {
        "login": {"mysql": "'octo'", "mongodb": "'other'"},
        "gravatar_id": {"mysql": "null", "mongodb": "7 (int)"},
        "avatar_url": {"mysql": "'a'", "mongodb": "(absent)"},
        "url": {"mysql": "'u'", "mongodb": "null"},
    }


def test_long_values_are_cut_around_the_difference() -> None:
    shown = differences(user(1, "x" * 200 + "A" + "y" * 54), user(1, "x" * 200 + "B" + "y" * 54))["login"]
    assert shown["mysql"].startswith("'xxxxxxxxxxAyy")
    assert shown["mongodb"].startswith("'xxxxxxxxxxByy")
    assert shown["mysql"].endswith("from character 191 of 255")
    assert len(shown["mysql"]) < 100


def test_odd_text_is_shown_in_ascii() -> None:
    shown = differences(user(1, "a\0b\u2028"), user(1, "\U0001f980"))["login"]
    assert shown == {"mysql": r"'a\x00b\u2028'", "mongodb": r"'\U0001f980'"}


def test_waits_grow_to_their_longest() -> None:
    assert list(islice(Patience(first_wait=0.5, longest_wait=3).waits(), 5)) == [0.5, 1, 2, 3, 3]


ROW = {"user_id": "1", "login": "one", "gravatar_id": "g1", "avatar_url": "a1", "url": "u1"}


@pytest.mark.parametrize(
    ("row", "stored"),
    [
        # Read with the columns of before `ADD COLUMN bio AFTER login`; bio is null, then text.
        (ROW, {**ROW, "gravatar_id": None, "avatar_url": "g1", "url": "a1"}),
        (ROW, {**ROW, "gravatar_id": "bio", "avatar_url": "g1", "url": "a1"}),
        # The same of a user without a gravatar.
        ({**ROW, "gravatar_id": None}, {**ROW, "gravatar_id": "bio", "avatar_url": None, "url": "a1"}),
        ({**ROW, "gravatar_id": ""}, {**ROW, "gravatar_id": None, "avatar_url": "", "url": "a1"}),
        # A column dropped or moved.
        (ROW, {**ROW, "gravatar_id": "a1", "avatar_url": "u1", "url": None}),
        (ROW, {**ROW, "login": "u1", "url": "one"}),
        (ROW, {"user_id": "1", "login": "g1", "gravatar_id": "a1", "avatar_url": "u1", "url": "one"}),
    ],
)
def test_values_in_each_others_columns_are_recognized(
    row: dict[str, str | None], stored: dict[str, str | None]
) -> None:
    assert is_shifted(row, stored)


@pytest.mark.parametrize(
    "stored",
    [
        ROW,
        {**ROW, "login": "other"},
        {**ROW, "login": "other", "url": "u2"},
        # One field alone is a value that somebody wrote.
        {**ROW, "avatar_url": "u1"},
        # Nulls and empty texts are everywhere.
        {**ROW, "avatar_url": None, "url": None},
        {**ROW, "gravatar_id": "x", "avatar_url": "y", "url": "a1"},
        {"user_id": "1"},
        {**ROW, "login": 7, "url": 8},
    ],
)
def test_other_differences_are_no_shift(stored: dict[str, object]) -> None:
    assert not is_shifted(ROW, stored)
    assert not is_shifted({**ROW, "gravatar_id": None}, {**ROW, "gravatar_id": "", "url": None})
