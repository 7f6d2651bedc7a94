"""Settings of the Python interpreter while changes are consumed, so that threads do not wait for each other.

Belongs here: these settings. Not here: what the threads do. They hold for the whole process: the first of several
consumers that ends resets them for all.
"""

from __future__ import annotations

import gc
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_SWITCH_SECONDS: Final = 0.0005
"""How long a thread may keep the interpreter while another one waits for it; 5 ms by default."""


@contextmanager
def tuned_interpreter() -> Iterator[None]:
    """Let threads take turns quickly, and exclude existing objects from garbage collection.

    So the writing thread goes on soon after each answer of the store, while the other one decodes. A collection that
    passes over all of Dagster would hold every thread up.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, _SWITCH_SECONDS))
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        sys.setswitchinterval(before)
