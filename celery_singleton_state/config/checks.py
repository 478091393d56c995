"""Checks of the values that users set: options, settings, retry policies, entries of beat.

A check takes a value and returns it as it is to be used. It raises :exc:`ValueError` for a value
that is not allowed; the message says what is allowed, so that it can follow the words "it takes".
:func:`checked` makes the error that users see of it.
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

#: The largest number that is neither infinite nor too large for a float.
FINITE = sys.float_info.max


def checked(
    owner: str, name: str, value: Any, check: Check[T], show: Callable[[Any], str] = repr
) -> T:
    """The value as it is to be used.

    :param owner: what has the value, such as ``task shop.run``.
    :param name: the value's name, such as ``option lease_ttl``.
    :param show: makes the text that stands for the value in the error.
    :raises ImproperlyConfigured: the check refuses the value.
    """
    try:
        return check(value)
    except ValueError as error:
        raise refused(owner, name, show(value), str(error)) from None


def refused(owner: str, name: str, value: str, allowed: str) -> ImproperlyConfigured:
    """The error for a value that is not allowed."""
    return ImproperlyConfigured(f"{owner}: {name}={value} is not allowed; it takes {allowed}")


def checks_of(cls: type) -> dict[str, Check[Any]]:
    """The checks of those fields of a class that are annotated ``Annotated[type, check]``."""
    hints = get_type_hints(cls, include_extras=True)
    return {
        name: hint.__metadata__[0] for name, hint in hints.items() if get_origin(hint) is Annotated
    }


# -- checks


def anything(value: Any) -> Any:
    """Every value is allowed."""
    return value


def nothing(value: Any) -> None:
    """Only ``None`` is allowed."""
    if value is not None:
        raise ValueError("None")


def switch(value: Any) -> bool:
    """``True`` or ``False``; other values that Python takes for one are refused."""
    if not isinstance(value, bool):
        raise ValueError("True or False")
    return value


def text(value: Any) -> str:
    """A text that every database can store: not empty, without NUL or half a surrogate pair."""
    with suppress(UnicodeEncodeError):
        if isinstance(value, str) and value and b"\0" not in value.encode():
            return value
    raise ValueError("a text that is not empty and that a database can store")


def moment(value: Any) -> datetime:
    """A moment in time."""
    if not isinstance(value, datetime):
        raise ValueError("a datetime")
    return value


def named(what: str) -> Check[dict[str, Any]]:
    """Values by their names."""

    def check(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise ValueError(f"a dict of {what} by their names")
        return dict(value)

    return check


def choice(*allowed: str) -> Check[str]:
    """One of some texts."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(", ".join(map(repr, allowed)))
        # Not the value itself, which may be the member of an enum.
        return allowed[allowed.index(value)]

    return check


def seconds(least: float = 0.0, most: float = FINITE, *, above: bool = False) -> Check[float]:
    """A number of seconds within limits.

    :param above: whether ``least`` itself is refused.
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
    """A timedelta, or a number of seconds that the given check allows."""

    def check_either(value: Any) -> float:
        try:
            return check(value.total_seconds() if isinstance(value, timedelta) else value)
        except ValueError as error:
            raise ValueError(f"a timedelta or {error}") from None

    return check_either


def whole(least: float = -FINITE, most: float = FINITE) -> Check[int]:
    """A whole number within limits."""

    def check(value: Any) -> int:
        if not _is_a(numbers.Integral, value) or not least <= value <= most:
            raise ValueError(f"a whole number{_limits(least, most)}")
        return int(value)

    return check


def either(*checks: Check[Any]) -> Check[Any]:
    """A value that at least one of the checks allows."""

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
    """A value, or the text of one, as it comes from the environment."""

    def check_parsed(value: Any) -> T:
        if isinstance(value, str):
            with suppress(ValueError):
                value = parse(value)
        return check(value)

    return check_parsed


def _is_a(kind: type, value: Any) -> bool:
    """Whether a value is a number of this kind; ``True`` and ``False`` are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _limits(least: float, most: float) -> str:
    if most < FINITE:
        return f" from {least:.15g} to {most:.15g}"
    return f", {least:.15g} or more" if least > -FINITE else ""
