"""The checks of the change flow. Each judges data only, and returns exact counts and the way out.

Belongs here: the judgement, for the Dagster checks and the command line. Not here: faults of servers, which raise and
never look like failed data.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

from ghsync_dagster.cdc.health.causes import CURE, Circumstances, likely_causes
from ghsync_dagster.cdc.health.connector import NOT_ASKED
from ghsync_dagster.domain.connector import CONNECTOR
from ghsync_dagster.domain.finding import OFFENDERS, Finding
from ghsync_dagster.domain.source import OTHER_ENGINE, Effect, problems_of

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from ghsync_dagster.cdc.dead_letters.index import OpenLetters
    from ghsync_dagster.cdc.health.audit import AuditResult
    from ghsync_dagster.cdc.health.connector import ConnectorReport
    from ghsync_dagster.cdc.health.metrics import Latency
    from ghsync_dagster.domain.source import Source, Statements
    from ghsync_dagster.stores.kafka.backlog import Backlog

KAFKA_LAG: Final = "kafka_lag"
CDC_LATENCY: Final = "cdc_latency"
DEAD_LETTERS_EMPTY: Final = "dead_letters_empty"
IN_STEP_WITH_MYSQL: Final = "in_step_with_mysql"
SOURCE_SETTINGS: Final = "source_settings"
CONNECTOR_RUNNING: Final = "connector_running"

_CHECK_CONSUMER: Final = (
    "See that a consumer runs (the sensor cdc_supervisor, or ghsync cdc run) and what its newest observation says"
)


@dataclass(frozen=True, slots=True)
class Measured:
    """The latency that one consumer measured in one interval.

    Attributes:
        at: The interval's end, in seconds since 1970.
        run_id: The consumer's run.
        records: How many records were measured.
        p99_ms: The p99 from commit to stored document, in ms; see ``certain_p99``.
    """

    at: float
    run_id: str
    records: int
    p99_ms: int


def certain_p99(commit: Latency, kafka: Latency) -> int:
    """Return a lower bound of the window's p99 from the database's commit to the write, in ms.

    If commit times come in whole seconds, a commit may seem up to a second earlier than it was. The latency from
    Kafka's timestamp is a lower bound too, so the higher one counts. Records of a snapshot have no commit time.
    """
    return max(commit.window.p99 - (commit.grain_ms - 1), kafka.window.p99, 0)


def kafka_lag(backlog: Backlog, limit: int, *, is_another: bool = False, placed: Collection[int] = ()) -> Finding:
    """Check that at most ``limit`` records wait for the group, and that none was removed before it was applied.

    Args:
        backlog: The records that wait.
        limit: How many records may wait.
        is_another: Whether the topic is not the one that the group has consumed.
        placed: The partitions in which the group had a committed offset before.
    """
    forgotten = set() if is_another else backlog.uncommitted.intersection(placed)
    worst = sorted(
        backlog.partitions,
        key=lambda found: (not found.is_recreated, found.partition not in forgotten, -found.lost, -found.waiting),
    )
    lost = f"; {backlog.lost} were removed from the topic before they were applied" if backlog.lost else ""
    is_recreated = is_another or backlog.recreated > 0
    recreated = "; the topic was recreated, and the group's committed offsets are not of it" if is_recreated else ""
    gone = f"; the group's committed offsets of {len(forgotten)} partitions are gone" if forgotten else ""
    is_gone = bool(backlog.lost or is_recreated or forgotten)
    passed = backlog.waiting <= limit and not is_gone
    return Finding.judged(
        KAFKA_LAG,
        f"{backlog.waiting} changes wait for group {backlog.group} (at most {limit} may){lost}{recreated}{gone}",
        {
            "waiting": backlog.waiting,
            "limit": limit,
            "lost": backlog.lost,
            "forgotten": len(forgotten),
            "partitions": len(backlog.partitions),
        },
        passed=passed,
        offenders=[
            {**asdict(found), "waiting": found.waiting, "lost": found.lost, "anew": found.is_recreated}
            for found in worst
            if found.waiting or found.lost or found.is_recreated or found.partition in forgotten
        ],
        way_out="Take a new snapshot, and let a new group begin at the beginning; see docs/operate/runbook.md."
        if is_gone
        else f"{_CHECK_CONSUMER}; a lag that shrinks needs only time, or a higher GHSYNC_MAX_LAG_RECORDS.",
    )


def cdc_latency(measured: Sequence[Measured], waiting: int, *, limit_ms: float, window_seconds: float) -> Finding:
    """Check that the p99 of the newest intervals is within the limit, and that changes do not wait without consumer.

    Args:
        measured: The observations within the window, without intervals that have no record.
        waiting: Records that wait for the group; read only if nothing was measured, else 0.
        limit_ms: The allowed p99.
        window_seconds: The length of the window.
    """
    slow = sorted((one for one in measured if one.p99_ms > limit_ms), key=lambda one: -one.p99_ms)
    worst = max((one.p99_ms for one in measured), default=0)
    records = sum(one.records for one in measured)
    counts: dict[str, int | float] = {"records": records, "limit_ms": limit_ms, "waiting": waiting}
    if measured:
        words = f"the highest p99 of {records} changes in the last {window_seconds:.0f} s is {worst} ms"
        counts |= {"p99_ms": worst, "intervals": len(measured), "slow_intervals": len(slow)}
    elif waiting:
        words = (
            f"no change was applied in the last {window_seconds:.0f} s, though {waiting} wait: no consumer is at work"
        )
    else:
        words = f"no change came in the last {window_seconds:.0f} s, and none waits"
    passed = not slow and not (waiting and not measured)
    return Finding.judged(
        CDC_LATENCY,
        f"{words} (at most {limit_ms:.0f} ms may be)" if measured else words,
        counts,
        passed=passed,
        offenders=map(asdict, slow),
        way_out=f"{_CHECK_CONSUMER}: lag, retries, connections. MongoDB's own latency and Debezium's are part of it.",
    )


def dead_letters_empty(letters: OpenLetters) -> Finding:
    """Check that no dead letter is open."""
    kinds = letters.kinds
    count = kinds.total()
    by_kind = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
    return Finding.judged(
        DEAD_LETTERS_EMPTY,
        f"{count} dead letters: {by_kind}" if count else "no dead letter",
        {"dead_letters": count, **{f"kind {kind}": number for kind, number in sorted(kinds.items())}},
        passed=count == 0,
        offenders=[
            {
                "id": letter.id,
                "user_id": letter.user,
                "kind": letter.kind,
                "text": letter.text,
                "failed_at": letter.failed_at,
            }
            for letter in letters.oldest
        ],
        way_out="Look at them (ghsync dlq list, ghsync dlq show ID) and fix the cause. Then ghsync cdc repair "
        "--dead-letters; "
        "those that name no user: ghsync dlq close.",
    )


def source_settings(source: Source, statements: Statements | None) -> Finding:
    """Check that Debezium can follow the table, and that the server logs each of its changes as a whole row.

    A mere risk is reported, and the check passes.

    Args:
        source: The server's settings and the table's shape.
        statements: The statements in Connect's log; None where the log can't be read here.
    """
    problems = problems_of(source, statements)
    unread = "" if statements is not None else "; Connect's log can't be read here, so no statement is looked for"
    wrong = [problem.text for problem in problems if problem.effect is not Effect.RISKS]
    risks = [f"a risk: {problem.text}" for problem in problems if problem.effect is Effect.RISKS]
    good = f"{source.name} can be followed, and {source.version} logs whole rows"
    return Finding(
        SOURCE_SETTINGS,
        not wrong,
        f"{'; '.join([*(wrong or [good]), *risks])}{unread}",
        {"problems": len(problems), **({"statements": statements.of_table} if statements is not None else {})},
        [
            {"problem": problem.name, "effect": problem.effect.value, "text": problem.text, "way_out": problem.way_out}
            for problem in problems[:OFFENDERS]
        ],
        " ".join(problem.way_out for problem in problems),
    )


def no_source(why: str, *, passed: bool) -> Finding:
    """Return the finding of a deployment whose source can't be read.

    Args:
        why: What it lacks, in words.
        passed: Whether that is no fault, as no changes reach it.
    """
    way_out = "" if passed else "Set MYSQL_URL to an account that may read the table."
    return Finding(SOURCE_SETTINGS, passed, f"not read: {why}", {"problems": 0}, way_out=way_out)


def loses_changes(source: Finding) -> bool:
    """Return whether the connector can't run or changes are lost, and not only at risk."""
    lesser = (Effect.UNTOLD.value, Effect.RISKS.value)
    return any(offender["effect"] not in lesser for offender in source.offenders)


