"""Resources: what assets, checks and jobs are given. The one seam that tests replace.

Belongs here: how Dagster's resource life cycle meets the flows' wiring. Not here: any wiring of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import dagster as dg
from pydantic import PrivateAttr

from ghsync_dagster.batch.flow import BatchFlow
from ghsync_dagster.domain.source import STATEMENT_HOURS
from ghsync_dagster.observability.logging import bind_run, configure_logging
from ghsync_dagster.settings import load_settings

if TYPE_CHECKING:
    from datetime import datetime

    from ghsync_dagster.batch.checks import Finding
    from ghsync_dagster.cdc.connector import ConnectorProbe
    from ghsync_dagster.cdc.consume import ChangeConsumer
    from ghsync_dagster.cdc.dead_letters import OpenLetters
    from ghsync_dagster.cdc.listener import ChangeListener
    from ghsync_dagster.settings import Settings
    from ghsync_dagster.stores.kafka import KafkaSettings
    from ghsync_dagster.stores.mongo import UserStore
    from ghsync_dagster.stores.mysql import MySqlStore


class BatchResource(dg.ConfigurableResource["BatchResource"]):
    """The batch flow of this process's settings; the Spark session begins to start with the run."""

    _flow: BatchFlow | None = PrivateAttr(default=None)

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Wire the flow for one run."""
        configure_logging(self.settings())
        run_id = context.run.run_id if context.run else None
        bind_run(run_id)
        self._flow = self.build(run_id)

    def teardown_after_execution(self, context: dg.InitResourceContext) -> None:
        """End what was begun for the run; the Spark session goes on, since the process may run another."""
        del context
        bind_run(None)

    def settings(self) -> Settings:
        """Return the settings; a test's resource may override this."""
        return load_settings()

    def build(self, run_id: str | None = None) -> BatchFlow:
        """Build the flow of one run; a test's resource may override this."""
        from ghsync_dagster.wiring import batch_flow

        return batch_flow(self.settings(), run_id)

    @property
    def flow(self) -> BatchFlow:
        """The flow of the present run."""
        if self._flow is None:
            self._flow = self.build()
        return self._flow


class ChangesResource(dg.ConfigurableResource["ChangesResource"]):
    """The change flow's parts of this process's settings. Kafka and MySQL must be there: none is started."""

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Bind the run to the log."""
        configure_logging(self.settings())
        bind_run(context.run.run_id if context.run else None)

    def teardown_after_execution(self, context: dg.InitResourceContext) -> None:
        """Take the run off the log."""
        del context
        bind_run(None)

    def settings(self) -> Settings:
        """Return the settings; a test's resource may override this."""
        return load_settings()

    def kafka(self) -> KafkaSettings:
        """Return the topic, the group and the way to the brokers.

        Raises:
            UnavailableError: KAFKA_BOOTSTRAP_SERVERS is not set and the local broker is not up.
        """
        from ghsync_dagster.wiring import existing_kafka

        return existing_kafka(self.settings())

    def consumer(self, listener: ChangeListener) -> ChangeConsumer:
        """Return a consumer of the changes.

        Raises:
            UnavailableError: KAFKA_BOOTSTRAP_SERVERS is not set and the local broker is not up.
        """
        from ghsync_dagster.wiring import change_consumer

        return change_consumer(self.settings(), self.kafka(), listener)

    def no_kafka(self) -> str | None:
        """Return in words that Kafka was never set up here; None where it is named or was once started.

        One that was set up and is away is not missing: asking it raises.
        """
        from ghsync_dagster.local import kafka

        return None if kafka.was_set_up(self.settings()) else _words("Kafka", "KAFKA_BOOTSTRAP_SERVERS")

    def no_mysql(self) -> str | None:
        """Return the same of MySQL."""
        from ghsync_dagster.local import mysql

        return None if mysql.was_set_up(self.settings()) else _words("MySQL", "MYSQL_URL")

    def open_store(self) -> UserStore:
        """Open the users' collection."""
        from ghsync_dagster.wiring import store_opener

        return store_opener(self.settings())()

    def open_mysql(self) -> MySqlStore:
        """Open the table of users.

        Raises:
            UnavailableError: MYSQL_URL is not set and the local server is not up.
        """
        from ghsync_dagster.wiring import open_mysql

        return open_mysql(self.settings())

    def source(self, hours: float | None = None) -> Finding | None:
        """Look at MySQL's table and settings; None where there is no MySQL here.

        Args:
            hours: How far back Connect's log is looked at; None for the usual time.

        Raises:
            GhsyncError: MySQL is away or refuses.
        """
        from ghsync_dagster.wiring import look_at_source

        if self.no_mysql():
            return None
        return look_at_source(self.settings(), hours=STATEMENT_HOURS if hours is None else hours)

    def close_statements(self, began: datetime) -> None:
        """Remember that both sides were equal in a comparison that began then."""
        from ghsync_dagster.wiring import close_statements

        close_statements(self.settings(), began)

    def connector(self) -> ConnectorProbe | None:
        """Return what asks for the connector; None where no worker is known."""
        from ghsync_dagster.wiring import connector_probe

        return connector_probe(self.settings())

    def dead_letters(self) -> OpenLetters:
        """Return the open dead letters."""
        from ghsync_dagster.cdc.dead_letters import open_letters

        with self.open_store() as store:
            return open_letters(self.kafka(), store)


def _words(server: str, variable: str) -> str:
    return f"there is no {server} here: {variable} is not set, and no local one was ever started"
