"""The Docker filter: what a run may ask for passes, each other thing is refused, and ended containers go."""

from __future__ import annotations

import asyncio
import json
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from ghsync_dagster.deploy.docker_filter import RUN_LABEL, Allowed, DockerFilter

if TYPE_CHECKING:
    from collections.abc import Callable

IMAGE = "ghsync:local"
ALLOWED = Allowed(IMAGE, "ghsync_stack", {"ghsync_home": "rw", "ghsync_events": "ro"}, 3 << 30, 512, keep_seconds=60)
# As docker-py writes it for DockerRunLauncher.
CREATE: dict[str, Any] = {
    "Hostname": None,
    "Domainname": None,
    "ExposedPorts": None,
    "User": None,
    "Tty": False,
    "OpenStdin": False,
    "StdinOnce": False,
    "AttachStdin": False,
    "AttachStdout": False,
    "AttachStderr": False,
    "Env": ["DAGSTER_RUN_JOB_NAME=users_batch_job"],
    "Cmd": ["dagster", "api", "execute_run", "{}"],
    "Image": IMAGE,
    "Volumes": {"/var/lib/ghsync": {}, "/events": {}},
    "NetworkDisabled": False,
    "Entrypoint": None,
    "WorkingDir": None,
    "HostConfig": {
        "NetworkMode": "ghsync_stack",
        "Memory": 3 << 30,
        "ReadonlyRootfs": True,
        "Binds": ["ghsync_home:/var/lib/ghsync:rw", "ghsync_events:/events:ro"],
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges"],
        "Tmpfs": {"/tmp": "mode=1777"},
        "PidsLimit": 512,
        "Init": True,
    },
    "NetworkingConfig": {"ghsync_stack": None},
    "MacAddress": None,
    "Labels": {RUN_LABEL: "1234", "dagster/job_name": "users_batch_job"},
    "StopSignal": None,
    "Healthcheck": None,
    "StopTimeout": 90,
    "Runtime": None,
}


class Engine:
    """A Docker engine of containers in memory."""

    def __init__(self) -> None:
        self.containers: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []
        self.bodies: list[bytes] = []

    def add(self, name: str, *, image: str = IMAGE, run: str | None = "1234", finished: str = "") -> None:
        """Have a container, ended where a time is given."""
        self.containers[name] = {
            "Id": name,
            "Created": "2026-11-30T11:00:00.000000000Z",
            "Config": {"Image": image, "Labels": {RUN_LABEL: run} if run else {}},
            "State": {
                "Status": "exited" if finished else "running",
                "FinishedAt": finished or "0001-01-01T00:00:00Z",
                "ExitCode": 137,
            },
        }

    def __call__(self, request: httpx.Request) -> httpx.Response:
        """Answer as an engine does."""
        self.asked.append(f"{request.method} {request.url.path}")
        self.bodies.append(request.content)
        parts = request.url.path.strip("/").split("/")
        if parts[0].startswith("v1"):
            parts = parts[1:]
        if parts[:2] == ["containers", "json"]:
            wanted = json.loads(request.url.params["filters"])["status"]
            return httpx.Response(
                200, json=[{"Id": n} for n, one in self.containers.items() if one["State"]["Status"] in wanted]
            )
        if parts[0] != "containers" or parts[1] == "create":
            return httpx.Response(201 if parts[-1] == "create" else 200, json={"Id": "new"})
        if parts[1] not in self.containers:
            return httpx.Response(404, json={"message": "no such container"})
        if request.method == "DELETE":
            del self.containers[parts[1]]
            return httpx.Response(204)
        return httpx.Response(200, json=self.containers[parts[1]])


