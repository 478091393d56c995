"""Bodies that end by ``self.replace()``: the state is saved, and the replacement runs.

In these tests a *page* is a message of a task that replaces itself by its next page.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from celery.exceptions import Ignore
from kombu.exceptions import OperationalError

from celery_singleton_state.history import decode
from celery_singleton_state.message import duplicates
from celery_singleton_state.store.base import StoreUnavailable
from tests.helpers.messages import deliver, deliver_all, received, use_own_queue
from tests.helpers.runs import Counter, row, task_of


@pytest.fixture
def app(app: Celery) -> Celery:
    use_own_queue(app)
    return app


@pytest.fixture
def memory_app(memory_app: Celery) -> Celery:
    use_own_queue(memory_app)
    return memory_app


def paging(app: Celery, seen: list[tuple[int, int]], pages: int = 4, **options: Any) -> Any:
    """Make a task that counts in its state and replaces itself by its next page.

    :param seen: gets the page and the count of each run.
    """

    def body(self: Any, page: int) -> Any:
        self.state.n += 1
        seen.append((page, self.state.n))
        if page < pages:
            raise self.replace(self.s(page + 1))
        return page

    return task_of(app, body, **options)


def plain_task(app: Celery) -> Any:
    @app.task(name="plain", shared=False)
    def plain(*_: Any) -> str:
        return "plain"

    return plain


def outcomes(app: Celery) -> list[str]:
    return [entry.outcome for entry in decode(row(app).history, "count")]


def test_each_page_starts_where_the_one_before_stopped(app: Celery) -> None:
    """Each page loads the state that the page before saved. The fault was: all four saw n=1."""
    seen: list[tuple[int, int]] = []
    result = paging(app, seen).delay(1)
    deliver_all(app)
    assert seen == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert (row(app).value, outcomes(app)) == ('{"n":4}', ["succeeded"] * 4)
    assert result.get() == 4


@pytest.mark.parametrize("how", ["apply", "always eager"])
def test_pages_that_are_called_eagerly(memory_app: Celery, how: str) -> None:
    """All four pages run. The fault was: a page met its predecessor's lease, and was skipped."""
    seen: list[tuple[int, int]] = []
    task = paging(memory_app, seen)
    memory_app.conf.task_always_eager = how == "always eager"
    result = task.apply((1,)) if how == "apply" else task.delay(1)
    assert result.get() == 4
    assert seen == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert outcomes(memory_app) == ["succeeded"] * 4


def test_copies_of_replaced_messages_are_duplicates(memory_app: Celery) -> None:
    """After each page, the messages of all pages so far are delivered again."""
    seen: list[tuple[int, int]] = []
    result = paging(memory_app, seen).delay(1)
    sent = []
    while messages := received(memory_app):
        sent += messages
        deliver(memory_app, messages[0])
        if len(seen) < 4:
            for each in sent:
                assert deliver(memory_app, each).info.state == "IGNORED"
            assert result.state == "PENDING"
    for each in sent:
        deliver(memory_app, each)
    assert seen == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert result.get() == 4


@pytest.mark.parametrize("made_of", ["one", "chain", "group", "chord"])
@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_a_replacement_that_arrives_before_the_lease_is_free_runs_later(
    memory_app: Celery, monkeypatch: pytest.MonkeyPatch, made_of: str, policy: str
) -> None:
    """1. The body sends the replacement.
    2. Another worker receives it.
    3. The run ends.

    The replacement is neither a conflict nor a duplicate of the running message, though it has the
    same task id. The other worker sends it again.
    """
    ran: list[int] = []
    add = plain_task(memory_app)

    def body(self: Any, *args: Any) -> int:
        step = args[-1]
        self.state.n += 1
        ran.append(step)
        if step == 1:
            made = {
                "one": self.s(2),
                "chain": chain(self.s(2), self.s(3)),
                "group": group(self.s(2), add.s()),
                "chord": chord([self.s(2), add.s()], add.s()),
            }[made_of]
            try:
                self.replace(made)
            finally:
                arrived = received(memory_app)
                early.extend(arrived)
                with ThreadPoolExecutor(1) as another:
                    for each in arrived:
                        another.submit(deliver, memory_app, each).result()
                assert ran == [1]
        return step

    early: list[Any] = []
    task = task_of(memory_app, body, on_conflict=policy)
    memory_app.conf.result_backend = "cache+memory://"
    task.delay(1)
    (message,) = received(memory_app)
    deliver(memory_app, message)
    assert early
    deliver_all(memory_app)
    assert ran[:2] == [1, 2]
    assert row(memory_app).value == f'{{"n":{len(ran)}}}'


