"""Real processes on one store: what is asked of a store is held by the tests of each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from celery_singleton_state.migrations.open_store import open_store
from celery_singleton_state.store.sql.store import SqlStore
from tests.helpers.fleet import Fleet


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """That of the fleet, where no marker says another."""
    return f"sqlite:///{tmp_path}/store.db"


@pytest.fixture
def store(fleet: Fleet, store_url: str) -> Iterator[SqlStore]:
    """The fleet's, opened by the test."""
    opened = open_store(store_url, "kv_store", 5.0, auto_migrate=True)
    yield opened
    opened.close()
