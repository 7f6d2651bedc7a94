"""MySQL: the table ``Users`` that the change stream mirrors.

Belongs here: single reads and transactions, and how the driver's failures translate to ours. Not here: how a
``MYSQL_URL`` is parsed, what is compared with what, or which changes a workload makes.

A row leaves this module in the shape of a stored user: ``user_id`` as a decimal string, the columns' text or None.
Rows are ordered by the number, as the signed BIGINT key is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pymysql
from pymysql.constants import CLIENT, CR, ER

from ghsync_dagster.domain.errors import ConfigError, RefusedError, UnavailableError
from ghsync_dagster.domain.key_order import integer_ranges
from ghsync_dagster.domain.source import KEY_BITS, SETTINGS, Source, SourceColumn, lock_problems
from ghsync_dagster.domain.table import TABLE, create_table, quoted
from ghsync_dagster.domain.user import USER_FIELDS
from ghsync_dagster.logging import redact
from ghsync_dagster.stores.mysql_url import connect, parse_mysql_url, tls_context, tls_problem

if TYPE_CHECKING:
    from pymysql.connections import Connection
    from pymysql.cursors import Cursor

Row = dict[str, str | None]
Statement = tuple[str, Sequence[object]]
"""SQL with ``%s`` in the place of each value, and the values."""
Query = Callable[[str, Sequence[object]], Sequence[tuple[Any, ...]] | None]
"""Runs one query with its values and returns the rows; None where the server refuses this query."""

KEY_MIN: Final = -(2**63)
KEY_MAX: Final = 2**63 - 1
"""The range of a signed BIGINT."""

_CANONICAL: Final = re.compile(r"0|-?[1-9][0-9]{0,19}")
_SEPARATOR: Final = b"\xff"
_NULL: Final = b"\xfe"
"""Bytes that no UTF-8 text contains, so that fields and nulls stay distinct in a row's bytes."""
_QUERY_TIMEOUTS: Final = 6
"""The time-out of a query, in time-outs of a connection: a count reads the whole table."""

_NET_READ_ERROR: Final = range(1158, 1162)
_UNAVAILABLE: Final = frozenset(
    {
        0,  # the driver's own: the connection is closed already
        CR.CR_CONNECTION_ERROR,
        CR.CR_CONN_HOST_ERROR,
        CR.CR_UNKNOWN_HOST,
        CR.CR_SERVER_GONE_ERROR,
        CR.CR_SERVER_LOST,
        CR.CR_COMMANDS_OUT_OF_SYNC,
        CR.CR_SERVER_LOST_EXTENDED,
        ER.CON_COUNT_ERROR,
        ER.SERVER_SHUTDOWN,
        ER.NORMAL_SHUTDOWN,
        ER.FORCING_CLOSE,
        ER.TOO_MANY_USER_CONNECTIONS,
        ER.LOCK_WAIT_TIMEOUT,
        ER.LOCK_DEADLOCK,
        ER.QUERY_INTERRUPTED,
        *_NET_READ_ERROR,
        1927,  # MariaDB: the connection was killed
        3024,  # the query took longer than the server allows
        4031,  # MySQL: disconnected for inactivity
    }
)
_CREDENTIALS: Final = frozenset(
    {
        ER.ACCESS_DENIED_ERROR,
        ER.DBACCESS_DENIED_ERROR,
        ER.TABLEACCESS_DENIED_ERROR,
        ER.COLUMNACCESS_DENIED_ERROR,
        ER.SPECIFIC_ACCESS_DENIED_ERROR,
        ER.HOST_NOT_PRIVILEGED,
        ER.HOST_IS_BLOCKED,
        1698,  # MariaDB and MySQL: access denied by an authentication plug-in
        4151,  # MariaDB: the account is locked
        3118,  # MySQL: the account is locked
    }
)
_NO_RIGHTS_OR_NO_SUCH: Final = frozenset({1044, 1064, 1142, 1143, 1227})
"""The server's codes for a statement that the account may not run, or that its version does not know."""
_CHANGING_ACTIONS: Final = ("CASCADE", "SET NULL", "SET DEFAULT")
_MISSING: Final = frozenset({ER.BAD_DB_ERROR, ER.NO_SUCH_TABLE, ER.BAD_FIELD_ERROR})


