"""Run the stack through its life and print what was seen; exit code 1 where anything is not as it has to be."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any, Final

from ghsync_dagster_tests.e2e.compose import (
    ROOT,
    RUN_LABEL,
    SERVERS,
    StackError,
    Ui,
    awaited,
    compose,
    container_of,
    inspect,
    is_healthy,
    run,
    run_containers,
    states,
)

if TYPE_CHECKING:
    from collections.abc import Callable

_KILLED: Final = (*SERVERS, "connector", "docker-filter", "code", "webserver", "daemon", "consumer", "proxy")
_HEALTHY_SECONDS: Final = 240.0
_RUNS: Final = 20
_SLICE: Final = {"ops": {"consume_changes": {"config": {"seconds": 600}}}}

# Goes on through the ends of MySQL: each of its histories has keys of its own, and ends where MySQL does.
_WORKLOAD: Final = """
import sys, threading, time
from pathlib import Path
from urllib.parse import quote
from ghsync_dagster.dev.workload import Workload
from ghsync_dagster.domain.errors import GhsyncError
from ghsync_dagster.stores.mysql import MySqlStore
from ghsync_dagster.stopping import stop_on_signals
password = quote(Path("/run/secrets/mysql-root-password").read_text(), safe="")
stop, sent = threading.Event(), 0
with stop_on_signals(stop):
    while not stop.is_set():
        try:
            with MySqlStore(f"mysql://root:{password}@mysql:3306/new_data") as table:
                workload = Workload(table, rate=float(sys.argv[1]))
                try:
                    workload.run(stop=stop)
                finally:
                    sent += workload.report().total
        except GhsyncError as error:
            print("workload:", error, flush=True)
            stop.wait(1)
print(sent, flush=True)
"""


class Report:
    """What was seen, and what was not as it has to be."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line with the seconds since the start."""
        print(f"[{time.monotonic() - self._began:6.1f} s] {text}", flush=True)  # noqa: T201

    def expect(self, what: str, *, holds: bool) -> None:
        """Print whether something holds, and remember where not."""
        self.say(f"{'ok  ' if holds else 'FAIL'} {what}")
        if not holds:
            self.failures.append(what)

    def stage(self, name: str, act: Callable[[], None]) -> None:
        """Carry out one stage; a failure of it is kept, and the next stage goes on."""
        self.say(f"== {name}")
        try:
            act()
        except (StackError, subprocess.TimeoutExpired, KeyError, IndexError) as error:
            self.expect(f"{name}: {error}", holds=False)


