"""The command ``celery singleton next``: which beat leads, and when each entry is due next."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import click
from celery import Celery
from celery.bin.base import CeleryCommand

from celery_singleton_state.beat.entry import SingletonEntry
from celery_singleton_state.beat.entry_checks import fields_of
from celery_singleton_state.beat.entry_state import EntryState, decode_rows
from celery_singleton_state.beat.leader import Leader
from celery_singleton_state.schedules.due import Schedule, matches_now, next_runs
from celery_singleton_state.schedules.own_rules import has_own_is_due
from celery_singleton_state.text.moments import iso, moment, short_moment
from celery_singleton_state.text.visible import as_printed

from .common import like, load_tasks, one_of, report_errors
from .terminal import print_json, print_table, say, table

#: The largest number of schedule entries that the table for people shows. ``--json`` prints all.
SHOWN = 100
#: The largest value of the option ``--count``.
MOST = 10_000
#: The sort key of a schedule entry that is never due again, so that it comes last.
LAST = datetime.max.replace(tzinfo=UTC)


@click.command("next", cls=CeleryCommand)
@click.argument("entry", required=False)
@click.option(
    *("-n", "--count"),
    type=click.IntRange(1, MOST),
    default=5,
    show_default=True,
    help="How many due times of ENTRY to show.",
)
@click.option("--json", "as_json", is_flag=True, help="For programs: one object.")
@click.pass_context
@report_errors
def next_(context: click.Context, entry: str | None, count: int, as_json: bool) -> None:
    """Show which beat leads and when each entry is due next.

    With ENTRY, a name in beat_schedule, show the next due times of that entry.
    """
    app: Celery = context.obj.app
    if entry is None:
        found = overview(app)
    else:
        found = times_of(app, one_of(app.conf.beat_schedule, entry), count)
    if as_json:
        print_json(_for_programs(found))
    elif entry is None:
        print_overview(found)
    else:
        print_times(found)


def overview(app: Celery) -> dict[str, Any]:
    """Return the records in the store about the leading beat and each schedule entry.

    :raises StoreError: the store is unavailable.
    """
    leader = Leader(app)
    row = leader.row()
    leads = row is not None and row.held
    now = datetime.now(UTC) if row is None else datetime.fromtimestamp(row.read_at, UTC)
    states = sorted(decode_rows(leader.load()).values(), key=_by_next_tick)
    return {
        "name": leader.name,
        "now": now,
        "leader": row.holder if row and leads else None,
        "fence": row.fence if row else 0,
        "leads_since": row.acquired_at if row and leads else None,
        "expires_in": row.expires_in if row and leads else None,
        "entries": [_as_object(state, now) for state in states],
    }


def print_overview(found: dict[str, Any]) -> None:
    """Print the result of :func:`overview` for people."""
    if not found["fence"]:
        say(f"no beat has led {found['name']!r} yet")
        return
    if found["leader"]:
        since = "" if found["leads_since"] is None else f" since {moment(found['leads_since'])} UTC"
        say(f"{found['leader']} leads {found['name']!r}{since}")
    else:
        say(f"no beat leads {found['name']!r}")
    titles = ("entry", "next (UTC)", "late", "last", "runs", "missed", "schedule")
    rows = [
        (
            as_printed(entry["entry"]),
            _short(entry["next_tick"], found["now"]),
            f"{entry['late']:.1f} s" if entry["late"] else "",
            _short(entry["last_tick"], found["now"]),
            str(entry["total_run_count"]),
            str(entry["missed_count"]),
            entry["schedule"],
        )
        for entry in found["entries"][:SHOWN]
    ]
    print_table(table(titles, rows))
    if (more := len(found["entries"]) - SHOWN) > 0:
        say(f"and {more} more; --json has all")


def times_of(app: Celery, name: str, count: int) -> dict[str, Any]:
    """Return the next due times of a schedule entry, and whether the entry is due in this minute.

    The due times of an interval schedule are counted from the next tick that is in the store.

    :param name: the entry's name in ``beat_schedule``.
    :param count: how many due times to return. There are fewer if the schedule ends earlier.
    :raises click.ClickException: there is no such entry, or it is never due.
    :raises ImproperlyConfigured: the entry is not allowed.
    :raises StoreError: the store is unavailable.
    """
    load_tasks(app, are_needed=False)
    schedule = _schedule_of(app, name)
    state = decode_rows(Leader(app).load()).get(name)
    times = []
    # If the schedule's class has an is_due() of its own, do not show the stored next_tick: it is
    # not a due time, but the time at which beat calls is_due() again.
    is_asked = has_own_is_due(schedule)
    if state and state.next_tick and not is_asked and not _has_own_times(schedule):
        times.append(state.next_tick)
    after = state.since if state and is_asked else None
    try:
        if len(times) < count:
            times += next_runs(schedule, count - len(times), times[0] if times else after)
    except ValueError as error:
        # Show the stored tick alone, if there is one: the schedule ends with this tick, or the
        # schedule's class cannot compute later ticks.
        if not times:
            raise click.ClickException(str(error)) from error
    now = matches_now(schedule) if _has_own_times(schedule) else None
    return {"entry": name, "next": times, "matches_now": now}


def print_times(found: dict[str, Any]) -> None:
    """Print the result of :func:`times_of` for people."""
    for due in found["next"]:
        say(f"{due:%Y-%m-%d %H:%M:%S %Z}")
    if found["matches_now"]:
        say("it is due in this minute")


def _schedule_of(app: Celery, name: str) -> Schedule:
    entries = app.conf.beat_schedule
    if name not in entries:
        raise click.ClickException(
            f"beat_schedule has no entry '{as_printed(name)}'{like(name, entries)}"
        )
    fields = fields_of({name: entries[name]})[name]
    return SingletonEntry(**fields | {"name": name, "app": app}).schedule


def _has_own_times(schedule: Schedule) -> bool:
    try:
        matches_now(schedule)
    except ValueError:
        return False
    return True


def _by_next_tick(state: EntryState) -> tuple[datetime, str]:
    return state.next_tick or LAST, state.entry


def _as_object(state: EntryState, now: datetime) -> dict[str, Any]:
    late = (now - state.next_tick).total_seconds() if state.next_tick else 0.0
    return {name: getattr(state, name) for name in state.__struct_fields__} | {
        "late": max(0.0, late)
    }


def _for_programs(found: dict[str, Any]) -> dict[str, Any]:
    since = found.get("leads_since")
    return found if since is None else found | {"leads_since": iso(since)}


def _short(at: datetime | None, now: datetime) -> str:
    return short_moment(at.timestamp(), now.timestamp()) if at else "-"
