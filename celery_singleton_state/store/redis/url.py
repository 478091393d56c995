"""Make a Redis or Valkey client from a URL, written as redis-py or as Celery expects it."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import redis
from celery.exceptions import ImproperlyConfigured
from redis import Redis

from celery_singleton_state.compat import redis_connection
from celery_singleton_state.store.options import (
    LARGEST_PORT,
    LEASES,
    LIKE,
    SWITCH,
    read_option,
    refuse_missing_files,
    refuse_nul,
    refuse_repeated,
    refuse_what_fails,
    refuse_wrong_hosts,
)
from celery_singleton_state.text.urls import ENCODED, shown

from .options import CREDENTIAL_PROVIDER, FILES, OF_CONNECTIONS, OF_TLS, WITHOUT_EFFECT
from .sentinels import Sentinels
from .tls import refuse_unusable_tls

#: Maps each scheme of a URL that names a single server to redis-py's class of connections for it.
KINDS = {
    "redis": redis.Connection,
    "rediss": redis.SSLConnection,
    "valkey": redis.Connection,
    "valkeys": redis.SSLConnection,
    "unix": redis.UnixDomainSocketConnection,
    # Celery's result backend and its broker use these two schemes for a Unix socket.
    "redis+socket": redis.UnixDomainSocketConnection,
    "socket": redis.UnixDomainSocketConnection,
}
SENTINEL = "sentinel"
#: The schemes that the error about an unknown scheme suggests. The other schemes in ``KINDS`` are
#: left out, because they are synonyms.
SCHEMES = ("redis", "rediss", "redis+socket", "unix", SENTINEL)

#: The end of the error "credential_provider takes ..." about a URL that has a user or a password
#: beside a credential provider, because the client library refuses this combination.
_ALONE = "no user and no password beside it: leave them out"
#: The largest database number that Redis's SELECT accepts.
LARGEST_DATABASE = 2**31 - 1
#: The options by which a URL sets time-outs. They can only shorten the store's own time-outs. A
#: longer time-out is not used, because a lease could expire while a request waits.
_TIMEOUTS = ("socket_timeout", "socket_connect_timeout")


def client_for(url: str, **options: Any) -> Redis:
    """Make a client for a URL. The client connects at its first use.

    :param url: ``redis://``, ``rediss://`` (TLS), ``redis+socket:///path/to/socket``, or
        ``sentinel://host:26379,host:26379/<name of the master>/<database>``. The query (after
        ``?``) has options of the client library; ``sentinel_username`` and ``sentinel_password``
        are for the sentinels themselves. The forms of Celery's brokers and result backends are
        accepted, too.
    :param options: more options of the client library, from the store.
    :raises ImproperlyConfigured: the URL cannot be read, or it has an option that is not allowed.
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
        found["path"] = _path(parts)
        path = ""
    else:
        found |= {"host": unquote(parts.hostname or "") or "localhost", "port": 6379}
        if parts.port is not None:
            found["port"] = parts.port
        refuse_wrong_hosts(LEASES, [found["host"]])
        path = parts.path
    found["db"] = _database(query, path)
    is_socket = kind is redis.UnixDomainSocketConnection
    advice = "leave it out, because a socket has no TLS" if is_socket else "write rediss://"
    more = _options(query, kind, advice)
    known = _parameters(kind)
    ours = {name: value for name, value in options.items() if name in known}
    pool = redis.ConnectionPool(
        connection_class=kind, **_with_short_timeouts(ours | found | more, options)
    )
    return _checked_client(Redis(connection_pool=pool), query)


def _path(parts: SplitResult) -> str:
    """Return the path of a Unix socket. Refuse a URL with a host, because a socket has no host."""
    if parts.netloc.rpartition("@")[2] or not parts.path.strip("/"):
        raise _refused("the path of the socket is missing; write unix:///path/to/socket")
    return unquote(parts.path)


def _checked_client(client: Redis, query: Mapping[str, str]) -> Redis:
    """Return the client after a check that its options can be used together.

    The check makes a connection object, which does not connect yet.

    :param query: the options of the URL, for the error.
    :raises ImproperlyConfigured: the client library refuses the options.
    """

    def attempt(options: Mapping[str, Any]) -> None:
        redis_connection(client, left_out=set(query) - set(options))

    refuse_what_fails(LEASES, query, attempt, {"credential_provider": _ALONE})
    return client


