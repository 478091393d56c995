"""A program whose task's body forks: ``python -m tests.apps.forking <url> <how> <notes>``.

The child does what ``how`` says, returns from the body, and exits like any program, with all
destructors. The parent waits until the child has exited, and then goes on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from celery import Celery
from sqlalchemy.exc import DBAPIError

from celery_singleton_state import KeyValueStore, SingletonTask, singleton_task


@dataclass
class Counter:
    n: int = 0


URL, HOW, NOTES = sys.argv[1:]
PARENT = os.getpid()

app = Celery("shop", set_as_current=False)
app.conf.update(singleton_store_url=URL, singleton_auto_migrate=True)


def note(event: str) -> None:
    who = "parent" if os.getpid() == PARENT else "child"
    with Path(NOTES).open("a") as notes:
        notes.write(f"{who} {event}\n")


class Leading(SingletonTask[Any]):
    abstract = True

    def on_lose_leadership(self) -> None:
        note("leads no longer")


def use(self: Any, connection: Any) -> None:
    """Try every use of the run that the child has inherited from its parent; note which uses are
    refused.
    """

    def checkpoint() -> None:
        self.checkpoint()

    def transaction() -> None:
        with self.transaction():
            pass

    def statement() -> None:
        connection.exec_driver_sql("DELETE FROM written")

    for attempt in (
        (checkpoint, transaction, statement) if connection else (checkpoint, transaction)
    ):
        try:
            attempt()
        except (RuntimeError, DBAPIError):
            note(f"is refused: {attempt.__name__}")


def use_its_own(self: Any, connection: Any) -> None:
    """Use a key-value store that the child opens itself, as a program may in any process."""
    kv = KeyValueStore.from_app(app)
    if not (connection and URL.startswith("sqlite")):  # the parent has SQLite's lock
        kv.set("of the child", 1)
    note("has its own")


def leave(self: Any, connection: Any) -> None:
    sys.exit(0)


def fail(self: Any, connection: Any) -> None:
    raise LookupError


def come_back(self: Any, connection: Any) -> None:
    pass


WAYS: dict[str, Callable[[Any, Any], None]] = {
    way.__name__: way for way in (use, use_its_own, leave, fail, come_back)
}


@singleton_task(app, state_schema=Counter, base=Leading, name="forks", persist_on_error=True)
def forks(self: SingletonTask[Counter]) -> None:
    way, _, within = HOW.partition(" in ")
    self.state.n += 1
    self.checkpoint()
    with self.transaction() if within else nullcontext() as connection:
        if connection is not None:
            connection.exec_driver_sql("INSERT INTO written VALUES (1)")
        child = os.fork()
        if not child:
            self.state.n = -1
            WAYS[way](self, connection)
            return
        os.waitpid(child, 0)
        self.state.n += 1
        if connection is not None:
            connection.exec_driver_sql("INSERT INTO written VALUES (2)")
    self.checkpoint()
    self.state.n += 1


def main() -> None:
    try:
        forks()
    except (LookupError, RuntimeError) as error:
        note(type(error).__name__)
        return
    note("succeeds")


main()
