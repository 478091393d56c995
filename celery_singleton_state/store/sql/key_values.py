"""The rows behind the key-value store: raw JSON by key, in the singletons' table."""

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
    """The rows of a table whose keys begin with a prefix; keys are given without it.

    Every method raises :exc:`KeyValueStoreError` where the database fails.

    :param open_store: gives the store of this process.
    :param told: the text of an error, as it is told.
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
        """The rows under a further prefix."""
        return Rows(self._open_store, self._prefix + prefix, self._told)

    def get(self, key: str) -> str | None:
        """The value of a key, if it has one."""
        with self._reading() as (store, connection):
            columns = store.table.c
            question = sa.select(columns.value).where(self._one(store, key), _is_present(store))
            raw: str | None = connection.execute(question).scalar()
            return raw

    def count(self) -> int:
        """How many keys have a value."""
        with self._reading() as (store, connection):
            question = sa.select(sa.func.count()).where(self._all(store), _is_present(store))
            return int(connection.execute(question).scalar_one())

    def any(self) -> bool:
        """Whether some key has a value."""
        with self._reading() as (store, connection):
            question = sa.select(store.table.c.key).where(self._all(store), _is_present(store))
            return connection.execute(question.limit(1)).first() is not None

    def set(self, key: str, raw: str) -> None:
        """Give a key a value."""
        with self._writing() as (store, connection):
            self._write(store, connection, key, raw)

    def modify(self, key: str, change: Callable[[str | None], tuple[str, T]]) -> T:
        """Replace a value, with its row locked in between.

        :param change: is given the value, and returns the new one and what is to be returned
            here. What it raises is raised here, and the value stays.
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
        """Remove the value of a key; returns how many there were."""
        with self._writing() as (store, connection):
            return _remove(store, connection, self._one(store, key))

    def clear(self) -> None:
        """Remove the values of all keys."""
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
        """Lock a key's row, made where there was none; returns its value."""
        columns = store.table.c
        # Told from all that others may have there.
        placed = f"placed {uuid.uuid4()}"
        row = {"key": self._prefix + key, "value": placed, "updated_at": store.now}
        place = store.upsert(row, None)
        question = sa.select(columns.value, _is_present(store)).where(self._one(store, key))
        while True:
            connection.execute(place)
            found = connection.execute(question.with_for_update()).first()
            # Between the two, somebody can have removed the row that was in the way.
            if found is not None:
                value, is_present = found
                return value if is_present and value != placed else None

    @contextmanager
    def _reading(self) -> Iterator[tuple[SqlStore, Connection]]:
        # Not a transaction: on SQLite that would wait for the file's only writer.
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
        except StoreError as error:  # of a connection that cannot be made
            raise KeyValueStoreError(self._told(str(error))) from error
        except (SQLAlchemyError, *REFUSED_BY_DRIVER) as error:
            raise KeyValueStoreError(self._told(str(store.as_store_error(error)))) from error


def _is_present(store: SqlStore) -> sa.ColumnElement[bool]:
    """A singleton that has no state yet has a row, and no value."""
    columns = store.table.c
    return sa.or_(columns.fence.is_(None), columns.value != NO_STATE)


def _remove(store: SqlStore, connection: Connection, which: sa.ColumnElement[bool]) -> int:
    table, columns = store.table, store.table.c
    plain = sa.delete(table).where(which, columns.fence.is_(None))
    # A singleton's row keeps its lease, and above all its fence.
    singletons = (
        sa.update(table)
        .where(which, columns.fence.is_not(None), columns.value != NO_STATE)
        .values(value=NO_STATE, schema_version=None, updated_at=store.now)
    )
    return sum(connection.execute(statement).rowcount for statement in (plain, singletons))