def _through_sentinels(url: str, options: dict[str, Any]) -> Redis:
    text, _, query_text = url.partition("?")
    parts = [_sentinels_part(url, chunk, number) for number, chunk in enumerate(_chunks(text))]
    query = _query(url, query_text)
    addresses = [address for each in parts for address in _addresses(url, each)]
    paths = {each.path.strip("/") for each in parts} - {""}
    if len(paths) > 1:
        raise _refused("the sentinels' addresses name different masters or databases; name one")
    name, database = _master(query, paths.pop() if paths else "")
    found = next((own for each in parts if (own := _credentials(each))), {})
    found["db"] = _database(query, database)
    own = {
        name.removeprefix("sentinel_"): query.pop(name)
        for name in ("sentinel_username", "sentinel_password")
        if name in query
    }
    uses_tls = read_option(LEASES, "ssl", query.pop("ssl", "false"), SWITCH)
    kind = redis.SSLConnection if uses_tls else redis.Connection
    more = _options(query, kind, advice="add ssl=true to the options")
    # Use the store's time-outs and retries for sentinels, too, because by default the client
    # library tries an unavailable sentinel four times, which takes seconds.
    asked = {name: options[name] for name in (*_TIMEOUTS, "retry") if name in options}
    sentinel = Sentinels(addresses, sentinel_kwargs=asked | own)  # type: ignore[no-untyped-call]
    given = _with_short_timeouts(options | found | more, options)
    if uses_tls:
        given["ssl"] = True
    master: Redis = sentinel.master_for(name, **given)  # type: ignore[no-untyped-call]
    return _checked_client(master, query)


def _chunks(text: str) -> list[str]:
    """Split a URL at its semicolons, because Celery separates the sentinels by semicolons."""
    return [chunk for chunk in text.split(";") if chunk]


def _sentinels_part(url: str, chunk: str, number: int) -> SplitResult:
    """Parse one part of a sentinel URL, between two semicolons.

    :param number: the part's position, from 0.
    :raises ImproperlyConfigured: an ``@`` stands where it can only belong to a password that
        contains an unencoded separator.
    """
    scheme, separator, rest = chunk.partition("://")
    is_address = separator == "://" and scheme.lower() == SENTINEL
    rest = rest if is_address else chunk
    before, at, _ = rest.partition("/")[0].rpartition("@")
    # Celery repeats sentinel:// and the password for each sentinel. So an @ is right only before
    # the first host of a part that begins with sentinel://.
    if at and (not is_address or "," in before or "@" in before):
        raise _unreadable_sentinels(url)
    return _split(f"{SENTINEL}://{rest}")[0]


def _master(query: dict[str, str], path: str) -> tuple[str, str]:
    """Return the name of the master, and the database as a text, from a sentinel URL.

    Celery's URLs have only the database in their path, and the name of the master in their query.

    :raises ImproperlyConfigured: the name is missing.
    """
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
        found = [_address(each) for each in hosts.split(",")]
    except ValueError:
        raise _unreadable_sentinels(url) from None
    refuse_nul(LEASES, {"the host": hosts})
    refuse_wrong_hosts(LEASES, [host for host, _port in found])
    return found


def _address(text: str) -> tuple[str, int]:
    """Parse ``host`` or ``host:port``. The port defaults to 26379, the default of sentinels.

    :raises ValueError: the text is not such an address.
    """
    # An IPv6 address has colons within its brackets. So the last colon precedes a port only if the
    # text does not end in a bracket.
    host, _, port = text.rpartition(":") if ":" in text and text[-1] != "]" else (text, "", "26379")
    is_ipv6 = host.startswith("[") and host.endswith("]")
    bare = host[1:-1] if is_ipv6 else unquote(host)
    is_number = port.isascii() and port.isdecimal() and 1 <= int(port[:6]) <= LARGEST_PORT
    if not bare or not is_number or (":" in bare) != is_ipv6:
        raise ValueError(text)
    return bare, int(port)


