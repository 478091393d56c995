"""The status page: one document, made anew for each answer, from nothing but what is shown.

It needs no build step and nothing from elsewhere, sets no cookie, and its policy lets no script
run but its own: keys, errors and states are texts of users, and escaped as such besides.
"""

from __future__ import annotations

from .beat import beat
from .model import Page, ShownBeat, ShownSingleton
from .policy import POLICY
from .script import SCRIPT
from .singletons import singletons
from .style import STYLE
from .text import moment, safe

__all__ = ["Page", "ShownBeat", "ShownSingleton", "render"]


def render(page: Page) -> str:
    """The page as a whole HTML document."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<meta name="robots" content="noindex">\n'
        f'<noscript><meta http-equiv="refresh" content="{page.refresh}"></noscript>\n'
        f'<title>{_title(page)}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style>\n</head>\n"
        f'<body data-refresh="{page.refresh}">\n{_header(page)}\n'
        f'<main id="page">\n{_main(page)}\n</main>\n{_footer()}\n'
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _title(page: Page) -> str:
    """What a tab that is not looked at shows, the worst first."""
    if page.error is not None:
        said = "store out of reach"
    else:
        said = f"{page.unhealthy:,} unhealthy" if page.unhealthy else f"{page.running:,} running"
    return f"{said} · {safe(page.app)} · singletons"


def _header(page: Page) -> str:
    """What stays when the rest is refreshed, the filter with what is being typed among it."""
    back = '<a href="?">show all</a>' if page.query else ""
    return (
        f"<header><h1>{safe(page.app)} <small>singletons</small></h1>"
        '<form role="search" method="get"><label for="q">Filter</label>'
        f'<input id="q" type="search" name="q" value="{safe(page.query)}" autocomplete="off"'
        f' spellcheck="false" placeholder="part of a name">'
        f"<button>Filter</button>{back}</form>"
        f'<p class="read"><span id="read">read at {moment(page.now, page.now)} UTC</span>'
        f'<span id="age">, every {page.refresh} s</span></p></header>\n'
        '<p id="stale" role="alert" hidden></p>'
    )


def _main(page: Page) -> str:
    if page.error is not None:
        return _out_of_reach(page.error)
    return f'<div class="top">{_summary(page)}{beat(page.beat, page.now)}</div>{singletons(page)}'


def _summary(page: Page) -> str:
    """The numbers of all singletons."""
    of_all = " in all" if page.query else ""
    tiles = (
        ("bad" if page.unhealthy else "ok", page.unhealthy, f"unhealthy{of_all}"),
        ("run" if page.running else "none", page.running, f"running{of_all}"),
        ("none", page.total, "match" if page.query else "in all"),
    )
    items = "".join(
        f'<li class="{kind}"><b>{number:,}</b> {word}</li>' for kind, number, word in tiles
    )
    return (
        '<section class="summary" aria-labelledby="summary">'
        f'<h2 id="summary" class="unseen">Summary</h2><ul>{items}</ul></section>'
    )


def _out_of_reach(error: str) -> str:
    return (
        '<section class="away" aria-labelledby="away"><h2 id="away">The store is out of reach</h2>'
        f"<p><code>{safe(error)}</code></p>"
        "<p>So nothing is known now: not which singletons run, nor whether they are late, nor who"
        " leads beat. If workers cannot reach the store either, no run begins and nothing is saved;"
        " each active run is lost when its lease runs out. The states in the store stay as they"
        " are. This page goes on asking.</p></section>"
    )


def _footer() -> str:
    return (
        "<footer><p>Times are UTC, by the store's clock. For programs:"
        ' <a href="metrics">metrics</a>, <a href="health">health</a>.</p></footer>'
    )