class EndToEnd:
    """One life of the stack.

    Args:
        report: Where it is told.
        rate: Changes a second while services are killed.
        killed: The services that are killed, in this order.
    """

    def __init__(self, report: Report, rate: float, killed: tuple[str, ...]) -> None:
        self._report = report
        self._rate = rate
        self._killed = killed
        self._ui: Ui | None = None

    @property
    def ui(self) -> Ui:
        """The UI's API, once the stack is up."""
        if self._ui is None:
            raise StackError("the stack is not up")
        return self._ui

    def up(self) -> None:
        """Build and start everything."""
        began = time.monotonic()
        compose("build", "--quiet")
        self._report.say(f"image built in {time.monotonic() - began:.0f} s")
        began = time.monotonic()
        compose("up", "--detach", "--wait", "--wait-timeout", "600")
        awaited("all healthy", _HEALTHY_SECONDS, is_healthy)
        self._report.say(f"all healthy after {time.monotonic() - began:.0f} s: {', '.join(sorted(states()))}")
        size = int(json.loads(run("docker", "image", "inspect", self._image()))[0]["Size"])
        self._report.say(f"image {size / 1e6:,.0f} MB")
        for line in run("docker", "stats", "--no-stream", "--format", "{{.Name}} {{.MemUsage}}").splitlines():
            self._report.say(f"memory {line}")
        password = compose(
            "run", "--rm", "-T", "--no-deps", "prepare", "ghsync", "stack", "secret", "ui-password", "--show"
        )
        port = int(compose("port", "proxy", "8080").strip().rpartition(":")[2])
        self._ui = Ui(port, password.strip())
        self._report.expect("nothing is shown without the login", holds=self.ui.refuses_strangers())

    def _image(self) -> str:
        return str(json.loads(compose("config", "--format", "json"))["services"]["code"]["image"])

    def batch(self) -> None:
        """Launch the batch job by the UI's API."""
        run_id = self.ui.launch("users_batch_job")
        awaited("the run's container", 60, lambda: container_of(run_id) is not None)
        container = inspect(str(container_of(run_id)))
        self._report.say(
            f"run {run_id}: container {container['Id'][:12]}, label {container['Config']['Labels'][RUN_LABEL]}"
        )
        self._report.expect(
            "the run's container has the stack's image", holds=container["Config"]["Image"] == self._image()
        )
        status = self.ui.finish(run_id)
        self._report.expect(f"the batch run ends with SUCCESS ({status})", holds=status == "SUCCESS")
        self._report.expect("its log is in the UI", holds="users" in self.ui.captured(run_id))
        again = self.ui.finish(self.ui.launch("users_batch_job"))
        self._report.expect(f"a second run changes nothing and ends with SUCCESS ({again})", holds=again == "SUCCESS")

    def many_runs(self) -> None:
        """Launch short runs, and see that none leaves a container."""
        runs = [self.ui.launch("users_audit_job") for _ in range(_RUNS)]
        ended = [self.ui.finish(one) for one in runs]
        self._report.expect(f"{_RUNS} audit runs end with SUCCESS: {set(ended)}", holds=set(ended) == {"SUCCESS"})
        seconds = awaited("no run container", 180, lambda: not run_containers(), every=2)
        self._report.expect(f"no container is left {seconds:.0f} s after the last of {_RUNS} runs", holds=True)

    def killed_run(self) -> None:
        """Kill a run's container."""
        run_id = self.ui.launch("cdc_sync_job", _SLICE)
        awaited("the run's start", 120, lambda: self.ui.status(run_id) == "STARTED")
        run("docker", "kill", str(container_of(run_id)))
        seconds = awaited("the killed run's end", 90, lambda: self.ui.status(run_id) == "FAILURE")
        words = [one for one in self.ui.messages(run_id) if "ontainer" in one or "xit" in one]
        self._report.expect(
            f"a killed run is FAILURE after {seconds:.0f} s: {words[-1:]}", holds=seconds < 60 and bool(words)
        )

    def cancelled_run(self) -> None:
        """Cancel a slice of the consumer."""
        run_id = self.ui.launch("cdc_sync_job", _SLICE)
        awaited("the run's start", 120, lambda: self.ui.status(run_id) == "STARTED")
        time.sleep(5)
        self.ui.terminate(run_id)
        seconds = awaited("the cancelled run's end", 120, lambda: self.ui.status(run_id) == "CANCELED")
        self._report.expect(f"a cancelled run is CANCELED after {seconds:.0f} s", holds=True)
        awaited("its container gone", 120, lambda: container_of(run_id) is None, every=2)

    def kills(self) -> None:
        """Kill each service under changes, and see that it comes back and nothing is lost."""
        workload = _workload(self._rate)
        try:
            for service in self._killed:
                self._kill(compose("ps", "--quiet", service).split()[0])
                began = time.monotonic()
                awaited(f"{service} is noticed", 30, lambda: not is_healthy(service), every=0.2)  # noqa: B023
                awaited(f"{service} healthy again", _HEALTHY_SECONDS, lambda: is_healthy(service))  # noqa: B023
                self._report.expect(f"{service} healthy {time.monotonic() - began:.0f} s after its kill", holds=True)
            awaited("all healthy", _HEALTHY_SECONDS, is_healthy)
        finally:
            sent = _end(workload)
        self._report.say(f"{sent} changes were committed meanwhile")
        self._report.expect("changes were committed", holds=sent > 0)
        self.audit()

    def _kill(self, container: str) -> None:
        """Kill a container's process from outside: docker kill counts as stopped by hand, and is not restarted."""
        pid = str(inspect(container)["State"]["Pid"])
        program = ("python", "-c", "import os, sys; os.kill(int(sys.argv[1]), 9)", pid)
        run(
            "docker",
            "run",
            "--rm",
            "--privileged",
            "--pid=host",
            "--user=0:0",
            "--network=none",
            self._image(),
            *program,
        )

    def audit(self) -> None:
        """Compare both sides, and look for dead letters."""
        found = compose("exec", "-T", "consumer", "ghsync", "cdc", "audit", "--json", check=False)
        document: dict[str, Any] = json.loads(found[found.index("{") : found.rindex("}") + 1])
        self._report.expect(f"audit: {document['summary']}", holds=bool(document["passed"]))
        letters = compose("exec", "-T", "consumer", "ghsync", "dlq", "list", "--json", check=False)
        self._report.expect(f"dead letters: {letters.strip()[-80:]}", holds=_no_letters(letters))

    def restore(self) -> None:
        """Back up by the documented commands, lose all volumes, restore, and compare."""
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="ghsync-backup-") as folder:
            run("sh", str(ROOT / "deploy/backup.sh"), folder)
            self._report.say(f"backed up in {time.monotonic() - began:.0f} s")
            compose("down", "--volumes")
            began = time.monotonic()
            run("sh", str(ROOT / "deploy/restore.sh"), folder)
            compose("up", "--detach", "--wait", "--wait-timeout", "600")
            awaited("all healthy", _HEALTHY_SECONDS, is_healthy)
        self._report.say(f"restored and healthy in {(time.monotonic() - began) / 60:.1f} minutes")
        self.audit()

    def down(self) -> None:
        """Remove everything, a run at work too."""
        # Where an earlier stage has left no UI, there is no run to end.
        with contextlib.suppress(StackError):
            run_id = self.ui.launch("cdc_sync_job", _SLICE)
            awaited("the run's container", 60, lambda: container_of(run_id) is not None)
        compose("down", "--volumes")
        left = [
            *run_containers(),
            *run("docker", "ps", "--all", "--quiet", "--filter", "label=com.docker.compose.project=ghsync").split(),
            *run("docker", "volume", "ls", "--quiet", "--filter", "label=com.docker.compose.project=ghsync").split(),
            *run("docker", "network", "ls", "--quiet", "--filter", "label=com.docker.compose.project=ghsync").split(),
        ]
        self._report.expect(f"nothing is left after down: {left}", holds=not left)


