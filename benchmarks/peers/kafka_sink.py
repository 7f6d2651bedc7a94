"""MongoDB's own Kafka sink connector in a Connect worker, set up to end in the right state and as fast as it gets.

Belongs here: the files and the command line of a standalone Connect worker with the sink. Not here: anything of ghsync.

Writes are ordered, since the connector loses documents otherwise: it regroups the deletes and creates of a key that
fall into one batch. Its own handler of Debezium's events makes each ``_id`` a document, ``{"user_id": 1}``, which some
servers look up by reading the whole collection. So Kafka's own transformations take the row out of the event, and the
number itself becomes the ``_id``: an event without a row after it is a delete, and its tombstone is left out, since it
would be a second one. ``user_id`` is made a string, as the collection's validator demands. (Debezium's
``ExtractNewRecordState`` lets records without schemas pass as they are.)

The names of settings are those of Kafka Connect 4 and mongo-kafka-connect 2.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

NAME = "mongo-sink"
DEAD = "Task is being killed"
"""What the worker logs when the connector has failed permanently; the worker itself goes on."""
JSON = "org.apache.kafka.connect.json.JsonConverter"
SINK = "com.mongodb.kafka.connect.MongoSinkConnector"
# What the connector gets in one batch: of 500, Kafka's default, 2,000 and 5,000 the fastest.
POLL_RECORDS = 2_000
# As the scripts of Kafka start a worker.
JVM_OPTIONS = (
    *("-Xms256M", "-Xmx2G", "-server", "-XX:+UseG1GC", "-XX:MaxGCPauseMillis=20"),
    *("-XX:InitiatingHeapOccupancyPercent=35", "-XX:+ExplicitGCInvokesConcurrent", "-Djava.awt.headless=true"),
)
LOG4J = """status=warn
appender.err.type=Console
appender.err.name=err
appender.err.target=SYSTEM_ERR
appender.err.layout.type=PatternLayout
appender.err.layout.pattern=%d{ISO8601} %-5p %m [%c]%n
rootLogger.level=WARN
rootLogger.appenderRef.err.ref=err
"""


@dataclass(frozen=True)
class Worker:
    """What a worker is made of.

    Attributes:
        java: The program.
        kafka_jars: Kafka's jars.
        sink_jar: The connector's jar with all that it needs.
        ordered: Whether it writes in order; it is wrong where it does not.
    """

    java: Path
    kafka_jars: Sequence[Path]
    sink_jar: Path
    ordered: bool = True

    def command(
        self, folder: Path, *, bootstrap: str, topic: str, schemas: bool, uri: str, database: str, collection: str
    ) -> list[str]:
        """Write the worker's files into a new folder, and return its command line.

        Args:
            folder: Gets settings, offsets and the plugin.
            bootstrap: The brokers.
            topic: What to read, from its beginning.
            schemas: Whether the records carry their schemas.
            uri: MongoDB's connection string.
            database: Where to write.
            collection: Where to write.
        """
        plugin = folder / "plugins" / NAME
        plugin.mkdir(parents=True)
        (plugin / self.sink_jar.name).symlink_to(self.sink_jar)
        # Without a manifest the worker would look into each class of each jar, which takes half a minute.
        with zipfile.ZipFile(plugin / "manifests.jar", "w") as jar:
            jar.writestr("META-INF/services/org.apache.kafka.connect.sink.SinkConnector", f"{SINK}\n")
        worker = {
            "bootstrap.servers": bootstrap,
            "listeners": "http://127.0.0.1:0",
            "offset.storage.file.filename": folder / "offsets",
            "plugin.path": plugin.parent,
            "plugin.discovery": "service_load",
            # Asked for by the worker; the connector has its own.
            "key.converter": JSON,
            "value.converter": JSON,
        }
        sink = connector(topic, schemas=schemas) | {
            "bulk.write.ordered": str(self.ordered).lower(),
            "connection.uri": uri,
            "database": database,
            "collection": collection,
        }
        files = {
            "worker.properties": _properties(worker),
            "sink.properties": _properties(sink),
            "log4j2.properties": LOG4J,
        }
        for name, text in files.items():
            (folder / name).write_text(text, encoding="ascii")
        return [
            *(str(self.java), *JVM_OPTIONS, f"-Dlog4j2.configurationFile={(folder / 'log4j2.properties').as_uri()}"),
            *("-cp", ":".join(map(str, self.kafka_jars)), "org.apache.kafka.connect.cli.ConnectStandalone"),
            *(str(folder / "worker.properties"), str(folder / "sink.properties")),
        ]


def connector(topic: str, *, schemas: bool) -> dict[str, str]:
    """Return the connector's settings, but for where and in which order it writes."""
    enabled = str(schemas).lower()
    return {
        "name": NAME,
        "connector.class": SINK,
        "tasks.max": "1",
        "topics": topic,
        "key.converter": JSON,
        "value.converter": JSON,
        "key.converter.schemas.enable": enabled,
        "value.converter.schemas.enable": enabled,
        "document.id.strategy": "com.mongodb.kafka.connect.sink.processor.id.strategy.ProvidedInKeyStrategy",
        "writemodel.strategy": "com.mongodb.kafka.connect.sink.writemodel.strategy.ReplaceOneDefaultStrategy",
        "delete.on.null.values": "true",
        "transforms": "once,row,id,text",
        "transforms.once.type": "org.apache.kafka.connect.transforms.Filter",
        "transforms.once.predicate": "tombstone",
        "predicates": "tombstone",
        "predicates.tombstone.type": "org.apache.kafka.connect.transforms.predicates.RecordIsTombstone",
        "transforms.row.type": "org.apache.kafka.connect.transforms.ExtractField$Value",
        "transforms.row.field": "after",
        "transforms.id.type": "org.apache.kafka.connect.transforms.ReplaceField$Key",
        "transforms.id.renames": "user_id:_id",
        "transforms.text.type": "org.apache.kafka.connect.transforms.Cast$Value",
        "transforms.text.spec": "user_id:string",
        "consumer.override.isolation.level": "read_committed",
        "consumer.override.auto.offset.reset": "earliest",
        "consumer.override.max.poll.records": str(POLL_RECORDS),
        # With Kafka's default of 1 MiB a poll of one partition gets fewer records than that.
        "consumer.override.max.partition.fetch.bytes": str(16 * 1024 * 1024),
    }


def _properties(values: Mapping[str, object]) -> str:
    return "".join(f"{name}={value}\n" for name, value in values.items())
