"""What applying really does to each key, step by step, against the tables that the model enumerates; no servers."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, cast

from hypothesis import given
from hypothesis import strategies as st

from ghsync_dagster.cdc.apply import apply
from ghsync_dagster.domain.change import Change, Op
from ghsync_dagster.domain.coalesce import Segment
from ghsync_dagster.domain.precedence import DELETE_STEPS, GOES_BACK, UPSERT_STEPS, StreamStep
from ghsync_dagster.stores.stream import Refused

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Set

    from ghsync_dagster.stores.stream import StreamStore

REFUSED = Refused("validator", "")
AGAIN = UPSERT_STEPS[UPSERT_STEPS.index(GOES_BACK[StreamStep.DROP_VERSION_AGAIN]) :]
"""The steps of a key that goes back, and of those the ones that are repeated."""
REPEATED = AGAIN[: AGAIN.index(StreamStep.DROP_VERSION_AGAIN) + 1]


class _TracedStore:
    """Notes which step each command is, by key.

    Args:
        overtaken: How often a load comes between the write and the second drop of a key.
        refused: Keys that the database refuses.
        pages: What is stored, as a truncate reads it.
    """

    def __init__(self, overtaken: Mapping[str, int], refused: Set[str], pages: list[list[str]]) -> None:
        self.trace: dict[str, list[StreamStep]] = defaultdict(list)
        self.confirmed_after: dict[str, list[StreamStep]] = {}
        self._overtaken, self._refused, self._pages = dict(overtaken), refused, pages

    def _note(self, step: StreamStep, keys: Iterable[str]) -> None:
        for key in keys:
            self.trace[key].append(step)

    def everyone(self, keep: Set[str]) -> Iterator[list[str]]:
        for page in self._pages:
            yield [key for key in page if key not in keep]

    def remove_nameless(self) -> int:
        self.confirmed_after = {key: list(steps) for key, steps in self.trace.items()}
        return 1

    def record_deleted(self, keys: Iterable[str]) -> None:
        self._note(StreamStep.RECORD_DELETED, keys)

    def drop_versions(self, keys: Iterable[str]) -> set[str]:
        found = set()
        for key in keys:
            is_again = self.trace[key][-1:] == [StreamStep.WRITE_DOCUMENT]
            self.trace[key].append(StreamStep.DROP_VERSION_AGAIN if is_again else StreamStep.DROP_VERSION)
            if not is_again:
                # What stands there before the first write is of no matter.
                found.add(key)
            elif self._overtaken.get(key, 0):
                self._overtaken[key] -= 1
                found.add(key)
        return found

    def write(self, upserts: Mapping[str, Any], **_: Any) -> dict[str, Refused]:
        self._note(StreamStep.WRITE_DOCUMENT, upserts)
        return {key: REFUSED for key in upserts if key in self._refused}

    def remove(self, keys: Iterable[str]) -> int:
        keys = list(keys)
        self._note(StreamStep.REMOVE_DOCUMENT, keys)
        return len(keys)

    def forget_deleted(self, keys: Iterable[str]) -> None:
        self._note(StreamStep.FORGET_DELETED, keys)


def change(key: str, *, upsert: bool) -> Change:
    return Change(Op.UPSERT, key, {"user_id": key}, "u") if upsert else Change(Op.DELETE, key, None, "d")


keys = st.integers(1, 30).map(str)


@given(st.dictionaries(keys, st.booleans()), st.dictionaries(keys, st.integers(1, 3)), st.sets(keys))
def test_each_key_takes_the_steps_of_its_table_in_their_order(
    upserts: dict[str, bool], overtaken: dict[str, int], refused: set[str]
) -> None:
    store = _TracedStore(overtaken, refused, [])
    segment = Segment(truncate=False, changes={key: change(key, upsert=upsert) for key, upsert in upserts.items()})
    applied = apply(cast("StreamStore", store), segment)
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
    store = _TracedStore({}, set(), pages)
    segment = Segment(truncate=True, changes={key: change(key, upsert=upsert) for key, upsert in upserts.items()})
    applied = apply(cast("StreamStore", store), segment, keep)
    found = [key for page in pages for key in page if key not in keep]
    assert store.confirmed_after == {key: list(DELETE_STEPS) * found.count(key) for key in found}
    assert applied.truncated == len(found) + 1
    for key, upsert in upserts.items():
        own = UPSERT_STEPS if upsert else DELETE_STEPS
        assert store.trace[key] == [*DELETE_STEPS * found.count(key), *own]
