"""Write a schedule as a text. Beats compare such texts to see whether a schedule was changed.

The text of a schedule must be the same in each process. Otherwise another process would take an
unchanged schedule for a changed one. So the text has no memory addresses, and sets are sorted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from typing import Any

from celery_singleton_state.compat import SCHEDULE_ATTRIBUTES, SCHEDULE_OF_APP

from .own_rules import Schedule

#: The number of characters after which a schedule's text is cut and a digest is appended.
LONGEST = 400
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def canonical_text(schedule: Schedule, suffix: str = "") -> str:
    """Return a text of a schedule's class and values, the same in each process.

    The values are the arguments of the Celery class that the schedule derives from, and the
    attributes that the schedule's own class adds. These attributes are read from the object and not
    by ``__reduce__``, because most classes inherit Celery's ``__reduce__``, which leaves them out.

    :param suffix: a text to append, such as the schedule's time zone.
    """
    try:
        parts = _arguments(schedule)
    except Exception:  # for example, a user's class does not call Celery's __init__
        parts = _attributes(schedule, SCHEDULE_OF_APP)
    text = _ADDRESS.sub("", f"{type(schedule).__name__}({', '.join(parts)}){suffix}")
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]}~{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:16]}"


def _arguments(schedule: Schedule) -> list[str]:
    for celerys, known in SCHEDULE_ATTRIBUTES.items():
        if isinstance(schedule, celerys):
            arguments = [each for each in celerys.__reduce__(schedule)[1] if not callable(each)]
            return [*map(_text, arguments), *_attributes(schedule, SCHEDULE_OF_APP | known)]
    return _attributes(schedule, SCHEDULE_OF_APP)


def _attributes(schedule: Schedule, but: frozenset[str]) -> list[str]:
    attributes = sorted(getattr(schedule, "__dict__", {}).items())
    return [f"{name}={_text(value)}" for name, value in attributes if name not in but]


def _text(value: Any) -> str:
    try:
        return _text_of(value)
    except Exception:  # repr() of a user's class fails, or the value contains itself
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
