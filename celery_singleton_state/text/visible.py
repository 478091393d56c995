"""Texts of users made safe to show: names, states, errors and arguments can hold anything.

A terminal obeys the control characters in what it prints, and an override of the writing direction
garbles what stands around it. So every character that is not seen is written as an escape that
Python reads: ``\\x1b``, ``\\u202e``. What programs read is never changed this way.

The same holds for the log: a line break in a key or an error's text would begin a line that nobody
wrote. So the package's modules have their loggers from :func:`logger_of`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Generator
from traceback import TracebackException
from typing import Any

#: Characters that Unicode counts as printable, and that are seen as nothing.
_BLANK = re.compile(
    "["
    "\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2d7f\u3164\ufe00-\ufe0f\uffa0"  # joiners, fillers
    "\U00016fe4\U0001107f\U000e0100-\U000e01ef"
    "\u2800\ufffc\U0001d159"  # symbols without ink: of Braille, of an object, of a note
    "]"
)
#: An escape as :func:`as_printed` writes it, of a surrogate aside: no row's name has one.
_ESCAPE = re.compile(
    r"\\(x(?:[01][0-9a-f]|20|5c|7f|[89a-f][0-9a-f])"
    r"|u(?!00|d[89a-f])[0-9a-f]{4}|U(?:000[1-9a-f]|0010)[0-9a-f]{4})"
)
#: Arguments that are no texts, and have none.
_PLAIN = (bool, int, float, type(None))


def visible(text: str, keep: str = "") -> str:
    """A text without a character that does anything but be seen.

    :param keep: characters that may stay nevertheless, such as the ends of lines.
    """
    if text.isprintable() and (text.isascii() or not _BLANK.search(text)):
        return text
    hidden = (each for each in set(text) if each not in keep and not _is_seen(each))
    return text.translate({ord(each): _escape(each) for each in hidden})


def as_printed(name: str) -> str:
    """A name as all commands print it; no two names are printed the same.

    So a backslash that begins an escape by chance is written as one.
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
    """The names that somebody may mean who types one: as it is printed, else as it is."""
    meant = _ESCAPE.sub(lambda found: chr(int(found[1][1:], 16)), typed)
    # Bytes that are not text are escaped in keys, too.
    return list(dict.fromkeys(encodable(each) for each in (meant, typed)))


def encodable(text: str, encoding: str = "utf-8") -> str:
    """A text with what the encoding does not have as escapes; UTF-8 lacks halves of surrogate
    pairs.
    """
    return text.encode(encoding, "backslashreplace").decode(encoding)


def as_json(document: str, encoding: str = "utf-8") -> str:
    """An equal JSON document in which all characters are seen, and which the encoding has: the
    others are escaped as JSON escapes them.
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
        return " "  # in valid JSON they stand between the values only
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))


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
