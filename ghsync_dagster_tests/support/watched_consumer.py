"""A consumer as a process of its own, which writes down each state that it gives a document, in order.

Called as ``watched_consumer.py FILE`` with the settings in the environment. A line is the time, the user and the login.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymongo import monitoring

from ghsync_dagster.cli.app import main

if TYPE_CHECKING:
    from typing import TextIO

    from pymongo.monitoring import CommandFailedEvent, CommandStartedEvent, CommandSucceededEvent


class _States(monitoring.CommandListener):
    """Writes down what commands to the users' collection wrote."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._sent: dict[int, list[tuple[str, str]]] = {}

    def started(self, event: CommandStartedEvent) -> None:
        """Keep what a command is about to write."""
        command = event.command
        if command.get("insert") == "Users":
            self._sent[event.request_id] = [_state(document) for document in command["documents"]]
        elif command.get("update") == "Users":
            self._sent[event.request_id] = [_state(update["u"]) for update in command["updates"]]

    def succeeded(self, event: CommandSucceededEvent) -> None:
        """Write down what it wrote."""
        now = time.time()
        for key, login in self._sent.pop(event.request_id, ()):
            self._file.write(f"{now} {key} {login}\n")
        self._file.flush()

    def failed(self, event: CommandFailedEvent) -> None:
        """Forget what was not written."""
        self._sent.pop(event.request_id, None)


def _state(document: Any) -> tuple[str, str]:
    return str(document.get("user_id")), str(document.get("login")).replace(" ", "_")


if __name__ == "__main__":
    with Path(sys.argv.pop(1)).open("a", encoding="utf-8") as states:
        monitoring.register(_States(states))
        sys.argv = ["ghsync", "cdc", "run"]
        main()
