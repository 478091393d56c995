"""The exporter: one process that shows what the store holds and counts what events tell."""

from __future__ import annotations

import threading
from collections.abc import Callable

from prometheus_client import CollectorRegistry, disable_created_metrics

from celery_singleton_state.options import options_of
from celery_singleton_state.runtime import Runtime

from .counts import Counts
from .gauges import Gauges
from .receiver import Receiver
from .server import Pages, make, serve_until

__all__ = ["Counts", "run"]


def run(
    runtime: Runtime,
    host: str,
    port: int,
    per_key: bool,
    shows_state: bool,
    stop: threading.Event,
    say: Callable[[str], object],
) -> None:
    """Serve until told to stop.

    :param say: told where it listens.
    :raises OSError: the address cannot be had.
    """
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    counts = Counts(registry, per_key)
    for name, task in runtime.app.tasks.items():
        if options_of(task) is not None:
            counts.begin(name)
    receiver = Receiver(runtime.app, counts)
    registry.register(Gauges(runtime, lambda: receiver.is_up, per_key))
    server = make(Pages(runtime, registry, shows_state), host, port)
    receiver.start()
    say(f"listening at http://{server.server_name}:{server.server_port}/")
    try:
        serve_until(server, stop)
    finally:
        receiver.close()
