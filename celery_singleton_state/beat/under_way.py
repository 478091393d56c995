"""Follow a tick that was sent until the row of its singleton shows that it has ended.

With ``catch_up="all"`` a beat sends the next tick of an entry only after the last one has ended. A
message can be lost without a trace: its queue is purged, or it expires, or it is revoked. So if the
row shows nothing of the tick for a while, the beat sends the tick again, with the same task id. If
the tick was done after all, the second message ends as a duplicate.
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

#: The time from which the times of checks are counted: a row is checked a whole number of pauses
#: after it.
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
#: The shortest and the longest pause between two checks of the row, while the next tick waits. Each
#: possible pause is twice the one before. Checks with the same pause are made at the same times,
#: so that one statement can check the rows of many entries.
FIRST_PAUSE, LONGEST_PAUSE = timedelta(seconds=0.02), timedelta(seconds=1.28)
#: The longest pause between two checks of the row is also limited to the time since the tick was
#: sent, divided by this number. So the row is checked often only if the tick was sent a short time
#: ago.
PART = 4
#: How long a beat waits before it sends a tick again if the row shows nothing of the tick: the
#: first wait, the longest wait, and the factor by which each further wait is longer.
PATIENCE, LONGEST_PATIENCE, GROWTH = timedelta(minutes=1), timedelta(minutes=30), 4
#: How long a beat waits before it sends a tick again if other runs hold the lease. This wait is
#: longer than ``PATIENCE``, because the tick's message may be waiting for the lease.
PATIENCE_WITH_OTHERS = timedelta(minutes=10)
#: How long a beat waits before it sends a tick again if the tick's run has asked for a retry or has
#: replaced itself. This is the longest wait, because the beat does not know the countdown of the
#: message that continues the tick.
PATIENCE_WITH_RETRY = timedelta(days=1)


class UnderWay:
    """A tick that was sent and may not have ended.

    :param due: the due time of the tick.
    :param key: the key of the singleton's row.
    :param sent: the time when the tick's message was last sent.
    :param delay: the ``countdown`` of the message. Left out: no countdown.
    """

    def __init__(
        self, due: datetime, key: str, sent: datetime, delay: timedelta = timedelta(0)
    ) -> None:
        self.due = due
        self.key = key
        self.is_overdue = False
        self._patience = PATIENCE
        self._sent, self._delay = sent, delay
        #: The last time at which the row showed a run of the tick; and whether that run has sent a
        #: message that continues the tick: a retry or a replacement.
        self._seen, self.is_continued = sent, False
        #: The time at which the tick is sent again if the row shows nothing of the tick until then.
        self.overdue_at = sent + delay + PATIENCE

    def has_ended(self, row: SeenTicks | None, schedule: str, entry: str, now: datetime) -> bool:
        """Return whether the singleton's row shows that the tick has ended.

        If not, the method sets ``is_overdue`` to whether the tick has to be sent again.

        :param row: what the row shows of ticks; ``None`` if there is no row.
        :param schedule: the name of the beats.
        :param entry: the name of the entry.
        :param now: the time by the store's clock.
        """
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
        """Record that the tick's message was sent again.

        :param key: the key of the singleton's row.
        :param now: the time by the store's clock.
        """
        self.key, self._sent, self._seen, self.is_overdue = key, now, now, False
        self._patience = min(GROWTH * self._patience, LONGEST_PATIENCE)
        self.overdue_at = now + self._delay + self._patience

    def next_check(self, next_tick: datetime, now: datetime) -> datetime:
        """Return when to check the row again.

        The row is checked often only while the next tick is due and waits for this tick's end.

        :param next_tick: the due time of the next tick.
        :param now: the time by the store's clock.
        """
        seldom = min(next_tick, self.overdue_at)
        if seldom > now:
            return seldom
        pause, wanted = FIRST_PAUSE, min((now - self._sent) / PART, LONGEST_PAUSE)
        while 2 * pause <= wanted:
            pause *= 2
        return now + pause - (now - EPOCH) % pause


def row_key_of(entry: Any, app: Celery, prefix: str) -> str | None:
    """Return the key of the singleton's row that shows when a tick of an entry has ended.

    :param entry: the entry.
    :param app: the app of the beat.
    :param prefix: the prefix of the keys of singletons.
    :returns: ``None`` if the entry's ticks are sent when they are due, without waiting for the end
        of the tick before. That is the case unless all of these are true: the entry has
        ``catch_up="all"`` and ``next_from="schedule"``; its task is a singleton of this app that
        drops duplicates; and the singleton's key does not depend on a ``BeatLazyFunc``, which has a
        new value for each message.
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
            "beat: the ticks of %s are sent when they are due, without waiting for the end of the"
            " tick before, because the key of their singleton cannot be calculated: %s",
            *(entry.name, error),
        )
        return None
