"""A pytest plugin: files that share servers name them by a mark, and run one after another in one process.

``pytestmark = pytest.mark.servers("spark")``, or a list with it, stands on one line at the head of a file. The process
that deals out the files imports none of them, so the mark is read from the text.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadFileScheduling

if TYPE_CHECKING:
    from pathlib import Path

GROUPS = ("spark", "stream", "stack", "source")
"""What files share, in the order in which it is their turn; its servers live until the session ends."""
_OF_STREAM = ("stream", "stack")
FOLLOWING = (*_OF_STREAM, "source")
"""Groups that have a database followed."""
_STARTING = {
    "spark": ("spark",),
    "brokers": _OF_STREAM,
    "local_stack": _OF_STREAM,
    "mysql_url": _OF_STREAM,
    "source_stack": ("source",),
    "mysql_stack": ("source",),
}
"""Fixtures that start such servers, and which groups may use them."""
_LONG_ONES = ("ui", "faults", "integration")
_MARK = re.compile(r'^pytestmark = .*\bpytest\.mark\.servers\("(\w+)"\)', re.MULTILINE)


@cache
def group_of(file: Path) -> str | None:
    """Return the group that the head of a file names."""
    found = _MARK.search(file.read_text(encoding="utf-8"))
    return found[1] if found else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put first what shares servers, then the folders of long tests: short ones fill the end, where processes wait.

    Raises:
        UsageError: A file wants servers of a group and does not name it at its head.
    """
    order = [*GROUPS, *_LONG_ONES]

    def rank(item: pytest.Item) -> int:
        place = group_of(item.path) or item.path.parent.name
        return order.index(place) if place in order else len(order)

    for item in items:
        _check(item)
    items.sort(key=rank)


def _check(item: pytest.Item) -> None:
    file, group = item.path.name, group_of(item.path)
    if group not in (None, *GROUPS):
        raise pytest.UsageError(f"{file}: no servers are named {group}; the names are {', '.join(GROUPS)}.")
    if [mark.args for mark in item.iter_markers("servers")] != ([(group,)] if group else []):
        raise pytest.UsageError(f"{file}: name the servers once, on one line at the head: {_line('spark')}.")
    wanted = {name: _STARTING[name] for name in getattr(item, "fixturenames", ()) if name in _STARTING}
    groups = dict.fromkeys(group for those in wanted.values() for group in those)
    if wanted and group not in groups:
        lines = " or ".join(map(_line, groups))
        raise pytest.UsageError(f"{file} shares the servers of {', '.join(wanted)}; put at its head: {lines}.")


def _line(group: str) -> str:
    return f'pytestmark = pytest.mark.servers("{group}")'


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    """Have one process run all files that share servers, so that these are not started in every process."""
    return _ByServers(config, log) if config.getoption("dist") == "loadfile" else None


class _ByServers(LoadFileScheduling):  # type: ignore[misc]  # the library comes without types
    """Deals out files, and those that share servers as if they were one."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return group_of(self.config.rootpath / file) or file
