"""The one logger set-up: structlog to standard error, JSON when that is not a terminal, secrets masked.

Belongs here: the form of a log line, and what must never be in one. Not here: what is logged.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import stamina.instrumentation
import structlog

if TYPE_CHECKING:
    from collections.abc import MutableMapping

# The userinfo of a URI, up to the last @ before the path: a password may contain an @.
# The scheme is not matched, since its search would take quadratic time in a long word.
# A password with a slash, which SQLAlchemy allows, is matched up to its first @, within a bound on the time it takes.
_URI_CREDENTIALS = re.compile(r"://(?:[^\s/]*|[^\s/:]*:[^\s@]{0,128})@")
_MASK = "***"
_OF_PROGRAMS = ("run_id", "load")
"""Left out on a terminal: long ids, by which programs find lines that belong together."""


def redact(text: str) -> str:
    """Mask the credentials of every URI in ``text``.

    >>> redact("can't reach mongodb://app:s3cret@db:27017/x")
    "can't reach mongodb://***@db:27017/x"
    """
    return _URI_CREDENTIALS.sub(f"://{_MASK}@", text)


def _redact_event(_logger: object, _name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key, value in event.items():
        if not key.startswith("_"):
            event[key] = _redacted(value)
    return event


def _redacted(value: object) -> object:
    """Mask every text in a value; an object becomes its masked text."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {redact(str(key)): _redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_redacted(item) for item in value]
    return redact(str(value))


class LogSettings(Protocol):
    """The form and the lowest level of log lines.

    Attributes:
        log_format: ``json``, ``console``, or ``auto``: JSON if standard error is no terminal.
        log_level: A level's name, in capitals.
    """

    @property
    def log_format(self) -> str: ...  # noqa: D102  the class has it
    @property
    def log_level(self) -> str: ...  # noqa: D102


def configure_logging(settings: LogSettings) -> None:
    """Set up structlog and route the standard library's loggers through it."""
    as_json = settings.log_format == "json" or (settings.log_format == "auto" and not sys.stderr.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _redact_event,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    renderer: list[Any] = (
        [structlog.processors.JSONRenderer()]
        if as_json
        else [_for_a_terminal, structlog.dev.ConsoleRenderer(pad_event_to=0, pad_level=False)]
    )
    handler = _StandardError()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
        )
    )
    root = logging.getLogger("ghsync")
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level)
    root.propagate = False
    # Our own code logs its retries.
    stamina.instrumentation.set_on_retry_hooks([])


class _StandardError(logging.StreamHandler[TextIO]):
    """Writes to the current ``sys.stderr``: a progress bar replaces it, to stay below the log lines."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]  # the base sets it once
        """Standard error."""
        return sys.stderr


def _for_a_terminal(_logger: object, _name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Leave out what only programs need, so that a line fits into the terminal."""
    for name in _OF_PROGRAMS:
        event.pop(name, None)
    event["timestamp"] = str(event["timestamp"]).partition("T")[2].partition(".")[0]
    event["logger"] = str(event["logger"]).removeprefix("ghsync.")
    return event


def bind_run(run_id: str | None) -> None:
    """Add the run's id to every later log line; None removes it."""
    if run_id is None:
        structlog.contextvars.unbind_contextvars("run_id")
    else:
        structlog.contextvars.bind_contextvars(run_id=run_id)


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """Return the logger of one module; ``name`` is its step, such as ``load``."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(f"ghsync.{name}")
    return logger
