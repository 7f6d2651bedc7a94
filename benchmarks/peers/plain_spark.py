"""The batch load as a data engineer writes it first: one Spark script, the connector's defaults, every step in order.

Belongs here: what such a script does, done well. Not here: anything of ghsync, tuning, or a guarantee that ghsync adds.

The steps: read the events with an explicit schema, flatten the actor, write ALL rows with the marker, read back what
carries the marker, ``exceptAll``, write what is missing, count, remove the marker. ``user_id`` has its unique index, so
the connector writes by ``user_id`` (``operationType=replace``): an insert of repeated users would fail on the index.
Since ``exceptAll`` counts repeats, the surplus rows of a user count as missing and are written once more.

Usage: ``MONGODB_URI=... MONGODB_DATABASE=... python plain_spark.py EVENTS CONNECTOR_JAR``, prints one JSON line.
"""

from __future__ import annotations

import json
import os
import sys
import time

from pymongo import MongoClient
from pyspark.sql import SparkSession
from pyspark.sql.functions import col, lit
from pyspark.sql.types import LongType, StringType, StructField, StructType

COLLECTION = "Users"
EVENT = StructType(
    [
        StructField("id", StringType()),
        StructField("type", StringType()),
        StructField(
            "actor",
            StructType(
                [
                    StructField("id", LongType()),
                    StructField("login", StringType()),
                    StructField("gravatar_id", StringType()),
                    StructField("url", StringType()),
                    StructField("avatar_url", StringType()),
                ]
            ),
        ),
        StructField(
            "repo",
            StructType(
                [StructField("id", LongType()), StructField("name", StringType()), StructField("url", StringType())]
            ),
        ),
        StructField("created_at", StringType()),
    ]
)


def main(events: str, jar: str, uri: str, database: str) -> dict[str, object]:
    """Load ``events`` and return the seconds of each phase and the counts."""
    phases: dict[str, float] = {}
    started = time.perf_counter()

    def done(phase: str) -> None:
        nonlocal started
        now = time.perf_counter()
        phases[phase] = round(now - started, 3)
        started = now

    spark = (
        SparkSession.builder.appName("users")
        .master("local[*]")
        .config("spark.jars", jar)
        .config("spark.mongodb.read.connection.uri", uri)
        .config("spark.mongodb.read.database", database)
        .config("spark.mongodb.read.collection", COLLECTION)
        .config("spark.mongodb.write.connection.uri", uri)
        .config("spark.mongodb.write.database", database)
        .config("spark.mongodb.write.collection", COLLECTION)
        .getOrCreate()
    )
    done("jvm_start")

    users = (
        spark.read.schema(EVENT)
        .json(events)
        .select(
            col("actor.id").cast("string").alias("user_id"),
            col("actor.login").alias("login"),
            col("actor.gravatar_id").alias("gravatar_id"),
            col("actor.avatar_url").alias("avatar_url"),
            col("actor.url").alias("url"),
            lit("spark_write").alias("spark_temp"),
        )
        .cache()
    )
    rows = users.count()
    done("read")

    with MongoClient[dict[str, object]](uri) as client:
        client[database][COLLECTION].create_index("user_id", unique=True)
    done("index")

    by_user = {"operationType": "replace", "idFieldList": "user_id"}
    users.write.format("mongodb").mode("append").options(**by_user).save()
    done("write")

    stored = (
        spark.read.format("mongodb")
        .schema(users.schema)
        .load()
        .where(col("spark_temp") == "spark_write")
        .select(users.columns)
    )
    missing = users.exceptAll(stored)
    missing_rows = missing.count()
    done("compare")

    if missing_rows:
        missing.write.format("mongodb").mode("append").options(**by_user).save()
    done("write_missing")

    with MongoClient[dict[str, object]](uri) as client:
        collection = client[database][COLLECTION]
        written = collection.count_documents({"spark_temp": "spark_write"})
        done("count")
        collection.update_many({"spark_temp": "spark_write"}, {"$unset": {"spark_temp": ""}})
        done("unset")

    spark.stop()
    done("jvm_stop")
    return {"phases": phases, "events": rows, "written": written, "missing": missing_rows}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], os.environ["MONGODB_URI"], os.environ["MONGODB_DATABASE"])))
