"""The values of metric labels: a limited number, whatever events and rows contain.

Each new value of a label costs memory in this process and series in Prometheus, for ever. Every
client of the broker can send an event, and every client of the database can write a row. So a label
takes only the names of this app's singleton tasks, words that this release knows (such as
outcomes), and a limited number of keys. Names and keys are written as `celery singleton ls` prints
them, because a parser of the metrics format may reject control characters and lone surrogates.
"""

from __future__ import annotations

from collections.abc import Collection

from celery import Celery

from celery_singleton_state.config.options import options_of
from celery_singleton_state.keys import row_key
from celery_singleton_state.text.visible import as_printed, logger_of

logger = logger_of(__name__)

#: The value of a label for any task that the app does not have.
UNKNOWN = "(unknown)"
#: The value of a label for any word that this release does not know, and for any key beyond the
#: first :data:`KEYS`.
OTHERS = "(others)"
#: The most keys, of all tasks together, that have series of their own: about 20 series each.
KEYS = 1_000


def known_tasks(app: Celery) -> frozenset[str]:
    """Return the names of the app's singleton tasks."""
    return frozenset(name for name, task in app.tasks.items() if options_of(task) is not None)


def bounded(value: str, known: Collection[str]) -> str:
    """Return a label's value: ``value`` if it is a known word, and :data:`OTHERS` otherwise."""
    return value if value in known else OTHERS


class Keys:
    """Decides which singletons' keys have series of their own.

    The first ``limit`` keys of all tasks together have series of their own, and in any case the
    first key of each task.

    :param prefix: the prefix of the rows' keys. A long key is shortened in a label as in its row,
        where the prefix counts for the length.
    :param warned: tasks that the log has warned of because of too many keys. This object adds the
        tasks that it logs.
    """

    def __init__(self, prefix: str = "", limit: int = KEYS, warned: set[str] | None = None) -> None:
        self._prefix = prefix
        self._limit = limit
        self._warned = set() if warned is None else warned
        self._of_task: dict[str, set[str]] = {}
        self._count = 0

    def label(self, task: str, key: str) -> str:
        """Return a key's label: the key as text, or :data:`OTHERS` if there are too many keys."""
        text = as_printed(row_key(self._prefix, key).removeprefix(self._prefix))
        known = self._of_task.setdefault(task, set())
        if text in known:
            return text
        if self._count < self._limit or not known:
            known.add(text)
            self._count += 1
            return text
        if task not in self._warned:
            self._warned.add(task)
            logger.warning(
                "there are more than %d keys: further keys of task %s are counted together, as "
                "key=%r",
                *(self._limit, task, OTHERS),
            )
        return OTHERS
