"""Task classes of other projects, combined with SingletonTask: the code of both still runs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import pytest
from celery import Celery, Task
from celery.exceptions import ImproperlyConfigured

from celery_singleton_state import LeaderHandoffFailed, SingletonTask, StateLoadFailed
from celery_singleton_state.headers import WAITED
from celery_singleton_state.runtime import runtime_of
from tests.helpers.messages import deliver, deliver_all, received, use_own_queue
from tests.helpers.runs import Counter, row
from tests.helpers.waiting import wait_until

#: How many contexts are open around the calling code.
depth: ContextVar[int] = ContextVar("depth", default=0)
#: An item for each context that a test has opened.
opened: list[str] = []


@pytest.fixture
def app(memory_app: Celery) -> Celery:
    use_own_queue(memory_app)
    opened.clear()
    return memory_app


@contextmanager
def app_context() -> Iterator[None]:
    """Stand in for Flask's application context: it exists within the block only."""
    token = depth.set(depth.get() + 1)
    opened.append("context")
    try:
        yield
    finally:
        depth.reset(token)


class RunTask(Task):  # type: ignore[type-arg]
    """The task class of Flask's documentation: it calls ``run`` within the context."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with app_context():
            return self.run(*args, **kwargs)


class SuperTask(Task):  # type: ignore[type-arg]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with app_context():
            return super().__call__(*args, **kwargs)


class UnboundTask(Task):  # type: ignore[type-arg]
    """A class that calls Celery's ``__call__`` through ``Task``, not through ``super()``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with app_context():
            return Task.__call__(self, *args, **kwargs)


class ThroughClassTask(Task):  # type: ignore[type-arg]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with app_context():
            return type(self).run(self, *args, **kwargs)


