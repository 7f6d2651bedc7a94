"""Odd but valid statements on a MariaDB and a MySQL: they are followed, or stop the connector aloud.

``TEST_FAULT_ROUNDS=N`` (any N) tries each by itself, and all that are not followed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ghsync_dagster.cdc.health.audit import Patience
from ghsync_dagster_tests.support.long_campaign import LONG, ONLY_LONG
from ghsync_dagster_tests.support.odd_ddl import FOLLOWED, NOT_FOLLOWED, SHIFTING
from ghsync_dagster_tests.support.source_parts import Source, StoppedError

if TYPE_CHECKING:
    from collections.abc import Iterable

CASES = 3
pytestmark = [pytest.mark.integration, pytest.mark.servers("source")]


def test_the_connector_follows_all(source: Source) -> None:
    markers = {}
    for name, odd in FOLLOWED.items():
        if source.server in odd.servers:
            source.clean()
            source.do(*odd.statements)
            markers[name] = source.mark()
    arrived = source.arrived()
    assert len(markers) >= 40
    assert [name for name, marker in markers.items() if marker not in arrived] == []


@pytest.mark.faults
@LONG
@pytest.mark.parametrize("name", FOLLOWED)
def test_the_connector_follows(source: Source, name: str) -> None:
    odd = FOLLOWED[name]
    if source.server not in odd.servers:
        pytest.skip(f"not valid on {source.server}")
    source.do(*odd.statements)
    assert source.arrived()[-1] == source.marker()


def _cases(names: Iterable[str]) -> list[Any]:
    """Return the first three, and the others for the long campaign: each takes a new snapshot."""
    return [pytest.param(name, marks=ONLY_LONG if at >= CASES else ()) for at, name in enumerate(names)]


@pytest.mark.parametrize("name", _cases(NOT_FOLLOWED))
def test_what_it_can_not_follow_stops_it_and_a_new_snapshot_passes_it(source: Source, name: str) -> None:
    odd = NOT_FOLLOWED[name]
    if source.server not in odd.servers:
        pytest.skip(f"valid and followed, or not valid, on {source.server}")
    source.do(*odd.statements)
    with pytest.raises(StoppedError, match="change event producer"):
        source.arrived()
    if odd.lasts:
        source.clean()
    source.snapshot()
    assert source.arrived()[-1] == source.marker()


@pytest.mark.parametrize("name", SHIFTING)
def test_what_is_misread_without_a_word_is_found_by_the_audit_and_passed_by_a_new_snapshot(
    source: Source, name: str
) -> None:
    odd = SHIFTING[name]
    if source.server not in odd.servers:
        pytest.skip(f"not valid on {source.server}")
    source.do(*odd.statements)
    arrived = source.arrived()[-1]
    assert arrived["op"] == "c"
    assert arrived != source.marker()
    assert not source.audited(Patience(seconds=0)).equal
    source.snapshot()
    assert source.arrived()[-1] == source.marker()
    assert source.audited().equal
