"""Show URLs in errors, logs and reports without their passwords."""

from __future__ import annotations

import re
from typing import Any

from celery.app import utils
from sqlalchemy import URL

from celery_singleton_state.compat import hide_in_reports

#: A pattern for the names of settings whose values Celery must hide, because they may be URLs with
#: passwords. It also matches misspelled names of such settings.
_HIDDEN = r"SINGLETON_\w*(URL|URI|DSN|STORE|LEASE(?!_TTL))"
#: Matches the characters of which each URL and each connection string has at least one. So a text
#: without any of them has no password in it.
_MAY_BE_SECRET = re.compile("[@:=]")
_SCHEME = re.compile(r"\w[\w+.-]*://")

#: The advice in errors about a URL that cannot be parsed.
ENCODED = (
    "in the user and the password, @ : / ? # % are written as %40 %3A %2F %3F %23 %25 "
    "(urllib.parse.quote_plus)"
)


def hide_settings() -> None:
    """Make `celery report`, `celery inspect conf` and `app.conf.humanize()` hide store URLs.

    Celery hides the values of settings whose names match a pattern. Celery offers no way to add
    names, so this function replaces the pattern by a longer one. The values themselves stay plain
    texts, because users' code reads them.
    """
    hidden = getattr(utils, "HIDDEN_SETTINGS", None)
    if isinstance(hidden, re.Pattern) and _HIDDEN not in hidden.pattern:
        more = re.compile(f"{hidden.pattern}|{_HIDDEN}", hidden.flags)
        utils.HIDDEN_SETTINGS = more  # type: ignore[attr-defined]  # missing in celery-types
        # Otherwise Celery would show a setting whose value is a dict: it searches the dict's own
        # keys for such names instead.
        hide_in_reports(re.compile(_HIDDEN, hidden.flags))


def shown(value: Any) -> str:
    """Format a setting's value that should be a URL but is not, for an error's text.

    If the value may contain a password, only its scheme is shown (``'redis://…'``), or nothing of
    it (``'…'``).
    """
    text = value if isinstance(value, str) else repr(value)
    if not _MAY_BE_SECRET.search(text):
        return repr(value)
    scheme = _SCHEME.match(text)
    return repr(f"{scheme[0]}…") if scheme else repr("…")


def shown_url(url: URL) -> str:
    """Format a database's URL without its password and its options."""
    text = url.set(query={}).render_as_string()
    return f"{text}?…" if url.query else text
