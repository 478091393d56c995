"""Which values of a request's ``Host`` header are answered.

A web page of a stranger can have its own name resolve to this exporter's address ("DNS
rebinding"). The visitor's browser then sends requests here, and the stranger's script reads the
answers. Such a request names the stranger's host, so names that a stranger can register in public
DNS are not answered unless the operator allows them. These are answered always:

- IP addresses: what scrapers of pods, and probes, send;
- names that nobody can register: ``localhost``, names without a dot, and the suffixes that are
  reserved or kept out of public DNS for private use, or belong to a cluster;
- the name of this machine, and the name that the server was told to listen at.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from functools import cached_property

#: Suffixes that public DNS does not have. They are reserved for private use (RFC 6761, 6762, 8375,
#: and ICANN's .internal), or kept out of public DNS because private networks use them (.corp and
#: .home by ICANN's resolution of 2018; .intranet, .lan and .private by RFC 6762, appendix G).
PRIVATE = (
    *(".local", ".localhost", ".home.arpa", ".internal", ".test"),
    *(".corp", ".home", ".intranet", ".lan", ".private", ".svc"),
)

#: Characters of a header's value: 253 of a name, and a port.
LONGEST = 260

_NAME = r"[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*"
_HOST = re.compile(rf"(?:\[(?P<ip>[^\[\]]*)\]|(?P<name>{_NAME})\.?)(?::[0-9]{{0,5}})?")
_PATTERN = re.compile(rf"\*|(\*\.)?{_NAME}")


class BadHost(ValueError):
    """The value is no host with an optional port."""


class Hosts:
    """Decides whether a request's host is answered.

    :param listens_at: what the operator gave as ``--host``.
    :param allowed: names beside those that are always answered; ``*.example.com`` stands for all
        names below it, and ``*`` for every name.
    """

    def __init__(self, listens_at: str = "", allowed: Iterable[str] = ()) -> None:
        self._allowed = {check_pattern(each).lower() for each in allowed}
        self._allowed.add(listens_at.lower().rstrip("."))

    def answers(self, host: str) -> bool:
        """Whether requests for this host are answered.

        :param host: as :func:`host_of` returns it.
        """
        if _is_address(host) or "." not in host or host.endswith(PRIVATE):
            return True
        if "*" in self._allowed or host in self._allowed:
            return True
        parents = (f"*{host[at:]}" for at, letter in enumerate(host) if letter == ".")
        return any(each in self._allowed for each in parents) or host in self._own

    @cached_property
    def _own(self) -> frozenset[str]:
        """The names of this machine. Resolving them can take long where DNS is broken, so it
        happens once, and only for a name that would not be answered otherwise.
        """
        return frozenset(name.lower().rstrip(".") for name in (socket.gethostname(), _full_name()))


def host_of(value: str) -> str:
    """The host in the value of a ``Host`` header: lower case, without port and trailing dot.

    :raises BadHost: it is none. Names of other alphabets come as ASCII from every client.
    """
    found = _HOST.fullmatch(value.strip(" \t")) if len(value) <= LONGEST else None
    if found is None:
        raise BadHost
    if (address := found["ip"]) is None:
        return found["name"].lower()
    try:
        return str(ipaddress.IPv6Address(address.replace("%25", "%")))
    except ValueError:
        raise BadHost from None


def check_pattern(text: str) -> str:
    """:raises ValueError: it is neither a name, nor ``*.`` and a name, nor ``*``."""
    text = text.rstrip(".")
    if _PATTERN.fullmatch(text) is None:
        raise ValueError(
            f"{text!r} is no host name; it takes a name without a port, as metrics.example.com, "
            "*.example.com for all names below it, or * for every name"
        )
    return text


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _full_name() -> str:
    try:
        return socket.getfqdn()
    except (OSError, UnicodeError):
        return ""
