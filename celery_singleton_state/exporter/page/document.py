"""The status page: one HTML document, rendered from templates for each request.

Keys, errors and states contain text from users. In every value that a template prints, invisible
characters are shown as escapes, and HTML is escaped. No template can forget to escape, because
Jinja is set up to escape all values.

The page loads nothing from other hosts and sets no cookie. Its Content-Security-Policy allows only
its own style and script, by their digests.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources

from jinja2 import Environment, FunctionLoader, StrictUndefined

from celery_singleton_state.text import moments
from celery_singleton_state.text.visible import as_printed, visible

from .model import Page, ShownBeat, ShownSingleton
from .timeline import HEIGHT, LEGEND, LENGTH, timeline

__all__ = ["POLICY", "Page", "ShownBeat", "ShownSingleton", "render"]


def render(page: Page) -> str:
    """Return the page as a whole HTML document."""
    return _TEMPLATES.get_template("page.html").render(page=page, policy=POLICY)


def _read(name: str) -> str:
    """Return the text of a file of this package: a template, the style or the script."""
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def _seen(value: object) -> str:
    """Return a value as text, with invisible characters shown as escapes.

    Jinja calls this function for each value that a template prints, and escapes HTML afterwards.
    """
    return visible(value if isinstance(value, str) else str(value), keep="\t\n")


def _node_and_process(holder: str) -> tuple[str, str]:
    """Split a holder's name ``node:pid:nonce`` into ``node`` and ``:pid:nonce``."""
    node = holder.rsplit(":", 2)[0]
    return node, holder[len(node) :]


def _number(value: int) -> str:
    return f"{value:,}"


def load_templates() -> Environment:
    """Return the templates' Jinja environment, which compiles each template only once."""
    found = Environment(
        loader=FunctionLoader(_read),
        autoescape=True,
        finalize=_seen,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    # Replace all of Jinja's own filters, because some of them, such as "safe", skip the escaping.
    found.filters = {
        "ago": moments.ago,
        "length": len,
        "moment": moments.moment,
        "node_and_process": _node_and_process,
        "number": _number,
        "printed": as_printed,
        "short_moment": moments.short_moment,
        "span": moments.span,
        "took": moments.took,
    }
    found.tests["usual"] = moments.is_usual
    found.globals.update(height=HEIGHT, legend=LEGEND, length=LENGTH, timeline=timeline)
    return found


def _digest(name: str) -> str:
    """Return the digest of the style or the script, as the browser computes it from the page."""
    included = _TEMPLATES.get_template(name).render().encode()
    return f"'sha256-{base64.b64encode(hashlib.sha256(included).digest()).decode()}'"


_TEMPLATES = load_templates()

#: The Content-Security-Policy, for the page's head and for the HTTP header.
POLICY = (
    f"default-src 'none'; script-src {_digest('page.js')}; style-src {_digest('page.css')};"
    " img-src data:; connect-src 'self'; form-action 'self'; base-uri 'none'"
)
