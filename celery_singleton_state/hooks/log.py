"""The log lines of events: which kinds are logged, at which level, with which text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from celery_singleton_state.text.visible import logger_of

from .details import (
    Acquired,
    Changed,
    Details,
    Lost,
    Released,
    Skipped,
    StateSaved,
    TookOver,
    WriteRefused,
)

logger = logger_of("celery_singleton_state")

#: Maps a value of :attr:`TookOver.how` to the verb for it in the log line. The other values are
#: themselves verbs, such as ``expired``.
_HOW_IT_ENDED = {"handoff": "handed over"}
#: Maps each kind of event that is logged to the level, to the text that follows the singleton's
#: name in the log line, and to a function that returns the text's arguments from the details.
_LINES: Mapping[type[Details], tuple[int, str, Callable[[Any], tuple[Any, ...]]]] = {
    Acquired: (logging.DEBUG, "acquired with fence %d", lambda d: (d.fence,)),
    TookOver: (
        logging.INFO,
        "taken over with fence %d: the last run %s",
        lambda d: (d.fence, _HOW_IT_ENDED.get(d.how, d.how)),
    ),
    StateSaved: (logging.DEBUG, "state saved by %s", lambda d: (d.operation,)),
    WriteRefused: (logging.WARNING, "a %s was refused", lambda d: (d.operation,)),
    Lost: (logging.ERROR, "lease with fence %d is lost: %s", lambda d: (d.fence, d.why)),
    Released: (
        logging.DEBUG,
        "%s after %.3f s",
        lambda d: (d.outcome, d.seconds),
    ),
    Skipped: (logging.INFO, "%s", lambda d: (d.why,)),
    Changed: (logging.WARNING, "%s by %s", lambda d: (d.what, d.by)),
}

#: Maps each kind of event that is logged to the highest level of its log lines. A delivery that
#: ended without a run is logged at WARNING if it is a duplicate of a tick, and at INFO otherwise.
LEVELS = {kind: level for kind, (level, _, _) in _LINES.items()} | {Skipped: logging.WARNING}


def write(details: Details) -> None:
    """Write the log line of an event. Some kinds of events have none."""
    found = _LINES.get(type(details))
    if found is None:
        return
    level, text, fields = found
    if isinstance(details, Skipped) and details.tick is not None:
        level = logging.WARNING
    if logger.isEnabledFor(level):
        logger.log(level, f"singleton %s {text}", details.key, *fields(details))
