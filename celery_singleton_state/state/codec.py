"""Convert states between typed values and JSON, and migrate JSON of older versions.

The store keeps a state as JSON, and beside it the version of the schema that wrote it.

- Reading: JSON -> migrations, one version at a time -> value of the schema.
- Writing: value -> JSON -> value of the schema again. This second reading is a check: a state is
  refused if the next run could not load it, or would load something else.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any, Generic, TypeVar, get_args, get_type_hints, is_typeddict

import msgspec

from celery_singleton_state.errors import FROM_OUTSIDE

from .round_trip import difference, not_finite

S = TypeVar("S")

#: The JSON that is stored when there is no state yet. No schema has a state whose JSON is ``null``.
NO_STATE = "null"

#: How often ``encode`` tries to encode a state that other threads keep changing, before it encodes
#: a copy.
TRIES = 3

#: A function that takes a raw value of version n and returns the raw value of version n + 1. A raw
#: value is decoded JSON: dicts, lists, texts, numbers.
Migration = Callable[[Any], Any]


class StateError(Exception):
    """A state, or a stored value, does not fit its schema. The message says why."""


def is_schema(candidate: Any) -> bool:
    """Whether a value is a class that the option ``state_schema`` accepts, such as a dataclass."""
    return isinstance(candidate, type) and (
        dataclasses.is_dataclass(candidate)
        or issubclass(candidate, msgspec.Struct)
        or hasattr(candidate, "__attrs_attrs__")
        or is_typeddict(candidate)
        or _is_pydantic(candidate)
    )


def _is_pydantic(schema: type) -> bool:
    return hasattr(schema, "model_validate_json")


class Codec(Generic[S]):
    """Decodes and encodes the states of one schema.

    :param schema: a dataclass, ``msgspec.Struct``, attrs class, ``TypedDict`` or pydantic model.
    :param initial: the state of a singleton that has never saved one: a value, or a callable that
        makes one. Left out: ``schema()``.
    :param version: the schema's version, 1 or more.
    :param migrations: maps version numbers to functions. The function for version n converts the
        decoded JSON of version n to version n + 1. A version without a function needs no
        conversion.
    :param round_trip: whether ``encode`` refuses a state that would be loaded as a different state.
    """

    def __init__(
        self,
        schema: type[S],
        initial: S | Callable[[], S] | None = None,
        version: int = 1,
        migrations: Mapping[int, Migration] | None = None,
        round_trip: bool = True,
    ) -> None:
        self.schema = schema
        self.version = version
        self._make_initial = schema if initial is None else initial
        self._migrations = dict(migrations or {})
        self._round_trip = round_trip
        self._dump, self._parse = _pydantic(schema) if _is_pydantic(schema) else _msgspec(schema)
        self._is_flat = bool(_flat_fields(schema))
        self._read = self._parse
        if is_typeddict(schema) and initial is not None:
            # A TypedDict has no default values. So a key that a stored value lacks gets its value
            # from the initial state.
            self._read = self._filled
            own: Any = schema
            self._keys: frozenset[str] = own.__required_keys__ | own.__optional_keys__
            #: The keys of the schema that the initial state has. ``None``: not looked up yet.
            self._defaults: frozenset[str] | None = None

    def initial(self) -> S:
        """Make a new initial state, which shares no mutable part with another one.

        :raises StateError: the schema, or the callable ``initial``, raised an error.
        """
        made = self._make_initial
        try:
            return made() if callable(made) else copy.deepcopy(made)
        except FROM_OUTSIDE:
            raise
        except Exception as error:
            raise _misfit("the initial state cannot be made", error) from error

    def decode(self, raw: str, version: int | None) -> S:
        """Read a stored value, and migrate it to this schema's version if it is older.

        :param raw: the stored value, as JSON.
        :param version: the version of the schema that wrote the value. ``None`` counts as 1.
        :raises StateError: the value has a newer version than this schema, or does not fit the
            schema.
        """
        stored = version or 1
        if stored < 1:
            raise StateError(f"the stored value has version {stored}; a version is 1 or more")
        if stored > self.version:
            raise StateError(
                f"the stored value has version {stored}, newer than this code's {self.version}"
            )
        try:
            document = raw.encode()
            if stored != self.version:
                document = self._migrate(document, stored)
            return self._read(document)
        except FROM_OUTSIDE:
            raise
        except Exception as error:
            raise _misfit(f"the stored value of version {stored} cannot be read", error) from error

    def encode(self, state: S) -> str:
        """Return the JSON of a state, after a check that the JSON is read as the same state again.

        Threads that the task's body has started can change the state between its encoding and the
        comparison. Such a change must not fail the check, so a failed check is repeated. If the
        same JSON fails twice, the state itself is wrong. If the JSON differs each time, a copy of
        the state is checked.

        :raises StateError: the state does not fit the schema, or would be read as another state.
        """
        earlier = error = None
        try:
            for _ in range(TRIES):
                document, error = self._checked(state)
                if error is None:
                    return document.decode()
                if document and document == earlier:
                    raise error
                earlier = document
            document, error = self._checked(self._copy_of(state))
            if error is None:
                return document.decode()
            raise error
        finally:
            # Drop the error: its traceback refers to this frame, and so the two would keep each
            # other, and the state, in memory.
            del error

    def _checked(self, state: S) -> tuple[bytes, StateError | None]:
        """Encode a state, read the JSON back and compare.

        Return the JSON, and an error if the state must not be stored.
        """
        document = b""
        try:
            document = self._dump(state)
            read = self._read(document)
            is_same = not self._round_trip or (self._is_flat and _surely_same(state, read))
            changed = None if is_same else difference(state, read, "state")
        except FROM_OUTSIDE:
            raise
        except Exception as error:
            return document, self._why_it_does_not_fit(state, document, error)
        if changed:
            return document, StateError(f"the state would not come back the same: {changed}")
        return document, None

    def _why_it_does_not_fit(self, state: S, document: bytes, error: Exception) -> StateError:
        if isinstance(error, RecursionError):
            return _caused("the state is nested too deeply, or holds itself", error)
        found = None
        if document:
            # A NaN in the state was written as null, and the schema's error only names the null.
            # So look for a NaN.
            with contextlib.suppress(RuntimeError):
                found = not_finite(state, "state")
        name = getattr(self.schema, "__name__", str(self.schema))
        return _misfit(f"the state does not fit {name}", ValueError(found) if found else error)

    def _copy_of(self, state: S) -> S:
        """Copy a state that other threads change, so that the copy no longer changes.

        :raises StateError: the state can neither be copied nor encoded.
        """
        try:
            return copy.deepcopy(state)
        except FROM_OUTSIDE:
            raise
        except Exception:  # deepcopy() fails on a lock, or on a dict that grows meanwhile
            return self._copy_by_json(state)

    def _copy_by_json(self, state: S) -> S:
        try:
            return self._read(self._dump(state))
        except FROM_OUTSIDE:
            raise
        except Exception as error:
            raise self._why_it_does_not_fit(state, b"", error) from error

    def _migrate(self, document: bytes, stored: int) -> bytes:
        steps = [n for n in range(stored, self.version) if n in self._migrations]
        if not steps:
            return document
        value = msgspec.json.decode(document)
        for n in steps:
            value = self._migrations[n](value)
        return msgspec.json.encode(value)

    def _filled(self, document: bytes) -> S:
        """Read a TypedDict from JSON. Missing keys get their values from the initial state."""
        try:
            read: Any = self._parse(document)
        except msgspec.ValidationError:
            read = msgspec.json.decode(document, type=dict[str, msgspec.Raw])
            if not self._lacks(read):
                raise
        else:
            if not self._lacks(read):
                return read  # type: ignore[no-any-return]
        values = msgspec.json.decode(document, type=dict[str, msgspec.Raw])
        initial = msgspec.to_builtins(self.initial())
        return self._parse(msgspec.json.encode(initial | values))

    def _lacks(self, read: Mapping[str, Any]) -> bool:
        """Whether a stored TypedDict lacks a key that the initial state has."""
        missing = self._keys - read.keys()
        if missing and self._defaults is None:
            self._defaults = self._keys & set(self.initial())  # type: ignore[call-overload]
        return bool(missing and missing & (self._defaults or frozenset()))


def _msgspec(schema: type[S]) -> tuple[Callable[[S], bytes], Callable[[bytes], S]]:
    parse = msgspec.json.Decoder(schema).decode
    encode = msgspec.json.Encoder().encode
    names = _flat_fields(schema)
    values = attrgetter(*names) if len(names) > 1 else None

    def dump(state: Any) -> bytes:
        # If stored JSON lacks a field, msgspec's decoder does not set the field on the object, and
        # msgspec's encoder would leave the field out again. Then the stored state would change
        # whenever the code's default changes. So read the fields one by one.
        if values is not None and type(state) is schema:
            return encode(dict(zip(names, values(state), strict=True)))
        if names and type(state) is schema:
            return encode({names[0]: getattr(state, names[0])})
        return encode(_with_defaults(state) if dataclasses.is_dataclass(state) else state)

    return dump, parse


#: Types for which ``==`` between two values of the type means that the values are the same. The
#: type ``float`` is not among them, because ``0.0 == -0.0``.
_ATOMS = frozenset({str, int, bool, type(None)})


def _surely_same(state: Any, read: Any) -> bool:
    """Whether a dataclass was surely read back as the same value.

    This comparison is quick, because it runs in C, and most states pass it. False means that the
    slow comparison must decide.
    """
    if type(state) is not type(read) or not hasattr(state, "__dict__"):
        return False
    kinds = list(map(type, vars(state).values()))
    return (
        _ATOMS.issuperset(kinds)
        and vars(state) == vars(read)
        and kinds == list(map(type, vars(read).values()))
    )


def _with_defaults(value: Any) -> Any:
    """Replace each dataclass in a value by a dict of all its fields.

    ``dataclasses.asdict`` is not used, because it copies every value in the fields, and it cannot
    convert a ``Counter``.
    """
    kind = type(value)
    if dataclasses.is_dataclass(kind):
        fields = dataclasses.fields(kind)
        return {field.name: _with_defaults(getattr(value, field.name)) for field in fields}
    # Iterate over a copy, because other threads can add items meanwhile.
    if isinstance(value, dict):
        return {key: _with_defaults(each) for key, each in list(value.items())}
    if isinstance(value, list | tuple | set | frozenset):
        return [_with_defaults(each) for each in list(value)]
    return value


def _flat_fields(schema: type) -> tuple[str, ...]:
    """Return the field names of a dataclass that surely has no dataclass inside it, else ``()``.

    A state of such a class is encoded faster, because it is not searched for inner dataclasses.
    """
    if not dataclasses.is_dataclass(schema):
        return ()
    hints = get_type_hints(schema)
    names = tuple(field.name for field in dataclasses.fields(schema))
    return names if all(_is_plain(hints[name]) for name in names) else ()


def _is_plain(hint: Any) -> bool:
    """Whether the values of an annotated type surely contain no dataclass."""
    parts = get_args(hint)
    if parts:
        return all(map(_is_plain, parts))
    return getattr(hint, "__module__", None) in ("builtins", "datetime", "decimal", "uuid")


def _pydantic(schema: Any) -> tuple[Callable[[S], bytes], Callable[[bytes], S]]:
    # Import pydantic here, because it is installed only if the user's own models need it.
    to_json = importlib.import_module("pydantic_core").to_json

    def dump(state: S) -> bytes:
        # round_trip=True leaves out computed fields, which the model would read as extra fields.
        document: bytes = to_json(state, by_alias=True, round_trip=True)
        if b"NaN" in document or b"Infinity" in document:
            _refuse_constants(document)
        return document

    return dump, schema.model_validate_json


def _refuse_constants(document: bytes) -> None:
    """Refuse JSON that contains the constants NaN or Infinity, which are not valid JSON.

    :raises ValueError: the JSON contains one of these constants.
    """
    try:
        msgspec.json.decode(document)
    except msgspec.DecodeError as error:
        raise ValueError(
            "JSON has neither NaN nor infinity: use None, or ser_json_inf_nan='strings'"
        ) from error


def _misfit(what: str, error: Exception) -> StateError:
    """Make a :exc:`StateError` from an error that a schema, a migration or a serializer raised.

    :param what: the beginning of the message: what could not be done.
    """
    return _caused(f"{what}: {type(error).__name__}: {error}", error)


def _caused(text: str, error: Exception) -> StateError:
    made = StateError(text)
    made.__cause__ = error
    return made
