"""Schedules as texts, by which beats see that a schedule was changed.

A text must not depend on the process, as an address or the order of a set does: another process
would take the schedule for a changed one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from typing import Any

from celery_singleton_state.compat import SCHEDULE_ATTRIBUTES, SCHEDULE_OF_APP

from .own_rules import Schedule

#: A longer text ends in a digest.
LONGEST = 400
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def canonical_text(asked: Schedule, suffix: str = "") -> str:
    """A schedule's class, the arguments of Celery's class, and the attributes that it has besides.

    Its ``__reduce__`` is not asked: most classes have Celery's, without their own arguments.
    """
    try:
        parts = _arguments(asked)
    except Exception:  # a class that does not call Celery's __init__, or cannot be shown
        parts = _attributes(asked, SCHEDULE_OF_APP)
    text = _ADDRESS.sub("", f"{type(asked).__name__}({', '.join(parts)}){suffix}")
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]}~{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:16]}"


def _arguments(asked: Schedule) -> list[str]:
    for celerys, known in SCHEDULE_ATTRIBUTES.items():
        if isinstance(asked, celerys):
            arguments = [each for each in celerys.__reduce__(asked)[1] if not callable(each)]
            return [*map(_text, arguments), *_attributes(asked, SCHEDULE_OF_APP | known)]
    return _attributes(asked, SCHEDULE_OF_APP)


def _attributes(asked: Schedule, but: frozenset[str]) -> list[str]:
    attributes = sorted(getattr(asked, "__dict__", {}).items())
    return [f"{name}={_text(value)}" for name, value in attributes if name not in but]


def _text(value: Any) -> str:
    try:
        return _text_of(value)
    except Exception:  # a user's class, or a value that contains itself
        return type(value).__name__


def _text_of(value: Any) -> str:
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(_text_of, value)))}}}"
    if isinstance(value, Mapping):
        items = sorted(f"{_text_of(key)}: {_text_of(each)}" for key, each in value.items())
        return f"{{{', '.join(items)}}}"
    if type(value) in (list, tuple):
        return f"{type(value).__name__}({', '.join(map(_text_of, value))})"
    if isinstance(value, type) or callable(value):
        return str(getattr(value, "__qualname__", type(value).__name__))
    if dataclasses.is_dataclass(value):
        return type(value).__name__ + _text_of(vars(value))
    return repr(value)
