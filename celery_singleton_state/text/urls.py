"""How URLs are shown: never with a password."""

from __future__ import annotations

import re
from typing import Any

from celery.app import utils
from sqlalchemy import URL

from celery_singleton_state.compat import hide_in_reports

#: Settings that hold a URL, and names that are mistyped for them, as a part of Celery's pattern for
#: settings that it hides.
_HIDDEN = r"SINGLETON_\w*(URL|URI|DSN|STORE|LEASE(?!_TTL))"
#: What a text without a secret does not have: a URL, a connection string or a repr of either has.
_MAY_BE_SECRET = re.compile("[@:=]")
_SCHEME = re.compile(r"\w[\w+.-]*://")

#: What to write where a URL cannot be read.
ENCODED = (
    "in the user and the password, @ : / ? # % are written as %40 %3A %2F %3F %23 %25 "
    "(urllib.parse.quote_plus)"
)


def hide_settings() -> None:
    """Have `celery report`, `celery inspect conf` and `app.conf.humanize()` hide our URLs.

    Celery hides the values of settings whose names match a pattern, which has no place for more
    names. The values themselves stay texts, because users read them.
    """
    hidden = getattr(utils, "HIDDEN_SETTINGS", None)
    if isinstance(hidden, re.Pattern) and _HIDDEN not in hidden.pattern:
        more = re.compile(f"{hidden.pattern}|{_HIDDEN}", hidden.flags)
        utils.HIDDEN_SETTINGS = more  # type: ignore[attr-defined]  # missing in celery-types
        # A dict would be searched for such names among its own keys.
        hide_in_reports(re.compile(_HIDDEN, hidden.flags))


def shown(value: Any) -> str:
    """The value of a setting that should be a URL and is not, for an error: as it is if it can
    have no password in it, else only what it begins with.
    """
    text = value if isinstance(value, str) else repr(value)
    if not _MAY_BE_SECRET.search(text):
        return repr(value)
    scheme = _SCHEME.match(text)
    return repr(f"{scheme[0]}…") if scheme else repr("…")


def shown_url(url: URL) -> str:
    """A database's URL without its password and the values of its options."""
    text = url.set(query={}).render_as_string()
    return f"{text}?…" if url.query else text
