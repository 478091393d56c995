"""The options that a Redis URL may have in its query, each with its check.

All other options of the client library are refused, because they would change something that the
store relies on.
"""

from __future__ import annotations

import ssl
from typing import Any

from kombu.utils.imports import symbol_by_name
from redis import CredentialProvider

from celery_singleton_state.store.options import (
    SWITCH,
    TEXT,
    Option,
    made_of,
    seconds,
    whole,
)


def _word(text: str) -> str:
    if not text.isprintable() or " " in text:
        raise ValueError
    return text


def _cert_reqs(text: str) -> str:
    value = text.lower().removeprefix("ssl.").removeprefix("verifymode.").removeprefix("cert_")
    if value not in ("none", "optional", "required"):
        raise ValueError
    return value


def _tls_version(text: str) -> ssl.TLSVersion:
    for version in ssl.TLSVersion:
        names = (str(int(version)), version.name.lower(), version.name.lower().replace("_", "."))
        if text.lower() in names and version > ssl.TLSVersion.SSLv3:
            return version
    raise ValueError


def _verify_flags(text: str) -> list[ssl.VerifyFlags]:
    names = text.strip("[]").split(",")
    return [ssl.VerifyFlags[name.strip()] for name in names]


def _provider(text: str) -> Any:
    made = symbol_by_name(text)()
    if not isinstance(made, CredentialProvider):
        raise TypeError
    return made


_WORD = Option(_word, "a text without blanks")
_FLAGS = made_of(_verify_flags, "names of ssl.VerifyFlags with commas between them")

#: Maps the name of each option that a URL may have for any kind of connection to its parser.
OF_CONNECTIONS: dict[str, Option] = {
    "client_name": _WORD,
    "health_check_interval": whole(0),
    "lib_name": _WORD,
    "lib_version": _WORD,
    "password": TEXT,
    "protocol": whole(2, 3),
    "retry_on_timeout": SWITCH,
    "socket_connect_timeout": seconds(),
    "socket_keepalive": SWITCH,
    "socket_read_size": whole(1, 2**30),
    "socket_timeout": seconds(),
    "username": TEXT,
}
#: The options that a URL may have only if the connection uses TLS: maps each name to its parser.
OF_TLS: dict[str, Option] = {
    "ssl_ca_certs": TEXT,
    "ssl_ca_data": TEXT,
    "ssl_ca_path": TEXT,
    "ssl_cert_reqs": Option(_cert_reqs, "none, optional or required (or CERT_NONE, as Python)"),
    "ssl_certfile": TEXT,
    "ssl_check_hostname": SWITCH,
    "ssl_ciphers": TEXT,
    "ssl_exclude_verify_flags": _FLAGS,
    "ssl_include_verify_flags": _FLAGS,
    "ssl_keyfile": TEXT,
    "ssl_min_version": Option(_tls_version, "TLSv1_2 or TLSv1_3 (or 771, 772, as Python)"),
    "ssl_password": TEXT,
}
CREDENTIAL_PROVIDER = made_of(
    _provider, "the name of a class of redis.CredentialProvider that needs no arguments"
)
#: Options whose value is the name of a file or a folder.
FILES = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile")
#: Options that a URL may have, but which have no effect. ``max_connections`` belongs to the client
#: library's connection pool, which the store does not use. Celery's users write the other two in
#: the URL of a broker, and use this URL for the store, too.
WITHOUT_EFFECT = frozenset({"max_connections", "timeout", "visibility_timeout"})
