"""Decides by the ``Host`` header which requests the exporter answers.

An attacker can make the name of their own web site resolve to this exporter's address ("DNS
rebinding"). A visitor's browser then sends requests here, and the attacker's script reads the
answers. Such a request names the attacker's host. So the exporter does not answer names that can be
registered in public DNS, unless the operator allows them. It always answers these:

- IP addresses, because Prometheus and probes send the address of a pod;
- names that cannot be registered: ``localhost``, names without a dot, and names with a suffix that
  is reserved or kept out of public DNS for private use, or that belongs to a cluster;
- the name of this machine, and the name at which the server listens.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from functools import cached_property

#: Suffixes of names that nobody can register in public DNS. Some are reserved for private use (RFC
#: 6761, 6762, 8375, and ICANN's .internal). Others are kept out of public DNS because private
#: networks use them (.corp and .home by ICANN's resolution of 2018; .intranet, .lan and .private by
#: RFC 6762, appendix G). A name that ends in .svc belongs to a Kubernetes cluster.
PRIVATE = (
    *(".local", ".localhost", ".home.arpa", ".internal", ".test"),
    *(".corp", ".home", ".intranet", ".lan", ".private", ".svc"),
)

#: The most characters of a ``Host`` header: a host name has up to 253, and a port can follow.
LONGEST = 260

_NAME = r"[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*"
_HOST = re.compile(rf"(?:\[(?P<ip>[^\[\]]*)\]|(?P<name>{_NAME})\.?)(?::[0-9]{{0,5}})?")
_PATTERN = re.compile(rf"\*|(\*\.)?{_NAME}")


class BadHost(ValueError):
    """The value of a ``Host`` header is not a host with an optional port."""


class Hosts:
    """Decides whether requests for a host are answered.

    :param listens_at: the value of ``--host``.
    :param allowed: further host names to answer. ``*.example.com`` stands for all names below
        ``example.com``, and ``*`` for every name.
    :raises ValueError: an allowed name is not a host name.
    """

    def __init__(self, listens_at: str = "", allowed: Iterable[str] = ()) -> None:
        self._allowed = {check_pattern(each).lower() for each in allowed}
        self._allowed.add(listens_at.lower().rstrip("."))

    def answers(self, host: str) -> bool:
        """Return whether requests for this host are answered.

        :param host: a host as :func:`host_of` returns it.
        """
        if _is_address(host) or "." not in host or host.endswith(PRIVATE):
            return True
        if "*" in self._allowed or host in self._allowed:
            return True
        parents = (f"*{host[at:]}" for at, letter in enumerate(host) if letter == ".")
        return any(each in self._allowed for each in parents) or host in self._own

    @cached_property
    def _own(self) -> frozenset[str]:
        """The names of this machine, resolved at the first use.

        Resolving the names can take long if DNS is broken. So the names are resolved only once, and
        only if no other rule allows a request's host.
        """
        return frozenset(name.lower().rstrip(".") for name in (socket.gethostname(), _full_name()))


def host_of(value: str) -> str:
    """Return the host that a ``Host`` header names: lower case, without port and trailing dot.

    :raises BadHost: the value is not a host. Only ASCII is accepted, because clients encode names
        of other alphabets in ASCII.
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
    """Check a value of ``--allowed-host``, and return it without a trailing dot.

    :raises ValueError: the value is neither a name, nor ``*.`` and a name, nor ``*``.
    """
    text = text.rstrip(".")
    if _PATTERN.fullmatch(text) is None:
        raise ValueError(
            f"{text!r} is not a host name; give a name without a port such as "
            "metrics.example.com, *.example.com for all names below it, or * for every name"
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
