"""The exporter's HTTP server: unusual requests, refused hosts, and clients that stop or hang."""

from __future__ import annotations

import http.client
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import ImproperlyConfigured
from prometheus_client import CollectorRegistry

from celery_singleton_state.exporter import answers
from celery_singleton_state.exporter.answers import Answer, text
from celery_singleton_state.exporter.connections import Connections, Step
from celery_singleton_state.exporter.hosts import BadHost, Hosts, check_pattern, host_of
from celery_singleton_state.exporter.server import LONGEST, Server, make
from celery_singleton_state.exporter.shared import NotNow, Shared
from celery_singleton_state.runtime import runtime_of
from tests.helpers.waiting import wait_until


class Pages:
    """A stand-in for the exporter's pages. Requests wait for their answer while ``go_on`` is
    cleared.
    """

    def __init__(self) -> None:
        self.body = b"hello\n"
        self.go_on = threading.Event()
        self.go_on.set()

    def answer(self, path: str, *_: Any) -> Answer:
        self.go_on.wait(30)
        if path == "/fails":
            raise ZeroDivisionError
        return Answer(HTTPStatus.OK, "text/plain", self.body)


Serving = Callable[..., Server]


@pytest.fixture
def pages() -> Iterator[Pages]:
    made = Pages()
    yield made
    made.go_on.set()


@pytest.fixture
def serving(pages: Pages) -> Iterator[Serving]:
    """Return a function that starts a server with the given hosts and limits."""
    servers: list[tuple[Server, threading.Thread]] = []

    def start(*allowed: str, host: str = "127.0.0.1", **limits: Any) -> Server:
        hosts = Hosts(host, allowed)
        server = make(pages, hosts, host, 0, Connections(**limits))  # type: ignore[arg-type]
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        servers.append((server, thread))
        return server

    yield start
    pages.go_on.set()
    for server, thread in servers:
        server.shutdown()
        thread.join()
        wait_until(lambda s=server: not len(s.connections), "all connections are closed")
        server.server_close()


def connect(server: Server, sent: bytes = b"") -> socket.socket:
    connection = socket.create_connection(server.server_address[:2], timeout=30)
    connection.sendall(sent)
    return connection


def read_all(connection: socket.socket) -> bytes:
    """Return all bytes that the server sends until it closes the connection."""
    found = b""
    with connection:
        while True:
            try:
                some = connection.recv(65536)
            except ConnectionResetError:
                return found
            if not some:
                return found
            found += some


def ask(server: Server, sent: bytes) -> tuple[int, bytes]:
    """Send these bytes, and return the answer's status and body. The status is 0 without an
    answer.
    """
    answer = read_all(connect(server, sent))
    head, _, body = answer.partition(b"\r\n\r\n")
    return (int(head.split()[1]) if head else 0), body


def get(server: Server, *headers: bytes, version: bytes = b"HTTP/1.1") -> tuple[int, bytes]:
    return ask(server, b"\r\n".join((b"GET / " + version, *headers, b"", b"")))


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:9809", "10.1.2.3", "10.1.2.3.", "[::1]:9809", "[fe80::1%25eth0]", "localhost",
        "LOCALHOST:80", "exporter", "exporter:9809", "exporter.", "exporter.monitoring.svc:9809",
        "exporter.monitoring.svc.cluster.local", "nas.local", "nas.lan", "a.home", "b.corp",
        "a.intranet", "b.private", "c.home.arpa", "d.internal", "ip-10-0-0-1.ec2.internal",
        "a.localhost", "_srv.my_app.svc", "ok.example.com", "OK.example.com.:9809",
        "deep.below.example.org", "[::ffff:10.0.0.1]", "exporter:",
    ],
)  # fmt: skip
def test_a_local_or_allowed_host_is_answered(serving: Serving, host: str) -> None:
    server = serving("ok.example.com", "*.example.org")
    assert get(server, b"Host: " + host.encode()) == (200, b"hello\n")


