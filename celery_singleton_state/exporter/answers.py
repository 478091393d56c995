"""What the exporter answers: metrics, health and the page, and nothing that changes anything."""

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

#: Of compression: most of what is to be had, for a tenth of the time.
LEVEL = 3
#: Connections that metrics and pages leave to probes of /health.
FOR_HEALTH = 4
#: Of every answer. No other site's page may read, embed or frame it.
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
    """What a request is answered.

    :param kind: its ``Content-Type``.
    :param is_zipped: whether the body is compressed with gzip.
    """

    status: HTTPStatus
    kind: str
    body: bytes
    is_zipped: bool = False


class Pages:
    """Answers requests by their paths.

    One exposition, one page and one report of health are made at a time, and each for all requests
    that wait for it.

    :param look: looks at the store, for each request.
    :param shows_state: whether the page shows the states' values.
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
        """The answer to a GET.

        :param accept: the request's header of that name.
        :param zipped: whether the client takes a body compressed with gzip.
        :param is_wanted: whether the client still waits for the answer.
        :raises NotNow: too many requests wait, or the client does not.
        """
        make: Callable[[], Answer]
        match path:
            case "/metrics":
                # A header may be folded, and parts of this one come back in the answer's.
                encode, kind = _encoder(" ".join(accept.split()))
                answers, make = self._expositions, partial(self._metrics, encode, kind)
            case "/health":
                answers, kind, make = self._reports, "", self._health
            case "/":
                kind = parse_qs(query).get("q", [""])[0]
                answers, make = self._shown, partial(self._page, kind)
            case _:
                return text(HTTPStatus.NOT_FOUND, "there are /, /health and /metrics")
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
    """How metrics are written for a client, and the ``Content-Type`` of that."""
    try:
        return choose_encoder(accept)
    except (TypeError, ValueError):
        # The library expects versions to be numbers.
        return choose_encoder("")


def text(status: HTTPStatus, line: str) -> Answer:
    """An answer of one line."""
    return Answer(status, "text/plain; charset=utf-8", f"{line}\n".encode())


def compressed(answer: Answer) -> Answer:
    """The answer with gzip: an open page asks for the whole of it every few seconds."""
    return replace(answer, body=gzip.compress(answer.body, LEVEL), is_zipped=True)
