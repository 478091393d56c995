"""The state of one run: what the row held, what the body makes of it, what is to be written."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from typing import Any

from celery_singleton_state.errors import SchemaDecodeFailed
from celery_singleton_state.keys import row_key
from celery_singleton_state.state.codec import NO_STATE, Codec, StateError
from celery_singleton_state.store.base import Acquired, NewValue

logger = logging.getLogger(__name__)


class RunState:
    """A run's state; of a singleton without a schema it is always ``None``.

    :param name: the singleton's name, for its errors.
    """

    def __init__(self, name: str, codec: Codec[Any] | None, acquired: Acquired) -> None:
        self.value: Any = None
        #: What the row is known to hold; ``None`` while a write's answer is unknown.
        self.stored: NewValue | None = NewValue(acquired.value, acquired.schema_version or 1)
        #: How long the JSON is that the row held, and of which version, if it has one.
        self.found = len(acquired.value), acquired.schema_version
        self._name = name
        self._codec = codec
        self._key = acquired.lease.key

    def need(self, what: str) -> Codec[Any]:
        """:raises RuntimeError: the singleton has no state, which ``what`` needs."""
        if self._codec is None:
            raise RuntimeError(f"{self._name}: {what} needs a state_schema")
        return self._codec

    def load(self, set_aside: Callable[[str, str], None] | None) -> None:
        """Decode what the row held, or make the initial state, where there is a schema.

        :param set_aside: keeps a value that cannot be decoded under a key, so that the run can
            start anew; ``None``: that is an error.
        :raises SchemaDecodeFailed: there is no way to a state.
        """
        found = self.stored
        if self._codec is None or found is None:
            return
        try:
            if found.value == NO_STATE:
                self.value = self._codec.initial()
                return
            try:
                self.value = self._codec.decode(found.value, found.schema_version)
            except StateError as error:
                if set_aside is None:
                    raise
                key = _quarantine_key(self._key, found.value)
                set_aside(key, found.value)
                logger.error("singleton %s: %s; kept under %s", self._name, error, key)
                self.value = self._codec.initial()
        except StateError as error:
            raise SchemaDecodeFailed(self._name, str(error)) from error

    def document(self) -> NewValue:
        """The state as it is to be stored.

        :raises SchemaDecodeFailed: it does not fit its schema.
        """
        codec = self._codec or self.need("state")
        try:
            return NewValue(codec.encode(self.value), codec.version)
        except StateError as error:
            raise SchemaDecodeFailed(self._name, str(error)) from error

    def changed(self) -> NewValue | None:
        """The same, if it differs from what the row holds."""
        if self._codec is None:
            return None
        new = self.document()
        return None if new == self.stored else new

    def forget(self) -> None:
        """Let go of what it holds: the run is over, and states can be large."""
        self.value = self.stored = None

    def roll_back(self, before: NewValue) -> None:
        """Go back, with the rows: a body that goes on must not save a state without them."""
        codec = self.need("state")
        # If a time limit interrupts the decoding, there is no state that could be saved.
        self.value = None
        self.value = codec.decode(before.value, before.schema_version)


def _quarantine_key(key: str, value: str) -> str:
    """The key under which a value of this row is kept that cannot be decoded: always the same."""
    digest = hashlib.sha256(value.encode()).hexdigest()[:12]
    return row_key(f"quarantine:{digest}:", key)