_LOCK_NOWAIT: Final = 3572
"""MySQL: NOWAIT found a row lock of another transaction. MariaDB answers LOCK_WAIT_TIMEOUT."""
_TABLE_LOCK_SECONDS: Final = 2
"""How long to wait for a table that is being altered."""


class LockedRows(NamedTuple):
    """Rows, and the binlog position while their keys were locked.

    Attributes:
        rows: By ``user_id``; a missing key has no row.
        server_id: The server's ``server_id``.
        file: The binlog file that it writes.
        pos: The end of that file.
        gtids: The GTIDs in the binlog, in the server's own form; empty where it has none.
        read_ms: The server's clock, in milliseconds since 1970 UTC.
    """

    rows: dict[str, Row]
    server_id: int
    file: str
    pos: int
    gtids: str
    read_ms: int


class _Dialect(NamedTuple):
    """The SQL and the error codes in which MariaDB and versions of MySQL differ."""

    locking: str
    locked: int
    binlog_end: str
    gtids: str

    @classmethod
    def of(cls, version: str) -> _Dialect:
        if "mariadb" in version.lower():
            return cls(
                "LOCK IN SHARE MODE NOWAIT", ER.LOCK_WAIT_TIMEOUT, "SHOW MASTER STATUS", "@@GLOBAL.gtid_binlog_pos"
            )
        major, minor = (int(number) for number in re.findall(r"\d+", version)[:2])
        end = "SHOW BINARY LOG STATUS" if (major, minor) >= (8, 2) else "SHOW MASTER STATUS"
        return cls("FOR SHARE NOWAIT", _LOCK_NOWAIT, end, "@@GLOBAL.gtid_executed")


@contextmanager
def mysql_errors(what: str) -> Iterator[None]:
    """Translate the driver's failures to ours, credentials masked.

    Raises:
        UnavailableError: The server can't be reached, is busy, or ended the connection.
        RefusedError: The server answered and refused, or its certificate is not trusted.
        ConfigError: There is no such database, table or column.
    """
    try:
        yield
    except pymysql.MySQLError as error:
        raise _translated(what, error) from None
    except OSError as error:
        # The driver does not wrap a read that fails in the middle of an answer.
        raise _unavailable(what, f"{type(error).__name__}: {error}") from None


def _translated(what: str, error: pymysql.MySQLError) -> ConfigError | RefusedError | UnavailableError:
    code = error.args[0] if error.args and isinstance(error.args[0], int) else 0
    text = f"code {code}: {_first_line(str(error.args[-1] if error.args else error))}"
    if problem := tls_problem(error):
        return RefusedError(f"{what}: {problem[0]}.", way_out=problem[1])
    if code in _UNAVAILABLE or isinstance(error, pymysql.InterfaceError):
        return _unavailable(what, text)
    if code in _MISSING:
        return ConfigError(
            f"{what}: {text}.", way_out="Check the database in MYSQL_URL; docs/reference/source.md describes the table."
        )
    hint = (
        "Check the user, password and rights behind MYSQL_URL."
        if code in _CREDENTIALS
        else "Read the server's answer above."
    )
    return RefusedError(f"{what}: MySQL refused ({text}).", way_out=hint)


def _unavailable(what: str, why: str) -> UnavailableError:
    return UnavailableError(
        f"{what}: MySQL can't be reached or can't answer now ({_first_line(why)}).",
        way_out="Check that the server is up (ghsync status) and that MYSQL_URL names it; then run again.",
    )


def _first_line(text: str) -> str:
    return (redact(text).splitlines() or ["no message"])[0][:300].rstrip(".")


