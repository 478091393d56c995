"""Promises P2 and P3: a request that is carried out after its client gave it up changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from celery import Celery

from celery_singleton_state import singleton_task
from tests.helpers.fleet import outcome
from tests.helpers.mariadb import MariaDB
from tests.helpers.servers import Postgres
from tests.helpers.shop import Gate, Shop, StoppedBackends


@contextmanager
def stalled(shop: Shop, how: str, pattern: bytes) -> Iterator[None]:
    """Stall a request that contains ``pattern``, and have it carried out at the end of the block.

    ``how`` says where the request stalls: in a stopped process of the server, or on its way to the
    server.
    """
    if how == "by a stopped backend":
        if not isinstance(shop.server, Postgres):
            pytest.skip("MariaDB has threads, which cannot be stopped one by one")
        stopped = StoppedBackends(shop.server)
        try:
            yield
        finally:
            stopped.deliver()
    else:
        held = shop.proxy.hold(pattern)
        yield
        held.deliver()


@pytest.mark.parametrize("later", ["transaction", "checkpoint"])
@pytest.mark.parametrize("how", ["by a stopped backend", "on its way"])
def test_a_late_checkpoint_does_not_undo_later_saves(
    own_server: Postgres | MariaDB,
    make_shop: Callable[..., Shop],
    make_gate: Callable[[str], Gate],
    client: Callable[[], Celery],
    how: str,
    later: str,
) -> None:
    """A checkpoint stalls. The checkpoint is repeated over another connection, and answered. The
    body saves newer states, together with rows. Then the first copy of the checkpoint is carried
    out.

    The state of the late checkpoint is not stored. The next run goes on after the newest state, and
    no row is doubled.
    """
    shop = make_shop(own_server)
    shop.start()
    app, start, end = client(), make_gate("start"), make_gate("end")
    newer: list[list[Any]] = [["copy"], ["copy"]]
    if later == "checkpoint":
        newer += [["mark", "newer"], ["checkpoint"]]
    steps = [start.step, ["mark", "late"], ["checkpoint"], *newer, end.step]
    first = app.send_task("steps", steps)
    shop.wait_reached("start")
    with stalled(shop, how, b"late"):
        start.open()
        shop.wait_reached("end")
    end.open()
    assert outcome(first) == 2
    assert outcome(app.send_task("steps", (["copy"],))) == 3
    assert shop.rows() == [1, 2, 3]


def test_a_late_save_at_the_end_does_not_undo_the_next_run(
    own_server: Postgres | MariaDB, make_shop: Callable[..., Shop], client: Callable[[], Celery]
) -> None:
    """The save that also releases the lease stalls. This save is repeated, and answered. Another
    run saves. Then the first copy is carried out, and changes nothing.
    """
    shop = make_shop(own_server)
    shop.start()
    app = client()
    with stalled(shop, "on its way", b"late"):
        assert outcome(app.send_task("steps", (["copy"], ["mark", "late"]))) == 1
        assert outcome(app.send_task("steps", (["copy"], ["mark", ""]))) == 2
    assert outcome(app.send_task("steps", (["copy"],))) == 3
    assert shop.rows() == [1, 2, 3]


def test_a_late_acquisition_delays_the_next_run_by_one_life_at_most(
    own_server: Postgres | MariaDB, make_shop: Callable[..., Shop], client: Callable[[], Celery]
) -> None:
    """A request for a lease of ten minutes stalls and is repeated. The run ends and releases the
    lease. Then the first copy is carried out: now a lease is held that no run has. The next run
    gets the lease after an ordinary life at the latest, which is 4 s here.
    """
    shop = make_shop(own_server, CELERY_SINGLETON_HEARTBEAT_INTERVAL=2)
    shop.start()
    app = client()
    assert outcome(app.send_task("long steps", (["copy"],))) == 1
    with stalled(shop, "on its way", b"stalled-message"):
        stalls = app.send_task("long steps", (["copy"],), task_id="stalled-message")
        assert outcome(stalls) == 2
    assert outcome(app.send_task("long steps", (["copy"],))) == 3
    assert shop.rows() == [1, 2, 3]


def test_a_message_that_is_done_is_not_queued_again_by_a_late_request(
    own_server: Postgres | MariaDB, make_shop: Callable[..., Shop], client: Callable[[], Celery]
) -> None:
    """The request that records a queued message stalls and is given up. The message is sent, runs
    and ends. Then the request is carried out. All the same, the next message is published at once.
    """
    shop = make_shop(own_server, CELERY_SINGLETON_HEARTBEAT_INTERVAL=2)
    shop.start()

    def body(self: Any) -> None:
        """Do nothing: only the name and the options of this task are used. The worker runs another
        body.
        """

    task: Any = singleton_task(client(), shared=False, name="sent once", enqueue_once=True)(body)
    assert outcome(task.delay()) == "ran"
    with stalled(shop, "on its way", b"stalled-message"):
        assert outcome(task.apply_async(task_id="stalled-message")) == "ran"
    again = task.delay()
    assert again.id != "stalled-message"
    assert outcome(again) == "ran"
