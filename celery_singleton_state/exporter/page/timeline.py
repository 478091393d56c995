"""The geometry of a singleton's time line: its last runs as bars on one axis, which ends now.

Each outcome has its own shape as well as its own colour. A bar's width is the run's duration, but
a bar is always wide enough to be seen.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from celery_singleton_state.history import Entry, Outcome
from celery_singleton_state.store.base import Listed
from celery_singleton_state.text import moments

#: The size of the drawing in SVG units. The browser stretches the drawing to the column's width.
LENGTH, HEIGHT = 100, 24
#: The smallest width of a bar, in SVG units.
NARROWEST = 1.4

RUNNING = "running"
#: Maps each outcome to its CSS class and to the parts of its bar: the upper and the lower end of
#: each part, in SVG units.
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

    :param kind: the path's CSS class.
    :param path: the outline as an SVG path.
    :param title: the text that appears when the pointer rests on the path.
    """

    kind: str
    path: str
    title: str = ""


class TimeLine(NamedTuple):
    """The drawing of one singleton's last runs.

    :param label: a description in words, for screen readers.
    :param axis: the axis. Its right half is dashed if it stands for a long time without a run.
    :param bars: one bar for each run.
    :param start: when the axis begins, in seconds since the epoch.
    :param end: the text at the end of the axis, such as ``now``.
    """

    label: str
    axis: tuple[Shape, ...]
    bars: tuple[Shape, ...]
    start: float
    end: str


def timeline(row: Listed | None, runs: tuple[Entry, ...], now: float) -> TimeLine | None:
    """Return the time line of one singleton; ``None`` if there is no run to draw."""
    begun = _begun(row)
    # Leave out runs with a time that no calendar has, such as infinity: the axis cannot show it.
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
    """Return the time at which the axis ends, and the text at that end.

    On an axis that is true to scale, runs that ended long ago would shrink to a point. So such runs
    get the left half of the axis, and the right half stands for all the time since the last run.
    The text is empty if the axis is true to scale.
    """
    busy = max(last - start, 1.0)
    if now - last <= busy:
        return max(now, last, start + 1.0), ""
    return start + 2 * busy, f"now, {moments.span(now - last)} later"


def _begun(row: Listed | None) -> float | None:
    """Return when the unfinished run began; ``None`` if there is no unfinished run."""
    if row is None or row.expires_in is None or row.acquired_at is None:
        return None
    return row.acquired_at if moments.is_usual(row.acquired_at) else None


def _unfinished(row: Listed, begun: float, left: float) -> Shape:
    outcome = RUNNING if row.held else Outcome.LOST
    what = "running" if row.held else "not ended, its lease has expired"
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


#: The legend of the time line: one shape for each outcome.
LEGEND = tuple(
    _shape(outcome, 1, 7, outcome)
    for outcome in (
        *(Outcome.SUCCEEDED, Outcome.FAILED, Outcome.RETRIED, Outcome.LOST, Outcome.DUPLICATE),
        RUNNING,
    )
)
