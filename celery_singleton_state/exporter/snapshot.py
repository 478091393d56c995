"""One look at the store: what it holds of all singletons, and of the beats' lease."""

from __future__ import annotations

from dataclasses import dataclass

from celery_singleton_state.beat.leader import key_of
from celery_singleton_state.health import Health, evaluate
from celery_singleton_state.runtime import Runtime
from celery_singleton_state.store.base import Listed, StoreError


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What was seen; one statement.

    :param rows: of the singletons, by name.
    :param leader: the row of the beats' lease, if any beat ever led.
    :param health: its ``error`` says why nothing was seen.
    """

    rows: dict[str, Listed]
    leader: Listed | None
    health: Health


def take_snapshot(runtime: Runtime) -> Snapshot:
    """Look now. A store that is out of reach is an answer, too."""
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
