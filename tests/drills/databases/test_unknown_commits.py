"""Promise P3: rows and state agree even if a run does not learn the outcome of a commit."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded
from celery.result import AsyncResult

from tests.helpers.fleet import Worker, outcome
from tests.helpers.mariadb import MariaDB
from tests.helpers.servers import Held, Postgres
from tests.helpers.shop import Gate, Shop
from tests.helpers.waiting import wait_until

NAME = "persistent steps"
#: A client's message to PostgreSQL or MariaDB that contains nothing but COMMIT.
COMMIT = rb"(^Q.{4}|\x03)COMMIT\0?$"


def check_rows_and_state_agree(shop: Shop, app: Celery) -> None:
    """Check, with one more run, that each number is copied exactly once."""
    copied = outcome(app.send_task(NAME, (["copy"],)))
    assert shop.rows() == list(range(1, copied + 1))


def hold_commit(
    shop: Shop, app: Celery, start: Gate, *more: list[str]
) -> tuple[AsyncResult[Any], Held]:
    """Send a task whose body begins after the gate ``start`` opens. Return its result, and its
    first COMMIT, which stalls on its way to the server.
    """
    result = app.send_task(NAME, (start.step, ["copy"], *more))
    shop.wait_reached("start")
    commit = shop.proxy.hold(COMMIT)
    start.open()
    return result, commit


def wait_failed(worker: Worker) -> None:
    """Wait until the run has failed because of the store. It may then be retried or not."""
    errors = ("HeartbeatFailed", "StatePersistFailed")
    wait_until(lambda: any(error in worker.output for error in errors), "the run fails")


@pytest.fixture
def shop(own_server: Postgres | MariaDB, make_shop: Callable[..., Shop]) -> Shop:
    return make_shop(own_server, CELERY_SINGLETON_HEARTBEAT_INTERVAL=2)


def test_a_commit_that_is_carried_out_after_its_client_has_given_up(
    shop: Shop, client: Callable[[], Celery], make_gate: Callable[[str], Gate]
) -> None:
    """COMMIT stalls on its way. The client gives COMMIT up and asks the row, which its own
    transaction has locked. Then COMMIT is carried out. The run goes on as if COMMIT had been
    answered.
    """
    app, start = client(), make_gate("start")
    shop.start()
    result, commit = hold_commit(shop, app, start, ["copy"])
    commit.wait_abandoned()
    commit.deliver()
    assert outcome(result) == 2
    assert shop.rows() == [1, 2]
    check_rows_and_state_agree(shop, app)


def test_a_commit_that_is_carried_out_after_its_run_has_ended(
    shop: Shop, client: Callable[[], Celery], make_gate: Callable[[str], Gate]
) -> None:
    """COMMIT stalls on its way for so long that the run no longer trusts its lease and fails. Then
    COMMIT is carried out. The release that the run sent at its end must not restore the state from
    before the transaction.
    """
    app, start = client(), make_gate("start")
    worker = shop.start()
    result, commit = hold_commit(shop, app, start)
    wait_failed(worker)
    commit.deliver()
    outcome(result)
    check_rows_and_state_agree(shop, app)


def test_a_commit_that_is_never_carried_out(
    shop: Shop, client: Callable[[], Celery], make_gate: Callable[[str], Gate]
) -> None:
    """The connection breaks while COMMIT is on its way. Neither rows nor state are stored."""
    app, start = client(), make_gate("start")
    shop.start()
    result, commit = hold_commit(shop, app, start)
    commit.wait()
    commit.forget()
    outcome(result)
    check_rows_and_state_agree(shop, app)


def test_the_answer_to_a_commit_is_lost_and_the_store_is_away_for_a_moment(
    shop: Shop, client: Callable[[], Celery], make_gate: Callable[[str], Gate]
) -> None:
    """COMMIT is carried out, but its answer is lost. For the next 0.2 s the store refuses to say
    whether the transaction was committed.
    """
    app, start = client(), make_gate("start")
    shop.start()
    result = app.send_task(NAME, (start.step, ["copy"], ["copy"]))
    shop.wait_reached("start")
    shop.proxy.lose_answer_to(COMMIT, then="refuse")
    start.open()
    wait_until(lambda: shop.proxy.mode == "refuse", "the answer to COMMIT is lost")
    threading.Timer(0.2, setattr, (shop.proxy, "mode", "pass")).start()
    assert outcome(result) == 2
    assert shop.rows() == [1, 2]
    check_rows_and_state_agree(shop, app)


@pytest.mark.parametrize("committed", [True, False])
def test_a_soft_time_limit_during_a_commit(
    shop: Shop,
    client: Callable[[], Celery],
    make_gate: Callable[[str], Gate],
    committed: bool,
) -> None:
    """The soft time limit ends a body while its COMMIT is on its way.

    The signal reaches the pool's process, which gives COMMIT up. Then COMMIT is carried out, or is
    lost. In both cases the body fails because of its time limit.
    """
    app, start = client(), make_gate("start")
    shop.start()
    result, commit = hold_commit(shop, app, start)
    commit.wait()
    os.kill(shop.wait_reached("start")["pid"], signal.SIGUSR1)
    commit.wait_abandoned()
    if committed:
        commit.deliver()
    else:
        commit.forget()
    assert isinstance(outcome(result), SoftTimeLimitExceeded)
    assert shop.rows() == [1] * committed
    check_rows_and_state_agree(shop, app)


def test_a_commit_that_waits_for_a_standby_that_never_comes(
    own_postgres: Postgres,
    make_shop: Callable[..., Shop],
    client: Callable[[], Celery],
    make_gate: Callable[[str], Gate],
) -> None:
    """PostgreSQL has committed, but answers only after a synchronous standby has confirmed the
    commit, which never happens. Every later write waits in the same way. The client gives up, and
    the run fails. An operator resets the setting, and the server carries out all waiting
    statements.
    """
    shop = make_shop(own_postgres, CELERY_SINGLETON_HEARTBEAT_INTERVAL=2)
    app, start = client(), make_gate("start")
    worker = shop.start()
    result = app.send_task(NAME, (start.step, ["copy"]))
    shop.wait_reached("start")
    own_postgres.configure("synchronous_standby_names", "nobody")
    start.open()
    waits = "wait_event = 'SyncRep' AND query ILIKE 'COMMIT%'"
    wait_until(lambda: own_postgres.backends(waits), "COMMIT waits for the standby")
    wait_failed(worker)
    own_postgres.configure("synchronous_standby_names", "")
    outcome(result)
    check_rows_and_state_agree(shop, app)
