"""A client for a Redis or Valkey server, by a URL."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from celery.exceptions import ImproperlyConfigured
from redis import Redis
from redis.sentinel import Sentinel

#: What Celery's brokers call a socket, and what the client library does.
CELERYS_SOCKET, CLIENTS_SOCKET = "redis+socket", "unix"
SCHEMES = ("redis", "rediss", CELERYS_SOCKET, CLIENTS_SOCKET, "sentinel")


def client_for(url: str, **options: Any) -> Redis:
    """A client; it connects at first use.

    :param url: ``redis://``, ``rediss://`` (TLS), ``redis+socket:///path/to/socket``, or
        ``sentinel://host:26379,host:26379/<name of the master>/<database>``. What stands behind its
        ``?`` goes to the client library; with Sentinel all of it is text, and
        ``sentinel_password`` is for the sentinels themselves.
    :param options: of the client library.
    :raises ImproperlyConfigured: it is no such URL.
    """
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        allowed = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise ImproperlyConfigured(
            f"singleton_lease_url={parts.scheme + '://…'!r} is not supported; it takes {allowed}"
        )
    try:
        if parts.scheme == "sentinel":
            return _through_sentinels(url, options)
        url = url.replace(f"{CELERYS_SOCKET}://", f"{CLIENTS_SOCKET}://", 1)
        client: Redis = Redis.from_url(url, **options)
        return client
    except ValueError as error:
        raise ImproperlyConfigured(f"singleton_lease_url is not a URL: {error}") from None


def _through_sentinels(url: str, options: dict[str, Any]) -> Redis:
    parts = urlsplit(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    name, _, database = parts.path.strip("/").partition("/")
    if not name:
        raise ValueError("sentinel://host:26379,host:26379/<name of the master>/<database>")
    more: dict[str, Any] = dict(parse_qsl(parts.query))
    own = {"password": more.pop("sentinel_password")} if "sentinel_password" in more else {}
    asked = {name: options[name] for name in ("socket_timeout", "socket_connect_timeout")}
    addresses = [_address(each) for each in hosts.split(",")]
    sentinel = Sentinel(addresses, sentinel_kwargs=asked | own)  # type: ignore[no-untyped-call]
    if password:
        more |= {"username": unquote(user) or None, "password": unquote(password)}
    options = options | more | {"db": int(database or 0)}
    master: Redis = sentinel.master_for(name, **options)  # type: ignore[no-untyped-call]
    return master


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return (host.strip("[]"), int(port)) if host else (text, 26379)
