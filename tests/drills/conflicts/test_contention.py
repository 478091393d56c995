"""Promises P1 and P2 under contention: many processes deliver messages of one singleton."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from celery import Celery

from celery_singleton_state.runtime import runtime_of
from tests.helpers.fleet import Fleet, outcome
from tests.helpers.stores import STORES_AND_POOLED, url_on
from tests.helpers.waiting import wait_until

PROCESSES = 8
DELIVERIES = 200
#: How many deliveries each process makes behind the pooler: fewer, because the test also runs
#: without the pooler, on the same server and with the same statements.
FEWER = 50


@pytest.fixture(params=STORES_AND_POOLED[1:])
def shared_store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database: on each store that processes share, and on PgBouncer."""
    return url_on(request.param, request, tmp_path)


def test_bodies_never_overlap_and_no_increment_is_lost(
    make_fleet: Callable[..., Fleet],
    client: Callable[[], Celery],
    shared_store_url: str,
    request: pytest.FixtureRequest,
) -> None:
    """Eight processes are given 200 deliveries each of one singleton that counts its runs.

    Whatever the interleaving of acquire, body and release: each body leaves before the next body
    enters, and the count equals the number of runs that succeeded.
    """
    fleet = make_fleet(shared_store_url)
    app = client()
    is_pooled = request.node.callspec.params["shared_store_url"] == "pgbouncer"
    deliveries = PROCESSES * (FEWER if is_pooled else DELIVERIES)
    results = [app.send_task("increment") for _ in range(deliveries)]
    fleet.start("-c", str(PROCESSES))
    answers = [outcome(result) for result in results]

    runs = [answer for answer in answers if answer is not None]
    assert sorted(runs) == list(range(1, len(runs) + 1))
    assert {result.state for result in results} == {"SUCCESS"}

    row = wait_until(
        lambda: runtime_of(app).store.peek("singleton-state:increment"), "the row exists"
    )
    assert row.value == f'{{"n":{len(runs)}}}'
    assert row.run_count == len(runs)

    enters, leaves = fleet.notes("enter"), fleet.notes("leave")
    assert len(enters) == len(leaves) == len(runs)
    assert len({note["fence"] for note in enters}) == len(runs)
    moments = sorted([(note["at"], 1) for note in enters] + [(note["at"], -1) for note in leaves])
    inside = 0
    for _, step in moments:
        inside += step
        assert inside in (0, 1)
    # Without conflicts between several processes this test would prove nothing.
    assert len(runs) < deliveries
    assert len(Counter(note["pid"] for note in enters)) > 1
