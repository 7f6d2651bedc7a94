"""The tests, which mirror the package: ``unit/`` without I/O, ``defs/``, ``integration/``, ``faults/``, ``ui/``.

What several files of tests use is in ``support/``, or a fixture of conftest.py.
"""

import pytest

# Before any is imported: what a helper asserts is told as what a test does.
pytest.register_assert_rewrite("ghsync_dagster_tests.support")
