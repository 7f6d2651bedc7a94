"""What Python itself is set to while changes are consumed, so that threads do not wait for each other.

Belongs here: settings of the interpreter. Not here: what the threads do. They are for the whole process: of several
consumers in one, the first that ends sets them back for all.
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
def quick_turns() -> Iterator[None]:
    """Let the thread that writes go on soon after each answer of the store, while the other one decodes."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, _SWITCH_SECONDS))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextmanager
def short_collections() -> Iterator[None]:
    """Keep what is there already from the garbage collector: to go through all of Dagster holds every thread up."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
