#!/usr/bin/env bash
# MongoDB Spark Connector 10.5.0: a number that does not fit the schema's type becomes another number, silently.
#
# Behaviour: where the schema says INT, SMALLINT or LONG, a larger whole number loses its upper bits, so that 2 to the
# power of 40 is read as 0, and a fraction is cut off; a double beyond the range becomes the largest number. No error,
# no null and no warning comes, also with spark.sql.ansi.enabled, under which Spark's own cast of the same values fails.
# Other kinds of values (a boolean, a text) do raise an error.
#
# Seen on 2026-11-30 (stored | type of the schema | read):
#   1099511627776 | int | 0
#   4294967301 | int | 5
#   70000 | smallint | 4464
#   5.7 | int | 5
#   1e+20 | bigint | 9223372036854775807
#   True | int | error
#   Spark's own cast of 1099511627776 to int: error
#
# Needs python3 (3.11 or newer) and Java 17 or newer. Exit code 1 where the behaviour has changed.
set -euo pipefail
trap 'echo "failed in line $LINENO" >&2' ERR

work=$(mktemp -d)
server=""
cleanup() {
  if [ -n "$server" ]; then kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; fi
  rm -rf "$work"
}
trap cleanup EXIT

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  pyspark==4.3.0 pymongo==4.20.0 jgo==3.2.0 secantusdb==0.6.0b17
jar=$("$work/venv/bin/python" - "$work/m2" <<'PYTHON'
import sys

from jgo.maven import MavenContext, PythonResolver

connector = MavenContext(repo_cache=sys.argv[1], resolver=PythonResolver()).project(
    "org.mongodb.spark", "mongo-spark-connector_2.13"
)
print(connector.at_version("10.5.0").artifact(classifier="all", packaging="jar").resolve())
PYTHON
)
port=$("$work/venv/bin/python" -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
touch "$work/empty.toml"
"$work/venv/bin/secantusd-rs" --config "$work/empty.toml" --host 127.0.0.1 --port "$port" --storage-path "$work/data" \
  --standalone >"$work/log" 2>&1 &
server=$!

cd "$work"
SPARK_LOCAL_IP=127.0.0.1 PYSPARK_PYTHON="$work/venv/bin/python" "$work/venv/bin/python" - "$port" "$jar" 2>"$work/spark.log" <<'PYTHON' || {
import sys

from pymongo import MongoClient
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

uri = f"mongodb://127.0.0.1:{sys.argv[1]}"
database = MongoClient(uri, serverSelectionTimeoutMS=60_000)["d"]
spark = (
    SparkSession.builder.master("local[1]")
    .config("spark.jars", sys.argv[2])
    .config("spark.ui.enabled", False)
    .config("spark.mongodb.read.connection.uri", uri)
    .getOrCreate()
)
spark.sparkContext.setLogLevel("OFF")


def read(stored, kind):
    database["numbers"].drop()
    database["numbers"].insert_one({"_id": 1, "n": stored})
    schema = f"_id int, n {kind}"
    frame = spark.read.format("mongodb").options(database="d", collection="numbers").schema(schema).load()
    try:
        return frame.collect()[0]["n"]
    except Exception:
        return "error"


assert spark.conf.get("spark.sql.ansi.enabled") == "true"
behaves = True
for stored, kind, expected in (
    (2**40, "int", 0),
    (2**32 + 5, "int", 5),
    (70_000, "smallint", 70_000 - 2**16),
    (5.7, "int", 5),
    (1e20, "bigint", 2**63 - 1),
    (True, "int", "error"),
):
    found = read(stored, kind)
    print(stored, kind, found, sep=" | ")
    behaves = behaves and found == expected
try:
    cast = spark.range(1).select(F.lit(2**40).cast("int")).collect()[0][0]
except Exception:
    cast = "error"
print(f"Spark's own cast of {2**40} to int: {cast}")
spark.stop()
if not behaves or cast != "error":
    print("the behaviour has changed")
    sys.exit(1)
PYTHON
  code=$?
  tail -5 "$work/spark.log" >&2
  exit "$code"
}
