"""Texts and times, made safe and short for the page."""

from __future__ import annotations

import html

from celery_singleton_state.text import moments
from celery_singleton_state.text.visible import visible

#: Seconds that are still counted in days.
_LONGEST = 1e15


def safe(text: object) -> str:
    """Any text as HTML, for an element or a quoted attribute; every one that is not ours goes
    through here.
    """
    return html.escape(visible(str(text), keep="\t\n"))


def span(seconds: float) -> str:
    """A length of time in one unit, to two digits or so; tenths of a second would only flicker."""
    if not abs(seconds) < _LONGEST:
        return moments.seconds(seconds)
    seconds = max(0.0, seconds)
    for unit, length, most in (("s", 1, 120), ("min", 60, 120 * 60), ("h", 3600, 48 * 3600)):
        if seconds < most:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:,.0f} d"


def took(seconds: float) -> str:
    """How long a run took, which is often less than a second."""
    return f"{max(0.0, seconds):.2g} s" if seconds < 9.5 else span(seconds)


def ago(then: float, now: float) -> str:
    return "just now" if now - then < 1 else f"{span(now - then)} ago"


def moment(epoch: float, now: float) -> str:
    """A time in UTC, without what goes without saying: the day where it is today's."""
    short, whole = moments.short_moment(epoch, now), moments.moment(epoch)
    if not moments.is_usual(epoch):
        return f'<span title="{whole} UTC">{short}</span>'
    return f'<time datetime="{whole}Z" title="{whole} UTC">{short}</time>'


def holder(name: str) -> str:
    """A lease's holder: where it runs stands out from what tells two of them apart."""
    node, *rest = name.rsplit(":", 2)
    tail = "".join(f":{each}" for each in rest)
    return f'<code class="holder">{safe(node)}<wbr><span class="dim">{safe(tail)}</span></code>'


def plural(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"