def _split(url: str) -> tuple[SplitResult, dict[str, str]]:
    """Split a URL into its parts and the options of its query.

    :raises ImproperlyConfigured: the URL cannot be read, usually because the user or the password
        has a character that is not encoded.
    """
    scheme, _, rest = url.partition("://")
    try:
        parts = urlsplit(f"http://{rest}")
        if scheme != SENTINEL and parts.port == 0:
            raise ValueError
    except ValueError:
        raise _unreadable(url) from None
    if "@" in parts.path + parts.fragment and scheme not in ("unix", "socket", "redis+socket"):
        raise _unreadable(url)
    return parts, _query(url, parts.query)


def _query(url: str, text: str) -> dict[str, str]:
    if "@" in text.partition("=")[0]:
        raise _unreadable(url)
    query = parse_qsl(text)
    refuse_repeated(LEASES, [name for name, _value in query])
    refuse_nul(LEASES, {f"the option {name!r}": value for name, value in query})
    return dict(query)


def _credentials(parts: SplitResult) -> dict[str, Any]:
    given = {"username": parts.username, "password": parts.password}
    found = {name: unquote(value) for name, value in given.items() if value}
    texts = {"the host": unquote(parts.netloc.rpartition("@")[2]), "the path": unquote(parts.path)}
    refuse_nul(LEASES, {f"the {name}": value for name, value in found.items()} | texts)
    return found


def _database(query: dict[str, str], path: str) -> int:
    """Return the database's number, from the path or from the options ``db`` and ``virtual_host``.

    :raises ImproperlyConfigured: the database is not a number, or the URL names several databases.
    """
    found = {query.pop(name, "").strip("/") for name in ("db", "virtual_host")}
    found = (found | {unquote(path).strip("/")}) - {""}
    if len(found) > 1:
        raise _refused("the URL names several databases; name one")
    number = found.pop() if found else "0"
    if not (number.isascii() and number.isdecimal()) or int(number[:11]) > LARGEST_DATABASE:
        raise _refused("the database is a number, for example redis://host:6379/1")
    return int(number)


def _options(query: Mapping[str, str], kind: type[Any], advice: str) -> dict[str, Any]:
    """Convert the options of a URL to the values that the client library takes.

    :param kind: the class of the connections.
    :param advice: what the user has to do about a TLS option in a URL without TLS, for the error.
    :raises ImproperlyConfigured: an option is not known, or its value is not allowed.
    """
    refuse_missing_files(LEASES, query, FILES)
    allowed = OF_CONNECTIONS | OF_TLS
    known = _parameters(kind) & set(allowed)
    found: dict[str, Any] = {}
    for name, text in query.items():
        if name == "credential_provider":
            found[name] = read_option(LEASES, name, text, CREDENTIAL_PROVIDER)
        elif name in OF_TLS and kind is not redis.SSLConnection:
            raise _refused(f"{name} is for TLS; {advice}")
        elif name in known:
            found[name] = read_option(LEASES, name, text, allowed[name])
        elif name not in WITHOUT_EFFECT:
            hint = advice if name == "ssl" else _hint(name, known)
            raise _refused(f"the client library does not know the option {name!r}; {hint}")
    if found.get("ssl_cert_reqs") == "none":
        if found.get("ssl_check_hostname"):
            raise _refused(
                "ssl_check_hostname=true has no effect together with ssl_cert_reqs=none; remove one"
            )
        # Switch off the check of the host's name, too, because Python allows it only together with
        # the check of the certificate.
        found["ssl_check_hostname"] = False
    refuse_unusable_tls(LEASES, found)
    return found


def _hint(name: str, known: Collection[str]) -> str:
    near = get_close_matches(name, sorted(known), n=1, cutoff=LIKE)
    return f"did you mean {near[0]}?" if near else "leave it out"


def _parameters(kind: type[Any]) -> set[str]:
    """Return the names of all parameters that a class of connections and its bases take."""
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


def _unreadable_sentinels(url: str) -> ImproperlyConfigured:
    return _refused(
        f"{shown(url)} is not a URL that can be read; write "
        "sentinel://host:26379,host:26379/<name of the master>/<database>, an address of IPv6 as "
        f"[::1]:26379; {ENCODED}, ; and , as %3B and %2C",
        equals=True,
    )


def _unreadable(url: str) -> ImproperlyConfigured:
    return _refused(f"{shown(url)} is not a URL that can be read; {ENCODED}", equals=True)


def _refused(why: str, equals: bool = False) -> ImproperlyConfigured:
    return ImproperlyConfigured(f"{LEASES}{'=' if equals else ': '}{why}")