def causes_in(source: Finding | None) -> list[str]:
    """Return the faults of the source as likely causes of differences, a sentence each.

    Risks are left out, except an engine that makes repairs unsound too.
    """
    return [
        f"Likely cause: {problem['text']}. {problem['way_out']}"
        for problem in (source.offenders if source is not None else [])
        if problem["effect"] != Effect.RISKS.value or problem["problem"] == OTHER_ENGINE
    ]


def connector_running(report: ConnectorReport | None, still_seconds: float, *, limit_seconds: float) -> Finding:
    """Check that the connector runs, and that its offset moves while the database writes.

    A worker that does not answer fails the check, as its connector is not known to run.

    Args:
        report: The connector's state and offset; None where no worker is known.
        still_seconds: How long its offset has stood still while the database wrote.
        limit_seconds: For how long that is allowed.
    """
    if report is None:
        return Finding(CONNECTOR_RUNNING, passed=True, summary=NOT_ASKED)
    state = report.state
    counts: dict[str, int | float] = {"still_seconds": round(still_seconds, 1), "limit_seconds": limit_seconds}
    if not state.is_running:
        return Finding(CONNECTOR_RUNNING, passed=False, summary=state.words(), counts=counts, way_out=state.way_out())
    if still_seconds > limit_seconds:
        return Finding(
            CONNECTOR_RUNNING,
            passed=False,
            summary=f"the connector {CONNECTOR} is RUNNING, but its offset has stood still for {still_seconds:.0f} s "
            f"while MySQL writes (at most {limit_seconds:.0f} s may pass)",
            counts=counts,
            way_out="Read the worker's log. A worker whose offset.flush.interval.ms is longer needs a higher "
            "GHSYNC_CONNECTOR_STILL_SECONDS.",
        )
    unknown = f"; whether its offset moves was not checked: {report.blind}" if report.blind else ""
    return Finding(
        CONNECTOR_RUNNING, passed=True, summary=f"the connector {CONNECTOR} is RUNNING{unknown}", counts=counts
    )


