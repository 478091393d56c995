"""Why a database's server, or its driver, lets nobody in with what stands in the URL."""

from __future__ import annotations

import re

#: psycopg's when one of several hosts may be away, and be the one that has what another lacks.
_SEVERAL = "Multiple connection attempts failed"

#: By MySQL's numbers: of what PyMySQL asks a new session to have, and of TLS.
_NUMBERS = {
    1115: "charset in singleton_store_url is one that the server does not know",
    1193: "init_command in singleton_store_url sets what the server does not know",
    1231: "sql_mode in singleton_store_url is not one that the server takes",
    1273: "collation in singleton_store_url is one that the server does not know",
    2026: "the server offers no TLS: have it do so, or leave out the options ssl_… in "
    "singleton_store_url",
}
_VERIFY = (
    "the server's certificate is not the one that singleton_store_url asks for: see to sslrootcert "
    "(ssl_ca on MySQL), and to the host's name"
)
#: By texts, because errors of a connection that is refused have no SQLSTATE.
_TEXTS = (
    (
        "does not support SSL|SSL was required|SSL required, but",
        "the server offers no TLS: have it do so, or set another sslmode in singleton_store_url",
    ),
    ("certificate verify failed|CERTIFICATE_VERIFY_FAILED|does not match host name", _VERIFY),
    (
        "root certificate file .* does not exist|could not (read|load) (root )?certificate|"
        "could not load private key|private key file|certificate file",
        "see to the files of sslrootcert, sslcert and sslkey in singleton_store_url",
    ),
    (
        "authentication method requirement|authentication method .* failed",
        "the server uses another method than require_auth in singleton_store_url allows",
    ),
    (
        "channel binding",
        "the server cannot do what channel_binding=require in singleton_store_url asks for",
    ),
    (
        "GSSAPI encryption|GSSAPI.* required",
        "the server cannot do what gssencmode=require in singleton_store_url asks for",
    ),
    (
        "unrecognized configuration parameter|invalid value for parameter|permission denied to set|"
        "invalid command-line argument|FATAL: +--.* requires a value|"
        "unsupported startup parameter|cannot be changed",
        "the server does not take what options in singleton_store_url sets",
    ),
    (
        "definition of service .* not found|service file",
        "service in singleton_store_url names none that there is",
    ),
    ("could not parse network address", "hostaddr in singleton_store_url is no address"),
)


def advice_of_connecting(code: str | int | None, text: str) -> str | None:
    """What somebody has to do about a connection that is refused; ``None`` if it can pass.

    :param code: MySQL's number, if it is one.
    :param text: of the error.
    """
    if isinstance(code, int) and code in _NUMBERS:
        return _NUMBERS[code]
    if _SEVERAL in text:
        return None
    return next((advice for pattern, advice in _TEXTS if re.search(pattern, text)), None)
