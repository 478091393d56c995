"""The geometry of a singleton's time line: its last runs as bars on one axis, which ends now.

Each outcome has a shape of its own beside its colour. A bar is as wide as its run was long, but
never too narrow to be seen.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from celery_singleton_state.history import Entry, Outcome
from celery_singleton_state.store.base import Listed
from celery_singleton_state.text import moments

#: The size of the drawing, whose units are stretched, and the least width of a bar in it.
LENGTH, HEIGHT = 100, 24
NARROWEST = 1.4

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


class Shape(NamedTuple):
    """One filled path of a drawing.

    :param kind: its CSS class.
    :param path: its outline, as SVG takes it.
    """

    kind: str
    path: str
    title: str = ""


class TimeLine(NamedTuple):
    """One drawing.

    :param label: its contents in words.
    :param axis: the axis, whose second half is dashed if it stands for a long silence.
    :param start: when the axis begins, in seconds since the epoch.
    :param end: when the axis ends, in words.
    """

    label: str
    axis: tuple[Shape, ...]
    bars: tuple[Shape, ...]
    start: float
    end: str


def timeline(row: Listed | None, runs: tuple[Entry, ...], now: float) -> TimeLine | None:
    """The time line of one singleton; ``None`` if there is nothing to draw."""
    begun = _begun(row)
    # A moment beyond the calendar has no place on the axis.
    runs = tuple(
        run for run in runs if moments.is_usual(run.started) and moments.is_usual(run.finished)
    )
    if not runs and begun is None:
        return None
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
    label = _label(runs, begun, start)
    return TimeLine(label, _axis(bool(silence)), tuple(bars), start, silence or "now")


def _axis(is_broken: bool) -> tuple[Shape, ...]:
    bottom, middle = HEIGHT - 1, LENGTH // 2
    if not is_broken:
        return (Shape("axis", f"M0 {bottom}H{LENGTH}"),)
    return (
        Shape("axis", f"M0 {bottom}H{middle}"),
        Shape("axis gap", f"M{middle} {bottom}H{LENGTH}"),
    )


def _end(start: float, last: float, now: float) -> tuple[float, str]:
    """Where the axis ends, and how to say so if it ends before now.

    Runs that ended long ago would shrink to a point. So they get the left half of the axis, and
    the right half stands for all the time since then.
    """
    busy = max(last - start, 1.0)
    if now - last <= busy:
        return max(now, last, start + 1.0), ""
    return start + 2 * busy, f"now, {moments.span(now - last)} later"


def _begun(row: Listed | None) -> float | None:
    """When the run began that has not ended."""
    if row is None or row.expires_in is None or row.acquired_at is None:
        return None
    return row.acquired_at if moments.is_usual(row.acquired_at) else None


def _unfinished(row: Listed, begun: float, left: float) -> Shape:
    outcome = RUNNING if row.held else Outcome.LOST
    what = "running" if row.held else "not ended, its lease ran out"
    return _bar(
        outcome, left, LENGTH, f"{what}, since {moments.moment(begun)} UTC, fence {row.fence}"
    )


def _bar(outcome: str, left: float, right: float, title: str) -> Shape:
    left = min(max(0.0, left), LENGTH - NARROWEST)
    right = min(max(right, left + NARROWEST), LENGTH)
    return _shape(outcome, left, right, title)


def _shape(outcome: str, left: float, right: float, title: str) -> Shape:
    kind, parts = SHAPES.get(outcome, SHAPES[Outcome.SKIPPED])
    x, end = f"{left:.4g}", f"{right:.4g}"
    outlines = [f"M{x} {top}H{end}V{bottom}H{x}z" for top, bottom in parts]
    return Shape(kind, "".join(outlines), title)


def _of(run: Entry) -> str:
    length = moments.took(run.finished - run.started)
    text = f"{run.outcome}, {moments.moment(run.started)} UTC, took {length}, fence {run.fence}"
    return f"{text}: {run.error}" if run.error else text


def _label(runs: tuple[Entry, ...], begun: float | None, start: float) -> str:
    counts = Counter(run.outcome for run in runs)
    if begun is not None:
        counts["not ended"] = 1
    said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    return f"Runs since {moments.moment(start)} UTC: {said}"


#: The shape of each outcome, in the order of the legend.
LEGEND = tuple(
    _shape(outcome, 1, 7, outcome)
    for outcome in (
        *(Outcome.SUCCEEDED, Outcome.FAILED, Outcome.RETRIED, Outcome.LOST, Outcome.DUPLICATE),
        RUNNING,
    )
)