@pytest.mark.parametrize(
    "host",
    ["evil.com", "evil.com:9809", "127.0.0.1.evil.com", "localhost.evil.com", "evil.com.",
     "example.org", "notexample.org", "svc.evil.com", "xn--80ak6aa92e.com", "ok.example.com.evil",
     "lan.evil.com", "evil.mail", "evil.arpa"],
)  # fmt: skip
def test_a_host_name_that_an_attacker_can_register_is_refused(
    serving: Serving, host: str, caplog: pytest.LogCaptureFixture
) -> None:
    """DNS rebinding: an attacker's domain name resolves to the exporter's address, so that a
    browser lets the attacker's page read the exporter's answers.
    """
    server = serving("ok.example.com", "*.example.org")
    for _ in range(2):
        status, body = get(server, b"Host: " + host.encode())
        assert status == 421
        assert f"--allowed-host {host.split(':')[0].rstrip('.')}" in body.decode()
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    "headers",
    [
        [b"Host: a@localhost"], [b"Host: http://localhost"], [b"Host: loc alhost"],
        [b"Host: caf\xc3\xa9.local"], [b"Host: \xff"], [b"Host: a:b:c"], [b"Host: localhost:x"],
        [b"Host: localhost:999999"], [b"Host: [::1"], [b"Host: [evil.com]"], [b"Host: ::1"],
        [b"Host: .local"], [b"Host: a..local"], [b"Host: -"], [b"Host: " + b"a" * 300],
        [b"Host: localhost, evil.com"], [b"Host: localhost", b"Host: evil.com"],
        [b"Host: localhost", b"Host: localhost"], [b"Host: localhost\r\n evil.com"], [],
        [b"Host: localhost\x00.evil.com"], [b"Host: *"], [b"Host: evil.com/.local"],
    ],
)  # fmt: skip
def test_an_invalid_host_header_is_refused(serving: Serving, headers: list[bytes]) -> None:
    assert get(serving(), *headers)[0] == 400
    assert get(serving("*"), *headers)[0] == 400


