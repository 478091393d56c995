"""Pauses that are longer than Redis keeps a message that is not acknowledged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from celery import Celery

from tests.helpers.fleet import Fleet, outcome
from tests.helpers.waiting import wait_until


def messages(app: Celery) -> int:
    """How many messages are in the queue, or with workers."""
    with app.connection() as connection:
        client = connection.default_channel.client
        return int(client.llen("celery") + client.hlen("unacked"))


def test_a_coalesced_message_that_waits_for_long_runs_once(
    make_fleet: Callable[..., Fleet], client: Callable[[], Celery], tmp_path: Path
) -> None:
    """The lease is held on for 12 s, and Redis keeps a message for 1 s: it looks for messages that
    were kept for longer every 10 s. One that waits for 12 s at once is given out again, and each
    copy then asks for another run, for ever.
    """
    fleet = make_fleet(
        f"sqlite:///{tmp_path}/store.db",
        CELERY_SINGLETON_HEARTBEAT_INTERVAL="60",
        TEST_VISIBILITY_TIMEOUT="1",
    )
    app = client()
    workers = [fleet.start("-c", "1", name=name) for name in "ab"]
    first = app.send_task("held_on_for_long", ("first", ""))
    assert outcome(first) == "first"
    second = app.send_task("held_on_for_long", ("second", ""))
    assert outcome(second) == "second"
    wait_until(lambda: messages(app) == 0, "no copy is left")
    assert [note["what"] for note in fleet.notes("enter")] == ["first", "second"]
    received = sum(worker.output.count(f"[{second.id}] received") for worker in workers)
    assert received > 12 / 0.5 / 2
