"""on_conflict="coalesce": the pending run has the message's arguments, headers and encoding."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from celery import Celery
from kombu import serialization

from celery_singleton_state import SingletonTask, singleton_task
from celery_singleton_state.recovery import end_for
from celery_singleton_state.run import conflict
from celery_singleton_state.run.waiting import GRACE, NEXT_PAUSE
from celery_singleton_state.runtime import runtime_of
from celery_singleton_state.store.base import Ended
from tests.helpers.kept_messages import Broker, Message, broker_of

KEY = "singleton-state:coalesced"
NOW = datetime(2026, 11, 27, 12, 30, 1, 5000, tzinfo=UTC)
TYPED = [NOW, NOW.date(), Decimal("0.10"), UUID(int=7), b"\xff\x00", "\ud800", "a'\"\\\x00"]


class Point:
    """An argument that only pickle can carry."""

    def __init__(self, x: int) -> None:
        self.x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point) and other.x == self.x

    __hash__ = None  # type: ignore[assignment]  # it is only compared


@pytest.fixture
def app(memory_app: Celery) -> Celery:
    return memory_app


@pytest.fixture
def broker(app: Celery, monkeypatch: pytest.MonkeyPatch) -> Broker:
    return broker_of(app, monkeypatch)


@pytest.fixture
def reversed_json() -> Iterator[str]:
    """Register a project's own serializer, whose content is bytes that are not text."""
    name, content_type = "reversed", "application/x-reversed"
    serialization.register(
        name,
        lambda data: b"\xff" + base64.b64encode(pickle.dumps(data))[::-1],
        lambda body: pickle.loads(base64.b64decode(bytes(body)[:0:-1])),
        content_type,
        "binary",
    )
    yield name
    serialization.unregister(name)


