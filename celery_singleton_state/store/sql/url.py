"""The URL of a store's database: what users write, and which driver this package uses for it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from celery.exceptions import ImproperlyConfigured
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from celery_singleton_state.text.urls import ENCODED, shown, shown_url

from .dialects import DATABASES, DIALECTS, backend_of

#: What Celery puts before a database's URL, as a result backend's and as a broker's.
_CELERYS = re.compile(r"(db|sqla|sqlalchemy)\+")
#: What stands before the host, as SQLAlchemy reads it, and the rest.
_AUTHORITY = re.compile(r"[^:/]+://(?:[^:/@]*(?::[^@]*)?@)?(.*)", re.DOTALL)
_LEASES = ("redis", "sentinel", "valkey")


def parse_url(given: str | URL) -> URL:
    """A store's URL, with the drivers that this package uses.

    :raises ImproperlyConfigured: it is no URL, or one of a database that is not supported.
    """
    text = given if isinstance(given, str) else given.render_as_string(hide_password=False)
    text = _CELERYS.sub("", text.strip(), count=1) if _CELERYS.match(text.strip()) else text.strip()
    try:
        url = make_url("sqlite://" if text == "memory://" else text)
    except (ArgumentError, ValueError):
        # Of a port that is no number: the text has it, or a part of the password.
        raise ImproperlyConfigured(_unreadable(text)) from None
    if url.drivername.startswith(_LEASES):
        raise ImproperlyConfigured(
            f"singleton_store_url={shown(text)} is not supported: states are kept in "
            "SQL; singleton_lease_url takes it, for leases of singletons without a state"
        )
    named, _, driver = url.drivername.lower().partition("+")
    backend = backend_of(named)
    if backend != "sqlite" and _has_stray_at(text):
        raise ImproperlyConfigured(_unreadable(text))
    if backend not in DATABASES:
        raise ImproperlyConfigured(
            f"singleton_store_url={shown_url(url)!r} is not supported; "
            f"it takes a URL of {', '.join(DIALECTS)}, or memory://"
        )
    return url.set(drivername=_drivername(url, backend, driver))


def _drivername(url: URL, backend: str, driver: str) -> str:
    own, *others = DATABASES[backend].drivers
    if driver and driver not in (own, *others):
        plain = backend if backend == "sqlite" else f"{backend}+{own}"
        raise ImproperlyConfigured(
            f"singleton_store_url={shown_url(url)!r} is not supported: its driver is to be {own}, "
            f"not {driver}; write {plain}://…"
        )
    return backend if backend == "sqlite" else f"{backend}+{own}"


def _unreadable(text: str) -> str:
    return (
        f"singleton_store_url={shown(text)} is not a URL that can be read; it takes one such as "
        f"postgresql://user:password@host:5432/database; {ENCODED}"
    )


def _has_stray_at(text: str) -> bool:
    """Whether an @ stands behind the host, so that what SQLAlchemy takes for the host or the
    database can be a part of the password.
    """
    found = _AUTHORITY.match(text)
    rest, _, query = (found[1] if found else "").partition("?")
    return "@" in rest or "@" in query.partition("=")[0]


def refuse_unknown_options(
    query: Collection[str], known: Collection[str], driver: str, instead: Mapping[str, str]
) -> None:
    """Refuse options of a URL that the driver would refuse at each connection.

    :param instead: what to write for other drivers' options.
    :raises ImproperlyConfigured: the driver does not know one of them.
    """
    for name in query:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"did you mean {near[0]}?" if near else "leave it out"
            hint = f"write {instead[name]}" if name in instead else hint
            raise ImproperlyConfigured(
                f"singleton_store_url: {driver} does not know the option {name!r}; {hint}"
            )


def refuse_missing_files(setting: str, query: Mapping[str, object], names: Collection[str]) -> None:
    """:raises ImproperlyConfigured: an option of a URL names a file that is not there."""
    for name in names:
        value = query.get(name)
        if isinstance(value, str) and not Path(value).exists():
            raise ImproperlyConfigured(f"{setting}: there is no file {value!r}, which {name} names")
