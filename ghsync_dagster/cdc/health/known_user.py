"""One user on both sides: the stored document, its origin, and its row in MySQL.

Belongs here: reading it. Not here: a judgement over all users, which is the audit's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ghsync_dagster.domain.errors import GhsyncError
from ghsync_dagster.domain.letters import LetterState
from ghsync_dagster.domain.user import USER_FIELDS
from ghsync_dagster.stores.mongo.letters import LetterIndex
from ghsync_dagster.stores.mongo.repairs import RepairRequests
from ghsync_dagster.stores.mysql import is_key

if TYPE_CHECKING:
    from collections.abc import Callable

    from ghsync_dagster.stores.mongo.commands import Document
    from ghsync_dagster.stores.mongo.users import StoredVersion, UserStore
    from ghsync_dagster.stores.mysql import MySqlStore

NO_ROW = "no row"
_NOT_ASKED = "not asked: "
NO_MYSQL = f"{_NOT_ASKED}there is no MySQL here"
NO_KEY = f"{_NOT_ASKED}no row can have this user_id"
EQUAL = "equal"
_AWAY = "no answer: "


@dataclass(frozen=True, slots=True)
class KnownUser:
    """One user on both sides.

    Attributes:
        user_id: The user.
        stored: The stored document without ``_id``; None where there is none.
        version: The event of the load that wrote it; None where the stream or another writer wrote it.
        deleted: Whether the stream's deletion is recorded, so that no load inserts the user again.
        repair: The newest repair: its state, outcome, problem and time; None where none was requested.
        open_letters: Ids of the user's open dead letters.
        mysql: ``equal``, ``no row``, the fields that differ, or why it was not asked or did not answer.
    """

    user_id: str
    stored: Document | None
    version: StoredVersion | None
    deleted: bool
    repair: Document | None
    open_letters: list[str]
    mysql: str

    @property
    def is_known(self) -> bool:
        """Whether anything is known of the user on either side."""
        here = self.stored or self.deleted or self.repair or self.open_letters
        return bool(here) or not (self.mysql == NO_ROW or self.mysql.startswith(_NOT_ASKED) or self.is_mysql_away)

    @property
    def is_mysql_away(self) -> bool:
        """Whether MySQL was asked and did not answer."""
        return self.mysql.startswith(_AWAY)

    def as_json(self) -> dict[str, Any]:
        """Return all of it for a program."""
        return asdict(self)


def known_user(store: UserStore, topic: str, user_id: str, open_mysql: Callable[[], MySqlStore] | None) -> KnownUser:
    """Read what is known of a user.

    Args:
        store: The open store.
        topic: The topic of changes, whose indexed dead letters are searched.
        user_id: The user.
        open_mysql: Opens the table; None where there is no MySQL here.

    Raises:
        UnavailableError: MongoDB went away. A fault of MySQL is in ``mysql`` instead.
    """
    stored = store.users_by_id([user_id]).get(user_id)
    letters = LetterIndex(store, topic).of_users([user_id])
    return KnownUser(
        user_id=user_id,
        stored=stored,
        version=store.versions_by_id([user_id]).get(user_id),
        deleted=bool(store.deleted_among([user_id])),
        repair=RepairRequests(store).newest_of(user_id),
        open_letters=sorted(letter.id for letter in letters if letter.state is LetterState.OPEN),
        mysql=_compared(user_id, stored, open_mysql),
    )


def _compared(user_id: str, stored: Document | None, open_mysql: Callable[[], MySqlStore] | None) -> str:
    if open_mysql is None:
        return NO_MYSQL
    if not is_key(user_id):
        return NO_KEY
    try:
        with open_mysql() as mysql:
            row = mysql.rows_by_id([user_id]).get(user_id)
    except GhsyncError as error:
        return f"{_AWAY}{error.message}"
    if row is None:
        return NO_ROW
    found = stored or {}
    differs = [f"{name} {row[name]!r}" for name in USER_FIELDS if stored is None or row[name] != found.get(name)]
    return ", ".join(differs) or EQUAL
