"""Runs on some stores: what each store does is tests/stores' affair."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import signals

from tests.helpers.stores import url_on


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database: the test runs once for each store."""
    return url_on(request.param, request, tmp_path)


@pytest.fixture(params=["sqlite", "postgresql"])
def shared_store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The same, of stores that several processes can share."""
    return url_on(request.param, request, tmp_path)


@pytest.fixture
def published() -> Iterator[list[str]]:
    """The ids of all messages that were sent."""
    ids: list[str] = []

    def note(headers: dict[str, Any], **_: Any) -> None:
        ids.append(headers["id"])

    signals.before_task_publish.connect(note)
    yield ids
    signals.before_task_publish.disconnect(note)
