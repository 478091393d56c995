"""Translate errors of the Redis client into store errors, with advice for the operator."""

from __future__ import annotations

import re

from redis.exceptions import ConnectionError, RedisError, TimeoutError

from celery_singleton_state.store.base import (
    StoreError,
    StoreMisconfigured,
    StoreRefusesValue,
    StoreUnavailable,
    one_line,
)
from celery_singleton_state.store.connecting import was_connecting

from .sentinels import UNKNOWN

NO_CLUSTER = (
    "a cluster spreads keys over several servers, and a lease needs two keys on one server. Use a "
    "server that is not a cluster (with replicas and Sentinel for failovers), or leave "
    "singleton_lease_url out: leases are then kept in the database"
)
_GRANT = (
    "the user lacks a privilege; grant it by ACL SETUSER <user> "
    "~celery-singleton-keys '~<key prefix>*' +@read +@write +@scripting +@connection +time +info"
)

# The patterns below match an error's text instead of its code, for two reasons: up to Redis 6 the
# code of an error within a script stands in the middle of the text, and the client library removes
# the codes that it knows.

#: Advice about errors that stay until the operator changes something. Each item has a pattern that
#: matches the error's text, and the advice.
_ADVICE = (
    ("AuthenticationError|NOAUTH|WRONGPASS", "set the user and the password in the URL"),
    ("NoPermissionError|has no permissions|user executing the script can't", _GRANT),
    ("WRONGTYPE", "another program uses this key: give the leases a database of their own"),
    (
        "MovedError|AskError|CrossSlot|MOVED|CROSSSLOT|in cluster mode",
        f"the server is part of a Redis Cluster: {NO_CLUSTER}",
    ),
    ("unknown command", "use a server that has this command"),
    (
        "DB index is out of range|invalid DB index",
        "the server has no database of this number: change it in the URL",
    ),
    (UNKNOWN, "set the name of the master in the URL: sentinel://host:26379/<name>/<database>"),
    ("NOPROTO", "the server does not know the protocol that the URL asks for: leave it out"),
    ("CERTIFICATE_VERIFY_FAILED", "check ssl_ca_certs and the host's name in the URL"),
    ("WRONG_VERSION_NUMBER|RECORD_LAYER_FAILURE", "this port does not use TLS: write redis://"),
    ("AF_UNIX path too long", "give the socket a shorter path"),
)
#: A part of Redis's error when it cannot increment a number (HINCRBY), such as a fence, because the
#: number is already the largest one that Redis can hold.
_OVERFLOW = "would overflow"
#: A pattern that matches errors about a value that the server or the client library can never hold.
_VALUE = re.compile(
    f"{_OVERFLOW}|string exceeds maximum allowed size|is not an integer or out of range|DataError"
)
#: A pattern that matches errors of a server that may no longer be the primary, because a failover
#: may have made another server the primary.
_DEMOTED = re.compile(
    "read only (replica|slave)|Link with MASTER is down|NOREPLICAS|CLUSTERDOWN|ClusterDownError"
)


def as_store_error(error: RedisError | UnicodeError) -> StoreError:
    """Return the store error that corresponds to an error of the client library.

    An error that no pattern matches becomes :exc:`StoreUnavailable`, so the caller may try again.
    """
    text = one_line(error)
    if "invalid bulk length" in text:
        # The server sends this answer if a text is too large, and then closes the connection.
        return StoreRefusesValue(
            f"a text is larger than the server's proto-max-bulk-len allows: {text}"
        )
    if not was_connecting(error) and (isinstance(error, UnicodeError) or _VALUE.search(text)):
        is_of_text = isinstance(error, UnicodeError)
        return StoreRefusesValue(f"the server cannot hold the value: {text}", is_of_text)
    for pattern, advice in _ADVICE:
        if re.search(pattern, text):
            return StoreMisconfigured(f"singleton_lease_url: {text}; {advice}")
    return StoreUnavailable(text)


def is_overflow(error: BaseException | None) -> bool:
    """Return whether Redis refused to increment a number, because Redis cannot hold the result."""
    return _OVERFLOW in str(error)


def is_elsewhere(error: RedisError) -> bool:
    """Return whether an error shows that another server may have become the primary, so that
    connections must be made anew.
    """
    return isinstance(error, ConnectionError | TimeoutError) or bool(_DEMOTED.search(str(error)))
