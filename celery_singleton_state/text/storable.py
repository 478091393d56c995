"""Convert texts, and JSON documents, to a form that every database can hold in any encoding.

A task's id, a holder's name or an error's text comes from outside and may contain any character: a
NUL, half of a surrogate pair, letters that the database's encoding does not have. A run must be
recorded in spite of such characters.
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
    r"""Escape a text, so that it has only printable ASCII characters.

    ``Łódź`` becomes ``\u0141\xf3d\u017a``. Different texts get different results, and
    :func:`restored` converts each result back. ``None`` stays ``None``.
    """
    if text is None or (text.isascii() and text.isprintable() and "\\" not in text):
        return text
    return text.encode("unicode_escape").decode("ascii")


@overload
def restored(text: str) -> str: ...
@overload
def restored(text: None) -> None: ...
def restored(text: str | None) -> str | None:
    """Undo :func:`storable` and return the original text; ``None`` stays ``None``."""
    if text is None or "\\" not in text:
        return text
    return _ESCAPED.sub(lambda found: found[0].encode().decode("unicode_escape"), text)


def to_json(document: Any) -> str:
    """Encode a document as JSON in ASCII, even if its texts contain halves of surrogate pairs."""
    try:
        text = msgspec.json.encode(document).decode()
    except UnicodeEncodeError:
        text = ""
    if text and text.isascii():
        return text
    return json.dumps(msgspec.to_builtins(document), separators=(",", ":"))


def from_json(raw: str, decoder: msgspec.json.Decoder[T]) -> T:
    """Decode a document that :func:`to_json` encoded.

    :param decoder: the decoder of the document's type.
    :raises ValueError: the text is not JSON of that type.
    """
    try:
        return decoder.decode(raw)
    except msgspec.DecodeError as error:
        if isinstance(error, msgspec.ValidationError):
            raise
        # Try again with Python's own parser: it accepts halves of surrogate pairs, and msgspec does
        # not.
        return msgspec.convert(json.loads(raw), decoder.type)
