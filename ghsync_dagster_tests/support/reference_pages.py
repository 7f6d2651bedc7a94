"""The parts of docs/reference/ that the code knows better: commands, settings, checks, kinds and metrics.

A page holds such a part between ``<!-- made of NAME -->`` and ``<!-- end -->``. Run this file to write them again;
test_docs.py holds the pages equal to the code.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import typer.main

from ghsync_dagster.cdc.health.connector import ConnectorReport
from ghsync_dagster.cdc.health.metrics import ChangeMetrics
from ghsync_dagster.cdc.stream import listener
from ghsync_dagster.cli.app import app
from ghsync_dagster.definitions import defs
from ghsync_dagster.domain.connector import ConnectorState, Sample
from ghsync_dagster.domain.envelope import Refusal
from ghsync_dagster.settings import Settings
from ghsync_dagster.stores.mongo.writer import KINDS_OF_REFUSED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

REFERENCE: Final = Path(__file__).parents[2] / "docs" / "reference"
PART: Final = re.compile(r"(<!-- made of (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_OF_DATABASE: Final = {
    "bad-value": "The database takes no such value.",
    "index-key-too-long": "A value is longer than an index takes.",
    "too-large": "The document is larger than the database takes.",
    "unencodable": "The record cannot be encoded as BSON.",
    "unique-index": "A unique index that somebody else made refuses the document.",
    "validator": "The collection's own validator refuses the document.",
}


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown."""
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _commands(command: Any, path: str = "ghsync") -> Iterator[tuple[str, Any]]:
    subcommands: dict[str, Any] = getattr(command, "commands", {})
    if not subcommands:
        yield path, command
    for name in sorted(subcommands):
        yield from _commands(subcommands[name], f"{path} {name}")


def _options(command: Any) -> Iterator[tuple[str, str, str]]:
    for one in command.params:
        help_text = str(getattr(one, "help", "") or "")
        if one.param_type_name == "argument":
            yield f"`{one.name.upper()}{'...' if one.nargs < 0 else ''}`", help_text, ""
        else:
            names = ", ".join(f"`{name}`" for name in (*one.opts, *one.secondary_opts))
            shown = one.default if isinstance(one.default, int | float | str) and not one.is_flag else None
            yield names, help_text, "" if shown is None else f"`{shown}`"


def commands() -> str:
    """Return each command with its arguments and options."""
    parts = []
    for path, command in _commands(typer.main.get_command(app)):
        help_text = re.sub(r"\s+", " ", str(command.help).strip())
        options = list(_options(command))
        parts.append(
            f"### {path}\n{help_text}\n" + ("\n" + table(("", "means", "default"), options) if options else "")
        )
    return "\n".join(parts)


def jobs() -> str:
    """Return the jobs of the code location."""
    found = {job.name: job.description or "" for job in defs.resolve_all_job_defs() if not job.name.startswith("__")}
    return table(("job", "does"), ((f"`{name}`", _line(words)) for name, words in sorted(found.items())))


def sensors() -> str:
    """Return the sensors and schedules of the code location."""
    found = {one.name: one for one in (*(defs.sensors or ()), *(defs.schedules or ()))}
    rows = (
        (f"`{name}`", _line(one.description or ""), "on" if one.default_status.value == "RUNNING" else "off")
        for name, one in sorted(found.items())
        if hasattr(one, "default_status")
    )
    return table(("sensor or schedule", "does", "by default"), rows)


def checks() -> str:
    """Return the asset checks, each with its page of the runbook."""
    rows = []
    for definition in defs.asset_checks or ():
        for spec in definition.check_specs:
            link = f"[`{spec.name}`](../operate/runbook.md#{spec.name})"
            blocking = "yes" if spec.blocking else "no"
            rows.append((link, f"`{spec.asset_key.to_user_string()}`", blocking, _line(spec.description or "")))
    return table(("check", "on", "blocking", "holds that"), rows)


def settings() -> str:
    """Return the settings in the order of their declaration."""
    rows = []
    for field in Settings.model_fields.values():
        default = "" if field.default in (None, "") else f"`{field.default}`"
        rows.append((f"`{field.validation_alias}`", default, str(field.description)))
    return table(("variable", "default", "means"), rows)


def refusals() -> str:
    """Return the kinds of records that cannot be decoded."""
    rows = ((f"`{one.kind}`", one.words, one.way_out) for one in Refusal)
    return table(("kind", "what is the matter", "way out"), rows)


def refused() -> str:
    """Return the kinds of records that the database refuses."""
    rows = ((f"`{kind}`", _OF_DATABASE[kind]) for kind in sorted(KINDS_OF_REFUSED))
    return table(("kind", "what is the matter"), rows)


def metrics() -> str:
    """Return the metrics of a consumer, as Prometheus gets them."""
    rows = []
    for family in _measured().registry.collect():
        if not family.name.startswith("ghsync_"):
            continue
        labels = sorted({name for sample in family.samples for name in sample.labels} - {"le"})
        name = f"{family.name}_total" if family.type == "counter" else family.name
        rows.append((f"`{name}`", family.type, ", ".join(f"`{label}`" for label in labels), family.documentation))
    return table(("metric", "type", "labels", "means"), sorted(rows))


def _measured() -> ChangeMetrics:
    """Return metrics in which each family has a sample."""
    metrics = ChangeMetrics()
    metrics.batch_applied(
        listener.AppliedBatch({("c", listener.APPLIED): 1}, 2, [1], [1], broken_rules={"": 1}, unknown_columns={"": 1})
    )
    metrics.lag(0, 1, 1.0)
    metrics.retried("")
    metrics.failed("")
    metrics.dead_letter("")
    metrics.repaired("")
    metrics.connection(listener.MONGO, up=False)
    metrics.connector(ConnectorReport(ConnectorState("RUNNING", ""), Sample(0), time.time()))
    return metrics


def _line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


PARTS: Final[dict[str, Callable[[], str]]] = {
    made.__name__: made for made in (commands, jobs, sensors, checks, settings, refusals, refused, metrics)
}


def written(page: str) -> str:
    """Return a page with its parts made again."""
    return PART.sub(lambda found: f"{found[1]}{PARTS[found[2]]()}{found[3]}", page)


if __name__ == "__main__":
    for path in REFERENCE.glob("*.md"):
        path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
