"""The app of beats whose schedule is in a Django database.

``TEST_DJANGO_DATABASE`` is that database, as JSON.
"""

from __future__ import annotations

import json
import os

import django
from django.conf import settings

settings.configure(
    DATABASES={"default": json.loads(os.environ["TEST_DJANGO_DATABASE"])},
    INSTALLED_APPS=["django_celery_beat"],
    DEFAULT_AUTO_FIELD="django.db.models.AutoField",
    USE_TZ=True,
    TIME_ZONE="UTC",
)
django.setup()

from django_celery_beat.schedulers import DatabaseScheduler  # noqa: E402

from celery_singleton_state.beat import LeaderMixin  # noqa: E402
from tests.apps.beat_app import app  # noqa: E402

__all__ = ["LeadingScheduler", "app"]


class LeadingScheduler(LeaderMixin, DatabaseScheduler):  # type: ignore[misc]
    """A leading scheduler as a Django project would define it."""
