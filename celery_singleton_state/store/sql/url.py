"""Parse the URL of a store's database, and choose the driver that this package uses for it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from celery.exceptions import ImproperlyConfigured
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from celery_singleton_state.store.options import (
    PORT,
    STORE,
    Option,
    read_option,
    refuse_nul,
    refuse_repeated,
)
from celery_singleton_state.text.urls import ENCODED, shown, shown_url

from .dialects import DATABASES, DIALECTS, backend_of

#: A pattern that matches the prefix that Celery puts before a database's URL, for a result backend
#: or a broker.
_CELERYS = re.compile(r"(db|sqla|sqlalchemy)\+")
#: A pattern that matches a URL, and whose group is everything from the host on. The pattern decides
#: as SQLAlchemy does where the user and the password end.
_AUTHORITY = re.compile(r"[^:/]+://(?:[^:/@]*(?::[^@]*)?@)?(.*)", re.DOTALL)
_LEASES_ONLY = ("redis", "sentinel", "valkey")


def parse_url(given: str | URL) -> URL:
    """Parse a store's URL, and replace its driver with the driver that this package uses.

    :raises ImproperlyConfigured: the text is not a URL, or its database is not supported.
    """
    text = given if isinstance(given, str) else given.render_as_string(hide_password=False)
    text = _CELERYS.sub("", text.strip(), count=1) if _CELERYS.match(text.strip()) else text.strip()
    try:
        url = make_url("sqlite://" if text == "memory://" else text)
    except (ArgumentError, ValueError):
        # SQLAlchemy's message is not shown, because it may contain a part of the password that
        # SQLAlchemy has taken for the port.
        raise ImproperlyConfigured(_unreadable(text)) from None
    if url.drivername.startswith(_LEASES_ONLY):
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
    url = url.set(drivername=_drivername(url, backend, driver))
    _refuse_nul(url)
    if url.port is not None:
        read_option(STORE, "port", str(url.port), PORT)
    return url


def read_query(
    url: URL, options: Mapping[str, Option], may_repeat: Collection[str] = ()
) -> dict[str, Any]:
    """Parse the options of a URL.

    :param options: the options whose values are parsed. The values of all other options stay texts.
    :param may_repeat: the names of options that a URL may have several times.
    :raises ImproperlyConfigured: a value is not allowed, or an option is given twice.
    """
    query: dict[str, Any] = {}
    for name, value in url.query.items():
        if not isinstance(value, str) and name not in may_repeat:
            refuse_repeated(STORE, [name] * len(value))
        query[name] = value
        if name in options and isinstance(value, str):
            query[name] = read_option(STORE, name, value, options[name])
    return query


def _refuse_nul(url: URL) -> None:
    parts = {"the user": url.username, "the password": url.password, "the host": url.host}
    parts |= {"the database": url.database}
    options = {f"the option {name!r}": value for name, value in url.query.items()}
    refuse_nul(STORE, {name: _joined(part) for name, part in (parts | options).items()})


def _joined(part: Any) -> str:
    return part if isinstance(part, str) else "".join(part or ())


def _drivername(url: URL, backend: str, driver: str) -> str:
    own, *others = DATABASES[backend].drivers
    if driver and driver not in (own, *others):
        plain = backend if backend == "sqlite" else f"{backend}+{own}"
        raise ImproperlyConfigured(
            f"singleton_store_url={shown_url(url)!r} is not supported: its driver must be {own}, "
            f"not {driver}; write {plain}://…"
        )
    return backend if backend == "sqlite" else f"{backend}+{own}"


def _unreadable(text: str) -> str:
    return (
        f"singleton_store_url={shown(text)} is not a URL that can be read; it takes one such as "
        f"postgresql://user:password@host:5432/database; {ENCODED}"
    )


def _has_stray_at(text: str) -> bool:
    """Return whether a URL has an ``@`` behind its host.

    If it has, the user or the password contains an unescaped ``@`` or ``/``, and SQLAlchemy would
    take a part of the password for the host or the database.
    """
    found = _AUTHORITY.match(text)
    rest, _, query = (found[1] if found else "").partition("?")
    return "@" in rest or "@" in query.partition("=")[0]
