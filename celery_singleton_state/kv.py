"""The table as a plain key-value store.

It shares its table with the singletons and never touches their leases: a singleton's row that
is removed loses its state and keeps its fence.
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
    """JSON values by key, in the singletons' table.

    Every method raises :exc:`KeyValueStoreError` when the database cannot be reached, refuses,
    or holds a value that is not JSON; and :exc:`~celery.exceptions.ImproperlyConfigured` when the
    URL cannot be used. It can be used as a context manager, which closes it.

    :param url: a SQLAlchemy URL of PostgreSQL, MariaDB, MySQL or SQLite, or ``memory://``.
    :param table: the table's name, which may be qualified. On SQLite it is made if missing.
    :param timeout: seconds of silence after which the database counts as out of reach.
    :param round_trip: whether a value is refused that :meth:`get` would return changed, such as a
        set, which JSON has as a list. False: what JSON has a form for is stored.
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
        """The store that the app's settings name, over the same connections."""
        return cls._over(Rows(lambda: runtime_of(app).sql), lambda: None, round_trip)

    @classmethod
    def _over(cls, rows: Rows, close: Callable[[], None], round_trip: bool) -> Self:
        made = cls.__new__(cls)
        made._rows = rows
        made._close = close
        made._round_trip = round_trip
        return made

    def close(self) -> None:
        """Close this process's connections, unless they are an app's; the next use reopens."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prefix(self, prefix: str) -> Self:
        """The same store, seen under a prefix: its keys are without it."""
        return self._over(self._rows.under(prefix), self._close, self._round_trip)

    def for_schema(self, schema: type[T]) -> SchemaStore[T]:
        """The same store, its values of one type."""
        return SchemaStore(self._rows, schema, self._round_trip)

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or the default when there is none."""
        raw = self._rows.get(key)
        return default if raw is None else _decoded(key, raw, Any)

    def set(self, key: str, value: Any) -> None:
        """Store a value of JSON's types: dicts with str keys, lists, str, int, float, bool, None.

        :raises TypeError: it is of another type, or NaN or infinite. :meth:`for_schema` stores
            values of other types.
        """
        self._rows.set(key, self._encoded(key, value))

    def get_bytes(self, key: str, default: bytes | None = None) -> bytes | None:
        """The bytes that :meth:`set_bytes` stored, or the default when there are none."""
        raw = self._rows.get(key)
        return default if raw is None else _decoded(key, raw, bytes)

    def set_bytes(self, key: str, value: bytes) -> None:
        """Store bytes, as base64 in a JSON string."""
        self._rows.set(key, _written(key, value))

    def has(self, key: str) -> bool:
        """Whether there is a value."""
        return self._rows.get(key) is not None

    def remove(self, key: str) -> bool:
        """Remove a value; false when there was none."""
        return self._rows.remove(key) > 0

    def clear(self) -> None:
        """Remove all values under this store's prefix."""
        self._rows.clear()

    def size(self) -> int:
        """How many values there are under this store's prefix."""
        return self._rows.count()

    def is_empty(self) -> bool:
        """Whether there is no value under this store's prefix."""
        return not self._rows.any()

    def modify(self, key: str, fn: Callable[[Any], Any], default: Any = None) -> Any:
        """Replace a value by what a function makes of it, atomically; returns the new one.

        The row is locked while the function runs, so that no other change comes between. What
        the function raises is raised here, and the value stays.

        :param default: what the function is given when there is no value.
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
    """A :class:`KeyValueStore` whose values are of one type.

    A value that does not fit, stored or given, is a :exc:`KeyValueStoreError`, and so is a given
    one that would come back changed.
    """

    def __init__(self, rows: Rows, schema: type[T], round_trip: bool) -> None:
        self._rows = rows
        self._codec = Codec(schema, round_trip=round_trip)

    def get(self, key: str, default: T | None = None) -> T | None:
        """The value, or the default when there is none."""
        raw = self._rows.get(key)
        return default if raw is None else self._decoded(key, raw)

    def set(self, key: str, value: T) -> None:
        """Store a value."""
        self._rows.set(key, self._encoded(key, value))

    def modify(self, key: str, fn: Callable[[T | None], T], default: T | None = None) -> T:
        """As :meth:`KeyValueStore.modify`."""

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
    """A store of its own for each process: a forked child leaves its parent's alone."""

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