def test_hosts_that_come_from_other_places_than_the_header(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An HTTP/1.0 request needs no Host header. The target of a request can name a host, as in
    requests to a proxy. The full name of this machine is allowed.
    """
    server = serving()
    assert get(server, version=b"HTTP/1.0")[0] == 200
    assert get(server, b"Host: evil.com", version=b"HTTP/1.0")[0] == 421
    assert ask(server, b"GET http://evil.com/ HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 421
    assert ask(server, b"GET http://localhost/ HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 200
    assert ask(server, b"GET http://[ HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 400
    monkeypatch.setattr(socket, "getfqdn", lambda: "Here.example.net")
    assert get(serving(), b"Host: here.example.net:9809")[0] == 200
    assert get(serving("*"), b"Host: evil.com")[0] == 200
    assert Hosts("shop.example.com.").answers("shop.example.com")


@pytest.mark.parametrize("pattern", ["", "a b", "a:80", "http://a", "*a", "a.*", "**", "[::1]"])
def test_an_invalid_host_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="is not a host name"):
        check_pattern(pattern)


def test_a_very_long_host_is_read_quickly() -> None:
    with pytest.raises(BadHost):
        host_of("a." * 100_000 + "!")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n", 405),
        (b"BREW / HTTP/1.0\r\n\r\n", 405),
        (b"GET /fails HTTP/1.0\r\n\r\n", 500),
        (b"GET /\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 505),
        (b"GET / HTTP/x\r\n\r\n", 400),
        (b"GET /a b HTTP/1.1 x\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n", 400),
        (b"GET /" + b"a" * LONGEST + b" HTTP/1.1\r\n", 414),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * LONGEST + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 101 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"X: " + b"a" * 900 + b"\r\n" * 40 + b"\r\n", 400),
        (b"\r\n", 0),
        (b"", 0),
    ],
)
def test_unusual_requests_are_answered(
    serving: Serving, sent: bytes, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each answer has the security headers, and nothing is written to standard error."""
    server = serving()
    with connect(server, sent) as connection:
        connection.shutdown(socket.SHUT_WR)
        answer = read_all(connection)
    assert (int(answer.split()[1]) if answer else 0) == status
    if status:
        assert b"\r\nCross-Origin-Resource-Policy: same-origin\r\n" in answer
        assert b"Access-Control" not in answer
    assert "Traceback" not in capsys.readouterr().err


def test_options_requests_are_answered(serving: Serving) -> None:
    """HAProxy's ``option httpchk`` sends the first of these requests."""
    server = serving()
    for sent, status in (
        (b"OPTIONS / HTTP/1.0\r\n\r\n", b"204"),
        (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", b"204"),
        (b"DELETE / HTTP/1.0\r\n\r\n", b"405"),
    ):
        head, _, body = read_all(connect(server, sent)).partition(b"\r\n\r\n")
        assert head.split()[1] == status
        assert b"\r\nAllow: GET, HEAD, OPTIONS\r\n" in head
        assert (b"Content-Length" in head, bool(body)) == (status == b"405",) * 2


def test_an_incomplete_request_is_not_answered(serving: Serving) -> None:
    """The request ends after a complete header line. Python's ``http.server`` would answer it."""
    server = serving()
    with connect(server, b"GET / HTTP/1.0\r\nX: a\r\n") as connection:
        connection.shutdown(socket.SHUT_WR)
        assert read_all(connection) == b""


@pytest.mark.parametrize(
    "accept",
    ["", "*/*", "application/openmetrics-text;version=1.0.0", "text/plain;version=x", ";=,=;",
     "application/openmetrics-text;version=abc", "text/plain;version=1.0.0;escaping=nothing",
     "application/openmetrics-text;version=1.0.1\r\n Set-Cookie: a",
     "text/plain;version=" + "9" * 5000],
)  # fmt: skip
def test_any_accept_header_gets_metrics(memory_app: Celery, accept: str) -> None:
    pages = answers.Pages(runtime_of(memory_app), CollectorRegistry(), lambda: None)  # type: ignore[arg-type, return-value]
    answer = pages.answer("/metrics", "", accept)
    assert answer.status == 200
    assert "\n" not in answer.kind


def test_head_has_no_body(serving: Serving) -> None:
    connection = http.client.HTTPConnection(*serving().server_address[:2], timeout=30)
    connection.request("HEAD", "/")
    answer = connection.getresponse()
    assert (answer.status, answer.headers["Content-Length"], answer.read()) == (200, "6", b"")
    connection.close()


def test_a_slow_client_has_one_deadline_for_its_whole_request(serving: Serving) -> None:
    """The client sends a byte now and then. With a time limit for each read, it could do so for
    ever.
    """
    server = serving(request_time=0.3)
    with connect(server, b"GET / HTTP/1.1\r\nX: ") as connection:

        def is_cut_off() -> bool:
            try:
                connection.sendall(b"a")
            except OSError:
                return True
            return False

        wait_until(is_cut_off, "the client is cut off")
    assert get(server, b"Host: localhost")[0] == 200


def test_clients_that_do_not_read_have_a_deadline(
    serving: Serving, pages: Pages, caplog: pytest.LogCaptureFixture
) -> None:
    pages.body = b"a" * 50_000_000
    server = serving(answer_time=0.3)
    threads = threading.active_count()
    with connect(server, b"GET / HTTP/1.0\r\n\r\n"):
        wait_until(lambda: len(server.connections), "the client is accepted")
        wait_until(lambda: not len(server.connections), "the client is cut off")
        wait_until(lambda: threading.active_count() == threads, "its thread has ended")
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


def test_half_sent_requests_are_closed_to_serve_others(serving: Serving) -> None:
    """Clients that have sent half a request take all threads. The server closes their connections
    when other clients come, and answers these at once.
    """
    server = serving(limit=4)
    idle = [connect(server, b"GET / HT") for _ in range(20)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: get(server, b"Host: localhost"), range(20)))
    assert {status for status, _ in found} == {200}
    assert len(server.connections) <= 4
    for each in idle:
        each.close()


def test_a_request_beyond_the_limit_is_refused_at_once(serving: Serving, pages: Pages) -> None:
    """The limit is 2, and two requests wait for the store. The third one gets the status 503.

    When the store answers, the two are answered.
    """
    server = serving(limit=2)
    pages.go_on.clear()
    request = b"GET / HTTP/1.0\r\n\r\n"
    waiting = [connect(server, request) for _ in range(2)]
    wait_until(
        lambda: [each.step for each in server.connections._open.values()] == [Step.STORE] * 2,
        "both wait",
    )
    assert ask(server, request)[0] == 503
    pages.go_on.set()
    assert all(read_all(each).endswith(b"hello\n") for each in waiting)
    assert ask(server, request)[0] == 200


def test_300_requests_share_two_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first request begins a snapshot of the store. The other 299 requests arrive and read the
    clock.

    The first snapshot is done, but it began before the others arrived. So one of the others takes
    the second snapshot, and all 299 share it.
    """
    snapshots: list[int] = []
    go_on, begun = threading.Event(), threading.Event()

    def take() -> Any:
        snapshots.append(len(snapshots))
        begun.set()
        go_on.wait(30)
        if len(snapshots) == 2:
            raise RuntimeError("the second one fails for all")
        return snapshots[-1]

    of_all: Shared[Any] = Shared()

    def shared() -> Any:
        return of_all.get(None, take)

    read: list[float] = []

    def clock() -> float:
        read.append(time.monotonic())
        return read[-1]

    monkeypatch.setattr(sys.modules[Shared.__module__], "clock", clock)

    def ask_for_one() -> Any:
        try:
            return shared()
        except RuntimeError as error:
            return str(error)

    with ThreadPoolExecutor(300) as pool:
        first = pool.submit(ask_for_one)
        assert begun.wait(30)
        others = [pool.submit(ask_for_one) for _ in range(299)]
        # Each request reads the clock when it arrives. The first one reads it once more when it
        # begins its snapshot.
        wait_until(lambda: len(read) == 301, "all have asked")
        go_on.set()
        assert first.result() == 0
        assert {each.result() for each in others} == {"the second one fails for all"}
    assert snapshots == [0, 1]
    assert shared() == 2


class ObservedLock:
    """A lock that sets ``was_taken`` when a thread has tried to acquire it and failed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.release = self.lock.release
        self.was_taken = threading.Event()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        found = self.lock.acquire(blocking, timeout)
        if not found:
            self.was_taken.set()
        return found


def test_no_work_is_done_for_a_client_that_hung_up() -> None:
    """Request A works. Request B waits for A, and its client hangs up. A ends. B does not begin to
    work.
    """
    shared: Shared[str] = Shared()
    lock = shared._lock = ObservedLock()  # type: ignore[assignment]
    go_on, begun = threading.Event(), threading.Event()

    def work() -> str:
        begun.set()
        go_on.wait(30)
        return "done"

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(shared.get, "kind", work)
        assert begun.wait(30)
        other = pool.submit(shared.get, "kind", lambda: "for nobody", lambda: False)
        assert lock.was_taken.wait(30)  # type: ignore[attr-defined]
        go_on.set()
        assert first.result() == "done"
        with pytest.raises(NotNow, match="closed"):
            other.result()
    assert shared.get("kind", lambda: "again", lambda: False) == "again"


def test_no_more_requests_wait_than_the_limit() -> None:
    room = threading.BoundedSemaphore(1)
    one, other = Shared[str](room), Shared[str](room)

    def nested() -> str:
        with pytest.raises(NotNow, match="too many requests wait"):
            other.get(None, lambda: "other")
        return "one"

    assert one.get(None, nested) == "one"
    assert other.get(None, lambda: "other") == "other"


@pytest.mark.parametrize("host", ["nowhere.invalid", "a" * 70, "..", "1.2.3.4", "a\x00b"])
def test_an_address_that_cannot_be_bound_is_refused(pages: Any, host: str) -> None:
    with pytest.raises(ImproperlyConfigured, match="cannot listen at "):
        make(pages, Hosts(), host, 0, Connections())


@pytest.mark.parametrize("host", ["", "localhost", "::1", "::"])
def test_each_kind_of_address_can_be_bound(serving: Serving, host: str) -> None:
    server = serving(host=host)
    port = server.server_address[1]
    with socket.create_connection(("::1" if host == "::1" else "127.0.0.1", port), 30) as one:
        one.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert read_all(one).endswith(b"hello\n")


def test_a_plain_text_answer_ends_with_a_newline() -> None:
    assert text(HTTPStatus.OK, "a").body == b"a\n"
