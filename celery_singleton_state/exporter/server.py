"""The exporter's HTTP server: metrics, health and the page, and nothing that changes anything."""

from __future__ import annotations

import gzip
import json
import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict
from socketserver import ThreadingMixIn
from typing import Any
from urllib.parse import parse_qs
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from celery_singleton_state.health import Health
from celery_singleton_state.runtime import Runtime

from .look import look
from .overview import Overview
from .page import render
from .page_policy import POLICY

logger = logging.getLogger(__name__)

StartResponse = Callable[[str, list[tuple[str, str]]], Any]
#: Status, type and body of an answer.
Answer = tuple[str, str, bytes]

OK = "200 OK"
#: Of compression: most of what is to be had, for a tenth of the time.
LEVEL = 3


class Pages:
    """The answers, as a WSGI application."""

    def __init__(
        self, runtime: Runtime, registry: CollectorRegistry, shows_state: bool = False
    ) -> None:
        self._runtime = runtime
        self._registry = registry
        self._overview = Overview(runtime, shows_state)

    def __call__(self, environ: dict[str, Any], start: StartResponse) -> Iterable[bytes]:
        status, kind, body = self._answer(environ)
        headers = [("Content-Type", kind)]
        # An open page asks for the whole of it every few seconds.
        if "gzip" in environ.get("HTTP_ACCEPT_ENCODING", ""):
            body = gzip.compress(body, LEVEL)
            headers.append(("Content-Encoding", "gzip"))
        headers += [
            ("Content-Length", str(len(body))),
            ("Content-Security-Policy", f"{POLICY}; frame-ancestors 'none'"),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
        ]
        start(status, headers)
        return [body if environ["REQUEST_METHOD"] != "HEAD" else b""]

    def _answer(self, environ: dict[str, Any]) -> Answer:
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return "405 Method Not Allowed", "text/plain", b"it can only be looked at\n"
        match environ.get("PATH_INFO", "/"):
            case "/metrics":
                encode, kind = choose_encoder(environ.get("HTTP_ACCEPT", ""))
                return OK, kind, encode(self._registry)
            case "/health":
                return _health(look(self._runtime).health)
            case "/":
                query = parse_qs(environ.get("QUERY_STRING", "")).get("q", [""])[0]
                page = render(self._overview.page(query))
                return OK, "text/html; charset=utf-8", page.encode()
        return "404 Not Found", "text/plain", b"there are /, /health and /metrics\n"


def _health(found: Health) -> Answer:
    status = OK if found.healthy else "503 Service Unavailable"
    body = json.dumps({"healthy": found.healthy, **asdict(found)}, indent=2)
    return status, "application/json", body.encode()


class Server(ThreadingMixIn, WSGIServer):
    """Answers each request in a thread, so that a probe need not wait for a page."""

    daemon_threads = True


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


def make(pages: Pages, host: str, port: int) -> Server:
    """A server that listens.

    :raises OSError: the address cannot be had.
    """
    server = make_server(host, port, pages, server_class=Server, handler_class=_Handler)
    assert isinstance(server, Server)
    return server


def serve_until(server: Server, stop: threading.Event) -> None:
    """Answer until it is told to stop."""
    thread = threading.Thread(target=server.serve_forever, name="singleton-http", daemon=True)
    thread.start()
    stop.wait()
    server.shutdown()
    server.server_close()
    thread.join()
