"""The local stack that the change path is measured on: MariaDB, Debezium in Connect, Kafka, the Mongo-wire server.

Belongs here: its start and end, how processes find it, and the audit of its two ends. Not here: what is run on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.contenders import inherited_environment
from benchmarks.harness import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from confluent_kafka.admin import AdminClient

    from ghsync_dagster.settings import Settings


class Stack:
    """The local servers, all on one folder, from the way in to the way out.

    Args:
        home: Their folder.
        logs: Gets what the processes of a run say.
        tell: Gets a line of text for each thing done.
    """

    def __init__(self, home: Path, logs: Path, tell: Callable[[str], None]) -> None:
        self.home, self.logs = home, logs
        self._tell = tell

    def __enter__(self) -> Stack:
        from ghsync_dagster.dev.rehearsal import addresses
        from ghsync_dagster.domain.errors import GhsyncError
        from ghsync_dagster.local import stack

        self._empty = local_settings(self.home)
        try:
            servers = stack.up(self._empty, progress=self._tell)
            self.settings = addresses(self._empty, servers)
        except GhsyncError as error:
            stack.down(self._empty, progress=self._tell)
            raise BenchmarkError(str(error)) from error
        except BaseException:
            stack.down(self._empty, progress=self._tell)
            raise
        self.pids = {name: server.pid for name, server in servers.items() if server.pid is not None}
        """The servers' processes, by service."""
        return self

    def __exit__(self, *_: object) -> None:
        from ghsync_dagster.local import stack

        stack.down(self._empty, progress=self._tell)

    def environment(self) -> dict[str, str]:
        """Return the whole environment of a process that works on these servers, without any setting of the caller."""
        return inherited_environment() | _variables(self.settings) | {"KAFKA_GROUP_ID": self.settings.kafka_group_id}

    def members(self, admin: AdminClient) -> int:
        """Return how many consumers the group has, once it is not in the middle of taking one in."""
        from confluent_kafka import ConsumerGroupState

        group = self.settings.kafka_group_id
        found = admin.describe_consumer_groups([group], request_timeout=10)[group].result()
        return len(found.members) if found.state == ConsumerGroupState.STABLE else 0

    def admin(self) -> AdminClient:
        """Return a client that asks the broker about the group."""
        from confluent_kafka.admin import AdminClient

        # Its own words would go to standard error.
        return AdminClient({"bootstrap.servers": str(self.settings.kafka_bootstrap_servers), "log_level": 0})

    def is_equal(self) -> bool:
        """Return whether table and collection are equal, once what is in flight has had half a minute."""
        from ghsync_dagster.cdc.health.audit import Patience, audit
        from ghsync_dagster.stores.mysql import MySqlStore
        from ghsync_dagster.wiring import store_opener

        url = self.settings.mysql_url
        if url is None:
            raise AssertionError("the stack's addresses are set")
        with MySqlStore(url.get_secret_value()) as mysql, store_opener(self.settings)() as store:
            return audit(mysql, store, patience=Patience(seconds=30)).equal


def local_settings(home: Path) -> Settings:
    """Return settings with which all servers are local ones under ``home``, whatever the caller has set."""
    from ghsync_dagster.settings import load_settings

    outside = dict.fromkeys(("MONGODB_URI", "KAFKA_BOOTSTRAP_SERVERS", "MYSQL_URL", "CONNECT_URL"))
    return load_settings(GHSYNC_HOME=home, **outside)


def _variables(settings: Settings) -> dict[str, str]:
    if settings.mongodb_uri is None or settings.mysql_url is None:
        raise AssertionError("the stack's addresses are set")
    return {
        "GHSYNC_HOME": str(settings.home_dir),
        "MONGODB_URI": settings.mongodb_uri.get_secret_value(),
        "MYSQL_URL": settings.mysql_url.get_secret_value(),
        "KAFKA_BOOTSTRAP_SERVERS": str(settings.kafka_bootstrap_servers),
        "CONNECT_URL": str(settings.connect_url),
    }
