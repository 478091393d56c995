"""MariaDB and MySQL: connections, by PyMySQL, and what their statements need."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import pymysql
from pymysql.constants import CLIENT
from sqlalchemy import URL, Engine, Table, event
from sqlalchemy.dialects import mysql

from celery_singleton_state.compat import close_silently, read_timeout

from .connections import APPLICATION_NAME, pooled
from .statements import Statements
from .url import refuse_missing_files, refuse_unknown_options

#: Options of PyMySQL's that a text cannot say, or that it refuses.
_NOT_IN_URLS = frozenset(
    {"auth_plugin_map", "autocommit", "client_flag", "compress", "conv", "cursorclass"}
    | {"defer_connect", "named_pipe", "self", "ssl"}
)
_INSTEAD = dict.fromkeys(
    ("ssl", "sslmode", "ssl_mode"), "ssl_ca=<file of the certificate authority>"
)
#: SQLAlchemy's options of a URL.
_SQLALCHEMYS = frozenset({"ssl_capath", "ssl_cipher", "ssl_check_hostname"})

#: Characters of a statement that may be larger than the server takes. What is smaller than its
#: buffer it reads, and then says so.
LARGE = 4096
#: MySQL's own number for that.
TOO_LARGE = 1153
#: MySQL's own number for a plugin by which the user cannot log in.
PLUGIN_FAILED = 2061


class Connection(pymysql.connections.Connection):  # type: ignore[misc]
    """A connection whose patience with a server that stays silent can be changed.

    It knows whether it was broken off in mid-statement, by a time limit say.
    """

    is_in_mid_statement = False
    _max_allowed_packet: int | None = None

    def query(self, sql: str | bytes, *args: Any, **kwargs: Any) -> Any:
        if len(sql) >= LARGE:
            sql = self._with_allowed_size(sql)
        return self._whole(super().query, sql, *args, **kwargs)

    def _with_allowed_size(self, sql: str | bytes) -> bytes:
        """The bytes of a large statement, as they are sent.

        :raises pymysql.DataError: they are more than the server takes. It would close the
            connection over them, which looks like an outage.
        """
        data = sql.encode(self.encoding, "surrogateescape") if isinstance(sql, str) else sql
        if self._max_allowed_packet is None:
            with self.cursor(pymysql.cursors.Cursor) as cursor:
                cursor.execute("SELECT @@max_allowed_packet")
                self._max_allowed_packet = int(cursor.fetchone()[0])
        if len(data) >= self._max_allowed_packet:
            raise pymysql.DataError(
                TOO_LARGE,
                f"a statement of {len(data)} bytes is larger than the server's "
                f"max_allowed_packet, which is {self._max_allowed_packet}",
            )
        return data

    def next_result(self, *args: Any, **kwargs: Any) -> Any:
        return self._whole(super().next_result, *args, **kwargs)

    def _whole(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.is_in_mid_statement = True
        try:
            result = step(*args, **kwargs)
        except pymysql.MySQLError:
            self.is_in_mid_statement = not self.open
            raise
        self.is_in_mid_statement = False
        return result

    def leave_to_parent(self) -> None:
        """In a forked child. The session's end is not sent."""
        close_silently(self)

    #: Seconds; ``None``: for ever.
    patience = read_timeout


def _options(url: URL) -> dict[str, Any]:
    """The options of a URL.

    :raises ImproperlyConfigured: PyMySQL does not know one of them, or a file is missing.
    """
    own = inspect.signature(pymysql.connections.Connection.__init__).parameters
    refuse_unknown_options(url.query, set(own) - _NOT_IN_URLS | _SQLALCHEMYS, "PyMySQL", _INSTEAD)
    files = ("ssl_ca", "ssl_cert", "ssl_key", "ssl_capath", "read_default_file")
    refuse_missing_files("singleton_store_url", url.query, files)
    return dict(url.query)


#: What makes a transaction of a text, and is not sent within one.
_OF_TRANSACTIONS = ("SET TRANSACTION", "START TRANSACTION", "COMMIT")


class MySqlStatements(Statements):
    """Each statement may be several, sent as one text."""

    now = "SYSDATE(6)"
    # To set the level of all that come after, and to set it back, would be four round trips.
    level = "AUTOCOMMIT"
    begin = "SET TRANSACTION ISOLATION LEVEL READ COMMITTED; START TRANSACTION"
    encoding_advice = "ALTER TABLE … MODIFY … CHARACTER SET utf8mb4 mends that"

    @staticmethod
    def rows(cursor: Any) -> Sequence[tuple[Any, ...]]:
        """The rows of the last statement that has any to tell."""
        found: Sequence[tuple[Any, ...]] = ()
        while True:
            if cursor.description:
                found = cursor.fetchall()
            if not cursor.nextset():
                return found

    def parts(self, statement: str) -> Sequence[str]:
        parts = super().parts(statement)
        return [part for part in parts if not part.startswith(_OF_TRANSACTIONS)]

    def upsert(self, table: Table, row: dict[str, Any], change: dict[str, Any] | None) -> Any:
        insert = mysql.insert(table).values(row)
        return insert.on_duplicate_key_update(change or {"key": table.c.key})


STATEMENTS = MySqlStatements


def make(url: URL, io_timeout: float, pool_size: int, connect_timeout: float) -> Engine:
    """An engine.

    :raises ImproperlyConfigured: what the URL says is not allowed.
    """
    engine = pooled(
        url.set(query=_options(url)),
        pool_size,
        io_timeout,
        connect_args={
            "charset": "utf8mb4",
            "client_flag": CLIENT.MULTI_STATEMENTS | CLIENT.FOUND_ROWS,
            "connect_timeout": connect_timeout,
            "read_timeout": io_timeout,
            "write_timeout": io_timeout,
            "program_name": APPLICATION_NAME,
            # Times are UTC, and a text that is too long is an error.
            "init_command": "SET time_zone = '+00:00', sql_mode = 'TRADITIONAL',"
            f" innodb_lock_wait_timeout = {math.ceil(io_timeout)}",
        },
    )

    @event.listens_for(engine, "do_connect")
    def connect(_dialect: Any, _record: Any, args: Any, kwargs: Any) -> Connection:
        try:
            return Connection(*args, **kwargs)
        except RuntimeError as error:  # of a package that PyMySQL needs for some ways to log in
            raise pymysql.OperationalError(PLUGIN_FAILED, str(error)) from error

    return engine
