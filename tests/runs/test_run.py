"""What a body can do in its run: state, checkpoints, transactions and hooks, on every store."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import Ignore

from celery_singleton_state import (
    HeartbeatFailed,
    KeyValueStore,
    LeaderHandoffFailed,
    SchemaDecodeFailed,
    SingletonTask,
)
from celery_singleton_state.history import decode
from celery_singleton_state.lease.heartbeat import Heartbeat
from celery_singleton_state.runtime import runtime_of
from celery_singleton_state.store.base import NewValue, Write
from tests.helpers.fences import are_growing
from tests.helpers.runs import Counter, idle, make_table, row, task_of, write, written
from tests.helpers.waiting import wait_until


def test_each_run_starts_where_the_last_one_stopped(app: Celery) -> None:
    def body(self: Any) -> int:
        self.state.n += 1
        return self.state.n  # type: ignore[no-any-return]

    task = task_of(app, body)
    assert [task(), task(), task.apply().get()] == [1, 2, 3]
    assert (row(app).value, row(app).run_count, row(app).holder) == ('{"n":3}', 3, None)


def test_the_state_can_be_assigned(app: Celery) -> None:
    def body(self: Any) -> None:
        self.state = Counter(self.state.n + 5)

    task = task_of(app, body)
    task()
    task()
    assert row(app).value == '{"n":10}'


def test_a_singleton_without_state(app: Celery) -> None:
    seen = []

    def body(self: Any) -> str:
        seen.append(self.fence)
        return "done"

    task = task_of(app, body, state_schema=None)
    assert [task(), task()] == ["done", "done"]
    assert are_growing(seen, 2)
    assert row(app).value == "null"


@pytest.mark.parametrize("what", ["state", "checkpoint", "transaction"])
def test_methods_that_need_a_state_say_so(app: Celery, what: str) -> None:
    def body(self: Any) -> None:
        found = getattr(self, what)
        with found():
            pass

    with pytest.raises(RuntimeError, match=r"count: .* needs a state_schema"):
        task_of(app, body, state_schema=None)()


@pytest.mark.parametrize("what", ["state", "fence", "lease_remaining"])
def test_outside_a_run_its_attributes_raise_an_error(app: Celery, what: str) -> None:
    task = task_of(app, idle)
    with pytest.raises(
        RuntimeError, match=f"task count: {what} is available only while its body runs"
    ):
        getattr(task, what)


def test_a_run_knows_how_long_its_lease_remains(app: Celery) -> None:
    def body(self: Any) -> float:
        return self.lease_remaining  # type: ignore[no-any-return]

    assert 0 < task_of(app, body, lease_ttl=60)() <= 60


def test_a_body_that_raises_saves_nothing_but_its_checkpoints(app: Celery) -> None:
    def body(self: Any) -> None:
        self.state.n = 1
        self.checkpoint()
        self.state.n = 2
        raise LookupError("on purpose")

    with pytest.raises(LookupError):
        task_of(app, body)()
    assert (row(app).value, row(app).holder, row(app).last_outcome) == ('{"n":1}', None, "failed")
    assert decode(row(app).history, "count")[-1].error == "LookupError: on purpose"


def test_persist_on_error_saves(app: Celery) -> None:
    def body(self: Any) -> None:
        self.state.n = 2
        raise LookupError

    with pytest.raises(LookupError):
        task_of(app, body, persist_on_error=True)()
    assert (row(app).value, row(app).last_outcome) == ('{"n":2}', "failed")


def test_persist_on_error_keeps_the_error_of_a_body_whose_state_does_not_fit(app: Celery) -> None:
    def body(self: Any) -> None:
        self.state.n = "many"
        raise LookupError

    with pytest.raises(LookupError):
        task_of(app, body, persist_on_error=True)()
    assert (row(app).value, row(app).holder) == ("null", None)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_a_run_whose_body_ends_the_process_is_released(app: Celery, error: BaseException) -> None:
    def body(self: Any) -> None:
        raise error

    with pytest.raises(type(error)):
        task_of(app, body)()
    assert row(app).holder is None


def test_a_state_that_does_not_fit_is_not_saved(app: Celery) -> None:
    def body(self: Any) -> None:
        self.state.n = "many"

    write(app, '{"n":1}')
    with pytest.raises(SchemaDecodeFailed, match="count: the state does not fit Counter"):
        task_of(app, body)()
    assert (row(app).value, row(app).holder) == ('{"n":1}', None)


def test_unchanged_state_is_not_written_again(app: Celery) -> None:
    task = task_of(app, idle)
    task()
    before = row(app)
    task()
    after = row(app)
    assert before.value == '{"n":0}'
    assert after.updated_at == before.updated_at
    assert after.run_count == 2


@pytest.mark.parametrize(
    ("value", "version"), [("{broken", 1), ('{"n":"x"}', 1), ('{"n":1}', 9), ("", 1)]
)
def test_a_value_that_cannot_be_decoded_is_not_overwritten(
    app: Celery, value: str, version: int
) -> None:
    write(app, value, version)
    with pytest.raises(SchemaDecodeFailed):
        task_of(app, idle)()
    found = row(app)
    assert (found.value, found.schema_version, found.holder) == (value, version, None)
    assert found.last_outcome == "failed"


def test_on_decode_error_initial_keeps_the_old_value(app: Celery) -> None:
    def body(self: Any) -> int:
        self.state.n += 1
        return self.state.n  # type: ignore[no-any-return]

    write(app, "{broken")
    task = task_of(app, body, on_decode_error="initial")
    assert [task(), task()] == [1, 2]
    kept = KeyValueStore.from_app(app).prefix("quarantine:")
    assert kept.size() == 1
    assert [found.key for found in runtime_of(app).store.list("")] == ["singleton-state:count"]


def test_a_migrated_value_is_stored_by_the_next_save(app: Celery) -> None:
    write(app, '{"old":4}', 1)

    def body(self: Any) -> int:
        return self.state.n  # type: ignore[no-any-return]

    task = task_of(
        app, body, state_version=2, state_migrations={1: lambda value: {"n": value["old"]}}
    )
    assert task() == 4
    assert (row(app).value, row(app).schema_version) == ('{"n":4}', 2)


def test_a_large_state(app: Celery) -> None:
    @dataclass
    class Large:
        text: str = ""

    def body(self: Any) -> int:
        found = len(self.state.text)
        self.state.text = "ä\0" * 2_500_000
        return found

    task = task_of(app, body, state_schema=Large)
    assert [task(), task()] == [0, 5_000_000]


def test_unique_on_makes_singletons_with_states_of_their_own(app: Celery) -> None:
    def body(self: Any, tenant: str, by: int = 1) -> int:
        self.state.n += by
        return self.state.n  # type: ignore[no-any-return]

    task = task_of(app, body, unique_on=["tenant"])
    assert [task("a"), task(tenant="a", by=2), task("b")] == [1, 3, 1]


def test_a_singleton_that_calls_itself_meets_its_own_lease(app: Celery) -> None:
    def body(self: Any, again: bool = True) -> Any:
        if again:
            with pytest.raises(LeaderHandoffFailed, match="held by"):
                self(False)
        return "ran"

    assert task_of(app, body, on_conflict="raise")() == "ran"


def test_a_singleton_within_another(app: Celery) -> None:
    def inner_body(self: Any) -> int:
        self.state.n += 10
        return self.state.n  # type: ignore[no-any-return]

    inner = task_of(app, inner_body, name="inner")

    def outer_body(self: Any) -> Any:
        self.state.n += 1
        found = inner()
        return self.state.n, found

    assert task_of(app, outer_body, name="outer")() == (1, 10)
    assert (row(app, "inner").value, row(app, "outer").value) == ('{"n":10}', '{"n":1}')


def test_a_singleton_error_of_another_task_is_an_ordinary_error(app: Celery) -> None:
    def body(self: Any) -> None:
        raise HeartbeatFailed("elsewhere", "")

    task = task_of(app, body)
    for _ in range(2):
        with pytest.raises(HeartbeatFailed):
            task()
    assert (row(app).holder, row(app).run_count) == (None, 2)


def test_a_direct_call_keeps_the_callers_request(app: Celery) -> None:
    seen = []

    def body(self: Any, again: bool = True) -> None:
        seen.append(self.request.id)
        if again:
            self(False)
            seen.append(self.request.id)

    task_of(app, body, unique_on="*").apply(task_id="outer").get()
    assert seen == ["outer", None, "outer"]


def test_each_on_become_leader_is_followed_by_one_on_lose_leadership(app: Celery) -> None:
    seen: list[str] = []

    class Base(SingletonTask[Counter]):
        abstract = True

        def on_become_leader(self) -> None:
            seen.append(f"become {self.state.n}")

        def on_lose_leadership(self) -> None:
            seen.append("lose")
            raise LookupError("is only logged")

    def body(self: Any, error: BaseException | None = None) -> None:
        if error is not None:
            raise error

    task = task_of(app, body, base=Base)
    task()
    for error in (LookupError(), Ignore(), SystemExit()):
        with pytest.raises(type(error)):
            task(error)
    assert seen == ["become 0", "lose"] * 4


def test_an_on_become_leader_that_fails_fails_the_run(app: Celery) -> None:
    class Base(SingletonTask[Counter]):
        abstract = True

        def on_become_leader(self) -> None:
            raise LookupError

    with pytest.raises(LookupError):
        task_of(app, idle, base=Base)()
    assert row(app).last_outcome == "failed"


def test_two_messages_with_one_task_id_run_once(app: Celery) -> None:
    def body(self: Any) -> int:
        self.state.n += 1
        return self.state.n  # type: ignore[no-any-return]

    task = task_of(app, body)
    results = [task.apply(task_id="the-same").result for _ in range(2)]
    assert (results[0], row(app).value) == (1, '{"n":1}')
    assert [run.outcome for run in decode(row(app).history, "")] == ["succeeded", "duplicate"]


def test_a_redelivered_message_and_the_retry_of_its_dead_run_run_once(app: Celery) -> None:
    """1. A run asks for a retry.
    2. Its worker dies before it acknowledges the run's message.
    3. The broker redelivers that message, and it succeeds.
    4. The retry is delivered, and is a duplicate.
    """

    def body(self: Any) -> int:
        self.state.n += 1
        return self.state.n  # type: ignore[no-any-return]

    task = task_of(app, body)
    assert [task.apply(task_id="the-same", retries=n).result for n in (0, 1, 2)] == [1, None, None]
    assert row(app).value == '{"n":1}'


def test_without_deduplication_a_message_with_the_same_id_runs_again(app: Celery) -> None:
    def body(self: Any) -> int:
        self.state.n += 1
        return self.state.n  # type: ignore[no-any-return]

    task = task_of(app, body, deduplicate=False)
    assert [task.apply(task_id="the-same").result for _ in range(2)] == [1, 2]


def test_the_history_keeps_the_last_runs(make_app: Callable[..., Celery]) -> None:
    app = make_app(singleton_history=3)
    task = task_of(app, idle)
    for _ in range(5):
        task()
    entries = decode(row(app).history, "")
    assert are_growing((run.fence for run in entries), 3)
    assert all(run.started <= run.finished for run in entries)


def take_over(app: Celery, task: Any) -> None:
    """Wait until a run's lease has expired, then acquire it for a successor, which saves a state.

    A run's body calls this function. The run's heartbeat must not renew the lease meanwhile.
    """
    store = runtime_of(app).store
    key = f"singleton-state:{task.name}"
    wait_until(lambda: not getattr(store.peek(key), "held", True), "the lease expires")
    acquired = store.acquire(key, "successor", 60, None)
    assert acquired is not None
    assert store.save(acquired.lease, Write(1, acquired.write, NewValue('{"n":100}', 1)))


@pytest.mark.parametrize("how", ["at the end", "checkpoint", "transaction"])
def test_a_run_with_a_successor_writes_nothing(
    app: Celery, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """1. The run's lease is not renewed.
    2. It expires.
    3. A successor acquires it and saves.
    4. The run writes, and the store refuses that.
    """
    monkeypatch.setattr(Heartbeat, "hold", lambda self, held: None)

    def body(self: Any) -> None:
        take_over(app, self)
        self.state.n += 1
        if how == "checkpoint":
            self.checkpoint()
        if how == "transaction":
            with self.transaction() as connection:
                connection.exec_driver_sql("INSERT INTO written VALUES (1)")

    make_table(app)
    with pytest.raises(HeartbeatFailed, match=r"count: the lease with fence \d+ is lost"):
        task_of(app, body, lease_ttl=1)()
    assert (row(app).value, row(app).holder) == ('{"n":100}', "successor")
    assert written(app) == []


def test_a_lost_run_has_no_lease_remaining(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store refuses a renewal. Then ``lease_remaining`` is 0, and a checkpoint fails."""

    def body(self: Any) -> None:
        store = runtime_of(app).store
        monkeypatch.setattr(store, "renew", lambda leases: set())
        wait_until(lambda: not self.lease_remaining, "the run learns that it is lost")
        self.checkpoint()

    with pytest.raises(HeartbeatFailed, match="its renewal was refused"):
        task_of(app, body, lease_ttl=1)()


