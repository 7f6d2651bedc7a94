"""The summary of the batch flow that a person or a program reads at its end.

Belongs here: gathering the newest reports into one record, and drawing it. Not here: judging it.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from ghsync_dagster.batch.reports import FlattenReport, LoadReport, ReadReport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from ghsync_dagster.batch.reports import Artifacts
    from ghsync_dagster.domain.finding import Finding

_NAMES: Final = 5
_SPARK_START: Final = "start of Spark"
_STARTS: Final = {"jvm_start": _SPARK_START}
Summary = dict[str, Any]


def batch_summary(artifacts: Artifacts, findings: Sequence[Finding], **more: object) -> Summary:
    """Return the results of read, flatten and load, as far as they ran, and the checks' outcomes.

    They are of the artifacts' own run. If the artifacts name no run, they are the newest of each step.

    Args:
        artifacts: Where the reports are.
        findings: The checks that ran.
        more: Further entries, such as ``seconds`` or ``collection``.
    """
    summary: Summary = {"checks": [asdict(finding) for finding in findings], **more}
    phases: dict[str, float] = dict(summary.pop("phases", {}))
    newest = artifacts.own if artifacts.run_id else artifacts.find
    read, users, load = newest(ReadReport), newest(FlattenReport), newest(LoadReport)
    if read:
        phases["read"] = read.seconds
        summary |= {"lines": read.lines, "events": read.events, "quarantined": read.quarantined, "blank": read.blank}
        summary |= {"files": [file.path for file in read.files], "reasons": read.reasons}
        summary["left_out"] = [
            {"reason": entry.reason, "files": entry.files, "names": entry.names} for entry in read.left_out
        ]
    if users:
        phases["flatten"] = users.seconds
        summary["users"] = users.users
    if load:
        phases |= {f"load: {phase}": seconds for phase, seconds in load.phases.items()}
        names = ("inserted", "replaced", "confirmed", "left", "missing", "reconciled", "unresolved", "unmarked")
        summary |= {name: getattr(load, name) for name in (*names, "recovered")}
    return {**summary, "phases": phases}


def draw(summary: Summary) -> RenderableType:
    """Return the summary for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    for title, text in _lines(summary):
        # As Text, since input data is no markup.
        table.add_row(title, Text(text))
    checks = Table.grid(padding=(0, 2))
    for check in summary["checks"]:
        mark = "[green]passed[/]" if check["passed"] else "[red]FAILED[/]"
        checks.add_row(mark, check["check"], Text(check["summary"]))
        if check["way_out"]:
            checks.add_row("", "", Text(f"way out: {check['way_out']}"))
    return Group(table, "", checks) if summary["checks"] else Group(table)


def _left_out(entry: dict[str, Any]) -> str:
    names = ", ".join(entry["names"][:_NAMES])
    more = f" and {entry['files'] - _NAMES:,} more" if entry["files"] > _NAMES else ""
    return f"{entry['files']:,} file(s), {entry['reason']}: {names}{more}"


def _lines(summary: Summary) -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    if "lines" in summary:
        lines += [("lines read", f"{summary['lines']:,} in {len(summary['files'])} file(s)")]
        lines += [("events", f"{summary['events']:,}"), ("quarantined", f"{summary['quarantined']:,}")]
        lines += [("  because", f"{reason}: {count:,}") for reason, count in list(summary["reasons"].items())[:5]]
        lines += [("left out", _left_out(entry)) for entry in summary["left_out"]]
    if "users" in summary:
        lines.append(("users", f"{summary['users']:,}"))
    if "inserted" in summary:
        left = ", ".join(f"{count:,} {reason}" for reason, count in summary["left"].items()) or "0"
        written = f"{summary['inserted']:,} new, {summary['replaced']:,} replaced, {summary['confirmed']:,} confirmed"
        lines += [("written", written), ("left as stored", left)]
        lines.append(("missing", f"{summary['missing']:,} found, {summary['reconciled']:,} reconciled"))
        if summary["recovered"]:
            settled = ", ".join(f"{count:,} {kind}" for kind, count in summary["recovered"].items())
            lines.append(("recovered", f"left by an unfinished load: {settled}"))
    phases = {_STARTS.get(phase, phase): seconds for phase, seconds in summary["phases"].items()}
    if "seconds" in summary:
        # So that they add up to the total: a run in Dagster does not report how long it waited for Spark.
        rest = "rest (checks)" if _SPARK_START in phases else f"rest ({_SPARK_START}, checks)"
        phases[rest] = max(0.0, summary["seconds"] - sum(phases.values()))
    lines += [("seconds", ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in phases.items()))]
    if "seconds" in summary:
        lines.append(("total seconds", f"{summary['seconds']:.1f}"))
    if "collection" in summary:
        lines.append(("data", summary["collection"]))
    return lines
