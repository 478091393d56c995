"""Make users' texts safe to show: names, states, errors and arguments can contain any character.

A terminal obeys the control characters in the text that it prints, and a character that overrides
the writing direction garbles the text around it. So every invisible character is shown as Python's
escape for it: ``\\x1b``, ``\\u202e``. Output for programs is never changed this way.

The log needs this as well: a line break in a key or in an error's text would forge a line of the
log. So all modules of this package get their loggers from :func:`logger_of`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Generator
from traceback import TracebackException
from typing import Any

#: Characters that Unicode counts as printable although they are invisible.
_BLANK = re.compile(
    "["
    "\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2d7f\u3164\ufe00-\ufe0f\uffa0"  # joiners, fillers
    "\U00016fe4\U0001107f\U000e0100-\U000e01ef"
    "\u2800\ufffc\U0001d159"  # a Braille cell, an object's place and a note, all empty
    "]"
)
#: Matches an escape that :func:`as_printed` can write. Escapes of surrogates are left out, because
#: no row's name has a surrogate.
_ESCAPE = re.compile(
    r"\\(x(?:[01][0-9a-f]|20|5c|7f|[89a-f][0-9a-f])"
    r"|u(?!00|d[89a-f])[0-9a-f]{4}|U(?:000[1-9a-f]|0010)[0-9a-f]{4})"
)
#: Types of a log record's arguments whose texts never have invisible characters, so that such
#: arguments are not checked.
_PLAIN = (bool, int, float, type(None))


def visible(text: str, keep: str = "") -> str:
    """Replace each invisible character of a text by an escape.

    :param keep: invisible characters that are kept, such as line breaks.
    """
    if text.isprintable() and (text.isascii() or not _BLANK.search(text)):
        return text
    hidden = (each for each in set(text) if each not in keep and not _is_seen(each))
    return text.translate({ord(each): _escape(each) for each in hidden})


def as_printed(name: str) -> str:
    """Format a singleton's name as all commands print it; different names get different texts.

    Invisible characters, and spaces at either end, become escapes. If the name itself contains a
    text that looks like such an escape, its backslash becomes ``\\x5c``.
    """
    if "\\" in name:
        name = _ESCAPE.sub(r"\\x5c\1", name)
    printed = visible(name)
    if printed.startswith(" ") or printed.endswith(" "):
        inside = printed.strip(" ")
        begin = len(printed) - len(printed.lstrip(" "))
        end = len(printed) - begin - len(inside)
        printed = r"\x20" * begin + inside + r"\x20" * end
    return printed


def names_meant(typed: str) -> list[str]:
    """Return the names that a user may mean by a typed text, the likeliest first.

    The first is the name that :func:`as_printed` prints as this text. The second is the text
    itself.
    """
    meant = _ESCAPE.sub(lambda found: chr(int(found[1][1:], 16)), typed)
    # If the bytes on a command line are no valid text, Python reads them as surrogates. The keys in
    # the store have escapes instead, so escape the surrogates here, too.
    return list(dict.fromkeys(encodable(each) for each in (meant, typed)))


def encodable(text: str, encoding: str = "utf-8") -> str:
    """Escape the characters of a text that an encoding does not have.

    UTF-8 lacks only the halves of surrogate pairs.
    """
    return text.encode(encoding, "backslashreplace").decode(encoding)


def as_json(document: str, encoding: str = "utf-8") -> str:
    """Escape the characters of a JSON document that cannot be shown, with JSON's own escapes.

    These are the invisible characters, and the characters that the encoding does not have. The
    result is an equal JSON document.
    """
    hidden = (
        each for each in set(document) if not _is_seen(each) or encodable(each, encoding) != each
    )
    return document.translate({ord(each): _json_escape(each) for each in hidden})


def _is_seen(character: str) -> bool:
    return character.isprintable() and not _BLANK.match(character)


def _escape(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _json_escape(character: str) -> str:
    if character in "\t\n\r":
        return " "  # valid JSON has line breaks and tabs between values only
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))


def logger_of(name: str) -> logging.Logger:
    """Return the logger of a module, which escapes invisible characters in its records.

    Each logger needs the filter, because Python does not apply a parent logger's filters to the
    records of its children.
    """
    logger = logging.getLogger(name)
    logger.addFilter(_make_visible)
    return logger


def _make_visible(record: logging.LogRecord) -> bool:
    """Escape the invisible characters in a log record's arguments and traceback.

    This is a logging filter, so it returns true: otherwise the record would be dropped.
    """
    if isinstance(record.args, tuple):
        record.args = tuple(map(_shown, record.args))
    elif record.args:
        record.args = {name: _shown(each) for name, each in record.args.items()}
    if record.exc_info and record.exc_info[1] is not None:
        # Formatters use `exc_text`, if it is set, and do not format the traceback themselves.
        record.exc_text = _traceback(record.exc_info[1])
    return True


def _shown(argument: Any) -> Any:
    """Wrap a log record's argument if its text has invisible characters, so that they are escaped.

    Other arguments are returned unchanged, so that handlers get numbers and plain texts.
    """
    if isinstance(argument, _PLAIN):
        return argument
    try:
        shown = _Shown(argument)
    except Exception:
        # The argument has no text, because its `__str__` or `__repr__` raised. The log's handlers
        # report this error themselves.
        return argument
    if type(argument) is str and shown.text == argument and shown.in_quotes == repr(argument):
        return argument
    return shown


class _Shown:
    """A log record's argument with escaped texts for ``%s`` and ``%r``."""

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
    """Make a traceback show each error's text as one line, also for causes and grouped errors."""
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
