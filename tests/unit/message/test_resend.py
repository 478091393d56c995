"""Messages that cannot be sent again because the broker is unavailable: the broker keeps them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from celery import Celery
from celery.app.task import Context
from celery.concurrency.solo import TaskPool
from celery.exceptions import Reject
from kombu.exceptions import OperationalError

from celery_singleton_state import SingletonTask, singleton_task
from celery_singleton_state.message.resend import reject_if_killed, send_again

#: kombu's errors: for a broker that is unavailable, and for a connection that breaks in use.
ERRORS = (OperationalError("Connection refused"), AttributeError("'NoneType' has no 'client'"))


@contextmanager
def delivering(request: Context) -> Iterator[None]:
    """Handle an error of the body as the task does around a delivery."""
    try:
        yield
    except BaseException as error:
        reject_if_killed(error, request)
        raise


@pytest.fixture(params=ERRORS)
def error(request: pytest.FixtureRequest) -> Exception:
    found: Exception = request.param
    return found


@pytest.fixture
def task(memory_app: Celery, monkeypatch: pytest.MonkeyPatch, error: Exception) -> Any:
    def send(producer: Any, name: str, message: Any, **_: Any) -> None:
        json.dumps(message.body)
        raise error

    monkeypatch.setattr(memory_app.amqp, "send_task_message", send)

    @singleton_task(memory_app, name="task", shared=False)
    def body(self: SingletonTask) -> None:
        pass

    return body


def test_a_message_that_cannot_be_sent_again_stays_with_the_broker(
    task: Any, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    with pytest.raises(Reject) as caught:
        send_again(task, Context(id="1", args=(), kwargs={}, headers={}), "name", 1.0)
    assert caught.value.requeue
    assert caught.value.args[0] is error
    assert (
        "singleton name: task 1 could not be sent again, so its broker redelivers it" in caplog.text
    )


def test_a_retry_that_cannot_be_sent_stays_with_the_broker(task: Any) -> None:
    """Celery's own ``retry()`` would reject the message for good."""
    task.push_request(id="1", args=(), kwargs={}, called_directly=False)
    try:
        with pytest.raises(Reject) as caught:
            task.retry(countdown=1)
    finally:
        task.pop_request()
    assert caught.value.requeue


def test_a_retry_that_no_serializer_takes_is_rejected_for_good(task: Any) -> None:
    """The retry could never be sent: if the message were requeued, the error would repeat for
    ever.
    """
    task.push_request(id="1", args=(object(),), kwargs={}, called_directly=False)
    try:
        with pytest.raises(Reject) as caught:
            task.retry(countdown=1)
    finally:
        task.pop_request()
    assert not caught.value.requeue


class GreenletExit(BaseException):
    """An exception with the name of the one that gevent and eventlet raise to end a greenlet."""


def kill_greenlet() -> None:
    raise GreenletExit


def kill_in_solo_pool() -> None:
    TaskPool(app=None).terminate_job(0)


@pytest.mark.parametrize("kill", [kill_greenlet, kill_in_solo_pool])
def test_the_message_of_a_body_that_celery_ends_stays_with_the_broker(
    kill: Callable[[], None],
) -> None:
    request = Context(id="1", called_directly=False)
    with pytest.raises(Reject) as caught, delivering(request):
        kill()
    assert caught.value.requeue


def test_the_message_of_a_retry_that_celery_ends_stays_with_the_broker(
    task: Any, memory_app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a solo pool, the signal of a cold shutdown comes while the retry is being sent."""

    def send(*_: Any, **__: Any) -> None:
        kill_in_solo_pool()

    monkeypatch.setattr(memory_app.amqp, "send_task_message", send)
    task.push_request(id="1", args=(), kwargs={}, called_directly=False)
    try:
        with pytest.raises(Reject) as caught, delivering(task.request):
            task.retry(countdown=1)
    finally:
        task.pop_request()
    assert caught.value.requeue


def test_an_error_of_the_body_is_raised_unchanged() -> None:
    with pytest.raises(NotImplementedError), delivering(Context(id="1")):
        raise NotImplementedError
