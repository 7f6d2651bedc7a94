"""The assets of the change flow: mysql_users -> users_changes (both from outside) -> dead_letters.

Belongs here: names, lineage and descriptions. ``mongo_users``, which depends on the changes too, is with the batch
assets.
"""

# No annotations from __future__: Dagster wants the types of context and config, not their names.
from collections.abc import Mapping

import dagster as dg

from ghsync_dagster.defs.batch.columns import OF_USERS, USERS_CHANGES
from ghsync_dagster.defs.cdc import metadata
from ghsync_dagster.defs.errors import as_failure
from ghsync_dagster.defs.links import guide
from ghsync_dagster.defs.resources import ChangesResource
from ghsync_dagster.domain.table import COLUMNS, DATABASE, KEY, TABLE
from ghsync_dagster.settings import Settings

GROUP = "cdc"
OWNERS = ["team:data-platform"]

MYSQL_USERS = "mysql_users"

_DEFAULTS = {name: field.default for name, field in Settings.model_fields.items()}


def _schema(types: Mapping[str, str]) -> dg.TableSchema:
    """Return the table's columns with the given types."""
    return dg.TableSchema(
        [
            dg.TableColumn(
                column.name,
                types[column.name],
                description=OF_USERS[column.name],
                constraints=dg.TableColumnConstraints(nullable=column.nullable, unique=column.name == KEY),
            )
            for column in COLUMNS
        ]
    )


mysql_users = dg.AssetSpec(
    MYSQL_USERS,
    group_name=GROUP,
    owners=OWNERS,
    kinds={"mysql"},
    description="MySQL's table of users, the source of the changes. Debezium follows its binlog; ghsync asks it for "
    "rows in the check in_step_with_mysql and in repairs, and for its settings in source_settings.",
    metadata={
        "dagster/table_name": f"{DATABASE}.{TABLE}",
        "server": "MYSQL_URL, or the local server of ghsync up",
        "dagster/column_schema": _schema({column.name: column.type for column in COLUMNS}),
    },
)

users_changes = dg.AssetSpec(
    USERS_CHANGES,
    deps=[mysql_users],
    group_name=GROUP,
    owners=OWNERS,
    kinds={"kafka", "debezium"},
    description="The Kafka topic of Debezium's change events. cdc_sync_job applies them to the collection and observes "
    "here what it does: counts, lag, latency, retries, errors.",
    metadata={
        # Of the rows before and after, within Debezium's envelope.
        "dagster/column_schema": _schema(
            {column.name: "int64" if column.name == KEY else "string" for column in COLUMNS}
        ),
        "dagster/column_lineage": dg.TableColumnLineage(
            {column.name: [dg.TableColumnDep(MYSQL_USERS, column.name)] for column in COLUMNS}
        ),
        "topic": f"KAFKA_TOPIC, {_DEFAULTS['kafka_topic']} by default",
        "dead_letter_topic": "the topic's name with .dlq at its end",
        "consumer_group": f"KAFKA_GROUP_ID, {_DEFAULTS['kafka_group_id']} by default",
        "connector": "CONNECT_URL, or the local worker of ghsync up",
        "events": dg.MetadataValue.url("https://debezium.io/documentation/reference/stable/connectors/mysql.html"),
        **guide("docs/explain/changes.md"),
    },
)


@dg.asset(
    deps=[users_changes],
    group_name=GROUP,
    owners=OWNERS,
    kinds={"kafka"},
    description="Records of the topic that could not be decoded or that the database refused, kept whole in a topic of "
    "their own. Materializing lists those that are open now; it changes no user.",
)
def dead_letters(changes: ChangesResource) -> dg.MaterializeResult[None]:
    """List the dead letters."""
    with as_failure():
        if no_kafka := changes.no_kafka():
            return dg.MaterializeResult(metadata={"dagster/row_count": 0, "why": no_kafka})
        found = metadata.of_dead_letters(changes.dead_letters(), changes.kafka().dead_letter_topic)
    return dg.MaterializeResult(metadata=found)


ASSETS: list[dg.AssetSpec | dg.AssetsDefinition] = [mysql_users, users_changes, dead_letters]
