"""The launchpad's default config of a job: every config field of its ops with its default.

Not here: the fields, which each op's config class declares.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import dagster as dg


def preset(**ops: dg.Config) -> dict[str, Any]:
    """Return a run's config with every field of the config of ops.

    Args:
        ops: The config by the op's name; that of a check is ASSET_CHECK.
    """
    return {"ops": {name: {"config": config.model_dump()} for name, config in ops.items()}}
