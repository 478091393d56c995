"""Health: whether the singletons ran when they should have, as their rows tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from celery import Celery
from celery.exceptions import ImproperlyConfigured

from .config.options import expected_singletons, options_of
from .config.settings import Settings
from .lease.lease import clock
from .runtime import Runtime, runtime_of
from .store.base import Listed, StoreError, StoreUnavailable
from .text.moments import moment, seconds
from .text.visible import logger_of

logger = logger_of(__name__)


@dataclass(frozen=True, slots=True)
class SingletonHealth:
    """One singleton's health.

    :param singleton: its name, as ``celery singleton ls`` prints it.
    :param task: the name of its task.
    :param reason: why it is healthy or not, for people.
    """

    singleton: str
    task: str
    healthy: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Health:
    """The health of an app's singletons.

    :param singletons: each that ever ran, or should have; by name.
    :param error: why nothing is known, if the store is out of reach or its URL cannot be used.
    """

    singletons: tuple[SingletonHealth, ...]
    error: str | None = None

    @property
    def healthy(self) -> bool:
        """Whether the store answers and all singletons are healthy."""
        return self.error is None and all(each.healthy for each in self.singletons)


def check_health(app: Celery) -> Health:
    """Ask the store whether the app's singletons ran when they should have; a few statements.

    A singleton is healthy if it last finished within its task's ``expected_interval`` times
    ``singleton_heartbeat_threshold``, or has no ``expected_interval``. One that never ran is given
    that time, but ``singleton_startup_grace`` at least, from the first start of a worker that
    knows it; where none has started, from this process's first use of the app's singletons.

    :raises ImproperlyConfigured: a setting is not allowed.
    """
    app.finalize(auto=True)
    runtime = runtime_of(app)
    try:
        _see_that_it_can_be_used(runtime)
        rows = runtime.rows(runtime.settings.key_prefix)
    except (StoreError, ImproperlyConfigured) as error:
        return Health((), str(error))
    return evaluate(runtime, rows)


def _see_that_it_can_be_used(runtime: Runtime) -> None:
    """:raises StoreNotReady: it cannot, and may hide rows that are there, or lack privileges."""
    try:
        runtime.check()
    except StoreUnavailable as error:
        # One that is read-only, for example, can still be asked.
        logger.debug("singletons: health is told without a check of the store: %s", error)


def evaluate(runtime: Runtime, rows: Sequence[Listed]) -> Health:
    """The health of the singletons with these rows, and of those that should have one."""
    prefix = runtime.settings.key_prefix
    found = {}
    for row in rows:
        name = row.key.removeprefix(prefix)
        # Without a note of its task, a row may be that of the task which has the whole name.
        task = row.task or name
        expected = _expected(runtime, task)
        healthy, reason = _of(row, expected, runtime.settings)
        found[name] = SingletonHealth(name, task, healthy, reason)
    since = clock() - runtime.made_at
    for name in expected_singletons(runtime.app) - found.keys():
        healthy, reason = _never_ran(since, _expected(runtime, name) or 0.0, runtime.settings)
        found[name] = SingletonHealth(name, name, healthy, reason)
    return Health(tuple(found[name] for name in sorted(found)))


def _expected(runtime: Runtime, task: str) -> float | None:
    options = options_of(runtime.app.tasks.get(task))
    return options.expected_interval if options else None


def _of(row: Listed, expected: float | None, settings: Settings) -> tuple[bool, str]:
    if expected is None:
        return True, "it has no expected_interval"
    if row.last_finished_at is None:
        return _never_ran(row.read_at - (row.updated_at or row.read_at), expected, settings)
    age = row.read_at - row.last_finished_at
    limit = expected * settings.heartbeat_threshold
    if not -limit <= age < math.inf:
        # No clock that stores share is so far off: nothing is known of its last run.
        return False, f"its row says that it finished at {moment(row.last_finished_at)} UTC"
    text = f"it finished {seconds(age)} ago"
    return age <= limit, text if age <= limit else f"{text}, and should have within {limit:g} s"


def _never_ran(since: float, expected: float, settings: Settings) -> tuple[bool, str]:
    limit = max(settings.startup_grace, expected * settings.heartbeat_threshold)
    text = f"it never ran, and is waited for since {seconds(since)}"
    return since <= limit, text if since <= limit else f"{text}, longer than {limit:g} s"
