"""Messages in projects with a tracing tool, which adds its own headers to each message.

Each stand-in here changes headers as releases of ddtrace, sentry-sdk, newrelic or opentelemetry do.
The drills use the tools themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from celery import Celery, Task, signals
from celery.app.task import Context
from celery.app.trace import build_tracer
from celery.beat import ScheduleEntry
from kombu.exceptions import OperationalError

from celery_singleton_state import singleton_task
from celery_singleton_state.headers import SENT_AGAIN, WAITED, custom_headers, header
from celery_singleton_state.message.resend import send_again
from celery_singleton_state.runtime import runtime_of
from celery_singleton_state.ticks import message_of

NOON = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
TRACE = {"x-datadog-trace-id": "1", "baggage": f"sentry-trace_id={'1' * 300},sentry-environment=p"}


@pytest.fixture
def app(memory_app: Celery) -> Iterator[Celery]:
    memory_app.conf.broker_url = "memory://"
    queue(memory_app).clear()
    yield memory_app
    queue(memory_app).clear()


def queue(app: Celery) -> Any:
    return app.connection_for_read().SimpleQueue("celery")


def into_inner(headers: dict[str, Any]) -> None:
    """Change headers as ddtrace does for distributed tracing."""
    headers.setdefault("headers", {}).update(TRACE)


def into_both(headers: dict[str, Any]) -> None:
    """Change headers as sentry-sdk did until 2.40. Its release 1.45 adds to the baggage at each
    sending.
    """
    before = [headers["baggage"]] if "baggage" in headers else []
    headers.update(TRACE | {"baggage": ",".join([*before, TRACE["baggage"]])})
    headers.setdefault("headers", {}).update(
        {name: value for name, value in headers.items() if name in TRACE}
    )


def copied_into_inner(headers: dict[str, Any]) -> None:
    """Change headers as sentry-sdk does since 2.40.

    The tool also copies each custom header into the inner ``headers``, if it is not there yet.
    """
    into_both(headers)
    for name in [name for name in headers if name not in Context.__dict__ and name != "headers"]:
        headers["headers"].setdefault(name, headers[name])


def on_top(headers: dict[str, Any]) -> None:
    """Change headers as newrelic, elastic-apm and opentelemetry do."""
    headers.update(traceparent="00-1-1-01", elasticapm={"trace_parent_string": "1"})


def nothing(headers: dict[str, Any]) -> None:
    """Change no header, as without a tool."""


TOOLS = (nothing, into_inner, into_both, copied_into_inner, on_top)


@pytest.fixture(params=TOOLS, ids=lambda tool: tool.__name__)
def tool(request: pytest.FixtureRequest) -> Iterator[Callable[[dict[str, Any]], None]]:
    """One of the stand-ins, connected so that it changes the headers of each message."""

    def change(headers: dict[str, Any], **_: Any) -> None:
        request.param(headers)

    signals.before_task_publish.connect(change)
    yield request.param
    signals.before_task_publish.disconnect(change)


def task_of(app: Celery, body: Callable[..., Any], **options: Any) -> Any:
    return singleton_task(app, **({"name": "t", "shared": False} | options))(body)


def idle(self: Any) -> None:
    pass


def receive(app: Celery) -> Any:
    """Return the next message of the queue."""
    message = queue(app).get(block=False)
    message.ack()
    return message


def request_of(message: Any) -> dict[str, Any]:
    """Return the request that a worker makes of a message."""
    info = {"exchange": "", "routing_key": "celery", "priority": 0, "redelivered": False}
    return message.headers | {"delivery_info": info, "hostname": "w@h", "is_eager": False}


def deliver(task: Any, message: Any) -> Any:
    """Let Celery run the task of a message."""
    args, kwargs, _ = message.payload
    trace = build_tracer(task.name, task, app=task.app)
    return trace(message.headers["id"], args, kwargs, request_of(message))


def context_of(message: Any) -> Context:
    return Context(request_of(message), called_directly=False)


def size(message: Any) -> int:
    return len(json.dumps(message.headers))


def hold(app: Celery) -> None:
    acquired = runtime_of(app).store.acquire("singleton-state:t", "somebody", 60, None)
    assert acquired is not None


@pytest.mark.parametrize("on_conflict", ["wait", "replace"])
def test_a_waiting_message_counts_its_waiting_time(
    app: Celery, tool: object, on_conflict: str
) -> None:
    """ddtrace once brought back an old value of the header that counts the time, so that the
    message was sent again for ever. The headers must not grow at each sending either.
    """
    task = task_of(app, idle, on_conflict=on_conflict, conflict_timeout=60)
    hold(app)
    sent = task.apply_async(headers={"tenant": "a"})
    waits, sizes = [], []
    for _ in range(8):
        message = receive(app)
        assert message.headers["id"] == sent.id
        waits.append(header(context_of(message), WAITED, 0.0))
        sizes.append(size(message))
        deliver(task, message)
    assert waits == sorted(set(waits))
    assert max(sizes) < 2 * sizes[1]


def test_a_message_that_is_sent_again_keeps_its_headers(app: Celery, tool: object) -> None:
    """However often that happens, the body finds the sender's headers in ``request.headers``."""
    task = task_of(app, idle)
    task.apply_async(headers={"tenant": "a", "nested": {"b": [1]}, "headers": {"shown": 1}})
    first = context_of(receive(app))
    request = first
    for n in range(1, 4):
        with pytest.raises(Exception, match="is sent again"):
            send_again(task, request, "t", 1.0, {WAITED: float(n)})
        message = receive(app)
        request = context_of(message)
        assert header(request, WAITED) == n
        assert header(request, SENT_AGAIN) == 1
        assert (message.headers["tenant"], message.headers["nested"]) == ("a", {"b": [1]})
        assert users(request) == users(first)


