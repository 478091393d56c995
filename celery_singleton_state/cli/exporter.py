"""``celery singleton exporter``."""

from __future__ import annotations

import signal
import threading

import click
from celery import Celery
from celery.bin.base import CeleryCommand
from celery.exceptions import ImproperlyConfigured

from celery_singleton_state.runtime import runtime_of

from .common import says_why


@click.command(cls=CeleryCommand)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", default=9809, show_default=True, help="0 for any that is free.")
@click.option("--per-key", is_flag=True, help="Series for each singleton of a task.")
@click.option("--show-state", is_flag=True, help="Show the states on the page.")
@click.pass_context
@says_why
def exporter(context: click.Context, host: str, port: int, per_key: bool, show_state: bool) -> None:
    """Serve metrics for Prometheus on /metrics, health on /health, and a page on /.

    Leases, ages and health are read from the store at each request; what is counted is what
    events tell, so workers are to send them (-E). It changes nothing.
    """
    app: Celery = context.obj.app
    app.finalize(auto=True)
    try:
        from celery_singleton_state.exporter import run
    except ImportError as error:
        raise ImproperlyConfigured(
            f"the exporter needs a library: {error}; install celery-singleton-state[exporter]"
        ) from error
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        run(runtime_of(app), host, port, per_key, show_state, stop, click.echo)
    except OSError as error:
        raise click.ClickException(f"cannot listen at {host}:{port}: {error}") from error
