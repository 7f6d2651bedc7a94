"""A pytest plugin: a test that hangs in a library ends its process, with the stacks of all threads.

pytest-timeout fails a test that hangs in Python. Where a library does not return, or holds the interpreter's lock, no
line of Python runs any more. So a watch that needs none ends the process a little later: a run fails, and under xdist
the other tests go on in a new process.
"""

from __future__ import annotations

import faulthandler
from typing import TYPE_CHECKING

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key

if TYPE_CHECKING:
    from collections.abc import Generator

_LEAST_SECONDS = 2.0


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Watch one test, its set-up and its clean-up."""
    seconds = _timeout(item)
    if not seconds:
        return (yield)
    file = item.config.stash[fault_handler_stderr_fd_key]
    faulthandler.dump_traceback_later(seconds + max(seconds / 10, _LEAST_SECONDS), exit=True, file=file)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _timeout(item: pytest.Item) -> float:
    """Return the seconds that pytest-timeout gives a test; 0 for no limit."""
    marker = item.get_closest_marker("timeout")
    given = marker.args[0] if marker and marker.args else marker.kwargs.get("timeout") if marker else None
    return float(given or item.config.getoption("timeout", None) or item.config.getini("timeout") or 0)
