"""The assets of the batch flow: raw_events and quarantined_events -> users -> mongo_users.

Belongs here: names, lineage, launchpad config and metadata. What happens is in ``batch/``.
"""

# No annotations from __future__: Dagster wants the types of context and config, not their names.
from collections.abc import Iterator

import dagster as dg

from ghsync_dagster.defs.batch import metadata
from ghsync_dagster.defs.errors import as_failure
from ghsync_dagster.defs.resources import BatchResource

GROUP = "batch"
OWNERS = ["team:data-platform"]


class ReadConfig(dg.Config):
    """What the launchpad may set for ``raw_events``."""

    events_path: str | None = None
    """File, folder or glob of events; empty: GHSYNC_EVENTS_PATH."""


@dg.multi_asset(
    name="read_events",
    specs=[
        dg.AssetSpec(
            "raw_events",
            group_name=GROUP,
            owners=OWNERS,
            kinds={"spark", "parquet"},
            description="Typed GitHub events of the input files, one row a good line.",
        ),
        dg.AssetSpec(
            "quarantined_events",
            group_name=GROUP,
            owners=OWNERS,
            kinds={"spark", "parquet"},
            description="Lines that are no usable event: file, line number, reason in words, raw text (capped).",
        ),
    ],
)
def read_events(
    context: dg.AssetExecutionContext, config: ReadConfig, batch: BatchResource
) -> Iterator[dg.MaterializeResult[None]]:
    """Read the input files; every line becomes an event, a quarantined line, or is blank."""
    with as_failure():
        events = batch.settings().events(config.events_path)
        # Without it the run has no target.
        if context.job_def.has_node_named("mongo_users"):
            batch.flow.check_first()
        batch.flow.spark.warm_up()
        report = batch.flow.read([events])
    yield dg.MaterializeResult(asset_key="raw_events", metadata=metadata.of_events(report))
    yield dg.MaterializeResult(asset_key="quarantined_events", metadata=metadata.of_quarantine(report))


@dg.asset(
    deps=["raw_events"],
    group_name=GROUP,
    owners=OWNERS,
    kinds={"spark", "parquet"},
    description="The newest state of every user in the events: the five fields, and the event they came from.",
)
def users(batch: BatchResource) -> dg.MaterializeResult[None]:
    """Flatten the events into users."""
    with as_failure():
        report = batch.flow.flatten()
    return dg.MaterializeResult(metadata=metadata.of_users(report))


@dg.asset(
    # The load needs no changes: they are here because the stream writes the same collection.
    deps=["users", "users_changes"],
    group_name=GROUP,
    owners=OWNERS,
    kinds={"spark", "mongodb"},
    pool="mongo_users",
    description="The MongoDB collection new_data.Users after the load: new users inserted, older states replaced, "
    "everything else left, verified by exceptAll, no marker.",
)
def mongo_users(context: dg.AssetExecutionContext, batch: BatchResource) -> dg.MaterializeResult[None]:
    """Load the users into MongoDB and verify them."""
    with as_failure():
        report = batch.flow.load(context.run.run_id, on_step=lambda step: context.log.info(f"load: {step}"))
    return dg.MaterializeResult(metadata=metadata.of_load(report, batch.settings()))


ASSETS = [read_events, users, mongo_users]
