"""What the exporter answers: metrics, health and the page, and nothing that changes anything."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from http import HTTPStatus
from urllib.parse import parse_qs

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from celery_singleton_state.health import Health
from celery_singleton_state.runtime import Runtime

from .page.document import POLICY, render
from .page.overview import Overview
from .snapshot import Look

#: Of compression: most of what is to be had, for a tenth of the time.
LEVEL = 3
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
    """

    status: HTTPStatus
    kind: str
    body: bytes


class Pages:
    """Answers requests by their paths.

    :param look: looks at the store, for each request.
    :param shows_state: whether the page shows the states' values.
    """

    def __init__(
        self,
        runtime: Runtime,
        registry: CollectorRegistry,
        look: Callable[[], Look],
        shows_state: bool = False,
    ) -> None:
        self._registry = registry
        self._look = look
        self._overview = Overview(runtime, look, shows_state)

    def answer(self, path: str, query: str, accept: str) -> Answer:
        """The answer to a GET.

        :param accept: the request's header of that name.
        """
        match path:
            case "/metrics":
                return self._metrics(accept)
            case "/health":
                return _health(self._look().health)
            case "/":
                wanted = parse_qs(query).get("q", [""])[0]
                page = render(self._overview.page(wanted)).encode()
                return Answer(HTTPStatus.OK, "text/html; charset=utf-8", page)
        return text(HTTPStatus.NOT_FOUND, "there are /, /health and /metrics")

    def _metrics(self, accept: str) -> Answer:
        # A header may be folded, and parts of this one come back in the answer's.
        accept = " ".join(accept.split())
        try:
            encode, kind = choose_encoder(accept)
        except (TypeError, ValueError):
            # The library expects versions to be numbers.
            encode, kind = choose_encoder("")
        return Answer(HTTPStatus.OK, kind, encode(self._registry))


def text(status: HTTPStatus, line: str) -> Answer:
    """An answer of one line."""
    return Answer(status, "text/plain; charset=utf-8", f"{line}\n".encode())


def compressed(answer: Answer) -> bytes:
    """The body with gzip: an open page asks for the whole of it every few seconds."""
    return gzip.compress(answer.body, LEVEL)


def _health(found: Health) -> Answer:
    status = HTTPStatus.OK if found.healthy else HTTPStatus.SERVICE_UNAVAILABLE
    body = json.dumps({"healthy": found.healthy, **asdict(found)}, indent=2)
    return Answer(status, "application/json", body.encode())