def test_a_transaction_commits_rows_and_state_together(app: Celery) -> None:
    def body(self: Any, fail: bool) -> None:
        with self.transaction() as connection:
            connection.exec_driver_sql(f"INSERT INTO written VALUES ({self.state.n})")
            self.state.n += 1
            if fail:
                raise LookupError
        with self.transaction() as connection:
            connection.exec_driver_sql(f"INSERT INTO written VALUES ({self.state.n})")
            self.state.n += 1

    make_table(app)
    task = task_of(app, body)
    with pytest.raises(LookupError):
        task(True)
    task(False)
    assert written(app) == [0, 1]
    assert row(app).value == '{"n":2}'


def test_a_body_that_goes_on_after_a_rollback_has_the_state_from_before(app: Celery) -> None:
    """A rollback restores the state in memory, too.

    Otherwise the run would save a position after rows that were rolled back, and the next run would
    skip these rows.
    """

    def body(self: Any) -> int:
        self.state.n = 1
        try:
            with self.transaction():
                self.state.n += 200
                raise LookupError
        except LookupError:
            pass
        return self.state.n  # type: ignore[no-any-return]

    assert task_of(app, body)() == 1
    assert row(app).value == '{"n":1}'


def test_transactions_do_not_nest(app: Celery) -> None:
    def body(self: Any, inner: str) -> None:
        with self.transaction():
            if inner == "transaction":
                with self.transaction():
                    pass
            self.checkpoint()

    task = task_of(app, body)
    for inner in ("transaction", "checkpoint"):
        with pytest.raises(RuntimeError, match=r"within transaction\(\)"):
            task(inner)


