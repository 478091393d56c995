"""A client for a Redis or Valkey server, by a URL: the client library's, or one of Celery's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import redis
from celery.exceptions import ImproperlyConfigured
from kombu.utils.imports import symbol_by_name
from redis import Redis
from redis.connection import URL_QUERY_ARGUMENT_PARSERS as PARSERS
from redis.sentinel import Sentinel

from celery_singleton_state.store.sql.url import refuse_missing_files
from celery_singleton_state.text.urls import ENCODED, shown

#: What a URL may begin with, and the kind of its connections.
KINDS = {
    "redis": redis.Connection,
    "rediss": redis.SSLConnection,
    "valkey": redis.Connection,
    "valkeys": redis.SSLConnection,
    "unix": redis.UnixDomainSocketConnection,
    # What Celery's broker and its result backend call it.
    "redis+socket": redis.UnixDomainSocketConnection,
    "socket": redis.UnixDomainSocketConnection,
}
SENTINEL = "sentinel"
#: What the refusal of any other scheme names.
SCHEMES = ("redis", "rediss", "redis+socket", "unix", SENTINEL)

#: Options of connections that a text can say, if the client library that is installed has them.
#: Others would change what the store relies on.
_OF_CONNECTIONS = frozenset(
    {"client_name", "health_check_interval", "lib_name", "lib_version", "password", "protocol"}
    | {"retry_on_timeout", "socket_connect_timeout", "socket_keepalive", "socket_read_size"}
    | {"socket_timeout", "username"}
)
_OF_TLS = frozenset(
    {"ssl_ca_certs", "ssl_ca_data", "ssl_ca_path", "ssl_cert_reqs", "ssl_certfile"}
    | {"ssl_check_hostname", "ssl_ciphers", "ssl_exclude_verify_flags", "ssl_keyfile"}
    | {"ssl_include_verify_flags", "ssl_min_version", "ssl_password"}
)
_FILES = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile")
#: Options of the client library's pool, which is not used, and of Celery's transport.
_WITHOUT_EFFECT = frozenset({"max_connections", "timeout", "visibility_timeout"})
_CERT_REQS = ("none", "optional", "required")
#: Ours are the longest: a lease is lost over a longer one.
_TIMEOUTS = ("socket_timeout", "socket_connect_timeout")


def client_for(url: str, **options: Any) -> Redis:
    """A client; it connects at first use.

    :param url: ``redis://``, ``rediss://`` (TLS), ``redis+socket:///path/to/socket``, or
        ``sentinel://host:26379,host:26379/<name of the master>/<database>``. What stands behind its
        ``?`` goes to the client library; ``sentinel_password`` is for the sentinels themselves.
        What Celery's brokers and result backends write otherwise is understood, too.
    :param options: of the client library.
    :raises ImproperlyConfigured: it is no such URL, or an option of it is not allowed.
    """
    url = url.strip()
    scheme = url.partition("://")[0].lower() if "://" in url else ""
    if scheme == SENTINEL:
        return _through_sentinels(url, options)
    if scheme not in KINDS:
        allowed = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise _refused(f"{shown(url)} is not supported; it takes {allowed}", equals=True)
    kind = KINDS[scheme]
    parts, query = _split(url)
    found = _credentials(parts)
    if kind is redis.UnixDomainSocketConnection:
        found["path"] = unquote(parts.path)
        path = ""
    else:
        found |= {"host": unquote(parts.hostname or "") or "localhost", "port": parts.port or 6379}
        path = parts.path
    found["db"] = _database(query, path)
    more = _options(query, kind, allowed=_OF_CONNECTIONS | _OF_TLS)
    known = _parameters(kind)
    ours = {name: value for name, value in options.items() if name in known}
    pool = redis.ConnectionPool(
        connection_class=kind, **_with_short_timeouts(ours | found | more, options)
    )
    return Redis(connection_pool=pool)


def _through_sentinels(url: str, options: dict[str, Any]) -> Redis:
    text, _, query_text = url.partition("?")
    chunks = [chunk.removeprefix(f"{SENTINEL}://") for chunk in text.split(";") if chunk]
    parts = [_split(f"{SENTINEL}://{chunk}")[0] for chunk in chunks]
    query = _query(url, query_text)
    paths = {each.path.strip("/") for each in parts} - {""}
    if len(paths) > 1:
        raise _refused("the sentinels' addresses name different masters or databases")
    name, database = _master(query, paths.pop() if paths else "")
    found = next((own for each in parts if (own := _credentials(each))), {})
    found["db"] = _database(query, database)
    own = {
        name.removeprefix("sentinel_"): query.pop(name)
        for name in ("sentinel_username", "sentinel_password")
        if name in query
    }
    uses_tls = query.pop("ssl", "").lower() in ("1", "true", "yes", "on")
    kind = redis.SSLConnection if uses_tls else redis.Connection
    more = _options(query, kind, allowed=_OF_CONNECTIONS | _OF_TLS)
    asked = {timeout: options[timeout] for timeout in _TIMEOUTS if timeout in options}
    sentinel = Sentinel(  # type: ignore[no-untyped-call]
        [address for each in parts for address in _addresses(url, each)],
        sentinel_kwargs=asked | own,
    )
    given = _with_short_timeouts(options | found | more, options)
    if uses_tls:
        given["ssl"] = True
    master: Redis = sentinel.master_for(name, **given)  # type: ignore[no-untyped-call]
    return master


def _master(query: dict[str, str], path: str) -> tuple[str, str]:
    """The name of the master and the database. Celery's URLs have the database alone."""
    named = query.pop("master_name", None) or query.pop("service_name", None)
    if named:
        return named, path.removeprefix(f"{named}/")
    name, _, database = path.partition("/")
    if not name or name.isdecimal():
        raise _refused(
            "the name of the master is missing; write "
            "sentinel://host:26379,host:26379/<name of the master>/<database>"
        )
    return unquote(name), database


