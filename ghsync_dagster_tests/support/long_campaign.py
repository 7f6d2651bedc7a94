"""Whether this is the long campaign of ``make faults``, what only that one runs, and how long a test may take."""

from __future__ import annotations

import os
from typing import Final

import pytest

ROUNDS: Final = int(os.environ.get("TEST_FAULT_ROUNDS") or 0)
"""How many rounds the long campaign has; 0 in the short one."""
LONG: Final = pytest.mark.skipif(not ROUNDS, reason="make faults runs it")
ONLY_LONG: Final = (pytest.mark.faults, LONG)
"""Marks of a case that only the long campaign runs."""
HANG_SECONDS: Final = 400
"""After how long a command is taken for one that hangs: a slow machine is no fault."""
