"""Compute the name of a singleton, and the key of its row."""

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

#: Default prefix of the keys of singletons.
KEY_PREFIX = "singleton-state:"
#: The longest key, in characters: every supported database can index a text of this length. A key
#: that would be longer is cut, and ends in a digest.
MAX_KEY_LENGTH = 255
#: The number of hexadecimal digits of the digest at the end of a key that was cut.
_DIGEST_LENGTH = 32
#: Matches the characters that no database stores in a text: NUL and unpaired surrogates.
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")

#: The type of the option ``unique_on``: argument names, ``"*"`` for all arguments, a callable that
#: is given the arguments, or ``None`` for one singleton per task.
UniqueOn = tuple[str, ...] | str | Callable[..., Any] | None


class Binder:
    """Binds call arguments to the names of a body's parameters, defaults included.

    ``f(1)``, ``f(x=1)`` and a call that relies on the default 1 all bind to ``{"x": 1}``.
    """

    def __init__(self, signature: inspect.Signature) -> None:
        self.signature = signature
        self._names = tuple(signature.parameters)
        parameters = signature.parameters.values()
        self._are_plain = all(each.kind is each.POSITIONAL_OR_KEYWORD for each in parameters)

    def bind(self, args: Any, kwargs: Any) -> Mapping[str, Any]:
        """Return a dict that maps parameter names to the arguments of a call.

        :raises TypeError: the arguments do not fit the signature.
        """
        if self._are_plain and not kwargs and len(args) == len(self._names):
            # Do what signature.bind() would do here, at a tenth of the cost.
            return dict(zip(self._names, args, strict=True))
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments


def singleton_name(
    task_name: str, unique_on: UniqueOn, binder: Binder, args: Any, kwargs: Any
) -> str:
    """Return a singleton's name: the task's name, followed by the arguments that ``unique_on``
    chooses, as JSON.

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
    """Return the key of a singleton's row.

    The key is the prefix followed by the name. If this text is too long for a key, or contains a
    character that no database stores (a NUL or an unpaired surrogate), the key is the readable
    beginning of the text, followed by a digest of the whole text. So different names have different
    keys.
    """
    key = prefix + name
    head = _UNSTORABLE.sub("\ufffd", key)
    if len(key) <= MAX_KEY_LENGTH and head == key:
        return key
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST_LENGTH]
    return f"{head[: MAX_KEY_LENGTH - _DIGEST_LENGTH - 1]}~{digest}"


def _json(task_name: str, value: Any) -> str:
    """Return a value as canonical JSON.

    The sender and the worker must compute the same name from the arguments of a message. But the
    message changes arguments on its way: a tuple becomes a list, and a number that is a dict's key
    becomes a string. The canonical JSON is the same before and after such a change.
    """
    try:
        text = json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(
            f"task {task_name}: unique_on chose {value!r}, which cannot be written as JSON: {error}"
        ) from error
    # The value can contain an unpaired surrogate, for example in a file's name of unknown encoding.
    # UTF-8 cannot encode a surrogate, so it becomes an escape.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _plain(value: Any) -> Any:
    """Reduce a value to the types that JSON has.

    :raises TypeError: JSON has no form for values of this type that tells them apart.
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
    # Leave other types to kombu. It converts lazy texts, types with ``__json__``, and types that
    # users have registered, and raises a ``TypeError`` for the rest.
    return _plain(JSONEncoder().default(value))


def _plain_key(key: Any) -> str:
    """Return the string that stands for a dict's key in JSON, where every key is a string."""
    plain = _plain(key)
    return plain if isinstance(plain, str) else json.dumps(plain, sort_keys=True)


#: Pairs of types and the function that reduces a value of these types to a type of JSON. The first
#: pair that fits is used. So ``bool`` comes before its base class ``int``, and ``Enum`` comes late,
#: because a member of an enum can also be of one of the earlier types.
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
