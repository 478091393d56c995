"""Keep the entries of a beat schedule in an SQL store, each in a row of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from celery_singleton_state.store.base import Lease

from .requests import Rows
from .statements import Statements


class SqlEntries:
    """Read and write the rows of schedule entries in an SQL store.

    :class:`~celery_singleton_state.store.base.Entries` explains the methods.

    :param rows: runs a statement and returns its rows.
    :param run_within: runs the parts of a statement in one transaction; see
        :meth:`~celery_singleton_state.store.sql.store.SqlStore.run_within`.
    """

    def __init__(
        self,
        sql: Statements,
        rows: Rows,
        run_within: Callable[[str, Mapping[str, Any]], bool],
    ) -> None:
        self._sql = sql
        self._rows = rows
        self._run_within = run_within

    def load(self, prefix: str) -> dict[str, str]:
        return dict(self._rows(self._sql.entries, {"prefix": prefix}))

    def record(
        self, lease: Lease, entries: Mapping[str, str], number: int, seen: int
    ) -> float | None:
        document = [{"key": key, "value": value} for key, value in entries.items()]
        order = {"number": number, "seen": seen}
        named = _of(lease, entries=document) | order | {"ttl": lease.ttl}
        rows = self._rows(self._sql.record, named)
        return float(rows[0][0]) if rows else None

    def forget(self, lease: Lease, keys: Sequence[str], number: int, seen: int) -> bool:
        named = _of(lease, keys=keys) | {"number": number, "seen": seen}
        return self._run_within(self._sql.forget, named)


def _of(lease: Lease, **documents: Any) -> dict[str, Any]:
    named = {name: msgspec.json.encode(document).decode() for name, document in documents.items()}
    return {"key": lease.key, "fence": lease.fence, "holder": lease.holder} | named
