"""Messages of a project that is traced: what tools do to their headers, and what we find there.

Each of the tools here does to a message what releases of ddtrace, sentry-sdk, newrelic and
opentelemetry do. The drills have the tools themselves.
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
    """As ddtrace does with distributed tracing."""
    headers.setdefault("headers", {}).update(TRACE)


def into_both(headers: dict[str, Any]) -> None:
    """As sentry-sdk did until 2.40; its 1.45 appends what it calls baggage at each sending."""
    before = [headers["baggage"]] if "baggage" in headers else []
    headers.update(TRACE | {"baggage": ",".join([*before, TRACE["baggage"]])})
    headers.setdefault("headers", {}).update(
        {name: value for name, value in headers.items() if name in TRACE}
    )


def copied_into_inner(headers: dict[str, Any]) -> None:
    """As sentry-sdk does since, with all custom headers that the inner one does not have yet."""
    into_both(headers)
    for name in [name for name in headers if name not in Context.__dict__ and name != "headers"]:
        headers["headers"].setdefault(name, headers[name])


def on_top(headers: dict[str, Any]) -> None:
    """As newrelic, elastic-apm and opentelemetry do."""
    headers.update(traceparent="00-1-1-01", elasticapm={"trace_parent_string": "1"})


def nothing(headers: dict[str, Any]) -> None:
    """As it is without a tool."""


TOOLS = (nothing, into_inner, into_both, copied_into_inner, on_top)


@pytest.fixture(params=TOOLS, ids=lambda tool: tool.__name__)
def tool(request: pytest.FixtureRequest) -> Iterator[Callable[[dict[str, Any]], None]]:
    """One that changes the headers of all messages."""

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
    """The next message."""
    message = queue(app).get(block=False)
    message.ack()
    return message


def request_of(message: Any) -> dict[str, Any]:
    """A message's request, as a worker makes it."""
    info = {"exchange": "", "routing_key": "celery", "priority": 0, "redelivered": False}
    return message.headers | {"delivery_info": info, "hostname": "w@h", "is_eager": False}


def deliver(task: Any, message: Any) -> Any:
    """Have Celery run a message."""
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
def test_a_message_that_waits_is_not_sent_for_ever(
    app: Celery, tool: object, on_conflict: str
) -> None:
    """ddtrace: a wait never ended and turned into a hot loop. Its headers do not grow either."""
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


def test_a_message_that_is_sent_again_carries_what_it_had(app: Celery, tool: object) -> None:
    """The body finds the same request.headers, but for ours and the tool's, however often."""
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
    """The sender's own headers, as its body sees them."""
    own = ("tenant", "nested", "shown")
    return {name: value for name, value in (request.headers or {}).items() if name in own}


@pytest.mark.parametrize("with_headers", [False, True])
def test_a_retry_of_a_body_is_still_for_its_tick(
    app: Celery, tool: object, with_headers: bool
) -> None:
    """Celery takes for a retry the headers that it shows, or those that the body gives."""
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


def test_a_retry_after_a_lost_worker_is_still_for_its_tick(app: Celery, tool: object) -> None:
    """Celery sends it itself, from the worker's main process."""
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


def test_the_newer_of_two_copies_counts() -> None:
    """A tool has kept, in its inner header, what the message had when it was sent before."""
    request = Context({"id": "1", WAITED: 3.0, "headers": {WAITED: 1.0, "own": 1}})
    assert header(request, WAITED) == 3.0
    assert custom_headers(request) == {WAITED: 3.0, "headers": {"own": 1}}


def test_a_header_that_is_only_within_is_found() -> None:
    request = Context({"id": "1", "headers": {WAITED: 1.0}})
    assert header(request, WAITED) == 1.0
    assert custom_headers(request) == {WAITED: 1.0}


@pytest.mark.parametrize("shown", ["text", [1], 5])
def test_a_header_of_that_name_that_has_no_headers(shown: object) -> None:
    request = Context({"id": "1", WAITED: 1.0, "headers": shown})
    assert header(request, WAITED) == 1.0
    assert custom_headers(request) == {WAITED: 1.0}


def test_what_the_broker_noted_of_one_delivery_is_not_sent_again() -> None:
    """RabbitMQ would drop the message as one that goes round in circles."""
    noted = {"x-death": [{"count": 1}], "x-delivery-count": 3, "x-first-death-reason": "expired"}
    request = Context({"id": "1", "own": 1} | noted)
    assert custom_headers(request) == {"own": 1}
    request = Context({"id": "1", "own": 1, "headers": noted | TRACE} | noted)
    assert custom_headers(request) == {"own": 1, "headers": TRACE}


def test_what_somebody_puts_on_a_request_is_not_sent_again(app: Celery, tool: object) -> None:
    """A span, for example, which no message can carry."""

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
def test_enqueue_once_holds_with_a_tools_headers(app: Celery, headers: dict[str, Any]) -> None:
    """Sentry Crons adds them to an entry of beat's; others where the project calls apply_async."""
    task = task_of(app, idle, enqueue_once=True)
    first = task.apply_async(headers=dict(headers))
    assert task.apply_async(headers=dict(headers)).id == first.id


@pytest.mark.parametrize("headers", [{"own": 1}, {"headers": {"own": 1}}, {SENT_AGAIN: 1}])
def test_a_senders_own_headers_are_always_sent(app: Celery, headers: dict[str, Any]) -> None:
    task = task_of(app, idle, enqueue_once=True)
    first = task.apply_async(headers=dict(headers) | TRACE)
    assert task.apply_async(headers=dict(headers) | TRACE).id != first.id


def test_celery_gets_our_arguments_as_it_gets_its_own(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, and only those that were given: tools that wrap it read and change them so."""
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
def test_what_a_tool_raises_in_a_sending_leaves_the_message(
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
