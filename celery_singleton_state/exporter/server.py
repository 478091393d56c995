"""The exporter's HTTP server: one thread and one request for each connection.

This server extends the server of Python's standard library. It adds deadlines for whole requests,
limits for the number of connections and the size of a request, and a check of the ``Host`` header.
It closes each connection after the answer, and does not read the body of a request.
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

#: The most bytes of a request's first line and headers together.
LONGEST = 32_768
METHODS = "GET, HEAD, OPTIONS"
#: How many refused hosts are logged. The limit keeps clients from filling the log and memory.
WARNINGS = 20

BUSY = (
    b"HTTP/1.0 503 Service Unavailable\r\nContent-Type: text/plain\r\nRetry-After: 5\r\n\r\n"
    b"too many requests wait for the store\n"
)


class Server(ThreadingMixIn, TCPServer):
    """Answers each request in a thread of its own, so that a probe need not wait for a page.

    :param family: the address family of ``address``.
    :param address: the socket address to listen at.
    """

    daemon_threads = True
    allow_reuse_address = True
    #: The most connections that the kernel queues until the server accepts them.
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
        # Let a server that listens at "::" accept IPv4 as well.
        if self.address_family == socket.AF_INET6:
            with contextlib.suppress(OSError):
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the thread of a new connection, or refuse the connection if there are too many.

        The thread that accepts all connections calls this method, so the refusal is sent without
        waiting for the client.
        """
        if self.connections.admit(request):
            super().process_request(request, client_address)
            return
        request.setblocking(False)
        with contextlib.suppress(OSError):
            request.send(BUSY)
        self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection so that its client still gets the whole answer."""
        self.connections.remove(request)
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_WR)
            # Read the bytes that the client sent and the server left unread, such as a body. With
            # unread bytes at the close, the kernel would drop the answer.
            request.setblocking(False)
            request.recv(LONGEST)
        self.close_request(request)

    def service_actions(self) -> None:
        """Shut down connections past their deadline. Called twice a second by ``serve_forever``."""
        self.connections.shut_late()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an error in a connection's thread. Usually the client has closed the connection."""
        logger.debug("a connection of %s ended", client_address, exc_info=True)

    def warn_of_host(self, host: str) -> None:
        """Log a refused host: each host only once, and only the first :data:`WARNINGS` hosts."""
        if host not in self._warned and len(self._warned) < WARNINGS:
            self._warned.add(host)
            logger.warning(
                "requests for host %s are refused; to allow them, start the exporter with "
                "--allowed-host and this host",
                host,
            )


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
        # If the connection has failed, Python's finish() raises the error again that handle() has
        # already logged.
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def parse_request(self) -> bool:
        if len(self.raw_requestline) > LONGEST:
            self.requestline = self.request_version = ""
            self.send_error(HTTPStatus.REQUEST_URI_TOO_LONG)
            return False
        if len(self.raw_requestline.split()) == 2:
            # Refuse HTTP/0.9. It has no headers, so there is no host to check, and the answer could
            # not have the headers that protect it.
            self.requestline = self.request_version = ""
            self.send_error(HTTPStatus.BAD_REQUEST, "HTTP/1.0 or 1.1 is needed")
            return False
        return super().parse_request()

    def do_GET(self) -> None:
        self.server.connections.begin(self.connection, Step.STORE)
        self._send(self._answer())

    do_HEAD = do_GET  # noqa: N815

    def do_OPTIONS(self) -> None:
        """Answer OPTIONS, which is the default method of HAProxy's ``option httpchk``."""
        self._send(Answer(HTTPStatus.NO_CONTENT, "", b""))

    def _refuse_method(self) -> None:
        self._send(
            text(HTTPStatus.METHOD_NOT_ALLOWED, f"the exporter is read-only; it takes {METHODS}")
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self._refuse_method
        raise AttributeError(name)

    def _answer(self) -> Answer:
        try:
            url = urlsplit(self.path)
        except ValueError:
            return text(HTTPStatus.BAD_REQUEST, "the request's path is not valid")
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
            logger.exception("a request for %s could not be answered", url.path)
            return text(
                HTTPStatus.INTERNAL_SERVER_ERROR, "the request failed; the exporter's log says why"
            )

    def _is_open(self) -> bool:
        """Return whether the client still waits and has not closed its side of the connection."""
        try:
            return bool(self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def _refused_host(self, in_target: str) -> Answer | None:
        """Return the refusal of a request whose host is not allowed; ``None`` if it is allowed.

        :param in_target: the host in the request line; empty unless the request line has a whole
            URL, as a client of a proxy sends it.
        """
        named = self.headers.get_all("Host", [])
        # The host is checked because of requests from browsers, and a browser always sends one Host
        # header. A request without the header is only allowed in HTTP/1.0, which simple probes use.
        if len(named) > 1 or (not named and self.request_version != "HTTP/1.0"):
            return text(HTTPStatus.BAD_REQUEST, "one Host header is needed")
        for value in (*named, in_target):
            try:
                host = host_of(value) if value else ""
            except BadHost:
                return text(HTTPStatus.BAD_REQUEST, "the Host header does not name a host")
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
        """Answer an unreadable request by one line that repeats nothing of the request."""
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
    """The file from which a request is read, with a limit of bytes, and an error at half a request.

    :param most: the most bytes of the request.
    """

    def __init__(self, file: BufferedIOBase, most: int) -> None:
        self._file = file
        self._left = most
        self._has_begun = False

    def readline(self, size: int) -> bytes:
        """Return the next line of the request; empty if there is no request at all.

        A line is cut one byte beyond the limit of bytes for the whole request.

        :raises LineTooLong: earlier lines have exceeded the limit.
        :raises ConnectionAbortedError: the request ends in the middle. Without this error, Python's
            server would answer the incomplete request.
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
    """Return a server that listens at an address.

    :param host: a name or an address; empty for all addresses.
    :param port: 0 for any port that is free.
    :raises ImproperlyConfigured: the server cannot listen at the address.
    """
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        # Prefer IPv4: "localhost" has an IPv4 and an IPv6 address, and not every client tries both.
        family, *_, address = min(found, key=lambda each: each[0] != socket.AF_INET)
        return Server(family, address, pages, hosts, connections)
    except (OSError, OverflowError, ValueError) as error:
        raise ImproperlyConfigured(f"cannot listen at {_joined(host, port)}: {error}") from error


def url_of(server: Server) -> str:
    """Return the URL at which the server listens."""
    host, port = server.server_address[:2]
    return f"http://{_joined(str(host), port)}/"


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def serve_until(server: Server, wait: Callable[[], object]) -> None:
    """Answer requests until the function ``wait`` returns. Then cut off unanswered requests."""
    thread = threading.Thread(target=server.serve_forever, name="singleton-http", daemon=True)
    thread.start()
    wait()
    server.shutdown()
    server.server_close()
    thread.join()
