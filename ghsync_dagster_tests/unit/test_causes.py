"""The way out of a difference names its cause by pattern."""

from __future__ import annotations

from typing import Any

import pytest

from ghsync_dagster.cdc.health.audit import AuditResult, Offender
from ghsync_dagster.cdc.health.causes import Circumstances, likely_causes
from ghsync_dagster.cdc.health.checks import in_step_with_mysql

FAILED = "The connector is FAILED: internal schema size 5, but row size 1."


def result(missing: int = 0, extra: int = 0, different: int = 0, **more: Any) -> AuditResult:
    """An audit's result with so many differences, of 1,000 rows."""
    fixed: dict[str, Any] = {"rows": 1_000, "documents": 1_000, "from_files": 0, "offenders": ()}
    fixed |= {"reread": 0, "rounds": 1, "seconds": 1.0}
    return AuditResult(missing=missing, extra=extra, different=different, **{**fixed, **more})


@pytest.mark.parametrize(
    ("found", "known", "told"),
    [
        (result(missing=3), Circumstances(), ["No cause shows", "sql_log_bin=0", "who else writes"]),
        (result(missing=3), Circumstances(connector=FAILED), [FAILED]),
        (result(missing=3), Circumstances(settings=["binlog_format is MIXED."]), ["binlog_format is MIXED."]),
        (result(different=9, shifted=4), Circumstances(), ["4 users hold values", "stale schema: take a new snapshot"]),
        (result(missing=2, unusual_keys=1), Circumstances(), ["1 users have a row whose user_id is no signed BIGINT"]),
        (
            result(missing=2, offenders=(Offender("1", "missing"), Offender("2", "missing"))),
            Circumstances(with_letters={"2", "7"}),
            ["1 users have open dead letters: ghsync dlq list"],
        ),
        (
            result(missing=5, offenders=(Offender("1", "missing"), Offender("2", "missing"))),
            Circumstances(with_letters={"1", "2"}),
            ["2 users of the 2 named have open dead letters"],
        ),
        (
            result(extra=100, extra_keys=(501, 600)),
            Circumstances(),
            ["nearly all keys from 501 to 600: partition maintenance (DROP or TRUNCATE PARTITION)"],
        ),
        (result(extra=100, extra_keys=(1, 9_000)), Circumstances(), ["a foreign key's cascade", "has no event"]),
        (result(extra=500, rows=0, extra_keys=(1, 500)), Circumstances(), ["the table is empty: DROP TABLE"]),
    ],
)
def test_the_cause_is_told_by_pattern(found: AuditResult, known: Circumstances, told: list[str]) -> None:
    causes = likely_causes(found, known)
    assert [part for part in told if part not in " ".join(causes)] == []
    assert len(causes) == 1


@pytest.mark.parametrize("found", [result(extra=99), result(missing=50, extra=100), result(different=500)])
def test_few_or_mixed_differences_are_no_deletes_in_bulk(found: AuditResult) -> None:
    assert "binlog has no event" not in " ".join(likely_causes(found, Circumstances()))


def test_several_causes_are_told_the_connector_first() -> None:
    known = Circumstances(FAILED, ["binlog_row_image is MINIMAL."], {"1"})
    found = result(different=1, shifted=1, offenders=(Offender("1", "different", shifted=True),))
    causes = likely_causes(found, known)
    assert causes[:2] == [FAILED, "binlog_row_image is MINIMAL."]
    assert len(causes) == 4


def test_the_check_names_cause_and_cure() -> None:
    finding = in_step_with_mysql(result(different=2, shifted=1), 0)
    assert not finding.passed
    assert "(1 shifted)" in finding.summary
    assert finding.way_out.startswith("1 users hold values in each other's columns")
    assert "ghsync cdc repair --from-audit" in finding.way_out
    assert finding.counts["not_named"] == 2
    assert in_step_with_mysql(result(), 0).way_out == ""


def test_changes_that_wait_come_first_but_for_a_failed_connector() -> None:
    assert "See that a consumer runs" in in_step_with_mysql(result(missing=1), 7).way_out
    failed = in_step_with_mysql(result(missing=1), 7, Circumstances(connector=FAILED))
    assert failed.way_out.startswith(FAILED)
