"""A project's own user rules: how they are loaded and added to the built-in ones.

Not here: what a rule is and how it is tested (``domain.user``).
"""

from __future__ import annotations

import importlib
from typing import Final

from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster.domain.user import BUILT_IN_RULES, Rule

_RESERVED: Final = frozenset({"users", "distinct", "repeated"})
"""Names of other counts next to those of the rules."""


def load_rules(module_name: str | None) -> tuple[Rule, ...]:
    """Return the built-in rules and those of ``module_name``'s ``RULES``.

    Raises:
        ConfigError: The module can't be imported, or its ``RULES`` are not rules with names of their own.
    """
    if module_name is None:
        return BUILT_IN_RULES
    way_out = "GHSYNC_RULES_MODULE must name a module with RULES = (Rule(...), ...); see docs/operate/configure.md."
    try:
        own = tuple(importlib.import_module(module_name).RULES)
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(f"The rules in {module_name} can't be loaded ({what}).", way_out=way_out) from error
    names = [rule.name for rule in (*BUILT_IN_RULES, *own) if isinstance(rule, Rule)]
    if len(names) != len(BUILT_IN_RULES) + len(own) or len(set(names)) != len(names):
        raise ConfigError(f"RULES of {module_name} must be Rule objects with unique names.", way_out=way_out)
    if taken := _RESERVED.intersection(names):
        raise ConfigError(f"A rule of {module_name} can't be named {', '.join(sorted(taken))}.", way_out=way_out)
    return (*BUILT_IN_RULES, *own)
