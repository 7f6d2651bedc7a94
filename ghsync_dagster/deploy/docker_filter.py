"""The Docker API, filtered: run containers of one image, as strict as the stack's own, and nothing else.

Whoever may talk to Docker owns the host, so Dagster talks to this filter. It lets ``DockerRunLauncher`` create, start,
inspect, stop and remove run containers. It removes those that have ended, once Dagster had time to read why.

Belongs here: which requests pass. Not here: which runs there are, which Dagster decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Literal

import httpx
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.alias_generators import to_pascal
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ghsync_dagster.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path

    from starlette.requests import Request

RUN_LABEL: Final = "dagster/run_id"
"""DockerRunLauncher labels each container with its run."""

_ANSWER_SECONDS: Final = 120.0
"""A stop waits until the container has ended, which its stop time-out limits."""
_SWEEP_SECONDS: Final = 5.0
_NEVER: Final = "0001-01-01T00:00:00Z"
"""What Docker says of the end of a container that was never started."""
_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_ENDED: Final = ("created", "exited", "dead")

log = get_logger("docker-filter")


class _Body(BaseModel):
    """A part of a request: a field that is not declared refuses it."""

    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_pascal)


class _HostConfig(_Body):
    """What a run container may ask of the host. Without a default: it must be asked for."""

    network_mode: str
    binds: list[str]
    readonly_rootfs: Literal[True]
    cap_drop: list[str]
    security_opt: list[str]
    memory: int
    pids_limit: int
    nano_cpus: int = 0
    tmpfs: dict[str, str] = {}
    init: bool = False
    auto_remove: Literal[False] = False


class _Create(_Body):
    """The body of a create request, as docker-py writes it."""

    image: str
    cmd: list[str]
    labels: dict[str, str]
    host_config: _HostConfig
    env: list[str] | None = None
    stop_timeout: int = 10
    working_dir: None = None
    hostname: str | None = None
    domainname: None = None
    user: None = None
    entrypoint: None = None
    volumes: dict[str, dict[str, str]] | None = None
    exposed_ports: None = None
    mac_address: None = None
    healthcheck: None = None
    stop_signal: None = None
    networking_config: dict[str, None] | None = None
    network_disabled: Literal[False] = False
    tty: Literal[False] = False
    open_stdin: Literal[False] = False
    stdin_once: Literal[False] = False
    attach_stdin: Literal[False] = False
    attach_stdout: bool = False
    attach_stderr: bool = False
    runtime: None = None


@dataclass(frozen=True, slots=True)
class Allowed:
    """What run containers may have.

    Attributes:
        image: The one image, by the name that the launcher uses.
        network: The one network.
        volumes: The named volumes, each with the options of its mount: ``ro`` or ``rw``.
        most_memory: Bytes at the most.
        most_pids: Processes and threads at the most.
        keep_seconds: How long a container that ended is kept.
    """

    image: str
    network: str
    volumes: Mapping[str, str]
    most_memory: int
    most_pids: int
    keep_seconds: float = 60.0


class RefusedRequestError(Exception):
    """A request does not pass; holds the reason."""


def check_create(content: bytes, allowed: Allowed) -> bytes:
    """Check a request for a new container, and return it as it was read: the engine may read other bytes otherwise.

    Args:
        content: Its body.
        allowed: What it may ask for.

    Raises:
        RefusedRequestError: It asks for more.
    """
    try:
        body = _Create.model_validate_json(content)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_input=False))
        raise RefusedRequestError(f"a run container is not made so: {'; '.join(problems)}") from None
    host = body.host_config
    faults = [
        (body.image != allowed.image, f"its image is {body.image}, and only {allowed.image} runs here"),
        (RUN_LABEL not in body.labels, f"it has no label {RUN_LABEL}"),
        (host.network_mode != allowed.network, f"its network is {host.network_mode}"),
        (host.cap_drop != ["ALL"], "it keeps capabilities"),
        (host.security_opt != ["no-new-privileges"], "its security options are others than no-new-privileges"),
        (not 0 < host.memory <= allowed.most_memory, f"its memory is {host.memory} bytes"),
        (not 0 < host.pids_limit <= allowed.most_pids, f"it may have {host.pids_limit} processes"),
        *((not _may_bind(bind, allowed.volumes), f"it mounts {bind}") for bind in host.binds),
        # docker-py names the network once more, with null: the model refuses any options of it.
        *((name != allowed.network, f"it joins {name}") for name in body.networking_config or ()),
    ]
    if wrong := [words for is_wrong, words in faults if is_wrong]:
        raise RefusedRequestError(f"a run container is not made so: {'; '.join(wrong)}")
    return body.model_dump_json(by_alias=True, exclude_unset=True).encode()


def _may_bind(bind: str, volumes: Mapping[str, str]) -> bool:
    volume, _, rest = bind.partition(":")
    path, _, mode = rest.rpartition(":")
    return path.startswith("/") and volumes.get(volume) == mode


class DockerFilter:
    """The filter in front of one Docker engine.

    Args:
        engine: Asks the engine.
        allowed: What run containers may have.
        clock: Gives seconds since 1970.
    """

    def __init__(self, engine: httpx.AsyncClient, allowed: Allowed, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._allowed = allowed
        self._clock = clock

    def app(self) -> Starlette:
        """Return the application that serves the filtered API, and removes ended containers while it does."""
        prefixes = ("", "/v{version:str}")
        routes = [
            Route(prefix + path, handler, methods=[method])
            for prefix in prefixes
            for method, path, handler in (
                ("GET", "/_ping", self._forward),
                ("HEAD", "/_ping", self._forward),
                ("GET", "/version", self._forward),
                ("POST", "/containers/create", self._create),
                ("GET", "/containers/{id}/json", self._of_a_run),
                ("POST", "/containers/{id}/start", self._of_a_run),
                ("POST", "/containers/{id}/stop", self._of_a_run),
                ("DELETE", "/containers/{id}", self._of_a_run),
            )
        ]
        app = Starlette(routes=routes, lifespan=self._sweeping)
        app.add_route("/{rest:path}", self._refuse, methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"])
        return app

    async def _create(self, request: Request) -> Response:
        try:
            content = check_create(await request.body(), self._allowed)
        except RefusedRequestError as error:
            return _refusal(request, str(error))
        return await self._forward(request, content)

    async def _of_a_run(self, request: Request) -> Response:
        name = request.path_params["id"]
        if not _ID.fullmatch(name):
            return _refusal(request, "the container's name is malformed")
        found = await self._ask("GET", f"/containers/{name}/json")
        if found.status_code != httpx.codes.OK:
            return _answer(found)
        if self._run_of(found.json()) is None:
            return _refusal(request, f"{name} is no run container of {self._allowed.image}")
        return await self._forward(request)

    async def _refuse(self, request: Request) -> Response:
        return _refusal(request, "runs need no such request")

    async def _forward(self, request: Request, content: bytes = b"") -> Response:
        return _answer(
            await self._ask(
                request.method,
                request.url.path,
                query=request.url.query,
                content=content,
                kind=request.headers.get("content-type"),
            )
        )

    async def _ask(
        self, method: str, path: str, query: str = "", content: bytes = b"", kind: str | None = None
    ) -> httpx.Response:
        headers = {"content-type": kind} if kind else {}
        url = httpx.URL(path, query=query.encode()) if query else httpx.URL(path)
        try:
            return await self._engine.request(method, url, content=content, headers=headers, timeout=_ANSWER_SECONDS)
        except httpx.HTTPError as error:
            message = f"the Docker engine does not answer ({type(error).__name__})"
            return httpx.Response(httpx.codes.BAD_GATEWAY, json={"message": message})

    @contextlib.asynccontextmanager
    async def _sweeping(self, app: Starlette) -> AsyncIterator[None]:
        del app
        task = asyncio.create_task(self._sweep_on())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _sweep_on(self) -> None:
        while True:
            try:
                await self.sweep()
            except Exception as error:  # noqa: BLE001  one failure must not end the sweeps
                log.warning("ended containers not removed", error=type(error).__name__)
            await asyncio.sleep(_SWEEP_SECONDS)

    async def sweep(self) -> list[str]:
        """Remove the run containers that ended, or were never started, long enough ago; return their runs."""
        filters = {"label": [RUN_LABEL], "status": list(_ENDED)}
        query = str(httpx.QueryParams({"all": "1", "filters": json.dumps(filters)}))
        listed = await self._ask("GET", "/containers/json", query=query)
        listed.raise_for_status()
        removed = []
        for container in listed.json():
            found = await self._ask("GET", f"/containers/{container['Id']}/json")
            if found.status_code != httpx.codes.OK:
                continue
            described = found.json()
            state, run = described["State"], self._run_of(described)
            finished = state["FinishedAt"]
            ended = _seconds(described["Created"] if finished == _NEVER else finished)
            if run is None or self._clock() - ended < self._allowed.keep_seconds:
                continue
            gone = await self._ask("DELETE", f"/containers/{container['Id']}")
            if gone.status_code in (httpx.codes.NO_CONTENT, httpx.codes.NOT_FOUND):
                log.info("run container removed", run=run, exit_code=state["ExitCode"])
                removed.append(run)
        return removed

    def _run_of(self, container: Mapping[str, Any]) -> str | None:
        """Return the run of a container as the engine describes it; None where it is no run of our image."""
        config = container["Config"]
        return (config["Labels"] or {}).get(RUN_LABEL) if config["Image"] == self._allowed.image else None


def _seconds(text: str) -> float:
    """Return seconds since 1970 of one of Docker's times, whose fractions may have nine digits."""
    return datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text)).timestamp()


def _answer(found: httpx.Response) -> Response:
    kept = {name: value for name, value in found.headers.items() if name in ("content-type", "api-version")}
    return Response(found.content, status_code=found.status_code, headers=kept)


def _refusal(request: Request, why: str) -> Response:
    log.warning("request refused", method=request.method, path=request.url.path, reason=why)
    return JSONResponse({"message": f"ghsync's Docker filter: {why}."}, status_code=httpx.codes.FORBIDDEN)


def serve(socket: Path, allowed: Allowed, host: str, port: int) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        socket: The engine's socket.
        allowed: What run containers may have.
        host: Address to listen on.
        port: Port to listen on.
    """
    import uvicorn

    transport = httpx.AsyncHTTPTransport(uds=str(socket))
    engine = httpx.AsyncClient(transport=transport, base_url="http://docker")
    uvicorn.run(DockerFilter(engine, allowed).app(), host=host, port=port, log_config=None, access_log=False)
