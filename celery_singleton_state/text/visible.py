"""Texts of users made safe to show: names, states, errors and arguments can hold anything.

A terminal obeys the control characters in what it prints, and an override of the writing direction
garbles what stands around it. So every character that is not seen is written as an escape that
Python reads: ``\\x1b``, ``\\u202e``. What programs read is never changed this way.
"""

from __future__ import annotations

import re

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
