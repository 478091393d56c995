"""The exporter: one process that serves metrics, health and a status page over HTTP.

Gauges, health and the page are read from the store. Counters count the workers' Celery events.
"""

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
    """The options of the command ``celery singleton exporter``.

    :param host, port: the address to listen at.
    :param per_key: whether each singleton has metric series of its own. Default: the singletons of
        a task share one set of series.
    :param shows_state: whether the page shows the singletons' states.
    :param allowed_hosts: host names for which requests are answered, in addition to the names that
        :class:`.hosts.Hosts` always allows.
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
    """Serve metrics, health and the page until the function ``wait`` returns.

    :param say: called with one line that names the URL of the server.
    :raises ImproperlyConfigured: the server cannot listen at the address, or a setting is not
        allowed.
    :raises StoreMisconfigured: the store cannot be read until an operator repairs it.
    """
    _refuse_misconfigured_store(runtime)
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    counts = Counts(
        registry,
        options.per_key,
        known_tasks(runtime.app),
        Keys(runtime.settings.key_prefix),
    )
    receiver = Receiver(runtime.app, counts, counts.ignored)
    snapshots: Shared[Snapshot] = Shared()

    def shared_snapshot() -> Snapshot:
        return snapshots.get(None, lambda: take_snapshot(runtime))

    registry.register(Gauges(runtime, shared_snapshot, lambda: receiver.is_up, options.per_key))
    pages = Pages(runtime, registry, shared_snapshot, options.shows_state)
    hosts = Hosts(options.host, options.allowed_hosts)
    server = make(pages, hosts, options.host, options.port, Connections())
    receiver.start()
    say(f"listening at {url_of(server)}")
    try:
        serve_until(server, wait)
    finally:
        receiver.close()


def _refuse_misconfigured_store(runtime: Runtime) -> None:
    """Check that scrapes will be able to read the store.

    If the store is unavailable now, or has no table yet, only log a warning: scrapes report the
    problem by the metric ``singleton_store_up``, and the store can recover.

    :raises StoreMisconfigured: no scrape can read the store until an operator repairs it.
    """
    try:
        runtime.store.list(runtime.settings.key_prefix)
    except StoreMisconfigured:
        raise
    except StoreError as error:
        logger.warning("the store cannot be read yet: %s", error)
