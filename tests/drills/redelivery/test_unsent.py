"""Messages that must be sent again while their broker is unavailable, with real workers.

Workers publish through a proxy that refuses connections, and read from the broker itself. So an
acknowledgement still arrives, and a message that is acknowledged without being sent would be lost.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from celery import Celery

from tests.helpers.fleet import Fleet, Worker, outcome
from tests.helpers.rabbitmq import RabbitMQ
from tests.helpers.servers import Proxy, Valkey
from tests.helpers.waiting import wait_until

UrlAt = Callable[[int], str]

pytestmark = pytest.mark.fleet(
    CELERY_SINGLETON_HEARTBEAT_INTERVAL="60", TEST_VISIBILITY_TIMEOUT="1"
)


@pytest.fixture(params=["valkey", "rabbitmq"])
def broker(request: pytest.FixtureRequest) -> tuple[UrlAt, int]:
    """A pair: a function that returns the broker's URL with another port, and the broker's own
    port.
    """
    if request.param == "rabbitmq":
        rabbitmq: RabbitMQ = request.getfixturevalue("rabbitmq")
        return rabbitmq.url_at, rabbitmq.port
    valkey: Valkey = request.getfixturevalue("valkey")
    url: str = request.getfixturevalue("broker_url")
    return lambda port: url.replace(f":{valkey.port}/", f":{port}/"), valkey.port


@pytest.fixture
def proxy(broker: tuple[UrlAt, int], make_proxy: Callable[[int], Proxy]) -> Proxy:
    return make_proxy(broker[1])


@pytest.fixture
def fleet_broker(broker: tuple[UrlAt, int], proxy: Proxy, tmp_path: Path) -> dict[str, str]:
    url_at, port = broker
    return {
        "CELERY_BROKER_URL": url_at(port),
        "CELERY_BROKER_WRITE_URL": url_at(proxy.port),
        "TEST_QUEUE": tmp_path.name,
    }


def start(fleet: Fleet) -> Worker:
    """Start a worker that publishes no heartbeats of its own: if they failed, this would also break
    the connection from which the worker reads.
    """
    return fleet.start("-c", "2", "--without-heartbeat")


def cut(proxy: Proxy) -> None:
    proxy.mode = "refuse"
    proxy.cut()


def wait_until_unsent(fleet: Fleet, worker: Worker, task: str, task_id: str) -> None:
    fleet.wait_for_output(worker, f"singleton {task}: task {task_id} could not be sent again")


def test_a_retry_is_sent_when_the_broker_is_back(
    fleet: Fleet, client: Callable[[], Celery], proxy: Proxy, tmp_path: Path
) -> None:
    """The body runs. Publishing fails from now on. The body asks for a retry. Publishing works
    again.

    The original message is redelivered, and its retry is then sent.
    """
    app, go = client(), tmp_path / "go"
    worker = start(fleet)
    result = app.send_task("retries_once", (str(go),))
    fleet.wait_for_notes("enter")
    cut(proxy)
    go.touch()
    wait_until_unsent(fleet, worker, "retries_once", result.id)
    proxy.mode = "pass"
    # Do not wait for the result: Celery stores that a retry was asked for after it has sent the
    # retry, and so sometimes after the retry's own result.
    wait_until(
        lambda: any(note["retries"] == 1 for note in fleet.notes("leave")), "the retry has run"
    )
    retries = [note["retries"] for note in fleet.notes("enter")]
    assert retries[:2] == [0, 0]
    assert retries[-1] == 1


def test_a_delivery_that_waits_is_sent_when_the_broker_is_back(
    fleet: Fleet, client: Callable[[], Celery], proxy: Proxy, tmp_path: Path
) -> None:
    """A's body runs. B is about to acquire the lease. Publishing fails from now on. B finds the
    lease taken and cannot publish its message for later. Publishing works again. B's message is
    sent, and runs after A.
    """
    app, go = client(), tmp_path / "go"
    open_gate, gate = tmp_path / "open gate", tmp_path / "gate"
    open_gate.touch()
    worker = start(fleet)
    first = app.send_task("waits_at_gate", (str(open_gate), str(go)))
    fleet.wait_for_notes("enter")
    second = app.send_task("waits_at_gate", (str(gate), str(go)))
    fleet.wait_for_notes("starts", 2)
    cut(proxy)
    gate.touch()
    wait_until_unsent(fleet, worker, "waits_at_gate", second.id)
    proxy.mode = "pass"
    go.touch()
    assert [outcome(first), outcome(second)] == [1, 2]
    assert len(fleet.notes("enter")) == 2
