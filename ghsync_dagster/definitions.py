"""The code location: all of ghsync's definitions for Dagster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dagster as dg

from ghsync_dagster.defs.batch import assets as batch_assets
from ghsync_dagster.defs.batch import checks as batch_checks
from ghsync_dagster.defs.batch import jobs as batch_jobs
from ghsync_dagster.defs.cdc import assets as cdc_assets
from ghsync_dagster.defs.cdc import checks as cdc_checks
from ghsync_dagster.defs.cdc import connector_watch, source_watch
from ghsync_dagster.defs.cdc import jobs as cdc_jobs
from ghsync_dagster.defs.cdc import repair as cdc_repair
from ghsync_dagster.defs.cdc import sensors as cdc_sensors
from ghsync_dagster.defs.links import with_code
from ghsync_dagster.defs.ops import alerts
from ghsync_dagster.defs.resources import resources_of_environment

if TYPE_CHECKING:
    from collections.abc import Mapping


def build_defs(resource_overrides: Mapping[str, Any] | None = None) -> dg.Definitions:
    """Build the definitions.

    Args:
        resource_overrides: Resources by name, which replace the real ones in tests.
    """
    return dg.Definitions(
        assets=with_code([*batch_assets.assets(), *cdc_assets.ASSETS]),
        asset_checks=[*batch_checks.CHECKS, *cdc_checks.CHECKS],
        jobs=[*batch_jobs.JOBS, *cdc_jobs.JOBS, *cdc_jobs.ASSET_JOBS, *cdc_repair.JOBS],
        schedules=cdc_jobs.SCHEDULES,
        sensors=[
            *alerts.SENSORS,
            *cdc_sensors.SENSORS,
            *connector_watch.SENSORS,
            *cdc_repair.SENSORS,
            *source_watch.SENSORS,
        ],
        resources={**resources_of_environment(), **(resource_overrides or {})},
        # One process, because the steps share one Spark session.
        executor=dg.in_process_executor,
    )


defs = build_defs()
