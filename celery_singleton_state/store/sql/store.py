"""The SQL store: it keeps leases and states in one table of a database."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from operator import attrgetter, itemgetter
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Connection, Engine, literal_column
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from celery_singleton_state.keys import KEY_PREFIX
from celery_singleton_state.store.base import (
    Acquired,
    Ended,
    Lease,
    Listed,
    Released,
    Row,
    Saved,
    SeenTicks,
    StoreError,
    StoreMisconfigured,
    StoreRefusesValue,
    StoreUnavailable,
    Write,
    seen,
)
from celery_singleton_state.store.odd_values import odd_values
from celery_singleton_state.text.storable import restored, storable
from celery_singleton_state.text.visible import logger_of

from .connections import Connections, GrowingPool
from .dialects import class_of, statements_for
from .engine import is_in_memory
from .entries import SqlEntries
from .errors import (
    REFUSED_BY_DRIVER,
    as_store_error,
    grant,
    is_of_policy,
    is_out_of_range,
    is_read_only,
    is_undone,
    policy_advice,
    went_away,
)
from .requests import Rows, SqlRequests, stored_task
from .schema import make_table
from .statements import Statements

logger = logger_of(__name__)

#: The largest number of times that a statement is sent, if the database rolls it back because of a
#: deadlock or a serialization failure.
TRIES = 5
#: The names of the parameters whose values come from outside this package. An error of a statement
#: with such a parameter can mean that the database cannot hold the value.
VALUES = frozenset({"value", "entries", "pending_run"})


class _AllWorked(Exception):
    """Raised at the end of a trial transaction in which every statement worked, to roll it back."""


class _RowHidden(Exception):
    """Raised if a trial transaction cannot see a row that it has just written."""


class SqlStore:
    """A store of leases and states in an SQL database.

    :class:`~celery_singleton_state.store.base.Store` explains the methods. Most methods are one
    statement on a connection in autocommit mode.

    :param engine: an engine of :func:`~celery_singleton_state.store.sql.engine.make_engine`.
    :param table_name: the table's name, which may have a schema: ``schema.name``.
    """

    def __init__(self, engine: Engine, table_name: str) -> None:
        self.engine = engine
        self.table = make_table(table_name)
        self._sql = statements_for(self.table, engine.dialect)
        self._driver_error = engine.dialect.loaded_dbapi.Error
        # No connection is kept outside the pool for a database in memory, because such a database
        # exists only within the pool's single connection.
        self._connections = Connections(engine, keeps_one=not is_in_memory(engine.url))
        #: A function that runs a statement and returns its rows.
        self._rows: Rows = partial(self._execute, self._sql.rows)
        #: The tuples of types that :meth:`acquire` has found right for the values of an answer. The
        #: tuples are kept so that each one is checked only once.
        self._right_types: set[tuple[type, ...]] = set()
        #: The texts of the logged warnings. :meth:`check` logs each warning only once.
        self._warned: set[str] = set()
        self.requests = SqlRequests(self._sql, self._rows, self._change)
        self.entries = SqlEntries(self._sql, self._rows, self.run_within)
        #: The present time by the database's clock, for statements that other modules make.
        self.now: ColumnElement[Any] = literal_column(self._sql.now)
        self.upsert = partial(self._sql.upsert, self.table)
        self.length_of = self._sql.length_of

    def acquire(
        self,
        key: str,
        holder: str,
        ttl: float,
        task_id: str | None,
        rank: int = 0,
        sent: str | None = None,
        task: str | None = None,
    ) -> Acquired | None:
        named: dict[str, Any] = {"key": key, "holder": holder, "ttl": ttl}
        named["task"] = None if task is None else stored_task(task)
        named["task_id"] = None if task_id is None else storable(task_id)
        of_clock = f"{sent.rpartition(':')[0]}:%" if sent else None
        named |= {"rank": rank, "sent": sent, "of_clock": of_clock}
        try:
            rows = self._rows(self._sql.acquire, named)
        except StoreRefusesValue as error:
            if is_out_of_range(error.__cause__):
                raise StoreRefusesValue(self._fence_advice(key, error)) from error.__cause__
            raise
        if not rows:
            return None
        fence, *found = rows[0]
        acquired = Acquired(Lease(key, holder, fence, ttl), *found)
        kinds = tuple(map(type, found))
        if kinds not in self._right_types:
            if odd := odd_values(acquired):
                return replace(acquired, **odd)
            self._right_types.add(kinds)
        return acquired

    def _fence_advice(self, key: str, error: StoreError) -> str:
        column, literal = self._sql.key, key.replace("'", "''")
        return (
            "the fence in the row is at its largest possible value, so no run can get a larger one "
            f"({error}); to begin again from the clock, if no other system compares the fences: "
            f"UPDATE {self._sql.table} SET fence = 0, newest = NULL WHERE {column} = '{literal}';"
        )

    def renew(self, leases: Sequence[Lease]) -> dict[str, str | None]:
        statement = (len(leases) > 1 and self._sql.renew_unlocked) or self._sql.renew
        document = msgspec.json.encode(leases).decode()
        rows = self._rows(statement, {"leases": document})
        return dict(rows)

    def save(self, lease: Lease, write: Write) -> Saved | None:
        rows = self._rows(self._sql.save, _named(lease, write, ttl=lease.ttl))
        return Saved(*rows[0]) if rows else None

    def release(self, lease: Lease, ended: Ended, write: Write | None = None) -> Released | None:
        statement = self._sql.release if write is None else self._sql.save_and_release
        more = {"outcome": ended.outcome, "history": ended.history, "hold": ended.hold}
        more |= {"ticks_done": ended.ticks_done}
        rows = self._rows(statement, _named(lease, write, **more))
        return Released(*rows[0]) if rows else None

    def give_back(self, key: str, holder: str) -> Released | None:
        rows = self._rows(self._sql.give_back, {"key": key, "holder": holder})
        return Released(*rows[0]) if rows else None

    def written(self, lease: Lease, number: int) -> bool | None:
        rows = self._rows(self._sql.written, _named(lease, None, number=number))
        is_holder, is_written = rows[0] if rows else (False, False)
        return bool(is_written) if is_holder else None

    def peek(self, key: str) -> Row | None:
        rows = self._rows(self._sql.peek, {"key": key})
        return seen(Row(*rows[0])) if rows else None

    def list(self, prefix: str, also: str = "") -> Sequence[Listed]:
        rows = self._rows(self._sql.list, {"prefix": prefix, "also": also})
        return [seen(Listed(*row)) for row in rows]

    def contents(
        self, keys: Sequence[str], values: bool
    ) -> dict[str, tuple[str | None, str | None]]:
        document = msgspec.json.encode(keys).decode()
        rows = self._rows(self._sql.contents, {"keys": document, "values": values})
        return {key: (history, value) for key, history, value in rows}

    def ticks(self, keys: Sequence[str]) -> dict[str, SeenTicks]:
        rows = self._rows(self._sql.ticks, {"keys": msgspec.json.encode(keys).decode()})
        return {
            key: SeenTicks(bool(held), restored(task_id), done) for key, held, task_id, done in rows
        }

    def set_aside(self, key: str, value: str) -> None:
        self._change(self._sql.set_aside, {"key": key, "value": value})

    def unused(self, prefix: str, older_than: float) -> Mapping[str, str | None]:
        rows = self._rows(self._sql.unused, {"prefix": prefix, "older_than": older_than})
        return {key: restored(task) for key, task in sorted(rows, key=itemgetter(0))}

    def prune(self, keys: Sequence[str], older_than: float) -> Sequence[str]:
        document = msgspec.json.encode(keys).decode()
        rows = self._rows(self._sql.prune, {"keys": document, "older_than": older_than})
        return [key for (key,) in rows]

    def check(self, prefixes: Sequence[str] = (KEY_PREFIX,)) -> None:
        if self._sql.lacking is not None:
            for role, privileges in self._rows(self._sql.lacking, {"table": self._sql.table}):
                raise StoreMisconfigured(
                    f"role {role} lacks {privileges} on table {self.table.fullname}; "
                    f"run as its owner: {grant(privileges, self._sql.table, role)}"
                )
        self._rows(self._sql.check, {})
        for prefix in prefixes:
            self._check_prefix(prefix)
        self._check_row_security(prefixes)
        self._warn_of_encoding()

    def _check_prefix(self, prefix: str) -> None:
        """Check that the database can store the prefix of the keys.

        :raises StoreMisconfigured: the database's encoding lacks a character of the prefix.
        """
        try:
            self._rows(self._sql.wanted, {"key": prefix})
        except StoreRefusesValue as error:
            raise StoreMisconfigured(
                f"no key can begin with {storable(prefix)}: {error}; set singleton_key_prefix to "
                "characters that the database can store"
            ) from error

    def _check_row_security(self, prefixes: Sequence[str]) -> None:
        """Check that row-level security hides no rows. Otherwise a held lease could look free.

        :raises StoreMisconfigured: a row whose key begins with one of the prefixes cannot be
            inserted, updated, read or deleted.
        """
        if self._sql.hiding is None or not prefixes:
            return
        for (role,) in self._rows(self._sql.hiding, {"table": self._sql.table}):
            active = f"row-level security is active on table {self.table.fullname} for role {role}"
            for prefix in prefixes:
                if not (refused := self._refused_operation(prefix)):
                    continue
                raise StoreMisconfigured(
                    f"{active}, and its policies refuse to {refused} a row whose key begins with "
                    f"{prefix}; {policy_advice(self._sql.table, role)}"
                )
            self._warn_once(
                "singletons: %s; a row whose key begins with %s could be inserted, updated, read "
                "and deleted, but that does not prove that no other row is hidden",
                *(active, " or ".join(prefixes)),
            )

    def _refused_operation(self, prefix: str) -> str | None:
        """Return the first operation on a new row under a prefix that row-level security refuses:
        ``insert``, ``update``, ``read`` or ``delete``; ``None`` if all of them work.

        The operations are tried in a transaction that is rolled back.
        """
        tried: list[str] = []
        try:
            with open_transaction(self.engine) as connection:
                self._try_each(connection, f"{prefix}probe:{uuid.uuid4()}", tried.append)
                raise _AllWorked
        except _AllWorked:
            return None
        except _RowHidden:
            return tried[-1]
        except (DBAPIError, PoolTimeoutError) as error:
            if tried and is_of_policy(error):
                return tried[-1]
            raise self.as_store_error(error, carries_value=False) from error

    def _try_each(self, connection: Connection, key: str, trying: Callable[[str], None]) -> None:
        """Insert, update, read and delete a row.

        :param trying: called with the operation's name before each operation.
        :raises _RowHidden: the last operation did not find the row.
        """
        named = {"key": key, "holder": "probe", "ttl": 1.0, "task_id": None}
        named |= {"task": None, "rank": 0, "sent": None, "of_clock": None}
        # An acquisition tries each of the two operations: the first acquisition inserts the row,
        # and the second one updates it.
        for what in ("insert", "update"):
            trying(what)
            if connection.exec_driver_sql(self._sql.acquire, named).first() is None:
                raise _RowHidden
        trying("read")
        if connection.exec_driver_sql(self._sql.peek, {"key": key}).first() is None:
            raise _RowHidden
        trying("delete")
        if not connection.execute(self.table.delete().where(self.table.c.key == key)).rowcount:
            raise _RowHidden

    def _warn_of_encoding(self) -> None:
        """Log a warning if the database's encoding lacks characters. A warning is enough, because
        most states do not contain these characters.
        """
        if self._sql.encodings is None:
            return
        schema, _, bare = self.table.fullname.rpartition(".")
        for (found,) in self._rows(self._sql.encodings, {"schema": schema, "table": bare}):
            self._warn_once(
                "singletons: %s cannot store all characters: a state or a key with any other "
                "character fails as SchemaDecodeFailed; %s",
                *(found, self._sql.encoding_advice),
            )

    def _warn_once(self, text: str, *values: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            logger.warning(text, *values)

    def close(self) -> None:
        self.engine.dispose()

    def allow(self, connections: int) -> None:
        """Let the pool have more connections than before. A smaller number than before changes
        nothing.
        """
        pool = self.engine.pool
        # A database in memory exists only within one connection, so it cannot have a second one.
        if isinstance(pool, GrowingPool) and not is_in_memory(self.engine.url):
            pool.allow(connections)

    @contextmanager
    def transaction(self) -> Iterator[SqlTransaction]:
        """Open a transaction that commits when the block ends, and rolls back if the block raises.

        :raises StoreUnavailable: the database became unavailable. The commit may have taken effect
            or not.
        """
        opened = False
        try:
            with open_transaction(self.engine) as connection:
                opened = True
                transaction = SqlTransaction(connection, self._sql, self.as_store_error)
                try:
                    yield transaction
                finally:
                    transaction.end_of_callers_part()
        except (DBAPIError, PoolTimeoutError) as error:
            if opened and not went_away(error):
                raise  # the caller's own statement failed, so the caller gets the original error
            raise self.as_store_error(error) from error

    def _change(self, statement: str, parameters: Mapping[str, Any]) -> int:
        return int(self._execute(attrgetter("rowcount"), statement, parameters))

    def run_within(self, statement: str, parameters: Mapping[str, Any]) -> bool:
        """Run the parts of a statement in one transaction, up to a part whose result set is empty.

        The parts after an empty result set are not run. A part that only counts changed rows
        returns no result set.

        :returns: whether all parts were run.
        """
        try:
            with open_transaction(self.engine) as connection:
                for part in self._sql.parts(statement):
                    result = connection.exec_driver_sql(part, dict(parameters))
                    if result.returns_rows and result.first() is None:
                        return False
                return True
        except (DBAPIError, PoolTimeoutError, *REFUSED_BY_DRIVER) as error:
            raise self.as_store_error(error, not VALUES.isdisjoint(parameters)) from error

    def _execute(
        self, answer: Callable[[Any], Any], statement: str, parameters: Mapping[str, Any]
    ) -> Any:
        tries = TRIES
        while True:
            try:
                return self._connections.execute(statement, parameters, answer)
            except (self._driver_error, SQLAlchemyError, *REFUSED_BY_DRIVER) as error:
                tries -= 1
                if tries and is_undone(error):
                    continue
                meant = self.as_store_error(error, not VALUES.isdisjoint(parameters))
                if isinstance(meant, StoreUnavailable) and self._sql.is_too_large(parameters):
                    meant = StoreRefusesValue(f"the database cannot hold so large a value: {meant}")
                raise meant from error

    def as_store_error(self, error: Exception, carries_value: bool = True) -> StoreError:
        """Turn an error of the driver or of SQLAlchemy into the :exc:`StoreError` that it means.

        :param carries_value: whether the statement carried a value from outside this package, such
            as a state.
        """
        return as_store_error(error, self._sql.table, carries_value)


class SqlTransaction:
    """An open transaction: the caller's own statements, and then one save of the state under the
    lease.

    :param connection: a connection on which :func:`open_transaction` has begun a transaction.
    :param as_store_error: turns an error of the database into a :exc:`StoreError`.
    """

    def __init__(
        self,
        connection: Connection,
        sql: Statements,
        as_store_error: Callable[[Exception], StoreError],
    ) -> None:
        self.connection = connection
        self._sql = sql
        self._as_store_error = as_store_error
        self._driver_connection: Any = connection.connection.dbapi_connection
        self._patience = getattr(self._driver_connection, "patience", None)
        # The caller's own statements have no time-out, because they may take any time.
        self._set_patience(None)

    def save(self, lease: Lease, write: Write) -> Saved | None:
        """Store a state as the transaction's last statement.

        The statement locks the row until the commit, so that the lease's next holder waits for the
        outcome.

        :returns: ``None`` if the store refused the save, because the lease has another holder by
            now or the write is late.
        :raises StoreError: the statement failed, and the transaction with it.
        """
        self.end_of_callers_part()
        if not self.connection.in_transaction():
            raise RuntimeError(
                "the block of transaction() ended the transaction itself; "
                "it is committed when the block ends, and rolled back when it raises"
            )
        if _status(self._driver_connection) == "INERROR":
            raise RuntimeError(
                "a statement in the block of transaction() failed, and PostgreSQL commits nothing "
                "after that: let its error leave the block, or run the statement within a "
                "savepoint, by connection.begin_nested()"
            )
        named = _named(lease, write, ttl=lease.ttl)
        try:
            for statement in self._sql.parts(self._sql.save):
                result = self.connection.exec_driver_sql(statement, named)
            row = result.one_or_none()
        except (DBAPIError, *REFUSED_BY_DRIVER) as error:
            raise self._as_store_error(error) from error
        return Saved(*row) if row else None

    def abandon(self) -> None:
        """Close the connection without a ROLLBACK, so that the server rolls back by itself.

        A connection to an SQLite file stays open, because its ROLLBACK waits for no server.
        """
        if self._patience is not None and not self.connection.closed:
            self.connection.invalidate()

    def end_of_callers_part(self) -> None:
        self._set_patience(self._patience)

    def _set_patience(self, seconds: float | None) -> None:
        if self._patience is not None:
            self._driver_connection.patience = seconds


@contextmanager
def open_transaction(engine: Engine) -> Iterator[Connection]:
    """Open a transaction on an engine that is otherwise in autocommit mode.

    The transaction commits when the block ends, and rolls back when the block raises. If the COMMIT
    itself is interrupted, its outcome is unknown, and the connection is closed.
    """
    own = class_of(engine.dialect)
    pid = os.getpid()
    with engine.connect().execution_options(isolation_level=own.level) as connection:
        transaction = connection.begin()
        try:
            if own.begin:
                connection.exec_driver_sql(own.begin)
            yield connection
        except BaseException as error:
            if os.getpid() != pid or _is_in_mid_statement(connection):
                # This is a forked child, or a statement was interrupted, for example by a time
                # limit. So not even a ROLLBACK can be sent on the connection.
                connection.invalidate()
            if _is_of_read_only_server(error):
                connection.invalidate()
                engine.dispose()
            try:
                transaction.close()
            except BaseException:
                _abandon(connection)
                raise
            raise
        try:
            transaction.commit()
        except BaseException:
            _abandon(connection)
            raise


def _abandon(connection: Connection) -> None:
    """Close a connection whose COMMIT or ROLLBACK was interrupted, so that the server ends the
    transaction.
    """
    if connection.closed or connection.invalidated:
        return
    if is_in_memory(connection.engine.url):
        # Keep the connection, because a database in memory is lost with it. SQLite's COMMIT is a
        # single call in C, so the interruption came before or after the COMMIT, never during it.
        connection.connection.rollback()
    else:
        connection.invalidate()


def _is_of_read_only_server(error: BaseException) -> bool:
    """Return whether an error shows that the server is read-only, for example since a failover.

    Then the caller disposes of the whole pool, because all its connections may lead to this server.
    """
    cause = error.__cause__ if isinstance(error, StoreError) else error
    return isinstance(cause, DBAPIError) and is_read_only(cause)


def _is_in_mid_statement(connection: Connection) -> bool:
    if connection.closed or connection.invalidated:
        return False
    driver_connection: Any = connection.connection.dbapi_connection
    if _status(driver_connection) == "ACTIVE":
        return True
    return bool(getattr(driver_connection, "is_in_mid_statement", False))


def _status(driver_connection: Any) -> str:
    """Return the status that psycopg knows of a connection's transaction, such as ``INERROR``.

    No request is sent to the server. For connections of other drivers, return an empty text.
    """
    status = getattr(getattr(driver_connection, "info", None), "transaction_status", None)
    return getattr(status, "name", "")


def _named(lease: Lease, write: Write | None, **more: Any) -> dict[str, Any]:
    named = {"key": lease.key, "fence": lease.fence, "holder": lease.holder, **more}
    if write is not None:
        new = write.new
        named |= {"value": new.value, "schema_version": new.schema_version}
        named |= {"number": write.number, "seen": write.seen}
    return named