def is_key(key: str) -> bool:
    """Return whether a ``user_id`` is a signed BIGINT in canonical form.

    >>> [is_key(key) for key in ("42", "-7", "007", "-0", "9223372036854775808", "octo")]
    [True, True, False, False, False, False]
    """
    return _is_integer(key) and KEY_MIN <= int(key) <= KEY_MAX


def _is_integer(key: str) -> bool:
    """Return whether a ``user_id`` is a signed or unsigned 64-bit integer in canonical form."""
    return _CANONICAL.fullmatch(key) is not None and KEY_MIN <= int(key) <= 2 * KEY_MAX + 1


@dataclass(frozen=True, slots=True)
class Span:
    """An interval of keys in the order of their text: above ``after``, at most ``upto``.

    Attributes:
        after: None: from the first key on.
        upto: None: to the last key.
    """

    after: str | None = None
    upto: str | None = None


def hash_sum(users: Iterable[Mapping[str, Any]]) -> int:
    """Return the sum of users' hashes, each the first 128 bits of SHA-256 over the five fields.

    ``MySqlStore.digest`` computes the same in SQL. It is a sum, since equal hashes would cancel out under XOR.

    Raises:
        KeyError: A field is not there.
        AttributeError: A field is neither text nor None.
        UnicodeEncodeError: A text has half of a surrogate pair.
    """
    # No calls of our own in the loop: it runs for every document of the collection.
    total, sha256, number = 0, hashlib.sha256, int.from_bytes
    for user in users:
        parts = [_NULL if (value := user[name]) is None else value.encode() for name in USER_FIELDS]
        total += number(sha256(_SEPARATOR.join(parts)).digest()[:16], "big")
    return total


@dataclass(frozen=True, slots=True)
class _Key:
    """How the column ``user_id`` is read.

    Attributes:
        text: SQL of the number, or of the text where the type is no integer.
        order: SQL by which keys are compared: the number, or the bytes of the text, whatever its collation.
        unreadable: The condition that a key is null, or bytes that are no text.
        limits: The least and the largest number that it can hold; None for a type that is no integer.
    """

    text: str
    order: str
    unreadable: str
    limits: tuple[int, int] | None

    @classmethod
    def of(cls, kind: str, is_unsigned: bool) -> _Key:
        """Return how a column of a type is read, such as ``bigint``."""
        if bits := KEY_BITS.get(kind):
            limits = (0, 2**bits - 1) if is_unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            return cls("`user_id`", "`user_id`", "`user_id` IS NULL", limits)
        text = "CONVERT(`user_id` USING utf8mb4)"
        order = f"CAST({text} AS BINARY)"
        unreadable = f"{text} IS NULL"
        if kind.endswith(("binary", "blob")):
            # One of the servers replaces each byte that is no text by a question mark.
            unreadable = f"({unreadable} OR {order} <> `user_id`)"
        return cls(text, order, unreadable, None)

    def value(self, text: str) -> object:
        """Return the value by which the server compares a key."""
        return int(text) if self.limits else text.encode()

    def columns(self) -> str:
        """Return the SQL of all columns."""
        return ", ".join([self.text, *(f"`{name}`" for name in USER_FIELDS[1:])])

    def within(self, span: Span) -> tuple[str, tuple[object, ...]] | None:
        """Return the condition that a row's key is in a span, with its values; None where no row can be."""
        if self.limits is not None:
            ranges = integer_ranges(span.after, span.upto, *self.limits)
            values = tuple(bound for both in ranges for bound in both)
            return (" OR ".join(["`user_id` BETWEEN %s AND %s"] * len(ranges)), values) if ranges else None
        given = [(sign, bound.encode()) for sign, bound in ((">", span.after), ("<=", span.upto)) if bound is not None]
        conditions = [f"NOT {self.unreadable}", *(f"{self.order} {sign} %s" for sign, _ in given)]
        return " AND ".join(conditions), tuple(value for _, value in given)


