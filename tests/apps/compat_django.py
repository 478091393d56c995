"""Check ``compat`` with django-celery-beat. ``test_compat`` runs this file in a process
of its own.
"""

from __future__ import annotations

from typing import Any

import django
from django.conf import settings

settings.configure(
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    INSTALLED_APPS=["django_celery_beat"],
    DEFAULT_AUTO_FIELD="django.db.models.AutoField",
    USE_TZ=True,
    TIME_ZONE="UTC",
)
django.setup()

from celery import Celery  # noqa: E402
from django.core.management import call_command  # noqa: E402
from django_celery_beat.models import IntervalSchedule, PeriodicTask  # noqa: E402
from django_celery_beat.schedulers import DatabaseScheduler  # noqa: E402

from celery_singleton_state import compat  # noqa: E402


def main() -> None:
    call_command("migrate", verbosity=0)
    every = IntervalSchedule.objects.create(every=1, period="days")
    PeriodicTask.objects.create(name="one", task="plain", interval=every)
    scheduler: Any = DatabaseScheduler(app=Celery("compat", broker="memory://", beat_schedule={}))
    assert "one" in scheduler.schedule
    # Use ``update``, because the model's ``save()`` also records that the schedule has changed,
    # which the scheduler would notice.
    PeriodicTask.objects.filter(name="one").update(name="two")
    assert "one" in scheduler.schedule
    compat.read_schedule_anew(scheduler)
    assert "two" in scheduler.schedule
    scheduler.schedule["two"].model.total_run_count = 7
    compat.note_changed(scheduler, "two")
    scheduler.sync()
    assert PeriodicTask.objects.get(name="two").total_run_count == 7


if __name__ == "__main__":
    main()
    print("done")
