"""Fixtures for tests of beats that run in the test's process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.beats import Beats


@pytest.fixture
def beats(shared_store_url: str) -> Iterator[Beats]:
    made = Beats(shared_store_url)
    yield made
    made.close()


@pytest.fixture
def on_sqlite(tmp_path: Path) -> Iterator[Beats]:
    """Return beats on SQLite, for tests whose outcome does not depend on the store."""
    made = Beats(f"sqlite:///{tmp_path}/store.db")
    yield made
    made.close()
