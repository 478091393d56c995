"""Runs that lose their lease: the body is interrupted, in every pool, and the next run is not
disturbed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from celery_singleton_state import HeartbeatFailed
from tests.helpers.fleet import Fleet, outcome
from tests.helpers.waiting import wait_until
from tests.helpers.worker_rows import steal

POOLS = {
    "prefork": ("-P", "prefork", "-c", "1"),
    "solo": ("-P", "solo"),
    "threads": ("-P", "threads", "-c", "2"),
    "gevent": ("-P", "gevent", "-c", "2"),
}

pytestmark = pytest.mark.fleet(CELERY_SINGLETON_HEARTBEAT_INTERVAL="0.5")


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/store.db"


@pytest.mark.parametrize(
    ("pool", "how"),
    [
        ("prefork", "sleep"),
        ("prefork", "socket"),
        ("solo", "sleep"),
        ("solo", "socket"),
        ("threads", "work"),
        ("gevent", "sleep"),
        ("gevent", "socket"),
    ],
)
def test_the_body_of_a_lost_run_is_interrupted(
    fleet: Fleet, client: Callable[[], Celery], store_url: str, pool: str, how: str
) -> None:
    """The body is interrupted wherever it waits, and its task fails. The worker goes on, and its
    next run is not interrupted.
    """
    app = client()
    fleet.start(*POOLS[pool])
    lost = app.send_task("waits", (how,))
    fleet.wait_for_notes("enter")
    steal(store_url, "waits")
    error = outcome(lost)
    assert isinstance(error, HeartbeatFailed)
    assert "its renewal was refused" in error.detail
    (left,) = fleet.notes("leave")
    assert outcome(app.send_task("increment")) == 1
    events = ("leads", "leads no longer")
    fences = [[note["fence"] for note in fleet.notes(event)] for event in events]
    assert fences == [[left["fence"]]] * 2


@pytest.mark.parametrize("pool", POOLS)
def test_an_interruption_that_is_swallowed_is_repeated(
    fleet: Fleet, client: Callable[[], Celery], store_url: str, pool: str
) -> None:
    """Logging, a destructor, a callback of C code, an event loop, or the body itself, which catches
    ``Exception``, swallows an interruption. The next interruption arrives. Each run ends as lost,
    once.

    The task retries on every ``Exception``, but is not retried, because its run is lost.
    """
    app = client()
    worker = fleet.start(*POOLS[pool])
    ways = ["logging", "except Exception", "destructor", "callback"]
    if pool != "gevent":  # gevent's greenlets cannot run an event loop each
        ways.append("asyncio")
    for number, way in enumerate(ways, 1):
        lost = app.send_task("swallows", (way,))
        fleet.wait_for_notes("enter", number)
        steal(store_url, "swallows")
        assert isinstance(outcome(lost), HeartbeatFailed), way
    assert [note["retries"] for note in fleet.notes("enter")] == [0] * len(ways)
    assert len(fleet.notes("leads no longer")) == len(fleet.notes("leads")) == len(ways)
    assert outcome(app.send_task("increment")) == 1
    assert "--- Logging error ---" not in worker.output


def test_bodies_that_log_in_a_loop_all_end(
    fleet: Fleet, client: Callable[[], Celery], store_url: str
) -> None:
    """Eight bodies that log in a tight loop lose their leases, and all are interrupted. At a time
    when logging could swallow the interruption for good, 17 of 24 such bodies ran to their end.
    """
    app = client()
    worker = fleet.start("-P", "prefork", "-c", "8")
    lost = [app.send_task("swallows", ("logging", number)) for number in range(8)]
    fleet.wait_for_notes("enter", 8)
    steal(store_url, "swallows")
    assert [type(outcome(each)) for each in lost] == [HeartbeatFailed] * 8
    assert "--- Logging error ---" not in worker.output


@pytest.mark.parametrize("pool", POOLS)
def test_a_lost_run_tidies_up_undisturbed(
    fleet: Fleet, client: Callable[[], Celery], store_url: str, pool: str
) -> None:
    """A lost run tidies up for longer than the pause between two interruptions, and is not
    interrupted again. The interruption is no ``Exception``, so the body's ``except Exception`` does
    not catch it.
    """
    app = client()
    fleet.start(*POOLS[pool])
    lost = app.send_task("tidies_up")
    fleet.wait_for_notes("enter")
    steal(store_url, "tidies_up")
    assert isinstance(outcome(lost), HeartbeatFailed)
    assert len(fleet.notes("tidied up")) == 1
    assert not fleet.notes("caught")


@pytest.mark.parametrize("pool", POOLS)
def test_a_lost_run_that_finishes_cannot_save(
    fleet: Fleet, client: Callable[[], Celery], store_url: str, tmp_path: Path, pool: str
) -> None:
    """With ``on_lease_lost="finish"`` the body goes on to its end. ``on_lose_leadership()`` is
    called once, when the lease is lost. The save is refused.
    """
    app = client()
    fleet.start(*POOLS[pool])
    go = tmp_path / "go"
    result = app.send_task("finishes", (str(go),))
    fleet.wait_for_notes("enter")
    steal(store_url, "finishes")
    fleet.wait_for_notes("leads no longer")
    assert not fleet.notes("leave")
    go.touch()
    assert isinstance(outcome(result), HeartbeatFailed)
    assert len(fleet.notes("leave")) == 1
    assert len(fleet.notes("leads no longer")) == 1


def test_a_run_whose_store_falls_silent_is_interrupted(
    make_fleet: Callable[..., Fleet],
    client: Callable[[], Celery],
    make_proxy: Callable[[int], Any],
    postgres: Any,
    postgres_url: str,
) -> None:
    """The network is cut in mid-run, so the store neither answers nor refuses. The sleeping body is
    interrupted before the lease expires.
    """
    proxy = make_proxy(postgres.port)
    through = postgres_url.replace(f":{postgres.port}/", f":{proxy.port}/")
    fleet = make_fleet(through)
    app = client()
    fleet.start(*POOLS["prefork"])
    result = app.send_task("waits")
    fleet.wait_for_notes("enter")
    proxy.mode = "mute"
    fleet.wait_for_notes("leave")
    error = outcome(result)
    assert isinstance(error, HeartbeatFailed)
    assert "not renewed before it expired" in error.detail
    wait_until(lambda: fleet.notes("leads no longer"), "the run loses leadership")
