"""The jobs of the batch flow: which assets and checks run together, by name.

Not here: what they do.
"""

from __future__ import annotations

import dagster as dg

from ghsync_dagster.defs.batch.assets import GROUP
from ghsync_dagster.defs.batch.checks import CHECKS

# Without the checks of the change flow, which need Kafka and MySQL.
_CHECKS = dg.AssetSelection.checks(*CHECKS)

users_batch_job = dg.define_asset_job(
    "users_batch_job",
    selection=dg.AssetSelection.groups(GROUP).without_checks() | _CHECKS,
    description="Files of GitHub events to MongoDB, with every check. Fails if a blocking check fails.",
    tags={"ghsync/flow": "batch"},
)

users_audit_job = dg.define_asset_job(
    "users_audit_job",
    selection=_CHECKS,
    description="Every check of the batch assets on what is there now. Writes nothing.",
    tags={"ghsync/flow": "audit"},
)

JOBS = [users_batch_job, users_audit_job]
