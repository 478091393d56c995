"""The stores on which tests run, and apps that use these stores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.backends import cache

from celery_singleton_state.runtime import close_runtime

STORES = ("memory", "sqlite", "postgresql", "mariadb")
SERVERS = {
    "postgresql": "postgres_url",
    "mariadb": "mariadb_url",
    "pgbouncer": "pgbouncer_url",
    "latin1": "latin1_url",
    "sql_ascii": "sql_ascii_url",
}

#: The stores of tests of the stores themselves: these tests also run through a pooler, unlike tests
#: of code that uses a store.
STORES_AND_POOLED = (*STORES, "pgbouncer")


def url_on(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty database on a store.

    :param name: the name of the store, or of a fixture that returns its URL.
    """
    if name == "memory":
        return "memory://"
    if name == "sqlite":
        return f"sqlite:///{tmp_path}/store.db"
    url: str = request.getfixturevalue(SERVERS.get(name, name))
    return url


def apps_on(store_url: str) -> Iterator[Callable[..., Celery]]:
    made: list[Celery] = []

    def make(**settings: Any) -> Celery:
        app = Celery("shop", broker="memory://", backend="cache+memory://", set_as_current=False)
        app.conf.update(
            {"singleton_store_url": store_url, "singleton_auto_migrate": True} | settings
        )
        made.append(app)
        return app

    yield make
    # Remove the results, because all apps of a process share Celery's results in memory, and ticks
    # of different tests have the same ids.
    cache._DUMMY_CLIENT_CACHE.clear()
    for app in made:
        close_runtime(app)
        app.close()
