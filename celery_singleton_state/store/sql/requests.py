"""The requests that processes other than the lease's holder can make on a row of an SQL store, such
as asking for a handoff, noting a pending run, or noting a message as queued.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import msgspec

from celery_singleton_state.store.base import NewValue, Queued, Row
from celery_singleton_state.store.odd_values import text, whole_number
from celery_singleton_state.text.storable import restored, storable

from .statements import Statements

#: A function that runs a statement with its parameters, and returns its rows.
Rows = Callable[[str, Mapping[str, Any]], Sequence[tuple[Any, ...]]]
#: A function that runs a statement with its parameters, and returns the number of changed rows.
Change = Callable[[str, Mapping[str, Any]], int]

#: A function that returns a task's name in the form in which it is stored. The results are cached,
#: because the few tasks of an app have many runs.
stored_task = lru_cache(1000)(storable)


class SqlRequests:
    """Make requests on rows of an SQL store. Each request is one statement.

    :class:`~celery_singleton_state.store.base.RowRequests` explains the methods.

    :param rows: runs a statement and returns its rows.
    :param change: runs a statement and returns the number of changed rows.
    """

    def __init__(self, sql: Statements, rows: Rows, change: Change) -> None:
        self._sql = sql
        self._rows = rows
        self._change = change

    def request_handoff(
        self, row: Row, handoff_to: str, rank: int | None = None, sent: str | None = None
    ) -> bool:
        rank = row.next_rank if rank is None else rank
        named = _seen(row, handoff_to=storable(handoff_to), rank=rank, sent=sent)
        return self._change(self._sql.request_handoff, named) == 1

    def release_early(self, row: Row) -> bool:
        return self._change(self._sql.release_early, _seen(row)) == 1

    def request_run(self, row: Row, pending_run: str) -> bool:
        return (
            self._change(
                self._sql.request_run, _seen(row, pending_run=pending_run, wanted=row.wanted)
            )
            == 1
        )

    def wanted(self, key: str) -> str | None:
        rows = self._rows(self._sql.wanted, {"key": key})
        return text(rows[0][0]) if rows and rows[0][0] is not None else None

    def pending_run_sent(self, key: str, pending_run: str) -> None:
        self._change(self._sql.pending_run_sent, {"key": key, "pending_run": pending_run})

    def queued(self, key: str) -> Queued:
        rows = self._rows(self._sql.queued, {"key": key})
        if not rows:
            return Queued(0, None)
        number, queued, running = rows[0]
        task_id = queued or running
        task_id = None if task_id is None else restored(text(task_id))
        return Queued(whole_number(number), task_id, not queued and running is not None)

    def claim(
        self,
        key: str,
        task_id: str,
        life: float,
        number: int,
        first: bool = False,
        task: str | None = None,
    ) -> bool:
        named = {"key": key, "task": storable(task), "task_id": storable(task_id), "ttl": life}
        named |= {"number": number, "first": int(first)}
        return bool(self._rows(self._sql.claim, named))

    def expect(self, tasks: Mapping[str, str]) -> None:
        document = [{"key": key, "task": storable(task)} for key, task in tasks.items()]
        self._change(self._sql.expect, {"tasks": msgspec.json.encode(document).decode()})

    def put(self, key: str, row: Row | None, new: NewValue, task: str | None = None) -> bool:
        named = {
            "key": key,
            "task": storable(task),
            "value": new.value,
            "schema_version": new.schema_version,
            "fence": row.fence if row else 0,
            "write": row.write if row else 0,
        }
        return bool(self._rows(self._sql.put, named))

    def dequeue(self, key: str, task_id: str, task: str | None = None) -> None:
        named = {"key": key, "task": storable(task), "task_id": storable(task_id)}
        self._change(self._sql.dequeue, named)


def _seen(row: Row, **more: str | int | None) -> dict[str, Any]:
    return {"key": row.key, "fence": row.fence, "holder": row.holder, **more}
