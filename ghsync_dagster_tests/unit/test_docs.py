"""What README and docs name is there: links, files, tests, commands, jobs, settings and collections."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import typer
import typer.main

from ghsync_dagster.cli.app import app
from ghsync_dagster.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("*/README.md"))]
CODE: Final = re.compile(r"```.*?```", re.DOTALL)
LINK: Final = re.compile(r"\]\(([^)\s]+)\)")
COMMAND: Final = re.compile(r"(?<![\w./-])ghsync ((?:[a-z]+ ?)+)((?:--?[a-z-]+|[^`\n|;#])*)")
NAMES: Final = re.compile(r"\b(GHSYNC_[A-Z_]+[A-Z])\b(?![_*])")
FILES: Final = re.compile(r"`((?:[\w-]+/)*[\w-]+\.(?:py|sh|toml|yaml|md))`")
PAGE_IDS: Final = [str(page.relative_to(ROOT)) for page in PAGES]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.+)$", CODE.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_each_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.findall(text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_each_file_that_is_named_is_there(page: Path) -> None:
    folders = ("ghsync_dagster", "ghsync_dagster_tests", "benchmarks", "docs", "data")
    paths = [*ROOT.glob("*"), *(path for folder in folders for path in (ROOT / folder).rglob("*"))]
    there = {*(path.relative_to(ROOT).as_posix() for path in paths), "dagster.yaml"}
    for name in FILES.findall(page.read_text(encoding="utf-8")):
        assert any(f"/{path}".endswith(f"/{name}") for path in there), name


def described(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], set[str] | None]]:
    """Yield each command's path and its options; None for a group."""
    group = getattr(command, "commands", None)
    yield path, None if group else {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
    for name, sub in (group or {}).items():
        yield from described(sub, (*path, name))


def wrong_commands(text: str) -> list[str]:
    """The commands in a page's code that the program does not have, or not with these options."""
    known = dict(described(typer.main.get_command(app)))
    wrong = []
    code = [*CODE.findall(text), *re.findall(r"`[^`\n]+`", CODE.sub("", text))]
    for words, rest in (found for part in code for found in COMMAND.findall(part)):
        names = tuple(words.split())
        path = next(names[:at] for at in range(len(names), -1, -1) if names[:at] in known)
        options = set(re.findall(r"(?<=[\s\[])--[a-z][a-z-]*", f" {rest}"))
        has = known[path]
        if (has is None and path != names) or not options <= (has or set()) | {"--help"}:
            wrong.append(f"{words}{rest}")
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_each_command_and_option_that_is_named_is_there(page: Path) -> None:
    assert wrong_commands(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text", ["`ghsync mend`", "```\nghsync cdc mend\n```", "run `ghsync cdc repair --everyone`", "`ghsync cdc --all`"]
)
def test_a_command_that_is_not_there_is_found(text: str) -> None:
    assert len(wrong_commands(text)) == 1
    assert wrong_commands("the ghsync way; `ghsync cdc repair --all`, `ghsync up connect`, `ghsync cdc`") == []


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_each_setting_that_is_named_is_read(page: Path) -> None:
    fields = {str(field.validation_alias) for field in Settings.model_fields.values()}
    named = set(NAMES.findall(page.read_text(encoding="utf-8")))
    assert named <= fields


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_each_job_and_sensor_that_is_named_is_defined(page: Path) -> None:
    defined = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "ghsync_dagster" / "defs").rglob("*.py"))
    for name in re.findall(r"\b(?:cdc|users)_\w+_(?:job|sensor)\b", page.read_text(encoding="utf-8")):
        assert f'"{name}"' in defined or f"def {name}(" in defined, name


def test_each_collection_beside_the_users_is_in_the_list_of_them() -> None:
    modules = (ROOT / "ghsync_dagster" / "stores" / "mongo").glob("*.py")
    sources = "".join(path.read_text(encoding="utf-8") for path in modules)
    # What an earlier build kept is only moved.
    found = set(re.findall(r'\.book\("([a-z_]+)"\)', sources)) - {"again"}
    listed = set(re.findall(r"(?m)^\| `_ghsync_([a-z_]+)`", (ROOT / "docs" / "batch.md").read_text(encoding="utf-8")))
    assert {"repairs", "readings", "dead_letters", "versions"} <= found
    assert found <= listed
