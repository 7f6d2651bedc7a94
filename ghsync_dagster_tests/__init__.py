"""The tests, which mirror the package: ``unit/`` without I/O, ``defs/``, ``integration/``, ``faults/``, ``ui/``.

What several files of tests use is in ``support/``, or a fixture of conftest.py.
"""