class Client:
    """Asks a filter; no sweep runs meanwhile."""

    def __init__(self, docker: DockerFilter) -> None:
        self._transport = httpx.ASGITransport(docker.app())

    def request(self, method: str, path: str, **more: Any) -> httpx.Response:
        """Send one request."""

        async def asked() -> httpx.Response:
            async with httpx.AsyncClient(transport=self._transport, base_url="http://filter") as client:
                return await client.request(method, path, **more)

        return asyncio.run(asked())


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def docker(engine: Engine) -> DockerFilter:
    client = httpx.AsyncClient(transport=httpx.MockTransport(engine), base_url="http://docker")
    # 12:00 on the day of the containers.
    return DockerFilter(client, ALLOWED, clock=lambda: 1796040000.0)


@pytest.fixture
def client(docker: DockerFilter) -> Client:
    return Client(docker)


def changed(**more: object) -> dict[str, Any]:
    """Return a create request with other values; ``host_X`` is X of its HostConfig."""
    body = deepcopy(CREATE)
    for name, value in more.items():
        part = body["HostConfig"] if name.startswith("host_") else body
        part[name.removeprefix("host_")] = value
    return body


def test_a_run_container_may_be_made(client: Client, engine: Engine) -> None:
    assert client.request("POST", "/v1.45/containers/create?name=x", json=CREATE).status_code == 201
    assert engine.asked == ["POST /v1.45/containers/create"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (changed(Image="alpine"), "its image is alpine"),
        (changed(Labels={}), RUN_LABEL),
        (changed(User="0"), "User"),
        (changed(Entrypoint=["sh"]), "Entrypoint"),
        (changed(host_Privileged=True), "Privileged"),
        (changed(host_Devices=[{"PathOnHost": "/dev/kmsg"}]), "Devices"),
        (changed(host_PidMode="host"), "PidMode"),
        (changed(host_CapAdd=["SYS_ADMIN"]), "CapAdd"),
        (changed(host_CapDrop=[]), "capabilities"),
        (changed(host_SecurityOpt=["seccomp=unconfined"]), "security options"),
        (changed(host_ReadonlyRootfs=False), "ReadonlyRootfs"),
        (changed(host_Memory=0), "memory"),
        (changed(host_Memory=4 << 30), "memory"),
        (changed(host_PidsLimit=-1), "processes"),
        (changed(host_NetworkMode="host"), "its network is host"),
        (changed(NetworkingConfig={"ghsync_control": None}), "ghsync_control"),
        (changed(NetworkingConfig={"endpointsconfig": {"ghsync_control": {}}}), "NetworkingConfig"),
        (changed(host_Binds=["/:/host:rw"]), "it mounts /:/host:rw"),
        (changed(host_Binds=["ghsync_vault:/vault:ro"]), "ghsync_vault"),
        (changed(host_Binds=["ghsync_events:/events:rw"]), "ghsync_events:/events:rw"),
        (changed(host_Binds=["ghsync_home:/var/lib/ghsync"]), "ghsync_home:/var/lib/ghsync"),
        (changed(host_Mounts=[{"Type": "bind", "Source": "/", "Target": "/host"}]), "Mounts"),
        (changed(host_AutoRemove=True), "AutoRemove"),
        ({**CREATE, "HostConfig": {}}, "ReadonlyRootfs"),
        ({}, "Image"),
    ],
)
def test_a_container_that_asks_for_more_is_refused(
    client: Client, engine: Engine, body: dict[str, Any], says: str
) -> None:
    answer = client.request("POST", "/v1.45/containers/create", json=body)
    assert answer.status_code == 403
    assert says in answer.json()["message"]
    assert engine.asked == []


