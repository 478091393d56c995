"""Owed ticks: a beat sends them one by one, and in turns with the ticks of other entries.

One by one means: the next tick of an entry is sent when the singleton's row records that the tick
before it has ended.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import signals
from celery.beat import BeatLazyFunc
from celery.exceptions import Retry
from celery.schedules import crontab

from celery_singleton_state import singleton_task, ticks_done
from celery_singleton_state.beat import SingletonScheduler
from celery_singleton_state.beat.misfires import MAX_OWED
from celery_singleton_state.headers import DUE, ENTRY, ONE_BY_ONE
from celery_singleton_state.store.base import StoreUnavailable
from celery_singleton_state.ticks import task_id_of
from tests.helpers.beats import EVERY_MINUTE, SECOND, Beats, due_now, stored, take_over
from tests.helpers.beats import row as lease_row
from tests.helpers.messages import deliver, deliver_all, received
from tests.helpers.waiting import wait_until

DAY, MINUTE, HOUR = timedelta(days=1), timedelta(minutes=1), timedelta(hours=1)
#: The hour at which DAILY is due: 12 hours from now, so that no tick becomes due during a test.
HOUR_OF_DAY = (datetime.now(UTC).hour + 12) % 24
DAILY = {
    "task": "close",
    "schedule": crontab(hour=str(HOUR_OF_DAY), minute="5"),
    "catch_up": "all",
    "skip_if_older_than": None,
}
BY_ONE = {"task": "close", "catch_up": "all"}


class Shop:
    """A beat, the messages that it sends, and a worker that runs a message when a test says so.

    A test adds to :attr:`shift` in order to let the store's time pass.
    """

    def __init__(self, beat: SingletonScheduler, **options: Any) -> None:
        self.beat = beat
        self.sent: list[dict[str, Any]] = []
        self.ran: list[datetime] = []
        self.shift = timedelta(0)
        self.before: Callable[[Any], None] = lambda _: None
        self.task = self.register(beat, **options)
        signals.before_task_publish.connect(self._note)
        self._let_time_pass(beat)

    def register(self, beat: SingletonScheduler, **options: Any) -> Any:
        @singleton_task(beat.app, name="close", shared=False, **options)
        def close(task: Any, *_: Any) -> None:
            self.before(task)
            self.ran.append(task.tick)

        return close

    def _let_time_pass(self, beat: SingletonScheduler) -> None:
        now = beat._leader.now
        beat._leader.now = lambda: now() + self.shift  # type: ignore[method-assign]

    def _note(self, headers: dict[str, Any], **_: Any) -> None:
        self.sent.append(headers)

    def close(self) -> None:
        signals.before_task_publish.disconnect(self._note)

    def tick(self) -> None:
        """Call the beat's ``tick()``: it sends due ticks, and reads which ticks have ended."""
        assert self.beat.tick() >= 0
        assert self.beat._leader.leads

    def send_until(self, count: int) -> None:
        def sent() -> bool:
            self.tick()
            return len(self.sent) >= count

        wait_until(sent, f"{count} messages are sent")

    def run(self, headers: dict[str, Any], **more: Any) -> None:
        """Run a message in this process, as a worker would. An error of the body is not raised."""
        self.task.apply(task_id=headers["id"], headers=dict(headers), throw=False, **more)

    def dues(self) -> list[datetime]:
        return [datetime.fromisoformat(headers[DUE]) for headers in self.sent]


@pytest.fixture
def make_shop(beats: Beats) -> Iterator[Callable[..., Shop]]:
    yield from _shops(beats)


@pytest.fixture
def make_shop_on_sqlite(on_sqlite: Beats) -> Iterator[Callable[..., Shop]]:
    yield from _shops(on_sqlite)


def _shops(beats: Beats) -> Iterator[Callable[..., Shop]]:
    made: list[Shop] = []

    def make(
        schedule: dict[str, Any], settings: dict[str, Any] | None = None, **options: Any
    ) -> Shop:
        made.append(Shop(beats.make(schedule, **settings or {}), **options))
        made[-1].tick()
        return made[-1]

    yield make
    for shop in made:
        shop.close()


