"""Texts and times, made safe and short for the page."""

from __future__ import annotations

import html
from datetime import UTC, datetime

#: HTML has no way to write control characters, and they can garble what stands around them.
_UNPRINTABLE = {
    code: 0xFFFD for code in (*range(32), 127, *range(0x80, 0xA0)) if code not in (9, 10)
}


def safe(text: object) -> str:
    """Any text as HTML, for an element or a quoted attribute; every one that is not ours goes
    through here.
    """
    whole = str(text)
    if not (whole.isascii() and whole.isprintable()):
        # A lone surrogate can come out of JSON and go into no answer.
        whole = whole.encode("utf-8", "replace").decode().translate(_UNPRINTABLE)
    return html.escape(whole)


def span(seconds: float) -> str:
    """A length of time in one unit, to two digits or so; tenths of a second would only flicker."""
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
    at, today = datetime.fromtimestamp(epoch, UTC), datetime.fromtimestamp(now, UTC).date()
    short = f"{at:%H:%M:%S}" if at.date() == today else f"{at:%Y-%m-%d %H:%M}"
    whole = f"{at:%Y-%m-%d %H:%M:%S}"
    return f'<time datetime="{whole}Z" title="{whole} UTC">{short}</time>'


def plain_moment(epoch: float) -> str:
    """The same for a tooltip, in full."""
    return f"{datetime.fromtimestamp(epoch, UTC):%Y-%m-%d %H:%M:%S}"


def holder(name: str) -> str:
    """A lease's holder: where it runs stands out from what tells two of them apart."""
    node, *rest = name.rsplit(":", 2)
    tail = "".join(f":{each}" for each in rest)
    return f'<code class="holder">{safe(node)}<wbr><span class="dim">{safe(tail)}</span></code>'


def plural(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"
