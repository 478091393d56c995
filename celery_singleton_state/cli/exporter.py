"""The command ``celery singleton exporter``: serve metrics, health and a page by HTTP."""

from __future__ import annotations

import signal
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import click
from celery import Celery
from celery.bin.base import CeleryCommand
from celery.exceptions import ImproperlyConfigured

from celery_singleton_state.runtime import runtime_of

from .common import load_tasks, report_errors
from .terminal import say

#: The numbers of the signals that stop the exporter.
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@click.command(cls=CeleryCommand)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    default=9809,
    show_default=True,
    help="Port to listen on; 0 for any free port.",
)
@click.option(
    "--allowed-host",
    "allowed_hosts",
    metavar="NAME",
    multiple=True,
    help="A host name that clients use for the exporter, if it could be in public DNS: "
    "shop.example.com, *.example.com for all names below it, or * for every name. Repeatable.",
)
@click.option("--per-key", is_flag=True, help="Series for each singleton, not only each task.")
@click.option("--show-state", is_flag=True, help="Show the states on the page.")
@click.pass_context
@report_errors
def exporter(
    context: click.Context,
    host: str,
    port: int,
    allowed_hosts: tuple[str, ...],
    per_key: bool,
    show_state: bool,
) -> None:
    """Serve metrics for Prometheus on /metrics, health on /health, and a page on /.

    Leases, ages and health are read from the store at each request. Counters and durations come
    from Celery events, so start the workers with -E. The exporter changes nothing in the store.

    A request is answered if its Host header is an IP address, this machine's name, or a name that
    cannot be in public DNS: localhost, prometheus, shop.monitoring.svc, shop.internal. Allow other
    names by --allowed-host.
    """
    app: Celery = context.obj.app
    load_tasks(app)
    try:
        from celery_singleton_state.exporter import Options, check_pattern, run
    except ImportError as error:
        raise ImproperlyConfigured(
            f"the exporter needs a library: {error}; install celery-singleton-state[exporter]"
        ) from error
    try:
        allowed = tuple(map(check_pattern, allowed_hosts))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'--allowed-host'") from error
    options = Options(host, port, per_key, show_state, allowed)
    run(runtime_of(app), options, _until_signalled(), say)


def _until_signalled() -> Callable[[], object]:
    """Return a function that waits until the exporter gets SIGINT or SIGTERM, and then returns.

    Another such signal ends the process at once.
    """
    # Use a queue instead of an Event. If the signal interrupted Event.wait() while wait() holds the
    # Event's lock, set() in the signal handler would wait for the lock forever.
    received: SimpleQueue[None] = SimpleQueue()

    def on_signal(*_: Any) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        received.put(None)

    for number in SIGNALS:
        signal.signal(number, on_signal)
    return received.get
