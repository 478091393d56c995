"""The time line of a singleton: its last runs as bars on one axis, which ends now.

Each outcome has a shape of its own beside its colour. A bar is as wide as its run was long, but
never too narrow to be seen.
"""

from __future__ import annotations

from collections import Counter

from celery_singleton_state.history import Entry, Outcome
from celery_singleton_state.store.base import Listed
from celery_singleton_state.text import moments

from .text import moment, safe, span, took

#: The axis is this long, in hundredths of the drawing; a bar at least so wide.
LENGTH = 100.0
NARROWEST = 1.4
HEIGHT = 24

RUNNING = "running"
#: Each outcome's class, and the upper and lower ends of its bar's parts.
SHAPES: dict[str, tuple[str, tuple[tuple[int, int], ...]]] = {
    Outcome.SUCCEEDED: ("ok", ((11, 22),)),
    Outcome.FAILED: ("failed", ((2, 22),)),
    Outcome.RETRIED: ("retried", ((5, 11), (14, 22))),
    Outcome.LOST: ("lost", ((3, 22),)),
    Outcome.SKIPPED: ("other", ((18, 22),)),
    Outcome.DUPLICATE: ("other", ((18, 22),)),
    RUNNING: ("now", ((9, 22),)),
}
#: In the order of the legend.
LEGEND = {
    Outcome.SUCCEEDED: "succeeded",
    Outcome.FAILED: "failed",
    Outcome.RETRIED: "retried",
    Outcome.LOST: "lost",
    Outcome.DUPLICATE: "duplicate",
    RUNNING: "running",
}


def timeline(row: Listed | None, runs: tuple[Entry, ...], now: float) -> str:
    """The drawing, with its axis beneath; nothing where there is nothing to draw."""
    begun = _begun(row)
    # A moment beyond the calendar has no place on the axis.
    runs = tuple(run for run in runs if _has_place(run.started) and _has_place(run.finished))
    if not runs and begun is None:
        return ""
    times = [time for run in runs for time in (run.started, run.finished)]
    times += [] if begun is None else [begun, now]
    start, last = min(times), max(times)
    end, silence = _end(start, last, now)
    scale = LENGTH / (end - start)
    bars = [
        _bar(run.outcome, (run.started - start) * scale, (run.finished - start) * scale, _of(run))
        for run in runs
    ]
    if begun is not None and row is not None:
        bars.append(_unfinished(row, begun, (begun - start) * scale))
    axis = f'<path class="axis" d="M0 {HEIGHT - 1}H{LENGTH / 2 if silence else LENGTH:g}"/>'
    if silence:
        axis += f'<path class="axis gap" d="M{LENGTH / 2:g} {HEIGHT - 1}H{LENGTH:g}"/>'
    return (
        f'<svg class="line" viewBox="0 0 {LENGTH:g} {HEIGHT}" preserveAspectRatio="none" role="img"'
        f' aria-label="{_label(runs, begun, start)}">{axis}{"".join(bars)}</svg>'
        f'<span class="ends">{moment(start, now)} <span>{silence or "now"}</span></span>'
    )


def legend() -> str:
    """The shapes and what they mean."""
    items = "".join(
        f'<li><svg class="key" viewBox="0 0 8 {HEIGHT}" aria-hidden="true">{_shape(outcome, 1, 7)}'
        f"</svg>{word}</li>"
        for outcome, word in LEGEND.items()
    )
    return f'<ul class="legend" aria-label="Outcomes in the time lines">{items}</ul>'


def _end(start: float, last: float, now: float) -> tuple[float, str]:
    """Where the axis ends, and how to say so where it ends before now.

    Runs that were long ago would shrink to a point: then they have the left half, and the right
    one stands for all the time since.
    """
    busy = max(last - start, 1.0)
    if now - last <= busy:
        return max(now, last, start + 1.0), ""
    return start + 2 * busy, f"now, {span(now - last)} later"


def _begun(row: Listed | None) -> float | None:
    """When the run began that has not ended."""
    if row is None or row.expires_in is None or row.acquired_at is None:
        return None
    return row.acquired_at if _has_place(row.acquired_at) else None


def _has_place(epoch: float) -> bool:
    return moments.is_usual(epoch)


def _unfinished(row: Listed, begun: float, left: float) -> str:
    outcome = RUNNING if row.held else Outcome.LOST
    what = "running" if row.held else "not ended, its lease ran out"
    return _bar(
        outcome, left, LENGTH, f"{what}, since {moments.moment(begun)} UTC, fence {row.fence}"
    )


def _bar(outcome: str, left: float, right: float, title: str) -> str:
    left = min(max(0.0, left), LENGTH - NARROWEST)
    right = min(max(right, left + NARROWEST), LENGTH)
    return _shape(outcome, left, right, f"<title>{safe(title)}</title>")


def _shape(outcome: str, left: float, right: float, inside: str = "") -> str:
    name, parts = SHAPES.get(outcome, SHAPES[Outcome.SKIPPED])
    path = "".join(f"M{left:.4g} {top}H{right:.4g}V{bottom}H{left:.4g}z" for top, bottom in parts)
    return f'<path class="{name}" d="{path}">{inside}</path>'


def _of(run: Entry) -> str:
    length = took(run.finished - run.started)
    text = f"{run.outcome}, {moments.moment(run.started)} UTC, took {length}, fence {run.fence}"
    return f"{text}: {run.error}" if run.error else text


def _label(runs: tuple[Entry, ...], begun: float | None, start: float) -> str:
    counts = Counter(run.outcome for run in runs)
    if begun is not None:
        counts["not ended"] = 1
    said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    return safe(f"Runs since {moments.moment(start)} UTC: {said}")
