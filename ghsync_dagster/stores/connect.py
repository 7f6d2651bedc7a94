"""Kafka Connect: single requests to a worker's REST interface about the connector, and how its failures translate.

Not here: what a state means (``domain.connector``), and which settings a connector must have (``connector``).
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any, Final, Self, TypeVar

import httpx
import msgspec

from ghsync_dagster.domain.connector import (
    CONNECTOR,
    FAILED,
    HALTED,
    NONE,
    RIGHTS,
    RUNNING,
    UNASSIGNED,
    UNKNOWN,
    ConnectorState,
)
from ghsync_dagster.domain.errors import UnavailableError
from ghsync_dagster.domain.text import shortened
from ghsync_dagster.logging import redact

_REQUEST_SECONDS: Final = 10.0
_REBALANCE_SECONDS: Final = 90.0
_POLL_SECONDS = 0.1
# During a rebalance a worker answers some requests with 409 and others with 500 and this message.
_REBALANCING: Final = "a rebalance is expected"
_HAS_MESSAGE: Final = re.compile(r"[\w.$]+: *\S")
_PASSWORD: Final = re.compile(r"(?is)(identified|password).*")
_REASON_LIMIT: Final = 1_000
_HEARTBEAT: Final = "heartbeat.interval.ms"

T = TypeVar("T")


class _Part(msgspec.Struct):
    state: str
    trace: str = ""


class _Status(msgspec.Struct):
    connector: _Part
    tasks: list[_Part]


class _SourceOffset(msgspec.Struct):
    offset: dict[str, Any] | None
    partition: dict[str, Any] | None


class _Offsets(msgspec.Struct):
    offsets: list[_SourceOffset]


class _Named(msgspec.Struct):
    name: str


class _Refusal(msgspec.Struct):
    error_code: int


class _Message(msgspec.Struct):
    message: str


class _Root(msgspec.Struct):
    kafka_cluster_id: str | None


@dataclass(frozen=True, slots=True)
class CommittedOffset:
    """The committed offset of the connector in the binlog.

    Attributes:
        text: All of it, only to be compared for equality.
        event_at: When the database wrote the last event that it covers, in seconds since 1970; None where not known.
        position: The binlog position, as ``file:position``; None where not known.
    """

    text: str
    event_at: float | None
    position: str | None


class ConnectWorker:
    """A Connect worker. Use as a context manager, or call ``close``.

    Args:
        url: Its address, which may hold credentials.
        timeout_seconds: How long one request may take.
        rebalance_seconds: How long a request is repeated while the workers rebalance.
    """

    def __init__(
        self, url: str, timeout_seconds: float = _REQUEST_SECONDS, rebalance_seconds: float = _REBALANCE_SECONDS
    ) -> None:
        self.where = redact(url)
        self._rebalance_seconds = rebalance_seconds
        self._client = client_of(url, timeout_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the connection."""
        self._client.close()

    def serves(self) -> bool:
        """Return whether a worker is ready: it has read its topics and joined its group, if its version reports it."""
        try:
            health = self._client.get("/health")
            # Workers before Kafka 3.9 have no such path.
            serves = health.is_success or health.status_code == httpx.codes.NOT_FOUND
            return serves and bool(_decoded(self._client.get("/"), _Root))
        except (httpx.HTTPError, _NoWorkerError):
            return False

    def state(self) -> ConnectorState:
        """Return the connector's state; ``UNKNOWN`` with the reason if the worker does not answer or refuses."""
        try:
            return self.read_state()
        except UnavailableError as error:
            return unreachable(error, self.where)

    def read_state(self) -> ConnectorState:
        """Return the connector's state.

        Raises:
            UnavailableError: The worker does not answer, or refuses to.
        """
        answer = self._of_connector("status", _Status)
        if answer is None:
            # A worker that has just started, or got new settings, does not know a connector's state yet.
            return ConnectorState(NONE if self.config() is None else UNASSIGNED, where=self.where)
        halted = answer.connector.state in HALTED
        parts = [answer.connector, *answer.tasks]
        for part in parts:
            if part.state == FAILED:
                return ConnectorState(FAILED, reason_of(part.trace), halted, self.where)
        others = [part.state for part in parts if part.state != RUNNING]
        # A connector without a task does nothing yet.
        state = others[0] if others else RUNNING if answer.tasks else UNASSIGNED
        return ConnectorState(state, halted=halted, where=self.where)

    def config(self) -> dict[str, str] | None:
        """Return the connector's settings, None where there is no connector. They may hold secrets.

        Raises:
            UnavailableError: The worker does not answer, or refuses to.
        """
        found = self._of_connector("config", dict[str, str | None])
        return None if found is None else {name: value for name, value in found.items() if value is not None}

    def sends_heartbeats(self) -> bool:
        """Return whether the connector's offset moves with the binlog, also while the table itself does not change.

        Raises:
            UnavailableError: The worker does not answer, or refuses to.
        """
        given = (self.config() or {}).get(_HEARTBEAT, "0")
        return given.isdecimal() and int(given) > 0

    def offset(self) -> CommittedOffset | None:
        """Return the connector's committed offset; None where there is none, or the worker knows no such request.

        Raises:
            UnavailableError: The worker does not answer, or refuses to.
        """
        found = self._offsets()
        if not found:
            return None
        # The connector has one task with one source partition.
        newest = found[-1].offset or {}
        seconds = newest.get("ts_sec")
        return CommittedOffset(
            msgspec.json.encode(found, order="deterministic").decode(),
            float(seconds) if isinstance(seconds, int | float) and seconds > 0 else None,
            f"{newest['file']}:{newest['pos']}" if {"file", "pos"} <= newest.keys() else None,
        )

    def has_offset(self) -> bool | None:
        """Return whether the connector has a committed offset; None where the worker knows no such request.

        Raises:
            UnavailableError: The worker does not answer, or refuses to.
        """
        found = self._offsets()
        return None if found is None else bool(found)

    def _offsets(self) -> list[_SourceOffset] | None:
        found = self._of_connector("offsets", _Offsets)
        return None if found is None else found.offsets

    def configure(self, config: dict[str, str]) -> None:
        """Give the connector these settings; create it where there is none.

        Raises:
            UnavailableError: The worker does not answer, or refuses them.
        """
        self._read(self._request("PUT", f"/connectors/{CONNECTOR}/config", config), _Named)

    def restart(self) -> None:
        """Restart the failed parts of the connector.

        Raises:
            UnavailableError: The worker does not answer, or refuses to.
        """
        self._request("POST", f"/connectors/{CONNECTOR}/restart?includeTasks=true&onlyFailed=true")

    def resume(self) -> None:
        """Resume a halted connector.

        Raises:
            UnavailableError: The worker does not answer, or refuses to.
        """
        self._request("PUT", f"/connectors/{CONNECTOR}/resume")

    def _of_connector(self, what: str, kind: type[T]) -> T | None:
        """Return a resource of the connector; None where the worker answers 404."""
        answer = self._request("GET", f"/connectors/{CONNECTOR}/{what}")
        if answer.status_code == httpx.codes.NOT_FOUND:
            # The 404 of a worker has an error code; that of another server has none.
            self._read(answer, _Refusal)
            return None
        return self._read(answer, kind)

    def _read(self, answer: httpx.Response, kind: type[T]) -> T:
        try:
            return _decoded(answer, kind)
        except _NoWorkerError:
            raise UnavailableError(
                f"What answers at {self.where} is no Connect worker.",
                way_out="Correct CONNECT_URL, or look at what stands before the worker.",
            ) from None

    def _request(self, method: str, path: str, body: object = None) -> httpx.Response:
        """Send one request and return its answer; repeat it while the workers rebalance.

        Args:
            method: HTTP's.
            path: Below the worker's address.
            body: Sent as JSON, if any.

        Raises:
            UnavailableError: There is no answer, or it is an error, except 404 to a GET.
        """
        deadline = time.monotonic() + self._rebalance_seconds
        while True:
            try:
                answer = self._client.request(method, path, json=body)
            except httpx.HTTPError as error:
                raise UnavailableError(
                    f"The Connect worker at {self.where} does not answer: {type(error).__name__}.",
                    way_out="Read its log; run ghsync up connect.",
                ) from None
            refused = not answer.is_success
            rebalancing = refused and (answer.status_code == httpx.codes.CONFLICT or _REBALANCING in _message(answer))
            if not rebalancing or time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)
        if answer.status_code == httpx.codes.NOT_FOUND and method == "GET":
            return answer
        if refused:
            raise UnavailableError(
                f"The Connect worker refuses {method} {path}: {redact(_message(answer))}",
                way_out=f"Fix what it names, or what its log does ({RIGHTS}), then run ghsync up again.",
            )
        return answer