def _addresses(url: str, parts: SplitResult) -> list[tuple[str, int]]:
    hosts = parts.netloc.rpartition("@")[2]
    try:
        return [_address(each) for each in hosts.split(",")]
    except ValueError:
        raise _unreadable(url) from None


def _address(text: str) -> tuple[str, int]:
    # An address of IPv6 has colons within its brackets.
    host, _, port = text.rpartition(":") if not text.endswith("]") else (text, "", "")
    return (host.strip("[]"), int(port)) if host and port else (text.strip("[]"), 26379)


def _split(url: str) -> tuple[SplitResult, dict[str, str]]:
    """The parts of a URL, by the rules of HTTP, and its options.

    :raises ImproperlyConfigured: a character of the user or the password is not encoded.
    """
    scheme, _, rest = url.partition("://")
    try:
        parts = urlsplit(f"http://{rest}")
        if scheme != SENTINEL:
            _ = parts.port
    except ValueError:
        raise _unreadable(url) from None
    if "@" in parts.path + parts.fragment and scheme not in ("unix", "socket", "redis+socket"):
        raise _unreadable(url)
    return parts, _query(url, parts.query)


def _query(url: str, text: str) -> dict[str, str]:
    if "@" in text.partition("=")[0]:
        raise _unreadable(url)
    return dict(parse_qsl(text))


def _credentials(parts: SplitResult) -> dict[str, Any]:
    found = {"username": parts.username, "password": parts.password}
    return {name: unquote(value) for name, value in found.items() if value}


def _database(query: dict[str, str], path: str) -> int:
    """The number of the database, wherever the URL has it.

    :raises ImproperlyConfigured: it is no number, or there are several.
    """
    found = {query.pop(name, "").strip("/") for name in ("db", "virtual_host")}
    found = (found | {unquote(path).strip("/")}) - {""}
    if len(found) > 1:
        raise _refused("it names several databases")
    number = found.pop() if found else "0"
    if not number.isdecimal():
        raise _refused("the database is a number, as in redis://host:6379/1")
    return int(number)


def _options(query: Mapping[str, str], kind: type[Any], allowed: Collection[str]) -> dict[str, Any]:
    """The options of a URL for connections of a kind, read as what they are.

    :raises ImproperlyConfigured: one is not known, or has a value that is not allowed.
    """
    refuse_missing_files("singleton_lease_url", query, _FILES)
    known = _parameters(kind) & set(allowed)
    found: dict[str, Any] = {}
    for name, text in query.items():
        if name == "credential_provider":
            found[name] = _read(name, text, lambda text: symbol_by_name(text)())
        elif name in _OF_TLS and kind is not redis.SSLConnection:
            raise _refused(f"{name} is for TLS; write rediss://")
        elif name in known:
            parser: Any = _cert_reqs if name == "ssl_cert_reqs" else PARSERS.get(name, str)
            found[name] = _read(name, text, parser)
        elif name not in _WITHOUT_EFFECT:
            near = get_close_matches(name, sorted(known), n=1)
            hint = f"did you mean {near[0]}?" if near else "leave it out"
            raise _refused(f"the client library does not know the option {name!r}; {hint}")
    if found.get("ssl_cert_reqs") == "none":
        # Otherwise Python refuses to leave the certificate unchecked.
        found.setdefault("ssl_check_hostname", False)
    return found


def _read(name: str, text: str, parser: Callable[[str], Any]) -> Any:
    try:
        return parser(text)
    except Exception:  # of a credential provider, anything
        raise _refused(f"the value of the option {name!r} is not allowed") from None


def _cert_reqs(text: str) -> str:
    value = text.removeprefix("ssl.").removeprefix("CERT_").lower()
    if value not in _CERT_REQS:
        raise ValueError(text)
    return value


def _parameters(kind: type[Any]) -> set[str]:
    """All parameters of a class of connections, and of its bases."""
    return {
        name
        for base in kind.__mro__
        if base is not object and "__init__" in vars(base)
        for name in inspect.signature(vars(base)["__init__"]).parameters
    }


def _with_short_timeouts(given: dict[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    for name in _TIMEOUTS:
        if name in ours and name in given:
            given[name] = min(given[name], ours[name])
    return given


def _unreadable(url: str) -> ImproperlyConfigured:
    return _refused(f"{shown(url)} is not a URL that can be read; {ENCODED}", equals=True)


def _refused(why: str, equals: bool = False) -> ImproperlyConfigured:
    return ImproperlyConfigured(f"singleton_lease_url{'=' if equals else ': '}{why}")
