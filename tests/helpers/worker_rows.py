"""Rows of the singletons that workers run, and the workers' connections to the database."""

from __future__ import annotations

from typing import Any

import psycopg
from celery import Celery
from sqlalchemy import create_engine

from celery_singleton_state.runtime import runtime_of
from celery_singleton_state.store.base import Row
from tests.helpers.waiting import wait_until


def row_of(app: Celery, name: str) -> Row:
    row = runtime_of(app).store.peek(f"singleton-state:{name}")
    assert row is not None
    return row


def wait_until_free(app: Celery, name: str) -> Row:
    wait_until(lambda: row_of(app, name).holder is None, f"{name} is free")
    return row_of(app, name)


def steal(store_url: str, name: str) -> None:
    """Take all leases of a task from their holders, as if other holders had taken over and released
    them.
    """
    engine = create_engine(store_url)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "UPDATE kv_store SET fence = fence + 1, holder = NULL, expires_at = NULL"
            f" WHERE key LIKE 'singleton-state:{name}%%'"
        )
    engine.dispose()


def connections(server: psycopg.Connection[Any]) -> int:
    found = server.execute(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE application_name = 'celery-singleton-state' AND datname = current_database()"
    )
    return int((found.fetchone() or (0,))[0])
