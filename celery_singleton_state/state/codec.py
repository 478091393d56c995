"""The typed state: what a schema is, how a value is read, checked, migrated and written.

A stored value is JSON beside the version of the schema that wrote it. Reading goes raw JSON
-> migrations, one version at a time -> schema; writing goes value -> JSON -> schema again, as
a check, so that nothing is stored which the next run could not load, or would load as something
else.
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

#: The JSON of "no state yet": no schema has it as a value.
NO_STATE = "null"

#: How often a state is written that changes meanwhile, before a copy is.
TRIES = 3

#: A raw value of version n in, one of version n + 1 out.
Migration = Callable[[Any], Any]


class StateError(Exception):
    """A value does not fit its schema. The message says why."""


def is_schema(candidate: Any) -> bool:
    """Whether this is a type that a state can have."""
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
    """Reads and writes the states of one schema.

    :param schema: a dataclass, ``msgspec.Struct``, attrs class, ``TypedDict`` or pydantic model.
    :param initial: the state of a singleton that never saved one: a value, or a callable that
        makes one. Left out: ``schema()``.
    :param version: the schema's version, from 1.
    :param migrations: for version n, the function from its raw values to those of n + 1. A
        version without one is read as the next one is.
    :param round_trip: whether a state that would come back changed is refused.
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
        self._is_flat = bool(_names_of_flat(schema))
        self._read = self._parse
        if is_typeddict(schema) and initial is not None:
            # It has no defaults of its own, so its initial state stands for them.
            self._read = self._filled
            own: Any = schema
            self._keys: frozenset[str] = own.__required_keys__ | own.__optional_keys__
            #: Those that the initial state has, as far as they matter.
            self._defaults: frozenset[str] | None = None

    def initial(self) -> S:
        """A new initial state, shared with nobody.

        :raises StateError: it cannot be made.
        """
        made = self._make_initial
        try:
            return made() if callable(made) else copy.deepcopy(made)
        except FROM_OUTSIDE:
            raise
        except Exception as error:
            raise _misfit("no initial state can be made", error) from error

    def decode(self, raw: str, version: int | None) -> S:
        """The state that a stored value holds; no version counts as 1.

        :raises StateError: the value is of a newer version, or does not fit.
        """
        stored = version or 1
        if stored < 1:
            raise StateError("the version of the stored value is no whole number from 1 on")
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
        """The JSON of a state, shown to be read as the same state again.

        Threads of the body can change the state between its writing and the comparison. If two
        documents of it differ, it is such a state, and is written again, at last from a copy.

        :raises StateError: the state does not fit the schema, or would come back changed.
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
            # It refers to this frame, and so to the state.
            del error

    def _checked(self, state: S) -> tuple[bytes, StateError | None]:
        """Write a state, and read it back: its document, and why it must not be stored, if so."""
        document = b""
        try:
            document = self._dump(state)
            read = self._read(document)
            is_same = not self._round_trip or (self._is_flat and _are_same_at_sight(state, read))
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
            # The schema's own error tells of a null, and not what was written as null.
            with contextlib.suppress(RuntimeError):
                found = not_finite(state, "state")
        name = getattr(self.schema, "__name__", str(self.schema))
        return _misfit(f"the state does not fit {name}", ValueError(found) if found else error)

    def _copy_of(self, state: S) -> S:
        """A state as it is at one moment, or nearly so, that no other thread changes.

        :raises StateError: there is no way to it.
        """
        try:
            return copy.deepcopy(state)
        except FROM_OUTSIDE:
            raise
        except Exception:  # of locks and the like, or of a dict that grows meanwhile
            return self._read_of_moving(state)

    def _read_of_moving(self, state: S) -> S:
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
        """Read a document; what it lacks comes from the initial state."""
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
        """Whether a key is missing that the initial state has."""
        missing = self._keys - read.keys()
        if missing and self._defaults is None:
            self._defaults = self._keys & set(self.initial())  # type: ignore[call-overload]
        return bool(missing and missing & (self._defaults or frozenset()))


def _msgspec(schema: type[S]) -> tuple[Callable[[S], bytes], Callable[[bytes], S]]:
    parse = msgspec.json.Decoder(schema).decode
    encode = msgspec.json.Encoder().encode
    names = _names_of_flat(schema)
    values = attrgetter(*names) if len(names) > 1 else None

    def dump(state: Any) -> bytes:
        # msgspec leaves a default to the dataclass itself, and would leave it out here too: the
        # stored value would then follow the code's default instead of the state.
        if values is not None and type(state) is schema:
            return encode(dict(zip(names, values(state), strict=True)))
        if names and type(state) is schema:
            return encode({names[0]: getattr(state, names[0])})
        return encode(_with_defaults(state) if dataclasses.is_dataclass(state) else state)

    return dump, parse


#: Types whose ``==`` is exact among values of the same type.
_ATOMS = frozenset({str, int, bool, type(None)})


def _are_same_at_sight(state: Any, read: Any) -> bool:
    """Whether a dataclass comes back the same, as far as a look in C tells: most states do."""
    if type(state) is not type(read) or not hasattr(state, "__dict__"):
        return False
    kinds = list(map(type, vars(state).values()))
    return (
        _ATOMS.issuperset(kinds)
        and vars(state) == vars(read)
        and kinds == list(map(type, vars(read).values()))
    )


def _with_defaults(value: Any) -> Any:
    """A value whose dataclasses are dicts of all their fields.

    ``dataclasses.asdict`` copies all that they hold, and makes no sense of a ``Counter``.
    """
    kind = type(value)
    if dataclasses.is_dataclass(kind):
        fields = dataclasses.fields(kind)
        return {field.name: _with_defaults(getattr(value, field.name)) for field in fields}
    # Other threads can add to them meanwhile.
    if isinstance(value, dict):
        return {key: _with_defaults(each) for key, each in list(value.items())}
    if isinstance(value, list | tuple | set | frozenset):
        return [_with_defaults(each) for each in list(value)]
    return value


def _names_of_flat(schema: type) -> tuple[str, ...]:
    """The fields of a dataclass without others inside it, which need no look."""
    if not dataclasses.is_dataclass(schema):
        return ()
    hints = get_type_hints(schema)
    names = tuple(field.name for field in dataclasses.fields(schema))
    return names if all(_is_plain(hints[name]) for name in names) else ()


def _is_plain(hint: Any) -> bool:
    """Whether values of a type are known to hold no dataclass."""
    parts = get_args(hint)
    if parts:
        return all(map(_is_plain, parts))
    return getattr(hint, "__module__", None) in ("builtins", "datetime", "decimal", "uuid")


def _pydantic(schema: Any) -> tuple[Callable[[S], bytes], Callable[[bytes], S]]:
    # Only the user's own model brings pydantic in, so only then is it there to import.
    to_json = importlib.import_module("pydantic_core").to_json

    def dump(state: S) -> bytes:
        # For a round trip it leaves out computed fields, which would come back as extra ones.
        document: bytes = to_json(state, by_alias=True, round_trip=True)
        if b"NaN" in document or b"Infinity" in document:
            _refuse_constants(document)
        return document

    return dump, schema.model_validate_json


def _refuse_constants(document: bytes) -> None:
    """:raises ValueError: it has NaN or an infinity, which no other reader of JSON knows."""
    try:
        msgspec.json.decode(document)
    except msgspec.DecodeError as error:
        raise ValueError(
            "JSON has neither NaN nor infinity: use None, or ser_json_inf_nan='strings'"
        ) from error


def _misfit(what: str, error: Exception) -> StateError:
    """Whatever a schema, a migration or a codec of the user's raised, in our words."""
    return _caused(f"{what}: {type(error).__name__}: {error}", error)


def _caused(text: str, error: Exception) -> StateError:
    made = StateError(text)
    made.__cause__ = error
    return made
