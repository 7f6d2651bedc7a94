"""What applying really does to each key, step by step, against the tables that the model enumerates; no servers."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from hypothesis import given
from hypothesis import strategies as st

from ghsync_dagster.cdc.stream.apply import apply
from ghsync_dagster.domain.coalesce import Segment
from ghsync_dagster.domain.precedence import DELETE_STEPS, GOES_BACK, UPSERT_STEPS, StreamStep
from ghsync_dagster_tests.support.builders import change, delete
from ghsync_dagster_tests.support.traced import Traced

if TYPE_CHECKING:
    from collections.abc import Iterator, Set

    from ghsync_dagster.domain.change import Change
    from ghsync_dagster.stores.mongo.writer import UserWriter

AGAIN = UPSERT_STEPS[UPSERT_STEPS.index(GOES_BACK[StreamStep.DROP_VERSION_AGAIN]) :]
"""The steps of a key that goes back, and of those the ones that are repeated."""
REPEATED = AGAIN[: AGAIN.index(StreamStep.DROP_VERSION_AGAIN) + 1]


class _TracedStore(Traced[StreamStep]):
    """The stream's store.

    Args:
        pages: What is stored, as a truncate reads it.
    """

    def __init__(self, pages: list[list[str]]) -> None:
        super().__init__()
        self.confirmed_after: dict[str, list[StreamStep]] = {}
        self._pages = pages

    def everyone(self, keep: Set[str]) -> Iterator[list[str]]:
        for page in self._pages:
            yield [key for key in page if key not in keep]

    def remove_nameless(self) -> int:
        self.confirmed_after = {key: list(steps) for key, steps in self.trace.items()}
        return 1


def changes_of(upserts: dict[str, bool]) -> dict[str, Change]:
    return {key: change(key) if upsert else delete(key) for key, upsert in upserts.items()}


keys = st.integers(1, 30).map(str)


@given(st.dictionaries(keys, st.booleans()), st.dictionaries(keys, st.integers(1, 3)), st.sets(keys))
def test_each_key_takes_the_steps_of_its_table_in_their_order(
    upserts: dict[str, bool], overtaken: dict[str, int], refused: set[str]
) -> None:
    store = _TracedStore([])
    store.overtaken, store.refused = dict(overtaken), refused
    segment = Segment(truncate=False, changes=changes_of(upserts))
    applied = apply(cast("UserWriter", store), segment)
    assert store.trace.keys() == upserts.keys()
    repeats = 0
    for key, upsert in upserts.items():
        written = list(UPSERT_STEPS)
        if key in refused:
            written = written[: written.index(StreamStep.WRITE_DOCUMENT) + 1]
        elif upsert:
            repeats += overtaken.get(key, 0)
            written[-1:-1] = list(REPEATED) * overtaken.get(key, 0)
        assert store.trace[key] == (written if upsert else list(DELETE_STEPS))
    held = {key for key, upsert in upserts.items() if upsert and key in refused}
    assert applied.refused.keys() == held
    assert applied.repeated == repeats
    assert applied.upserts == sum(upserts.values()) - len(held)
    assert applied.deletes == len(upserts) - sum(upserts.values())


@given(st.lists(st.lists(keys, unique=True), max_size=4), st.sets(keys), st.dictionaries(keys, st.booleans()))
def test_a_truncate_deletes_each_key_that_it_does_not_keep_before_anything_else(
    pages: list[list[str]], keep: set[str], upserts: dict[str, bool]
) -> None:
    store = _TracedStore(pages)
    segment = Segment(truncate=True, changes=changes_of(upserts))
    applied = apply(cast("UserWriter", store), segment, keep)
    found = [key for page in pages for key in page if key not in keep]
    assert store.confirmed_after == {key: list(DELETE_STEPS) * found.count(key) for key in found}
    assert applied.truncated == len(found) + 1
    for key, upsert in upserts.items():
        own = UPSERT_STEPS if upsert else DELETE_STEPS
        assert store.trace[key] == [*DELETE_STEPS * found.count(key), *own]
