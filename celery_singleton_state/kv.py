"""``KeyValueStore``: the singletons' table, used as a key-value store.

A ``KeyValueStore`` never changes the lease columns of a row. If it removes the value of a
singleton's row, the singleton loses its state and keeps its fence.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar

import msgspec
from celery import Celery

from .errors import KeyValueStoreError
from .migrations.open_store import open_store
from .runtime import runtime_of
from .state.codec import Codec, StateError
from .state.round_trip import difference
from .store.options import as_argument
from .store.sql.key_values import Rows
from .store.sql.store import SqlStore

T = TypeVar("T")

_TOO_DEEP = "is nested too deeply, or holds itself"


class KeyValueStore:
    """A key-value store of JSON values, in the singletons' table.

    The store is also a context manager that closes the store at the end of the block. Every method
    that accesses the database raises

    - :exc:`KeyValueStoreError` if the database is unavailable, refuses the value, or holds a value
      that cannot be read,
    - :exc:`~celery.exceptions.ImproperlyConfigured` if the URL cannot be used.

    :param url: a SQLAlchemy URL of PostgreSQL, MariaDB, MySQL or SQLite, or ``memory://``.
    :param table: the table's name, with its schema if need be. Default: ``kv_store``. On SQLite a
        missing table is created; on other databases ``celery singleton migrate`` creates it.
    :param timeout: seconds without an answer after which the database counts as unavailable.
        Default: 10.
    :param round_trip: whether to refuse a value that :meth:`get` would return changed, such as a
        set, which would come back as a list. Default: true. False: every value that has a form in
        JSON is stored in that form.
    """

    def __init__(
        self,
        url: str,
        table: str = "kv_store",
        *,
        timeout: float = 10.0,
        round_trip: bool = True,
    ) -> None:
        own = _OwnStore(url, table, timeout)
        self._rows = Rows(own.open, told=as_argument)
        self._close: Callable[[], None] = own.close
        self._round_trip = round_trip

    @classmethod
    def from_app(cls, app: Celery, *, round_trip: bool = True) -> Self:
        """Return a key-value store in the table of an app's singletons.

        The store uses the app's own connections, and its :meth:`close` leaves them open.

        :param app: the Celery app, whose settings name the database and the table.
        :param round_trip: as in the constructor.
        """
        return cls._over(Rows(lambda: runtime_of(app).sql), lambda: None, round_trip)

    @classmethod
    def _over(cls, rows: Rows, close: Callable[[], None], round_trip: bool) -> Self:
        """Make a key-value store over the rows of an opened table.

        :param close: a function that closes the connections of the rows.
        """
        made = cls.__new__(cls)
        made._rows = rows
        made._close = close
        made._round_trip = round_trip
        return made

    def close(self) -> None:
        """Close this process's connections to the database.

        The next use of the store opens them again. The connections of an app stay open.
        """
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prefix(self, prefix: str) -> Self:
        """Return a view of this store that has only the keys with a prefix.

        The view adds the prefix to each key it is given: ``store.prefix("a:").get("b")`` is
        ``store.get("a:b")``. A view of a view adds both prefixes.
        """
        return self._over(self._rows.under(prefix), self._close, self._round_trip)

    def for_schema(self, schema: type[T]) -> SchemaStore[T]:
        """Return a view of this store whose values are all of one type.

        :param schema: the type: a dataclass, a msgspec struct, a pydantic model, or any other type
            that can be a task's ``state_schema``.
        """
        return SchemaStore(self._rows, schema, self._round_trip)

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key.

        :param default: returned if the key has no value. Default: ``None``.
        """
        raw = self._rows.get(key)
        return default if raw is None else _decoded(key, raw, Any)

    def set(self, key: str, value: Any) -> None:
        """Store a value under a key, in place of the key's present value.

        :param value: a dict with str keys, list, str, int, float, bool or None. For values of other
            types use :meth:`for_schema`.
        :raises TypeError: the value is of another type, or contains a float that is NaN or
            infinite.
        """
        self._rows.set(key, self._encoded(key, value))

    def get_bytes(self, key: str, default: bytes | None = None) -> bytes | None:
        """Return the bytes that :meth:`set_bytes` stored under a key.

        :param default: returned if the key has no value. Default: ``None``.
        """
        raw = self._rows.get(key)
        return default if raw is None else _decoded(key, raw, bytes)

    def set_bytes(self, key: str, value: bytes) -> None:
        """Store bytes under a key, as a JSON string in base64."""
        self._rows.set(key, _written(key, value))

    def has(self, key: str) -> bool:
        """Whether the key has a value."""
        return self._rows.get(key) is not None

    def remove(self, key: str) -> bool:
        """Remove the value of a key.

        :returns: whether the key had a value.
        """
        return self._rows.remove(key) > 0

    def clear(self) -> None:
        """Remove all values under this store's prefix."""
        self._rows.clear()

    def size(self) -> int:
        """Return the number of values under this store's prefix."""
        return self._rows.count()

    def is_empty(self) -> bool:
        """Whether there is no value under this store's prefix."""
        return not self._rows.any()

    def modify(self, key: str, fn: Callable[[Any], Any], default: Any = None) -> Any:
        """Change the value of a key by a function, atomically.

        The row is locked while the function runs, so no other change comes between. If the function
        raises an error, the value stays and the error is raised to the caller.

        :param fn: called with the present value; returns the new value.
        :param default: passed to ``fn`` if the key has no value. Default: ``None``.
        :returns: the new value.
        :raises TypeError: the new value cannot be stored, as in :meth:`set`.
        """

        def change(raw: str | None) -> tuple[str, Any]:
            new = fn(default if raw is None else _decoded(key, raw, Any))
            return self._encoded(key, new), new

        return self._rows.modify(key, change)

    def _encoded(self, key: str, value: Any) -> str:
        document = _written(key, value)
        if self._round_trip:
            _refuse_changed(key, value, _decoded(key, document, Any))
        return document


