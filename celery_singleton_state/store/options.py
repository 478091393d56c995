"""Options in a store's URL: each is read as what it is, or refused with what is allowed.

No refusal shows a value, because it can be a part of a password.
"""

from __future__ import annotations

import difflib
import math
import socket
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from celery.exceptions import ImproperlyConfigured

#: How like a name has to be for a question whether it is meant. A name that is less like, of
#: another driver's option for example, can do something else.
LIKE = 0.8
STORE, LEASES = "singleton_store_url", "singleton_lease_url"
LARGEST_PORT = 65535

_SWITCH = {"1": True, "true": True, "t": True, "yes": True, "y": True, "on": True}
_SWITCH |= {"0": False, "false": False, "f": False, "no": False, "n": False, "off": False}


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a URL.

    :param read: the value from its text; :exc:`ValueError` if it is not allowed.
    :param allowed: what the option takes, for people.
    """

    read: Callable[[str], Any]
    allowed: str


def whole(least: int, most: int | None = None) -> Option:
    """A whole number."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdecimal()):
            raise ValueError
        # Python refuses to read a number of thousands of digits.
        number = int(text[:20])
        if number < least or (most is not None and number > most):
            raise ValueError
        return number

    upto = f"{least} or more" if most is None else f"from {least} to {most}"
    return Option(read, f"a whole number, {upto}")


def seconds(least: float = 0.001) -> Option:
    """A number of seconds; neither infinity nor NaN."""

    def read(text: str) -> float:
        number = float(text)
        if not least <= number < math.inf:
            raise ValueError
        return number

    return Option(read, f"a number of seconds, {least:g} or more")


def choice(*words: str, why: str = "") -> Option:
    """One of several words."""

    def read(text: str) -> str:
        if text not in words:
            raise ValueError
        return text

    return Option(read, " or ".join(filter(None, [", ".join(words[:-1]), words[-1]])) + why)


def made_of(read: Callable[[str], Any], allowed: str) -> Option:
    """An option whose text anything may refuse."""

    def checked(text: str) -> Any:
        try:
            return read(text)
        except Exception as error:  # of a class that a user names, for example
            raise ValueError from error

    return Option(checked, allowed)


def _read_switch(text: str) -> bool:
    try:
        return _SWITCH[text.lower()]
    except KeyError:
        raise ValueError from None


SWITCH = Option(_read_switch, "true or false")
TEXT = Option(str, "a text")
PORT = whole(1, LARGEST_PORT)


def read_option(setting: str, name: str, text: str, option: Option) -> Any:
    """The value of an option.

    :raises ImproperlyConfigured: it is not allowed; the message says what is.
    """
    try:
        return option.read(text)
    except ValueError:
        raise refused_value(setting, name, option.allowed) from None


def refused_value(setting: str, name: str, allowed: str | None) -> ImproperlyConfigured:
    """The refusal of an option's value.

    :param allowed: ``None`` if only the driver's documentation says it.
    """
    takes = f": {name} takes {allowed}" if allowed else "; see its driver's documentation"
    return ImproperlyConfigured(
        f"{setting}: the value of the option {name!r} is not allowed{takes}"
    )


def as_argument(text: str) -> str:
    """An error's text for somebody who gave the URL of a store as an argument, not as a setting."""
    return text.replace(f"{STORE}=", "the URL ").replace(STORE, "the URL")


def refuse_unknown_options(
    setting: str,
    names: Collection[str],
    known: Collection[str],
    driver: str,
    instead: Mapping[str, str],
) -> None:
    """Refuse options of a URL that the driver would refuse at each connection.

    :param instead: what to write for other drivers' options.
    :raises ImproperlyConfigured: the driver does not know one of them.
    """
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=LIKE)
            hint = f"did you mean {near[0]}?" if near else "leave it out"
            hint = instead.get(name, hint)
            raise ImproperlyConfigured(
                f"{setting}: {driver} does not know the option {name!r}; {hint}"
            )


def refuse_missing_files(setting: str, query: Mapping[str, object], names: Collection[str]) -> None:
    """:raises ImproperlyConfigured: an option of a URL names a file that is not there."""
    for name in names:
        value = query.get(name)
        if isinstance(value, str) and not Path(value).expanduser().exists():
            raise ImproperlyConfigured(f"{setting}: there is no file {value!r}, which {name} names")


def refuse_repeated(setting: str, names: Iterable[str]) -> None:
    """:raises ImproperlyConfigured: an option stands twice, so that nobody knows which counts."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ImproperlyConfigured(
                f"{setting}: the option {name!r} stands twice; leave one out"
            )
        seen.add(name)


def refuse_nul(setting: str, parts: Mapping[str, Any]) -> None:
    """Refuse a NUL, at which a driver in C cuts what it is given: it would ask another server.

    :param parts: of the URL, decoded, by their names.
    :raises ImproperlyConfigured: there is one.
    """
    for name, part in parts.items():
        if "\0" in str(part):
            raise ImproperlyConfigured(f"{setting}: {name} has a NUL in it (%00); leave it out")


def refuse_wrong_hosts(setting: str, hosts: Collection[str]) -> None:
    """:raises ImproperlyConfigured: a name could never be that of a host."""
    for host in hosts:
        try:
            if not host.startswith(("/", "@")):
                host.encode("idna")
                is_wrong = any(each.isspace() for each in host)
            else:
                is_wrong = False
        except UnicodeError:
            is_wrong = True
        if is_wrong:
            raise ImproperlyConfigured(
                f"{setting}: the name of a host is not one that can be looked up (an empty part "
                "between two dots, a part of more than 63 characters, or a blank)"
            )


def read_address(text: str) -> str:
    """An address of IPv4 or IPv6 as it is.

    :raises ValueError: it is none.
    """
    try:
        socket.getaddrinfo(text, None, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        raise ValueError from None
    return text


def refuse_what_fails(
    setting: str,
    options: Mapping[str, Any],
    attempt: Callable[[Mapping[str, Any]], None],
    allowed: Mapping[str, str],
) -> None:
    """Refuse the options that a driver refuses, by an attempt that connects to no server.

    The option without which the attempt succeeds is the one that is named. What the driver says
    is not shown: it can be a line of a file.

    :param attempt: raises an error of any kind if it does not take the options.
    :param allowed: what an option takes, for people.
    :raises ImproperlyConfigured: it does not take them.
    """
    error = _failure(attempt, options)
    if error is None:
        return
    for name in options:
        rest = {other: value for other, value in options.items() if other != name}
        if _failure(attempt, rest) is None:
            raise refused_value(setting, name, allowed.get(name)) from None
    _refuse_all(setting, options, error)


def _refuse_all(setting: str, options: Mapping[str, Any], error: Exception) -> NoReturn:
    names = ", ".join(options)
    raise ImproperlyConfigured(
        f"{setting}: the driver refuses the options ({names}; {type(error).__name__}); "
        "see its documentation"
    ) from None


def _failure(
    attempt: Callable[[Mapping[str, Any]], None], options: Mapping[str, Any]
) -> Exception | None:
    try:
        attempt(options)
    except Exception as error:  # whatever the driver, its parser or Python's ssl raises
        return error
    return None
