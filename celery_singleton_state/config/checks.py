"""Check the values that users set: options, settings, retry policies, entries of beat's schedule.

A check is a function. It takes a value and returns it, converted if necessary. If the value is not
allowed, the check raises :exc:`ValueError`, whose message only says what is allowed.
:func:`checked` turns that message into the error that users see: "task t: option o=value is not
allowed; it takes ...".
"""

from __future__ import annotations

import numbers
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Annotated, Any, TypeVar, get_origin, get_type_hints

from celery.exceptions import ImproperlyConfigured

T = TypeVar("T")
Check = Callable[[Any], T]

#: The largest number that a check allows if no other limit is given: the largest finite float.
FINITE = sys.float_info.max


def checked(
    owner: str, name: str, value: Any, check: Check[T], show: Callable[[Any], str] = repr
) -> T:
    """Check a value that a user has set, and return the value, converted if necessary.

    :param owner: the words by which the error says where the value was set, such as
        ``task shop.run``.
    :param name: the words by which the error names the value, such as ``option lease_ttl``.
    :param check: the check of the value.
    :param show: converts the value to the text that the error shows. Left out: ``repr``.
    :raises ImproperlyConfigured: the check refuses the value.
    """
    try:
        return check(value)
    except ValueError as error:
        raise refused(owner, name, show(value), str(error)) from None


def refused(owner: str, name: str, value: str, allowed: str) -> ImproperlyConfigured:
    """Return the error for a value that is not allowed.

    :param owner, name: as in :func:`checked`.
    :param value: the value, as the error shows it.
    :param allowed: the allowed values, in words that follow "it takes" in the error.
    """
    return ImproperlyConfigured(f"{owner}: {name}={value} is not allowed; it takes {allowed}")


def checks_of(cls: type) -> dict[str, Check[Any]]:
    """Return a dict that maps the names of a class's fields to their checks.

    A field has a check if it is annotated ``Annotated[type, check]``.
    """
    hints = get_type_hints(cls, include_extras=True)
    return {
        name: hint.__metadata__[0] for name, hint in hints.items() if get_origin(hint) is Annotated
    }


# -- checks


def anything(value: Any) -> Any:
    """Allow every value."""
    return value


def nothing(value: Any) -> None:
    """Allow only ``None``."""
    if value is not None:
        raise ValueError("None")


def switch(value: Any) -> bool:
    """Allow only ``True`` and ``False``. Other values that Python treats as true are refused."""
    if not isinstance(value, bool):
        raise ValueError("True or False")
    return value


def text(value: Any) -> str:
    """Allow a text that is not empty and that every database can store.

    Some databases cannot store a text with a NUL character or with half of a surrogate pair.
    """
    with suppress(UnicodeEncodeError):
        if isinstance(value, str) and value and b"\0" not in value.encode():
            return value
    raise ValueError("a text that is not empty and that a database can store")


def moment(value: Any) -> datetime:
    """Allow a ``datetime``."""
    if not isinstance(value, datetime):
        raise ValueError("a datetime")
    return value


def named(what: str) -> Check[dict[str, Any]]:
    """Make a check that allows a dict whose keys are texts.

    :param what: the word by which the error names the dict's values, such as ``arguments``.
    """

    def check(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise ValueError(f"a dict of {what} by their names")
        return dict(value)

    return check


def choice(*allowed: str) -> Check[str]:
    """Make a check that allows one of several texts."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(", ".join(map(repr, allowed)))
        # Do not return the value itself, because it may be a member of a string enum. Return the
        # plain text that is equal to it.
        return allowed[allowed.index(value)]

    return check


def seconds(least: float = 0.0, most: float = FINITE, *, above: bool = False) -> Check[float]:
    """Make a check that allows a number of seconds from ``least`` to ``most``.

    :param least: the smallest allowed number. Left out: 0.
    :param most: the largest allowed number. Left out: each finite number is allowed.
    :param above: true refuses ``least`` itself. Default: false.
    """
    limits = f", more than {least:.15g}" if above else _limits(least, most)

    def check(value: Any) -> float:
        with suppress(OverflowError):
            if (
                _is_a(numbers.Real, value)
                and least <= value <= most
                and not (above and value == least)
            ):
                return float(value)
        raise ValueError(f"a number of seconds{limits}")

    return check


def duration(check: Check[float]) -> Check[float]:
    """Make a check that allows a duration, as a number of seconds or as a timedelta.

    The check returns the number of seconds.

    :param check: the check of the number of seconds.
    """

    def check_either(value: Any) -> float:
        try:
            return check(value.total_seconds() if isinstance(value, timedelta) else value)
        except ValueError as error:
            raise ValueError(f"a timedelta or {error}") from None

    return check_either


def whole(least: float = -FINITE, most: float = FINITE) -> Check[int]:
    """Make a check that allows a whole number from ``least`` to ``most``.

    A limit that is left out does not apply.
    """

    def check(value: Any) -> int:
        if not _is_a(numbers.Integral, value) or not least <= value <= most:
            raise ValueError(f"a whole number{_limits(least, most)}")
        return int(value)

    return check


def either(*checks: Check[Any]) -> Check[Any]:
    """Make a check that allows a value if at least one of the given checks allows it."""

    def check(value: Any) -> Any:
        refusals = []
        for each in checks:
            try:
                return each(value)
            except ValueError as error:
                refusals.append(str(error))
        raise ValueError(", or ".join(refusals))

    return check


def parsed(parse: Callable[[str], Any], check: Check[T]) -> Check[T]:
    """Make a check that also allows a value in the form of a text, as in an environment variable.

    :param parse: converts the text to the value.
    :param check: the check of the value.
    """

    def check_parsed(value: Any) -> T:
        if isinstance(value, str):
            with suppress(ValueError):
                value = parse(value)
        return check(value)

    return check_parsed


def _is_a(kind: type, value: Any) -> bool:
    """Whether a value is a number of the type ``kind``, but not ``True`` or ``False``."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _limits(least: float, most: float) -> str:
    if most < FINITE:
        return f" from {least:.15g} to {most:.15g}"
    return f", {least:.15g} or more" if least > -FINITE else ""
