"""The jobs of the batch flow: which assets and checks run together, and the launchpad's default config.

Not here: what they do. Dagster has one default config a job, so each preset is a job of its own.
"""

from __future__ import annotations

from typing import Any, Final

import dagster as dg

from ghsync_dagster.defs.batch.assets import SAMPLE_TAG, ReadConfig, mongo_users, read_events, users
from ghsync_dagster.defs.batch.checks import CHECKS, QuarantineConfig
from ghsync_dagster.defs.presets import preset
from ghsync_dagster.settings import Settings

# Without the checks of the change flow, which need Kafka and MySQL.
_CHECKS = dg.AssetSelection.checks(*CHECKS)
_BATCH = dg.AssetSelection.assets(read_events, users, mongo_users).without_checks() | _CHECKS
_SAMPLE: Final = Settings.model_fields["events_path"].default


def _config(*, events_path: str | None = None, max_quarantined_ratio: float | None = None) -> dict[str, Any]:
    """Return the config of a load; None: as the settings say."""
    return preset(
        read_events=ReadConfig(events_path=events_path),
        raw_events_quarantined_ratio=QuarantineConfig(max_quarantined_ratio=max_quarantined_ratio),
    )


users_batch_job = dg.define_asset_job(
    "users_batch_job",
    selection=_BATCH,
    config=_config(),
    description="Files of GitHub events to MongoDB, with every check. Fails if a blocking check fails.",
    tags={"ghsync/flow": "batch"},
)

users_sample_job = dg.define_asset_job(
    "users_sample_job",
    selection=_BATCH,
    config=_config(events_path=_SAMPLE),
    description="Preset of users_batch_job: the sample, whatever GHSYNC_EVENTS_PATH names. For the local MongoDB only.",
    tags={"ghsync/flow": "batch", SAMPLE_TAG: "true"},
)

users_strict_job = dg.define_asset_job(
    "users_strict_job",
    selection=_BATCH,
    config=_config(max_quarantined_ratio=0.0),
    description="Preset of users_batch_job: a single bad line fails the gate, and nothing is loaded.",
    tags={"ghsync/flow": "batch"},
)

users_audit_job = dg.define_asset_job(
    "users_audit_job",
    selection=_CHECKS,
    config=preset(raw_events_quarantined_ratio=QuarantineConfig()),
    description="Every check of the batch assets on what is there now. Writes nothing.",
    tags={"ghsync/flow": "audit"},
)

JOBS = [users_batch_job, users_sample_job, users_strict_job, users_audit_job]
