"""Promise P6: a server that is read-only for a while counts as unavailable, not as an error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from celery import Celery

from tests.helpers.fleet import outcome
from tests.helpers.mariadb import MariaDB
from tests.helpers.servers import Postgres, Standby
from tests.helpers.shop import Gate, Shop
from tests.helpers.waiting import wait_until


@pytest.mark.parametrize(
    ("when", "reason"), [("before the run", "StateLoadFailed"), ("in it", "StatePersistFailed")]
)
def test_a_server_that_is_read_only_for_a_while(
    own_server: Postgres | MariaDB,
    make_shop: Callable[..., Shop],
    make_gate: Callable[[str], Gate],
    client: Callable[[], Celery],
    when: str,
    reason: str,
) -> None:
    """The server becomes read-only before the run or in mid-run, and the message is retried, so no
    work fails. In mid-run, the body's own statement in ``transaction()`` is the first to be
    refused.
    """
    shop = make_shop(own_server)
    app, start = client(), make_gate("start")
    worker = shop.start()
    assert outcome(app.send_task("steps", (["copy"],))) == 1
    if when == "before the run":
        own_server.make_read_only(True)
    result = app.send_task("steps", (start.step, ["copy"]))
    if when == "in it":
        shop.wait_reached("start")
        own_server.make_read_only(True)
    start.open()
    wait_until(lambda: "Retry in" in worker.output or result.ready(), "the message is retried")
    own_server.make_read_only(False)
    assert outcome(result) == 2
    assert f": {reason}(" in worker.output
    assert shop.rows() == [1, 2]


def test_no_connection_stays_with_the_server_that_is_read_only(
    own_postgres: Postgres,
    make_shop: Callable[..., Shop],
    make_standby: Callable[[], Standby],
    client: Callable[[], Celery],
) -> None:
    """A standby is promoted. The old primary is read-only and still answers. New connections lead
    to the new primary, but no existing connection ends by itself.

    At the first refusal the worker closes all its connections, and no message has to be retried.
    """
    shop = make_shop(own_postgres)
    app = client()
    worker = shop.start()
    assert outcome(app.send_task("steps", (["copy"],))) == 1
    standby = make_standby()
    own_postgres.make_read_only(True)
    standby.promote()
    shop.proxy.target = standby.port
    assert outcome(app.send_task("steps", (["copy"],))) == 2
    assert "Retry in" not in worker.output
    assert standby.column("shop", "SELECT n FROM copied ORDER BY n") == [1, 2]