def client_of(url: str, seconds: float = _REQUEST_SECONDS) -> httpx.Client:
    """Return a client of the worker at an address."""
    # A proxy of the environment can't reach servers of this machine.
    return httpx.Client(base_url=url, timeout=seconds, trust_env=not url.startswith("http://127.0.0.1:"))


def unreachable(error: UnavailableError, where: str = "") -> ConnectorState:
    """Return the state of a connector whose worker can't be reached."""
    words = error.message.rstrip(".")
    return ConnectorState(UNKNOWN, words[:1].lower() + words[1:], where=where)


def reason_of(trace: str) -> str:
    """Return the first line of a Java stack trace, and its innermost cause that has a message, if there is one."""
    lines = trace.strip().splitlines() or ["no reason is given"]
    causes = [line.removeprefix("Caused by: ") for line in lines if line.startswith("Caused by: ")]
    with_message = [cause for cause in causes if _HAS_MESSAGE.match(cause)] or causes
    # A parsing error quotes the whole statement, which may hold a password in several forms.
    found = [_PASSWORD.sub(r"\1 ***", line.rstrip(" .")) for line in (lines[0], *with_message[-1:])]
    return shortened(redact("; ".join(found)), _REASON_LIMIT)


class _NoWorkerError(Exception):
    """The answer does not come from a Connect worker."""


def _decoded(answer: httpx.Response, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(answer.content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise _NoWorkerError from None


def _message(answer: httpx.Response) -> str:
    try:
        return _decoded(answer, _Message).message
    except _NoWorkerError:
        return f"HTTP {answer.status_code}"
