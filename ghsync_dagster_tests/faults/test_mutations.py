"""A mutation of the product's own code turns a test red, each of them.

``TEST_FAULT_ROUNDS=N`` (any N) tries all of them, in place of a few that take seconds; ``make mutations`` prints which
test turned red for each.
"""

from __future__ import annotations

import os
import random
import sys
from typing import TYPE_CHECKING

import pytest

from ghsync_dagster_tests.support.long_campaign import ROUNDS
from ghsync_dagster_tests.support.mutations import (
    APPLY,
    MODEL,
    MUTATIONS,
    PLAN,
    REPAIR_MODEL,
    SETTLE,
    Mutation,
    copied,
    tried,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.faults

RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", "one process")
"""Names the whole test run: all of its processes must find the same tests."""
_QUICK = [mutation for mutation in MUTATIONS if mutation.tests not in (MODEL, REPAIR_MODEL)]
TRIED = MUTATIONS if ROUNDS else random.Random(RUN).sample(_QUICK, 3)  # noqa: S311


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project."""
    return copied(tmp_path_factory.mktemp("mutated"))


@pytest.mark.parametrize("mutation", TRIED, ids=str)
def test_a_mutation_turns_a_test_red(copy: Path, mutation: Mutation) -> None:
    red = tried(mutation, copy)
    sys.stdout.write(f"{mutation.what}: {red}\n")
    assert red, f"{mutation.file}: {mutation.what}: all of {mutation.tests} stayed green"


def test_what_changes_nothing_turns_no_test_red(copy: Path) -> None:
    nothing = Mutation(
        "nothing", "cdc/stream/apply.py", "    applied = Applied()\n", "    applied = Applied()\n", APPLY
    )
    assert tried(nothing, copy) is None


def test_each_mutation_changes_one_place() -> None:
    assert len({(mutation.file, mutation.before, mutation.after) for mutation in MUTATIONS}) == len(MUTATIONS) >= 30
    assert {mutation.tests for mutation in MUTATIONS} >= {MODEL, REPAIR_MODEL, APPLY, PLAN, SETTLE}
