"""A snapshot of the store: the rows of all singletons, and the lease of the leading beat."""

from __future__ import annotations

from dataclasses import dataclass

from celery_singleton_state.beat.leader import key_of
from celery_singleton_state.health import Health, evaluate
from celery_singleton_state.runtime import Runtime
from celery_singleton_state.store.base import Listed, StoreError


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The contents of the store at one time, read by one statement for each store.

    :param rows: maps each singleton's name to its row.
    :param leader: the row of the leader's lease; ``None`` if no beat has led yet.
    :param health: the singletons' health. Its ``error`` says why the store could not be read.
    """

    rows: dict[str, Listed]
    leader: Listed | None
    health: Health


def take_snapshot(runtime: Runtime) -> Snapshot:
    """Read the store now. If that fails, return a snapshot with an error and no rows."""
    prefix = runtime.settings.key_prefix
    beat = key_of(runtime.settings.beat_name)
    try:
        found = runtime.rows(prefix, also=beat)
    except StoreError as error:
        return Snapshot({}, None, Health((), str(error)))
    rows = [row for row in found if row.key.startswith(prefix)]
    leader = next((row for row in found if row.key == beat), None)
    named = {row.key.removeprefix(prefix): row for row in rows}
    return Snapshot(named, leader, evaluate(runtime, rows))
