"""Runs whose requests to the store are carried out late, or whose answers from it are lost.

The store is a real one. A test replaces one method of the store. The replacement carries a request
out and loses the answer, does not carry it out, or carries it out later.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded
from celery.result import AsyncResult

from celery_singleton_state import (
    HeartbeatFailed,
    LeaderHandoffFailed,
    StateLoadFailed,
    StatePersistFailed,
)
from celery_singleton_state.history import decode
from celery_singleton_state.hooks import Released
from celery_singleton_state.lease.lease import clock
from celery_singleton_state.message.coalesce import PendingRun, send_pending_run
from celery_singleton_state.message.content import Content
from celery_singleton_state.recovery import end_for
from celery_singleton_state.run.current import current_run
from celery_singleton_state.runtime import runtime_of
from celery_singleton_state.store.base import StoreError, StoreMisconfigured, StoreUnavailable
from tests.helpers.messages import deliver, received, use_own_queue
from tests.helpers.runs import idle, make_table, row, task_of, write, written
from tests.helpers.waiting import wait_until

NO_ARGUMENTS = Content("application/json", "utf-8", "[[], {}, {}]")

#: The life of a lease by default, in seconds.
ORDINARY_LIFE = 8.0
#: A life of a lease that is longer than any test takes, in seconds.
LONG_LIFE = 600.0


class Verb:
    """Replaces one method of an app's store by a method whose answers are lost.

    If :attr:`carried_out` is false, the requests without an answer are not carried out either.

    :param times: how many of the first requests get no answer.
    """

    def __init__(
        self, app: Celery, monkeypatch: pytest.MonkeyPatch, name: str, times: int = 1000
    ) -> None:
        self.store = runtime_of(app).store
        self.real: Callable[..., Any] = getattr(self.store, name)
        self.times = times
        self.carried_out = True
        self.error: StoreError = StoreUnavailable("the answer is lost")
        #: The arguments of each request to the method.
        self.requests: list[Any] = []
        monkeypatch.setattr(self.store, name, self._ask)

    def _ask(self, *args: Any, **kwargs: Any) -> Any:
        self.requests.append((args, kwargs))
        if self.times <= 0:
            return self.real(*args, **kwargs)
        self.times -= 1
        if self.carried_out:
            self.real(*args, **kwargs)
        raise self.error

    def arrives_late(self) -> Any:
        """Carry out the first request now, also if it was carried out before."""
        args, kwargs = self.requests[0]
        return self.real(*args, **kwargs)


def increment(self: Any) -> int:
    self.state.n += 1
    return int(self.state.n)


def is_free(app: Celery) -> bool:
    return row(app).holder is None


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("celery_singleton_state.lease.lease.FIRST_PAUSE", 0.001)


def test_a_lease_whose_acquisition_was_never_answered_is_released(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Acquire is carried out twice, and both answers are lost. Only this process can release that
    lease before it expires.
    """
    task = task_of(app, increment, lease_ttl=LONG_LIFE, max_retries=0)
    Verb(app, monkeypatch, "acquire", times=2)
    with pytest.raises(StateLoadFailed):
        task()
    wait_until(lambda: is_free(app), "the process gives the lease back")
    assert task() == 1


