"""The exporter's HTTP server: one thread and one request for each connection.

It is Python's own server with what that lacks: deadlines for whole requests, a bounded number of
connections, a bounded size of a request, and a check of the ``Host`` header. A connection is closed
after its answer, and the body of a request is not read.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.client import LineTooLong
from http.server import BaseHTTPRequestHandler
from io import BufferedIOBase
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from urllib.parse import urlsplit

from celery.exceptions import ImproperlyConfigured

from celery_singleton_state.text.visible import logger_of

from .answers import HEADERS, Answer, Pages, text
from .connections import Connections, Step
from .hosts import BadHost, Hosts, host_of
from .shared import NotNow

logger = logger_of(__name__)

#: Characters of a request: its first line and its headers.
LONGEST = 32_768
METHODS = "GET, HEAD, OPTIONS"
#: Unknown hosts that have a warning of their own in the log.
WARNINGS = 20

BUSY = (
    b"HTTP/1.0 503 Service Unavailable\r\nContent-Type: text/plain\r\nRetry-After: 5\r\n\r\n"
    b"too many requests wait for the store\n"
)


class Server(ThreadingMixIn, TCPServer):
    """Answers each request in a thread, so that a probe need not wait for a page.

    :param address: of which family it is, so is the server.
    """

    daemon_threads = True
    allow_reuse_address = True
    #: Connections that the kernel keeps until they are accepted.
    request_queue_size = 128

    def __init__(
        self,
        family: socket.AddressFamily,
        address: Any,
        pages: Pages,
        hosts: Hosts,
        connections: Connections,
    ) -> None:
        self.address_family = family
        self.pages = pages
        self.hosts = hosts
        self.connections = connections
        self._warned: set[str] = set()
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # Of "::" and its like: IPv4 as well.
        if self.address_family == socket.AF_INET6:
            with contextlib.suppress(OSError):
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin a connection, in the thread that accepts them all."""
        if self.connections.admit(request):
            super().process_request(request, client_address)
            return
        request.setblocking(False)
        with contextlib.suppress(OSError):
            request.send(BUSY)
        self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        self.connections.remove(request)
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_WR)
            # What came and was not read, as a body, would make the kernel drop the answer.
            request.setblocking(False)
            request.recv(LONGEST)
        self.close_request(request)

    def service_actions(self) -> None:
        """Called twice a second by ``serve_forever``."""
        self.connections.shut_late()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what a connection's thread raised: in the end a client that went away."""
        logger.debug("a connection of %s ended", client_address, exc_info=True)

    def warn_of_host(self, host: str) -> None:
        """Say once for each host that it is not answered."""
        if host not in self._warned and len(self._warned) < WARNINGS:
            self._warned.add(host)
            logger.warning("requests for host %s are refused; --allowed-host has them", host)


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def setup(self) -> None:
        super().setup()
        self.rfile: Any = _Bounded(self.rfile, LONGEST)

    def handle(self) -> None:
        try:
            super().handle()
        except OSError as error:
            logger.debug("a connection of %s ended: %s", self.client_address, error)

    def finish(self) -> None:
        # It would raise what handle() has logged already.
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def parse_request(self) -> bool:
        if len(self.raw_requestline) > LONGEST:
            self.requestline = self.request_version = ""
            self.send_error(HTTPStatus.REQUEST_URI_TOO_LONG)
            return False
        if len(self.raw_requestline.split()) == 2:
            # HTTP/0.9 has no headers, so neither a host that could be checked nor ours.
            self.requestline = self.request_version = ""
            self.send_error(HTTPStatus.BAD_REQUEST, "HTTP/1.0 or 1.1 is needed")
            return False
        return super().parse_request()

    def do_GET(self) -> None:
        self.server.connections.begin(self.connection, Step.STORE)
        self._send(self._answer())

    do_HEAD = do_GET  # noqa: N815

    def do_OPTIONS(self) -> None:
        """Answer what HAProxy's ``option httpchk`` asks unless it is told otherwise."""
        self._send(Answer(HTTPStatus.NO_CONTENT, "", b""))

    def _refuse_method(self) -> None:
        self._send(text(HTTPStatus.METHOD_NOT_ALLOWED, f"it can only be looked at: {METHODS}"))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self._refuse_method
        raise AttributeError(name)

    def _answer(self) -> Answer:
        try:
            url = urlsplit(self.path)
        except ValueError:
            return text(HTTPStatus.BAD_REQUEST, "the path is no path")
        if (refused := self._refused_host(url.netloc)) is not None:
            return refused
        try:
            return self.server.pages.answer(
                url.path or "/",
                url.query,
                self.headers.get("Accept", ""),
                "gzip" in self.headers.get("Accept-Encoding", ""),
                self._is_open,
            )
        except NotNow as reason:
            return text(HTTPStatus.SERVICE_UNAVAILABLE, str(reason))
        except Exception:
            logger.exception("%s could not be answered", url.path)
            return text(HTTPStatus.INTERNAL_SERVER_ERROR, "it failed; the log says why")

    def _is_open(self) -> bool:
        """Whether the client has not closed its side of the connection."""
        try:
            return bool(self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def _refused_host(self, in_target: str) -> Answer | None:
        """The answer to a request whose host is not answered; ``None`` if it is.

        :param in_target: the host in a request line as proxies are sent: beside the header.
        """
        named = self.headers.get_all("Host", [])
        # A browser always names one. Simple probes of HTTP/1.0 need not.
        if len(named) > 1 or (not named and self.request_version != "HTTP/1.0"):
            return text(HTTPStatus.BAD_REQUEST, "one Host header is needed")
        for value in (*named, in_target):
            try:
                host = host_of(value) if value else ""
            except BadHost:
                return text(HTTPStatus.BAD_REQUEST, "the Host header is no host")
            if host and not self.server.hosts.answers(host):
                self.server.warn_of_host(host)
                return text(
                    HTTPStatus.MISDIRECTED_REQUEST,
                    f"this exporter does not answer requests for host {host}; if it should, start "
                    f"it with --allowed-host {host}",
                )
        return None

    def _send(self, answer: Answer) -> None:
        self.server.connections.begin(self.connection, Step.ANSWER)
        self.send_response(answer.status)
        if answer.status == HTTPStatus.SERVICE_UNAVAILABLE and answer.kind.startswith("text/plain"):
            self.send_header("Retry-After", "5")
        if answer.status in (HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.NO_CONTENT):
            self.send_header("Allow", METHODS)
        if answer.is_zipped:
            self.send_header("Content-Encoding", "gzip")
        self._send_headers(answer.kind, len(answer.body))
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def _send_headers(self, kind: str, length: int) -> None:
        if kind:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(length))
        for name, value in HEADERS:
            self.send_header(name, value)
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer a request that could not be read, in one line and without its words."""
        self.server.connections.begin(self.connection, Step.ANSWER)
        status = HTTPStatus(code)
        self.log_error("code %d, message %s", code, message)
        self.request_version = "HTTP/1.0"
        self.send_response(status)
        body = f"{status.phrase}\n".encode()
        self._send_headers("text/plain; charset=utf-8", len(body))
        self.wfile.write(body)

    def version_string(self) -> str:
        return "celery-singleton-exporter"

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


class _Bounded:
    """The lines of a request, as far as they are complete and not too many.

    :param most: bytes that may be read.
    """

    def __init__(self, file: BufferedIOBase, most: int) -> None:
        self._file = file
        self._left = most
        self._has_begun = False

    def readline(self, size: int) -> bytes:
        """The next line, or as much of it as may be read and one byte more; empty if there is no
        request at all.

        :raises LineTooLong: more was read already.
        :raises ConnectionAbortedError: the request ends in its middle. Python's server would take
            what has come for the whole of it.
        """
        if self._left < 0:
            raise LineTooLong("request")
        most = min(size, self._left + 1)
        line = self._file.readline(most)
        if len(line) < most and not line.endswith(b"\n") and (line or self._has_begun):
            raise ConnectionAbortedError("half a request")
        self._has_begun = True
        self._left -= len(line)
        return line

    def close(self) -> None:
        self._file.close()


def make(pages: Pages, hosts: Hosts, host: str, port: int, connections: Connections) -> Server:
    """A server that listens.

    :param host: a name or an address; empty for all addresses.
    :param port: 0 for any that is free.
    :raises ImproperlyConfigured: the address cannot be had.
    """
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        # IPv4 first, as "localhost" is both, and not every client tries both.
        family, *_, address = min(found, key=lambda each: each[0] != socket.AF_INET)
        return Server(family, address, pages, hosts, connections)
    except (OSError, OverflowError, ValueError) as error:
        raise ImproperlyConfigured(f"cannot listen at {_joined(host, port)}: {error}") from error


def url_of(server: Server) -> str:
    """Where it listens."""
    host, port = server.server_address[:2]
    return f"http://{_joined(str(host), port)}/"


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def serve_until(server: Server, wait: Callable[[], object]) -> None:
    """Answer until the function returns. Requests that are not answered by then are cut off."""
    thread = threading.Thread(target=server.serve_forever, name="singleton-http", daemon=True)
    thread.start()
    wait()
    server.shutdown()
    server.server_close()
    thread.join()
