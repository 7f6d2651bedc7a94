"""A process that loads the newest users of a folder and kills itself at the moment that its order names.

Started by ``test_kill.py``. It prints the milliseconds that the load took if it lived to its end.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import msgspec
from pymongo import monitoring

from ghsync_dagster.batch.flow import BatchFlow
from ghsync_dagster.batch.load import Step
from ghsync_dagster.batch.reports import Artifacts
from ghsync_dagster.domain.user import BUILT_IN_RULES
from ghsync_dagster.logging import configure_logging
from ghsync_dagster.settings import load_settings
from ghsync_dagster.stores.mongo.users import UserStore
from ghsync_dagster.wiring import spark_handle


class Order(msgspec.Struct):
    """What to load, and when to die.

    Attributes:
        uri: The server.
        database: The database; the collection is ``Users``.
        home: Folder of this process alone, which names its JVM too.
        artifacts: Folder with the users' report.
        step: Die when this step is done.
        milliseconds: Die so long after the lease was taken, Spark being up.
        writes: Die after so many acknowledged writes of this process, those to the lease apart.
        lose: Users to delete after the first insert, so that there is something to write again.
    """

    uri: str
    database: str
    home: str
    artifacts: str
    step: Step | None = None
    milliseconds: float | None = None
    writes: int | None = None
    lose: list[str] = []


def die() -> None:
    """End this process as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


class WriteCounter(monitoring.CommandListener):
    """Dies when the wanted number of writes was acknowledged."""

    def __init__(self, wanted: int) -> None:
        self.left = wanted
        self.running: set[int] = set()

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        """Note a write's begin."""
        written = event.command.get(event.command_name)
        if event.command_name in {"insert", "update", "delete"} and written != "_ghsync_leases":
            self.running.add(event.request_id)

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        """Count a write."""
        if event.request_id in self.running:
            self.left -= 1
            if self.left == 0:
                die()

    def failed(self, event: monitoring.CommandFailedEvent) -> None:
        """Leave out a refused write."""
        self.running.discard(event.request_id)


def main() -> None:
    """Carry out the order in the first argument."""
    order = msgspec.json.decode(sys.argv[1], type=Order)
    if order.writes is not None:
        monitoring.register(WriteCounter(order.writes))
    settings = load_settings(GHSYNC_HOME=order.home)
    configure_logging(settings)
    flow = BatchFlow(
        artifacts=Artifacts(Path(order.artifacts)),
        spark=spark_handle(settings),
        open_store=lambda: UserStore(order.uri, order.database, "Users", timeout_seconds=5),
        rules=BUILT_IN_RULES,
        max_quarantined_ratio=0.01,
        attempts=1,
        lease_wait_seconds=60,
        lease_quiet_seconds=2,
    )
    if order.milliseconds is not None:
        flow.spark.session().range(10).count()
    lose = list(order.lose)

    def on_step(step: Step) -> None:
        if step is Step.LEASED and order.milliseconds is not None:
            threading.Timer(order.milliseconds / 1000, die).start()
        if step is Step.INSERTED and lose:
            with flow.open_store() as store:
                store.users.delete_many({"user_id": {"$in": lose}})
            lose.clear()
        if step is order.step:
            die()

    began = time.monotonic()
    flow.load("child", on_step)
    sys.stdout.write(f"{(time.monotonic() - began) * 1000:.0f}\n")
    sys.stdout.flush()
    die()


if __name__ == "__main__":
    main()