def test_a_lease_is_released_as_soon_as_the_store_answers(
    make_app: Callable[..., Celery], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app(singleton_heartbeat_interval=0.1)
    task = task_of(app, increment, lease_ttl=LONG_LIFE, max_retries=0)
    back = Verb(app, monkeypatch, "give_back", times=2)
    back.carried_out = False
    Verb(app, monkeypatch, "acquire", times=2)
    with pytest.raises(StateLoadFailed):
        task()
    wait_until(lambda: is_free(app), "the third request is answered")
    assert len(back.requests) == 3


def test_a_late_acquisition_holds_the_lease_for_the_default_life_at_most(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run has ended. Its request to acquire the lease is carried out once more.

    No run uses that lease. It expires after the default life, although the task has a longer
    ``lease_ttl``.
    """
    task = task_of(app, increment, lease_ttl=LONG_LIFE)
    acquire = Verb(app, monkeypatch, "acquire", times=0)
    assert task() == 1
    assert acquire.arrives_late() is not None
    left = row(app).expires_in
    assert left is not None
    assert left <= ORDINARY_LIFE + 0.01


def test_a_lease_with_a_long_life_is_confirmed_before_the_body(app: Celery) -> None:
    def body(self: Any) -> tuple[float, float]:
        return self.lease_remaining, row(app).expires_in or 0.0

    trusted, left = task_of(app, body, lease_ttl=LONG_LIFE)()
    assert ORDINARY_LIFE < trusted <= 0.9 * LONG_LIFE
    assert ORDINARY_LIFE < left <= LONG_LIFE + 0.01


@pytest.mark.parametrize("carried_out", [True, False])
def test_a_body_does_not_begin_on_an_unconfirmed_lease(
    app: Celery, monkeypatch: pytest.MonkeyPatch, carried_out: bool
) -> None:
    bodies = []

    def body(self: Any) -> None:
        bodies.append(1)

    task = task_of(app, body, lease_ttl=LONG_LIFE, max_retries=0)
    Verb(app, monkeypatch, "renew", times=2).carried_out = carried_out
    with pytest.raises(StateLoadFailed):
        task()
    wait_until(lambda: is_free(app), "the process gives the lease back")
    assert bodies == []
    task()
    assert bodies == [1]


def test_a_lease_that_was_lost_before_it_was_confirmed_is_a_conflict(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. Acquire is answered.
    2. The process is stopped.
    3. The lease is released, and another holder acquires it.
    4. The process goes on, and tries to confirm its lease. The store refuses that.
    """
    task = task_of(app, idle, lease_ttl=LONG_LIFE, on_conflict="raise")
    store = runtime_of(app).store
    renew = store.renew

    def lose_first(leases: Any) -> Any:
        assert end_for(runtime_of(app), row(app), 0, "released by somebody")
        assert store.acquire(row(app).key, "another", 60, "another task")
        return renew(leases)

    monkeypatch.setattr(store, "renew", lose_first)
    with pytest.raises(LeaderHandoffFailed, match="held by another"):
        task()


@pytest.mark.parametrize("on_lease_lost", ["interrupt", "finish"])
def test_a_body_does_not_begin_if_the_lease_was_lost_during_a_result_lookup(
    memory_app: Celery, monkeypatch: pytest.MonkeyPatch, on_lease_lost: str
) -> None:
    """1. A message has a task id that was used before, so the run asks the result backend for an
       old result.
    2. The lease is lost.
    3. The result backend answers.
    4. The run ends, and its body is not called.
    """
    bodies: list[int] = []
    memory_app.conf.singleton_heartbeat_interval = 0.1
    use_own_queue(memory_app)

    def body(self: Any) -> None:
        bodies.append(1)

    def answer_late(task_id: str) -> AsyncResult[Any]:
        run = current_run(memory_app.tasks["count"])
        assert run is not None, "no run renews the lease"
        assert end_for(runtime_of(memory_app), row(memory_app), 0, "released by somebody")
        wait_until(lambda: run.held.lost is not None, "the heartbeat finds the lease lost")
        return AsyncResult(task_id, app=memory_app)

    task = task_of(memory_app, body, retry_reasons=[], on_lease_lost=on_lease_lost)
    task.apply_async(task_id="nightly-import")
    (message,) = received(memory_app)
    with monkeypatch.context() as patch:
        patch.setattr(task, "AsyncResult", answer_late)
        account = deliver(memory_app, message)
    assert bodies == []
    assert account.info.state == "FAILURE"
    assert isinstance(account.info.retval, HeartbeatFailed)


@pytest.mark.parametrize("fails", ["headers", "in the store"])
def test_an_error_between_acquisition_and_run_leaves_nothing_held(
    app: Celery, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    task = task_of(app, increment, lease_ttl=LONG_LIFE)
    if fails == "headers":
        assert task.apply(headers={"singleton_due": "no time"}).state == "FAILURE"
    else:
        with monkeypatch.context() as patch:
            patch.setattr("celery_singleton_state.run.guard.Run", _fail)
            with pytest.raises(ZeroDivisionError):
                task()
    wait_until(lambda: not runtime_of(app).store.list("singleton-state:") or is_free(app), "free")
    assert task() == 1


def _fail(*_: Any) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("text", ["half an emoji: \ud83d", "a NUL: \0"])
def test_an_error_that_cannot_be_encoded_is_recorded(app: Celery, text: str) -> None:
    def body(self: Any) -> None:
        raise ValueError(text)

    with pytest.raises(ValueError, match=text.partition(":")[0]):
        task_of(app, body)()
    found = row(app)
    assert (found.holder, found.last_outcome) == (None, "failed")
    (run,) = decode(found.history, "")
    assert run.error is not None
    assert run.error.startswith(f"ValueError: {text.partition(':')[0]}")


def test_a_late_checkpoint_does_not_undo_a_newer_one(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. Checkpoint 1 stalls.
    2. It is repeated, and saved.
    3. Checkpoint 2 is saved.
    4. The stalled request of checkpoint 1 arrives, and the store refuses it.
    5. The body ends without another change, so its release writes no state.
    """
    save = Verb(app, monkeypatch, "save", times=1)
    save.carried_out = False

    def body(self: Any) -> None:
        for n in (1, 2):
            self.state.n = n
            self.checkpoint()
        assert save.arrives_late() is None

    task_of(app, body)()
    assert row(app).value == '{"n":2}'


def test_a_checkpoint_after_a_failed_checkpoint_is_saved(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Verb(app, monkeypatch, "save", times=3)
    save.carried_out = False

    def body(self: Any) -> None:
        self.state.n = 1
        with pytest.raises(StatePersistFailed):
            self.checkpoint()
        self.state.n = 2
        self.checkpoint()
        assert save.arrives_late() is None

    task_of(app, body)()
    assert row(app).value == '{"n":2}'


@contextmanager
def _commit_that(
    app: Celery, monkeypatch: pytest.MonkeyPatch, is_carried_out: bool, error: Exception
) -> Iterator[None]:
    """Make each COMMIT within the block end with an error, carried out or not.

    :param is_carried_out: whether the database carries the COMMIT out before the error.
    """
    store: Any = runtime_of(app).store
    transaction = store.transaction

    @contextmanager
    def failing() -> Any:
        try:
            with transaction() as opened:
                yield opened
                if not is_carried_out:
                    raise error
        except type(error):
            raise error from None
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(store, "transaction", failing)
        yield


@pytest.mark.parametrize("is_carried_out", [True, False])
@pytest.mark.parametrize("error", [StoreUnavailable("silent"), TimeoutError("a time limit")])
def test_after_a_lost_answer_to_a_commit_the_row_is_read(
    app: Celery, monkeypatch: pytest.MonkeyPatch, is_carried_out: bool, error: Exception
) -> None:
    """The run reads from its row whether COMMIT was carried out.

    So the user's rows, the saved state, and the state in the body's memory agree.
    """
    make_table(app)
    caught: list[BaseException] = []

    def body(self: Any) -> int:
        try:
            with (
                _commit_that(app, monkeypatch, is_carried_out, error),
                self.transaction() as connection,
            ):
                self.state.n = 1
                connection.exec_driver_sql("INSERT INTO written VALUES (1)")
        except Exception as failure:
            caught.append(failure)
        return int(self.state.n)

    n = task_of(app, body)()
    assert n == len(written(app)) == is_carried_out
    assert row(app).value == ('{"n":1}' if is_carried_out else '{"n":0}')
    raised: list[type] = [type(error)] if isinstance(error, TimeoutError) else []
    if not is_carried_out and not raised:
        raised = [StatePersistFailed]
    assert [type(failure) for failure in caught] == raised


def test_a_refused_login_after_a_lost_answer_to_a_commit_is_waited_out(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server restarts. It cuts the connection during COMMIT, and then refuses two logins."""
    make_table(app)
    asked = Verb(app, monkeypatch, "written", times=2)
    asked.error = StoreMisconfigured("password authentication failed")

    def body(self: Any) -> None:
        with (
            _commit_that(app, monkeypatch, True, StoreUnavailable("silent")),
            self.transaction() as connection,
        ):
            self.state.n = 1
            connection.exec_driver_sql("INSERT INTO written VALUES (1)")

    task_of(app, body)()
    assert (written(app), row(app).value) == ([1], '{"n":1}')
    assert len(asked.requests) == 3


@pytest.mark.parametrize("is_carried_out", [True, False])
def test_a_commit_whose_outcome_is_unknown_is_never_overwritten(
    app: Celery, monkeypatch: pytest.MonkeyPatch, is_carried_out: bool
) -> None:
    """1. The answer to COMMIT is lost.
    2. The store does not answer the question whether COMMIT was carried out.
    3. The body goes on, and each further write fails.
    4. The run ends without saving, although ``persist_on_error`` is set.
    """
    make_table(app)
    Verb(app, monkeypatch, "written")

    def insert_line(self: Any) -> None:
        with (
            _commit_that(app, monkeypatch, is_carried_out, StoreUnavailable("silent")),
            self.transaction() as connection,
        ):
            self.state.n = 1
            connection.exec_driver_sql("INSERT INTO written VALUES (1)")

    def body(self: Any) -> None:
        with pytest.raises(StatePersistFailed):
            insert_line(self)
        for save in (self.checkpoint, self.transaction().__enter__):
            with pytest.raises(StatePersistFailed, match="whether a transaction was committed"):
                save()

    task = task_of(app, body, persist_on_error=True, lease_ttl=0.5, max_retries=0)
    with pytest.raises(StatePersistFailed, match="whether a transaction was committed"):
        task()
    assert len(written(app)) == is_carried_out
    assert row(app).value == ('{"n":1}' if is_carried_out else "null")
    assert is_free(app)


def test_a_release_whose_answer_was_lost_is_found_in_the_history(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(app, increment)
    Verb(app, monkeypatch, "release", times=1)
    assert task() == 1


@pytest.mark.parametrize(("others", "is_known"), [(1, True), (2, False), (3, False)])
def test_the_outcome_of_a_release_that_the_history_has_dropped_is_unknown(
    make_app: Callable[..., Celery],
    monkeypatch: pytest.MonkeyPatch,
    others: int,
    is_known: bool,
) -> None:
    """1. A run's release is carried out, but its answer is lost.
    2. Other runs end, perhaps more than the history holds.
    3. The run repeats its release, and the store refuses it.

    If the history lacks the run, the run ends with StatePersistFailed. It does not end as lost,
    because it may have been saved.
    """
    app = make_app(singleton_history=2)
    task = task_of(app, increment, max_retries=0)
    assert task() == 1
    store = runtime_of(app).store
    release = store.release
    attempts = []

    def lose_answer(*arguments: Any) -> Any:
        attempts.append(arguments)
        answer = release(*arguments)
        if len(attempts) == 1:
            for _ in range(others):
                task()
            raise StoreUnavailable("the answer is lost")
        return answer

    monkeypatch.setattr(store, "release", lose_answer)
    if is_known:
        assert task() == 2
    else:
        with pytest.raises(StatePersistFailed, match="whether the run was saved is not known"):
            task()
    assert row(app).value == f'{{"n":{2 + others}}}'


def test_a_run_whose_release_never_arrived_is_lost_although_the_history_is_full(
    make_app: Callable[..., Celery], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. A run's first release is not carried out.
    2. An operator releases the lease, so the history has the operator's entry for the run's fence.
    3. The run repeats its release, and the store refuses it.
    4. The run ends as lost.
    """
    app = make_app(singleton_history=2)
    task = task_of(app, increment, max_retries=0)
    for n in (1, 2, 3):
        assert task() == n
    runtime = runtime_of(app)
    release = runtime.store.release
    attempts = []

    def release_by_hand(*arguments: Any) -> Any:
        attempts.append(arguments)
        if len(attempts) == 1:
            assert end_for(runtime, row(app), 0, "released by an operator")
            raise StoreUnavailable("the request is lost")
        return release(*arguments)

    monkeypatch.setattr(runtime.store, "release", release_by_hand)
    with pytest.raises(HeartbeatFailed):
        task()
    assert row(app).value == '{"n":3}'


def test_a_pending_run_removes_its_own_request_from_the_row(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. A holder sends the pending run's message.
    2. The holder dies before it removes the pending run from the row.
    3. The message is delivered, and its run removes the pending run from the row.
    """
    sent: list[Any] = []

    def body(self: Any) -> None:
        found = row(app)
        pending_run = PendingRun(self.name, self.request.id, NO_ARGUMENTS, {})
        assert runtime_of(app).store.requests.request_run(found, pending_run.encode())

    task = task_of(app, body, on_conflict="coalesce")
    monkeypatch.setattr(app, "send_task", lambda name, *_, **__: sent.append(name))
    task.apply(task_id="the pending run's id").get()
    assert sent == []
    assert row(app).wanted is None


def _interrupted(*_: Any, **__: Any) -> Any:
    raise SoftTimeLimitExceeded


def test_a_time_limit_while_the_state_is_decoded_is_no_decode_error(app: Celery) -> None:
    """A time limit interrupts a migration of the stored value.

    The time limit's error is raised. The value does not count as one that cannot be decoded.
    """
    write(app, '{"n":2}', 1)
    task = task_of(
        app,
        increment,
        state_version=2,
        state_migrations={1: _interrupted},
        on_decode_error="initial",
    )
    with pytest.raises(SoftTimeLimitExceeded):
        task()
    assert (row(app).value, row(app).last_outcome) == ('{"n":2}', "failed")


def test_a_state_whose_roll_back_is_interrupted_is_not_saved(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. The block of ``transaction()`` raises.
    2. Its rows are rolled back.
    3. A time limit interrupts the body while its state is rolled back.
    4. The state is not saved.
    """
    make_table(app)

    def body(self: Any) -> None:
        with self.transaction() as connection:
            self.state.n = 99
            connection.exec_driver_sql("INSERT INTO written VALUES (99)")
            monkeypatch.setattr(type(self._codec), "decode", _interrupted)
            raise ZeroDivisionError

    task = task_of(app, body, persist_on_error=True)
    with pytest.raises(SoftTimeLimitExceeded):
        task()
    assert written(app) == []
    assert row(app).value == "null"


def test_an_interrupted_roll_back_breaks_no_connection(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_table(app)
    dialect = runtime_of(app).sql.engine.dialect

    def body(self: Any) -> None:
        with self.transaction() as connection:
            connection.exec_driver_sql("INSERT INTO written VALUES (1)")
            if patched:
                raise ZeroDivisionError

    task = task_of(app, body)
    patched = True
    for _ in range(4):  # Broken connections would use up the pool.
        with monkeypatch.context() as patch:
            patch.setattr(dialect, "do_rollback", _interrupted)
            with pytest.raises(SoftTimeLimitExceeded):
                task()
    patched = False
    task()
    assert written(app) == [1]


@pytest.mark.parametrize("is_carried_out", [True, False])
def test_a_release_that_a_time_limit_interrupts_is_reported_as_it_ended(
    app: Celery, monkeypatch: pytest.MonkeyPatch, is_carried_out: bool
) -> None:
    emitted: list[Any] = []
    task = task_of(app, increment)
    store = runtime_of(app).store
    release = store.release

    def interrupt(*arguments: Any) -> Any:
        monkeypatch.setattr(store, "release", release)
        if is_carried_out:
            release(*arguments)
        raise SoftTimeLimitExceeded

    monkeypatch.setattr(store, "release", interrupt)
    dispatcher = runtime_of(app).dispatcher
    monkeypatch.setattr(dispatcher, "emit", lambda *of, **fields: emitted.append((of[-1], fields)))
    with pytest.raises(SoftTimeLimitExceeded):
        task()
    (ended,) = [fields for kind, fields in emitted if kind is Released]
    assert (ended["outcome"], ended["given_back"]) == (
        ("succeeded", True) if is_carried_out else ("failed", False)
    )
    wait_until(lambda: is_free(app), "the process gives the lease back")


def test_a_lease_that_no_thread_could_release_is_released_later(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    task = task_of(app, increment, lease_ttl=LONG_LIFE, max_retries=0)
    assert task() == 1
    Verb(app, monkeypatch, "acquire", times=2)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(StateLoadFailed):
            task()
    assert not is_free(app)
    runtime = runtime_of(app)
    runtime.unreleased.add(runtime.store, "another key", "nobody", None)
    wait_until(
        lambda: is_free(app),
        "the thread for the next lease releases this one",
    )


def test_a_pending_run_is_sent_once_although_the_answer_to_a_release_was_lost(
    make_app: Callable[..., Celery], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app(singleton_heartbeat_interval=0.1)
    task_of(app, increment, on_conflict="coalesce")
    sent: list[Any] = []
    monkeypatch.setattr(app, "send_task", lambda *_, **options: sent.append(options["task_id"]))
    runtime = runtime_of(app)
    acquired = runtime.store.acquire("singleton-state:count", "holder", 60, None)
    assert acquired is not None
    pending_run = PendingRun("count", "one more", NO_ARGUMENTS, {})
    assert runtime.store.requests.request_run(row(app), pending_run.encode())
    Verb(app, monkeypatch, "give_back", times=1)
    then = partial(send_pending_run, app, runtime.store, "singleton-state:count")
    runtime.unreleased.add(runtime.store, "singleton-state:count", "holder", None, then)
    wait_until(lambda: sent == ["one more"], "the pending run is sent")
    wait_until(lambda: row(app).wanted is None, "the pending run is removed from the row")


def test_a_run_that_is_interrupted_as_it_begins_is_not_the_current_run(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(app, increment)
    with monkeypatch.context() as patch:
        patch.setattr("celery_singleton_state.run.run.Run._emit_begin", _interrupted)
        with pytest.raises(SoftTimeLimitExceeded):
            task()
    with pytest.raises(RuntimeError, match="only while its body runs"):
        _ = task.fence
    wait_until(lambda: is_free(app), "the process gives the lease back")
    assert task() == 1


def test_a_write_is_tried_for_as_long_as_the_parent_process_renews_the_lease(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. The body keeps the GIL for longer than the lease's life.
    2. The parent process renews the lease meanwhile.
    3. The first request of a checkpoint fails on a dead connection.
    4. The run reads that its lease was renewed, and repeats the request.
    """
    save = Verb(app, monkeypatch, "save", times=1)
    save.carried_out = False

    def body(self: Any) -> None:
        held = self._run_for("").held
        held.trusted_until = 0.0
        held.refresh = lambda: held.renewed(clock())
        self.state.n = 1
        self.checkpoint()

    task_of(app, body)()
    assert row(app).value == '{"n":1}'
    assert len(save.requests) == 2
