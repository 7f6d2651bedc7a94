"""Resources of assets, checks and jobs: the one seam that tests replace.

Belongs here: Dagster's resource life cycle, and the settings that the UI shows and the launchpad may set. The docstring
of a resource is its description in the UI. Not here: the wiring of the flows.
"""

# No annotations from __future__: Dagster wants the type of a resource that another one needs, not its name.
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import dagster as dg
from pydantic import Field, PrivateAttr, SecretStr

from ghsync_dagster.batch.flow import BatchFlow
from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster.domain.source import STATEMENT_HOURS
from ghsync_dagster.logging import bind_run, configure_logging, redact
from ghsync_dagster.settings import Settings, load_settings

if TYPE_CHECKING:
    from datetime import datetime

    from ghsync_dagster.cdc.dead_letters.index import OpenLetters
    from ghsync_dagster.cdc.health.connector import ConnectorProbe
    from ghsync_dagster.cdc.stream.consume import ChangeConsumer
    from ghsync_dagster.cdc.stream.listener import ChangeListener
    from ghsync_dagster.domain.finding import Finding
    from ghsync_dagster.stores.kafka.client import KafkaSettings
    from ghsync_dagster.stores.mongo.users import UserStore
    from ghsync_dagster.stores.mysql import MySqlStore
    from ghsync_dagster.stores.spark import SparkHandle


_SECRET: Final = re.compile("password|secret|token", re.IGNORECASE)


def _setting(name: str) -> Any:  # noqa: ANN401  as pydantic's Field
    """Return a resource's field for a setting, by its name in ``Settings``."""
    field = Settings.model_fields[name]
    return Field(default=None, description=f"{field.validation_alias}: {field.description} Empty: as it is set there.")


def _is_secret(value: object) -> bool:
    """Return whether a setting's value is a secret or holds one, as a URL or an option of Java may."""
    return isinstance(value, SecretStr) or (
        isinstance(value, str) and (redact(value) != value or _SECRET.search(value) is not None)
    )


class SettingsResource(dg.ConfigurableResource["SettingsResource"]):
    """A resource whose fields are settings: the UI shows them, and the launchpad may give others for one run."""

    @classmethod
    def of_environment(cls, **more: Any) -> Any:  # noqa: ANN401  other resources, and a part of one
        """Return the resource as the UI shows it: variables by name, other settings by value, secrets not at all.

        The launchpad may give others for one run.

        Args:
            more: The resources that it needs.
        """
        try:
            settings = load_settings()
        except ConfigError:
            # Each run fails with this error, so it is not lost.
            settings = None
        shown: dict[str, Any] = {}
        for name in cls._names():
            field = Settings.model_fields[name]
            if os.environ.get(variable := str(field.validation_alias)):
                shown[name] = dg.EnvVar(variable)
            elif settings and not _is_secret(value := getattr(settings, name)):
                shown[name] = value
        return cls.configure_at_launch(**shown, **more)

    @classmethod
    def _names(cls) -> list[str]:
        return [name for name in cls.model_fields if name in Settings.model_fields]

    def refuse_typed_secrets(self, context: dg.InitResourceContext) -> None:
        """Refuse a secret that was typed into the launchpad, as Dagster stores and shows the run's config.

        Raises:
            ConfigError: There is one.
        """
        resources = dict[str, Any](context.run.run_config if context.run else {}).get("resources", {})
        for name, part in resources.items():
            for setting, value in part.get("config", {}).items():
                if _is_secret(value):
                    raise ConfigError(
                        f"The run's config holds a secret in resources.{name}.config.{setting}, for all to see.",
                        way_out="Change that secret. Set it in the environment and name the variable: {env: NAME}.",
                    )

    def given(self) -> Mapping[str, object]:
        """Return this resource's settings by environment variable."""
        values = ((Settings.model_fields[name].validation_alias, getattr(self, name)) for name in self._names())
        return {str(variable): value for variable, value in values if value not in (None, "")}

    def settings(self) -> Settings:
        """Return the settings with this resource's; a test's resource may override this."""
        return load_settings(**self.given())


