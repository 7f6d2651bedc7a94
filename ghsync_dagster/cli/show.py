"""The command ``ghsync show``: all that is stored about a user.

Belongs here: arguments and what is printed. Not here: where it comes from (``cdc.health.known_user``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import typer

from ghsync_dagster.cli.common import TRANSIENT, AsJson, configured, print_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ghsync_dagster.cdc.health.known_user import KnownUser

NOT_KNOWN: Final = 1


def show(
    user_ids: Annotated[list[str], typer.Argument(metavar="USER_ID...", help="The users, as MongoDB holds their ids.")],
    as_json: AsJson = False,
) -> None:
    """Show what is known of a user: what is stored and from where, deletions, repairs, dead letters, MySQL's row.

    Writes nothing. Exit code 1 where nothing is known of one, 2 where an id is no whole number, 3 where MySQL, which
    may know more, does not answer.
    """
    from ghsync_dagster.cdc.health.known_user import known_user
    from ghsync_dagster.cdc.health.repair_requests import user_ids as checked
    from ghsync_dagster.wiring import has_mysql, open_mysql, store_opener

    settings = configured()
    # Before a server is used: a login is no id, and the answer that it is unknown would mislead.
    ids = checked(user_ids)
    opener = (lambda: open_mysql(settings)) if has_mysql(settings) else None
    with store_opener(settings)() as store:
        found = [known_user(store, settings.kafka_topic, user_id, opener) for user_id in ids]
    if as_json:
        print_json([user.as_json() for user in found])
    else:
        for user in found:
            for name, text in _lines(user):
                typer.echo(f"{name:13} {text}")
            typer.echo("")
    unknown = [user for user in found if not user.is_known]
    if unknown:
        raise typer.Exit(TRANSIENT if any(user.is_mysql_away for user in unknown) else NOT_KNOWN)


def _lines(user: KnownUser) -> Iterator[tuple[str, str]]:
    yield "user_id", user.user_id
    if user.stored is None:
        yield "stored", "no"
    else:
        yield from ((name, repr(value)) for name, value in user.stored.items() if name != "user_id")
        version = user.version
        writer = f"event {version.event_id} of {version.created_at}, load {version.load}" if version else "the stream"
        yield "written by", writer
    yield "deleted", "by the stream: no file brings the user back" if user.deleted else "no"
    if user.repair:
        yield "repair", ", ".join(f"{name} {value}" for name, value in user.repair.items() if value)
    yield "dead letters", ", ".join(user.open_letters) or "none is open"
    yield "MySQL", user.mysql
