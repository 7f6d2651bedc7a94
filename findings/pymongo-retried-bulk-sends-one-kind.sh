#!/usr/bin/env bash
# PyMongo 4.20.0: bulk_write with writes of several kinds sends only the first kind, and reports success, where the
# connection that it takes breaks before the first command.
#
# Behaviour: the pool's connection has been idle for longer than maxIdleTimeMS (a usual setting behind a load
# balancer), so that bulk_write opens a new one, and that one is closed before the handshake is done. The driver
# tries again by itself, as it should: nothing was sent yet. But of an insert, an update and a delete only the insert
# is sent. No exception comes, the result is acknowledged, has no error, and counts one insert. The same writes in
# one bulk of each kind are all done. So whoever has to be sure sends one kind a bulk, or compares the counts.
#
# Seen on 2026-11-30:
#   unordered: sent insert; in the collection: the inserted document; not updated, not deleted
#   ordered:   sent insert; in the collection: the inserted document; not updated, not deleted
#   one kind a bulk: sent insert update delete; all done
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
  >"$work/log" 2>&1 &
server=$!

"$work/venv/bin/python" - "$port" <<'PYTHON'
import socket
import sys
import threading
import time
from contextlib import suppress

from pymongo import DeleteOne, InsertOne, MongoClient, UpdateOne
from pymongo.monitoring import CommandListener


class Gate:
    """Passes connections on to the server, but closes as many of the next ones as it is told to."""

    def __init__(self, target):
        self.target, self.to_close, self.closed = target, 0, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            client, _ = self.listener.accept()
            if self.to_close:
                self.to_close -= 1
                self.closed += 1
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self.target))
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source, sink):
        with suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


class Sent(CommandListener):
    def __init__(self):
        self.names = []

    def started(self, event):
        if event.command_name in ("insert", "update", "delete"):
            self.names.append(event.command_name)

    def succeeded(self, event):
        pass

    def failed(self, event):
        pass


target = int(sys.argv[1])
gate = Gate(target)
people = MongoClient("127.0.0.1", target, directConnection=True, serverSelectionTimeoutMS=60_000)["d"]["people"]
WRITES = [InsertOne({"_id": "new"}), UpdateOne({"_id": "old"}, {"$set": {"n": 1}}), DeleteOne({"_id": "gone"})]


def tried(what, bulks, *, ordered):
    """Send bulks over a connection that breaks once; return what was sent and what is stored then."""
    people.drop()
    people.insert_many([{"_id": "old", "n": 0}, {"_id": "gone"}])
    sent = Sent()
    with MongoClient(
        "127.0.0.1", gate.port, directConnection=True, maxIdleTimeMS=200, event_listeners=[sent]
    ) as client:
        client.admin.command("ping")
        time.sleep(0.5)
        closed, gate.to_close = gate.closed, 1
        results = [client["d"]["people"].bulk_write(writes, ordered=ordered) for writes in bulks]
        assert gate.closed == closed + 1, "no connection was closed"
    assert all(result.acknowledged for result in results)
    changed = sum(result.inserted_count + result.modified_count + result.deleted_count for result in results)
    stored = {found["_id"]: found.get("n") for found in people.find()}
    print(f"{what}: sent {' '.join(sent.names)}; the results count {changed}; stored {stored}")
    return sent.names, changed, stored


LOST = (["insert"], 1, {"old": 0, "gone": None, "new": None})
DONE = (["insert", "update", "delete"], 3, {"old": 1, "new": None})
behaves = [
    tried("unordered", [WRITES], ordered=False) == LOST,
    tried("ordered", [WRITES], ordered=True) == LOST,
    tried("one kind a bulk", [[write] for write in WRITES], ordered=False) == DONE,
]
if not all(behaves):
    print("the behaviour has changed")
    sys.exit(1)
PYTHON
