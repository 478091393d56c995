"""Type checks of the decorator and the base class. mypy reads this file; no test runs it."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Unpack, assert_type

from celery import Celery
from celery.result import AsyncResult

from celery_singleton_state import KeyValueStore, SingletonTask, TaskOptions, singleton_task


@dataclass
class Cursor:
    last_id: int = 0


app = Celery("shop")


@singleton_task(app, state_schema=Cursor, unique_on=["tenant"])
def import_orders(self: SingletonTask[Cursor], tenant: str, limit: int = 10) -> int:
    assert_type(self.state, Cursor)
    assert_type(self.fence, int)
    assert_type(self.lease_remaining, float)
    self.state.last_id += limit
    self.checkpoint()
    with self.transaction() as connection:
        connection.exec_driver_sql("SELECT 1")
    return self.state.last_id


@singleton_task(app)
def without_state(self, name: str) -> None:  # type: ignore[no-untyped-def]
    pass


assert_type(import_orders.delay("acme", limit=3), AsyncResult[int | None])
assert_type(import_orders("acme"), int | None)
assert_type(import_orders.state, Cursor)
import_orders.delay(3)  # type: ignore[arg-type]
without_state.delay("x")
without_state.delay()  # type: ignore[call-arg]


# mypy knows the options of Celery and of this package by their names and types ...
def body(self: SingletonTask[Cursor], tenant: str) -> int:
    return len(tenant)


both = singleton_task(
    app,
    name="shop.both",
    queue="imports",
    acks_late=True,
    max_retries=None,
    autoretry_for=(OSError,),
    retry_backoff=2,
    rate_limit="10/m",
    soft_time_limit=30,
    serializer="json",
    ignore_result=True,
    pydantic=True,
    shared=False,
    state_schema=Cursor,
    initial_state=Cursor,
    on_conflict="wait",
    expected_interval=timedelta(hours=1),
)(body)
assert_type(both.state, Cursor)
both.delay("acme")
both.delay(3)  # type: ignore[arg-type]

# ... so a misspelt name or value, or a state of another type, is an error.
singleton_task(app, on_conflit="wait")(body)  # type: ignore[call-arg]
singleton_task(app, ack_late=True)(body)  # type: ignore[call-arg]
singleton_task(app, on_conflict="wiat")(body)  # type: ignore[arg-type]
singleton_task(app, hold_at_least="1 min")(body)  # type: ignore[arg-type]
singleton_task(app, state_schema=Cursor, initial_state=3)(body)  # type: ignore[arg-type]


# A user's own decorator accepts the same options.
def nightly(**options: Unpack[TaskOptions[Cursor]]) -> SingletonTask[Cursor, [str], int]:
    options.setdefault("expected_interval", 86400)
    return singleton_task(app, **options)(body)


assert_type(nightly(on_conflict="raise").state, Cursor)
nightly(on_conflit="raise")  # type: ignore[call-arg]

# mypy cannot check options that are known only at run time; the decorator does.
anything: dict[str, Any] = {"on_conflict": "raise"}
singleton_task(app, **anything)(body)

store = KeyValueStore("memory://").for_schema(Cursor)
assert_type(store.get("a"), Cursor | None)