def owe(shop: Shop, days: int, name: str = "e") -> list[datetime]:
    """Let a daily entry fall behind by a number of ticks; return these owed ticks.

    :param days: the number of ticks, of which each day has one.
    """
    today = shop.beat._leader.now().replace(hour=HOUR_OF_DAY, minute=5, second=0, microsecond=0)
    last = today if today <= shop.beat._leader.now() else today - DAY
    owed = [last - number * DAY for number in reversed(range(days))]
    due_now(shop.beat, name, shop.beat._leader.now() - owed[0])
    shop.beat.schedule[name].next_tick = owed[0]
    shop.beat._unrecorded[name] = shop.beat.schedule[name].state()
    shop.beat._record()
    return owed


@pytest.mark.parametrize("policy", ["skip", "wait", "coalesce"])
def test_owed_ticks_are_sent_one_after_the_other(
    make_shop: Callable[..., Shop], policy: str
) -> None:
    """Each tick is sent when the row records that the tick before has ended, and not earlier."""
    shop = make_shop({"e": DAILY}, on_conflict=policy)
    owed = owe(shop, 4)
    for number in range(1, 5):
        shop.send_until(number)
        for _ in range(3):
            shop.shift += 2 * SECOND
            shop.tick()
        assert len(shop.sent) == number
        assert shop.sent[-1][ONE_BY_ONE]
        shop.run(shop.sent[-1])
    assert shop.dues() == shop.ran == owed
    assert stored(shop.beat)["e"].missed_count == 0


def test_a_lost_message_of_a_tick_is_sent_again_after_a_pause(
    make_shop: Callable[..., Shop], caplog: pytest.LogCaptureFixture
) -> None:
    """1. The queue is purged.
    2. The beat sends the tick again with the same task id.
    3. The pause before each further copy is longer.
    4. The tick runs, and the next tick is sent.
    """
    shop = make_shop({"e": DAILY})
    owed = owe(shop, 2)
    shop.send_until(1)
    shop.shift += 59 * SECOND
    shop.tick()
    assert len(shop.sent) == 1
    shop.shift += 2 * SECOND
    shop.send_until(2)
    assert "because the row of its singleton shows nothing of it" in caplog.text
    shop.shift += 2 * MINUTE
    shop.tick()
    assert len(shop.sent) == 2
    assert [message["id"] for message in shop.sent] == [task_id_of("shop", "e", owed[0])] * 2
    shop.run(shop.sent[-1])
    shop.run(shop.sent[0])
    shop.send_until(3)
    assert shop.ran == owed[:1]
    assert shop.dues()[-1] == owed[1]
    assert stored(shop.beat)["e"].total_run_count == 2


def test_a_lost_tick_is_sent_again_although_no_further_tick_is_owed(
    make_shop: Callable[..., Shop],
) -> None:
    shop = make_shop({"e": DAILY})
    owe(shop, 1)
    shop.send_until(1)
    shop.shift += 61 * SECOND
    shop.send_until(2)
    shop.run(shop.sent[-1])
    shop.shift += HOUR
    wait_until(lambda: shop.tick() or not stored(shop.beat)["e"].under_way, "the tick has ended")
    assert len(shop.sent) == 2


def test_no_tick_is_sent_during_a_long_run_of_the_tick_before(
    make_shop: Callable[..., Shop],
) -> None:
    """The tick's run holds its lease for hours. The beat sends neither a copy nor the next tick."""
    shop = make_shop({"e": DAILY})
    owe(shop, 2)
    shop.send_until(1)

    def check_that_none_is_sent(_: Any) -> None:
        for _number in range(3):
            shop.shift += 2 * HOUR
            shop.tick()
            assert len(shop.sent) == 1

    shop.before = check_that_none_is_sent
    shop.run(shop.sent[0])
    shop.send_until(2)
    assert len(shop.ran) == 1


def test_a_tick_that_waits_for_a_run_by_hand_is_not_sent_again_soon(
    make_shop: Callable[..., Shop],
) -> None:
    shop = make_shop({"e": DAILY})
    owe(shop, 1)
    shop.send_until(1)
    store = shop.beat._leader.runtime.store
    assert store.acquire("singleton-state:close", "by hand", 60, "another")
    shop.shift += 5 * MINUTE
    shop.tick()
    assert len(shop.sent) == 1
    shop.shift += 6 * MINUTE
    shop.send_until(2)