class MySqlStore:
    """The table of users over one connection, which is opened on first use and again after it broke.

    Not for several threads at once. Use as a context manager, or call ``close``.

    Args:
        url: As ``parse_mysql_url`` reads it.
        table: The table's name.
        timeout_seconds: How long a connection may take; a query has six times as long.
        in_database: Whether to use the URL's database. Without it, queries work also if it does not exist or
            the account may not use it.

    Raises:
        ConfigError: The URL or its TLS files can't be used.
    """

    def __init__(self, url: str, *, table: str = TABLE, timeout_seconds: float = 10, in_database: bool = True) -> None:
        self.address = parse_mysql_url(url)
        self.table = quoted(table)
        self._name = table
        self._key_column: _Key | None = None
        self._tls = tls_context(self.address)
        self._timeout = timeout_seconds
        self._in_database = in_database
        self._connection: Connection[Cursor] | None = None
        self._dialect: _Dialect | None = None
        self._has_locks = False
        """Whether this connection was checked to lock rows by their key."""

    def __enter__(self) -> MySqlStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, if there is one."""
        connection, self._connection = self._connection, None
        self._has_locks = False
        if connection is not None:
            with suppress(pymysql.MySQLError):
                connection.close()

    def ensure_table(self) -> None:
        """Create the table where there is none."""
        self._run(f"Creating {self.table}", create_table(self.table))

    def version(self) -> str:
        """Return the server's version, such as ``11.4.5-MariaDB-log``."""
        return str(self._run("Asking the version", "SELECT VERSION()")[0][0])

    def source(self) -> Source:
        """Return the server's settings and the table's shape, as far as the account may read them.

        Raises:
            UnavailableError: The server can't be reached.
            RefusedError: It refuses the account or its certificate is not trusted.
        """
        with self._cursor("Looking at the source") as cursor:
            return read_source(partial(_rows_if_allowed, cursor), self.address.database, self._name)

    def followers(self) -> frozenset[int]:
        """Return the ids of connections of the same account that read the binlog now."""
        rows = self._run("Asking who follows", "SHOW PROCESSLIST")
        return frozenset(
            row[0] for row in rows if row[1] == self.address.user and str(row[4]).startswith("Binlog Dump")
        )

    def count(self) -> int:
        """Return the number of rows."""
        query = f"SELECT COUNT(*) FROM {self.table}"  # noqa: S608  only names
        return int(self._run("Counting rows", query)[0][0])

    def _dialect_of_server(self) -> _Dialect:
        if self._dialect is None:
            self._dialect = _Dialect.of(self.version())
        return self._dialect

    def log_end(self) -> str | None:
        """Return the end of the binlog, as ``file:position``; None where none is written.

        Raises:
            RefusedError: The user lacks REPLICATION CLIENT, in MariaDB BINLOG MONITOR.
        """
        found = self._run("Asking where the binlog ends", self._dialect_of_server().binlog_end)
        return f"{found[0][0]}:{found[0][1]}" if found else None

    def rows_by_id(self, keys: Iterable[str]) -> dict[str, Row]:
        """Return the rows of ``keys`` by ``user_id``; a key that the column can't hold has none."""
        key = self._key()
        wanted: list[object] = [
            key.value(one)
            for one in keys
            if key.limits is None or (_is_integer(one) and key.limits[0] <= int(one) <= key.limits[1])
        ]
        if not wanted:
            return {}
        query = f"SELECT {key.columns()} FROM {self.table} WHERE {key.order} IN %s"  # noqa: S608  only names
        return {str(values[0]): _row(values) for values in self._run("Reading rows", query, (wanted,))}

    def digest(self, span: Span, most: int) -> tuple[int, int]:
        """Return the count of a span's rows and their ``hash_sum``, computed by the server; stop at ``most`` rows."""
        key = self._key()
        if not (where := key.within(span)):
            return 0, 0
        texts = (f"IFNULL(CAST(CONVERT(`{name}` USING utf8mb4) AS BINARY), _binary 0xfe)" for name in USER_FIELDS[1:])
        # Not MD5, which MySQL 9.7 does not have.
        # The limit makes the server run the inner query once and first, so no row is hashed twice.
        query = (
            "SELECT COUNT(*), SUM(CAST(CONV(LEFT(hash, 16), 16, 10) AS UNSIGNED)),"  # noqa: S608  only names
            " SUM(CAST(CONV(MID(hash, 17, 16), 16, 10) AS UNSIGNED))"
            f" FROM (SELECT SHA2(CONCAT_WS(_binary 0xff, CAST({key.order} AS BINARY), {', '.join(texts)}), 256) AS hash"
            f" FROM {self.table} WHERE {where[0]} LIMIT %s) AS hashes"
        )
        ((count, high, low),) = self._run("Hashing rows", query, (*where[1], most))
        return int(count), (int(high or 0) << 64) + int(low or 0)

    def rows_within(self, span: Span, above: Mapping[str, str | None] | None, limit: int) -> list[Row]:
        """Return up to ``limit`` rows of a span, in the order of the key; only those above the row ``above``."""
        key = self._key()
        if not (where := key.within(span)):
            return []
        condition, values = where
        if above is not None:
            condition, values = f"({condition}) AND {key.order} > %s", (*values, key.value(str(above["user_id"])))
        query = f"SELECT {key.columns()} FROM {self.table} WHERE {condition} ORDER BY {key.order} LIMIT %s"  # noqa: S608  only names
        return [_row(found) for found in self._run("Reading rows", query, (*values, limit))]

    def rows_outside(self, limit: int) -> tuple[int, list[str]]:
        """Return how many rows are in no span, as their key is null or no text, and up to ``limit`` of these keys."""
        where = f"WHERE {self._key().unreadable}"
        ((count,),) = self._run("Counting rows", f"SELECT COUNT(*) FROM {self.table} {where}")  # noqa: S608  only names
        if not count:
            return 0, []
        query = f"SELECT HEX(`user_id`) FROM {self.table} {where} LIMIT %s"  # noqa: S608  only names
        found = self._run("Reading keys", query, (limit,))
        return int(count), ["null" if key is None else f"0x{key}" for (key,) in found]

    def _key(self) -> _Key:
        if self._key_column is None:
            query = (
                "SELECT DATA_TYPE, COLUMN_TYPE FROM information_schema.COLUMNS"
                " WHERE TABLE_SCHEMA = DATABASE() AND TABLE_NAME = %s AND COLUMN_NAME = 'user_id'"
            )
            found = self._run("Asking the key's type", query, (self._name,))
            # Without the table, the next query fails with the reason.
            kind, words = (str(text).lower() for text in (found[0] if found else ("bigint", "bigint")))
            self._key_column = _Key.of(kind, "unsigned" in words)
        return self._key_column

    def read_locked(self, keys: Iterable[str]) -> LockedRows | None:
        """Read the rows of ``keys`` and the end of the binlog while no other transaction can change these keys.

        A shared lock is held on each key, or on its gap if there is no row, for one round trip. It never waits for a
        row lock, so it causes no deadlock and delays no running transaction.

        Args:
            keys: Few, so that the locks are short. A key that the table cannot hold has no row.

        Returns:
            What was read; None if another transaction has locked one of the keys, with MariaDB also the table.

        Raises:
            ConfigError: The server writes no binlog, or the table's engine or key gives no such locks.
            UnavailableError: The server went away, or MySQL's table is being altered.
            RefusedError: The account may not read the table, or the end of the binlog.
        """
        dialect = self._dialect_of_server()
        self._require_locks()
        wanted = sorted(int(key) for key in keys if is_key(key))
        # The index is forced, as a scan would lock every row that it reads.
        query = f"SELECT {_COLUMNS} FROM {self.table} FORCE INDEX (PRIMARY) WHERE `user_id` IN %s {dialect.locking}"  # noqa: S608  only names
        with self._cursor("Reading rows under locks") as cursor:
            statements = [
                "SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ",
                f"SET SESSION lock_wait_timeout = {_TABLE_LOCK_SECONDS}",
                "START TRANSACTION",
                cursor.mogrify(query, (wanted or (0,),)),
                dialect.binlog_end,
                f"SELECT @@server_id, {dialect.gtids}, ROUND(UNIX_TIMESTAMP(NOW(6)) * 1000)",
                "COMMIT",
            ]
            try:
                cursor.execute("; ".join(statements))
                answers = [cursor.fetchall()]
                while cursor.nextset():
                    answers.append(cursor.fetchall())
            except pymysql.MySQLError as error:
                with suppress(pymysql.MySQLError):
                    cursor.execute("ROLLBACK")
                if error.args and error.args[0] == dialect.locked:
                    return None
                raise
        rows, end, [(server_id, gtids, read_ms)] = answers[3:6]
        if not end:
            raise ConfigError(
                f"{self.address} writes no binlog, so its rows cannot be put in order with the changes.",
                way_out="Let MYSQL_URL name the server that the connector follows.",
            )
        file, pos = str(end[0][0]), int(end[0][1])
        by_key = {str(found[0]): _row(found) for found in rows}
        return LockedRows(by_key, int(server_id), file, pos, str(gtids or ""), int(read_ms))

    def _require_locks(self) -> None:
        """Check once a connection that the table's rows can be locked by their key."""
        if self._has_locks:
            return
        source = self.source()
        if problems := lock_problems(source):
            raise ConfigError(
                f"Rows of {source.name} cannot be locked by user_id, so they cannot be put in order with the changes: "
                f"{'; '.join(problem.text for problem in problems)}.",
                way_out=" ".join(problem.way_out for problem in problems),
            )
        self._has_locks = True

    def execute(self, statements: Sequence[Statement]) -> int:
        """Run statements in one transaction, sent as one request; return how many rows they touched.

        Raises:
            UnavailableError: The server went away; whether the transaction was committed is not known.
            RefusedError: The server refused a statement; nothing of the transaction is there.
        """
        if not statements:
            return 0
        with self._cursor("Changing rows") as cursor:
            if len(statements) == 1:
                return cursor.execute(*statements[0])
            try:
                cursor.execute(
                    "; ".join(["BEGIN", *(cursor.mogrify(*statement) for statement in statements), "COMMIT"])
                )
                changed = cursor.rowcount
                while cursor.nextset():
                    changed += cursor.rowcount
            except pymysql.MySQLError:
                # The server has skipped the statements after the refused one, COMMIT included.
                with suppress(pymysql.MySQLError):
                    cursor.execute("ROLLBACK")
                raise
            return changed

    def _run(self, what: str, query: str, values: Sequence[object] = ()) -> Sequence[tuple[Any, ...]]:
        with self._cursor(what) as cursor:
            return _rows(cursor, query, values)

    @contextmanager
    def _cursor(self, what: str) -> Iterator[Cursor]:
        """Yield a cursor; close a connection whose state is unknown after an error."""
        with mysql_errors(f"{what} of {self.address}"):
            if self._connection is None:
                self._connection = self._connect()
            try:
                with self._connection.cursor() as cursor:
                    yield cursor
            except pymysql.DatabaseError as error:
                if error.args and error.args[0] in _UNAVAILABLE:
                    self.close()
                raise
            except BaseException:
                self.close()
                raise

    def _connect(self) -> Connection[Cursor]:
        return connect(
            self.address,
            self._tls,
            seconds=self._timeout,
            answer_seconds=self._timeout * _QUERY_TIMEOUTS,
            database=self.address.database if self._in_database else None,
            # FOUND_ROWS: an update counts its row also if it changes nothing.
            client_flag=CLIENT.MULTI_STATEMENTS | CLIENT.FOUND_ROWS,
        )


