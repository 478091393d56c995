"""The app of beats whose scheduler keeps its schedule in a file."""

from __future__ import annotations

import os
from datetime import timedelta

from celery.beat import PersistentScheduler

from celery_singleton_state.beat import LeaderMixin
from tests.apps.beat_app import app

__all__ = ["LeadingScheduler", "app"]


class LeadingScheduler(LeaderMixin, PersistentScheduler):
    """Celery's own scheduler with ``LeaderMixin``: one of several beats leads.

    ``TEST_AGE_FILE`` makes the last runs in the scheduler's file older by this many seconds.
    """

    def setup_schedule(self) -> None:
        super().setup_schedule()
        for entry in self.schedule.values():
            entry.last_run_at -= timedelta(seconds=float(os.environ.get("TEST_AGE_FILE", "0")))
