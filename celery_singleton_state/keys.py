"""How a singleton gets its name, and its row the key."""

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
#: Longest key, in characters: the most that every supported database can index. A longer key is
#: cut, and a digest is put at its end.
MAX_KEY_LENGTH = 255
#: Hexadecimal digits of that digest.
_DIGEST_LENGTH = 32
#: Characters that no database holds in a text: NUL and unpaired surrogates.
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")

#: The option ``unique_on``: argument names, ``"*"`` for all arguments, a callable that is given the
#: arguments, or ``None`` for one singleton per task.
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
        """Return the arguments by parameter name.

        :raises TypeError: the arguments do not fit the signature.
        """
        if self._are_plain and not kwargs and len(args) == len(self._names):
            # The same result as signature.bind() at a tenth of its cost.
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

    The key is the prefix and the name. If that is too long, or contains a character that no
    database holds (a NUL or an unpaired surrogate), the key is a readable head and a digest of the
    whole. So different names have different keys.
    """
    key = prefix + name
    head = _UNSTORABLE.sub("\ufffd", key)
    if len(key) <= MAX_KEY_LENGTH and head == key:
        return key
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST_LENGTH]
    return f"{head[: MAX_KEY_LENGTH - _DIGEST_LENGTH - 1]}~{digest}"


def _json(task_name: str, value: Any) -> str:
    """Return a value as canonical JSON.

    A sender and a worker must compute the same name. But a message changes a value on its way: a
    tuple becomes a list, and a number that is a dict's key becomes a string. The JSON is the same
    before and after such a change.
    """
    try:
        text = json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(
            f"task {task_name}: unique_on chose {value!r}, which cannot be written as JSON: {error}"
        ) from error
    # The value can contain an unpaired surrogate, as in the name of a file of unknown encoding.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _plain(value: Any) -> Any:
    """Reduce a value to the types that JSON has.

    :raises TypeError: the value's type has no form in JSON that tells its values apart.
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
    # Kombu knows further types: lazy texts, types with ``__json__``, and types that users register.
    return _plain(JSONEncoder().default(value))


def _plain_key(key: Any) -> str:
    """Return a dict's key as the string that JSON has in its place."""
    plain = _plain(key)
    return plain if isinstance(plain, str) else json.dumps(plain, sort_keys=True)


#: How values of each type are reduced. The first type that fits counts: ``bool`` comes before
#: ``int``, its base class, and ``Enum`` late, because its members can also be of the types before.
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
