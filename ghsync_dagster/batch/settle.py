"""Settle: how a load ends, its own or a dead one's, so that nothing is left marked and nothing is half done.

Belongs here: carrying out ``domain.precedence.settle`` over all keys of a load. Not here: the decision itself.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ghsync_dagster.domain.precedence import Found, LoadState, Repair, settle
from ghsync_dagster.domain.user import MARKER_FIELD
from ghsync_dagster.observability.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ghsync_dagster.stores.mongo import UserStore

log = get_logger("settle")


def _nothing() -> None:
    """Stand in for a callback that nobody needs."""


def recover(store: UserStore, assert_held: Callable[[], None]) -> dict[str, int]:
    """Settle what earlier loads left unfinished.

    Returns:
        How many keys were settled, by kind of repair; empty where nothing was left.
    """
    settled: Counter[str] = Counter()
    for record in store.unfinished_loads():
        log.warning("settling an unfinished load", load=record["_id"], state=record["state"])
        if LoadState(record["state"]) is LoadState.RUNNING:
            settled += _repair(store, record["_id"], assert_held)
        settled["unmarked"] += _finish(store, record["_id"], assert_held, _nothing, _nothing)
        assert_held()
        store.record_load(record["_id"], state=LoadState.DONE.value)
    if store.count_marked():
        settled += _settle_strays(store, assert_held)
    # Empty but for what a holder that had lost its lease wrote too late.
    assert_held()
    store.clear_undo()
    return dict(+settled)


def _settle_strays(store: UserStore, assert_held: Callable[[], None]) -> Counter[str]:
    """Settle markers that no unfinished load accounts for: they stay users, but for what the stream deleted.

    Such are what a dead load's executors wrote after it was settled, and what another program marked.
    """
    from ghsync_dagster.stores.mongo import chunks

    removed = 0
    for keys in chunks(user["user_id"] for user in store.marked()):
        deleted = store.deleted_among(keys)
        owned = store.versions_by_id(sorted(deleted))
        assert_held()
        removed += store.delete_marked(deleted - owned.keys())
    assert_held()
    return Counter({Repair.REMOVE.value: removed, "unmarked": store.unmark_all()})


def settle_load(
    store: UserStore,
    load_id: str,
    *,
    expected_marked: int | None,
    assert_held: Callable[[], None],
    on_checked: Callable[[], None],
    on_unmarked: Callable[[], None],
    on_done: Callable[[], None],
) -> int:
    """End a verified load: compare with the stream, make versions final, remove the marker.

    Args:
        store: The store.
        load_id: The load.
        expected_marked: How many documents carry the marker if nobody touched one since; None: look at each.
        assert_held: Raises when the lease is lost.
        on_checked: Told when every key is settled.
        on_unmarked: Told when the marker is gone.
        on_done: Told at the end.

    Returns:
        From how many documents the marker was removed.
    """
    # As many marked as were inserted, and no deletion on record: the stream touched none of them.
    if expected_marked is None or store.count_marked() != expected_marked or store.any_deleted():
        _repair(store, load_id, assert_held)
    unmarked = _finish(store, load_id, assert_held, on_checked, on_unmarked)
    assert_held()
    store.record_load(load_id, state=LoadState.DONE.value, unmarked=unmarked)
    on_done()
    return unmarked


def _finish(
    store: UserStore,
    load_id: str,
    assert_held: Callable[[], None],
    on_checked: Callable[[], None],
    on_unmarked: Callable[[], None],
) -> int:
    assert_held()
    store.record_load(load_id, state=LoadState.CHECKED.value)
    on_checked()
    assert_held()
    unmarked = store.unmark_all()
    on_unmarked()
    assert_held()
    store.clear_undo()
    return unmarked


def _repair(store: UserStore, load_id: str, assert_held: Callable[[], None]) -> Counter[str]:
    """Repair every key that a load in state running has written; return how often each repair was needed."""
    from ghsync_dagster.stores.mongo import chunks

    repaired: Counter[str] = Counter()
    for keys in chunks(user["user_id"] for user in store.marked()):
        assert_held()
        repaired += _repair_marked(store, load_id, keys)
    for keys in chunks(store.versions_of_load(load_id)):
        assert_held()
        documents = store.users_by_id(keys)
        overtaken = [key for key in keys if MARKER_FIELD not in documents.get(key, {})]
        repaired[Repair.DROP_VERSION.value] += store.drop_versions(overtaken)
    return repaired


def _repair_marked(store: UserStore, load_id: str, keys: Sequence[str]) -> Counter[str]:
    old = store.undo_by_id(keys)
    versions = store.versions_by_id(keys)
    deleted = store.deleted_among(keys)
    by_repair: dict[Repair, list[str]] = {repair: [] for repair in Repair}
    for key in keys:
        versioned = key in versions and versions[key].load == load_id
        found = Found(marked=True, replaced=key in old, versioned=versioned, deleted=key in deleted)
        by_repair[settle(LoadState.RUNNING, found)].append(key)
    store.put_back(old[key] for key in by_repair[Repair.PUT_BACK])
    store.delete_marked(by_repair[Repair.REMOVE])
    store.drop_versions(key for key in by_repair[Repair.REMOVE] if key in versions and versions[key].load == load_id)
    return Counter({repair.value: len(found) for repair, found in by_repair.items()})