class SchemaStore(Generic[T]):
    """A view of a :class:`KeyValueStore` whose values are all of one type.

    Every method raises :exc:`KeyValueStoreError` if the database is unavailable, if a stored or a
    given value does not fit the type, or if the next :meth:`get` would return a given value
    changed. A store with ``round_trip=False`` does not make the last of these checks.
    """

    def __init__(self, rows: Rows, schema: type[T], round_trip: bool) -> None:
        self._rows = rows
        self._codec = Codec(schema, round_trip=round_trip)

    def get(self, key: str, default: T | None = None) -> T | None:
        """Return the value of a key.

        :param default: returned if the key has no value. Default: ``None``.
        """
        raw = self._rows.get(key)
        return default if raw is None else self._decoded(key, raw)

    def set(self, key: str, value: T) -> None:
        """Store a value under a key, in place of the key's present value."""
        self._rows.set(key, self._encoded(key, value))

    def modify(self, key: str, fn: Callable[[T | None], T], default: T | None = None) -> T:
        """Change the value of a key by a function, atomically; see :meth:`KeyValueStore.modify`."""

        def change(raw: str | None) -> tuple[str, T]:
            new = fn(default if raw is None else self._decoded(key, raw))
            return self._encoded(key, new), new

        return self._rows.modify(key, change)

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


class _OwnStore:
    """Opens a database once in each process, because a forked child must not use the connections
    of its parent.
    """

    def __init__(self, url: str, table: str, timeout: float) -> None:
        self._arguments = (url, table, timeout)
        self._opened: dict[int, SqlStore] = {}
        self._opening = threading.Lock()

    def open(self) -> SqlStore:
        pid = os.getpid()
        if pid not in self._opened:
            with self._opening:
                if pid not in self._opened:
                    self._opened[pid] = open_store(*self._arguments)
        return self._opened[pid]

    def close(self) -> None:
        store = self._opened.pop(os.getpid(), None)
        if store is not None:
            store.close()


def _decoded(key: str, raw: str, kind: Any) -> Any:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, ValueError) as error:
        raise KeyValueStoreError(f"key {key!r}: its value cannot be read: {error}") from error


def _written(key: str, value: Any) -> str:
    try:
        return msgspec.json.encode(value).decode()
    except (TypeError, ValueError, OverflowError, msgspec.MsgspecError) as error:
        raise TypeError(f"key {key!r}: {value!r} cannot be written as JSON: {error}") from error
    except RecursionError as error:
        raise TypeError(f"key {key!r}: the value {_TOO_DEEP}") from error


def _refuse_changed(key: str, value: Any, read: Any) -> None:
    try:
        changed = difference(value, read, "value")
    except RecursionError as error:
        raise TypeError(f"key {key!r}: the value {_TOO_DEEP}") from error
    if changed:
        raise TypeError(f"key {key!r}: the value would not come back the same: {changed}")
