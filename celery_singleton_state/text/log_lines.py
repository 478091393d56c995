"""The package's loggers: nothing that they write can break off a line, or begin another one.

Keys, ids, names of holders and texts of errors come from outside, and stand in lines of the log. A
line break in one would begin a line that nobody wrote, and a terminal obeys escapes. So texts are
logged as :mod:`celery_singleton_state.text.visible` shows them.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from traceback import TracebackException
from typing import Any

from .visible import visible

#: Arguments that are no texts, and have none.
_PLAIN = (bool, int, float, type(None))


def logger_of(name: str) -> logging.Logger:
    """The logger of one of the package's modules.

    Each has the filter of its own, because the filters of a parent are not asked for records of its
    children.
    """
    logger = logging.getLogger(name)
    logger.addFilter(_make_visible)
    return logger


def _make_visible(record: logging.LogRecord) -> bool:
    """Have the record's arguments and traceback shown without a character that is not seen."""
    if isinstance(record.args, tuple):
        record.args = tuple(map(_shown, record.args))
    elif record.args:
        record.args = {name: _shown(each) for name, each in record.args.items()}
    if record.exc_info and record.exc_info[1] is not None:
        # Formatters take this text for their own.
        record.exc_text = _traceback(record.exc_info[1])
    return True


def _shown(argument: Any) -> Any:
    """The argument itself, if it is shown as it is; so handlers get numbers and plain texts."""
    if isinstance(argument, _PLAIN):
        return argument
    try:
        shown = _Shown(argument)
    except Exception:
        # It has no text. Handlers report that as they do for every logger.
        return argument
    if type(argument) is str and shown.text == argument and shown.in_quotes == repr(argument):
        return argument
    return shown


class _Shown:
    """An argument as its texts, which ``%s`` and ``%r`` ask for."""

    __slots__ = ("in_quotes", "text")

    def __init__(self, argument: Any) -> None:
        self.text = visible(str(argument))
        self.in_quotes = visible(repr(argument))

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return self.in_quotes


def _traceback(error: BaseException) -> str:
    found = TracebackException.from_exception(error, compact=True)
    _show_in(found)
    return "".join(found.format()).rstrip("\n")


def _show_in(found: TracebackException) -> None:
    """Have this error's text, and those of its causes and its members, be one line each."""
    found.__class__ = _OfOneLine
    if found.__notes__:
        found.__notes__ = [visible(str(note)) for note in found.__notes__]
    for each in (found.__cause__, found.__context__, *(found.exceptions or ())):
        if each is not None:
            _show_in(each)


class _OfOneLine(TracebackException):
    def format_exception_only(self, **options: Any) -> Generator[str, None, None]:
        for line in super().format_exception_only(**options):
            yield visible(line.removesuffix("\n")) + "\n"