def test_a_block_that_ends_the_transaction_itself_is_refused(app: Celery) -> None:
    def body(self: Any) -> None:
        with self.transaction() as connection:
            connection.commit()

    with pytest.raises(RuntimeError, match="ended the transaction itself"):
        task_of(app, body)()


def test_the_users_own_errors_pass_through_a_transaction(app: Celery) -> None:
    from sqlalchemy.exc import DBAPIError

    def body(self: Any) -> None:
        with self.transaction() as connection:
            connection.exec_driver_sql("SELECT nonsense")

    with pytest.raises(DBAPIError):
        task_of(app, body)()
    assert row(app).holder is None


def test_a_block_that_catches_the_error_of_its_own_statement(app: Celery) -> None:
    """After a failed statement, PostgreSQL commits nothing of the transaction, unless the statement
    was in a savepoint. The other databases commit the rest.
    """
    from sqlalchemy.exc import DBAPIError

    make_table(app)
    ran: list[bool] = []

    def body(self: Any, in_savepoint: bool) -> None:
        ran.append(in_savepoint)
        with self.transaction() as connection:
            connection.exec_driver_sql("INSERT INTO written VALUES (1)")
            self.state.n += 1
            savepoint = connection.begin_nested() if in_savepoint else nullcontext()
            with suppress(DBAPIError), savepoint:
                connection.exec_driver_sql("SELECT nonsense")

    task = task_of(app, body)
    if runtime_of(app).sql.engine.dialect.name != "postgresql":
        assert task.apply((False,)).successful()
        assert (written(app), row(app).value) == ([1], '{"n":1}')
        return
    result = task.apply((False,))
    assert isinstance(result.result, RuntimeError)
    assert "a statement in the block of transaction() failed" in str(result.result)
    assert (written(app), row(app).value, row(app).holder) == ([], "null", None)
    assert task.apply((True,)).successful()
    assert (written(app), row(app).value, ran) == ([1], '{"n":1}', [False, True])