def _no_letters(text: str) -> bool:
    try:
        return not json.loads(text)
    except ValueError:
        return False


def _workload(rate: float) -> subprocess.Popen[str]:
    command = ("docker", "compose", "run", "--rm", "-T", "--no-deps", "--name", "ghsync-workload", "setup")
    return subprocess.Popen(
        [*command, "python", "-c", _WORKLOAD, str(rate)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def _end(workload: subprocess.Popen[str]) -> int:
    """End the workload; return how many changes it committed."""
    run("docker", "stop", "--time", "30", "ghsync-workload", check=False)
    output, _ = workload.communicate(timeout=60)
    return int(output.split()[-1]) if output.split() and output.split()[-1].isdecimal() else 0


def main() -> int:
    """Run the stages; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ghsync_dagster_tests.e2e", description=__doc__)
    parser.add_argument("--rate", type=float, default=300, help="changes a second while services are killed")
    parser.add_argument("--kill", nargs="*", default=_KILLED, help="services to kill, in this order")
    parser.add_argument("--stages", nargs="*", help="only these stages, after up and before down")
    parser.add_argument("--keep", action="store_true", help="leave the stack up")
    given = parser.parse_args()
    report = Report()
    life = EndToEnd(report, given.rate, tuple(given.kill))
    digests = run("docker", "image", "inspect", "--format", "{{len .RepoDigests}}", *_images()).split()
    if "0" in digests:
        report.say(
            f"{digests.count('0')} of {len(digests)} images are local builds, none published: this shows the wiring"
        )
    report.stage("up", life.up)
    if not report.failures:
        stages = {
            "batch": life.batch,
            "many_runs": life.many_runs,
            "killed_run": life.killed_run,
            "cancelled_run": life.cancelled_run,
            "kills": life.kills,
            "restore": life.restore,
        }
        for name, act in stages.items():
            if given.stages is None or name in given.stages:
                report.stage(name, act)
    if not given.keep:
        report.stage("down", life.down)
    report.say(f"{len(report.failures)} failures" if report.failures else "passed")
    return 1 if report.failures else 0


def _images() -> list[str]:
    services = json.loads(compose("config", "--format", "json"))["services"].values()
    ours = {service["image"] for service in services if "build" in service}
    return sorted({service["image"] for service in services} - ours)


if __name__ == "__main__":
    sys.exit(main())
