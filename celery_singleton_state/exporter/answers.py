"""The exporter's answers to GET requests: metrics, health and the page. All are read-only."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from http import HTTPStatus
from urllib.parse import parse_qs

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from celery_singleton_state.runtime import Runtime

from .connections import LIMIT
from .page.document import POLICY, render
from .page.overview import Overview
from .shared import Shared
from .snapshot import Snapshot

#: The gzip level of answers, from 1 to 9. Level 3 saves nearly as much as level 9, in a fraction of
#: the time.
LEVEL = 3
#: The number of connections that are reserved for /health: requests for metrics and the page may
#: use only the other connections.
FOR_HEALTH = 4
#: Headers of every answer. They keep pages of other sites from reading, embedding or framing the
#: answer, and browsers from storing it.
HEADERS = (
    ("Content-Security-Policy", f"{POLICY}; frame-ancestors 'none'"),
    ("X-Frame-Options", "DENY"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
)


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one request.

    :param kind: the ``Content-Type``; empty if there is no body.
    :param is_zipped: whether ``body`` is compressed with gzip.
    """

    status: HTTPStatus
    kind: str
    body: bytes
    is_zipped: bool = False


class Pages:
    """Answers requests for ``/``, ``/health`` and ``/metrics``.

    At any time the exporter makes at most one exposition of the metrics, one page and one health
    report. Requests that wait for equal answers share one answer.

    :param take_snapshot: reads the store; called for each page and each health report.
    :param shows_state: whether the page shows the singletons' states.
    """

    def __init__(
        self,
        runtime: Runtime,
        registry: CollectorRegistry,
        take_snapshot: Callable[[], Snapshot],
        shows_state: bool = False,
    ) -> None:
        self._registry = registry
        self._take_snapshot = take_snapshot
        self._overview = Overview(runtime, take_snapshot, shows_state)
        room = threading.BoundedSemaphore(LIMIT - FOR_HEALTH)
        self._expositions: Shared[Answer] = Shared(room)
        self._shown: Shared[Answer] = Shared(room)
        self._reports: Shared[Answer] = Shared()

    def answer(
        self,
        path: str,
        query: str,
        accept: str,
        zipped: bool = False,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> Answer:
        """Return the answer to a GET request.

        :param accept: the request's ``Accept`` header.
        :param zipped: whether the client accepts a body that is compressed with gzip.
        :param is_wanted: a function that returns whether the client still waits for the answer.
        :raises NotNow: too many requests wait, or this client no longer waits.
        """
        make: Callable[[], Answer]
        match path:
            case "/metrics":
                # The answer's Content-Type repeats parts of the Accept header. If the client
                # folded that header, its line breaks would split the answer's headers.
                encode, kind = _encoder(" ".join(accept.split()))
                answers, make = self._expositions, partial(self._metrics, encode, kind)
            case "/health":
                answers, kind, make = self._reports, "", self._health
            case "/":
                kind = parse_qs(query).get("q", [""])[0]
                answers, make = self._shown, partial(self._page, kind)
            case _:
                return text(HTTPStatus.NOT_FOUND, "the paths are /, /health and /metrics")
        work = (lambda: compressed(make())) if zipped else make
        return answers.get((kind, zipped), work, is_wanted)

    def _metrics(self, encode: Callable[[CollectorRegistry], bytes], kind: str) -> Answer:
        return Answer(HTTPStatus.OK, kind, encode(self._registry))

    def _health(self) -> Answer:
        found = self._take_snapshot().health
        status = HTTPStatus.OK if found.healthy else HTTPStatus.SERVICE_UNAVAILABLE
        body = json.dumps({"healthy": found.healthy, **asdict(found)}, indent=2)
        return Answer(status, "application/json", body.encode())

    def _page(self, wanted: str) -> Answer:
        page = render(self._overview.page(wanted)).encode()
        return Answer(HTTPStatus.OK, "text/html; charset=utf-8", page)


def _encoder(accept: str) -> tuple[Callable[[CollectorRegistry], bytes], str]:
    """Return the function that encodes the metrics for a client, and their ``Content-Type``."""
    try:
        return choose_encoder(accept)
    except (TypeError, ValueError):
        # prometheus_client fails on an Accept header with a version that is not a number. Answer
        # such a client as if it had sent no Accept header.
        return choose_encoder("")


def text(status: HTTPStatus, line: str) -> Answer:
    """Return an answer that is one line of plain text."""
    return Answer(status, "text/plain; charset=utf-8", f"{line}\n".encode())


def compressed(answer: Answer) -> Answer:
    """Return the answer with its body compressed by gzip.

    Compression saves traffic, because an open page fetches the whole document every few seconds.
    """
    return replace(answer, body=gzip.compress(answer.body, LEVEL), is_zipped=True)
