"""Runs on some stores: what each store does is tests/stores' affair."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import url_on


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database: the test runs once for each store."""
    return url_on(request.param, request, tmp_path)


@pytest.fixture(params=["sqlite", "postgresql"])
def shared_store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The same, of stores that several processes can share."""
    return url_on(request.param, request, tmp_path)