def test_no_tick_is_sent_while_the_retry_of_the_tick_before_is_pending(
    make_shop: Callable[..., Shop],
) -> None:
    shop = make_shop({"e": DAILY})
    owe(shop, 2)
    shop.send_until(1)

    def retry(task: Any) -> None:
        if not task.request.retries:
            raise Retry("in an hour")

    shop.before = retry
    shop.run(shop.sent[0])
    shop.shift += HOUR
    shop.tick()
    assert len(shop.sent) == 1
    shop.run(shop.sent[0], retries=1)
    shop.send_until(2)
    assert shop.dues()[0] < shop.dues()[1]


def test_after_a_tick_that_failed_for_good_the_next_is_sent(make_shop: Callable[..., Shop]) -> None:
    shop = make_shop({"e": DAILY})
    owed = owe(shop, 2)
    shop.send_until(1)

    def fail_for_good(_: Any) -> None:
        raise ValueError("bad")

    shop.before = fail_for_good
    shop.run(shop.sent[0])
    shop.send_until(2)
    assert shop.dues() == owed


def settings_of_own_queue() -> dict[str, Any]:
    """Return settings that name a new queue, because all apps share the queues in memory."""
    queue = f"pages-{uuid.uuid4()}"
    return {"task_default_queue": queue, "result_backend": "cache+memory://"}


def run_in_pages(shop: Shop) -> list[tuple[datetime, int]]:
    """Make a tick's task work in three pages: each run calls ``self.replace()`` for the next page.

    :returns: a list that gets the tick and the page of each run.
    """
    pages: list[tuple[datetime, int]] = []

    def replace(task: Any) -> None:
        (page,) = task.request.args or (1,)
        pages.append((task.tick, page))
        if page < 3:
            raise task.replace(task.s(page + 1))

    shop.before = replace
    return pages


@pytest.mark.parametrize("lost", [2, 3])
def test_a_tick_whose_replacement_is_lost_is_sent_again_after_a_day(
    make_shop_on_sqlite: Callable[..., Shop], lost: int
) -> None:
    """1. The tick's run replaces itself by the next of three pages.
    2. The queue is purged while a page waits in it.
    3. After a day the beat sends the tick again.
    4. All pages of that copy run, although some of them were done before.
    5. A redelivery of the first message is refused.
    """
    shop = make_shop_on_sqlite({"e": DAILY}, settings_of_own_queue())
    owed = owe(shop, 2)
    pages = run_in_pages(shop)
    shop.send_until(1)
    (first,) = messages = received(shop.beat.app)
    while len(pages) < lost - 1:
        deliver(shop.beat.app, messages[0])
        messages = received(shop.beat.app)
    shop.shift += 23 * HOUR
    shop.tick()
    assert received(shop.beat.app) == []
    shop.shift += 2 * HOUR
    shop.tick()
    (copy,) = received(shop.beat.app)
    assert copy.headers["id"] == first.headers["id"]
    # The broker may redeliver the first message before or after the copy runs. Both are refused.
    deliver(shop.beat.app, first)
    deliver(shop.beat.app, copy)
    deliver(shop.beat.app, first)
    deliver_all(shop.beat.app)
    assert [page for _, page in pages] == [*range(1, lost), 1, 2, 3]
    assert {tick for tick, _ in pages} == {owed[0]}
    wait_until(lambda: shop.tick() or shop.dues()[-1] == owed[1], "the next tick is sent")


