"""The assets of the batch flow: event_files -> raw_events and quarantined_events -> users -> mongo_users.

Belongs here: names, lineage, versions, launchpad config and metadata. What happens is in ``batch/``.
"""

# No annotations from __future__: Dagster wants the types of context and config, not their names.
from collections.abc import Iterator
from datetime import timedelta

import dagster as dg

from ghsync_dagster.batch.versions import UNKNOWN, code_version, version_of
from ghsync_dagster.defs.batch import metadata
from ghsync_dagster.defs.batch.columns import (
    EVENT_FILES,
    MONGO_USERS,
    QUARANTINED_EVENTS,
    RAW_EVENTS,
    TABLES,
    USERS,
    USERS_CHANGES,
)
from ghsync_dagster.defs.errors import as_failure
from ghsync_dagster.defs.links import guide
from ghsync_dagster.defs.resources import BatchResource
from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster.logging import redact
from ghsync_dagster.settings import Settings, load_settings

GROUP = "batch"
TARGET = "target"
OWNERS = ["team:data-platform"]
FRESHNESS = dg.FreshnessPolicy.time_window(fail_window=timedelta(days=7), warn_window=timedelta(days=2))
"""How old loaded data may be. The windows are wide, as no schedule runs a load."""
_GUIDE = guide("docs/explain/files.md")


def _of_load(code: str, settings: Settings) -> str:
    """Return the version of the code and the target, so that another target does not look in sync."""
    uri = settings.mongodb_uri
    server = str(settings.home_dir) if uri is None else redact(uri.get_secret_value())
    return version_of(code, server, settings.mongodb_database, settings.mongodb_collection)


def _made_from(code: str, **inputs: str) -> dict[str, str]:
    """Return the tags with the input versions of a materialization.

    Dagster would use the versions that it knows of. The flow may have read others, written by ``ghsync batch`` or named
    in the launchpad. Then the asset must not look in sync.

    Args:
        code: Version of the code; empty where a flow was built without one.
        inputs: Versions of the inputs, by their assets.
    """
    versions = {f"dagster/input_data_version/{asset}": version for asset, version in inputs.items()}
    return {tag: version or version_of(UNKNOWN) for tag, version in {"dagster/code_version": code, **versions}.items()}


SAMPLE_TAG = "ghsync/sample"
"""Tag of runs that load the sample, which only the local MongoDB accepts."""


class ReadConfig(dg.Config):
    """What the launchpad may set for raw_events."""

    events_path: str | None = None
    """File, folder or glob of events, several as a JSON list; empty: GHSYNC_EVENTS_PATH."""


@dg.multi_observable_source_asset(  # type: ignore[untyped-decorator]  # it names no type
    name=EVENT_FILES,
    specs=[
        dg.AssetSpec(
            EVENT_FILES,
            group_name=GROUP,
            owners=OWNERS,
            kinds={"file", "json"},
            description="The files that GHSYNC_EVENTS_PATH names, from outside. Observing looks at them without "
            "opening any: raw_events is in sync as long as no path, size, time or inode has changed. Each read "
            "observes what it has read.",
            metadata={**TABLES[EVENT_FILES].metadata(), **_GUIDE},
        )
    ],
)
def event_files(batch: BatchResource) -> Iterator[dg.ObserveResult]:
    """Find the input files."""
    with as_failure():
        state = batch.flow.find_input(batch.settings().events())
    yield dg.ObserveResult(EVENT_FILES, data_version=dg.DataVersion(state.version), metadata=metadata.of_input(state))