class StoreResource(SettingsResource):
    """A resource that writes the collection, with the life cycle of one run."""

    mongodb_uri: str | None = _setting("mongodb_uri")
    mongodb_database: str | None = _setting("mongodb_database")
    mongodb_collection: str | None = _setting("mongodb_collection")

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Configure the log, and bind the run to it."""
        self.refuse_typed_secrets(context)
        configure_logging(self.settings())
        bind_run(context.run.run_id if context.run else None)

    def teardown_after_execution(self, context: dg.InitResourceContext) -> None:
        """Unbind the run; the Spark session goes on, since the process may run another."""
        del context
        bind_run(None)


class SparkResource(SettingsResource):
    """The Spark session: one a process, made by dagster-pyspark, and kept for the next run of the process."""

    spark_master: str | None = _setting("spark_master")
    spark_driver_memory: str | None = _setting("spark_driver_memory")
    spark_driver_java_options: str | None = _setting("spark_driver_java_options")
    spark_jars_packages: str | None = _setting("spark_jars_packages")

    def handle(self, settings: Settings) -> "SparkHandle":
        """Return a handle on the session, not started yet.

        Args:
            settings: What it is started with, this resource's among them.
        """
        from ghsync_dagster.wiring import spark_handle

        return spark_handle(settings, _session_of)


def _session_of(configuration: Mapping[str, str]) -> Any:  # noqa: ANN401  as dagster-pyspark declares it
    """Return the session of dagster-pyspark's resource.

    Java, the connector's jar and the class archive are located when the session is first used, so that resource is
    configured only then; see docs/decisions/015-spark-by-dagster-pyspark.md.
    """
    # It imports pyspark, which the code location does not need.
    from dagster_pyspark import LazyPySparkResource

    return LazyPySparkResource(spark_config=dict(configuration)).spark_session


class BatchResource(StoreResource):
    """The batch flow; the Spark session begins to start with the run."""

    spark: dg.ResourceDependency[SparkResource]
    rules_module: str | None = _setting("rules_module")

    _flow: BatchFlow | None = PrivateAttr(default=None)

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Wire the flow for one run."""
        super().setup_for_execution(context)
        self._flow = self.build(context.run.run_id if context.run else None)

    def settings(self) -> Settings:
        """Return the settings with this resource's and Spark's; a test's resource may override this."""
        return load_settings(**self.given(), **self.spark.given())

    def build(self, run_id: str | None = None) -> BatchFlow:
        """Build the flow of one run; a test's resource may override this."""
        from ghsync_dagster.wiring import batch_flow

        settings = self.settings()
        return batch_flow(settings, run_id, self.spark.handle(settings))

    @property
    def flow(self) -> BatchFlow:
        """The flow of the present run."""
        if self._flow is None:
            self._flow = self.build()
        return self._flow


class ChangesResource(StoreResource):
    """The change flow's parts. Kafka and MySQL must be there: none is started."""

    kafka_bootstrap_servers: str | None = _setting("kafka_bootstrap_servers")
    kafka_topic: str | None = _setting("kafka_topic")
    kafka_group_id: str | None = _setting("kafka_group_id")
    mysql_url: str | None = _setting("mysql_url")
    connect_url: str | None = _setting("connect_url")

    def kafka(self) -> "KafkaSettings":
        """Return the topic, the group and the connection settings.

        Raises:
            UnavailableError: KAFKA_BOOTSTRAP_SERVERS is not set and the local broker is not up.
        """
        from ghsync_dagster.wiring import existing_kafka

        return existing_kafka(self.settings())

    def consumer(self, listener: "ChangeListener") -> "ChangeConsumer":
        """Return a consumer of the changes.

        Raises:
            UnavailableError: KAFKA_BOOTSTRAP_SERVERS is not set and the local broker is not up.
        """
        from ghsync_dagster.wiring import change_consumer

        return change_consumer(self.settings(), self.kafka(), listener)

    def no_kafka(self) -> str | None:
        """Return why there is no Kafka here; None where it is configured or a local one was ever started.

        If it was set up and is unavailable, this returns None, and using it raises.
        """
        from ghsync_dagster.wiring import has_kafka

        return None if has_kafka(self.settings()) else _words("Kafka", "KAFKA_BOOTSTRAP_SERVERS")

    def no_mysql(self) -> str | None:
        """Return why there is no MySQL here, as ``no_kafka`` does for Kafka."""
        from ghsync_dagster.wiring import has_mysql

        return None if has_mysql(self.settings()) else _words("MySQL", "MYSQL_URL")

    def open_store(self) -> "UserStore":
        """Open the users' collection."""
        from ghsync_dagster.wiring import store_opener

        return store_opener(self.settings())()

    def open_mysql(self) -> "MySqlStore":
        """Open the table of users.

        Raises:
            UnavailableError: MYSQL_URL is not set and the local server is not up.
        """
        from ghsync_dagster.wiring import open_mysql

        return open_mysql(self.settings())

    def source(self, hours: float | None = None) -> "Finding | None":
        """Return the finding on MySQL's table and settings; None where there is no MySQL here.

        Args:
            hours: How far back Connect's log is read; None for the default.

        Raises:
            GhsyncError: MySQL is unavailable or refuses.
        """
        from ghsync_dagster.wiring import check_source

        if self.no_mysql():
            return None
        return check_source(self.settings(), hours=STATEMENT_HOURS if hours is None else hours)

    def close_statements(self, began: "datetime") -> None:
        """Record that both sides were equal in a comparison that began then."""
        from ghsync_dagster.wiring import close_statements

        close_statements(self.settings(), began)

    def connector(self) -> "ConnectorProbe | None":
        """Return the connector's probe; None where no worker is known."""
        from ghsync_dagster.wiring import connector_probe

        return connector_probe(self.settings())

    def dead_letters(self) -> "OpenLetters":
        """Return the open dead letters."""
        from ghsync_dagster.cdc.dead_letters.index import open_letters

        with self.open_store() as store:
            return open_letters(self.kafka(), store)


def resources_of_environment() -> dict[str, Any]:
    """Return all resources by name, as the environment configures them."""
    spark = SparkResource.of_environment()
    return {
        "spark": spark,
        "batch": BatchResource.of_environment(spark=spark),
        "changes": ChangesResource.of_environment(),
    }


def _words(server: str, variable: str) -> str:
    return f"there is no {server} here: {variable} is not set, and no local one was ever started"
