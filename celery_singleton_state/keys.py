"""A singleton's name and the key of its row."""

from __future__ import annotations

import hashlib
import inspect
import json
import numbers
import re
from base64 import b64encode
from collections.abc import Callable, Mapping
from datetime import date, datetime, time
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

import msgspec
from kombu.utils.json import JSONEncoder

#: What the keys of singletons begin with by default.
KEY_PREFIX = "singleton-state:"
#: A longer key keeps a readable head and ends in a digest: 255 is what the indexed key
#: columns of the common databases can hold.
MAX_KEY_LENGTH = 255
_DIGEST_LENGTH = 32
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")

#: ``unique_on``: argument names, ``"*"`` for all, a callable, or none.
UniqueOn = tuple[str, ...] | str | Callable[..., Any] | None


class Binder:
    """Binds arguments to a signature: by name, defaults included, so that ``f(1)`` and ``f(x=1)``
    are the same.
    """

    def __init__(self, signature: inspect.Signature) -> None:
        self.signature = signature
        self._names = tuple(signature.parameters)
        parameters = signature.parameters.values()
        self._are_plain = all(each.kind is each.POSITIONAL_OR_KEYWORD for each in parameters)

    def bind(self, args: Any, kwargs: Any) -> Mapping[str, Any]:
        """The arguments by name.

        :raises TypeError: they do not fit the signature.
        """
        if self._are_plain and not kwargs and len(args) == len(self._names):
            # What binding comes to, at a tenth of its cost.
            return dict(zip(self._names, args, strict=True))
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments


def singleton_name(
    task_name: str, unique_on: UniqueOn, binder: Binder, args: Any, kwargs: Any
) -> str:
    """The task's name and, where ``unique_on`` says so, the chosen arguments as JSON.

    :raises TypeError: the arguments do not fit the signature, or a chosen one cannot be
        written as JSON.
    """
    if unique_on is None:
        return task_name
    if callable(unique_on):
        return task_name + _json(task_name, unique_on(*args, **kwargs))
    arguments = binder.bind(args, kwargs)
    if unique_on != "*":
        arguments = {name: arguments[name] for name in unique_on}
    return task_name + _json(task_name, arguments)


def row_key(prefix: str, name: str) -> str:
    """The key of the row that a singleton's name stands under.

    It ends in a digest if the name is too long, or has what no database takes in a text: a NUL, or
    half of a surrogate pair. So different names have different keys.
    """
    key = prefix + name
    head = _UNSTORABLE.sub("\ufffd", key)
    if len(key) <= MAX_KEY_LENGTH and head == key:
        return key
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST_LENGTH]
    return f"{head[: MAX_KEY_LENGTH - _DIGEST_LENGTH - 1]}~{digest}"


def _json(task_name: str, value: Any) -> str:
    """The value as canonical JSON: the same for what a caller passes and for what a message brings.

    On its way a tuple becomes a list, and a number that is a key becomes a text.
    """
    try:
        text = json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(
            f"task {task_name}: unique_on chose {value!r}, which cannot be written as JSON: {error}"
        ) from error
    # Half of a surrogate pair, as in the name of a file whose encoding is not known.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _plain(value: Any) -> Any:
    """What a value comes to in a key, made of the types that JSON has.

    :raises TypeError: nothing that tells it from others.
    """
    for types, made_plain in _PLAIN:
        if isinstance(value, types):
            return made_plain(value)
    if hasattr(value, "model_dump"):
        return _plain(value.model_dump(mode="json"))
    if isinstance(value, msgspec.Struct) or any(
        hasattr(value, name) for name in ("__dataclass_fields__", "__attrs_attrs__")
    ):
        return _plain(msgspec.to_builtins(value, str_keys=True, enc_hook=_plain))
    # Kombu's way with further types: lazy texts, those with ``__json__``, registered ones.
    return _plain(JSONEncoder().default(value))


def _plain_key(key: Any) -> str:
    """A dict's key as JSON writes it."""
    plain = _plain(key)
    return plain if isinstance(plain, str) else json.dumps(plain, sort_keys=True)


#: In this order: ``bool`` is an ``int``, and members of an enumeration can be of any type.
_PLAIN: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    ((bool, type(None)), lambda value: value),
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
    (Mapping, lambda value: {_plain_key(key): _plain(each) for key, each in value.items()}),
    ((list, tuple), lambda value: [_plain(each) for each in value]),
    ((set, frozenset), lambda value: sorted((_plain(each) for each in value), key=json.dumps)),
    ((datetime, date, time), lambda value: value.isoformat()),
    ((Decimal, UUID), str),
    ((bytes, bytearray, memoryview), lambda value: b64encode(value).decode()),
    (Enum, lambda value: _plain(value.value)),
    (numbers.Integral, int),
)
