"""MariaDB and MySQL: connections, by PyMySQL, and what their statements need."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pymysql
from celery.exceptions import ImproperlyConfigured
from pymysql.constants import CLIENT
from sqlalchemy import URL, Engine, Table
from sqlalchemy.dialects import mysql

from celery_singleton_state.compat import close_silently, read_timeout
from celery_singleton_state.store.options import (
    PORT,
    STORE,
    SWITCH,
    Option,
    refuse_missing_files,
    refuse_unknown_options,
    refuse_what_fails,
    refuse_wrong_hosts,
    whole,
)
from celery_singleton_state.text.urls import shown_url

from .connections import APPLICATION_NAME, pooled
from .statements import Statements
from .url import read_query

#: Options of PyMySQL's that a text cannot say, or that it refuses.
_NOT_IN_URLS = frozenset(
    {"auth_plugin_map", "autocommit", "client_flag", "compress", "conv", "cursorclass"}
    | {"defer_connect", "named_pipe", "self", "ssl"}
)
_INSTEAD = dict.fromkeys(
    ("ssl", "sslmode", "ssl_mode"), "write ssl_ca=<file of the certificate authority>"
)
_SECONDS = whole(1, 31536000)
_OPTIONS: dict[str, Option] = {
    "binary_prefix": SWITCH,
    "connect_timeout": _SECONDS,
    "local_infile": SWITCH,
    "max_allowed_packet": whole(1024),
    "port": PORT,
    "read_timeout": _SECONDS,
    "ssl_check_hostname": SWITCH,
    "ssl_disabled": SWITCH,
    "ssl_verify_cert": SWITCH,
    "ssl_verify_identity": SWITCH,
    "use_unicode": SWITCH,
    "write_timeout": _SECONDS,
}
#: What those options take that PyMySQL reads as it makes a connection.
_ALLOWED = {
    "read_default_file": "a file of MySQL's options, [client] and name=value",
    "ssl_ca": "a file with certificates in PEM",
    "ssl_cert": "a file with a certificate in PEM, whose key is in it or in ssl_key",
    "ssl_cipher": "ciphers as OpenSSL names them, with colons between them",
    "ssl_key": "a file with the key of ssl_cert in PEM",
    "ssl_key_password": "the password of the key in ssl_key",
}
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
    query = _options(url)
    _refuse_missing_database(url, query)
    texts, values = _divided(query)
    own = {
        "charset": "utf8mb4",
        "client_flag": CLIENT.MULTI_STATEMENTS | CLIENT.FOUND_ROWS,
        "connect_timeout": connect_timeout,
        "read_timeout": io_timeout,
        "write_timeout": io_timeout,
        "program_name": APPLICATION_NAME,
        # Times are UTC, and a text that is too long is an error.
        "init_command": "SET time_zone = '+00:00', sql_mode = 'TRADITIONAL',"
        f" innodb_lock_wait_timeout = {math.ceil(io_timeout)}",
    }
    engine = pooled(
        url.set(query=texts), pool_size, io_timeout, _connect, connect_args=values | own
    )
    given = engine.dialect.create_connect_args(engine.url)[1]
    refuse_wrong_hosts(STORE, [given.get("host") or ""])
    if url.query:
        refuse_what_fails(STORE, query, partial(_try, engine, own), _ALLOWED)
    return engine


def _connect(*args: Any, **kwargs: Any) -> Connection:
    try:
        return Connection(*args, **kwargs)
    except RuntimeError as error:  # of a package that PyMySQL needs for some ways to log in
        raise pymysql.OperationalError(PLUGIN_FAILED, str(error)) from error


def _options(url: URL) -> dict[str, Any]:
    """The options of a URL.

    :raises ImproperlyConfigured: PyMySQL does not know one of them, a value is not allowed, or a
        file is missing.
    """
    own = inspect.signature(pymysql.connections.Connection.__init__).parameters
    query = read_query(url, _OPTIONS)
    refuse_unknown_options(
        STORE, query, set(own) - _NOT_IN_URLS | _SQLALCHEMYS, "PyMySQL", _INSTEAD
    )
    files = ("ssl_ca", "ssl_cert", "ssl_key", "ssl_capath", "read_default_file")
    refuse_missing_files(STORE, query, files)
    return query


def _refuse_missing_database(url: URL, query: Mapping[str, Any]) -> None:
    """:raises ImproperlyConfigured: no database is named, and MySQL has no default."""
    if not url.database and not {"database", "db", "read_default_file"} & set(query):
        raise ImproperlyConfigured(
            f"{STORE}={shown_url(url)!r} names no database; "
            "write mysql://user:password@host:3306/database"
        )


def _divided(query: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """The options that SQLAlchemy reads, as texts, and those that PyMySQL is given as they are.

    PyMySQL takes any text for true. It does not look at SQLAlchemy's files of certificates if it is
    told whether to verify them.
    """
    names = {name for name, value in query.items() if not isinstance(value, str)} - _SQLALCHEMYS
    if names & {"ssl_verify_cert", "ssl_verify_identity"}:
        names |= {"ssl_ca", "ssl_cert", "ssl_key"} & set(query)
    values = {name: query[name] for name in names}
    return {name: str(value) for name, value in query.items() if name not in names}, values


def _try(engine: Engine, own: Mapping[str, Any], query: Mapping[str, Any]) -> None:
    """Have PyMySQL read options, and the files that they name."""
    texts, values = _divided(query)
    given = engine.dialect.create_connect_args(engine.url.set(query=texts))[1]
    Connection(**{**given, **values, **own, "defer_connect": True})
