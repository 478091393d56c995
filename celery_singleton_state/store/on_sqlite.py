"""Connections to SQLite."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from typing import Any

from celery.exceptions import ImproperlyConfigured
from sqlalchemy import URL, Engine, event

from .pooled import pooled

#: RETURNING came with this release.
OLDEST = (3, 35)


def make(url: URL, in_memory: bool, io_timeout: float, pool_size: int) -> Engine:
    """An engine.

    :raises ImproperlyConfigured: SQLite is too old.
    """
    if sqlite3.sqlite_version_info < OLDEST:
        raise ImproperlyConfigured(
            f"SQLite {sqlite3.sqlite_version} is too old; "
            f"{'.'.join(map(str, OLDEST))} or newer is needed"
        )
    engine = pooled(
        url,
        1 if in_memory else pool_size,
        io_timeout,
        connect_args={"timeout": io_timeout, "check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, _record: Any) -> None:
        if not in_memory:
            _use_wal(connection, io_timeout)
            connection.execute("PRAGMA synchronous = NORMAL")

    return engine


def _use_wal(connection: sqlite3.Connection, io_timeout: float) -> None:
    """Switch the file to WAL, once: the switch does not wait for other processes by itself."""
    deadline = time.monotonic() + io_timeout
    while connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        with contextlib.suppress(sqlite3.OperationalError):
            connection.execute("PRAGMA journal_mode = WAL")
            continue
        if time.monotonic() > deadline:
            raise sqlite3.OperationalError("database is locked: it could not be switched to WAL")
        time.sleep(0.01)
