"""The table as a plain key-value store.

It shares its table with the singletons and never touches their leases: a singleton's row that
is removed loses its state and keeps its fence.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, Self, TypeVar

import msgspec
import sqlalchemy as sa
from celery import Celery
from sqlalchemy import Connection
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from .errors import KeyValueStoreError
from .runtime import runtime_of
from .state import NO_STATE, Codec, StateError
from .store import SqlStore, open_store
from .store.base import StoreError
from .store.sql import open_transaction

T = TypeVar("T")

_INSERT: dict[str, Callable[[sa.Table], Any]] = {
    "postgresql": postgresql.insert,
    "sqlite": sqlite.insert,
}


class KeyValueStore:
    """JSON values by key, in the singletons' table.

    Every method raises :exc:`KeyValueStoreError` when the database cannot be reached, refuses,
    or holds a value that is not JSON.

    :param url: a SQLAlchemy URL of PostgreSQL or SQLite, or ``memory://``.
    :param table: the table's name, which may be qualified. On SQLite it is made if missing.
    :param timeout: seconds of silence after which the database counts as out of reach.
    """

    def __init__(self, url: str, table: str = "kv_store", *, timeout: float = 10.0) -> None:
        opened: dict[int, SqlStore] = {}
        opening = threading.Lock()

        def store() -> SqlStore:
            # A forked child makes its own and leaves its parent's connections alone.
            if os.getpid() not in opened:
                with opening:
                    if os.getpid() not in opened:
                        opened[os.getpid()] = open_store(url, table, timeout)
            return opened[os.getpid()]

        def close() -> None:
            if os.getpid() in opened:
                opened.pop(os.getpid()).close()

        self._store: Callable[[], SqlStore] = store
        self._close: Callable[[], None] = close
        self._prefix = ""

    @classmethod
    def from_app(cls, app: Celery) -> KeyValueStore:
        """The store that the app's settings name, over the same connections."""
        made = cls.__new__(cls)
        made._store = lambda: runtime_of(app).store
        made._close = lambda: None
        made._prefix = ""
        return made

    def close(self) -> None:
        """Close this process's connections, unless they are an app's; the next use reopens."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prefix(self, prefix: str) -> KeyValueStore:
        """The same store, seen under a prefix: its keys are without it."""
        view = copy.copy(self)
        view._prefix = self._prefix + prefix
        return view

    def for_schema(self, schema: type[T]) -> SchemaStore[T]:
        """The same store, its values of one type."""
        return SchemaStore(self, schema)

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or the default when there is none."""
        raw = self._get_raw(key)
        return default if raw is None else _decoded(key, raw, Any)

    def set(self, key: str, value: Any) -> None:
        """Store a value that JSON has a form for; NaN and infinity become null.

        :raises TypeError: it has none.
        """
        self._set_raw(key, _encoded(key, value))

    def get_bytes(self, key: str, default: bytes | None = None) -> bytes | None:
        """The bytes that :meth:`set_bytes` stored, or the default when there are none."""
        raw = self._get_raw(key)
        return default if raw is None else _decoded(key, raw, bytes)

    def set_bytes(self, key: str, value: bytes) -> None:
        """Store bytes, as base64 in a JSON string."""
        self.set(key, value)

    def has(self, key: str) -> bool:
        """Whether there is a value."""
        return self._get_raw(key) is not None

    def remove(self, key: str) -> bool:
        """Remove a value; false when there was none."""
        return self._remove(self._row(key)) > 0

    def clear(self) -> None:
        """Remove all values under this store's prefix."""
        self._remove(self._under_prefix())

    def size(self) -> int:
        """How many values there are under this store's prefix."""
        columns = self._store_or_error().table.c
        question = sa.select(sa.func.count()).where(self._under_prefix(), _is_present(columns))
        with self._reading() as connection:
            return int(connection.execute(question).scalar_one())

    def is_empty(self) -> bool:
        """Whether there is no value under this store's prefix."""
        columns = self._store_or_error().table.c
        question = sa.select(columns.key).where(self._under_prefix(), _is_present(columns)).limit(1)
        with self._reading() as connection:
            return connection.execute(question).first() is None

    def modify(self, key: str, fn: Callable[[Any], Any], default: Any = None) -> Any:
        """Replace a value by what a function makes of it, atomically; returns the new one.

        The row is locked while the function runs, so that no other change comes between. What
        the function raises is raised here, and the value stays.

        :param default: what the function is given when there is no value.
        """

        def change(raw: str | None) -> tuple[str, Any]:
            new = fn(default if raw is None else _decoded(key, raw, Any))
            return _encoded(key, new), new

        return self._modify_raw(key, change)

    # -- rows

    def _row(self, key: str) -> sa.ColumnElement[bool]:
        return self._store_or_error().table.c.key == self._prefix + key

    def _under_prefix(self) -> sa.ColumnElement[bool]:
        column = self._store_or_error().table.c.key
        return sa.func.substr(column, 1, len(self._prefix)) == self._prefix

    def _get_raw(self, key: str) -> str | None:
        columns = self._store_or_error().table.c
        question = sa.select(columns.value).where(self._row(key), _is_present(columns))
        with self._reading() as connection:
            raw: str | None = connection.execute(question).scalar()
            return raw

    def _set_raw(self, key: str, raw: str) -> None:
        with self._transaction() as connection:
            self._write(connection, key, raw)

    def _write(self, connection: Connection, key: str, raw: str) -> None:
        store = self._store()
        new = {"value": raw, "updated_at": store.now}
        insert = _INSERT[store.engine.dialect.name](store.table)
        connection.execute(
            insert.values(key=self._prefix + key, **new).on_conflict_do_update(
                index_elements=["key"], set_=new
            )
        )

    def _modify_raw(self, key: str, change: Callable[[str | None], tuple[str, T]]) -> T:
        raised: list[Exception] = []
        try:
            with self._transaction() as connection:
                raw = self._locked(connection, key)
                try:
                    new, result = change(raw)
                except Exception as error:
                    raised.append(error)
                    raise
                self._write(connection, key, new)
                return result
        except KeyValueStoreError:
            if raised:
                raise raised[0] from None
            raise

    def _locked(self, connection: Connection, key: str) -> str | None:
        """Lock a key's row, made where there was none; returns its value."""
        store = self._store()
        columns = store.table.c
        insert = _INSERT[store.engine.dialect.name](store.table)
        place = insert.values(key=self._prefix + key, value=NO_STATE, updated_at=store.now)
        place = place.on_conflict_do_nothing().returning(columns.key)
        question = sa.select(columns.value, _is_present(columns)).where(self._row(key))
        while True:
            placed = connection.execute(place).first()
            found = connection.execute(question.with_for_update()).first()
            # Between the two, somebody can have removed the row that was in the way.
            if found is not None:
                value, is_present = found
                return value if is_present and placed is None else None

    def _remove(self, which: sa.ColumnElement[bool]) -> int:
        store = self._store_or_error()
        table, columns = store.table, store.table.c
        with self._transaction() as connection:
            removed = connection.execute(
                sa.delete(table).where(which, columns.fence.is_(None))
            ).rowcount
            # A singleton's row keeps its lease, and above all its fence.
            reset = connection.execute(
                sa.update(table)
                .where(which, columns.fence.is_not(None), columns.value != NO_STATE)
                .values(value=NO_STATE, schema_version=None, updated_at=store.now)
            ).rowcount
            return removed + reset

    def _store_or_error(self) -> SqlStore:
        try:
            return self._store()
        except StoreError as error:
            raise KeyValueStoreError(str(error)) from error

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        # Not a transaction: on SQLite that would wait for the file's only writer.
        with self._says_what_failed() as store, store.engine.connect() as connection:
            yield connection

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        with self._says_what_failed() as store, open_transaction(store.engine) as connection:
            yield connection

    @contextmanager
    def _says_what_failed(self) -> Iterator[SqlStore]:
        store = self._store_or_error()
        try:
            yield store
        except (SQLAlchemyError, UnicodeError) as error:
            raise KeyValueStoreError(str(store.as_store_error(error))) from error


