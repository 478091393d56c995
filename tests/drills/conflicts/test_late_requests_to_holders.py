"""Requests to a lease's holder are not forgotten, and late requests do not replace newer ones."""

from __future__ import annotations

from collections.abc import Callable

from celery import Celery

from celery_singleton_state import HeartbeatFailed
from celery_singleton_state.runtime import runtime_of
from tests.helpers.fleet import outcome
from tests.helpers.mariadb import MariaDB
from tests.helpers.servers import Postgres
from tests.helpers.shop import Gate, Shop
from tests.helpers.waiting import wait_until


def test_a_late_older_message_does_not_replace_the_arguments_of_a_newer_one(
    own_server: Postgres | MariaDB,
    make_shop: Callable[..., Shop],
    make_gate: Callable[[str], Gate],
    client: Callable[[], Celery],
) -> None:
    """A run is in progress. An older message records a pending run, but its statement stalls, and
    the message fails. A newer message records a pending run with other arguments. Then the older
    statement is carried out. The pending run has the newer arguments.
    """
    shop = make_shop(own_server, CELERY_SINGLETON_HEARTBEAT_INTERVAL=2)
    app, name, end = client(), "coalesced steps", make_gate("end")
    shop.start("-c", "2")
    running = app.send_task(name, (["copy"], end.step))
    shop.wait_reached("end")
    late = shop.proxy.hold(b"ancient")
    older = app.send_task(name, (["copy"], ["mark", "ancient"]))
    assert isinstance(outcome(older), Exception)
    assert outcome(app.send_task(name, (["copy"], ["mark", "newer"]))) is None
    late.deliver()
    end.open()
    assert outcome(running) == 1
    wait_until(lambda: shop.rows() == [1, 2], "the pending run has copied")
    shop.wait_released(name, 30)
    row = shop.row(name)
    assert row is not None
    assert "newer" in row.value


def test_a_repeated_acquisition_keeps_a_handoff_request(
    own_server: Postgres | MariaDB,
    make_shop: Callable[..., Shop],
    client: Callable[[], Celery],
) -> None:
    """A lease is acquired, and the answer is lost. Before the acquisition is repeated, another
    process requests a handoff, once. The body learns of the request at its first checkpoint.
    """
    shop = make_shop(own_server)
    app, name = client(), "steps"
    shop.start()
    shop.proxy.lose_answer_to(b"unanswered-message")
    repeated = shop.proxy.hold(b"unanswered-message", skip=1)
    result = app.send_task(
        name, (["copy"], ["mark", "unheard"], ["checkpoint"]), task_id="unanswered-message"
    )
    repeated.wait()
    store = runtime_of(app).store
    row = shop.row(name)
    assert row is not None
    assert row.held
    assert store.requests.request_handoff(row, "somebody")
    repeated.deliver()
    error = outcome(result)
    assert isinstance(error, HeartbeatFailed)
    assert "somebody" in error.detail
