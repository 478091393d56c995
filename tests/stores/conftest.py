"""Fixtures that run a test once for each kind of store. PostgreSQL behind PgBouncer counts as a
kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from celery_singleton_state.migrations.open_store import open_store
from celery_singleton_state.store.base import Leases
from celery_singleton_state.store.redis.store import RedisStore
from tests.helpers.stores import STORES_AND_POOLED, url_on


@pytest.fixture(params=STORES_AND_POOLED)
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty database; the test runs once for each kind of store."""
    return url_on(request.param, request, tmp_path)


@pytest.fixture(params=STORES_AND_POOLED[1:])
def shared_store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty database; the test runs for each store that processes can
    share.
    """
    return url_on(request.param, request, tmp_path)


@pytest.fixture(params=[*STORES_AND_POOLED, "redis"])
def leases(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Leases]:
    """Open a store of each kind, Redis included. Redis keeps leases but no states."""
    opened: Leases
    if request.param == "redis":
        opened = RedisStore(request.getfixturevalue("lease_url"), io_timeout=2.0)
    else:
        url = url_on(request.param, request, tmp_path)
        opened = open_store(url, "kv_store", io_timeout=2.0, pool_size=8, auto_migrate=True)
    yield opened
    opened.close()