def users(request: Context) -> dict[str, Any]:
    """Return the headers that the sender set, as the body sees them."""
    own = ("tenant", "nested", "shown")
    return {name: value for name, value in (request.headers or {}).items() if name in own}


@pytest.mark.parametrize("with_headers", [False, True])
def test_a_retry_keeps_the_tick_of_its_run(app: Celery, tool: object, with_headers: bool) -> None:
    """Celery gives a retry the headers in ``request.headers``, or the ones that the body passes to
    ``retry()``. In both cases the retry must have the tick's headers.
    """
    seen: list[datetime | None] = []

    def body(self: Any) -> None:
        seen.append(self.tick)
        if self.request.retries < 2:
            raise self.retry(countdown=1, **({"headers": {"mine": 1}} if with_headers else {}))

    task = task_of(app, body, deduplicate=False)
    entry = ScheduleEntry(name="e", task="t", schedule=60, app=app)
    task.apply_async(**message_of(entry, "shop", NOON).options)
    for _ in range(3):
        deliver(task, receive(app))
    assert seen == [NOON] * 3


def test_a_retry_after_a_lost_worker_keeps_the_tick(app: Celery, tool: object) -> None:
    """Celery sends this retry itself, from the worker's main process."""
    task = task_of(app, idle)
    entry = ScheduleEntry(name="e", task="t", schedule=60, app=app)
    task.apply_async(**message_of(entry, "shop", NOON).options)
    request = context_of(receive(app))
    task.signature_from_request(request, countdown=1, retries=1).apply_async()
    assert header(context_of(receive(app)), "singleton_due") == NOON.isoformat()


def test_a_tick_that_is_sent_twice_runs_once(app: Celery, tool: object) -> None:
    seen: list[datetime | None] = []

    def body(self: Any) -> None:
        seen.append(self.tick)

    task = task_of(app, body)
    entry = ScheduleEntry(name="e", task="t", schedule=60, app=app)
    for _ in range(2):
        task.apply_async(**message_of(entry, "shop", NOON).options)
    for _ in range(2):
        deliver(task, receive(app))
    assert seen == [NOON]


def test_the_outer_of_two_copies_of_a_header_counts() -> None:
    """The inner copy is older: a tool made it when the message was sent before."""
    request = Context({"id": "1", WAITED: 3.0, "headers": {WAITED: 1.0, "own": 1}})
    assert header(request, WAITED) == 3.0
    assert custom_headers(request) == {WAITED: 3.0, "headers": {"own": 1}}


def test_a_header_that_is_only_in_the_inner_headers_is_found() -> None:
    request = Context({"id": "1", "headers": {WAITED: 1.0}})
    assert header(request, WAITED) == 1.0
    assert custom_headers(request) == {WAITED: 1.0}