def test_with_a_task_id_that_is_used_each_day_all_pages_run_each_day(memory_app: Celery) -> None:
    """The sender gives the same task id each day. All pages of a day have this id.

    The fault was: on the second day page 2 counted as a duplicate of the first day's page 2.
    """
    seen: list[tuple[int, int]] = []
    task = paging(memory_app, seen)
    for _ in range(2):
        result = task.apply_async((1,), task_id="nightly-import")
        deliver_all(memory_app)
        assert result.get() == 4
    assert [page for page, _ in seen] == [1, 2, 3, 4] * 2


def test_a_singleton_that_replaces_another_runs_each_day(memory_app: Celery) -> None:
    """Each day's replacement has the same task id, which is the id of the replaced task."""
    ran: list[str] = []

    def first(self: Any) -> None:
        ran.append("first")
        raise self.replace(other.s())

    def second(self: Any) -> None:
        ran.append("second")

    other = task_of(memory_app, second, name="other")
    task = task_of(memory_app, first)
    for _ in range(2):
        task.apply_async(task_id="nightly-import")
        deliver_all(memory_app)
    assert ran == ["first", "second"] * 2


def test_the_end_of_a_chain_that_is_sent_with_one_id_runs_each_day(memory_app: Celery) -> None:
    """Each day a chain is sent with one task id, which Celery gives to the chain's last message.

    That message runs each day. Its second copy does not run.
    """
    ran: list[str] = []

    def last(self: Any, *_: Any) -> None:
        ran.append("last")

    add, task = plain_task(memory_app), task_of(memory_app, last)
    for _ in range(2):
        chain(add.s(), task.s()).apply_async(task_id="nightly-import")
        (first,) = received(memory_app)
        deliver(memory_app, first)
        (end,) = received(memory_app)
        deliver(memory_app, end)
        deliver(memory_app, end)
    assert ran == ["last"] * 2


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("made_of", ["chain", "chord", "chain that ends with a chord"])
def test_the_last_task_of_a_replacement_runs_each_day(
    memory_app: Celery, monkeypatch: pytest.MonkeyPatch, made_of: str, own: bool
) -> None:
    """A task is replaced by a chain or a chord. The chain's last message, or the chord's body, has
    the replaced task's id. A plain task sends it.
    """
    monkeypatch.setattr(duplicates, "GRACE", 0.0)
    ran: list[str] = []
    add = plain_task(memory_app)

    def last(self: Any, *_: Any) -> None:
        ran.append("last")

    def first(self: Any, *args: Any) -> None:
        if args:
            ran.append("last")
            return
        ran.append("first")
        end = self.s() if own else other.s()
        made = {
            "chain": lambda: chain(add.s(), end),
            "chord": lambda: chord([add.s(), add.s()], end),
            "chain that ends with a chord": lambda: chain(add.s(), chord([add.s(), add.s()], end)),
        }[made_of]
        raise self.replace(made())

    other = task_of(memory_app, last, name="other")
    task = task_of(memory_app, first)
    for _ in range(2):
        task.apply_async(task_id="nightly-import")
        deliver_all(memory_app)
    assert ran == ["first", "last"] * 2


def test_a_task_that_is_replaced_by_another_task_is_done(memory_app: Celery) -> None:
    """A second copy of the task's message does not run the task again."""
    other = plain_task(memory_app)
    ran: list[int] = []

    def body(self: Any) -> None:
        ran.append(1)
        self.state.n += 1
        raise self.replace(other.s())

    result = task_of(memory_app, body).delay()
    (message,) = received(memory_app)
    deliver(memory_app, message)
    deliver(memory_app, message)
    deliver_all(memory_app)
    assert (len(ran), row(memory_app).value, result.get()) == (1, '{"n":1}', "plain")


