"""Flatten: the newest event of every user gives the user's fields.

Belongs here: how users result from events, and how they are checked by the rules. Not here: what the rules are.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ghsync_dagster.batch.reports import FlattenReport, count_rows
from ghsync_dagster.domain.finding import OFFENDERS
from ghsync_dagster.domain.user import USER_FIELDS
from ghsync_dagster.logging import get_logger
from ghsync_dagster.progress import log_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from pyspark.sql import Column, DataFrame, Row, SparkSession

    from ghsync_dagster.batch.reports import ReadReport
    from ghsync_dagster.domain.user import Rule

_EVENTS_PER_PARTITION = 500_000
log = get_logger("flatten")


def flatten_users(spark: Callable[[], SparkSession], read: ReadReport, target: Path) -> FlattenReport:
    """Write the newest state of every user in the events to ``target``.

    The newest event is the one with the latest ``created_at``, and among these the highest id. Where events of the same
    time and id differ, the fields themselves decide, so that the order of files never does.
    """
    from pyspark.sql import functions as F  # noqa: N812

    from ghsync_dagster.stores.spark import EVENT_SCHEMA, VERSIONED_USER_SCHEMA, spark_errors

    started = time.monotonic()
    session = spark()
    partitions = max(session.sparkContext.defaultParallelism, read.events // _EVENTS_PER_PARTITION)
    session.conf.set("spark.sql.shuffle.partitions", str(partitions))
    with log_progress("flattening"), spark_errors("Flattening users"):
        version = (F.col("created_at"), F.col("id").cast("long").alias("event_id"))
        fields = (F.col(f"actor.{name}") for name in USER_FIELDS[1:])
        newest = (
            session.read.schema(EVENT_SCHEMA)
            .parquet(read.events_path)
            .groupBy(F.col("actor.id").alias("key"))
            .agg(F.max(F.struct(*version, *fields)).alias("newest"))
        )
        users = newest.select(F.col("key").cast("string").alias("user_id"), "newest.*")
        users.select(*VERSIONED_USER_SCHEMA.fieldNames()).write.mode("overwrite").parquet(str(target))
    report = FlattenReport(str(target), count_rows(target), round(time.monotonic() - started, 3))
    log.info("flattened", users=report.users, seconds=report.seconds)
    return report


@dataclass(frozen=True, slots=True)
class UsersValidity:
    """The flattened users, checked by the rules.

    Attributes:
        users: How many users there are.
        broken: How many users break a rule, by rule name, only if more than 0.
        repeated: Users beyond the first with the same ``user_id``.
        schema_problem: A description, or None.
        offenders: Up to ``OFFENDERS`` users that break something.
    """

    users: int
    broken: dict[str, int]
    repeated: int
    schema_problem: str | None
    offenders: list[dict[str, Any]]

    @property
    def valid(self) -> bool:
        """Whether nothing is broken."""
        return not (self.broken or self.repeated or self.schema_problem)


def check_users(spark: Callable[[], SparkSession], users_path: str, rules: Sequence[Rule]) -> UsersValidity:
    """Check the flattened users by the schema and the rules, and for one row a user."""
    from pyspark.sql import functions as F  # noqa: N812

    from ghsync_dagster.stores.spark import VERSIONED_USER_SCHEMA, spark_errors

    with spark_errors("Checking users"):
        users = spark().read.parquet(users_path)
        wanted = [(field.name, field.dataType) for field in VERSIONED_USER_SCHEMA.fields]
        found = [(field.name, field.dataType) for field in users.schema.fields]
        if found != wanted:
            return UsersValidity(0, {}, 0, f"expected {_named(wanted)}, found {_named(found)}", [])
        broken = {rule.name: _broken(rule) for rule in rules}
        totals = users.agg(
            F.count("*").alias("users"),
            F.countDistinct("user_id").alias("distinct"),
            *(F.count_if(condition).alias(name) for name, condition in broken.items()),
        ).first()
        counts = totals.asDict() if totals else {}
        users_count, distinct = counts.pop("users"), counts.pop("distinct")
        violated = {name: count for name, count in counts.items() if count}
        repeated = users_count - distinct
        offenders = _offenders(users, [broken[name] for name in violated], repeated=bool(repeated))
    return UsersValidity(users_count, violated, repeated, None, offenders)


def _broken(rule: Rule) -> Column:
    from pyspark.sql import functions as F  # noqa: N812

    sql = rule.broken_sql()
    return F.expr(sql) if sql else F.udf(rule.is_broken_by, "boolean")(F.col(rule.field))


def _offenders(users: DataFrame, conditions: Sequence[Column], *, repeated: bool) -> list[dict[str, Any]]:
    from pyspark.sql import functions as F  # noqa: N812

    rows: list[Row] = []
    for condition in conditions:
        rows += users.where(condition).limit(OFFENDERS - len(rows)).collect() if len(rows) < OFFENDERS else []
    if repeated and len(rows) < OFFENDERS:
        rows += users.groupBy("user_id").agg(F.count("*").alias("rows")).where("rows > 1").limit(OFFENDERS).collect()
    return [row.asDict() for row in rows[:OFFENDERS]]


def _named(fields: Sequence[tuple[str, Any]]) -> str:
    return ", ".join(f"{name} {kind.simpleString()}" for name, kind in fields)
