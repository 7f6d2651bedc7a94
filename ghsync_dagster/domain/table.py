"""The one declaration of MySQL's table of users: its columns and its statement.

Not here: which other tables the stream accepts, see ``domain.source``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ghsync_dagster.domain.user import COLUMN_WIDTH, USER_FIELDS

DATABASE: Final = "new_data"
TABLE: Final = "Users"
KEY: Final = USER_FIELDS[0]
_REQUIRED: Final = ("user_id", "login")


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table.

    Attributes:
        name: Its name, in the changes too.
        type: Its SQL type.
        nullable: Whether it may be NULL.
    """

    name: str
    type: str
    nullable: bool


COLUMNS: Final = tuple(
    Column(name, "BIGINT" if name == KEY else f"VARCHAR({COLUMN_WIDTH})", name not in _REQUIRED) for name in USER_FIELDS
)


def quoted(name: str) -> str:
    """Return any name, quoted for SQL.

    >>> quoted("odd`name")
    '`odd``name`'
    """
    return f"`{name.replace('`', '``')}`"


def create_table(name: str = quoted(TABLE)) -> str:
    """Return the statement that creates the table if it does not exist.

    Args:
        name: Quoted, with its database where needed.
    """
    columns = ", ".join(
        f"{quoted(column.name)} {column.type}{'' if column.nullable else ' NOT NULL'}" for column in COLUMNS
    )
    return f"CREATE TABLE IF NOT EXISTS {name} ({columns}, PRIMARY KEY ({quoted(KEY)})) CHARACTER SET utf8mb4"
