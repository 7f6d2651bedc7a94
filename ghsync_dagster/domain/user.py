"""The one declaration of a user's fields and rules; schemas, checks and the decoder are derived from it.

Belongs here: what a user record is, in two tiers. The database enforces the *contract* (field names, types, decimal
``user_id``) for both sides. The *rules* gate files; the change stream only counts violations. Not here: types of Spark
or MongoDB, beyond plain text (a Spark SQL expression, a ``$jsonSchema`` document).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ghsync_dagster.domain.errors import ConfigError

USER_FIELDS: Final = ("user_id", "login", "gravatar_id", "avatar_url", "url")
"""The fields of a stored user, in their order. A stored document holds these and ``_id``, nothing else."""

USER_ID_PATTERN: Final = "-?[0-9]+"
"""The contract of ``user_id``: a decimal string, a sign is allowed."""

MARKER_FIELD: Final = "spark_temp"
MARKER_VALUE: Final = "spark_write"

User = Mapping[str, str | None]
"""A user record: each of ``USER_FIELDS`` to its text, or to None where the contract allows it."""


def json_schema() -> dict[str, Any]:
    """Return the contract as a MongoDB ``$jsonSchema`` document; the marker is allowed with its one value."""
    text = {field: {"bsonType": ["string", "null"]} for field in USER_FIELDS}
    return {
        "bsonType": "object",
        "required": list(USER_FIELDS),
        "additionalProperties": False,
        "properties": {
            "_id": {},
            **text,
            "user_id": {"bsonType": "string", "pattern": rf"\A{USER_ID_PATTERN}\z"},
            MARKER_FIELD: {"enum": [MARKER_VALUE]},
        },
    }


@dataclass(frozen=True, slots=True)
class Rule:
    """A business rule on one field of a user.

    Give ``pattern`` (the whole value must match; keep to syntax that Python and Java share), ``max_length``
    (in characters), or ``holds`` (any Python predicate; Spark then runs it in Python workers, which is slower).

    Attributes:
        name: Short, unique, such as ``login_format``.
        field: One of ``USER_FIELDS``.
        words: The requirement as text for reasons and checks: ``login must be ...``.
        required: Whether null breaks the rule.
    """

    name: str
    field: str
    words: str
    pattern: str | None = None
    max_length: int | None = None
    holds: Callable[[str], bool] | None = None
    required: bool = True

    def __post_init__(self) -> None:
        given = [part for part in (self.pattern, self.max_length, self.holds) if part is not None]
        if self.field not in USER_FIELDS or len(given) != 1:
            raise ValueError(
                f"Rule {self.name}: field must be one of {', '.join(USER_FIELDS)}, "
                "with exactly one of pattern, max_length and holds."
            )
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ValueError(f"Rule {self.name}: its pattern is no regular expression ({error}).") from None

    def breaker(self) -> Callable[[str | None], bool]:
        """Return the compiled test of whether a value of the rule's field breaks it.

        Raises:
            ConfigError: Raised by the test if the rule's own predicate fails on a value.
        """
        required = self.required
        if self.pattern is not None:
            # As in Java, where classes such as \d are ASCII too.
            matches = re.compile(self.pattern, re.ASCII).fullmatch
            return lambda value: required if value is None else matches(value) is None
        if (limit := self.max_length) is not None:
            return lambda value: required if value is None else len(value) > limit
        return lambda value: required if value is None else not self._holds(value)

    def _holds(self, value: str) -> bool:
        assert self.holds is not None  # noqa: S101  __post_init__ ensures it
        try:
            return self.holds(value)
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise ConfigError(
                f"Rule {self.name} fails on a {self.field} of {len(value)} characters ({what}).",
                way_out="Correct its predicate in GHSYNC_RULES_MODULE: it must give true or false for any text.",
            ) from error

    def is_broken_by(self, value: str | None) -> bool:
        """Return whether a value of the rule's field breaks it."""
        return self.breaker()(value)

    def broken_sql(self) -> str | None:
        """Return a Spark SQL condition that is true if the rule is broken; None for a Python predicate."""
        column = f"`{self.field}`"
        if self.pattern is not None:
            # (?d): a line ends at \n only, as in Python.
            literal = rf"(?d)\A(?:{self.pattern})\z".replace("\\", "\\\\").replace("'", "\\'")
            broken = f"NOT ({column} RLIKE '{literal}')"
        elif self.max_length is not None:
            broken = f"length({column}) > {self.max_length}"
        else:
            return None
        return f"coalesce({broken}, {str(self.required).lower()})"


_URL: Final = "https?://[!-~]+"
COLUMN_WIDTH: Final = 255
"""The width of MySQL's VARCHAR columns: MySQL and its change stream can't have a longer value."""

BUILT_IN_RULES: Final = (
    Rule("user_id_positive", "user_id", "actor.id must be greater than 0", pattern="[1-9][0-9]*"),
    Rule(
        "login_format",
        "login",
        "login must be letters, digits, hyphens or underscores, with an optional [bot] at the end",
        pattern=r"[A-Za-z0-9_-]+(\[bot\])?",
    ),
    Rule(
        "avatar_url_format",
        "avatar_url",
        "avatar_url must be an http(s) URL of printable ASCII",
        pattern=_URL,
    ),
    Rule("url_format", "url", "url must be an http(s) URL of printable ASCII", pattern=_URL),
    *(
        Rule(
            f"{name}_length",
            name,
            f"{name} must have at most 255 characters",
            max_length=COLUMN_WIDTH,
            required=False,
        )
        for name in USER_FIELDS[1:]
    ),
)
"""The rules that every deployment has; ``GHSYNC_RULES_MODULE`` adds a project's own."""


RuleTest = tuple[str, Callable[[str | None], bool], str]
"""A rule prepared for the stream: its field, the test of whether a value breaks it, its name."""


def rule_tests(rules: Iterable[Rule]) -> tuple[RuleTest, ...]:
    """Prepare rules for `broken_rule_names`."""
    return tuple((rule.field, rule.breaker(), rule.name) for rule in rules)


def broken_rule_names(user: User, tests: Iterable[RuleTest]) -> tuple[str, ...]:
    """Return the names of the rules that a user's fields break, for counting: the stream applies the user anyway.

    Args:
        user: A change's user; missing fields break no rule.
        tests: From `rule_tests`.

    Raises:
        ConfigError: A project's own predicate fails.
    """
    return tuple([name for field, broken, name in tests if field in user and broken(user[field])])
