"""The command ``ghsync dlq``: changes that could not be applied.

Belongs here: arguments and what is printed. Not here: what a letter is, and what resolves one (``cdc.dead_letters``).
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from ghsync_dagster.cli.common import AsJson, configured, print_json, say
from ghsync_dagster.domain.text import shortened

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from ghsync_dagster.domain.letters import Letter
    from ghsync_dagster.stores.kafka.client import KafkaSettings
    from ghsync_dagster.stores.mongo.letters import LetterIndex
    from ghsync_dagster.stores.mongo.users import UserStore

_SHOWN_TEXT: Final = 80

dlq = typer.Typer(no_args_is_help=True, help="Changes that could not be applied.")

Kind = Annotated[str | None, typer.Option(help="Only those of this kind, such as not-json.")]


@dlq.command("list")
def list_letters(
    kind: Kind = None,
    state: Annotated[str | None, typer.Option(help="Only open, resolved or closed ones.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the newest so many.")] = None,
    as_json: AsJson = False,
) -> None:
    """List dead letters, oldest first, with their users and whether they are open."""
    from ghsync_dagster.domain.letters import LetterState

    _expect("--state", state, list(LetterState))
    _expect_kind(kind)
    at = None if state is None else LetterState(state)
    with _letters() as (_, _, index):
        if limit is None:
            found = index.find(state=at, kind=kind)
        else:
            found = reversed(list(index.find(state=at, kind=kind, limit=limit, newest=True)))
        counts = _print_letters(found, as_json=as_json)
    say(f"listed: {counts.total():,}, of which open: {counts[LetterState.OPEN]:,}")


@dlq.command()
def show(
    ids: Annotated[list[str], typer.Argument(help="Ids as dlq list prints them: topic-partition-offset.")],
    as_json: AsJson = False,
) -> None:
    """Show dead letters whole: key, value, headers, why, the way out, and whether they are open."""
    from ghsync_dagster.cdc.dead_letters.index import no_such_letter
    from ghsync_dagster.cdc.dead_letters.topic import whole_letter
    from ghsync_dagster.domain.envelope import Refusal

    ways_out = {refusal.kind: refusal.way_out for refusal in Refusal}
    wanted = dict.fromkeys(ids)
    with _letters() as (kafka, _, index):
        found = index.by_id(wanted)
        shown = []
        for letter in (found[name] for name in wanted if name in found):
            whole = whole_letter(kafka, letter)
            record = {"record": "gone from the topic of dead letters"} if whole is None else whole.as_json(whole=True)
            way_out = {"way_out": ways_out[letter.kind]} if letter.kind in ways_out else {}
            shown.append(_listed(letter) | record | way_out)
    if as_json:
        print_json(shown)
    else:
        for fields in shown:
            for name, value in fields.items():
                if (name, value) not in (("state_reason", ""), ("state_since", "")):
                    typer.echo(f"{name:13} {value}")
            typer.echo("")
    if missing := wanted.keys() - found.keys():
        raise no_such_letter(missing)


@dlq.command("close")
def close_letters(
    ids: Annotated[list[str] | None, typer.Argument(help="Ids as dlq list prints them.")] = None,
    kind: Annotated[str | None, typer.Option(help="All open ones of this kind.")] = None,
    superseded: Annotated[
        bool,
        typer.Option("--superseded", help="All open ones whose users have a newer record, or a truncate, after them."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Close open dead letters whose changes are no longer needed, and print them; write nothing else."""
    from ghsync_dagster.cdc.dead_letters import closing
    from ghsync_dagster.cdc.dead_letters.index import letters_by_id
    from ghsync_dagster.domain.letters import LetterState

    if [bool(ids), kind is not None, superseded].count(True) != 1:
        raise typer.BadParameter("Give ids, or --kind, or --superseded.")
    _expect_kind(kind)
    with _letters() as (kafka, store, index):
        if superseded:
            closed = closing.close_superseded(kafka, store, index)
        elif ids:
            letters = letters_by_id(index, ids)
            closed = closing.close_letters(index, letters, "closed by id")
        else:
            of_kind = index.find(state=LetterState.OPEN, kind=kind)
            closed = closing.close_letters(index, of_kind, f"closed by kind {kind}")
        counts = _print_letters(closed, as_json=as_json)
    say(f"closed: {counts.total():,}")


def _expect(option: str, given: str | None, known: Collection[str]) -> None:
    if given is not None and given not in known:
        raise typer.BadParameter(f"{given} is none of {', '.join(known)}.", param_hint=option)


def _expect_kind(given: str | None) -> None:
    from ghsync_dagster.domain.envelope import Refusal
    from ghsync_dagster.stores.mongo.writer import KINDS_OF_REFUSED

    _expect("--kind", given, [*(refusal.kind for refusal in Refusal), *sorted(KINDS_OF_REFUSED)])


@contextmanager
def _letters() -> Iterator[tuple[KafkaSettings, UserStore, LetterIndex]]:
    """Open the index of dead letters, with all that their topic holds now."""
    from ghsync_dagster.cdc.dead_letters.index import caught_up_index
    from ghsync_dagster.wiring import existing_kafka, store_opener

    settings = configured()
    kafka = existing_kafka(settings)
    with store_opener(settings)() as store:
        yield kafka, store, caught_up_index(kafka, store)


def _print_letters(letters: Iterable[Letter], *, as_json: bool) -> Counter[str]:
    """Print letters one by one, since there may be many; return how many there were, by state."""
    import msgspec

    counts: Counter[str] = Counter()
    for letter in letters:
        if as_json:
            typer.echo("," if counts else "[")
            typer.echo(msgspec.json.encode(_listed(letter)), nl=False)
        else:
            text = shortened(letter.text, _SHOWN_TEXT)
            user = letter.user or "-"
            typer.echo(f"{letter.id}  {letter.failed_at}  {letter.state:8}  {user}  {letter.kind}: {text}")
        counts[letter.state] += 1
    if as_json:
        typer.echo("\n]" if counts else "[]")
    return counts


def _listed(letter: Letter) -> dict[str, Any]:
    return {
        "id": letter.id,
        "topic": letter.topic,
        "partition": letter.partition,
        "offset": letter.offset,
        "timestamp_ms": letter.timestamp_ms,
        "user_id": letter.user,
        "kind": letter.kind,
        "text": letter.text,
        "failed_at": letter.failed_at,
        "state": letter.state,
        "state_reason": letter.reason,
        "state_since": letter.at,
    }