class ThreadTask(Task):  # type: ignore[type-arg]
    """A class that runs the body in a new thread, without the caller's context variables."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        def within() -> Any:
            with app_context():
                return self.run(*args, **kwargs)

        with ThreadPoolExecutor(1) as pool:
            return pool.submit(within).result()


class OwnRun(SingletonTask):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with app_context():
            return self.run(*args, **kwargs)


class OwnSuper(SingletonTask):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with app_context():
            return super().__call__(*args, **kwargs)


def before(other: type, *more: type) -> type:
    return type("Mixed", (other, *more, SingletonTask), {})


def behind(other: type, *more: type) -> type:
    return type("Mixed", (SingletonTask, other, *more), {})


class Plain(Task):  # type: ignore[type-arg]
    """A task class without a ``__call__`` of its own."""


BASES = {
    "Flask's before": before(RunTask),
    "Flask's behind": behind(RunTask),
    "super before": before(SuperTask),
    "super behind": behind(SuperTask),
    "Celery's by its class before": before(UnboundTask),
    "Celery's by its class behind": behind(UnboundTask),
    "type(self).run before": before(ThroughClassTask),
    "type(self).run behind": behind(ThroughClassTask),
    "in a thread, before": before(ThreadTask),
    "overridden with run": OwnRun,
    "overridden with super": OwnSuper,
    "derived from Flask's before": type("Deeper", (before(RunTask),), {}),
    "derived from Flask's behind": type("Deeper", (behind(RunTask),), {}),
    "a third class between": before(RunTask, Plain),
    "in a diamond": type("Both", (before(Plain), before(RunTask)), {}),
}


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> type:
    found: type = BASES[request.param]
    return found


@pytest.fixture(params=["Flask's before", "Flask's behind", "overridden with super"])
def some_base(request: pytest.FixtureRequest) -> type:
    """Return a few of BASES, for tests that depend on nothing but the order of the classes."""
    found: type = BASES[request.param]
    return found


class Bodies:
    """A body that records how many bodies run at a time and in which context.

    While the event ``go`` is not set, the first body waits.
    """

    def __init__(self) -> None:
        self.now = self.most = 0
        self.contexts: list[int] = []
        self.go = threading.Event()
        self.go.set()

    def run(self) -> str:
        self.now += 1
        self.most = max(self.most, self.now)
        self.contexts.append(depth.get())
        if self.now == 1:
            self.go.wait(30)
        self.now -= 1
        return "ran"


def made(app: Celery, base: type, bodies: Bodies, **options: Any) -> Any:
    @app.task(base=base, name="count", shared=False, **options)
    def count(*_: Any) -> str:
        return bodies.run()

    return count


def check_guarded(app: Celery, bodies: Bodies, deliveries: list[Callable[[], Any]]) -> None:
    """Check that one of several deliveries runs its body, and that the others are skipped.

    The first delivery's body waits until the others have ended.
    """
    bodies.go.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(deliveries[0])
        wait_until(lambda: bodies.now or first.done(), "the body runs")
        others = [another() for another in deliveries[1:] if bodies.most == 1]
        bodies.go.set()
        assert first.result() == "ran"
    assert others == [None] * (len(deliveries) - 1)
    assert (bodies.most, bodies.contexts) == (1, [1])
    assert (row(app).run_count, row(app).last_outcome, row(app).holder) == (1, "succeeded", None)


@pytest.mark.parametrize("options", [{}, {"autoretry_for": (LookupError,)}], ids=["", "autoretry"])
def test_one_body_runs_at_a_time_and_in_its_context(
    app: Celery, base: type, options: dict[str, Any]
) -> None:
    """Deliver three messages. The fault was: their bodies ran at the same time, without a row."""
    bodies = Bodies()
    task = made(app, base, bodies, **options)
    for _ in range(3):
        task.delay()
    messages = received(app)
    check_guarded(
        app, bodies, [lambda message=each: deliver(app, message).retval for each in messages]
    )


def test_one_direct_call_runs_at_a_time(app: Celery, base: type) -> None:
    bodies = Bodies()
    task = made(app, base, bodies)
    check_guarded(app, bodies, [task] * 2)
    assert opened.count("context") in (1, 2)


def test_the_body_has_its_state_its_request_and_its_task(app: Celery, some_base: type) -> None:
    seen = []

    @app.task(
        bind=True,
        base=some_base,
        name="count",
        shared=False,
        state_schema=Counter,
        unique_on=["what"],
    )
    def count(self: Any, what: str, *, by: int = 1) -> int:
        self.state.n += by
        seen.append((self is app.tasks["count"], self.name))
        return int(self.state.n)

    count.delay("a")
    count.delay(what="a", by=2)
    assert [each.retval for each in deliver_all(app)] == [1, 3]
    assert [count.apply(("a",)).get(), count("a")] == [4, 5]
    assert seen == [(True, "count")] * 4
    assert row(app, 'count{"what":"a"}').value == '{"n":5}'


def test_a_registered_task_class_is_guarded(app: Celery, some_base: type) -> None:
    bodies = Bodies()

    class Count(some_base):  # type: ignore[misc,valid-type]
        name = "count"
        autoretry_for = (LookupError,)

        def run(self) -> str:
            return bodies.run()

    task: Any = app.register_task(Count())
    task.delay()
    task.delay()
    messages = received(app)
    check_guarded(
        app, bodies, [lambda message=each: deliver(app, message).retval for each in messages]
    )


def test_run_itself_stays_the_users_function(app: Celery, some_base: type) -> None:
    """A user's test, or the body, may call ``task.run()``: it needs no lease and no context."""
    bodies = Bodies()
    task = made(app, some_base, bodies)
    assert task.run(1, 2) == "ran"
    assert bodies.contexts == [0]
    assert runtime_of(app).store.peek("singleton-state:count") is None


def test_a_body_that_calls_its_task_meets_its_own_lease(app: Celery, some_base: type) -> None:
    @app.task(bind=True, base=some_base, name="count", on_conflict="raise", shared=False)
    def count(self: Any, again: bool = True) -> str:
        if again:
            with pytest.raises(LeaderHandoffFailed, match="held by"):
                self(False)
            assert self.run(False) == "ran"
        return "ran"

    count.delay()
    assert [each.retval for each in deliver_all(app)] == ["ran"]
    assert count() == "ran"


def test_autoretry_retries_errors_of_the_body_and_not_of_the_guard(
    app: Celery, some_base: type
) -> None:
    """Whatever the order of the classes, the guard is around Celery's wrapper for
    ``autoretry_for``.

    So this wrapper sees the errors of the body only.
    """
    bodies: list[int] = []

    @app.task(
        bind=True,
        base=some_base,
        name="count",
        shared=False,
        autoretry_for=(Exception,),
        default_retry_delay=0,
        on_conflict="raise",
    )
    def count(self: Any) -> str:
        bodies.append(self.request.retries)
        if not self.request.retries:
            raise LookupError("on purpose")
        return "ran"

    count.delay()
    accounts = deliver_all(app)
    assert [each.info and each.info.state for each in accounts] == ["RETRY", None]
    assert bodies == [0, 1]
    store = runtime_of(app).store
    assert store.acquire("singleton-state:count", "another", 60, None) is not None
    count.delay()
    (refused,) = deliver_all(app)
    assert isinstance(refused.info.retval, LeaderHandoffFailed)


