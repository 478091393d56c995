"""One example of each class of details that hooks receive."""

from __future__ import annotations

from celery_singleton_state.hooks import (
    Acquired,
    Changed,
    Conflicted,
    Details,
    Failed,
    Lost,
    Released,
    Skipped,
    StateLoaded,
    StateSaved,
    TookOver,
    WriteRefused,
)

EXAMPLES: tuple[Details, ...] = tuple(
    kind(singleton="t", key="t", **fields)
    for kind, fields in (
        (Acquired, {"holder": "h:1:a.1", "fence": 3}),
        (TookOver, {"holder": "h:1:a.1", "fence": 3, "how": "died"}),
        (StateLoaded, {"size": 4, "schema_version": None}),
        (StateSaved, {"operation": "save", "size": 9}),
        (WriteRefused, {"operation": "checkpoint"}),
        (Lost, {"holder": "h:1:a.1", "fence": 3, "why": "it ran out", "seconds": 1.5}),
        (
            Released,
            {
                "holder": "h:1:a.1",
                "fence": 3,
                "outcome": "failed",
                "seconds": 0.5,
                "error": "ValueError: no",
            },
        ),
        (Conflicted, {"policy": "skip", "found": "held by h"}),
        (Skipped, {"outcome": "skipped", "why": "skipped: held by h"}),
        (Failed, {"reason": "StateLoadFailed", "detail": "away"}),
        (Changed, {"what": "released", "by": "somebody@host"}),
    )
)
