"""What README and docs name is there: links, files, tests, commands, jobs, settings and collections."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import typer
import typer.main

from ghsync_dagster.cli.app import app
from ghsync_dagster.definitions import defs
from ghsync_dagster.defs.errors import kind_of
from ghsync_dagster.domain.errors import PermanentError, TransientError
from ghsync_dagster.settings import Settings
from ghsync_dagster.stores.mongo.client import LEASES
from ghsync_dagster.stores.mongo.schema import BOOKS
from ghsync_dagster_tests.support.reference_pages import PARTS, REFERENCE, written

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
    ROOT / "data" / "README.md",
]
MEAN_WORDS: Final = 16
MOST_WORDS: Final = 35
CODE: Final = re.compile(r"```.*?```", re.DOTALL)
LINK: Final = re.compile(r"\]\(([^)\s]+)\)")
COMMAND: Final = re.compile(r"(?<![\w./-])ghsync ((?:[a-z]+ ?)+)((?:--?[a-z-]+|[^`\n|;#])*)")
NAMES: Final = re.compile(r"\b(GHSYNC_[A-Z_]+[A-Z])\b(?![_*])")
FILES: Final = re.compile(r"`((?:[\w-]+/)*[\w-]+\.(?:py|sh|toml|yaml|md)|(?:[\w-]+/)+[\w.-]+\.json)`")
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


def test_the_page_of_collections_lists_each_book() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "ghsync_dagster").rglob("*.py"))
    found = {*re.findall(r'\.book\("([a-z_]+)"\)', sources), *BOOKS, LEASES.removeprefix("_ghsync_")}
    page = (REFERENCE / "collections.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"(?m)^\| `_ghsync_([a-z_]+)`", page))
    assert {"repairs", "readings", "dead_letters", "versions"} <= found
    assert found == listed


@pytest.mark.parametrize("name", sorted(PARTS))
def test_the_reference_says_what_the_code_says(name: str) -> None:
    pages = [path for path in REFERENCE.glob("*.md") if f"<!-- made of {name} -->" in path.read_text(encoding="utf-8")]
    assert len(pages) == 1
    page = pages[0].read_text(encoding="utf-8")
    assert written(page) == page, "Run python -m ghsync_dagster_tests.support.reference_pages."


def test_the_runbook_has_a_section_for_each_check() -> None:
    runbook = ROOT / "docs" / "operate" / "runbook.md"
    checks = {spec.name for one in defs.asset_checks or () for spec in one.check_specs}
    assert checks <= anchors(runbook)


def test_the_runbook_has_a_section_for_each_kind_of_failed_run() -> None:
    kinds = {*map(kind_of, (TransientError, PermanentError, None)), "data"}
    assert {f"a-run-failed-kind-{kind}" for kind in kinds} <= anchors(ROOT / "docs" / "operate" / "runbook.md")


def test_the_index_lists_each_decision_by_its_title() -> None:
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text(encoding="utf-8")
    for page in folder.glob("[0-9]*.md"):
        number, _, title = page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ").partition(": ")
        assert f"| [{number}]({page.name}) | {title} |" in index


def sentences(text: str) -> list[str]:
    """The sentences of a page's prose: paragraphs and items of lists, without code blocks, tables and headings."""
    prose = re.sub(r"(?m)^(\||#|<!--).*$", "", CODE.sub("\n", text))
    prose = re.sub(r"!?\[([^\]]*)\]\([^)\s]+\)", r"\1", prose)
    blocks = re.split(r"\n\s*\n|\n\s*(?:[-*]|[0-9]+\.) ", f"\n{prose}")
    ends = r"(?<=[.!?])[*_)\"]* +(?=[`*_(\"]*[A-Z0-9`_.])"
    return [one for block in blocks for one in re.split(ends, " ".join(block.split())) if re.search(r"\w", one)]


def words_of(sentence: str) -> int:
    """How many words a sentence has; a command in it counts by its words."""
    return len([word for word in sentence.split() if re.search(r"\w", word)])


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_sentences_are_short(page: Path) -> None:
    found = sentences(page.read_text(encoding="utf-8"))
    assert [one for one in found if words_of(one) > MOST_WORDS] == []
    assert sum(map(words_of, found)) <= MEAN_WORDS * len(found)


def test_sentences_are_counted_in_paragraphs_and_lists_alone() -> None:
    prose = "# A head. With two\nOne `two.three` four. Five\nsix!\n- seven\n- [eight nine](a.md). Ten\n"
    text = f"{prose}```\ncode. More\n```\n| a | b |\n"
    found = sentences(text)
    assert found == ["One `two.three` four.", "Five six!", "seven", "eight nine.", "Ten"]
    assert [words_of(one) for one in found] == [3, 2, 1, 2, 1]
