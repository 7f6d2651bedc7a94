"""The connector of the users' table: the states it may be in, whether its stream goes on, and the way out of each.

Belongs here: pure data and decisions. Not here: how a worker is queried (``stores.connect``), or registering and
starting (``connector``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import msgspec

CONNECTOR: Final = "ghsync-users"
RUNNING: Final = "RUNNING"
FAILED: Final = "FAILED"
UNASSIGNED: Final = "UNASSIGNED"
NONE: Final = "NONE"
"""The worker has no such connector."""
UNKNOWN: Final = "UNKNOWN"
"""The worker does not answer, or not with the connector's state."""
HALTED: Final = ("PAUSED", "STOPPED")
GRANTED: Final = ("SELECT", "RELOAD", "SHOW DATABASES", "REPLICATION SLAVE", "REPLICATION CLIENT")
"""The rights of the connector's database user."""
RIGHTS: Final = f"the database user needs {', '.join(GRANTED[:-1])} and {GRANTED[-1]}"

_AWAY_SECONDS: Final = 60.0
"""Several intervals of watching a connector. After a longer gap it is unknown whether the offset moved meanwhile."""
_STOPPED: Final = (FAILED, NONE, UNKNOWN, *HALTED)
_SNAPSHOT: Final = "take a new snapshot; see docs/operate/runbook.md, A new snapshot"
_RESTART: Final = (
    f"then run ghsync up connect, or POST /connectors/{CONNECTOR}/restart?includeTasks=true&onlyFailed=true to the "
    "worker of CONNECT_URL."
)
# Texts in the errors of Debezium and of the servers, in lower case, and the way out. The first match decides.
_CURES: Final = (
    (
        ("internal schema size", "row size", "schema isn't known", "table structure"),
        f"The event does not fit the columns that the connector knows: {_SNAPSHOT}.",
    ),
    (
        ("no longer available on the server", "could not find first log file", "purged", "has been purged"),
        f"MySQL no longer has the binlog from the connector's offset on: {_SNAPSHOT}.",
    ),
    (
        ("parsingexception", "mismatched input", "no viable alternative", "extraneous input"),
        f"The connector can't parse a statement; one of your own may need ddl.parser.type=legacy. Else {_SNAPSHOT}.",
    ),
    (
        ("gtidset",),
        f"MySQL had executed no GTID when the connector took its snapshot: change any row first, and then {_SNAPSHOT}.",
    ),
    (("access denied", "privilege"), f"Grant what is missing ({RIGHTS}), {_RESTART}"),
)


@dataclass(frozen=True, slots=True)
class ConnectorState:
    """The state of the connector.

    Attributes:
        state: ``RUNNING`` where connector and task run, else the state of the one that does not; ``NONE``; ``UNKNOWN``.
        reason: Why it failed, or which worker is away, in one line; None else.
        halted: Whether the connector itself was halted, in whatever state its task is.
        where: The worker's address without credentials.
    """

    state: str
    reason: str | None = None
    halted: bool = False
    where: str = ""

    @property
    def is_running(self) -> bool:
        """Whether connector and task run."""
        return self.state == RUNNING

    @property
    def is_stopped(self) -> bool:
        """Whether the stream is stopped until a person acts; False also while it starts."""
        return self.state in _STOPPED

    def as_json(self) -> dict[str, object]:
        """Return the fields as ``ghsync status`` shows them."""
        return {"connector": self.state, "connector_error": self.reason}

    def words(self) -> str:
        """Return the state in one line, such as ``the connector ghsync-users is FAILED: ...``."""
        if self.state == UNKNOWN:
            return self.reason or f"the Connect worker at {self.where} does not answer"
        if self.state == NONE:
            return f"the Connect worker at {self.where} has no connector {CONNECTOR}"
        return f"the connector {CONNECTOR} is {self.state}" + (f": {self.reason}" if self.reason else "")

    def way_out(self) -> str:
        """Return what to do; empty where it runs."""
        if self.is_running:
            return ""
        if self.state == UNKNOWN:
            return "Start the worker (the local one: ghsync up connect), or correct CONNECT_URL."
        if self.state == NONE:
            return "Register it: ghsync up connect. Or set CONNECT_URL to the worker that has it."
        if self.state in HALTED:
            return (
                f'Resume it: ghsync up connect, or on a worker of your own curl -X PUT "$CONNECT_URL/connectors/'
                f'{CONNECTOR}/resume".'
            )
        return cure_of(self.reason) if self.reason else "Read the worker's log, fix what it names, then ghsync up."


def stopped_words(state: ConnectorState | None) -> str:
    """Return why a connector brings no changes and what to do, a sentence each; empty where it runs or is unknown."""
    if state is None or state.is_running:
        return ""
    words = state.words()
    return f"{words[:1].upper()}{words[1:]}. {state.way_out()}"


def cure_of(reason: str) -> str:
    """Return the way out for the reason of a failure.

    >>> cure_of("The binlog is no longer available on the server")[:60]
    "MySQL no longer has the binlog from the connector's offset o"
    """
    text = reason.lower()
    for signs, cure in _CURES:
        if any(sign in text for sign in signs):
            return cure
    return f"Fix what it names, {_RESTART}"


class Sample(msgspec.Struct, frozen=True):
    """Where connector and database were at one moment.

    Attributes:
        at: Seconds since 1970.
        offset: The connector's committed offset, as text; None where the worker does not report it.
        log: The end of the database's binlog, as ``file:position``; None where it was not queried, or is refused.
        position: The offset's binlog position, likewise; None where the worker does not report it.
        seen: When a newer one was compared with it last, in seconds since 1970; 0 for never.
    """

    at: float
    offset: str | None = None
    log: str | None = None
    position: str | None = None
    seen: float = 0.0

    @property
    def is_known(self) -> bool:
        """Whether both are known."""
        return self.offset is not None and self.log is not None


def base_of(base: Sample | None, now: Sample) -> Sample:
    """Return the sample from which on the offset stands still while the database writes.

    That is ``now`` if the offset moved or is at the end of the binlog, or if the database wrote nothing. It is also
    ``now`` if either is unknown, or if no sample was taken for long.

    Args:
        base: What this returned for the sample before; None for the first.
        now: The newest sample.

    >>> idle = base_of(Sample(0, "a", "x"), Sample(9, "a", "x"))
    >>> base_of(idle, Sample(20, "a", "y")).at, base_of(idle, Sample(20, "b", "y")).at
    (9, 20)
    """
    if base is None or not (base.is_known and now.is_known) or now.at - max(base.at, base.seen) > _AWAY_SECONDS:
        return now
    if now.offset != base.offset or now.log in (base.log, now.position):
        return now
    return msgspec.structs.replace(base, seen=now.at)
