"""Run every Python block of README and docs, and check their links and commands."""

from __future__ import annotations

import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery

from celery_singleton_state import RetryPolicy
from celery_singleton_state.beat import SingletonScheduler
from celery_singleton_state.cli import singleton
from celery_singleton_state.runtime import close_runtime, runtime_of
from celery_singleton_state.ticks import message_of

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def indented_commands(text: str) -> list[str]:
    return re.findall(
        r"^    (\S.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE
    )


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 120


def test_the_readmes_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the README's blocks in one namespace, as a reader would, with the store in memory."""
    monkeypatch.setenv("CELERY_SINGLETON_STORE_URL", "memory://")
    orders = sa.Table("orders", sa.MetaData(), sa.Column("id", sa.Integer))
    stock = [{"id": n} for n in range(1, 11)]

    def fetch_orders(tenant: str, after: int) -> list[dict[str, int]]:
        return [order for order in stock if order["id"] > after][:4]

    names: dict[str, Any] = {
        "fetch_orders": fetch_orders,
        "insert_order": sa.insert(orders),
        "RetryPolicy": RetryPolicy,
        "__name__": "shop",
    }
    for block in python_blocks(README):
        exec(compile(block, "README.md", "exec", dont_inherit=True), names)
    app: Celery = names["app"]
    orders.create(runtime_of(app).sql.engine)
    assert [names["import_orders"]("acme") for _ in range(4)] == [4, 4, 2, 0]
    assert names["import_orders"]("other") == 4
    with runtime_of(app).sql.engine.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(orders)).scalar() == 14
    assert names["close_books"]() is None
    close_runtime(app)


PAGES = sorted(page for page in (ROOT / "docs").glob("*.md") if python_blocks(page.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_pages_python(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a page's blocks in one namespace, in a process of its own, because they set up apps."""
    monkeypatch.setenv("CELERY_SINGLETON_STORE_URL", "memory://")
    code = "\n".join(python_blocks(page.read_text()))
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr


def test_the_beat_pages_first_example_is_right() -> None:
    """A beat accepts the first page's schedule, and its task returns the day that the page says."""
    names: dict[str, Any] = {"__name__": "shop"}
    exec(python_blocks((ROOT / "docs" / "beat.md").read_text())[0], names)
    app: Celery = names["app"]
    app.conf.singleton_store_url = "memory://"
    beat = SingletonScheduler(app)
    assert beat.schedule["close-day"].catch_up == "all"
    assert beat.schedule["close-day"].skip_if_older_than == float("inf")
    tick = message_of(beat.schedule["close-day"], "shop", datetime(2026, 11, 23, 23, 5, tzinfo=UTC))
    assert names["close_day"].apply(**tick.options).result == "2026-11-23"
    close_runtime(app)


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_readmes_commands_are_known() -> None:
    """The README's commands exist: CI runs the first two itself, and the others are ours."""
    commands = indented_commands(README)
    by_ci = [command for command in commands if command.startswith("python3 -m venv")]
    assert len(by_ci) == 2
    ci = (ROOT / ".ci" / "run").read_text()
    assert "README.md" in ci
    # The second command is tox for this Python only; CI runs tox with all environments.
    assert by_ci[1].endswith(" .venv/bin/tox -e py")
    assert re.search(r"^TOX_SKIP_ENV=\S+ \.venv/bin/tox\b(?! -e)", ci, re.MULTILINE)
    ours = [command.split()[4] for command in commands if command.startswith("celery ")]
    assert ours == ["migrate", "ls", "show", "next", "exporter"]
    assert set(ours) <= set(singleton.commands)
    assert len(commands) == len(by_ci) + len(ours) + 1  # and the installation by name