@dg.multi_asset(
    name="read_events",
    specs=[
        dg.AssetSpec(
            RAW_EVENTS,
            deps=[EVENT_FILES],
            group_name=GROUP,
            owners=OWNERS,
            kinds={"spark", "parquet"},
            freshness_policy=FRESHNESS,
            description="Typed GitHub events of the input files, one row a good line.",
            metadata={**TABLES[RAW_EVENTS].metadata(), **_GUIDE},
        ),
        dg.AssetSpec(
            QUARANTINED_EVENTS,
            deps=[EVENT_FILES],
            group_name=GROUP,
            owners=OWNERS,
            kinds={"spark", "parquet"},
            freshness_policy=FRESHNESS,
            description="Lines that are no usable event: file, line number, reason in words, raw text (capped).",
            metadata={**TABLES[QUARANTINED_EVENTS].metadata(), **_GUIDE},
        ),
    ],
)
def read_events(
    context: dg.AssetExecutionContext, config: ReadConfig, batch: BatchResource
) -> Iterator[dg.MaterializeResult[None]]:
    """Read the input files; every line becomes an event, a quarantined line, or is blank."""
    with as_failure():
        if SAMPLE_TAG in context.run.tags:
            batch.settings().refuse_sample()
        events = batch.settings().events([config.events_path] if config.events_path else ())
        batch.flow.check_first(events, has_target=context.job_def.has_node_named("mongo_users"))
        report = batch.flow.read(events)
    context.log_event(
        dg.AssetObservation(
            EVENT_FILES,
            metadata={"files": len(report.files), "lines": report.lines, "paths": metadata.of_paths(events)},
            tags={"dagster/data_version": report.input_version},
        )
    )
    tags = _made_from(batch.flow.code_version, **{EVENT_FILES: report.input_version})
    version = dg.DataVersion(report.data_version)
    yield dg.MaterializeResult(RAW_EVENTS, metadata=metadata.of_events(report), data_version=version, tags=tags)
    yield dg.MaterializeResult(
        QUARANTINED_EVENTS, metadata=metadata.of_quarantine(report), data_version=version, tags=tags
    )


@dg.asset(
    name=USERS,
    deps=[RAW_EVENTS],
    group_name=GROUP,
    owners=OWNERS,
    kinds={"spark", "parquet"},
    freshness_policy=FRESHNESS,
    description="The newest state of every user in the events: its fields, and the event they came from.",
    metadata={**TABLES[USERS].metadata(), **_GUIDE},
)
def users(batch: BatchResource) -> dg.MaterializeResult[None]:
    """Flatten the events into users."""
    with as_failure():
        report = batch.flow.flatten()
    return dg.MaterializeResult(
        metadata=metadata.of_users(report),
        data_version=dg.DataVersion(report.data_version),
        tags=_made_from(batch.flow.code_version, **{RAW_EVENTS: report.input_version}),
    )


@dg.asset(
    name=MONGO_USERS,
    # The load does not need the changes. They are a dependency, as the stream writes the same collection.
    deps=[USERS, USERS_CHANGES],
    group_name=TARGET,
    owners=OWNERS,
    kinds={"spark", "mongodb"},
    pool="mongo_users",
    freshness_policy=FRESHNESS,
    description="The MongoDB collection new_data.Users after the load: new users inserted, older states replaced, "
    "everything else left, verified by exceptAll, no marker.",
    metadata={**TABLES[MONGO_USERS].metadata(), **guide("docs/explain/precedence.md")},
)
def mongo_users(context: dg.AssetExecutionContext, batch: BatchResource) -> dg.MaterializeResult[None]:
    """Load the users into MongoDB and verify them."""
    with as_failure():
        report = batch.flow.load(context.run.run_id, on_step=lambda step: context.log.info(f"load: {step}"))
        stored = batch.flow.count_users()
    return dg.MaterializeResult(
        metadata=metadata.of_load(report, batch.settings(), stored),
        # Each load results in a new version, as the stream may have changed the collection since the last one.
        data_version=dg.DataVersion(report.load_id),
        tags=_made_from(_of_load(batch.flow.code_version, batch.settings()), **{USERS: report.input_version}),
    )


def assets() -> list[dg.AssetsDefinition]:
    """Return the assets, with the versions of the code and of the target that the settings name now."""
    try:
        settings = load_settings()
        code = code_version(settings.rules_module)
        of_load = _of_load(code, settings)
    except ConfigError:
        # Each run fails with this error, so it is not lost.
        code = of_load = version_of(UNKNOWN)

    def versioned(spec: dg.AssetSpec) -> dg.AssetSpec:
        return spec.replace_attributes(code_version=of_load if spec.key == dg.AssetKey(MONGO_USERS) else code)

    return [event_files, *dg.map_asset_specs(versioned, [read_events, users, mongo_users])]
