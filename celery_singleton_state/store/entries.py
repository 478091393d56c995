"""The rows of a schedule's entries, which only their leader writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from .base import Lease
from .statements import Statements
from .wishes import Change, Rows


class SqlEntries:
    """The entries of an SQL store; each verb is one statement.

    :param rows: runs a statement and returns its rows; ``change``: how many rows it changed.
    """

    def __init__(self, sql: Statements, rows: Rows, change: Change) -> None:
        self._sql = sql
        self._rows = rows
        self._change = change

    def load(self, prefix: str) -> dict[str, str]:
        return dict(self._rows(self._sql.entries, {"prefix": prefix}))

    def record(self, lease: Lease, entries: Mapping[str, str]) -> float | None:
        document = [{"key": key, "value": value} for key, value in entries.items()]
        rows = self._rows(self._sql.record, _of(lease, entries=document) | {"ttl": lease.ttl})
        return float(rows[0][0]) if rows else None

    def forget(self, lease: Lease, keys: Sequence[str]) -> None:
        self._change(self._sql.forget, _of(lease, keys=keys))


def _of(lease: Lease, **documents: Any) -> dict[str, Any]:
    named = {name: msgspec.json.encode(document).decode() for name, document in documents.items()}
    return {"key": lease.key, "fence": lease.fence, "holder": lease.holder} | named
