#!/usr/bin/env bash
# Dagster 1.13.27: a job that runs by execute_in_process(raise_on_error=False) takes SIGTERM and Ctrl-C for a step's
# failure. The call returns as after any failed step, and the process goes on.
#
# Behaviour: raise_on_error=False is meant for a step's own errors. But a signal that comes while a step runs becomes
# one of them: the run is FAILURE and not CANCELED, no KeyboardInterrupt and no SystemExit reaches the caller, and
# the program's own handler of SIGTERM is not called, as Dagster's stands in its place meanwhile. So a script that
# is asked to stop goes on with its next line, and may end with exit code 0. Only the class of the step's error
# (DagsterExecutionInterruptedError) tells, and it is the same for both signals.
#
# Seen on 2026-11-30:
#   SIGTERM: returned; success False, status FAILURE, step error DagsterExecutionInterruptedError; own handler called 0 times; exit code 0
#   SIGINT: returned; success False, status FAILURE, step error DagsterExecutionInterruptedError; own handler called 0 times; exit code 0
#
# Needs python3 (3.11 or newer). Exit code 1 where the behaviour has changed.
set -euo pipefail
trap 'echo "failed in line $LINENO" >&2' ERR

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check dagster==1.13.27
cat >"$work/job.py" <<'PYTHON'
import os
import signal
import sys
import threading
import time

import dagster as dg

number = getattr(signal, sys.argv[1])
called = []
signal.signal(number, lambda *_: called.append(number))


@dg.op
def asks_to_stop():
    threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
    time.sleep(30)


@dg.job
def job():
    asks_to_stop()


quiet = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
with dg.DagsterInstance.ephemeral() as instance:
    result = job.execute_in_process(instance=instance, raise_on_error=False, run_config=quiet)
    status = instance.get_run_by_id(result.run_id).status.value
error = result.failure_data_for_node("asks_to_stop").error.cls_name
print(
    f"returned; success {result.success}, status {status}, step error {error}; "
    f"own handler called {len(called)} times"
)
PYTHON

changed=0
for name in SIGTERM SIGINT; do
  code=0
  said=$(timeout 60 "$work/venv/bin/python" "$work/job.py" "$name" 2>"$work/log") || code=$?
  echo "$name: $said; exit code $code"
  expected="returned; success False, status FAILURE, step error DagsterExecutionInterruptedError; own handler called 0 times"
  if [ "$said" != "$expected" ] || [ "$code" -ne 0 ]; then cat "$work/log" >&2; changed=1; fi
done
if [ "$changed" -ne 0 ]; then echo "the behaviour has changed"; exit 1; fi