def coalesced(app: Celery, **options: Any) -> Any:
    def body(self: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    defaults: dict[str, Any] = {"name": "coalesced", "shared": False, "on_conflict": "coalesce"}
    return singleton_task(app, **defaults | options)(body)


def deliver_during_a_run(app: Celery, message: Message, **request: Any) -> None:
    """Deliver a message while another run holds the lease. The message is coalesced."""
    assert runtime_of(app).store.acquire(KEY, "holder", 60, "task-h")
    assert message.deliver(**request) == ("SUCCESS", None)


def pending_run_sent(app: Celery, broker: Broker) -> Message:
    """End the holder's run, and return the message of the pending run that is then sent."""
    broker.sent.clear()
    free(app)
    return broker.pop()


def free(app: Celery) -> None:
    row = runtime_of(app).store.peek(KEY)
    assert row is not None
    assert end_for(runtime_of(app), row, 0, "it ended")


def sent(task: Any, broker: Broker, *args: Any, **options: Any) -> Message:
    task.apply_async(args, **options)
    return broker.pop()


def properties(serializer: str) -> dict[str, str]:
    """Return the message properties that name a serializer's content type."""
    return {"content_type": serialization.registry.name_to_type[serializer]}  # type: ignore[attr-defined]  # missing in celery-types


@pytest.mark.parametrize("knows", [True, False], ids=["", "a broker that gives no content type"])
def test_the_pending_run_has_arguments_of_the_same_types(
    app: Celery, broker: Broker, knows: bool
) -> None:
    message = sent(coalesced(app), broker, *TYPED, kwargs={"at": NOW, "n": {"d": TYPED[2]}})
    deliver_during_a_run(app, message, properties=properties("json") if knows else {})
    pending = pending_run_sent(app, broker)
    assert pending.args == TYPED
    assert pending.kwargs == {"at": NOW, "n": {"d": Decimal("0.10")}}
    assert pending.task_id != message.task_id


@pytest.mark.parametrize("serializer", ["pickle", "yaml", "reversed"])
def test_the_pending_run_is_encoded_as_the_message_was(
    app: Celery, broker: Broker, serializer: str, reversed_json: str
) -> None:
    app.conf.accept_content = ["json", serializer]
    value: Any = {"plain": [1, 2.5, None]} if serializer == "yaml" else Point(3)
    message = sent(coalesced(app), broker, value, serializer=serializer, compression="gzip")
    gzip = {"compression": "application/x-gzip"}
    deliver_during_a_run(app, message, properties=properties(serializer), **gzip)
    pending = pending_run_sent(app, broker)
    assert pending.args == [value]
    assert pending.options["serializer"] == serializer
    assert pending.options["compression"] == "application/x-gzip"


def test_the_pending_run_has_the_arguments_from_before_a_base_class_changed_them(
    app: Celery, broker: Broker
) -> None:
    """A base class takes the tenant's argument off before it calls the task.

    The pending run's message has that argument again.
    """

    class OfTenant(SingletonTask[Any]):
        abstract = True

        def __call__(self, tenant: str, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    task = coalesced(app, base=OfTenant)
    deliver_during_a_run(app, sent(task, broker, "tenant b", 1, kwargs={"key": 2}))
    pending = pending_run_sent(app, broker)
    assert (pending.args, pending.kwargs) == (["tenant b", 1], {"key": 2})


def test_the_pending_run_of_a_direct_call_has_its_arguments(app: Celery, broker: Broker) -> None:
    task = coalesced(app)
    assert runtime_of(app).store.acquire(KEY, "holder", 60, "task-h")
    assert task(NOW, key=Decimal(1)) is None
    pending = pending_run_sent(app, broker)
    assert (pending.args, pending.kwargs) == ([NOW], {"key": Decimal(1)})


def test_the_pending_run_of_a_direct_call_ignores_its_result_if_its_task_does(
    app: Celery, broker: Broker
) -> None:
    assert runtime_of(app).store.acquire(KEY, "holder", 60, "task-h")
    assert coalesced(app, ignore_result=True)(1) is None
    assert pending_run_sent(app, broker).headers["ignore_result"] is True


def test_the_pending_run_keeps_the_senders_headers_and_options(app: Celery, broker: Broker) -> None:
    """Callbacks are not kept: Celery calls them for the coalesced message, and would call them
    twice.
    """
    task = coalesced(app)
    expires = datetime.now(UTC) + timedelta(hours=1)
    message = sent(
        task,
        broker,
        1,
        headers={"tenant": "b", "singleton_waited": 3.5},
        expires=expires,
        time_limit=40,
        soft_time_limit=30,
        shadow="shown",
        ignore_result=True,
        link=task.si(2),
        stamped_headers=["stamp"],
        stamp="s",
    )
    delivery = {"exchange": "", "routing_key": "slow", "priority": 7, "redelivered": True}
    app.conf.task_create_missing_queues = True
    message.headers["ignore_result"] = False
    deliver_during_a_run(app, message, delivery_info=delivery)
    pending = pending_run_sent(app, broker)
    has = pending.headers
    assert (has["tenant"], has["shadow"], has["timelimit"]) == ("b", "shown", [40, 30])
    assert has["expires"] == expires.isoformat()
    assert has["ignore_result"] is False
    assert (has["stamped_headers"], has["stamps"]) == (["stamp"], {"stamp": "s"})
    assert (has["root_id"], has["parent_id"]) == (message.task_id, message.task_id)
    assert (has["retries"], has["callbacks"]) == (0, None)
    assert "singleton_waited" not in has
    assert pending.options["queue"].name == "slow"
    assert pending.options["priority"] == 7


@pytest.mark.parametrize(
    ("exchange", "key"),
    [
        ("celery_delayed_delivery", "0." * 27 + "1.celery"),
        ("shop_celery_delayed_0", "0." * 28 + "celery"),
        ("celery_delayed_delivery", "celery"),
    ],
)
def test_the_pending_run_of_a_delayed_message_is_not_delayed(
    app: Celery, broker: Broker, exchange: str, key: str
) -> None:
    message = sent(coalesced(app), broker)
    deliver_during_a_run(app, message, delivery_info={"exchange": exchange, "routing_key": key})
    options = pending_run_sent(app, broker).options
    assert options["queue"].name == "celery"
    assert (options["exchange"], options["routing_key"]) == ("", "celery")


def test_content_that_the_workers_do_not_accept_is_not_sent(
    app: Celery, broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    """The pending run stays in the row.

    The next holder sends it when it releases the lease, if that holder's worker accepts the
    content.
    """
    message = sent(coalesced(app), broker, Point(3), serializer="pickle")
    deliver_during_a_run(app, message, properties=properties("pickle"))
    free(app)
    assert broker.sent == []
    assert "the pending run could not be sent" in caplog.text
    app.conf.accept_content = ["json", "pickle"]
    assert runtime_of(app).store.acquire(KEY, "another", 60, "task-i")
    assert pending_run_sent(app, broker).args == [Point(3)]


@pytest.mark.parametrize(
    ("arguments", "name"), [((1, Point(2)), "argument 2"), ((1, 2), "argument 'point'")]
)
def test_an_argument_that_cannot_be_encoded_is_named(
    app: Celery, arguments: Any, name: str
) -> None:
    assert runtime_of(app).store.acquire(KEY, "holder", 60, "task-h")
    wanted = rf"task coalesced: .* as json, and {name} cannot be encoded as json: .*Point"
    with pytest.raises(TypeError, match=wanted):
        coalesced(app)(*arguments, point=Point(3))


def test_a_message_that_waits_is_sent_again_as_it_was_encoded(app: Celery, broker: Broker) -> None:
    task = coalesced(app, on_conflict="wait")
    app.conf.accept_content = ["json", "pickle"]
    message = sent(task, broker, Point(3), serializer="pickle")
    assert runtime_of(app).store.acquire(KEY, "holder", 60, "task-h")
    message.deliver(properties=properties("pickle"))
    assert broker.pop().options["serializer"] == "pickle"


def test_a_retry_is_sent_as_the_message_was_encoded(app: Celery, broker: Broker) -> None:
    def body(self: Any, point: Any) -> None:
        raise self.retry(countdown=1)

    task = singleton_task(app, name="coalesced", shared=False)(body)
    sent(task, broker, Point(3), serializer="pickle").deliver(properties=properties("pickle"))
    assert broker.pop().options["serializer"] == "pickle"


def start_hold_period(app: Celery, seconds: float) -> None:
    """Start a hold period: let a run acquire the lease, succeed, and keep the lease.

    :param seconds: the length of the hold period.
    """
    store = runtime_of(app).store
    held = store.acquire(KEY, "holder", 60, "task-h")
    assert held is not None
    assert store.release(held.lease, Ended("succeeded", "[]", seconds))


@pytest.mark.parametrize("seconds", [5.0, 60.0])
def test_of_several_messages_in_the_hold_period_one_is_sent_again(
    app: Celery, broker: Broker, seconds: float
) -> None:
    task = coalesced(app)
    start_hold_period(app, seconds)
    first, second = sent(task, broker, 1), sent(task, broker, 2)
    first.deliver()
    assert broker.pop().task_id == first.task_id
    assert second.deliver() == ("SUCCESS", None)
    assert broker.sent == []


def test_a_change_in_the_hold_period_does_not_rely_on_a_tick_that_waits(
    app: Celery, broker: Broker
) -> None:
    """A tick of ``catch_up="all"`` waits for the lease, and is next in line.

    A message that arrives in the hold period is still sent again, because the tick's run may not
    see the change for which the message was sent.
    """
    start_hold_period(app, 60)
    row = runtime_of(app).store.peek(KEY)
    assert row is not None
    assert runtime_of(app).store.requests.claim(KEY, "a tick", NEXT_PAUSE + GRACE, row.queue)
    message = sent(coalesced(app), broker, "change")
    message.deliver()
    assert broker.pop().task_id == message.task_id


def test_a_change_in_the_hold_period_is_not_lost_to_a_run_that_begins(
    app: Celery, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. Message A finds the lease in its hold period.
    2. The hold period ends, and message B acquires the lease.
    3. A asks to be recorded as next in line, and finds B running.
    4. A is sent again.
    """
    start_hold_period(app, 60)
    store, claim = runtime_of(app).store, conflict.claim

    def claim_late(*arguments: Any, **options: Any) -> Any:
        row = store.peek(KEY)
        assert row is not None
        assert store.requests.release_early(row)
        assert store.acquire(KEY, "another", 60, "task-i")
        return claim(*arguments, **options)

    monkeypatch.setattr(conflict, "claim", claim_late)
    message = sent(coalesced(app), broker, "change")
    message.deliver()
    assert broker.pop().task_id == message.task_id
