"""The table of singletons: who runs where, since when, with which fence, and what is wrong."""

from __future__ import annotations

from typing import NamedTuple

from celery_singleton_state.history import Outcome, is_run
from celery_singleton_state.store.base import Listed
from celery_singleton_state.text.visible import as_printed

from .model import Page, ShownSingleton
from .text import ago, holder, moment, plural, safe, span, took
from .timeline import legend, timeline

#: Of a state, so many characters are shown.
LONGEST_VALUE = 2_000
FAILING = frozenset({Outcome.FAILED, Outcome.LOST})
SIGNS: dict[str, tuple[str, str]] = {
    Outcome.SUCCEEDED: ("ok", "✓"),
    Outcome.FAILED: ("bad", "✕"),
    Outcome.LOST: ("bad", "✕"),
    Outcome.RETRIED: ("warn", "↻"),
}


class Word(NamedTuple):
    """A word, and how it is seen at a glance: by its colour and by a sign."""

    kind: str
    sign: str
    word: str


def singletons(page: Page) -> str:
    """The section with all that are shown."""
    return (
        '<section aria-labelledby="singletons"><div class="over">'
        f'<h2 id="singletons">Singletons</h2><p class="count">{_count(page)}</p>'
        f"{legend() if page.shown else ''}</div>"
        f"{_table(page) if page.shown else _none(page)}</section>"
    )


def _count(page: Page) -> str:
    shown, total = len(page.shown), page.total
    matching = f" matching <q>{safe(page.query)}</q>" if page.query else ""
    if total > shown:
        return f"{shown:,} of {total:,}{matching} shown, filter for others"
    return f"all {total:,}{matching} shown" if total else ""


def _none(page: Page) -> str:
    if page.query:
        return f'<p class="none">no singleton matches <q>{safe(page.query)}</q></p>'
    return '<p class="none">no singleton has run yet</p>'


def _table(page: Page) -> str:
    rows = "".join(_row(each, page.now) for each in page.shown)
    return (
        '<table class="singletons"><caption class="unseen">Singletons, the worst first</caption>'
        "<thead><tr>"
        '<th scope="col">health</th><th scope="col">singleton</th><th scope="col">lease</th>'
        '<th scope="col" class="number">fence</th><th scope="col">last run</th>'
        f'<th scope="col">recent runs</th></tr></thead><tbody>{rows}</tbody></table>'
    )


def _row(shown: ShownSingleton, now: float) -> str:
    marks = _marks(shown)
    row = shown.row
    return (
        f'<tr class="{marks[0].kind}"><td class="marks">{"".join(map(_mark, marks))}</td>'
        f'<th scope="row">{_name(shown)}{_reason(shown)}{_value(shown)}</th>'
        f'<td class="lease">{_lease(row, now)}</td>'
        f'<td class="number fence">{_fence(row)}</td>'
        f'<td class="last">{_last(shown, now)}</td>'
        f'<td class="runs">{timeline(row, shown.runs, now)}</td></tr>'
    )


def _marks(shown: ShownSingleton) -> list[Word]:
    """In a word or two what to know of it, the worst first."""
    row, marks = shown.row, []
    if not shown.health.healthy:
        marks.append(Word("bad", "!", "late"))
    if row is not None and row.last_outcome in FAILING:
        marks.append(Word("bad", "✕", "failing"))
    if row is not None and row.acquired_at is not None and not row.held:
        marks.append(Word("warn", "!", "lease ran out"))
    if row is not None and row.held and not row.held_on:
        marks.append(Word("run", "▶", "running"))
    return marks or [Word("ok", "✓", "healthy")]


def _mark(mark: Word) -> str:
    return _signed("mark", mark) + " "


def _signed(part: str, word: Word) -> str:
    sign = f'<span aria-hidden="true">{word.sign}</span>'
    return f'<span class="{part} {word.kind}">{sign} {safe(word.word)}</span>'


def _name(shown: ShownSingleton) -> str:
    """The whole name, as the commands take it, with the arguments set off from the task."""
    name, task = shown.health.singleton, shown.health.task
    head = task if name.startswith(task) else name
    printed, bold = as_printed(name), as_printed(head)
    if not printed.startswith(bold):
        bold = printed
    rest = printed[len(bold) :]
    arguments = f'<span class="arguments">{safe(rest)}</span>' if rest else ""
    return f'<code class="name"><b>{safe(bold)}</b>{arguments}</code>'


def _reason(shown: ShownSingleton) -> str:
    """Why it is unhealthy; of a healthy one the last run says it already."""
    never_ran = shown.row is None or shown.row.last_finished_at is None
    if shown.health.healthy and not never_ran:
        return ""
    kind = "dim" if shown.health.healthy else "bad"
    return f'<span class="why {kind}">{safe(shown.health.reason)}</span>'


def _value(shown: ShownSingleton) -> str:
    if shown.value is None:
        return ""
    cut, more = shown.value[:LONGEST_VALUE], len(shown.value) - LONGEST_VALUE
    rest = f"\n… and {more:,} characters more" if more > 0 else ""
    return (
        f'<details data-keep="{safe(shown.health.singleton)}"><summary>state</summary>'
        f"<pre>{safe(cut)}{rest}</pre></details>"
    )


def _lease(row: Listed | None, now: float) -> str:
    if row is None or row.expires_in is None or row.acquired_at is None:
        if row is not None and row.held_on:
            return (
                f'<span class="dim">kept after its run, free in {span(row.expires_in or 0)}</span>'
            )
        return '<span class="dim"><span class="label">lease </span>free</span>'
    since = f"since {moment(row.acquired_at, now)} ({span(now - row.acquired_at)})"
    end = f"{span(row.expires_in)} left"
    if not row.held:
        end = f'<b class="warn">ran out {ago(now + row.expires_in, now)}</b>'
    return f'{holder(row.holder or "")}<span class="when">{since}, {end}</span>'


def _fence(row: Listed | None) -> str:
    if row is None or not row.fence:
        return ""
    return (
        f'<span class="label">fence </span>{row.fence:,}'
        f'<span class="when">{plural(row.run_count, "run")}</span>'
    )


def _last(shown: ShownSingleton, now: float) -> str:
    row = shown.row
    if row is None or row.last_outcome is None:
        return '<span class="dim">never ran</span>'
    kind, sign = SIGNS.get(row.last_outcome, ("dim", "-"))
    word = Word(kind, sign, row.last_outcome)
    when = "" if row.last_finished_at is None else ago(row.last_finished_at, now)
    return f'{_signed("outcome", word)} <span class="dim">{when}</span>{_of_last_run(shown)}'


def _of_last_run(shown: ShownSingleton) -> str:
    """What only the history knows of the run that the row tells of."""
    run = next((run for run in reversed(shown.runs) if is_run(run)), None)
    if run is None or shown.row is None or run.outcome != shown.row.last_outcome:
        return ""
    why = f'<span class="error">{safe(run.error)}</span>' if run.error else ""
    return f' <span class="when">took {took(run.finished - run.started)}</span>{why}'
