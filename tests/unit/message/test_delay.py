"""To which queue a message is sent again, and with which delay, for each kind of broker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from celery import Celery
from celery.app.task import Context
from celery.exceptions import Ignore
from kombu import Exchange, Queue, binding
from kombu.common import Broadcast

from celery_singleton_state import SingletonTask, singleton_task
from celery_singleton_state.headers import (
    DUE,
    ENTRY,
    NEXT_SINCE,
    PAUSE,
    PAUSE_LEFT,
    RANK,
    REQUEUED,
    SENT,
    SENT_AT,
    UNRECORDED,
    WAITED,
    custom_headers,
    header,
    names_in,
)
from celery_singleton_state.message import delay, routing
from celery_singleton_state.message.delay import possible
from celery_singleton_state.message.enqueue_once import LIFE, life_of
from celery_singleton_state.message.resend import send_again, wait_on
from celery_singleton_state.message.routing import came_through_fanout, delayed_key, queue_of
from celery_singleton_state.runtime import close_runtime

QUORUM = {"x-queue-type": "quorum"}
#: The prefix of a routing key for kombu's native delay of 3 s: one bit for each of 28 levels.
THREE_SECONDS = "0." * 26 + "1.1."


@pytest.fixture
def make_app() -> Iterator[Callable[..., Celery]]:
    """Return a function that makes an app for a broker's URL. No test connects to the broker."""
    made: list[Celery] = []

    def make(broker: str, *queues: Queue, **options: Any) -> Celery:
        app = Celery("app", broker=broker, set_as_current=False)
        app.conf.update(
            singleton_store_url="memory://",
            task_queues=queues or None,
            broker_transport_options=options,
        )
        made.append(app)
        return app

    yield make
    for app in made:
        close_runtime(app)


def task_of(app: Celery) -> Any:
    if "task" in app.tasks:
        return app.tasks["task"]

    @singleton_task(app, name="task", shared=False)
    def body(self: SingletonTask) -> None:
        pass

    return body


def message(
    exchange: str = "", routing_key: str = "celery", headers: dict[str, Any] | None = None
) -> Context:
    info = {"exchange": exchange, "routing_key": routing_key, "priority": 0, "redelivered": None}
    return Context(
        id="1", args=(), kwargs={}, called_directly=False, delivery_info=info, headers=headers or {}
    )


def sent(task: Any, request: Context, **options: Any) -> dict[str, Any]:
    """Return the options with which a message would be sent again."""
    found: dict[str, Any] = task.signature_from_request(request, **options).options
    return found


@pytest.mark.parametrize(
    ("broker", "options", "longest"),
    [
        ("redis://", {}, 1800.0),
        ("redis://", {"visibility_timeout": 3}, 1.5),
        ("sentinel://", {"visibility_timeout": 40.0}, 20.0),
        ("amqp://", {}, 900.0),
        ("memory://", {}, None),
    ],
)
def test_no_countdown_is_longer_than_the_broker_waits_for_an_acknowledgement(
    make_app: Callable[..., Celery], broker: str, options: dict[str, Any], longest: float | None
) -> None:
    """If a pause is longer, the message carries the rest of it. When the message arrives, it is
    sent again for that rest.
    """
    task = task_of(make_app(broker, **options))
    made = sent(task, message(), countdown=86_400.0)
    left = made["headers"].get(PAUSE_LEFT, 0.0)
    assert made["countdown"] == (longest or 86_400.0)
    assert made["countdown"] + left == 86_400.0
    again = sent(task, message(headers=made["headers"]), countdown=0.5)
    assert again["headers"].get(PAUSE_LEFT, 0.0) == 0.0


@pytest.mark.parametrize("pause", [60.0, 86_400.0])
@pytest.mark.parametrize("broker", ["redis://", "memory://", "amqp://", "amqp:// of quorum queues"])
def test_a_retry_counts_as_queued_for_its_whole_pause(
    make_app: Callable[..., Celery], monkeypatch: pytest.MonkeyPatch, broker: str, pause: float
) -> None:
    """The countdown may be only a part of the pause. If RabbitMQ delays the message, it has no
    countdown.
    """
    monkeypatch.setattr(delay, "_is_bound", lambda *_: True)
    url, _, quorum = broker.partition(" ")
    if quorum:
        pytest.importorskip("kombu.transport.native_delayed_delivery")
    app = make_app(url, Queue("celery", queue_arguments=QUORUM if quorum else None))
    for options in ({"countdown": pause}, {"eta": app.now() + timedelta(seconds=pause)}):
        made = sent(task_of(app), message(), retries=1, **options)
        assert life_of(made) == pytest.approx(pause + LIFE, abs=5)
    # The next retry has no delay.
    made = sent(task_of(app), message(headers=made["headers"]), retries=2, countdown=0)
    assert life_of(made) == LIFE


