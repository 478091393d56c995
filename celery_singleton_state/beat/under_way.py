"""A tick of an entry whose ticks are sent one by one, until its singleton's row says that it ended.

A message can be lost without a trace: a queue is purged, a message expires or is revoked. So a beat
sends the same tick again, with the same id, when the row has known nothing of it for a while. The
row refuses the copy if the tick is done after all.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from celery import Celery
from celery.beat import BeatLazyFunc

from celery_singleton_state import ticks_done
from celery_singleton_state.config.options import options_of
from celery_singleton_state.keys import row_key
from celery_singleton_state.store.base import SeenTicks
from celery_singleton_state.text.visible import logger_of
from celery_singleton_state.ticks import entry_name, task_id_of

logger = logger_of(__name__)

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
#: Between two looks at the row while the next tick waits: a small part of the time that the tick
#: has taken, rounded to one of a few pauses that each are twice the one before. Looks of all
#: entries fall together, because each comes at a multiple of its pause.
FIRST_PAUSE, LONGEST_PAUSE = timedelta(seconds=0.02), timedelta(seconds=1.28)
PART = 4
#: After which a tick of which the row knows nothing is sent again; each time is longer.
PATIENCE, LONGEST_PATIENCE, GROWTH = timedelta(minutes=1), timedelta(minutes=30), 4
#: The same while other runs hold the lease, for which the tick may wait.
PATIENCE_WITH_OTHERS = timedelta(minutes=10)
#: The same after the tick's run has asked for a retry, whose countdown nobody knows here, or has
#: replaced itself.
PATIENCE_WITH_RETRY = timedelta(days=1)


class UnderWay:
    """A tick that was sent and may not have ended.

    :param key: of its singleton's row.
    :param sent: when its message was sent last.
    :param delay: after which its message may run.
    """

    def __init__(
        self, due: datetime, key: str, sent: datetime, delay: timedelta = timedelta(0)
    ) -> None:
        self.due = due
        self.key = key
        self.is_overdue = False
        self._patience = PATIENCE
        self._sent, self._delay = sent, delay
        #: When it was last known to go on, and whether its run sent a message that goes on with it.
        self._seen, self.is_continued = sent, False
        #: When it is to be sent again unless the row says something of it.
        self.overdue_at = sent + delay + PATIENCE

    def has_ended(self, row: SeenTicks | None, schedule: str, entry: str, now: datetime) -> bool:
        """Look at the singleton's row; if the tick goes on, find out whether it is overdue."""
        known = ticks_done.decode(row.ticks_done if row else None, self.key)
        ticks = known.get(entry_name(schedule, entry), ticks_done.EntryTicks())
        due = self.due.timestamp()
        if ticks.has_ended(due):
            return True
        if row is not None and row.held and row.task_id == task_id_of(schedule, entry, self.due):
            self._seen, self.overdue_at = now, now + PATIENCE
        elif due in ticks.retried:
            self.is_continued = True
            self.overdue_at = max(self.overdue_at, self._seen + PATIENCE_WITH_RETRY)
        elif row is not None and row.held:
            self.overdue_at = max(self.overdue_at, self._sent + PATIENCE_WITH_OTHERS)
        self.is_overdue = now >= self.overdue_at
        return False

    def sent_again(self, key: str, now: datetime) -> None:
        """Its message was sent once more."""
        self.key, self._sent, self._seen, self.is_overdue = key, now, now, False
        self._patience = min(GROWTH * self._patience, LONGEST_PATIENCE)
        self.overdue_at = now + self._delay + self._patience

    def next_check(self, next_tick: datetime, now: datetime) -> datetime:
        """When to look at the row again: often while the next tick waits for this one's end."""
        seldom = min(next_tick, self.overdue_at)
        if seldom > now:
            return seldom
        pause, wanted = FIRST_PAUSE, min((now - self._sent) / PART, LONGEST_PAUSE)
        while 2 * pause <= wanted:
            pause *= 2
        return now + pause - (now - EPOCH) % pause


def row_key_of(entry: Any, app: Celery, prefix: str) -> str | None:
    """The key of the row that says when a tick of an entry has ended.

    ``None`` for an entry whose ticks are sent as they are due: it does not catch up with all, its
    task is no singleton of this app's or runs duplicates, or its arguments are made anew for each
    message.

    :param prefix: of the keys of singletons.
    """
    if entry.catch_up != "all" or entry.next_from != "schedule":
        return None
    task: Any = app.tasks.get(entry.task)
    options = options_of(task)
    if options is None or options.deduplicate is False:
        return None
    args, kwargs = tuple(entry.args or ()), dict(entry.kwargs or {})
    is_lazy = any(isinstance(each, BeatLazyFunc) for each in (*args, *kwargs.values()))
    if is_lazy and options.unique_on is not None:
        return None
    try:
        return row_key(prefix, task._name(args, kwargs))
    except Exception as error:  # a user's unique_on can raise anything
        logger.warning(
            "beat: the ticks of %s are sent as they are due, because the singleton that they are"
            " for cannot be told: %s",
            *(entry.name, error),
        )
        return None
