"""The assets of the change flow: mysql_users -> users_changes (both from outside) -> dead_letters.

Belongs here: names, lineage and what is said of them. ``mongo_users``, which the changes lead to as well, is with the
batch assets.
"""

# No annotations from __future__: Dagster wants the types of context and config, not their names.
import dagster as dg

from ghsync_dagster.defs.cdc import metadata
from ghsync_dagster.defs.cdc.slice import USERS_CHANGES
from ghsync_dagster.defs.errors import as_failure
from ghsync_dagster.defs.resources import ChangesResource
from ghsync_dagster.domain.table import COLUMNS, DATABASE, KEY, TABLE
from ghsync_dagster.settings import Settings

GROUP = "cdc"
OWNERS = ["team:data-platform"]

_DEFAULTS = {name: field.default for name, field in Settings.model_fields.items()}

mysql_users = dg.AssetSpec(
    "mysql_users",
    group_name=GROUP,
    owners=OWNERS,
    kinds={"mysql"},
    description="MySQL's table of users, the source of the changes. Debezium follows its binlog; ghsync reads it only "
    "in the check in_step_with_mysql.",
    metadata={
        "dagster/table_name": f"{DATABASE}.{TABLE}",
        "server": "MYSQL_URL, or the local server of ghsync up",
        "dagster/column_schema": dg.TableSchema(
            [
                dg.TableColumn(
                    column.name,
                    column.type,
                    constraints=dg.TableColumnConstraints(nullable=column.nullable, unique=column.name == KEY),
                )
                for column in COLUMNS
            ]
        ),
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
        "topic": f"KAFKA_TOPIC, {_DEFAULTS['kafka_topic']} by default",
        "dead_letter_topic": "the topic's name with .dlq at its end",
        "consumer_group": f"KAFKA_GROUP_ID, {_DEFAULTS['kafka_group_id']} by default",
        "connector": "CONNECT_URL, or the local worker of ghsync up",
        "events": dg.MetadataValue.url("https://debezium.io/documentation/reference/stable/connectors/mysql.html"),
        "guide": dg.MetadataValue.path("docs/cdc.md"),
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
