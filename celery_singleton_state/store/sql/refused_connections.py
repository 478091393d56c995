"""Advice for the operator about connections that a server or a driver refuses because of a value
in the URL.
"""

from __future__ import annotations

import re

#: A part of psycopg's error when the URL has several hosts and none of them accepted the
#: connection. A host may be unavailable only for a while, so the error may pass by itself.
_SEVERAL_HOSTS = "Multiple connection attempts failed"

#: Advice about connections that MySQL refuses because of TLS or of a session's settings: maps each
#: error number to what the operator has to do.
_NUMBERS = {
    1115: "the server does not know the charset in singleton_store_url",
    1193: "the server does not know a variable that init_command in singleton_store_url sets",
    1231: "the server does not accept the sql_mode in singleton_store_url",
    1273: "the server does not know the collation in singleton_store_url",
    2026: "the server offers no TLS: enable TLS on the server, or remove the options ssl_… from "
    "singleton_store_url",
}
_VERIFY = (
    "the server's certificate is not the one that singleton_store_url requires: check sslrootcert "
    "(ssl_ca on MySQL) and the name of the host"
)
#: Advice about connections that PostgreSQL or a driver refuses. Each item has a pattern that
#: matches the error's text, because these errors have no SQLSTATE, and the advice.
_TEXTS = (
    (
        "does not support SSL|SSL was required|SSL required, but",
        "the server offers no TLS: enable TLS on the server, or set another sslmode in "
        "singleton_store_url",
    ),
    ("certificate verify failed|CERTIFICATE_VERIFY_FAILED|does not match host name", _VERIFY),
    (
        "root certificate file .* does not exist|could not (read|load) (root )?certificate|"
        "could not load private key|private key file|certificate file",
        "check the files that sslrootcert, sslcert and sslkey in singleton_store_url name",
    ),
    (
        "authentication method requirement|authentication method .* failed",
        "the server uses a method that require_auth in singleton_store_url does not allow",
    ),
    (
        "channel binding",
        "the server does not support channel_binding=require in singleton_store_url",
    ),
    (
        "GSSAPI encryption|GSSAPI.* required",
        "the server does not support gssencmode=require in singleton_store_url",
    ),
    (
        "unrecognized configuration parameter|invalid value for parameter|permission denied to set|"
        "invalid command-line argument|FATAL: +--.* requires a value|"
        "unsupported startup parameter|cannot be changed",
        "the server does not accept a setting of options in singleton_store_url",
    ),
    (
        "definition of service .* not found|service file",
        "the service that singleton_store_url names does not exist",
    ),
    ("could not parse network address", "hostaddr in singleton_store_url is not an address"),
)


def advice_of_connecting(code: str | int | None, text: str) -> str | None:
    """Return what the operator has to do about a refused connection.

    :param code: the error's code, for example MySQL's number.
    :param text: the error's message.
    :returns: ``None`` if no advice is known, or if the error may pass by itself.
    """
    if isinstance(code, int) and code in _NUMBERS:
        return _NUMBERS[code]
    if _SEVERAL_HOSTS in text:
        return None
    return next((advice for pattern, advice in _TEXTS if re.search(pattern, text)), None)
