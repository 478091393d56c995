"""Tests of promise P7: how many statements a run costs, counted at the database or its driver."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pymysql
import pytest
from celery import Celery
from sqlalchemy import event

from celery_singleton_state import singleton_task
from celery_singleton_state.migrations.upgrade import migrate
from celery_singleton_state.runtime import close_runtime, runtime_of
from tests.helpers.servers import Postgres


@dataclass
class Counter:
    n: int = 0


def counting_task(app: Celery) -> Any:
    @singleton_task(app, state_schema=Counter, name="count", shared=False)
    def count(self: Any, checkpoints: int = 0) -> int:
        for _ in range(checkpoints):
            self.checkpoint()
        self.state.n += 1
        return int(self.state.n)

    return count


def test_a_run_is_two_statements_on_postgresql(postgres: Postgres, postgres_url: str) -> None:
    app = Celery("shop", set_as_current=False)
    app.conf.singleton_store_url = (
        f"{postgres_url}?application_name=counted&options=-c%20log_statement%3Dall"
    )
    migrate(runtime_of(app).settings)
    count = counting_task(app)
    # Open the connection first, so that its statements are not counted.
    count()
    before = len(postgres.statements_of("counted"))
    for _ in range(5):
        count()
    count(checkpoints=3)
    verbs = postgres.statements_of("counted")[before:]
    assert verbs == ["INSERT", "UPDATE"] * 5 + ["INSERT", "UPDATE", "UPDATE", "UPDATE", "UPDATE"]
    close_runtime(app)


def test_a_run_is_two_round_trips_on_mariadb(
    mariadb_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text of several statements costs one round trip, so the test counts the texts."""
    app = Celery("shop", set_as_current=False)
    app.conf.singleton_store_url = mariadb_url
    migrate(runtime_of(app).settings)
    count = counting_task(app)
    # Open the connection first, so that its statements are not counted.
    count()
    sent: list[Any] = []
    send = pymysql.connections.Connection._execute_command

    def counted(self: Any, *arguments: Any) -> None:
        sent.append(arguments)
        send(self, *arguments)

    monkeypatch.setattr(pymysql.connections.Connection, "_execute_command", counted)
    for _ in range(5):
        count()
    count(checkpoints=3)
    assert len(sent) == 5 * 2 + 2 + 3
    close_runtime(app)


def test_a_run_is_two_statements_on_sqlite(tmp_path: Path) -> None:
    app = Celery("shop", set_as_current=False)
    app.conf.singleton_store_url = f"sqlite:///{tmp_path}/store.db"
    seen: list[str] = []

    def listen(connection: sqlite3.Connection, *_: Any) -> None:
        connection.set_trace_callback(seen.append)

    store = runtime_of(app).store
    event.listen(store.engine, "connect", listen)
    store.engine.dispose()
    count = counting_task(app)
    count()
    seen.clear()
    for _ in range(5):
        count()
    assert [statement.split()[0] for statement in seen] == ["INSERT", "UPDATE"] * 5
    close_runtime(app)
