"""The package's events in Celery's own ``celery events``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from celery import Celery

from tests.helpers.fleet import Fleet, Program, outcome

APP = "tests.apps.seen_app"

pytestmark = pytest.mark.fleet(store="postgresql", app=APP)


@pytest.fixture
def dump(fleet: Fleet) -> Iterator[Program]:
    """A running ``celery events --dump``, which prints each event that it receives."""
    environment = fleet.environment | {"PYTHONUNBUFFERED": "1"}
    program = Program(["events", "--dump"], environment, fleet.directory / "events.log", APP)
    yield program
    program.close()


def test_celery_events_shows_our_events(
    fleet: Fleet, client: Callable[[], Celery], dump: Program
) -> None:
    fleet.start("-P", "solo", "-E")
    dump.wait_for("heartbeat")
    outcome(client().send_task("counted", ("a",)))
    dump.wait_for("singleton released")
    printed = re.findall(r"\] singleton (.*?): (.*)", dump.output)
    assert [kind for kind, _ in printed] == ["acquired", "state loaded", "state saved", "released"]
    assert all('counted{"key":"a"}' in fields for _, fields in printed)