def nothing_to_compare(why: str, way_out: str = "") -> Finding:
    """Return the finding of a deployment without changes, or of a load whose stream is unavailable: it passes.

    Args:
        why: What is missing, in words.
        way_out: How to have both sides compared.
    """
    return Finding(IN_STEP_WITH_MYSQL, passed=True, summary=f"not compared: {why}", counts={"rows": 0}, way_out=way_out)


def nothing_to_compare_with(why: str) -> Finding:
    """Return the finding of a deployment that changes reach, but whose table can't be read.

    Args:
        why: What it lacks, in words.
    """
    return Finding(
        IN_STEP_WITH_MYSQL,
        passed=False,
        summary=f"not compared: {why}",
        counts={"rows": 0},
        way_out="Set MYSQL_URL to an account that may read the table.",
    )


def in_step_with_mysql(result: AuditResult, waiting: int, known: Circumstances | None = None) -> Finding:
    """Check that the collection is in sync with MySQL's table.

    Args:
        result: The audit's result.
        waiting: Records that still waited for the group when the audit began.
        known: What else may explain differences.
    """
    known = known or Circumstances()
    late = f"; {waiting} changes were still waiting for the consumer" if waiting else ""
    return Finding(
        IN_STEP_WITH_MYSQL,
        result.equal,
        f"{result.summary()}{late}",
        {
            "rows": result.rows,
            "documents": result.documents,
            "missing": result.missing,
            "extra": result.extra,
            "different": result.different,
            "shifted": result.shifted,
            "from_files": result.from_files,
            "not_named": result.total - len(result.offenders),
            "read_again": result.reread,
            "waiting": waiting,
            "seconds": result.seconds,
        },
        [asdict(offender) for offender in result.offenders],
        "" if result.equal else _way_out_of_differences(result, waiting, known),
    )


def _way_out_of_differences(result: AuditResult, waiting: int, known: Circumstances) -> str:
    if waiting and not known.connector:
        return f"{_CHECK_CONSUMER}; then run the check again."
    causes = " ".join(likely_causes(result, known))
    return f"{causes} Once the cause is gone: {CURE}; see docs/operate/runbook.md, in_step_with_mysql."
