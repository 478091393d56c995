"""The example hook in ``examples/hooks`` sends its numbers to a StatsD server."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery

from celery_singleton_state import SingletonTask, singleton_task
from celery_singleton_state.runtime import runtime_of

EXAMPLE = Path(__file__).parents[3] / "examples" / "hooks"


@pytest.fixture
def statsd(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(30)
        monkeypatch.setenv("STATSD_HOST", "127.0.0.1")
        monkeypatch.setenv("STATSD_PORT", str(server.getsockname()[1]))
        yield server


def nothing(self: SingletonTask) -> None:
    pass


def test_the_example_hook_sends_a_run_to_statsd(
    statsd: socket.socket, memory_app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    memory_app.conf.singleton_hooks = ["statsd:StatsD"]
    task = singleton_task(memory_app, shared=False, name="t")(nothing)
    task()
    counted, timed = statsd.recv(4096).decode().split("\n")
    assert counted == "singleton.t.succeeded:1|c"
    assert timed.startswith("singleton.t.duration:")
    assert timed.endswith("|ms")
    hook = runtime_of(memory_app).dispatcher._users_hooks()[0]
    hook._socket.close()  # type: ignore[attr-defined]
