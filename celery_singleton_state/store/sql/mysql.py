"""MariaDB and MySQL: connections that PyMySQL makes, and the class with the SQL statements."""

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

#: PyMySQL's arguments that a URL cannot set, because a text cannot express them, because this
#: package sets them, or because PyMySQL refuses them.
_NOT_IN_URLS = frozenset(
    {"auth_plugin_map", "autocommit", "client_flag", "compress", "conv", "cursorclass"}
    | {"defer_connect", "named_pipe", "self", "ssl"}
)
#: Maps options of other drivers, which PyMySQL does not know, to advice. The error about such an
#: option ends with the advice.
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
#: The allowed values, in words for errors, of options that PyMySQL checks when it makes a
#: connection.
_ALLOWED = {
    "read_default_file": "a file of MySQL's options, [client] and name=value",
    "ssl_ca": "a file with certificates in PEM",
    "ssl_cert": "a file with a certificate in PEM, whose key is in it or in ssl_key",
    "ssl_cipher": "ciphers as OpenSSL names them, with colons between them",
    "ssl_key": "a file with the key of ssl_cert in PEM",
    "ssl_key_password": "the password of the key in ssl_key",
}
#: Options of a URL that SQLAlchemy understands, but which are not arguments of PyMySQL.
_OF_SQLALCHEMY = frozenset({"ssl_capath", "ssl_cipher", "ssl_check_hostname"})

#: The length, in characters, from which a statement's size is compared with the server's limit
#: (``max_allowed_packet``) before the statement is sent. A shorter statement needs no check:
#: even if it exceeds the limit, the server reads all of it and answers with a clear error. It would
#: close the connection while a longer statement is being sent.
LARGE = 4096
#: MySQL's error number for a packet that is larger than ``max_allowed_packet``.
TOO_LARGE = 1153
#: MySQL's error number for an authentication plugin that failed.
PLUGIN_FAILED = 2061


class Connection(pymysql.connections.Connection):  # type: ignore[misc]
    """A connection whose read time-out can be changed, and which records whether a statement is
    unfinished.
    """

    #: Whether a statement was sent, but its answer was not read to the end, for example because a
    #: time limit interrupted it. Such a connection cannot be used again.
    is_in_mid_statement = False
    _max_allowed_packet: int | None = None

    def query(self, sql: str | bytes, *args: Any, **kwargs: Any) -> Any:
        if len(sql) >= LARGE:
            sql = self._with_allowed_size(sql)
        return self._tracked(super().query, sql, *args, **kwargs)

    def _with_allowed_size(self, sql: str | bytes) -> bytes:
        """Return a large statement as bytes, if the server accepts a statement of this size.

        :raises pymysql.DataError: the statement is too large. The server would close the connection
            without an answer, as if the server were unavailable.
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
        return self._tracked(super().next_result, *args, **kwargs)

    def _tracked(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.is_in_mid_statement = True
        try:
            result = step(*args, **kwargs)
        except pymysql.MySQLError:
            self.is_in_mid_statement = not self.open
            raise
        self.is_in_mid_statement = False
        return result

    def leave_to_parent(self) -> None:
        """Close a forked child's copy of the connection, without telling the server that the
        session ends: the parent still uses the session.
        """
        close_silently(self)

    #: The read time-out: seconds to wait for the server's answer; ``None``: without limit.
    patience = read_timeout


#: The statements that begin and end a transaction in ``mysql.sql``. They are left out within a
#: transaction that is already open.
_OF_TRANSACTIONS = ("SET TRANSACTION", "START TRANSACTION", "COMMIT")


class MySqlStatements(Statements):
    """The SQL statements for MariaDB and MySQL, from ``mysql.sql``.

    An attribute can have several SQL statements, because UPDATE has no RETURNING here.
    """

    now = "SYSDATE(6)"
    # With another level SQLAlchemy would set the session's isolation level before each transaction
    # and reset it afterwards, in four more round trips. Instead, ``begin`` sets the level of one
    # transaction.
    level = "AUTOCOMMIT"
    begin = "SET TRANSACTION ISOLATION LEVEL READ COMMITTED; START TRANSACTION"
    encoding_advice = "run ALTER TABLE … MODIFY … CHARACTER SET utf8mb4"

    @staticmethod
    def rows(cursor: Any) -> Sequence[tuple[Any, ...]]:
        """Return the rows of the last result set, because a text of SQL statements can have several
        result sets.
        """
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
    """Make an engine for MariaDB or MySQL.

    :func:`~celery_singleton_state.store.sql.engine.make_engine` explains the arguments.

    :raises ImproperlyConfigured: an option of the URL is not known or not allowed, or the URL names
        no database.
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
        # Use UTC for the session's times. Use the mode TRADITIONAL, because in other modes the
        # server can cut a text that is too long instead of refusing it.
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
    except RuntimeError as error:
        # PyMySQL raises this error if it lacks a package for the user's authentication method.
        raise pymysql.OperationalError(PLUGIN_FAILED, str(error)) from error


def _options(url: URL) -> dict[str, Any]:
    """Return the options of a MySQL URL, parsed and checked.

    :raises ImproperlyConfigured: PyMySQL does not know an option, a value is not allowed, or a file
        is missing.
    """
    own = inspect.signature(pymysql.connections.Connection.__init__).parameters
    query = read_query(url, _OPTIONS)
    refuse_unknown_options(
        STORE, query, set(own) - _NOT_IN_URLS | _OF_SQLALCHEMY, "PyMySQL", _INSTEAD
    )
    files = ("ssl_ca", "ssl_cert", "ssl_key", "ssl_capath", "read_default_file")
    refuse_missing_files(STORE, query, files)
    return query


def _refuse_missing_database(url: URL, query: Mapping[str, Any]) -> None:
    """Refuse a URL without a database, because MySQL has no default database.

    :raises ImproperlyConfigured: neither the URL nor its options name a database.
    """
    if not url.database and not {"database", "db", "read_default_file"} & set(query):
        raise ImproperlyConfigured(
            f"{STORE}={shown_url(url)!r} names no database; "
            "write mysql://user:password@host:3306/database"
        )


def _divided(query: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """Divide the options of a URL into texts for SQLAlchemy, and values for PyMySQL itself.

    Switches and numbers go to PyMySQL as values, because PyMySQL takes any text for true. If the
    options say whether to verify certificates, the names of the certificate files go to PyMySQL as
    well, because PyMySQL then ignores the names in SQLAlchemy's argument ``ssl``.
    """
    names = {name for name, value in query.items() if not isinstance(value, str)} - _OF_SQLALCHEMY
    if names & {"ssl_verify_cert", "ssl_verify_identity"}:
        names |= {"ssl_ca", "ssl_cert", "ssl_key"} & set(query)
    values = {name: query[name] for name in names}
    return {name: str(value) for name, value in query.items() if name not in names}, values


def _try(engine: Engine, own: Mapping[str, Any], query: Mapping[str, Any]) -> None:
    """Have PyMySQL check options and read the files that they name, without connecting."""
    texts, values = _divided(query)
    given = engine.dialect.create_connect_args(engine.url.set(query=texts))[1]
    Connection(**{**given, **values, **own, "defer_connect": True})
