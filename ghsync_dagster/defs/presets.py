"""With which config the launchpad of a job opens: everything that its ops may be given, with its default.

Not here: what may be set, which each op's config says.
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
