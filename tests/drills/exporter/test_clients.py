"""The exporter survives clients that stop in mid-request, a store that hangs, and made-up
events.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException

import psutil
import pytest
from celery import Celery
from celery.events.event import get_exchange
from kombu import Connection

from celery_singleton_state.runtime import runtime_of
from tests.helpers.fleet import Exporter, Fleet
from tests.helpers.servers import Postgres
from tests.helpers.waiting import wait_until

APP = "tests.apps.seen_app"
PATHS = ("/health", "/metrics", "/")
#: The parts of a request that 300 clients send, a third of them each. The clients with the last
#: part go on sending, byte by byte, and never end the request.
HALVES = (b"", b"GET /metr", b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nX: ")

pytestmark = pytest.mark.fleet(store="postgresql", app=APP)


@pytest.fixture
def clients() -> Iterator[Callable[[Exporter], list[socket.socket]]]:
    """A function that lets 300 clients send half a request each. A third of them never stop
    sending.
    """
    stop = threading.Event()
    with contextlib.ExitStack() as stack:

        def connect(exporter: Exporter) -> list[socket.socket]:
            address = ("127.0.0.1", int(exporter.url.rsplit(":", 1)[1]))
            found = []
            for number in range(300):
                found.append(stack.enter_context(socket.create_connection(address, timeout=30)))
                # The exporter may have closed this connection already, to make room for a later
                # one.
                with contextlib.suppress(OSError):
                    found[-1].sendall(HALVES[number % len(HALVES)])
            dripping = threading.Thread(target=drip, args=(found[2::3],))
            dripping.start()
            stack.callback(dripping.join)
            stack.callback(stop.set)
            return found

        def drip(connections: list[socket.socket]) -> None:
            while not stop.wait(0.5):
                for each in connections:
                    with contextlib.suppress(OSError):
                        each.sendall(b"a")

        yield connect


@pytest.fixture
def hang(own_postgres: Postgres) -> Iterator[Callable[[signal.Signals], None]]:
    """A function that sends a signal to all processes of the database server: SIGSTOP makes the
    server hang, SIGCONT makes it go on.
    """

    def send(number: signal.Signals) -> None:
        server = psutil.Process(own_postgres.process.pid)
        for each in (server, *server.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                os.kill(each.pid, number)

    yield send
    send(signal.SIGCONT)


def test_300_half_sent_requests_are_closed_after_a_while(
    make_fleet: Callable[..., Fleet],
    postgres_url: str,
    clients: Callable[[Exporter], list[socket.socket]],
) -> None:
    """300 clients send half a request. Meanwhile the exporter answers others. After a while it has
    as many threads and descriptors as before, although a third of the clients go on sending.
    """
    exporter = make_fleet().start_exporter()
    assert [exporter.get(path)[0] for path in PATHS] == [200] * 3
    process = psutil.Process(exporter.process.pid)
    threads, descriptors = process.num_threads(), process.num_fds()
    connections = clients(exporter)
    for _ in range(5):
        assert [exporter.get(path)[0] for path in PATHS] == [200] * 3
        assert process.num_threads() <= threads + 65
    wait_until(lambda: process.num_threads() <= threads, "the threads have ended")
    wait_until(lambda: process.num_fds() <= descriptors, "the connections are closed")
    assert all(each.fileno() != -1 for each in connections), "the clients must not have closed them"
    assert "Traceback" not in exporter.output


def test_300_scrapes_of_a_store_that_hangs(
    make_fleet: Callable[..., Fleet],
    own_postgres: Postgres,
    hang: Callable[[signal.Signals], None],
) -> None:
    """The scrapes share their queries of the store that hangs: if each scrape sent its own query,
    one after the other, they would take most of an hour. Requests beyond the limit are refused at
    once.
    """
    exporter = make_fleet(own_postgres.create_database("shop")).start_exporter()
    process = psutil.Process(exporter.process.pid)
    assert exporter.get("/metrics")[0] == 200
    threads = process.num_threads()
    hang(signal.SIGSTOP)
    with ThreadPoolExecutor(300) as pool:
        found = list(pool.map(exporter.get, PATHS * 100))
    answered = [body for status, body in found if "singleton_store_up 0.0" in body]
    refused = [body for status, body in found if "too many requests" in body]
    assert answered
    assert len(refused) >= 200
    hang(signal.SIGCONT)
    wait_until(
        lambda: exporter.metrics()["singleton_store_up"][()] == 1,
        "the exporter reads the store again",
    )
    wait_until(lambda: process.num_threads() <= threads, "the threads have ended")


def test_60_scrapes_of_a_large_exposition(
    make_fleet: Callable[..., Fleet], postgres_url: str, client: Callable[[], Celery]
) -> None:
    """The store and the events have 10,000 keys, and 60 clients ask for the metrics all the time.

    The exporter's memory grows by the size of a few expositions only. The exporter answers each
    health probe within 10 seconds. SIGTERM ends it although the clients go on asking.
    """
    exporter = make_fleet().start_exporter("--per-key")
    app = client()
    app.conf.singleton_store_url = postgres_url
    runtime = runtime_of(app)
    names = [f'counted{{"key":"{number}"}}' for number in range(10_000)]
    prefix = runtime.settings.key_prefix
    runtime.store.requests.expect(dict.fromkeys((prefix + name for name in names), "counted"))
    assert exporter.get("/metrics")[0] == 200
    good = {
        **{"type": "singleton-released", "singleton": "counted", "holder": "h", "fence": 1},
        **{"outcome": "succeeded", "seconds": 1.0, "error": None},
    }
    with app.connection_for_write() as connection:
        for number in range(0, 10_000, 1000):
            some = [good | {"key": name} for name in names[number : number + 1000]]
            send(connection, json.dumps(some), "application/json")
    wait_until(
        lambda: sum(exporter.metrics()["singleton_executions_total"].values()) == 10_000,
        "all events are counted",
    )
    process = psutil.Process(exporter.process.pid)
    assert len(exporter.get("/metrics")[1]) < 3_000_000
    before, most = process.memory_info().rss, 0
    stop, url = threading.Event(), exporter.url

    def ask() -> list[int]:
        found = []
        while not stop.is_set():
            # Ignore the errors at the end: the exporter cuts some requests off, and later requests
            # find no server.
            with (
                contextlib.suppress(OSError, HTTPException),
                urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer,
            ):
                answer.read()
                found.append(answer.status)
        return found

    with ThreadPoolExecutor(60) as pool:
        asking = [pool.submit(ask) for _ in range(60)]
        try:
            for _ in range(5):
                with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
                    assert answer.status == 200
                most = max(most, process.memory_info().rss)
            exporter.process.send_signal(signal.SIGTERM)
            assert exporter.process.wait(timeout=6) == 0
        finally:
            stop.set()
    statuses = [status for each in asking for status in each.result()]
    assert statuses.count(200) >= 60
    assert most - before < 100_000_000
    assert "Traceback" not in exporter.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_exporter_while_requests_hang(
    make_fleet: Callable[..., Fleet],
    own_postgres: Postgres,
    hang: Callable[[signal.Signals], None],
    clients: Callable[[Exporter], list[socket.socket]],
    number: signal.Signals,
) -> None:
    exporter = make_fleet(own_postgres.create_database("shop")).start_exporter()
    address = ("127.0.0.1", int(exporter.url.rsplit(":", 1)[1]))
    assert exporter.get("/")[0] == 200
    process = psutil.Process(exporter.process.pid)
    threads = process.num_threads()
    hang(signal.SIGSTOP)
    with contextlib.ExitStack() as stack:
        for _ in range(10):
            one = stack.enter_context(socket.create_connection(address))
            one.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        clients(exporter)
        wait_until(lambda: process.num_threads() >= threads + 10, "the requests wait")
        exporter.process.send_signal(number)
        # 6 s is shorter than the store's own time limits, so these have not ended the requests.
        assert exporter.process.wait(timeout=6) == 0
    assert "Traceback" not in exporter.output


def test_made_up_events_through_a_broker_do_no_harm(
    make_fleet: Callable[..., Fleet], postgres_url: str, client: Callable[[], Celery]
) -> None:
    """Made-up events in the broker do not end the exporter's connection or its counting, and make
    no series of their own.
    """
    exporter = make_fleet().start_exporter()
    app = client()
    before = {name: len(series) for name, series in exporter.metrics().items()}
    good = {
        **{"type": "singleton-released", "singleton": "counted", "key": 'counted{"key":"a"}'},
        **{"holder": "h", "fence": 1, "outcome": "succeeded", "seconds": 1.0, "error": None},
    }
    with app.connection_for_write() as connection:
        for number in range(200):
            name = f"made-up-{number}"
            for event in (
                *(good | {"singleton": name}, good | {"outcome": name}, good | {"seconds": "x"}),
                *(good | {"key": "\ud800\x00\n"}, good | {"seconds": float("nan")}),
                *({"type": "singleton-released"}, {"type": [name]}, {}, [None, 3], name, None),
            ):
                send(connection, json.dumps(event), "application/json")
            send(connection, "{", "application/json")
            send(connection, "gASVBAAAAAAAAABLKi4=", "application/x-python-serialize")
        send(connection, json.dumps([None, good | {"outcome": "retried"}]), "application/json")

    def counted(outcome: str) -> float:
        found = exporter.metrics()["singleton_executions_total"]
        return found.get(("counted", outcome), 0.0)

    wait_until(lambda: counted("retried") == 1, "the last event is counted")
    after = exporter.metrics()
    assert after["singleton_broker_up"] == {(): 1}
    # These 400 are the events with an odd key, and the events with a duration that is not a number.
    assert counted("succeeded") == 400
    assert counted("(others)") == 200
    assert after["singleton_executions_total"][("(unknown)", "succeeded")] == 200
    assert after["singleton_duration_seconds_sum"][("counted",)] == 401
    assert after["singleton_ignored_events_total"] == {(): 200 * 11 + 1}
    grown = {name: len(each) - before[name] for name, each in after.items()}
    assert {name: count for name, count in grown.items() if count > 2} == {
        "singleton_duration_seconds_bucket": 14
    }
    assert exporter.output.count("an event is ignored") < 20


def send(connection: Connection, body: str, content_type: str) -> None:
    """Publish a body, as it is, to the exchange of the workers' events."""
    connection.Producer(exchange=get_exchange(connection)).publish(
        body, content_type=content_type, content_encoding="utf-8", routing_key="made.up"
    )
