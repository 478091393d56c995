"""What an error of Redis's means: try again, ask another server, or mend the set-up."""

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
    "it keeps keys on different servers, and a lease is more than one key. Use a server that is no "
    "cluster (with replicas and Sentinel for failovers), or leave singleton_lease_url out: leases "
    "are then in the database"
)
_USER = (
    "the user lacks a privilege: ACL SETUSER <user> ~celery-singleton-keys '~<key prefix>*' "
    "+@read +@write +@scripting +@connection +time +info"
)

# Texts rather than codes: up to Redis 6 an error within a script has its code in mid-text, and the
# client library strips codes that it knows.
#: What no later try mends, and what does.
_ADVICE = (
    ("AuthenticationError|NOAUTH|WRONGPASS", "set the user and the password in the URL"),
    ("NoPermissionError|has no permissions|user executing the script can't", _USER),
    ("WRONGTYPE", "another program uses this key: give the leases a database of their own"),
    ("MovedError|AskError|CrossSlot|MOVED|CROSSSLOT|in cluster mode", f"a cluster: {NO_CLUSTER}"),
    ("unknown command", "the server has to offer this command"),
    ("DB index is out of range|invalid DB index", "the server has no database of this number"),
    (UNKNOWN, "set the name of the master in the URL: sentinel://host:26379/<name>/<database>"),
    ("NOPROTO", "the server does not have what protocol in the URL asks for"),
    ("CERTIFICATE_VERIFY_FAILED", "see to ssl_ca_certs in the URL, and to the host's name"),
    ("WRONG_VERSION_NUMBER|RECORD_LAYER_FAILURE", "the server has no TLS there: write redis://"),
    ("AF_UNIX path too long", "give the socket a shorter path"),
)
#: Of a number that is at its largest.
_OVERFLOW = "would overflow"
#: Of what the server or the client library can never hold.
_VALUE = re.compile(
    f"{_OVERFLOW}|string exceeds maximum allowed size|is not an integer or out of range|DataError"
)
#: Of a server that is no primary, or none that its replicas know: another one may have become it.
_DEMOTED = re.compile(
    "read only (replica|slave)|Link with MASTER is down|NOREPLICAS|CLUSTERDOWN|ClusterDownError"
)


def as_store_error(error: RedisError | UnicodeError) -> StoreError:
    """An error of the client library's, as a store's error."""
    text = one_line(error)
    if "invalid bulk length" in text:
        # Its answer to a text that is too large, where it is read before the connection is closed.
        return StoreRefusesValue(
            f"the server takes no so large text, see its proto-max-bulk-len: {text}"
        )
    if not was_connecting(error) and (isinstance(error, UnicodeError) or _VALUE.search(text)):
        is_of_text = isinstance(error, UnicodeError)
        return StoreRefusesValue(f"the server cannot hold the value: {text}", is_of_text)
    for pattern, advice in _ADVICE:
        if re.search(pattern, text):
            return StoreMisconfigured(f"singleton_lease_url: {text}; {advice}")
    return StoreUnavailable(text)


def is_overflow(error: BaseException | None) -> bool:
    """Whether a number has grown larger than the server can count."""
    return _OVERFLOW in str(error)


def is_elsewhere(error: RedisError) -> bool:
    """Whether the primary may be another server now, so that all connections have to be new."""
    return isinstance(error, ConnectionError | TimeoutError) or bool(_DEMOTED.search(str(error)))
