"""Leases and states in one table of an SQL database."""

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

#: How often a statement that was undone is sent at most.
TRIES = 5
#: Parameters whose values come from outside, and can be too much for the database.
VALUES = frozenset({"value", "entries", "pending_run"})


class _Undone(Exception):
    """Has a transaction rolled back in which all went well."""


class _NotSeen(Exception):
    """A row is hidden that was just written."""


class SqlStore:
    """A store on an engine of :func:`~celery_singleton_state.store.sql.engine.make_engine`.

    Each verb is one statement on a connection in autocommit mode.
    """

    def __init__(self, engine: Engine, table_name: str) -> None:
        self.engine = engine
        self.table = make_table(table_name)
        self._sql = statements_for(self.table, engine.dialect)
        self._driver_error = engine.dialect.loaded_dbapi.Error
        # A database in memory lives in its pool's only connection.
        self._connections = Connections(engine, keeps_one=not is_in_memory(engine.url))
        #: Runs a statement and returns the rows that it answers.
        self._rows: Rows = partial(self._execute, self._sql.rows)
        #: What :meth:`check` has warned of.
        #: Types of what an acquisition answers, as they were and are to be.
        self._usual: set[tuple[type, ...]] = set()
        self._warned: set[str] = set()
        self.requests = SqlRequests(self._sql, self._rows, self._change)
        self.entries = SqlEntries(self._sql, self._rows, self.run_within)
        #: The database's time now, for statements made elsewhere.
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
                raise StoreRefusesValue(self._largest(key, error)) from error.__cause__
            raise
        if not rows:
            return None
        fence, *found = rows[0]
        acquired = Acquired(Lease(key, holder, fence, ttl), *found)
        kinds = tuple(map(type, found))
        if kinds not in self._usual:
            if odd := odd_values(acquired):
                return replace(acquired, **odd)
            self._usual.add(kinds)
        return acquired

    def _largest(self, key: str, error: StoreError) -> str:
        column, literal = self._sql.key, key.replace("'", "''")
        return (
            "the fence in the row is at its largest, so that no run can be given a larger one "
            f"({error}); to begin anew from the clock, if nothing outside compares its fences: "
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
            self._see_that_it_has_keys(prefix)
        self._see_that_rows_are_seen(prefixes)
        self._say_what_it_cannot_hold()

    def _see_that_it_has_keys(self, prefix: str) -> None:
        """:raises StoreMisconfigured: the encoding lacks a character of all keys."""
        try:
            self._rows(self._sql.wanted, {"key": prefix})
        except StoreRefusesValue as error:
            raise StoreMisconfigured(
                f"no key can begin with {storable(prefix)}: {error}; set singleton_key_prefix to "
                "letters that the database has"
            ) from error

    def _see_that_rows_are_seen(self, prefixes: Sequence[str]) -> None:
        """:raises StoreMisconfigured: row-level security hides rows, so that a lease which is held
        can look free.
        """
        if self._sql.hiding is None or not prefixes:
            return
        for (role,) in self._rows(self._sql.hiding, {"table": self._sql.table}):
            active = f"row-level security is active on table {self.table.fullname} for role {role}"
            for prefix in prefixes:
                if not (refused := self._refused_by_policies(prefix)):
                    continue
                raise StoreMisconfigured(
                    f"{active}, and its policies refuse to {refused} a row whose key begins with "
                    f"{prefix}; {policy_advice(self._sql.table, role)}"
                )
            self._warn_once(
                "singletons: %s; a row whose key begins with %s could be inserted, updated, read "
                "and deleted, but nothing shows that no other row is hidden",
                *(active, " or ".join(prefixes)),
            )

    def _refused_by_policies(self, prefix: str) -> str | None:
        """What cannot be done with a row, which is tried and rolled back."""
        tried: list[str] = []
        try:
            with open_transaction(self.engine) as connection:
                self._try_all(connection, f"{prefix}probe:{uuid.uuid4()}", tried.append)
                raise _Undone
        except _Undone:
            return None
        except _NotSeen:
            return tried[-1]
        except (DBAPIError, PoolTimeoutError) as error:
            if tried and is_of_policy(error):
                return tried[-1]
            raise self.as_store_error(error, carries_value=False) from error

    def _try_all(self, connection: Connection, key: str, trying: Callable[[str], None]) -> None:
        """:raises _NotSeen: the row was not there for the last statement that was tried."""
        named = {"key": key, "holder": "probe", "ttl": 1.0, "task_id": None}
        named |= {"task": None, "rank": 0, "sent": None, "of_clock": None}
        # The second one finds the row, and updates it.
        for what in ("insert", "update"):
            trying(what)
            if connection.exec_driver_sql(self._sql.acquire, named).first() is None:
                raise _NotSeen
        trying("read")
        if connection.exec_driver_sql(self._sql.peek, {"key": key}).first() is None:
            raise _NotSeen
        trying("delete")
        if not connection.execute(self.table.delete().where(self.table.c.key == key)).rowcount:
            raise _NotSeen

    def _say_what_it_cannot_hold(self) -> None:
        """Warn of an encoding that lacks characters; most states do without them."""
        if self._sql.encodings is None:
            return
        schema, _, bare = self.table.fullname.rpartition(".")
        for (found,) in self._rows(self._sql.encodings, {"schema": schema, "table": bare}):
            self._warn_once(
                "singletons: %s does not have all characters: a state or a key with another "
                "one fails as SchemaDecodeFailed; %s",
                *(found, self._sql.encoding_advice),
            )

    def _warn_once(self, text: str, *values: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            logger.warning(text, *values)

    def close(self) -> None:
        self.engine.dispose()

    def allow(self, connections: int) -> None:
        """Have so many connections at most in the pool, if it was fewer before."""
        pool = self.engine.pool
        # A database in memory is lost with its only connection, and has no second.
        if isinstance(pool, GrowingPool) and not is_in_memory(self.engine.url):
            pool.allow(connections)

    @contextmanager
    def transaction(self) -> Iterator[SqlTransaction]:
        """A transaction that commits when the block ends and rolls back when it raises.

        :raises StoreUnavailable: the database went away; whether the commit took effect is
            not known.
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
                raise  # an error of the caller's own statements is the caller's
            raise self.as_store_error(error) from error

    def _change(self, statement: str, parameters: Mapping[str, Any]) -> int:
        return int(self._execute(attrgetter("rowcount"), statement, parameters))

    def run_within(self, statement: str, parameters: Mapping[str, Any]) -> bool:
        """Run the parts of a statement in one transaction, if the first that answers rows does so.

        :returns: whether it did; otherwise nothing is changed.
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
        """An error of the driver's or of SQLAlchemy's, as one of ours."""
        return as_store_error(error, self._sql.table, carries_value)


class SqlTransaction:
    """An open transaction: the caller's own statements and one fenced save."""

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
        # The caller's own statements may take as long as they take.
        self._set_patience(None)

    def save(self, lease: Lease, write: Write) -> Saved | None:
        """Store a state; ``None`` when refused.

        It is the transaction's last statement, and locks the row until the commit, so that a
        successor waits for the outcome.

        :raises StoreError: it failed, and with it the transaction.
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
                "after that: let its error out of the block, or have a savepoint around the "
                "statement, with connection.begin_nested()"
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
        """Close the connection, whose server then rolls back. A file is not waited for anyway."""
        if self._patience is not None and not self.connection.closed:
            self.connection.invalidate()

    def end_of_callers_part(self) -> None:
        self._set_patience(self._patience)

    def _set_patience(self, seconds: float | None) -> None:
        if self._patience is not None:
            self._driver_connection.patience = seconds


@contextmanager
def open_transaction(engine: Engine) -> Iterator[Connection]:
    """A transaction on an engine whose statements commit by themselves otherwise.

    It commits when the block ends and rolls back when the block raises. If the COMMIT itself is
    interrupted, its outcome is not known, and the connection is closed.
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
                # The connection is in a forked child, or a time limit (for example) interrupted its
                # statement: not even a rollback can be sent over it.
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
    """Leave a connection whose COMMIT or ROLLBACK was interrupted, so that the server ends it."""
    if connection.closed or connection.invalidated:
        return
    if is_in_memory(connection.engine.url):
        # The database lives in this connection, and COMMIT is one call: it came before or after.
        connection.connection.rollback()
    else:
        connection.invalidate()


def _is_of_read_only_server(error: BaseException) -> bool:
    """Whether the pool's connections may all lead to a server that a failover has demoted."""
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
    """What psycopg knows of the transaction, without asking the server; empty for others."""
    status = getattr(getattr(driver_connection, "info", None), "transaction_status", None)
    return getattr(status, "name", "")


def _named(lease: Lease, write: Write | None, **more: Any) -> dict[str, Any]:
    named = {"key": lease.key, "fence": lease.fence, "holder": lease.holder, **more}
    if write is not None:
        new = write.new
        named |= {"value": new.value, "schema_version": new.schema_version}
        named |= {"number": write.number, "seen": write.seen}
    return named