def test_a_tick_whose_pages_take_days_is_not_sent_again(
    make_shop_on_sqlite: Callable[..., Shop],
) -> None:
    """The beat sends a tick again only if none of its pages has run for a day.

    Here each page takes less than a day, so the tick is not sent again.
    """
    shop = make_shop_on_sqlite({"e": DAILY}, settings_of_own_queue())
    owe(shop, 2)
    pages = run_in_pages(shop)
    replace = shop.before

    def take_long(task: Any) -> None:
        shop.shift += 20 * HOUR
        shop.tick()
        replace(task)

    shop.before = take_long
    shop.send_until(1)
    for _ in range(3):
        (message,) = received(shop.beat.app)
        deliver(shop.beat.app, message)
        if len(pages) < 3:
            shop.shift += 5 * MINUTE
            shop.tick()
    assert len(shop.sent) == 3


def test_no_tick_is_sent_before_the_last_replacement_of_the_tick_before(
    make_shop_on_sqlite: Callable[..., Shop],
) -> None:
    """Each page replaces itself by the next page, which has the same tick.

    The next day's tick is not sent before the last page has ended.
    """
    shop = make_shop_on_sqlite({"e": DAILY}, settings_of_own_queue())
    owed = owe(shop, 2)
    pages = run_in_pages(shop)
    shop.send_until(1)
    for page in (1, 2, 3):
        assert [message.get(DUE) for message in shop.sent] == [owed[0].isoformat()] * page
        assert [message.get(ONE_BY_ONE) for message in shop.sent] == [1] * page
        (message,) = received(shop.beat.app)
        deliver(shop.beat.app, message)
        found = shop.beat._leader.runtime.store.peek("singleton-state:close")
        assert found is not None
        known = ticks_done.decode(found.ticks_done, "")["shop:e"]
        assert known.retried == ((owed[0].timestamp(),) if page < 3 else ())
        for _ in range(3 if page < 3 else 0):
            shop.shift += 7 * MINUTE
            shop.tick()
    assert pages == [(owed[0], page) for page in (1, 2, 3)]
    shop.send_until(4)
    assert shop.dues()[-1] == owed[1]