class SchemaStore(Generic[T]):
    """A :class:`KeyValueStore` whose values are of one type."""

    def __init__(self, store: KeyValueStore, schema: type[T]) -> None:
        self._kv = store
        self._codec = Codec(schema)

    def get(self, key: str, default: T | None = None) -> T | None:
        """The value, or the default when there is none."""
        raw = self._kv._get_raw(key)
        return default if raw is None else self._decoded(key, raw)

    def set(self, key: str, value: T) -> None:
        """Store a value.

        :raises KeyValueStoreError: it does not fit the type.
        """
        self._kv._set_raw(key, self._encoded(key, value))

    def modify(self, key: str, fn: Callable[[T | None], T], default: T | None = None) -> T:
        """As :meth:`KeyValueStore.modify`."""

        def change(raw: str | None) -> tuple[str, T]:
            new = fn(default if raw is None else self._decoded(key, raw))
            return self._encoded(key, new), new

        return self._kv._modify_raw(key, change)

    def _decoded(self, key: str, raw: str) -> T:
        try:
            return self._codec.decode(raw, None)
        except StateError as error:
            raise KeyValueStoreError(f"key {key!r}: {error}") from error

    def _encoded(self, key: str, value: T) -> str:
        try:
            return self._codec.encode(value)
        except StateError as error:
            raise KeyValueStoreError(f"key {key!r}: {error}") from error


def _is_present(columns: Any) -> sa.ColumnElement[bool]:
    """A singleton that has no state yet has a row, and no value."""
    present: sa.ColumnElement[bool] = sa.or_(columns.fence.is_(None), columns.value != NO_STATE)
    return present


def _decoded(key: str, raw: str, kind: Any) -> Any:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, ValueError) as error:
        raise KeyValueStoreError(f"key {key!r}: its value cannot be read: {error}") from error


def _encoded(key: str, value: Any) -> str:
    try:
        return msgspec.json.encode(value).decode()
    except (TypeError, ValueError, OverflowError, msgspec.MsgspecError) as error:
        raise TypeError(f"key {key!r}: {value!r} cannot be written as JSON: {error}") from error
