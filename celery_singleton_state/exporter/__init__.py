"""The exporter: one process that shows what the store holds and counts what events tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, disable_created_metrics

from celery_singleton_state.runtime import Runtime
from celery_singleton_state.store.base import StoreError, StoreMisconfigured
from celery_singleton_state.text.visible import logger_of

from .answers import Pages
from .connections import Connections
from .counts import Counts
from .gauges import Gauges
from .hosts import Hosts, check_pattern
from .labels import Keys, known_tasks
from .receiver import Receiver
from .server import make, serve_until, url_of
from .shared import Shared
from .snapshot import Snapshot, take_snapshot

logger = logger_of(__name__)

__all__ = ["Counts", "Options", "check_pattern", "run"]


@dataclass(frozen=True, slots=True)
class Options:
    """What an operator says on the command line.

    :param host, port: where to listen.
    :param per_key: whether each singleton of a task has series of its own.
    :param shows_state: whether the page shows the states.
    :param allowed_hosts: names that requests may be sent to, beside those that always may.
    """

    host: str
    port: int
    per_key: bool = False
    shows_state: bool = False
    allowed_hosts: tuple[str, ...] = ()


def run(
    runtime: Runtime,
    options: Options,
    wait: Callable[[], object],
    say: Callable[[str], object],
) -> None:
    """Serve until the function ``wait`` returns.

    :param say: told where it listens.
    :raises ImproperlyConfigured: the address cannot be had, or a setting is not allowed.
    :raises StoreMisconfigured: the store cannot be read until somebody mends it.
    """
    _see_that_it_is_set_up(runtime)
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    counts = Counts(
        registry,
        options.per_key,
        known_tasks(runtime.app),
        Keys(runtime.settings.key_prefix),
    )
    receiver = Receiver(runtime.app, counts, counts.ignored)
    looks: Shared[Snapshot] = Shared()

    def shared() -> Snapshot:
        return looks.get(None, lambda: take_snapshot(runtime))

    registry.register(Gauges(runtime, shared, lambda: receiver.is_up, options.per_key))
    pages = Pages(runtime, registry, shared, options.shows_state)
    hosts = Hosts(options.host, options.allowed_hosts)
    server = make(pages, hosts, options.host, options.port, Connections())
    receiver.start()
    say(f"listening at {url_of(server)}")
    try:
        serve_until(server, wait)
    finally:
        receiver.close()


def _see_that_it_is_set_up(runtime: Runtime) -> None:
    """:raises StoreMisconfigured: no scrape would ever see anything.

    A store that is unavailable now, or has no table yet, is what the metrics tell.
    """
    try:
        runtime.store.list(runtime.settings.key_prefix)
    except StoreMisconfigured:
        raise
    except StoreError as error:
        logger.warning("the store cannot be read yet: %s", error)
