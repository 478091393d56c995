"""Read and write the rows of the key-value store: keys with raw JSON values, in the table of the
singletons.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import sqlalchemy as sa
from celery.exceptions import ImproperlyConfigured
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from celery_singleton_state.errors import KeyValueStoreError
from celery_singleton_state.state.codec import NO_STATE
from celery_singleton_state.store.base import StoreError

from .errors import REFUSED_BY_DRIVER
from .store import SqlStore, open_transaction

T = TypeVar("T")


class Rows:
    """The rows of the table whose keys begin with a prefix. Methods take keys without the prefix.

    Every method raises :exc:`KeyValueStoreError` if the database fails.

    :param open_store: returns the store of this process.
    :param told: converts the text of a store's error to the text of the error that is raised.
    """

    def __init__(
        self,
        open_store: Callable[[], SqlStore],
        prefix: str = "",
        told: Callable[[str], str] = str,
    ) -> None:
        self._open_store = open_store
        self._prefix = prefix
        self._told = told

    def under(self, prefix: str) -> Rows:
        """Return the rows whose keys begin with the present prefix followed by another prefix."""
        return Rows(self._open_store, self._prefix + prefix, self._told)

    def get(self, key: str) -> str | None:
        """Return the raw JSON value of a key; ``None`` if the key has no value."""
        with self._reading() as (store, connection):
            columns = store.table.c
            question = sa.select(columns.value).where(self._one(store, key), _is_present(store))
            raw: str | None = connection.execute(question).scalar()
            return raw

    def count(self) -> int:
        """Return the number of keys under the prefix that have a value."""
        with self._reading() as (store, connection):
            question = sa.select(sa.func.count()).where(self._all(store), _is_present(store))
            return int(connection.execute(question).scalar_one())

    def any(self) -> bool:
        """Return whether at least one key under the prefix has a value."""
        with self._reading() as (store, connection):
            question = sa.select(store.table.c.key).where(self._all(store), _is_present(store))
            return connection.execute(question.limit(1)).first() is not None

    def set(self, key: str, raw: str) -> None:
        """Store the raw JSON value of a key."""
        with self._writing() as (store, connection):
            self._write(store, connection, key, raw)

    def modify(self, key: str, change: Callable[[str | None], tuple[str, T]]) -> T:
        """Read a key's value, change it and store it, while the row is locked.

        :param change: takes the old value (``None`` if there is none), and returns the new value
            and the result of this method. If ``change`` raises an error, the old value stays, and
            this method raises the error.
        """
        raised: list[Exception] = []
        try:
            with self._writing() as (store, connection):
                raw = self._lock(store, connection, key)
                try:
                    new, result = change(raw)
                except Exception as error:
                    raised.append(error)
                    raise
                self._write(store, connection, key, new)
                return result
        except KeyValueStoreError:
            if raised:
                raise raised[0] from None
            raise

    def remove(self, key: str) -> int:
        """Remove the value of a key, and return the number of removed values: 0 or 1."""
        with self._writing() as (store, connection):
            return _remove(store, connection, self._one(store, key))

    def clear(self) -> None:
        """Remove the values of all keys under the prefix."""
        with self._writing() as (store, connection):
            _remove(store, connection, self._all(store))

    def _one(self, store: SqlStore, key: str) -> sa.ColumnElement[bool]:
        return store.table.c.key == self._prefix + key

    def _all(self, store: SqlStore) -> sa.ColumnElement[bool]:
        length = store.length_of(self._prefix)
        return sa.func.substr(store.table.c.key, 1, length) == self._prefix

    def _write(self, store: SqlStore, connection: Connection, key: str, raw: str) -> None:
        new = {"value": raw, "updated_at": store.now}
        connection.execute(store.upsert({"key": self._prefix + key, **new}, new))

    def _lock(self, store: SqlStore, connection: Connection, key: str) -> str | None:
        """Lock a key's row, and return its value. A missing row is inserted first, because only an
        existing row can be locked.
        """
        columns = store.table.c
        # Insert the row with a placeholder that differs from every stored value, so that the SELECT
        # shows whether the row was inserted here.
        placeholder = f"placed {uuid.uuid4()}"
        row = {"key": self._prefix + key, "value": placeholder, "updated_at": store.now}
        insert = store.upsert(row, None)
        question = sa.select(columns.value, _is_present(store)).where(self._one(store, key))
        while True:
            connection.execute(insert)
            found = connection.execute(question.with_for_update()).first()
            # The INSERT leaves an existing row as it is. If another process then removes the row,
            # the SELECT finds none. So both statements are repeated.
            if found is not None:
                value, is_present = found
                return value if is_present and value != placeholder else None

    @contextmanager
    def _reading(self) -> Iterator[tuple[SqlStore, Connection]]:
        # Read without a transaction, because on SQLite a transaction would wait for a connection
        # that is writing to the file.
        with self._says_what_failed() as store, store.engine.connect() as connection:
            yield store, connection

    @contextmanager
    def _writing(self) -> Iterator[tuple[SqlStore, Connection]]:
        with self._says_what_failed() as store, open_transaction(store.engine) as connection:
            yield store, connection

    @contextmanager
    def _says_what_failed(self) -> Iterator[SqlStore]:
        try:
            store = self._open_store()
        except ImproperlyConfigured as error:
            raise ImproperlyConfigured(self._told(str(error))) from error
        except StoreError as error:
            raise KeyValueStoreError(self._told(str(error))) from error
        try:
            yield store
        except StoreError as error:
            # The engine raises a StoreError if it cannot make a connection.
            raise KeyValueStoreError(self._told(str(error))) from error
        except (SQLAlchemyError, *REFUSED_BY_DRIVER) as error:
            raise KeyValueStoreError(self._told(str(store.as_store_error(error)))) from error


def _is_present(store: SqlStore) -> sa.ColumnElement[bool]:
    """Return the SQL condition that a row has a value. The row of a singleton without a state has
    no value.
    """
    columns = store.table.c
    return sa.or_(columns.fence.is_(None), columns.value != NO_STATE)


def _remove(store: SqlStore, connection: Connection, which: sa.ColumnElement[bool]) -> int:
    table, columns = store.table, store.table.c
    plain = sa.delete(table).where(which, columns.fence.is_(None))
    # The row of a singleton is not deleted, because it has the lease and the fence, which must
    # never be lost.
    singletons = (
        sa.update(table)
        .where(which, columns.fence.is_not(None), columns.value != NO_STATE)
        .values(value=NO_STATE, schema_version=None, updated_at=store.now)
    )
    return sum(connection.execute(statement).rowcount for statement in (plain, singletons))
