"""The section on beat: who leads, and what comes next."""

from __future__ import annotations

from celery_singleton_state.beat.entry_state import EntryState
from celery_singleton_state.text.visible import as_printed

from .model import ShownBeat
from .text import ago, holder, moment, safe, span

#: Seconds from which a tick counts as late: what a leader needs to send it is less.
LATE = 1.0


def beat(shown: ShownBeat | None, now: float) -> str:
    """The section; a line where no beat led yet."""
    if shown is None:
        inside = '<p class="none">no beat has led yet</p>'
    else:
        inside = _leader(shown, now) + (_upcoming(shown, now) if shown.upcoming else "")
    return f'<section class="beat" aria-labelledby="beat"><h2 id="beat">Beat</h2>{inside}</section>'


def _leader(shown: ShownBeat, now: float) -> str:
    name = f"<b>{safe(shown.name)}</b>"
    if shown.leader is None:
        return (
            f'<p class="leader bad"><b>! nobody leads</b> {name}: no tick is sent until a beat does'
            f"{f' (last fence {shown.fence:,})' if shown.fence else ''}</p>"
        )
    since = ""
    if shown.leads_since is not None:
        since = f" since {moment(shown.leads_since, now)} ({span(now - shown.leads_since)})"
    return (
        f'<p class="leader">{holder(shown.leader)} leads {name}{since}, fence {shown.fence:,}</p>'
    )


def _upcoming(shown: ShownBeat, now: float) -> str:
    rows = "".join(_entry(state, now) for state in shown.upcoming)
    count = f"{len(shown.upcoming):,} of {shown.entries:,} entries, the next to be due first"
    return (
        f'<table class="entries"><caption>{count}</caption><thead><tr>'
        '<th scope="col">entry</th><th scope="col">next tick</th><th scope="col">schedule</th>'
        '<th scope="col">last tick</th><th scope="col" class="number">runs</th>'
        '<th scope="col" class="number">missed</th>'
        f"</tr></thead><tbody>{rows}</tbody></table>"
    )


def _entry(state: EntryState, now: float) -> str:
    name = safe(as_printed(state.entry))
    task = "" if state.task == state.entry else f'<code class="task">{safe(state.task)}</code>'
    last = ago(state.last_tick.timestamp(), now) if state.last_tick else "never"
    missed = f'<b class="warn">{state.missed_count:,}</b>' if state.missed_count else "0"
    kind = "number" if state.missed_count else "number zero"
    return (
        f'<tr><th scope="row"><code class="name"><b>{name}</b></code> {task}</th>'
        f'<td class="next">{_next(state, now)}</td><td class="schedule">{safe(state.schedule)}</td>'
        f'<td class="lasttick"><span class="label">last tick </span>{last}</td>'
        f'<td class="number sent"><span class="label">runs </span>{state.total_run_count:,}</td>'
        f'<td class="{kind}"><span class="label">missed </span>{missed}</td></tr>'
    )


def _next(state: EntryState, now: float) -> str:
    if state.next_tick is None:
        return '<span class="dim">never due again</span>'
    due = state.next_tick.timestamp()
    if now - due >= LATE:
        wait = f'<b class="bad">! late by {span(now - due)}</b>'
    else:
        wait = "due now" if due <= now else f"in {span(due - now)}"
    return f'{wait} <span class="dim">{moment(due, now)}</span>'
