"""P3: rows and state agree after a commit whose outcome the run could not know."""

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
#: A message of a client's to PostgreSQL or MariaDB that is nothing but this.
COMMIT = rb"(^Q.{4}|\x03)COMMIT\0?$"


def check_rows_and_state_agree(shop: Shop, app: Celery) -> None:
    """The next run copies the next number: none comes twice, none is left out."""
    copied = outcome(app.send_task(NAME, (["copy"],)))
    assert shop.rows() == list(range(1, copied + 1))


def hold_commit(
    shop: Shop, app: Celery, start: Gate, *more: list[str]
) -> tuple[AsyncResult[Any], Held]:
    """The result of a run, and its first COMMIT, which stalls on its way."""
    result = app.send_task(NAME, (start.step, ["copy"], *more))
    shop.wait_reached("start")
    commit = shop.proxy.hold(COMMIT)
    start.open()
    return result, commit


def wait_failed(worker: Worker) -> None:
    """Until the run has failed over the store, whether it is retried or not."""
    errors = ("HeartbeatFailed", "StatePersistFailed")
    wait_until(lambda: any(error in worker.output for error in errors), "the run fails")


@pytest.fixture
def shop(own_server: Postgres | MariaDB, make_shop: Callable[..., Shop]) -> Shop:
    return make_shop(own_server, CELERY_SINGLETON_HEARTBEAT_INTERVAL=2)


def test_a_commit_that_is_carried_out_after_its_client_has_given_up(
    shop: Shop, client: Callable[[], Celery], make_gate: Callable[[str], Gate]
) -> None:
    """COMMIT stalls on its way; the client gives up and asks the row, which its transaction has
    locked; then COMMIT is carried out. The run goes on as if it had been answered.
    """
    app, start = client(), make_gate("start")
    shop.start()
    result, commit = hold_commit(shop, app, start, ["copy"])
    commit.wait_given_up()
    commit.deliver()
    assert outcome(result) == 2
    assert shop.rows() == [1, 2]
    check_rows_and_state_agree(shop, app)


def test_a_commit_that_is_carried_out_after_its_run_has_ended(
    shop: Shop, client: Callable[[], Celery], make_gate: Callable[[str], Gate]
) -> None:
    """The same, when the run has failed, for its lease was not trusted for so long: what it sent
    at its end must not put the state back that was there before the transaction.
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
    """The connection breaks while COMMIT is on its way: neither rows nor state are there."""
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
    """It is committed; for 0.2 s nobody answers the question whether it is."""
    app, start = client(), make_gate("start")
    shop.start()
    result = app.send_task(NAME, (start.step, ["copy"], ["copy"]))
    shop.wait_reached("start")
    shop.proxy.lose_answer_to(COMMIT, then="refuse")
    start.open()
    wait_until(lambda: shop.proxy.mode == "refuse", "the answer is lost")
    threading.Timer(0.2, setattr, (shop.proxy, "mode", "pass")).start()
    assert outcome(result) == 2
    assert shop.rows() == [1, 2]
    check_rows_and_state_agree(shop, app)


@pytest.mark.parametrize("committed", [True, False])
def test_a_soft_time_limit_that_strikes_in_a_commit(
    shop: Shop,
    client: Callable[[], Celery],
    make_gate: Callable[[str], Gate],
    committed: bool,
) -> None:
    """COMMIT is on its way, the pool's process is told of the time limit, and gives up; then
    COMMIT is carried out, or is not. The body fails by its time limit either way.
    """
    app, start = client(), make_gate("start")
    shop.start()
    result, commit = hold_commit(shop, app, start)
    commit.wait()
    os.kill(shop.wait_reached("start")["pid"], signal.SIGUSR1)
    commit.wait_given_up()
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
    """PostgreSQL has committed, and waits for a synchronous standby before it says so, as every
    write does from then on. The client gives up, and the run fails. An operator takes the setting
    back, and all that was left in the server is carried out.
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
