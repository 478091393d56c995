"""Check the TLS files and ciphers of a URL before the first connection."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from celery_singleton_state.store.options import refused_value


def refuse_unusable_tls(setting: str, options: Mapping[str, Any]) -> None:
    """Refuse files without a certificate or key, and ciphers that do not exist.

    Without this check the client library would fail at each connection, and report the mistake as a
    network error.

    :param setting: the name of the setting that has the URL, for the error.
    :param options: the URL's options, under the names that the client library gives them.
    :raises ImproperlyConfigured: a file or a cipher cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for name, allowed, check in _CHECKS:
        if name in options:
            try:
                check(context, options)
            # ssl.SSLError is caught as well, because it is an OSError.
            except (OSError, ValueError, TypeError):
                raise refused_value(setting, name, allowed) from None


def _load_chain(context: ssl.SSLContext, options: Mapping[str, Any]) -> None:
    # Give at least an empty password, because otherwise OpenSSL would ask for the key's password on
    # the terminal.
    context.load_cert_chain(
        options["ssl_certfile"], options.get("ssl_keyfile"), options.get("ssl_password", "")
    )


def _need_certificate(_context: ssl.SSLContext, options: Mapping[str, Any]) -> None:
    if "ssl_certfile" not in options:
        raise ValueError


def _need_directory(_context: ssl.SSLContext, options: Mapping[str, Any]) -> None:
    if not Path(options["ssl_ca_path"]).is_dir():
        raise ValueError


_Check = Callable[[ssl.SSLContext, Mapping[str, Any]], None]
_CHECKS: tuple[tuple[str, str, _Check], ...] = (
    (
        "ssl_certfile",
        "a file with a certificate in PEM; its key is in the same file or in ssl_keyfile, and "
        "ssl_password decrypts it",
        _load_chain,
    ),
    ("ssl_keyfile", "the key of ssl_certfile, which is missing", _need_certificate),
    (
        "ssl_ca_certs",
        "a file with certificates in PEM",
        lambda context, options: context.load_verify_locations(options["ssl_ca_certs"]),
    ),
    ("ssl_ca_path", "a folder with certificates in PEM", _need_directory),
    (
        "ssl_ca_data",
        "certificates in PEM",
        lambda context, options: context.load_verify_locations(cadata=options["ssl_ca_data"]),
    ),
    (
        "ssl_ciphers",
        "ciphers as OpenSSL names them, with colons between them",
        lambda context, options: context.set_ciphers(options["ssl_ciphers"]),
    ),
)
