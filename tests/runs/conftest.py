"""Fixtures for tests of runs, on a few stores. tests/stores tests each store by itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import signals

from tests.helpers.stores import url_on


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty database. The test runs once for each store."""
    return url_on(request.param, request, tmp_path)


@pytest.fixture(params=["sqlite", "postgresql"])
def shared_store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty database that several processes can share.

    The test runs once for each store.
    """
    return url_on(request.param, request, tmp_path)


@pytest.fixture
def published() -> Iterator[list[str]]:
    """Return a list that gets the task id of each message when it is published."""
    ids: list[str] = []

    def note(headers: dict[str, Any], **_: Any) -> None:
        ids.append(headers["id"])

    signals.before_task_publish.connect(note)
    yield ids
    signals.before_task_publish.disconnect(note)
