"""Texts that every database can hold, whatever its encoding, and JSON made of such texts.

A task's id, a holder's name or the text of an error comes from outside and may contain anything: a
NUL, half of a surrogate pair, letters that the database's encoding does not have. None of that may
keep a run from being recorded.
"""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar, overload

import msgspec

T = TypeVar("T")

_ESCAPED = re.compile(r"\\(?:x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8}|[\\nrt])")


@overload
def storable(text: str) -> str: ...
@overload
def storable(text: None) -> None: ...
def storable(text: str | None) -> str | None:
    r"""A text of printable ASCII characters: ``Łódź`` becomes ``\u0141\xf3d\u017a``.

    Different texts stay different, and :func:`restored` brings each one back.
    """
    if text is None or (text.isascii() and text.isprintable() and "\\" not in text):
        return text
    return text.encode("unicode_escape").decode("ascii")


@overload
def restored(text: str) -> str: ...
@overload
def restored(text: None) -> None: ...
def restored(text: str | None) -> str | None:
    """The text that :func:`storable` was given."""
    if text is None or "\\" not in text:
        return text
    return _ESCAPED.sub(lambda found: found[0].encode().decode("unicode_escape"), text)


def to_json(document: Any) -> str:
    """JSON in ASCII, also of texts that are not well-formed."""
    try:
        text = msgspec.json.encode(document).decode()
    except UnicodeEncodeError:
        text = ""
    if text and text.isascii():
        return text
    return json.dumps(msgspec.to_builtins(document), separators=(",", ":"))


def from_json(raw: str, decoder: msgspec.json.Decoder[T]) -> T:
    """What :func:`to_json` was given.

    :raises ValueError: the text is not such JSON.
    """
    try:
        return decoder.decode(raw)
    except msgspec.DecodeError as error:
        if isinstance(error, msgspec.ValidationError):
            raise
        # Only Python's own parser reads half of a surrogate pair.
        return msgspec.convert(json.loads(raw), decoder.type)