@pytest.mark.parametrize(
    "base", [SingletonTask, type("Own", (SingletonTask,), {})], ids=["ours", "derived"]
)
@pytest.mark.parametrize("own", [RunTask, SuperTask])
@pytest.mark.parametrize("how", ["task_cls", "app.Task"])
def test_the_apps_own_task_class_is_kept(
    app: Celery, own: type, base: type[SingletonTask], how: str
) -> None:
    """The task has the app's own class as well as the singleton's, so it has the app's context.

    In Celery, ``base=`` replaces the app's class.
    """
    if how == "task_cls":
        app.task_cls = own
    else:
        app.Task = own
    bodies = Bodies()
    task = made(app, base, bodies)
    assert isinstance(task._get_current_object(), own)
    for _ in range(2):
        task.delay()
    messages = received(app)
    check_guarded(
        app, bodies, [lambda message=each: deliver(app, message).retval for each in messages]
    )


def test_the_apps_own_task_class_can_be_a_singleton_class(app: Celery) -> None:
    app.task_cls = before(RunTask)
    bodies = Bodies()
    assert made(app, SingletonTask, bodies)() == "ran"
    assert bodies.contexts == [1]


def test_a_base_that_cannot_be_combined_with_the_apps_own_is_refused(app: Celery) -> None:
    app.task_cls = before(RunTask)

    def body() -> None:
        """Do nothing, because nothing calls it."""

    make: Any = app.task(base=behind(RunTask), name="shop.sync", shared=False, lazy=False)
    with pytest.raises(ImproperlyConfigured, match=r"task shop\.sync: .* do not go together"):
        make(body)


def test_the_apps_own_class_is_not_added_twice(app: Celery) -> None:
    app.task_cls = RunTask
    bodies = Bodies()
    assert made(app, behind(RunTask), bodies)() == "ran"
    assert bodies.contexts == [1]


class TenantTask(Task):  # type: ignore[type-arg]
    """A class whose ``__call__`` removes an argument that the body does not take."""

    def __call__(self, tenant: str, *args: Any, **kwargs: Any) -> Any:
        with app_context():
            return super().__call__(*args, **kwargs)


@pytest.mark.parametrize("base", [before(TenantTask)])
def test_the_key_is_made_of_the_arguments_that_reach_the_guard(app: Celery, base: type) -> None:
    @app.task(base=base, name="count", shared=False, unique_on=["what"], typing=False)
    def count(what: str) -> str:
        return what

    count.delay("acme", "a")
    assert [each.retval for each in deliver_all(app)] == ["a"]
    assert row(app, 'count{"what":"a"}').run_count == 1


def test_unique_on_can_choose_an_argument_that_a_base_removes(app: Celery) -> None:
    @app.task(
        base=behind(TenantTask),
        name="count",
        shared=False,
        unique_on=lambda tenant, *_: tenant,
        typing=False,
    )
    def count(what: str) -> str:
        return what

    count.delay("acme", "a")
    assert [each.retval for each in deliver_all(app)] == ["a"]
    assert row(app, 'count"acme"').run_count == 1


@pytest.mark.parametrize("unique_on", [None, ["what"]])
def test_enqueue_once_with_an_argument_that_a_base_removes(app: Celery, unique_on: Any) -> None:
    """The message was queued under a key that its run does not have.

    After the run, the message no longer counts as queued.
    """

    @app.task(
        base=before(TenantTask),
        name="count",
        shared=False,
        unique_on=unique_on,
        typing=False,
        enqueue_once=True,
    )
    def count(what: str = "", *_: Any) -> str:
        return what

    first = count.delay("acme", "a")
    deliver_all(app)
    assert count.delay("acme", "a").id != first.id
    assert len(received(app)) == 1


