"""Not run but type-checked: what the decorator and the base class promise about types."""

from dataclasses import dataclass
from typing import assert_type

from celery import Celery
from celery.result import AsyncResult

from celery_singleton_state import KeyValueStore, SingletonTask, singleton_task


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

store = KeyValueStore("memory://").for_schema(Cursor)
assert_type(store.get("a"), Cursor | None)
