"""What the benchmark of latency makes of commits and acknowledgements: what is steady, and what is of a hand-over."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.cdc_latency import Observed, latency_run
from benchmarks.harness import BenchmarkError

BEGAN_MS = 1_700_000_000_000
SECONDS = 20
REPORT = {"rate": 10.0, "changes": {"insert": 10 * SECONDS}, "longest_behind_seconds": 0.0}


def observed(second_began: int, hand_over: int, first_ended: int, slow: tuple[int, ...] = ()) -> Observed:
    """Ten inserts each second, stored after 40 ms, in ``slow`` seconds after 700; times in seconds since the first."""
    commits: list[dict[str, Any]] = []
    acknowledgements: list[dict[str, Any]] = []
    for second in range(SECONDS):
        at = BEGAN_MS + second * 1000
        commits.append({"records": 10, "kinds": ["c"] * 10, "at": at})
        stored = at + (700 if second in slow else 40)
        acknowledgements.append(
            {
                "records": 10,
                "counts": [("c", "applied", 10)],
                "at": stored,
                "from_kafka": [(5, 10)],
                "write_seconds": 0.01,
            }
        )
    began, told, ended = (BEGAN_MS + at * 1000 for at in (second_began, hand_over, first_ended))
    return Observed(10.0, commits, acknowledgements, (began, told, ended))


def test_a_hand_over_lasts_from_the_second_one_s_start_to_three_seconds_after_the_first_one_s_end() -> None:
    run = latency_run(observed(8, 12, 13, slow=(8, 16)), REPORT, equal=True)
    # From 5 to 8 and from 17 on, and 8 to 16.
    assert run.steady.count == 10 * (3 + 3)
    assert run.around.count == 10 * 9
    assert (run.steady.max, run.around.max) == (40, 700)
    assert run.all.count == 10 * SECONDS
    assert (run.longest_gap_ms, run.hand_over_at) == (1660, 12.0)


def test_a_hand_over_that_leaves_nothing_steady_is_an_error() -> None:
    with pytest.raises(BenchmarkError, match=r"lasted until 17 s, so no change was steady: .*--seconds"):
        latency_run(observed(3, 16, 17), REPORT, equal=True)


def test_records_without_a_pair_are_an_error() -> None:
    told = observed(8, 12, 13)
    with pytest.raises(BenchmarkError, match="200 records were committed, but 190 acknowledged"):
        latency_run(Observed(told.rate, told.commits, told.acknowledgements[:-1], told.times_ms), REPORT, equal=True)