def _checkpoint(task: Any) -> None:
    task.checkpoint()


def _transaction(task: Any) -> None:
    with task.transaction():
        pass


def _fail_body(_: Any) -> None:
    raise ValueError("the body's own")


def _retry(task: Any) -> None:
    raise task.retry(countdown=60)


def _misfit(task: Any) -> None:
    task.state = "no Count"


@pytest.mark.parametrize("call", ["direct", "eager"])
@pytest.mark.parametrize("does", [None, _checkpoint, _transaction, _fail_body, _retry, _misfit])
def test_the_memory_of_an_ended_run_and_its_state_is_freed_at_once(
    app: Celery, monkeypatch: pytest.MonkeyPatch, does: Callable[[Any], None] | None, call: str
) -> None:
    """The memory is freed without the garbage collector, which can run late if states are large.

    It is freed although the caller keeps the run's error, which refers to the frames it passed.
    """
    states: list[weakref.ref[Any]] = []
    acts = False

    def body(self: Any) -> None:
        states.append(weakref.ref(self.state))
        if acts and does is not None:
            does(self)

    task = task_of(app, body)
    monkeypatch.setattr(task, "apply_async", lambda *_, **__: None)
    task()
    acts = True
    gc.collect()
    gc.disable()
    kept = None
    try:
        kept = task.apply() if call == "eager" else task()
    except Exception as error:
        kept = error
    finally:
        gc.enable()
    assert len(states) > 1  # More than two if eager retries ran, too.
    assert not any(state() for state in states)
    del kept