@pytest.mark.parametrize("ends", ["it runs", "it has waited for too long"])
def test_a_waiting_message_of_enqueue_once_with_a_removed_argument(app: Celery, ends: str) -> None:
    """The message counts as queued under the key of the arguments with which it was sent.

    It no longer counts when it acquires the lease, or fails because it has waited too long.
    """
    queued: list[str | None] = []

    @app.task(
        base=before(TenantTask),
        name="count",
        shared=False,
        unique_on=["what"],
        typing=False,
        enqueue_once=True,
        on_conflict="wait",
    )
    def count(what: str = "", *_: Any) -> str:
        queued.append(row(app, 'count{"what":"acme"}').queued_task_id)
        return what

    store, key = runtime_of(app).store, 'singleton-state:count{"what":"a"}'
    assert store.acquire(key, "another", 60, None)
    first = count.delay("acme", "a")
    (message,) = received(app)
    deliver(app, message)
    (again,) = received(app)
    assert count.delay("acme", "a").id == first.id
    assert received(app) == []
    if ends == "it runs":
        store.give_back(key, "another")
        assert deliver(app, again).retval == "a"
        assert queued == [None]
    else:
        again.headers[WAITED] = 600
        assert deliver(app, again).info.state == "FAILURE"
    assert row(app, 'count{"what":"acme"}').queued_task_id is None
    assert count.delay("acme", "a").id != first.id