@pytest.mark.parametrize("shown", ["text", [1], 5])
def test_a_header_named_headers_that_is_no_dict_is_ignored(shown: object) -> None:
    request = Context({"id": "1", WAITED: 1.0, "headers": shown})
    assert header(request, WAITED) == 1.0
    assert custom_headers(request) == {WAITED: 1.0}


def test_headers_that_rabbitmq_adds_to_a_delivery_are_not_sent_again() -> None:
    """With these headers RabbitMQ would conclude that the message moves in a circle, and drop
    it.
    """
    noted = {"x-death": [{"count": 1}], "x-delivery-count": 3, "x-first-death-reason": "expired"}
    request = Context({"id": "1", "own": 1} | noted)
    assert custom_headers(request) == {"own": 1}
    request = Context({"id": "1", "own": 1, "headers": noted | TRACE} | noted)
    assert custom_headers(request) == {"own": 1, "headers": TRACE}


def test_attributes_that_a_tool_adds_to_a_request_are_not_sent_again(
    app: Celery, tool: object
) -> None:
    """A tool's span, for example, cannot be serialized."""

    def note(task: Any, **_: Any) -> None:
        task.request.my_span = object()
        task.request.began = 1.5

    task = task_of(app, idle, on_conflict="wait", conflict_timeout=60)
    hold(app)
    task.delay()
    signals.task_prerun.connect(note)
    try:
        deliver(task, receive(app))
        message = receive(app)
        assert header(context_of(message), WAITED) > 0
        assert json.loads(json.dumps(message.headers)) == message.headers
        assert "began" not in (message.headers if tool is nothing else {})
    finally:
        signals.task_prerun.disconnect(note)


@pytest.mark.parametrize(
    "headers",
    [
        TRACE,
        {"headers": TRACE},
        {"Traceparent": "00-1-1-01"},
        {"sentry-monitor-slug": "e", "sentry-monitor-config": {"schedule": {}}},
    ],
)
def test_enqueue_once_ignores_a_tools_headers(app: Celery, headers: dict[str, Any]) -> None:
    """Sentry Crons adds headers to a schedule entry. Other tools add them when the project calls
    ``apply_async``. A message with such headers is still sent only once.
    """
    task = task_of(app, idle, enqueue_once=True)
    first = task.apply_async(headers=dict(headers))
    assert task.apply_async(headers=dict(headers)).id == first.id


@pytest.mark.parametrize("headers", [{"own": 1}, {"headers": {"own": 1}}, {SENT_AGAIN: 1}])
def test_a_senders_own_headers_are_always_sent(app: Celery, headers: dict[str, Any]) -> None:
    task = task_of(app, idle, enqueue_once=True)
    first = task.apply_async(headers=dict(headers) | TRACE)
    assert task.apply_async(headers=dict(headers) | TRACE).id != first.id


def test_arguments_are_passed_on_to_celery_by_name(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only arguments that the sender gave are passed. Tools that wrap Celery's ``apply_async`` read
    and change its arguments by name.
    """
    seen: list[tuple[Any, ...]] = []
    celerys = Task.apply_async

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        _, *positional = args
        seen.append((positional, set(kwargs)))
        return celerys(*args, **kwargs)

    monkeypatch.setattr(Task, "apply_async", wrapped)
    task = task_of(app, idle)
    once = task_of(app, idle, name="once", enqueue_once=True)
    task.delay()
    task.apply_async((), {}, "an id")
    once.apply_async((), {}, countdown=1)
    assert seen == [
        ([(), {}], set()),
        ([(), {}], {"task_id", "headers"}),
        ([(), {}], {"task_id", "countdown"}),
    ]


@pytest.mark.parametrize("error", [ValueError("a tool's"), OperationalError("the broker's")])
def test_a_message_whose_sending_a_tool_fails_is_requeued(
    app: Celery, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    task = task_of(app, idle, on_conflict="wait", conflict_timeout=60)
    hold(app)
    task.delay()
    message = receive(app)

    def wrapped(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(app, "send_task", wrapped)
    answer = deliver(task, message)
    assert answer.info.state == "REJECTED"
    assert answer.info.retval.requeue
