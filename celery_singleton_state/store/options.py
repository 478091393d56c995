"""Parse and check the options in a store's URL: the part behind the ``?``.

An error names the option and says which values are allowed. The error never shows the given value,
because that can be a part of a password.
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

#: The least similarity, from 0 to 1, at which an error suggests a known option in place of an
#: unknown one ("did you mean …"). Less similar options often belong to other drivers, and have
#: another meaning.
LIKE = 0.8
STORE, LEASES = "singleton_store_url", "singleton_lease_url"
LARGEST_PORT = 65535

_SWITCH = {"1": True, "true": True, "t": True, "yes": True, "y": True, "on": True}
_SWITCH |= {"0": False, "false": False, "f": False, "no": False, "n": False, "off": False}


@dataclass(frozen=True, slots=True)
class Option:
    """The parser of one option of a URL, and a description for errors.

    :param read: converts the option's text to its value, and raises :exc:`ValueError` if the text
        is not allowed.
    :param allowed: the allowed values, in words for an error: "``name`` takes ``allowed``".
    """

    read: Callable[[str], Any]
    allowed: str


def whole(least: int, most: int | None = None) -> Option:
    """Make an option that takes a whole number from ``least`` to ``most``.

    If ``most`` is left out, there is no upper limit.
    """

    def read(text: str) -> int:
        if not (text.isascii() and text.isdecimal()):
            raise ValueError
        # Python refuses to parse thousands of digits. The first 20 digits are enough, because a
        # number of 20 digits exceeds every upper limit.
        number = int(text[:20])
        if number < least or (most is not None and number > most):
            raise ValueError
        return number

    upto = f"{least} or more" if most is None else f"from {least} to {most}"
    return Option(read, f"a whole number, {upto}")


def seconds(least: float = 0.001) -> Option:
    """Make an option that takes a finite number of seconds, ``least`` or more."""

    def read(text: str) -> float:
        number = float(text)
        if not least <= number < math.inf:
            raise ValueError
        return number

    return Option(read, f"a number of seconds, {least:g} or more")


def choice(*words: str, why: str = "") -> Option:
    """Make an option that takes one of several words.

    :param why: the reason why only these words are allowed. The error's text ends with it.
    """

    def read(text: str) -> str:
        if text not in words:
            raise ValueError
        return text

    return Option(read, " or ".join(filter(None, [", ".join(words[:-1]), words[-1]])) + why)


def made_of(read: Callable[[str], Any], allowed: str) -> Option:
    """Make an option with a parser ``read`` that may raise errors of any class to refuse a text."""

    def checked(text: str) -> Any:
        try:
            return read(text)
        except Exception as error:
            # Catch every error, because ``read`` may call code that the option's text names.
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
    """Parse the text of an option in a URL, and return the option's value.

    :param setting: the name of the setting that has the URL.
    :param name: the option's name.
    :param text: the option's text in the URL.
    :raises ImproperlyConfigured: the text is not allowed. The error says which texts are allowed.
    """
    try:
        return option.read(text)
    except ValueError:
        raise refused_value(setting, name, option.allowed) from None


def refused_value(setting: str, name: str, allowed: str | None) -> ImproperlyConfigured:
    """Return the error for an option whose value is not allowed.

    :param allowed: the allowed values, in words. ``None``: the error refers to the driver's
        documentation.
    """
    takes = f": {name} takes {allowed}" if allowed else "; see its driver's documentation"
    return ImproperlyConfigured(
        f"{setting}: the value of the option {name!r} is not allowed{takes}"
    )


def as_argument(text: str) -> str:
    """Reword an error's text for a user who gave the store's URL as an argument, not as a setting.

    The text then says "the URL" instead of the setting's name.
    """
    return text.replace(f"{STORE}=", "the URL ").replace(STORE, "the URL")


def refuse_unknown_options(
    setting: str,
    names: Collection[str],
    known: Collection[str],
    driver: str,
    instead: Mapping[str, str],
) -> None:
    """Refuse options of a URL that the driver does not know and would refuse at each connection.

    :param names: the names of the options in the URL.
    :param known: the names of the options that the driver knows.
    :param driver: the driver's name, for the error.
    :param instead: a mapping from options of other drivers to advice for the error, such as which
        option to write instead.
    :raises ImproperlyConfigured: an option is not known. The error suggests a similar name.
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
    """Refuse options of a URL whose values name files that do not exist.

    :param query: the options of the URL.
    :param names: the options whose values are names of files.
    :raises ImproperlyConfigured: a file does not exist.
    """
    for name in names:
        value = query.get(name)
        if isinstance(value, str) and not Path(value).expanduser().exists():
            raise ImproperlyConfigured(f"{setting}: there is no file {value!r}, which {name} names")


def refuse_repeated(setting: str, names: Iterable[str]) -> None:
    """Refuse options that a URL has twice, because it is not clear which of the two is meant.

    :raises ImproperlyConfigured: an option is repeated.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ImproperlyConfigured(
                f"{setting}: the option {name!r} is given twice; remove one of the two"
            )
        seen.add(name)


def refuse_nul(setting: str, parts: Mapping[str, Any]) -> None:
    """Refuse a URL that contains a NUL character (``%00``).

    A driver that is written in C cuts a text at a NUL, and could then connect to another server.

    :param parts: a mapping from the names of the URL's parts, as the error shows them, to the
        decoded parts.
    :raises ImproperlyConfigured: a part contains a NUL.
    """
    for name, part in parts.items():
        if "\0" in str(part):
            raise ImproperlyConfigured(f"{setting}: {name} has a NUL in it (%00); leave it out")


def refuse_wrong_hosts(setting: str, hosts: Collection[str]) -> None:
    """Refuse names of hosts that DNS does not allow. Paths of sockets are allowed.

    :raises ImproperlyConfigured: a host's name is not valid.
    """
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
                f"{setting}: the name of a host cannot be looked up: it has an empty part "
                "between two dots, a part of more than 63 characters, or a blank"
            )


def read_address(text: str) -> str:
    """Return a text unchanged if it is an IPv4 or IPv6 address.

    :raises ValueError: the text is not an address.
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
    """Have a driver check options without connecting to a server, and refuse options that the
    driver does not accept.

    If the attempt with all options fails, it is repeated once for each option, without this option.
    If such an attempt succeeds, the error names the option that was left out. The driver's own
    message is not shown, because it can contain a line of a file.

    :param attempt: gives the options to the driver, and raises an error of any class if the driver
        does not accept them.
    :param allowed: a mapping from options to their allowed values, in words for the error.
    :raises ImproperlyConfigured: the driver does not accept the options.
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
    except Exception as error:
        # Catch every error, because the driver, its parser and Python's ssl raise many classes.
        return error
    return None
