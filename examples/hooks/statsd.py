"""A hook that reports runs to StatsD: a counter for each outcome, and a timer."""

from __future__ import annotations

import os
import socket

from celery_singleton_state.hooks import Details, Lost, Released, Skipped


class StatsD:
    """A hook that sends to the StatsD server at ``STATSD_HOST`` and ``STATSD_PORT``.

    These are environment variables. The defaults are localhost and 8125.
    """

    def __init__(self) -> None:
        host = os.environ.get("STATSD_HOST", "localhost")
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._address = (socket.gethostbyname(host), int(os.environ.get("STATSD_PORT", "8125")))

    def __call__(self, details: Details) -> None:
        name = f"singleton.{details.singleton}"
        match details:
            case Released(outcome=outcome, seconds=seconds):
                self._send(f"{name}.{outcome}:1|c\n{name}.duration:{seconds * 1000:.0f}|ms")
            case Lost(seconds=seconds):
                self._send(f"{name}.lost:1|c\n{name}.duration:{seconds * 1000:.0f}|ms")
            case Skipped(outcome=outcome):
                self._send(f"{name}.{outcome}:1|c")

    def _send(self, lines: str) -> None:
        self._socket.sendto(lines.encode(), self._address)
