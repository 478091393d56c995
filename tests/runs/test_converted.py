"""Arguments that Celery converts with pydantic: the key is made of the converted arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from celery import VERSION, Celery
from pydantic import BaseModel, ValidationError, ValidationInfo, field_validator, model_validator

from celery_singleton_state.runtime import runtime_of
from tests.helpers.messages import deliver_all, received, use_own_queue

pytestmark = pytest.mark.skipif(VERSION < (5, 5), reason="pydantic tasks came with Celery 5.5")


class Order(BaseModel):
    id: int
    shop: str = "main"

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:
        return {"id": value} if isinstance(value, str | int) else value

    @field_validator("shop")
    @classmethod
    def _in_context(cls, value: str, info: ValidationInfo) -> str:
        return str((info.context or {}).get("shop", value))


SPELLINGS: list[Any] = ["1", 1, {"id": 1}, {"id": "1", "shop": "main"}]


@pytest.fixture
def app(memory_app: Celery) -> Celery:
    use_own_queue(memory_app)
    return memory_app


@pytest.fixture(params=[True, False], ids=["bound", "not bound"])
def make(app: Celery, request: pytest.FixtureRequest) -> Callable[..., Any]:
    from celery_singleton_state import SingletonTask

    def made(**options: Any) -> Any:
        def bound(self: Any, order: Order, *, note: str = "") -> int:
            return order.id

        def unbound(order: Order, *, note: str = "") -> int:
            return order.id

        options = {"unique_on": ["order"], "pydantic": True, "name": "ship"} | options
        body = bound if request.param else unbound
        return app.task(bind=request.param, base=SingletonTask, shared=False, **options)(body)

    return made


def keys(app: Celery) -> list[str]:
    return sorted(found.key for found in runtime_of(app).store.list("singleton-state:"))


@pytest.mark.parametrize("unique_on", [["order"], "*", lambda order, **_: order.id])
def test_different_spellings_of_one_order_are_one_singleton(
    app: Celery, make: Callable[..., Any], unique_on: Any
) -> None:
    """All spellings have one row. The fault was: three spellings of one order ran at once."""
    task = make(unique_on=unique_on)
    for spelling in SPELLINGS:
        app.send_task("ship", (spelling,))
        app.send_task("ship", kwargs={"order": spelling})
    assert [each.retval for each in deliver_all(app)] == [1] * 8
    assert task(Order(id=1)) == 1
    assert len(keys(app)) == 1


def test_the_key_is_that_of_the_converted_argument(app: Celery, make: Callable[..., Any]) -> None:
    make(pydantic_context={"shop": "north"})
    app.send_task("ship", ({"id": "1", "shop": "south"},))
    deliver_all(app)
    assert keys(app) == ['singleton-state:ship{"order":{"id":1,"shop":"north"}}']


def test_a_spelling_is_not_sent_while_another_spelling_is_queued(
    app: Celery, make: Callable[..., Any]
) -> None:
    task = make(enqueue_once=True)
    ids = {task.delay(each).id for each in SPELLINGS}
    if VERSION >= (5, 7):  # Older Celery cannot send a model as an argument.
        ids.add(task.delay(Order(id=1)).id)
    assert len(ids) == 1
    assert len(received(app)) == 1


@pytest.mark.parametrize("options", [{}, {"enqueue_once": True}], ids=["", "enqueue_once"])
def test_arguments_that_cannot_be_converted_fail_as_in_celery(
    app: Celery, make: Callable[..., Any], options: dict[str, Any]
) -> None:
    task = make(**options)
    task.delay({"id": "many"})
    (account,) = deliver_all(app)
    assert account.info.state == "FAILURE"
    assert isinstance(account.info.retval, ValidationError)
    assert keys(app) == []


def test_with_pydantic_strict_a_text_is_not_converted_to_a_number(
    app: Celery, make: Callable[..., Any]
) -> None:
    make(pydantic_strict=True)
    app.send_task("ship", ({"id": "1"},))
    (account,) = deliver_all(app)
    assert isinstance(account.info.retval, ValidationError)
