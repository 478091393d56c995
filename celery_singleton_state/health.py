"""Health checks: whether each singleton ran when it should have, according to its row."""

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
    """The health of one singleton.

    :param singleton: the singleton's name, as ``celery singleton ls`` prints it.
    :param task: the name of the singleton's task.
    :param healthy: whether the singleton ran when it should have.
    :param reason: a text that says why the singleton is healthy or not.
    """

    singleton: str
    task: str
    healthy: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Health:
    """The health of all singletons of an app.

    :param singletons: every singleton that has ever run or should have run, sorted by name.
    :param error: why the health is unknown: the store is unavailable, or its URL cannot be used.
        ``None`` if the store has answered.
    """

    singletons: tuple[SingletonHealth, ...]
    error: str | None = None

    @property
    def healthy(self) -> bool:
        """Whether the store has answered and all singletons are healthy."""
        return self.error is None and all(each.healthy for each in self.singletons)


def check_health(app: Celery) -> Health:
    """Check whether the app's singletons ran when they should have, with a few SQL statements.

    - A singleton whose task has no ``expected_interval`` is healthy.
    - A singleton that has run is healthy if its last run finished no longer ago than
      ``expected_interval`` times ``singleton_heartbeat_threshold``.
    - A singleton that has never run is healthy until ``expected_interval`` times
      ``singleton_heartbeat_threshold``, and at least ``singleton_startup_grace`` seconds, have
      passed since a worker that knows the task first started. If no such worker has started, the
      time is counted from the first use of the app's singletons in this process.

    If the store is unavailable, no error is raised: :attr:`Health.error` says so.

    :param app: the Celery app. Its tasks must be imported.
    :returns: the health of every singleton.
    :raises ImproperlyConfigured: a setting of the app is not allowed.
    """
    app.finalize(auto=True)
    runtime = runtime_of(app)
    try:
        _check_stores(runtime)
        rows = runtime.rows(runtime.settings.key_prefix)
    except (StoreError, ImproperlyConfigured) as error:
        return Health((), str(error))
    return evaluate(runtime, rows)


def _check_stores(runtime: Runtime) -> None:
    """Refuse stores whose rows cannot be relied on.

    :raises StoreNotReady: a table is missing or of an older release, a privilege is lacking, or
        rows are hidden.
    """
    try:
        runtime.check()
    except StoreUnavailable as error:
        # Go on: the check also fails if, for example, the database is read-only, and the rows of a
        # read-only database can be read.
        logger.debug("singletons: health is evaluated without a check of the store: %s", error)


def evaluate(runtime: Runtime, rows: Sequence[Listed]) -> Health:
    """Return the health of all singletons of an app.

    :param rows: the rows of all singletons of the app. A singleton without a row is included if its
        task has an ``expected_interval``, because it should have run.
    """
    prefix = runtime.settings.key_prefix
    found = {}
    for row in rows:
        name = row.key.removeprefix(prefix)
        # A row that was made before the table had a column `task` does not name its task. Assume a
        # task without unique_on, whose name is the singleton's name.
        task = row.task or name
        expected = _expected(runtime, task)
        healthy, reason = _evaluate_row(row, expected, runtime.settings)
        found[name] = SingletonHealth(name, task, healthy, reason)
    since = clock() - runtime.made_at
    for name in expected_singletons(runtime.app) - found.keys():
        healthy, reason = _never_ran(since, _expected(runtime, name) or 0.0, runtime.settings)
        found[name] = SingletonHealth(name, name, healthy, reason)
    return Health(tuple(found[name] for name in sorted(found)))


def _expected(runtime: Runtime, task: str) -> float | None:
    """Return a task's ``expected_interval`` in seconds; ``None`` if the task has none."""
    options = options_of(runtime.app.tasks.get(task))
    return options.expected_interval if options else None


def _evaluate_row(row: Listed, expected: float | None, settings: Settings) -> tuple[bool, str]:
    """Return whether the singleton of a row is healthy, and why.

    :param expected: the task's ``expected_interval``, in seconds.
    """
    if expected is None:
        return True, "it has no expected_interval"
    if row.last_finished_at is None:
        return _never_ran(row.read_at - (row.updated_at or row.read_at), expected, settings)
    age = row.read_at - row.last_finished_at
    limit = expected * settings.heartbeat_threshold
    if not -limit <= age < math.inf:
        # The clocks of servers differ by less than the limit. So a time that is further in the
        # future, or infinite, is wrong.
        at = moment(row.last_finished_at)
        return False, f"its row says that it finished at {at} UTC, which cannot be right"
    text = f"it finished {seconds(age)} ago"
    return age <= limit, text if age <= limit else f"{text}, and should have within {limit:g} s"


def _never_ran(since: float, expected: float, settings: Settings) -> tuple[bool, str]:
    """Return whether a singleton that has never run is healthy, and why.

    :param since: seconds for which the first run has been expected.
    :param expected: the task's ``expected_interval``, in seconds.
    """
    limit = max(settings.startup_grace, expected * settings.heartbeat_threshold)
    text = f"it never ran, and has been expected for {seconds(since)}"
    return since <= limit, text if since <= limit else f"{text}, longer than {limit:g} s"