def test_no_replacement_is_sent_if_the_state_cannot_be_saved(
    memory_app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    task = paging(memory_app, seen)
    task.delay(1)
    (message,) = received(memory_app)

    def fail(*_: Any) -> Any:
        raise StoreUnavailable("on purpose")

    from celery_singleton_state.runtime import runtime_of

    with monkeypatch.context() as patch:
        patch.setattr(runtime_of(memory_app).store, "save", fail)
        assert deliver(memory_app, message).info.state == "RETRY"
    (again,) = received(memory_app)
    assert again.payload[0] == [1]
    deliver(memory_app, again)
    deliver_all(memory_app)
    assert seen == [(1, 1), (1, 1), (2, 2), (3, 3), (4, 4)]


def test_a_body_whose_replacement_cannot_be_sent_fails(
    memory_app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = paging(memory_app, [])
    task.delay(1)
    (message,) = received(memory_app)

    def fail(*_: Any, **__: Any) -> Any:
        raise OperationalError("on purpose")

    monkeypatch.setattr(memory_app, "send_task", fail)
    assert deliver(memory_app, message).info.state == "FAILURE"
    assert outcomes(memory_app) == ["failed"]


def test_a_body_that_raises_ignore_saves_nothing(memory_app: Celery) -> None:
    def body(self: Any) -> None:
        self.state.n += 1
        raise Ignore

    task_of(memory_app, body).delay()
    deliver_all(memory_app)
    assert (row(memory_app).value, outcomes(memory_app)) == ("null", ["skipped"])


def test_a_replaced_run_begins_no_hold_period(memory_app: Celery) -> None:
    """The hold period of ``hold_at_least`` begins when the last replacement succeeds."""
    seen: list[tuple[int, int]] = []
    paging(memory_app, seen, hold_at_least=60).delay(1)
    deliver_all(memory_app)
    assert len(seen) == 4


def test_a_singleton_without_state_is_replaced_too(memory_app: Celery) -> None:
    ran: list[int] = []

    def body(self: Any, step: int) -> None:
        ran.append(step)
        if step < 3:
            raise self.replace(self.s(step + 1))

    task_of(memory_app, body, state_schema=None, deduplicate=True).delay(1)
    deliver_all(memory_app)
    assert (ran, outcomes(memory_app)) == ([1, 2, 3], ["succeeded"] * 3)


def test_a_replacement_within_a_transaction_is_refused(app: Celery) -> None:
    def body(self: Any) -> None:
        with self.transaction():
            raise self.replace(self.s())

    with pytest.raises(RuntimeError, match=r"count: replace\(\) within transaction\(\)"):
        task_of(app, body)()


def test_a_task_that_adds_to_its_chord_saves_its_state(memory_app: Celery) -> None:
    added = plain_task(memory_app)

    def body(self: Any) -> str:
        self.state.n += 1
        signature = self.add_to_chord(added.s(), lazy=True)
        return str(signature.task)

    task = task_of(memory_app, body)
    task.push_request(
        id="1", chord={"task": "x"}, group="g", called_directly=False, args=(), kwargs={}
    )
    try:
        memory_app.backend.add_to_chord = lambda *_: None
        assert task() == "plain"
    finally:
        task.pop_request()
    assert row(memory_app).value == '{"n":1}'


def test_retries_within_pages_each_run_once(memory_app: Celery) -> None:
    """A replacement's retries are counted from 0 again.

    A replacement still counts as later work than the retries of the page before it.
    """
    ran: list[tuple[int, int]] = []

    def body(self: Any, page: int) -> None:
        ran.append((page, self.request.retries))
        self.state.n += 1
        if self.request.retries < 2 - page:
            raise self.retry(countdown=0)
        if page < 2:
            raise self.replace(self.s(page + 1))

    task_of(memory_app, body, state_schema=Counter).delay(0)
    deliver_all(memory_app)
    assert ran == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)]
    assert row(memory_app).value == '{"n":3}'
