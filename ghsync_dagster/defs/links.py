"""Links of the UI to the code of an asset and to its documentation.

Belongs here: links into the repository where GHSYNC_GIT_URL names it, else paths on this machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import dagster as dg

from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster.settings import load_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ghsync_dagster.settings import Settings

_PACKAGE: Final = Path(__file__).parents[1]


def repository() -> Settings | None:
    """Return the settings if they name the repository; None also if they are invalid, as each run fails on that."""
    try:
        settings = load_settings()
    except ConfigError:
        return None
    return settings if settings.git_url else None


def guide(page: str) -> dict[str, Any]:
    """Return metadata with a link to a page of the documentation: its URL, or its file if that exists here.

    Args:
        page: Path in the repository.
    """
    if settings := repository():
        middle = "/-/blob/" if _platform(settings) == "gitlab" else "/blob/"
        return {"guide": dg.MetadataValue.url(f"{settings.git_url}{middle}{settings.git_revision}/{page}")}
    file = _PACKAGE.parent / page
    return {"guide": dg.MetadataValue.path(str(file))} if file.is_file() else {}


def with_code(assets: Sequence[Any]) -> list[Any]:
    """Return assets with references to their code: in the repository where it is named, else on this machine.

    Args:
        assets: Definitions; specs have no code.
    """
    found = list(dg.with_source_code_references(assets))
    settings = repository()
    if settings is None or settings.git_url is None:
        return found
    mapping = dg.AnchorBasedFilePathMapping(_PACKAGE / "__init__.py", f"{_PACKAGE.name}/__init__.py")
    return list(
        dg.link_code_references_to_git(
            found, settings.git_url, settings.git_revision, mapping, platform=_platform(settings)
        )
    )


def _platform(settings: Settings) -> Any:  # noqa: ANN401  a literal of Dagster's own
    return "gitlab" if "gitlab" in (settings.git_url or "").partition("://")[2].partition("/")[0] else "github"