_COLUMNS: Final = ", ".join(f"`{name}`" for name in USER_FIELDS)


def _row(values: tuple[Any, ...]) -> Row:
    key, *texts = values
    return dict(zip(USER_FIELDS, (str(key), *texts), strict=True))


def read_source(query: Query, database: str, table: str) -> Source:
    """Read the server's settings and the table's shape.

    Args:
        query: Runs a query.
        database: The table's database.
        table: The table of users.
    """
    version = str((query("SELECT VERSION()", ()) or [("",)])[0][0])
    settings = query("SHOW GLOBAL VARIABLES WHERE Variable_name IN %s", (SETTINGS,)) or ()
    cipher = query("SHOW SESSION STATUS LIKE 'Ssl_cipher'", ()) or ()
    binlog = _first_answer(query, "SHOW BINARY LOG STATUS", "SHOW MASTER STATUS")
    replica = _first_answer(query, "SHOW REPLICA STATUS", "SHOW SLAVE STATUS")
    # On a server without case in names, the table's name may have another case. The exact name comes first.
    found = query(
        "SELECT TABLE_NAME, TABLE_TYPE, ENGINE FROM information_schema.TABLES WHERE TABLE_SCHEMA = %s"
        " AND LOWER(TABLE_NAME) = LOWER(%s) ORDER BY BINARY TABLE_NAME = BINARY %s DESC",
        (database, table, table),
    )
    name, kind, engine = ([str(part or "") for part in found[0]]) if found else ("", "", "")
    of_table = (database, name)
    columns = query(
        "SELECT COLUMN_NAME, DATA_TYPE, COLUMN_TYPE, IS_NULLABLE FROM information_schema.COLUMNS"
        " WHERE TABLE_SCHEMA = %s AND TABLE_NAME = %s ORDER BY ORDINAL_POSITION",
        of_table,
    )
    indexes = query(
        "SELECT INDEX_NAME, COLUMN_NAME FROM information_schema.STATISTICS WHERE NON_UNIQUE = 0"
        " AND TABLE_SCHEMA = %s AND TABLE_NAME = %s ORDER BY INDEX_NAME <> 'PRIMARY', INDEX_NAME, SEQ_IN_INDEX",
        of_table,
    )
    actions = query(
        "SELECT CONSTRAINT_NAME, DELETE_RULE, UPDATE_RULE FROM information_schema.REFERENTIAL_CONSTRAINTS"
        " WHERE CONSTRAINT_SCHEMA = %s AND TABLE_NAME = %s ORDER BY CONSTRAINT_NAME",
        of_table,
    )
    keys: dict[str, tuple[str, ...]] = {}
    for index, column in indexes or ():
        keys[str(index)] = (*keys.get(str(index), ()), str(column))
    return Source(
        version=version,
        database=database,
        table=table,
        settings={str(setting).lower(): str(value) for setting, value in settings},
        found_as=name or None,
        kind=kind,
        engine=engine,
        columns=tuple(
            SourceColumn(str(column), str(of_type).lower(), str(whole).lower(), str(nullable).upper() == "YES")
            for column, of_type, whole, nullable in columns or ()
        ),
        keys=keys,
        cascades=tuple(
            str(constraint)
            for constraint, *rules in actions or ()
            if any(str(rule).upper() in _CHANGING_ACTIONS for rule in rules)
        ),
        filters=None if binlog is None else (str(binlog[0][2] or ""), str(binlog[0][3] or "")) if binlog else ("", ""),
        replicates=None if replica is None else bool(replica),
        encrypted=any(value for _, value in cipher),
    )


def _first_answer(query: Query, *statements: str) -> Sequence[tuple[Any, ...]] | None:
    """Return the rows of the first statement that the server's version and the account's rights allow."""
    return next((rows for statement in statements if (rows := query(statement, ())) is not None), None)


def _rows(cursor: Cursor, statement: str, values: Sequence[object]) -> Sequence[tuple[Any, ...]]:
    # Without values the driver leaves a % in the text alone.
    cursor.execute(statement, values or None)
    return cursor.fetchall()


def _rows_if_allowed(cursor: Cursor, statement: str, values: Sequence[object]) -> Sequence[tuple[Any, ...]] | None:
    try:
        return _rows(cursor, statement, values)
    except pymysql.MySQLError as error:
        if error.args and error.args[0] in _NO_RIGHTS_OR_NO_SUCH:
            return None
        raise
