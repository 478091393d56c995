"""Faults planted in the package on purpose, which the checker of a storm must find."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from celery_singleton_state.run.writes import FencedWriter
from celery_singleton_state.store.base import Lease
from celery_singleton_state.store.sql.postgresql import PostgresqlStatements
from celery_singleton_state.store.sql.store import SqlStore


def without_fence() -> None:
    """Break the fence: accept every write without comparing fences in the row or checking the run's
    lease.
    """
    make = PostgresqlStatements.__init__

    def break_open(statement: str, *, writes: bool = True) -> str:
        checked = ["AND fence = %(fence)s AND holder = %(holder)s"]
        checked += ["AND write BETWEEN %(seen)s AND %(number)s"] if writes else []
        for guard in checked:
            assert guard in statement
            statement = statement.replace(guard, "")
        return statement

    def make_broken(self: Any, *args: Any) -> None:
        make(self, *args)
        self.save = break_open(self.save)
        self.save_and_release = break_open(self.save_and_release)
        self.release = break_open(self.release, writes=False)

    PostgresqlStatements.__init__ = make_broken  # type: ignore[method-assign]
    FencedWriter.refuse_if_lost = lambda self: None  # type: ignore[method-assign]


def without_renewal() -> None:
    """Break the renewal: report every lease as renewed, and renew none."""

    def renew(self: SqlStore, leases: Sequence[Lease]) -> dict[str, str | None]:
        return {lease.key: None for lease in leases}

    SqlStore.renew = renew  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[], None]] = {
    "": lambda: None,
    "without fence": without_fence,
    "without renewal": without_renewal,
}


def plant(fault: str) -> None:
    FAULTS[fault]()
