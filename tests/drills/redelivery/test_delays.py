"""Delays that are longer than the time for which Redis waits for a message's acknowledgement."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from celery import Celery

from tests.helpers.fleet import Fleet, outcome
from tests.helpers.waiting import wait_until


def messages(app: Celery) -> int:
    """Return how many messages the broker has, queued or not acknowledged."""
    with app.connection() as connection:
        client = connection.default_channel.client
        return int(client.llen("celery") + client.hlen("unacked"))


def test_a_coalesced_message_that_waits_for_long_runs_once(
    make_fleet: Callable[..., Fleet], client: Callable[[], Celery], tmp_path: Path
) -> None:
    """A coalesced message waits for the end of a hold period of 12 s, and runs once.

    Redis checks every 10 s for messages that were not acknowledged within 1 s. If the message
    waited for 12 s without a break, Redis would deliver a second copy, and each copy would record
    another pending run, for ever. So the message waits in short steps.
    """
    fleet = make_fleet(
        f"sqlite:///{tmp_path}/store.db",
        CELERY_SINGLETON_HEARTBEAT_INTERVAL="60",
        TEST_VISIBILITY_TIMEOUT="1",
    )
    app = client()
    workers = [fleet.start("-c", "1", name=name) for name in "ab"]
    first = app.send_task("coalesces_with_long_hold", ("first", ""))
    assert outcome(first) == "first"
    second = app.send_task("coalesces_with_long_hold", ("second", ""))
    assert outcome(second) == "second"
    wait_until(lambda: messages(app) == 0, "no copy is left")
    assert [note["what"] for note in fleet.notes("enter")] == ["first", "second"]
    received = sum(worker.output.count(f"[{second.id}] received") for worker in workers)
    assert received > 12 / 0.5 / 2
