"""The user's declaration: the rules as Python applies them, their Spark wording, the contract, and a project's own."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ghsync_dagster.batch.rules import load_rules
from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster.domain.user import (
    BUILT_IN_RULES,
    USER_FIELDS,
    Rule,
    broken_rule_names,
    json_schema,
    rule_tests,
)

if TYPE_CHECKING:
    from pathlib import Path

USER: dict[str, str | None] = {
    "user_id": "1",
    "login": "octo",
    "gravatar_id": None,
    "avatar_url": "https://a/1",
    "url": "http://a/octo",
}


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({}, []),
        ({"gravatar_id": ""}, []),
        ({"login": "a_b-C9[bot]"}, []),
        ({"login": "a" * 255}, []),
        ({"user_id": "9" * 25}, []),
        ({"user_id": "0"}, ["user_id_positive"]),
        ({"user_id": "-1"}, ["user_id_positive"]),
        ({"user_id": "007"}, ["user_id_positive"]),
        ({"user_id": "\u0661"}, ["user_id_positive"]),
        ({"user_id": "1\n"}, ["user_id_positive"]),
        ({"user_id": None}, ["user_id_positive"]),
        ({"login": None}, ["login_format"]),
        ({"login": ""}, ["login_format"]),
        ({"login": "octo\n"}, ["login_format"]),
        ({"login": "oct\u0131"}, ["login_format"]),
        ({"login": "[bot]"}, ["login_format"]),
        ({"login": "-" * 256}, ["login_length"]),
        ({"login": " " * 256}, ["login_format", "login_length"]),
        ({"gravatar_id": "\U0001f642" * 255}, []),
        ({"gravatar_id": "\U0001f642" * 256}, ["gravatar_id_length"]),
        ({"avatar_url": None}, ["avatar_url_format"]),
        ({"avatar_url": "https://a b"}, ["avatar_url_format"]),
        ({"url": "//a"}, ["url_format"]),
        ({"url": "HTTPS://a"}, ["url_format"]),
        ({"url": "https://" + "a" * 248}, ["url_length"]),
        ({"login": None, "url": None, "avatar_url": None}, ["login_format", "avatar_url_format", "url_format"]),
    ],
)
def test_a_user_breaks_exactly_these_rules(change: dict[str, str | None], broken: list[str]) -> None:
    assert list(broken_rule_names(USER | change, rule_tests(BUILT_IN_RULES))) == broken


def test_null_breaks_the_rules_of_required_fields() -> None:
    assert list(broken_rule_names(dict.fromkeys(USER_FIELDS), rule_tests(BUILT_IN_RULES))) == [
        "user_id_positive",
        "login_format",
        "avatar_url_format",
        "url_format",
    ]


def test_every_built_in_rule_has_a_name_of_its_own_and_runs_in_spark_itself() -> None:
    assert len({rule.name for rule in BUILT_IN_RULES}) == len(BUILT_IN_RULES)
    assert all(rule.broken_sql() is not None for rule in BUILT_IN_RULES)
    assert {rule.field for rule in BUILT_IN_RULES} == set(USER_FIELDS)


@given(st.text(max_size=300) | st.none(), st.sampled_from(BUILT_IN_RULES))
def test_the_compiled_test_and_the_single_question_agree(value: str | None, rule: Rule) -> None:
    assert rule.breaker()(value) is rule.is_broken_by(value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"field": "name", "pattern": "x"},
        {"field": "login"},
        {"field": "login", "pattern": "x", "max_length": 3},
        {"field": "login", "max_length": 3, "holds": str.isascii},
    ],
)
def test_a_rule_has_a_known_field_and_exactly_one_test(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Rule odd: field must be one of user_id, login, .* exactly one of pattern"):
        Rule("odd", words="must be odd", **wrong)


def test_an_optional_rule_lets_null_pass_and_nothing_else() -> None:
    rule = Rule("hash", "gravatar_id", "must be a hash", pattern="[0-9a-f]+", required=False)
    assert [rule.is_broken_by(value) for value in (None, "", "ab", "xy")] == [False, True, False, True]


def test_classes_of_a_pattern_are_ascii_as_in_java() -> None:
    rule = Rule("digits", "login", "must be digits", pattern=r"\d+\w*")
    assert [rule.is_broken_by(value) for value in ("1a", "\u0661", "1é")] == [False, True, True]


def test_the_contract_is_the_five_fields_and_the_marker_with_its_one_value() -> None:
    schema = json_schema()
    properties = schema["properties"]
    assert schema["required"] == list(USER_FIELDS)
    assert schema["additionalProperties"] is False
    assert set(properties) == {"_id", *USER_FIELDS, "spark_temp"}
    assert properties["spark_temp"] == {"enum": ["spark_write"]}
    assert properties["user_id"]["bsonType"] == "string"
    assert all(properties[field]["bsonType"] == ["string", "null"] for field in USER_FIELDS[1:])
    pattern = re.compile(properties["user_id"]["pattern"].replace(r"\z", r"\Z"))
    matching = [text for text in ("1", "-1", "0", "", "-", "+1", "1.0", "1\n", "\n1", "a") if pattern.search(text)]
    assert matching == ["1", "-1", "0"]


@pytest.fixture
def rules_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "house_rules", raising=False)
    return tmp_path / "house_rules.py"


def test_without_a_module_the_rules_are_the_built_in_ones() -> None:
    assert load_rules(None) == BUILT_IN_RULES


def test_a_projects_rules_join_the_built_in_ones(rules_module: Path) -> None:
    rules_module.write_text(
        "from ghsync_dagster.domain.user import Rule\n"
        'RULES = [Rule("no_root", "login", "login must not be root", holds=lambda login: login != "root")]\n'
    )
    rules = load_rules("house_rules")
    assert rules[:-1] == BUILT_IN_RULES
    assert broken_rule_names(USER | {"login": "root"}, rule_tests(rules)) == ("no_root",)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("", "can't be loaded .*RULES"),
        ("RULES = 5", "can't be loaded .*TypeError"),
        ("RULES = ['login']", "must be Rule objects with unique names"),
        ("import nowhere_to_be_found", "can't be loaded .*nowhere_to_be_found"),
        ("1 +", "can't be loaded .*SyntaxError"),
        ("RULES = [1 / 0]", "can't be loaded .*division"),
        ("from ghsync_dagster.domain.user import BUILT_IN_RULES as RULES", "unique names"),
        ("from ghsync_dagster.domain.user import Rule\nRULES = [Rule('a', 'age', 'b')]", "can't be loaded .*Rule a"),
        (
            "from ghsync_dagster.domain.user import Rule\nRULES = [Rule('a', 'login', 'b', pattern='(')]",
            "can't be loaded .*Rule a",
        ),
    ],
)
def test_rules_that_are_wrong_are_one_clear_error(rules_module: Path, source: str, words: str) -> None:
    rules_module.write_text(source)
    with pytest.raises(ConfigError, match=words) as caught:
        load_rules("house_rules")
    assert "house_rules" in caught.value.message
    assert "GHSYNC_RULES_MODULE" in caught.value.way_out


def test_a_rules_module_that_is_not_there_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match="rules in no_such_rules can't be loaded"):
        load_rules("no_such_rules")


def test_the_stream_counts_broken_rules_on_the_fields_that_are_given() -> None:
    tests = rule_tests(BUILT_IN_RULES)
    assert broken_rule_names(USER, tests) == ()
    named = USER | {"user_id": "-5", "login": "a b", "url": "http://a/a b"}
    assert broken_rule_names(named, tests) == ("user_id_positive", "login_format", "url_format")
    assert broken_rule_names(USER | {"login": None}, tests) == ("login_format",)
    assert broken_rule_names({"user_id": "1"}, tests) == ()
    long = USER | {"login": "x" * 2_000, "url": f"http://a/{'x' * 2_000}"}
    assert broken_rule_names(long, tests) == ("login_length", "url_length")
