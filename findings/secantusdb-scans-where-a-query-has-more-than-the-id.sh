#!/usr/bin/env bash
# SecantusDB 0.6.0b17: a query of _id alone uses the index on _id; with any second condition beside it, its time
# grows with the collection and with the list of ids, as if every document were compared with every id.
#
# Behaviour: among 20,000 documents, find({_id: {$in: [200 ids]}}) takes milliseconds. The same query with one more
# field ({_id: {$in: [...]}, state: "open"}) takes many times longer than even a scan by the field alone. MongoDB
# fetches by _id and filters those few. So a guard beside _id ("update it only if ...") is dear here; the same guard
# written into the update ($set: {x: {$cond: ...}}) is not.
#
# Seen on 2026-11-30 (the median of 3, in times a query of _id alone):
#   find by _id and a field: 27, by the field alone: 2.5
#   update_many by _id and a field, against by _id: 19
#
# Needs python3 (3.11 or newer). Exit code 1 where the behaviour has changed.
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
"$work/venv/bin/pip" install --quiet --disable-pip-version-check secantusdb==0.6.0b17 pymongo==4.20.0
port=$("$work/venv/bin/python" -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
touch "$work/empty.toml"
"$work/venv/bin/secantusd-rs" --config "$work/empty.toml" --host 127.0.0.1 --port "$port" --storage-path "$work/data" \
  --standalone >"$work/log" 2>&1 &
server=$!

"$work/venv/bin/python" - "$port" <<'PYTHON'
import statistics
import sys
import time

from pymongo import MongoClient

people = MongoClient("127.0.0.1", int(sys.argv[1]), serverSelectionTimeoutMS=60_000)["d"]["people"]
people.insert_many([{"_id": str(number), "state": "open", "n": 0} for number in range(20_000)])
ids = [str(number) for number in range(0, 20_000, 100)]
by_id = {"_id": {"$in": ids}}
by_both = by_id | {"state": "open"}

def median(act):
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)

assert len(list(people.find(by_id))) == len(list(people.find(by_both))) == 200
by_id_seconds = median(lambda: list(people.find(by_id)))
both, field = (median(lambda query=query: list(people.find(query))) / by_id_seconds for query in (by_both, {"state": "shut"}))
written, written_both = (
    median(lambda query=query: people.update_many(query, {"$inc": {"n": 1}})) for query in (by_id, by_both)
)
print(f"find by _id and a field: {both:.0f}, by the field alone: {field:.1f}")
print(f"update_many by _id and a field, against by _id: {written_both / written:.0f}")
sys.exit(not (both > 10 and both > 3 * field and written_both > 5 * written))
PYTHON
