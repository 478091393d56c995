"""The values of labels. There is a bounded number of them, whatever events and rows say.

Each new value of a label is memory here and series in Prometheus, for good. Anybody on the broker
can send an event and anybody with the database can write a row, so only the names of the app's own
singleton tasks, words that are known, and a limited number of keys are values of labels. They stand
there as `celery singleton ls` prints them, because no parser of the format is sure to take controls
and lone surrogates as they are.
"""

from __future__ import annotations

from collections.abc import Collection

from celery import Celery

from celery_singleton_state.config.options import options_of
from celery_singleton_state.keys import row_key
from celery_singleton_state.text.visible import as_printed, logger_of

logger = logger_of(__name__)

#: Stands for all tasks that the app does not know.
UNKNOWN = "(unknown)"
#: Stands for all words that are not known, and for all keys beyond :data:`KEYS`.
OTHERS = "(others)"
#: Keys that have series of their own, of all tasks together. Each has some 20 series.
KEYS = 1_000


def known_tasks(app: Celery) -> frozenset[str]:
    """The names of the app's singleton tasks."""
    return frozenset(name for name, task in app.tasks.items() if options_of(task) is not None)


def bounded(value: str, known: Collection[str]) -> str:
    """The value, if it is one of the words."""
    return value if value in known else OTHERS


class Keys:
    """The keys that have series of their own: the first ones, of all tasks together, and the first
    of each task in any case.

    :param prefix: of the keys of rows; a long key is shortened as its row's is.
    :param warned: tasks that have had the warning of too many keys; more are added.
    """

    def __init__(self, prefix: str = "", limit: int = KEYS, warned: set[str] | None = None) -> None:
        self._prefix = prefix
        self._limit = limit
        self._warned = set() if warned is None else warned
        self._of_task: dict[str, set[str]] = {}
        self._count = 0

    def label(self, task: str, key: str) -> str:
        """The label of a key; :data:`OTHERS` if there are too many."""
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
                "there are more than %d keys: the series of further ones of task %s are counted "
                "together, as key=%r",
                *(self._limit, task, OTHERS),
            )
        return OTHERS
