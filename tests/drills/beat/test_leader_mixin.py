"""``LeaderMixin`` over django-celery-beat's ``DatabaseScheduler`` and Celery's own scheduler."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url

from tests.helpers.fleet import ROOT, Beat, Fleet
from tests.helpers.waiting import wait_until

DJANGO = "tests.apps.django_app"
PERSISTENT = "tests.apps.persistent_app"

SETUP = f"""
import {DJANGO}
from datetime import timedelta
from django.core.management import call_command
from django.utils import timezone
from django_celery_beat.models import (
    ClockedSchedule, CrontabSchedule, IntervalSchedule, PeriodicTask
)
now = timezone.now()

def every(seconds):
    return IntervalSchedule.objects.get_or_create(every=seconds, period="seconds")[0]

def task(name, interval, **fields):
    args = '["%s"]' % name
    PeriodicTask.objects.create(name=name, task="plain", interval=interval, args=args, **fields)
"""


class Project:
    """A fleet whose schedule is in a Django database."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet

    def run(self, code: str) -> str:
        """Run code as in ``manage.py shell``; return its output."""
        ran = subprocess.run(
            [sys.executable, "-c", SETUP + code],
            env=self.fleet.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    def beat(self, host: str) -> Beat:
        return self.fleet.start_beat(DJANGO, scheduler=f"{DJANGO}:LeadingScheduler", host=host)

    def beats(self) -> tuple[Beat, Beat]:
        """Start two beats; return the beat that leads and the beat that stands by."""
        one = self.beat("1")
        one.wait_leads()
        other = self.beat("2")
        other.wait_stands_by()
        return one, other

    def count(self, name: str) -> int:
        return counts(self.fleet)[name]

    def wait_for(self, name: str, more: int = 1) -> None:
        """Wait until an entry has run ``more`` times more."""
        before = self.count(name)
        wait_until(lambda: self.count(name) >= before + more, f"{name} runs")


def counts(fleet: Fleet) -> Counter[str]:
    return Counter(note["entry"] for note in fleet.notes("tick"))


def doubled(fleet: Fleet) -> list[str]:
    """Return the ids of the messages that ran more than once."""
    ids = Counter(note["id"] for note in fleet.notes("tick"))
    return [task_id for task_id, n in ids.items() if n > 1]


@pytest.fixture
def make_project(
    request: pytest.FixtureRequest, make_fleet: Callable[..., Fleet], tmp_path: Path
) -> Callable[[str], Project]:
    """A function that makes a Django project with its tables, and a store on the same kind of
    database.
    """

    def make(kind: str) -> Project:
        if kind == "sqlite":
            store = f"sqlite:///{tmp_path}/store.db"
            database: dict[str, Any] = {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": f"{tmp_path}/django.db",
                # Lock the file at the start, because a transaction that reads before it writes
                # cannot wait for another writer.
                "OPTIONS": {"timeout": 10, "transaction_mode": "IMMEDIATE"},
            }
        else:
            store = request.getfixturevalue("postgres_url")
            url = make_url(store)
            database = {
                "ENGINE": "django.db.backends.postgresql",
                "NAME": url.database,
                "HOST": url.host,
                "PORT": url.port,
                "USER": url.username,
            }
        fleet = make_fleet(
            store, TEST_DJANGO_DATABASE=json.dumps(database), CELERY_SINGLETON_HEARTBEAT_INTERVAL=1
        )
        project = Project(fleet)
        project.run("call_command('migrate', verbosity=0)")
        fleet.start("-P", "solo", app="tests.apps.beat_app")
        return project

    return make


@pytest.fixture(params=["sqlite", "postgresql"])
def any_project(request: pytest.FixtureRequest, make_project: Callable[[str], Project]) -> Project:
    return make_project(request.param)


@pytest.fixture
def project(make_project: Callable[[str], Project]) -> Project:
    return make_project("sqlite")


def test_a_tick_that_a_dead_leader_sent_is_not_sent_again(any_project: Project) -> None:
    """The leader sends an entry that is due once an hour. The leader is killed before its scheduler
    writes the last run to the database, which happens only every three minutes. Another beat leads,
    and does not send the entry again. (django-celery-beat #337, #576, celery #1495, #1876)
    """
    project = any_project
    project.run("""
task("often", every(1))
task("hourly", every(3600), last_run_at=now - timedelta(hours=2))
task("once", every(3600), one_off=True, start_time=now - timedelta(minutes=1))
clock = ClockedSchedule.objects.create(clocked_time=now)
task("clock", None, clocked=clock, one_off=True)
""")
    one, other = project.beats()
    for name in ("hourly", "once", "clock"):
        project.wait_for(name, 1 - project.count(name))
    project.wait_for("often", 2)
    one.process.kill()
    other.wait_leads()
    project.wait_for("often", 3)
    assert "Sending due task often" in other.output
    found = counts(project.fleet)
    assert (found["hourly"], found["once"], found["clock"]) == (1, 1, 1)
    # The dead leader may have sent one tick that it could not record before it died.
    assert len(doubled(project.fleet)) <= 1


def test_after_an_orderly_stop_the_other_beat_leads_at_once(project: Project) -> None:
    """The leader stops: its scheduler writes its own data, and the other beat leads at once."""
    project.run("task('often', every(1))")
    one, other = project.beats()
    project.wait_for("often", 2)
    one.stop()
    sent = one.output.count("Sending due task often")
    assert project.run("print(PeriodicTask.objects.get(name='often').total_run_count)") == (
        f"{sent}\n"
    )
    other.wait_leads()
    project.wait_for("often", 2)
    assert doubled(project.fleet) == []


def test_entries_are_edited_while_the_beat_runs(any_project: Project) -> None:
    """Entries are added, made more frequent, disabled and removed. The leading beat follows these
    changes, and so does the beat that leads next.
    """
    project = any_project
    project.run("""
task("kept", every(1))
task("changed", every(3600), last_run_at=now)
task("disabled", every(1))
task("removed", every(1))
""")
    one, other = project.beats()
    for name in ("kept", "disabled", "removed"):
        project.wait_for(name)
    project.run("""
task("added", every(1))
changed = PeriodicTask.objects.get(name="changed")
changed.interval = every(1)
changed.save()
disabled = PeriodicTask.objects.get(name="disabled")
disabled.enabled = False
disabled.save()
PeriodicTask.objects.get(name="removed").delete()
""")
    project.wait_for("added", 2)
    project.wait_for("changed", 2)
    gone = {name: project.count(name) for name in ("disabled", "removed")}
    one.stop()
    other.wait_leads()
    for name in ("kept", "added", "changed"):
        project.wait_for(name, 2)
    assert {name: project.count(name) for name in gone} == gone
    assert doubled(project.fleet) == []


def test_a_leader_that_was_stopped_sends_and_writes_nothing_more(project: Project) -> None:
    """The leader is paused until another beat leads, and then resumed. The old leader stands by."""
    project.run("task('often', every(1))")
    one, other = project.beats()
    project.wait_for("often", 2)
    one.process.send_signal(signal.SIGSTOP)
    before = len(one.output)
    other.wait_leads()
    project.wait_for("often", 2)
    one.process.send_signal(signal.SIGCONT)
    wait_until(lambda: "beat stands by" in one.output[before:], "the beat stands by")
    # The leader may have been paused just before it sent this one tick.
    assert one.output[before:].count("Sending due task") <= 1
    project.wait_for("often", 2)
    one.stop()
    other.stop()
    sent = sum(beat.output.count("Sending due task often") for beat in (one, other))
    count = int(project.run("print(PeriodicTask.objects.get(name='often').total_run_count)"))
    assert sent - 1 <= count <= sent


def test_a_crash_between_sending_and_recording(project: Project) -> None:
    """The leader sends a message and dies before the leader or its scheduler has recorded the tick.
    The next leader sends the message again, with the same id.
    """
    project.run("""
task("first", every(3600), last_run_at=now - timedelta(hours=2))
task("slow", every(3600), last_run_at=now - timedelta(seconds=3597))
""")
    one = project.fleet.start_beat(
        DJANGO, scheduler=f"{DJANGO}:LeadingScheduler", host="1", TEST_CRASH="slow"
    )
    assert one.process.wait(timeout=30) == -signal.SIGKILL
    other = project.beat("2")
    other.wait_leads()
    project.wait_for("slow", 2 - project.count("slow"))
    first, second = (note for note in project.fleet.notes("tick") if note["entry"] == "slow")
    assert first["id"] == second["id"]
    assert first["due"] == second["due"]


def test_two_beats_with_schedule_files_of_their_own(
    make_fleet: Callable[..., Fleet], tmp_path: Path
) -> None:
    """Celery's own scheduler keeps last runs in a file, and each of the two beats has a file of its
    own. One beat sends an entry that is due once an hour. Then the other beat leads, and does not
    send this entry again.
    """
    schedule = {
        "often": {"task": "plain", "schedule": 1.0},
        "hourly": {"task": "plain", "schedule": 3600.0},
    }
    fleet = make_fleet(
        f"sqlite:///{tmp_path}/store.db",
        TEST_SCHEDULE=json.dumps(schedule),
        CELERY_SINGLETON_HEARTBEAT_INTERVAL=1,
    )
    fleet.start("-P", "solo", app=PERSISTENT)

    def beat(host: str, **environment: str) -> Beat:
        return fleet.start_beat(
            PERSISTENT, scheduler=f"{PERSISTENT}:LeadingScheduler", host=host, **environment
        )

    # The hourly entry would be due now by the beats' files, which are older than the store's
    # record.
    one = beat("1", TEST_AGE_FILE="7200")
    one.wait_leads()
    other = beat("2", TEST_AGE_FILE="7200")
    other.wait_stands_by()
    wait_until(
        lambda: counts(fleet)["hourly"] and counts(fleet)["often"] >= 2, "both entries have run"
    )
    os.kill(one.process.pid, signal.SIGKILL)
    one.process.wait(timeout=30)
    other.wait_leads()
    before = counts(fleet)["often"]
    wait_until(lambda: counts(fleet)["often"] >= before + 3, "the other beat sends")
    assert counts(fleet)["hourly"] == 1
    assert len(doubled(fleet)) <= 1
    other.stop()
    assert "Traceback" not in other.output


def test_a_missing_table_ends_the_beat_with_a_message(project: Project) -> None:
    beat: Any = project.fleet.start_beat(
        DJANGO,
        scheduler=f"{DJANGO}:LeadingScheduler",
        CELERY_SINGLETON_AUTO_MIGRATE="0",
        CELERY_SINGLETON_TABLE="elsewhere",
    )
    assert beat.process.wait(timeout=30) != 0
    assert "singleton migrate" in beat.output