@pytest.mark.parametrize("argument", [BeatLazyFunc(lambda: 1 // 0), object()])
def test_a_tick_whose_message_can_never_be_sent_is_not_waited_for(
    make_shop_on_sqlite: Callable[..., Shop], argument: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The beat tries the next tick as soon as it is due.

    It does not wait until a row records that the first tick has ended, because no row ever would.
    """
    shop = make_shop_on_sqlite({"e": EVERY_MINUTE | BY_ONE | {"args": (argument,)}})
    first = due_now(shop.beat, "e", 61 * SECOND)
    for number in (2, 3):
        shop.tick()
        state = stored(shop.beat)["e"]
        assert state.under_way is None
        assert state.total_run_count == number
        assert state.next_tick == first + number * MINUTE
        assert caplog.text.count("Message Error") == number
        shop.shift += MINUTE
    shop.beat.schedule["e"].args = (1,)
    shop.sent.clear()
    shop.tick()
    assert shop.dues() == [first + 3 * MINUTE]
    assert stored(shop.beat)["e"].under_way


def test_a_lost_tick_that_has_become_too_old_is_missed(
    make_shop_on_sqlite: Callable[..., Shop], caplog: pytest.LogCaptureFixture
) -> None:
    """1. A tick's message is lost.
    2. Its copy is lost.
    3. The tick is older than ``skip_if_older_than`` allows.
    4. The beat counts it as missed, and sends the next tick.
    """
    shop = make_shop_on_sqlite({"e": EVERY_MINUTE | BY_ONE})
    first = due_now(shop.beat, "e")
    shop.tick()
    shop.shift += 61 * SECOND
    shop.tick()
    assert shop.dues() == [first, first]
    assert "ticks were missed" not in caplog.text
    shop.shift += 244 * SECOND
    shop.tick()
    assert shop.dues() == [first, first, first + MINUTE]
    assert f"not sent (UTC): 1 of e from {first:%Y-%m-%d %H:%M:%S} on" in caplog.text
    state = stored(shop.beat)["e"]
    assert (state.missed_count, state.last_tick) == (1, first + MINUTE)
    assert state.under_way


def test_a_message_with_a_countdown_is_not_resent_before_it_may_run(
    make_shop_on_sqlite: Callable[..., Shop],
) -> None:
    shop = make_shop_on_sqlite({"e": DAILY | {"options": {"countdown": 120}}})
    owe(shop, 1)
    shop.send_until(1)
    shop.shift += 179 * SECOND
    shop.tick()
    assert len(shop.sent) == 1
    shop.shift += 2 * SECOND
    shop.tick()
    assert len(shop.sent) == 2
    # The beat sends the next copy four minutes after the end of the countdown.
    shop.shift += 359 * SECOND
    shop.tick()
    assert len(shop.sent) == 2
    shop.shift += 2 * SECOND
    shop.tick()
    assert len(shop.sent) == 3


@pytest.mark.parametrize("ended", [False, True])
def test_the_next_leader_waits_for_the_tick_that_the_first_has_sent(
    make_shop: Callable[..., Shop], beats: Beats, ended: bool
) -> None:
    """1. Beat A sends a tick, and dies.
    2. Beat B leads. While the tick has not ended, B must not send the next tick. When it has ended,
       B must not send it again.
    """
    shop = make_shop({"e": DAILY})
    owed = owe(shop, 2)
    shop.send_until(1)
    take_over(shop.beat)
    shop.beat._leader.give_up()
    shop.beat._leader.runtime.sql.give_back(lease_row(shop.beat).key, "another")
    shop.beat = beats.make({"e": DAILY})
    shop.register(shop.beat)
    if ended:
        shop.run(shop.sent[0])
    for _ in range(0 if ended else 3):
        shop.shift += 2 * SECOND
        shop.tick()
    if not ended:
        assert len(shop.sent) == 1
        shop.run(shop.sent[0])
    shop.send_until(2)
    shop.run(shop.sent[1])
    assert shop.dues() == shop.ran == owed


def test_a_tick_sent_before_its_arguments_changed_is_waited_for_in_its_own_row(
    make_shop: Callable[..., Shop], beats: Beats
) -> None:
    """1. A tick is sent.
    2. A deployment changes the entry's arguments, and so the singleton's key.
    3. The tick runs with the old arguments.
    4. The beat reads the old key's row, and sends the next.
    """
    shop = make_shop({"e": DAILY | {"args": (1,)}}, unique_on=lambda n: n)
    owed = owe(shop, 2)
    shop.send_until(1)
    shop.beat.close()
    shop.beat = beats.make({"e": DAILY | {"args": (2,)}})
    shop.register(shop.beat, unique_on=lambda n: n)
    shop.run(shop.sent[0], args=(1,))
    shop.send_until(2)
    assert shop.dues() == owed


NOT_ONE_BY_ONE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "unknown task": ({"task": "another"}, {}),
    "runs duplicates": ({}, {"deduplicate": False}),
    "arguments made anew": (
        {"args": (BeatLazyFunc(lambda: 1),)},
        {"unique_on": lambda n: n},
    ),
    "arguments that do not fit": ({"args": (1, 2)}, {"unique_on": lambda n: n}),
}


@pytest.mark.parametrize("case", NOT_ONE_BY_ONE)
def test_ticks_that_no_row_can_confirm_are_sent_when_they_are_due(
    make_shop: Callable[..., Shop], case: str
) -> None:
    fields, options = NOT_ONE_BY_ONE[case]
    shop = make_shop({"e": DAILY | fields}, **options)
    owed = owe(shop, 4)
    shop.tick()
    assert shop.dues() == owed
    assert not any(ONE_BY_ONE in message for message in shop.sent)


def test_an_entry_whose_row_cannot_be_read_delays_no_other_entry(
    make_shop: Callable[..., Shop],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Leases may be in another store than the schedule. Here only the leases' store is unavailable.

    The beat cannot read whether the entry's tick has ended. It sends the other entry's tick.
    """
    shop = make_shop({"e": DAILY, "other": EVERY_MINUTE})
    owe(shop, 2)
    shop.send_until(1)
    store = shop.beat._leader.runtime.store

    def refuse(*_: Any) -> Any:
        raise StoreUnavailable("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(store, "ticks", refuse)
        due_now(shop.beat, "other")
        for _ in range(3):
            shop.shift += 2 * SECOND
            shop.tick()
        assert [message[ENTRY] for message in shop.sent] == ["shop:e", "shop:other"]
        assert caplog.text.count("cannot be asked which ticks have ended: no answer") == 1
    shop.run(shop.sent[0])
    shop.send_until(3)


def test_the_rows_of_many_waiting_entries_are_read_in_one_statement(
    make_shop: Callable[..., Shop], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"e{number}" for number in range(20)]
    shop = make_shop(dict.fromkeys(names, DAILY))
    for name in names:
        owe(shop, 2, name)
    shop.send_until(20)
    asked: list[int] = []
    store = shop.beat._leader.runtime.store
    ticks = store.ticks

    def count(keys: Any) -> Any:
        asked.append(len(keys))
        return ticks(keys)

    monkeypatch.setattr(store, "ticks", count)
    shop.run(shop.sent[0])
    shop.send_until(21)
    assert asked
    assert len(asked) < 20


# -- turns


def test_one_entrys_backlog_delays_no_other_entry(make_shop: Callable[..., Shop]) -> None:
    """One entry owes 20,000 ticks. 20 other entries are due now, and one more entry is due soon.

    The beat sends the others' ticks at once, and the backlog in order.
    """
    backlog = EVERY_MINUTE | {"catch_up": "all", "skip_if_older_than": None}
    others = {f"o{number}": EVERY_MINUTE for number in range(20)}
    shop = make_shop({"backlog": backlog, **others, "soon": EVERY_MINUTE})
    due_now(shop.beat, "backlog", timedelta(days=14))
    for name in others:
        due_now(shop.beat, name)
    # The tick of "soon" is so far in the future that it becomes due only when the test moves the
    # clock.
    due_now(shop.beat, "soon", -MINUTE / 2)
    shop.tick()
    entries = [message[ENTRY] for message in shop.sent]
    assert len(entries) >= 500
    assert {f"shop:{name}" for name in others} <= set(entries[:22])
    shop.shift = MINUTE / 2
    count = len(shop.sent)
    shop.tick()
    assert "shop:soon" in [message[ENTRY] for message in shop.sent[count : count + 3]]
    dues = [due for due, name in zip(shop.dues(), entries, strict=False) if name == "shop:backlog"]
    assert dues == [dues[0] + number * MINUTE for number in range(len(dues))]


def test_an_entry_that_cannot_be_sent_delays_no_other_entry(
    make_shop: Callable[..., Shop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tool's wrapper of ``apply_entry`` sends nothing for "bad", and raises no error."""
    shop = make_shop({"bad": EVERY_MINUTE, "good": EVERY_MINUTE})
    apply_entry = shop.beat.apply_entry
    tried: list[str] = []

    def wrapper(entry: Any, producer: Any = None) -> None:
        tried.append(entry.name)
        if entry.name != "bad":
            apply_entry(entry, producer)

    monkeypatch.setattr(shop.beat, "apply_entry", wrapper)
    due_now(shop.beat, "bad", 2 * SECOND)
    due_now(shop.beat, "good")
    shop.tick()
    assert tried == ["bad", "good"]


# -- the bound on owed ticks


@pytest.mark.parametrize("schedule", [60.0, crontab()])
def test_no_more_ticks_than_the_bound_are_owed(
    make_shop: Callable[..., Shop], schedule: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The newest ticks are owed. Older ticks beyond the bound are missed, with a warning."""
    caplog.set_level(logging.WARNING)
    every = {"schedule": schedule, "catch_up": "all", "skip_if_older_than": None, "task": "t"}
    shop = make_shop({"e": every})
    due_now(shop.beat, "e", timedelta(days=400))
    entry = shop.beat.schedule["e"]
    first = entry.next_tick = entry.next_tick.replace(second=0, microsecond=0)
    wait_until(lambda: shop.tick() or shop.sent, "the first owed tick is sent")
    owed = (shop.beat._leader.now() - shop.dues()[0]) // MINUTE + 1
    assert MAX_OWED <= owed <= MAX_OWED + 1
    missed = stored(shop.beat)["e"].missed_count
    assert missed == (shop.dues()[0] - first) // MINUTE
    assert "ticks were missed, and are not sent" in caplog.text
    assert first.tzinfo is UTC
