"""PostgreSQL is stopped while a real worker uses it: the worker names the right reason and retries,
and nothing is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from celery import Celery

from celery_singleton_state.runtime import runtime_of
from tests.helpers.fleet import Fleet, outcome
from tests.helpers.queues import QUORUM
from tests.helpers.servers import Postgres
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.fleet(
    store="shop_url", broker=("valkey", *QUORUM), CELERY_SINGLETON_HEARTBEAT_INTERVAL="2"
)


@pytest.fixture
def shop_url(own_postgres: Postgres) -> str:
    return own_postgres.create_database("shop")


def test_the_server_is_stopped_before_the_run(
    fleet: Fleet, client: Callable[[], Celery], own_postgres: Postgres
) -> None:
    app = client()
    worker = fleet.start("-c", "1")
    assert outcome(app.send_task("increment")) == 1
    own_postgres.stop()
    result = app.send_task("increment")
    wait_until(lambda: "Retry in 0.2s: StateLoadFailed" in worker.output, "the retry is sent")
    own_postgres.start()
    assert outcome(result) == 2
    assert len(fleet.notes("enter")) == 2


def test_the_server_is_stopped_in_the_body(
    fleet: Fleet, client: Callable[[], Celery], own_postgres: Postgres, tmp_path: Path
) -> None:
    """The server is stopped during the body, so the save fails. The run is repeated, and starts
    from the state before the first attempt.
    """
    app = client()
    worker = fleet.start("-c", "1")
    go = tmp_path / "go"
    result = app.send_task("increment", (str(go),))
    fleet.wait_for_notes("enter")
    own_postgres.stop()
    go.touch()
    wait_until(lambda: "StatePersistFailed" in worker.output, "the save fails")
    own_postgres.start()
    assert outcome(result) == 1
    row = runtime_of(app).store.peek("singleton-state:increment")
    assert row is not None
    assert (row.value, row.last_outcome) == ('{"n":1}', "succeeded")
    assert [note["n"] for note in fleet.notes("enter")] == [0, 0]


def test_a_server_restarted_between_runs_causes_no_retry(
    fleet: Fleet, client: Callable[[], Celery], own_postgres: Postgres
) -> None:
    """PostgreSQL is restarted between two runs. The pool's broken connection is replaced without a
    retry of the message.
    """
    app = client()
    worker = fleet.start("-c", "1")
    assert outcome(app.send_task("increment")) == 1
    own_postgres.stop()
    own_postgres.start()
    assert outcome(app.send_task("increment")) == 2
    assert "Retry" not in worker.output


def test_a_worker_starts_without_its_store(
    fleet: Fleet, client: Callable[[], Celery], own_postgres: Postgres
) -> None:
    app = client()
    runtime_of(app).store.check()
    own_postgres.stop()
    worker = fleet.start("-c", "1")
    assert "the store is unavailable" in worker.output
    result = app.send_task("increment")
    wait_until(lambda: "StateLoadFailed" in worker.output, "the retry is sent")
    own_postgres.start()
    assert outcome(result) == 1
