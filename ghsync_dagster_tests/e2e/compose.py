"""The stack as a person drives it: ``docker compose`` and the UI's API behind the login.

Not here: what is tried, and what is expected.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx

ROOT: Final = Path(__file__).resolve().parents[2]
RUN_LABEL: Final = "dagster/run_id"
ENDED: Final = ("SUCCESS", "FAILURE", "CANCELED")
# Services that do their work once and end.
ONCE: Final = ("prepare", "setup")
SERVERS: Final = ("mysql", "kafka", "connect", "mongo", "postgres")
_LOCATION: Final = {"repositoryLocationName": "ghsync_dagster.definitions", "repositoryName": "__repository__"}
_COMMAND_SECONDS: Final = 1200

_LAUNCH: Final = """mutation($params: ExecutionParams!) { launchRun(executionParams: $params) {
  __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message }
  ... on RunConfigValidationInvalid { errors { message } } } }"""
_STATUS: Final = """query($run: ID!) { runOrError(runId: $run) { ... on Run { status
  stepStats { stepKey status } } } }"""
_LOGS: Final = """query($run: ID!) { logsForRun(runId: $run) { ... on EventConnection { events {
  __typename ... on MessageEvent { message eventType }
  ... on LogsCapturedEvent { fileKey } } } } }"""
_CAPTURED: Final = """query($key: [String!]!) { capturedLogs(logKey: $key) { stderr stdout } }"""
_TERMINATE: Final = """mutation($run: String!) { terminateRun(runId: $run) { __typename
  ... on TerminateRunFailure { message } } }"""


class StackError(Exception):
    """The stack did not do what it has to."""


def run(*command: str, check: bool = True, given: str | None = None, environment: dict[str, str] | None = None) -> str:
    """Run a command in the project's folder; return what it printed.

    Raises:
        StackError: It failed.
    """
    done = subprocess.run(
        command,
        cwd=ROOT,
        input=given,
        capture_output=True,
        text=True,
        check=False,
        timeout=_COMMAND_SECONDS,
        env=os.environ | (environment or {}),
    )
    if check and done.returncode:
        raise StackError(f"{' '.join(command)} ended with {done.returncode}: {(done.stderr or done.stdout)[-2000:]}")
    return done.stdout


def compose(*words: str, check: bool = True, given: str | None = None, **environment: str) -> str:
    """Run ``docker compose``."""
    return run("docker", "compose", *words, check=check, given=given, environment=environment)


def awaited(what: str, seconds: float, condition: Any, every: float = 0.5) -> float:
    """Wait until a condition holds; return the seconds that it took.

    Raises:
        StackError: It did not hold in time.
    """
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise StackError(f"{what}: not within {seconds:.0f} s")
        time.sleep(every)
    return time.monotonic() - began


def states() -> dict[str, str]:
    """Return how each long-lived service is, by its containers: ``healthy``, ``starting``, ``exited`` and so on."""
    lines = compose("ps", "--all", "--format", "json").splitlines()
    found: dict[str, list[str]] = {}
    for container in map(json.loads, lines):
        if container["Service"] not in ONCE:
            found.setdefault(container["Service"], []).append(container["Health"] or container["State"])
    return {service: next((one for one in all_of if one != "healthy"), "healthy") for service, all_of in found.items()}


def is_healthy(*services: str) -> bool:
    """Return whether these services are healthy, or all."""
    found = states()
    return bool(found) and all(found.get(service) == "healthy" for service in services or found)


def run_containers() -> list[str]:
    """Return the ids of all run containers, ended ones too."""
    return run("docker", "ps", "--all", "--quiet", "--no-trunc", "--filter", f"label={RUN_LABEL}").split()


def inspect(container: str) -> dict[str, Any]:
    """Return what Docker knows of a container."""
    [found] = json.loads(run("docker", "inspect", container))
    return dict(found)


def container_of(run_id: str) -> str | None:
    """Return the container of a run; None where it has none."""
    return next(iter(run("docker", "ps", "--all", "--quiet", "--filter", f"label={RUN_LABEL}={run_id}").split()), None)


@dataclass
class Ui:
    """The UI's API behind the proxy.

    Attributes:
        port: Where the proxy listens on loopback.
        password: Of the user ``admin``.
    """

    port: int
    password: str
    _client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        """Open the client."""
        self._client = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", auth=("admin", self.password), timeout=60, trust_env=False
        )

    def ask(self, query: str, **variables: object) -> dict[str, Any]:
        """Ask GraphQL; return its data, while the webserver comes back ask again."""
        for _ in range(60):
            try:
                answer = self._client.post("/graphql", json={"query": query, "variables": variables})
            except httpx.HTTPError:
                time.sleep(1)
                continue
            if answer.status_code == httpx.codes.OK:
                return dict(answer.json()["data"])
            time.sleep(1)
        raise StackError("the UI does not answer")

    def refuses_strangers(self) -> bool:
        """Return whether nothing is shown without the login."""
        return httpx.get(f"http://127.0.0.1:{self.port}/server_info", trust_env=False).status_code == 401

    def launch(self, job: str, config: dict[str, Any] | None = None) -> str:
        """Launch a job; return its run."""
        params = {"selector": {**_LOCATION, "jobName": job}, "runConfigData": config or {}}
        found = self.ask(_LAUNCH, params=params)["launchRun"]
        if found["__typename"] != "LaunchRunSuccess":
            raise StackError(f"{job} was not launched: {found}")
        return str(found["run"]["runId"])

    def status(self, run_id: str) -> str:
        """Return a run's status."""
        return str(self.ask(_STATUS, run=run_id)["runOrError"]["status"])

    def finish(self, run_id: str, seconds: float = 600) -> str:
        """Wait until a run has ended; return its status."""
        awaited(f"the end of run {run_id}", seconds, lambda: self.status(run_id) in ENDED, every=1)
        return self.status(run_id)

    def messages(self, run_id: str) -> list[str]:
        """Return the messages of a run's events."""
        events = self.ask(_LOGS, run=run_id)["logsForRun"]["events"]
        return [str(event["message"]) for event in events if event.get("message")]

    def captured(self, run_id: str) -> str:
        """Return what the steps of a run printed, as the UI shows it."""
        events = self.ask(_LOGS, run=run_id)["logsForRun"]["events"]
        keys = {event["fileKey"] for event in events if event.get("fileKey")}
        found = [self.ask(_CAPTURED, key=[run_id, "compute_logs", key])["capturedLogs"] for key in sorted(keys)]
        return "".join(f"{one['stdout'] or ''}{one['stderr'] or ''}" for one in found)

    def terminate(self, run_id: str) -> None:
        """Cancel a run."""
        found = self.ask(_TERMINATE, run=run_id)["terminateRun"]
        if "Success" not in found["__typename"]:
            raise StackError(f"run {run_id} could not be cancelled: {found}")