def test_a_retry_does_not_inherit_the_waiting_time(make_app: Callable[..., Celery]) -> None:
    """How long a try has waited, and how often it was requeued, does not count for its retry.

    A message that is only sent again keeps both numbers.
    """
    of_try = {WAITED: 9.5, NEXT_SINCE: 3.0, REQUEUED: 4, UNRECORDED: 2}
    of_message = {RANK: 7, SENT: "value", SENT_AT: "host:1", ENTRY: "e", DUE: "2026-11-27"}
    task = task_of(make_app("memory://"))
    of_message["own"] = 1
    request = message(headers={**of_try, **of_message})
    request.update(of_try | of_message, retries=1)
    for headers in ({}, {"headers": custom_headers(request)}):
        retry = sent(task, request, retries=2, **headers)["headers"]
        assert retry == of_message
        again = sent(task, request, retries=1, **headers)["headers"]
        assert again == of_try | of_message


def test_a_message_waits_for_the_rest_of_its_pause(
    make_app: Callable[..., Celery], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app("redis://", visibility_timeout=4)
    task, found = task_of(app), []
    monkeypatch.setattr(app, "send_task", lambda *_, **options: found.append(options))
    request = message(headers={PAUSE_LEFT: 5.0})
    while True:
        try:
            left = float(header(request, PAUSE_LEFT, 0.0))
            if left > 0:
                wait_on(task, request, "task", left)
        except Ignore:
            request = message(headers=found[-1]["headers"])
        else:
            break
    assert [(each["countdown"], each["headers"][PAUSE_LEFT]) for each in found] == [
        (2.0, 3.0),
        (2.0, 1.0),
        (1.0, 0.0),
    ]


@pytest.mark.parametrize("kind", ["direct", "topic"])
@pytest.mark.parametrize(
    ("pause", "seconds"), [(0.2, 1), (1, 1), (1.5, 2), (24, 24), (7200.5, 7201)]
)
def test_rabbitmq_delays_messages_of_quorum_queues_by_whole_seconds(
    make_app: Callable[..., Celery],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    pause: float,
    seconds: int,
) -> None:
    native = pytest.importorskip("kombu.transport.native_delayed_delivery")
    monkeypatch.setattr(delay, "_is_bound", lambda *_: True)
    exchange = Exchange("e", type=kind)
    app = make_app("amqp://", Queue("q", exchange, routing_key="k", queue_arguments=QUORUM))
    expected = native.calculate_routing_key(seconds, delayed_key("q"))
    for options in ({"countdown": pause}, {"eta": app.now() + timedelta(seconds=pause)}):
        made = sent(task_of(app), message("e", "k"), **options)
        assert made["exchange"] == "celery_delayed_27"
        assert made["countdown"] is made["eta"] is None
        assert made["routing_key"] == expected
    assert possible(app, pause) == seconds


def test_a_wait_counts_with_the_delay_that_the_broker_really_makes(
    make_app: Callable[..., Celery], monkeypatch: pytest.MonkeyPatch
) -> None:
    """RabbitMQ delays by whole seconds. If a delay of 0.1 s counted as 0.1 s, and not as 1 s, a
    wait would exceed its time limit.
    """
    pytest.importorskip("kombu.transport.native_delayed_delivery")
    monkeypatch.setattr(delay, "_is_bound", lambda *_: True)
    app = make_app("amqp://", Queue("q", queue_arguments=QUORUM))
    task, found = task_of(app), []
    monkeypatch.setattr(app, "send_task", lambda *_, **options: found.append(options))
    with pytest.raises(Ignore):
        send_again(task, message("", "q"), "task", 0.1, {WAITED: 2.1})
    assert found[0]["headers"][WAITED] == pytest.approx(3.0)


def test_a_message_that_was_delayed_often_is_sent_to_its_own_queue(
    make_app: Callable[..., Celery], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A delayed message arrives with the name of the delaying exchange, and with a prefix before
    its routing key. The exchange must not be mistaken for the message's own, nor the prefix for a
    part of its key.
    """
    pytest.importorskip("kombu.transport.native_delayed_delivery")
    monkeypatch.setattr(delay, "_is_bound", lambda *_: True)
    other = Queue("other", Exchange("e", type="topic"), routing_key="o", queue_arguments=QUORUM)
    app = make_app("amqp://", Queue("first", queue_arguments=QUORUM), other)
    request, lengths = message("e", "o"), set()
    for _ in range(20):
        made = sent(task_of(app), request, countdown=3)
        assert made["queue"].name == "other"
        lengths.add(len(made["routing_key"]))
        request = message("celery_delayed_delivery", made["routing_key"])
        assert queue_of(app, request) == "other"
    assert len(lengths) == 1
    by_celery = message("celery_delayed_0", THREE_SECONDS * 2 + "o")
    assert sent(task_of(app), by_celery)["routing_key"] == "other"


@pytest.mark.parametrize("name", ["q", "a.b", "a#*", "ä" * 80, "long" * 60])
def test_a_delayed_message_is_for_one_queue_with_any_name(
    make_app: Callable[..., Celery], name: str
) -> None:
    app = make_app("amqp://", Queue(name, queue_arguments=QUORUM))
    key = delayed_key(name)
    assert len((THREE_SECONDS + key).encode()) <= 255
    assert not {"."}.intersection(key)
    assert queue_of(app, message("celery_delayed_3", THREE_SECONDS + key)) == name


@pytest.mark.parametrize(
    ("exchange", "routing_key", "queue"),
    [
        ("", "elsewhere", "elsewhere"),
        ("direct", "d", "direct"),
        ("topic", "eu.orders.new", "topic"),
        ("topic", "eu.orders", "topic"),
        ("topic", "orders.eu", None),
        ("words", "one", "words"),
        ("words", "one.two", None),
        ("all", "whatever", "all"),
        ("bound", "b", "bound"),
        ("unknown", "d", None),
    ],
)
def test_the_queue_that_a_message_came_from_is_found(
    make_app: Callable[..., Celery], exchange: str, routing_key: str, queue: str | None
) -> None:
    app = make_app(
        "amqp://",
        Queue("direct", Exchange("direct"), routing_key="d"),
        Queue("topic", Exchange("topic", type="topic"), routing_key="eu.orders.#"),
        Queue("words", Exchange("words", type="topic"), routing_key="*"),
        Queue("all", Exchange("all", type="fanout")),
        Queue("bound", bindings=[binding(Exchange("bound"), routing_key="b")]),
    )
    assert queue_of(app, message(exchange, routing_key)) == queue


@pytest.mark.parametrize("broker", ["amqp://", "redis://"])
def test_a_message_with_copies_in_two_queues_is_sent_to_one_queue(
    make_app: Callable[..., Celery], broker: str
) -> None:
    """If one copy were sent to the exchange again, both queues would get a copy of it."""
    topic = Exchange("topic", type="topic")
    app = make_app(
        broker, Queue("a", topic, routing_key="x.#"), Queue("b", topic, routing_key="#.y")
    )
    made = sent(task_of(app), message("topic", "x.y"), countdown=1)
    assert (made["exchange"], made["routing_key"]) == ("", "a")


def test_a_copy_of_a_fanout_exchange_never_goes_back_to_the_exchange(
    make_app: Callable[..., Celery],
) -> None:
    """The only exception is a retry that the body itself sends when the broker cannot address a
    single queue.
    """
    for broker, exchange in (("amqp://", ""), ("redis://", "all")):
        app = make_app(broker, Queue("q"), Broadcast("all"))
        request = message("all", "q")
        assert came_through_fanout(app, request)
        assert routing.can_be_addressed(app, request) == (broker == "amqp://")
        assert sent(task_of(app), request)["exchange"] == exchange


def test_rabbitmqs_notes_of_its_moves_are_not_sent_again(
    make_app: Callable[..., Celery],
) -> None:
    """RabbitMQ notes in headers through which queues it has moved a message. If these headers were
    sent again, RabbitMQ would conclude that the message moves in a circle, and drop the message.
    """
    moves = {"x-death": [{"queue": "celery_delayed_1"}], "x-first-death-queue": "celery_delayed_1"}
    made = sent(task_of(make_app("amqp://")), message(headers={**moves, "own": 1}), countdown=1)
    assert set(names_in(made["headers"])) == {"own", PAUSE}


def test_a_retry_goes_to_the_queue_that_the_body_names(make_app: Callable[..., Celery]) -> None:
    app = make_app("amqp://", Queue("q"), Queue("other"))
    made = sent(task_of(app), message("", "q"), queue="other", countdown=1)
    assert made["queue"] == "other"
    assert "exchange" not in made
