"""Parse and check the options of a PostgreSQL URL, by libpq's rules, before any connection is made.

libpq is PostgreSQL's client library, which psycopg uses.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

import psycopg
import psycopg.conninfo
import psycopg.pq
from celery.exceptions import ImproperlyConfigured
from sqlalchemy import URL

from celery_singleton_state.store.options import (
    PORT,
    STORE,
    Option,
    choice,
    made_of,
    read_address,
    read_option,
    refuse_missing_files,
    refuse_unknown_options,
    refuse_what_fails,
    refuse_wrong_hosts,
    whole,
)

from .url import read_query

#: The values that libpq's option ``sslmode`` takes.
SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_BIT = whole(0, 1)
_NUMBER = whole(0)
_HOW_STRICT = choice("disable", "prefer", "require")
_TLS_VERSION = choice("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3")
_ADDRESS = made_of(read_address, "an address of IPv4 or IPv6")


def _threshold(text: str) -> int | None:
    return None if text == "none" else int(_NUMBER.read(text))


_OPTIONS: dict[str, Option] = {
    "channel_binding": _HOW_STRICT,
    "connect_timeout": _NUMBER,
    "gssdelegation": _BIT,
    "gssencmode": _HOW_STRICT,
    "keepalives": _BIT,
    "keepalives_count": _NUMBER,
    "keepalives_idle": _NUMBER,
    "keepalives_interval": _NUMBER,
    "load_balance_hosts": choice("disable", "random"),
    "prepare_threshold": Option(
        _threshold, "none, or how often a statement is sent before it is prepared"
    ),
    "ssl_max_protocol_version": _TLS_VERSION,
    "ssl_min_protocol_version": _TLS_VERSION,
    "sslcertmode": choice("disable", "allow", "require"),
    "sslcompression": _BIT,
    "sslmode": choice(*SSL_MODES),
    "sslnegotiation": choice("postgres", "direct"),
    "sslsni": _BIT,
    # The other values of target_session_attrs can lead to a server that refuses writes.
    "target_session_attrs": choice("any", "read-write", "primary", why=", as the store is written"),
    "tcp_user_timeout": _NUMBER,
}
#: The allowed values, in words for errors, of options that libpq itself checks before it connects.
_ALLOWED = {
    "require_auth": "methods with commas between them: scram-sha-256, md5, password, gss, sspi, "
    "none, each with or without a !",
    "service": "the name of a service in the file that PGSERVICEFILE names, or ~/.pg_service.conf",
    "min_protocol_version": "3.0, 3.2 or latest",
    "max_protocol_version": "3.0, 3.2 or latest",
}
_TLS = "sslmode=require (verify-full with sslrootcert=<file> checks who the server is)"
_NO_PREPARED = "write prepare_threshold=none"
_BOUNDED = "leave it out: singleton_heartbeat_interval bounds how long an answer may take"
#: Maps options of other drivers, which psycopg does not know, to advice. The error about such an
#: option ends with the advice.
_INSTEAD = {
    "command_timeout": _BOUNDED,
    "direct_tls": "write sslnegotiation=direct",
    "prepared_statement_cache_size": _NO_PREPARED,
    "server_settings": "write options=-c <name>=<value>",
    "ssl": "write sslmode=require",
    "ssl_context": f"write {_TLS}",
    "statement_cache_size": _NO_PREPARED,
    "timeout": _BOUNDED,
}
#: Options that a URL may have although libpq does not know them, because psycopg reads them itself.
_NOT_LIBPQS = frozenset({"prepare_threshold"})
#: Options that name the server, the database and the user. :func:`_begin` has its own values for
#: them, because it connects to this process instead of the server.
_SERVER_AND_USER = frozenset({"host", "hostaddr", "port", "user", "password", "dbname"})


def read_options(url: URL) -> dict[str, Any]:
    """Return the options of a PostgreSQL URL, parsed and checked.

    :raises ImproperlyConfigured: libpq does not know an option, a value is not allowed, or a file
        is missing.
    """
    known = {option.keyword.decode() for option in psycopg.pq.Conninfo.get_defaults()}
    query = read_query(url, _OPTIONS, may_repeat=("host", "port"))
    _read_each("port", query.get("port"), PORT)
    if query.get("ssl") in SSL_MODES and "sslmode" not in query:
        query["sslmode"] = query.pop("ssl")  # asyncpg calls this option ssl
    refuse_unknown_options(STORE, query, known | _NOT_LIBPQS, "psycopg", _INSTEAD)
    if str(query.get("sslmode")).startswith("verify") and query.get("sslrootcert") != "system":
        refuse_missing_files(STORE, query, ["sslrootcert"])
    return query


def refuse_wrong_values(query: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse values that libpq would refuse at each connection, without connecting to the server.

    :param query: the options of the URL.
    :param given: the connect arguments that SQLAlchemy makes from the whole URL.
    :raises ImproperlyConfigured: a value is not allowed.
    """
    hosts = [each for each in str(given.get("host") or "").split(",") if each]
    refuse_wrong_hosts(STORE, hosts)
    _read_each("port", given.get("port"), PORT)
    _read_each("hostaddr", given.get("hostaddr"), _ADDRESS)
    own = {name: str(value) for name, value in query.items() if name not in _SERVER_AND_USER}
    if not own:
        return
    # Check gssencmode=prefer instead of require. With require libpq refuses to begin a connection
    # without Kerberos credentials. These may be missing only at present, although the URL is right.
    if own.get("gssencmode") == "require":
        own["gssencmode"] = "prefer"
    try:
        server = socket.create_server(("127.0.0.1", 0))
    except OSError:
        return  # no check is possible on this host, so the first connection shows the errors
    with server:
        port = str(server.getsockname()[1])
        refuse_what_fails(STORE, own, lambda options: _begin(options, port), _ALLOWED)


def _read_each(name: str, value: Any, option: Option) -> None:
    """Check an option that may have one value for each host, separated by commas."""
    texts = str(value or "").split(",") if not isinstance(value, tuple) else value
    for text in filter(None, texts):
        read_option(STORE, name, text, option)


def _begin(options: Mapping[str, Any], port: str) -> None:
    """Have libpq check options, by beginning a connection to a socket of this process.

    libpq checks all options before it connects. The connection's status says whether libpq refuses
    an option. libpq's message is not used, because it may be in any language.

    :raises ImproperlyConfigured: libpq refuses the options.
    """
    server = {"host": "localhost", "hostaddr": "127.0.0.1", "port": port, "dbname": "x"}
    text = psycopg.conninfo.make_conninfo("", **options, **server)
    tried = psycopg.pq.PGconn.connect_start(text.encode())
    refused = tried.status == psycopg.pq.ConnStatus.BAD
    tried.finish()
    if refused:
        raise ImproperlyConfigured("libpq refuses the options")