def test_the_engine_reads_what_was_checked(client: Client, engine: Engine) -> None:
    # Of a name that stands twice, readers take the first, the last or both.
    twice = json.dumps(CREATE)[:-1] + ', "User": null, "Image": "ghsync:local"}'
    twice = twice.replace('"User": null', '"User": "0"', 1)
    assert client.request("POST", "/containers/create", content=twice).status_code == 201
    assert json.loads(engine.bodies[-1]) == CREATE
    assert engine.bodies[-1].count(b'"User"') == engine.bodies[-1].count(b'"Image"') == 1


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/containers/json"),
        ("GET", "/v1.45/info"),
        ("POST", "/v1.45/images/create"),
        ("POST", "/v1.45/containers/1234/exec"),
        ("GET", "/v1.45/containers/1234/archive"),
        ("PUT", "/v1.45/containers/1234/archive"),
        ("POST", "/v1.45/containers/1234/update"),
        ("GET", "/v1.45/containers/1234/logs"),
        ("POST", "/v1.45/networks/ghsync_stack/connect"),
        ("POST", "/v1.45/volumes/create"),
        ("GET", "/v1.45/volumes"),
        ("POST", "/v1.45/build"),
        ("DELETE", "/v1.45/images/ghsync:local"),
    ],
)
def test_another_request_is_refused(client: Client, engine: Engine, method: str, path: str) -> None:
    assert client.request(method, path).status_code == 403
    assert engine.asked == []


def test_only_run_containers_are_started_inspected_stopped_and_removed(client: Client, engine: Engine) -> None:
    engine.add("run")
    engine.add("service", run=None)
    engine.add("other", image="alpine")
    for method, path in (("GET", "json"), ("POST", "start"), ("POST", "stop?t=90"), ("DELETE", "")):
        for name in ("service", "other"):
            assert client.request(method, f"/v1.45/containers/{name}/{path}".rstrip("/")).status_code == 403
        assert client.request(method, f"/v1.45/containers/run/{path}".rstrip("/")).status_code < 300
    assert sorted(engine.containers) == ["other", "service"]
    assert client.request("GET", "/v1.45/containers/gone/json").status_code == 404


def test_a_container_that_ended_is_removed_after_a_while(docker: DockerFilter, engine: Engine) -> None:
    engine.add("just", finished="2026-11-30T11:59:30.123456789Z")
    engine.add("long", finished="2026-11-30T11:58:30.5Z")
    engine.add("never", finished="")
    engine.containers["never"]["State"]["Status"] = "created"
    engine.add("at_work")
    engine.add("service", run=None, finished="2026-11-30T11:00:00Z")
    engine.containers["service"]["Config"]["Labels"] = None
    assert asyncio.run(docker.sweep()) == ["1234", "1234"]
    assert sorted(engine.containers) == ["at_work", "just", "service"]


def test_an_engine_that_is_away_is_an_answer() -> None:
    def away(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    client = httpx.AsyncClient(transport=httpx.MockTransport(away), base_url="http://docker")
    answer = Client(DockerFilter(client, ALLOWED)).request("GET", "/_ping")
    assert answer.status_code == 502
    assert "does not answer" in answer.json()["message"]


def test_sweeps_go_on_after_one_that_failed(docker: DockerFilter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ghsync_dagster.deploy.docker_filter._SWEEP_SECONDS", 0)
    sweeps: list[int] = []

    async def sweep() -> list[str]:
        sweeps.append(len(sweeps))
        if len(sweeps) < 3:
            raise RuntimeError("no request")
        raise asyncio.CancelledError

    monkeypatch.setattr(docker, "sweep", sweep)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(docker._sweep_on())
    assert sweeps == [0, 1, 2]


def test_requests_pass_with_their_query(engine: Engine) -> None:
    seen: list[str] = []
    before: Callable[[httpx.Request], httpx.Response] = engine.__call__
    engine.add("run")

    def spy(request: httpx.Request) -> httpx.Response:
        seen.append(str(request.url))
        return before(request)

    spied = httpx.AsyncClient(transport=httpx.MockTransport(spy), base_url="http://docker")
    Client(DockerFilter(spied, ALLOWED)).request("POST", "/v1.45/containers/run/stop?t=90")
    assert seen[-1] == "http://docker/v1.45/containers/run/stop?t=90"