def test_a_message_is_sent_again_without_the_classes_own_apply_async(
    app: Celery,
) -> None:
    """The class's ``apply_async`` adds an argument when the message is sent for the first time.

    A second call would add this argument once more.
    """

    class Adding(Task):  # type: ignore[type-arg]
        def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
            return super().apply_async(("acme", *(args or ())), kwargs, **options)

        def __call__(self, tenant: str, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    @app.task(base=before(Adding), name="count", shared=False, on_conflict="wait", typing=False)
    def count(what: str) -> str:
        return what

    store = runtime_of(app).store
    held = store.acquire("singleton-state:count", "another", 60, None)
    assert held is not None
    count.delay("a")
    (message,) = received(app)
    deliver(app, message)
    (again,) = received(app)
    assert again.payload[0] == ["acme", "a"]
    store.give_back("singleton-state:count", "another")
    assert deliver(app, again).retval == "a"


class Narrow(Task):  # type: ignore[type-arg]
    """A class that records the calls of its methods, which take only what Celery passes."""

    seen: list[str] = []  # noqa: RUF012

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        self.seen.append(f"apply_async {sorted(options)}")
        return super().apply_async(args, kwargs, **options)

    def delay(self, *args: Any, **kwargs: Any) -> Any:
        self.seen.append("delay")
        return super().delay(*args, **kwargs)

    def retry(self, *args: Any, **options: Any) -> Any:
        self.seen.append("retry")
        return super().retry(*args, **options)

    def on_success(self, *args: Any) -> None:
        self.seen.append("on_success")

    def on_failure(self, *args: Any) -> None:
        self.seen.append("on_failure")

    def on_retry(self, *args: Any) -> None:
        self.seen.append("on_retry")

    def before_start(self, *args: Any) -> None:
        self.seen.append("before_start")

    def after_return(self, *args: Any) -> None:
        self.seen.append("after_return")

    def on_replace(self, sig: Any) -> Any:
        self.seen.append("on_replace")
        return super().on_replace(sig)

    @classmethod
    def on_bound(cls, app: Celery) -> None:
        cls.seen.append("on_bound")

    @classmethod
    def bind(cls, app: Celery) -> Any:
        cls.seen.append("bind")
        return super().bind(app)

    def __init__(self) -> None:
        self.seen.append("__init__")


@pytest.mark.parametrize("mix", [before, behind])
@pytest.mark.parametrize("options", [{}, {"enqueue_once": True}], ids=["", "enqueue_once"])
def test_other_methods_of_a_class_are_called(
    app: Celery, mix: Callable[[type], type], options: dict[str, Any]
) -> None:
    Narrow.seen.clear()

    @app.task(bind=True, base=mix(Narrow), name="count", shared=False, **options)
    def count(self: Any, what: str = "") -> None:
        if self.request.retries == 0:
            raise self.retry(countdown=0)
        if self.request.replaced_task_nesting == 0:
            raise self.replace(self.s("fail"))
        if what == "fail":
            raise LookupError

    count.delay()
    deliver_all(app)
    assert {each.split()[0] for each in Narrow.seen} == {
        "__init__",
        "after_return",
        "apply_async",
        "before_start",
        "bind",
        "delay",
        "on_bound",
        "on_failure",
        "on_replace",
        "on_retry",
        "retry",
    }


class Headstrong(Task):  # type: ignore[type-arg]
    """A class whose methods call Celery's methods directly, past those of SingletonTask."""

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        return self.app.send_task(self.name, args, kwargs, **options)

    def retry(self, *args: Any, **options: Any) -> Any:
        return Task.retry(self, *args, **options)


@pytest.mark.parametrize("mix", [before, behind])
def test_a_class_that_bypasses_our_methods_is_still_guarded(
    app: Celery, mix: Callable[[type], type]
) -> None:
    bodies = Bodies()
    task = made(app, mix(Headstrong), bodies)
    for _ in range(2):
        task.delay()
    messages = received(app)
    bodies.go.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(deliver, app, messages[0])
        wait_until(lambda: bodies.now, "the body runs")
        assert deliver(app, messages[1]).retval is None
        bodies.go.set()
        assert first.result().retval == "ran"
    assert bodies.most == 1


@pytest.mark.parametrize("mix", [before, behind])
def test_a_retry_that_bypasses_our_method_runs(app: Celery, mix: Callable[[type], type]) -> None:
    """The body asks for a retry with ``throw=False``, and its run succeeds.

    The retry runs: it is not refused as a duplicate of that run.
    """
    ran = []

    class Retries(Task):  # type: ignore[type-arg]
        def retry(self, *args: Any, **options: Any) -> Any:
            return Task.retry(self, *args, **options)

    @app.task(bind=True, base=mix(Retries), name="count", shared=False, state_schema=Counter)
    def count(self: Any) -> None:
        ran.append(self.request.retries)
        if self.request.retries == 0:
            self.retry(countdown=0, throw=False)

    count.delay()
    deliver_all(app)
    assert ran == [0, 1]


def test_an_error_of_the_store_is_retried_through_another_class(
    app: Celery, some_base: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = Bodies()
    task = made(app, some_base, bodies)
    task.delay()
    (message,) = received(app)

    def fail(*_: Any, **__: Any) -> Any:
        raise StateLoadFailed("count", "on purpose")

    with monkeypatch.context() as patch:
        patch.setattr("celery_singleton_state.task.deliver", fail)
        account = deliver(app, message)
    assert account.info.state == "RETRY"
    assert bodies.contexts == []


# -- classes that cannot be guarded


class AsyncTask(Task):  # type: ignore[type-arg]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return asyncio.run(self.run(*args, **kwargs))


def test_an_asynchronous_body_that_would_run_after_the_guard_is_refused(app: Celery) -> None:
    class Awaits(SingletonTask):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return asyncio.run(super().__call__(*args, **kwargs))

    async def body() -> str:
        return "ran"

    make: Any = app.task(base=before(AsyncTask), name="shop.sync", shared=False, lazy=False)
    with pytest.raises(
        ImproperlyConfigured, match=r"task shop\.sync: .*AsyncTask.*\(SingletonTask, AsyncTask\)"
    ):
        make(body)
    make = app.task(base=Awaits, name="shop.awaits", shared=False, lazy=False)
    with pytest.raises(ImproperlyConfigured, match=r"task shop\.awaits: .*Awaits.*comes after"):
        make(body)


def test_an_asynchronous_body_runs_guarded_if_our_class_is_first(app: Celery) -> None:
    held = []

    @app.task(bind=True, base=behind(AsyncTask), name="count", shared=False)
    async def count(self: Any) -> str:
        held.append(row(app).holder)
        return "ran"

    count.delay()
    assert [each.retval for each in deliver_all(app)] == ["ran"]
    assert held != [None]


def test_a_class_whose_call_does_the_work_itself_is_refused(app: Celery) -> None:
    class Works(SingletonTask):
        name = "shop.works"

        def __call__(self) -> str:
            return "work"

    with pytest.raises(
        ImproperlyConfigured, match=r"task shop\.works: Works\.__call__ .*name .*run"
    ):
        app.register_task(Works())


def test_a_call_that_bypasses_the_guard_is_logged_once(
    app: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    """A ``__call__`` may decide not to run the body, or run it in a way that the guard cannot see.

    So the call is not refused. A warning says once that it reached no guard.
    """

    class Hidden(SingletonTask):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.__wrapped__(*args, **kwargs)

    @app.task(base=Hidden, name="shop.hidden", shared=False)
    def hidden() -> str:
        return "ran"

    for _ in range(2):
        assert hidden() == "ran"
    assert caplog.text.count("task shop.hidden: the __call__ of its class ended without") == 1
