"""What can go wrong with a singleton: one error class for each of five reasons."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

from celery.exceptions import SoftTimeLimitExceeded

#: Errors that can come at any moment, and say nothing of the value that is read or written then.
FROM_OUTSIDE = (SoftTimeLimitExceeded, MemoryError)


class SingletonErrorReason(StrEnum):
    """The five reasons for which a singleton's run can fail."""

    STATE_LOAD_FAILED = "StateLoadFailed"
    STATE_PERSIST_FAILED = "StatePersistFailed"
    SCHEMA_DECODE_FAILED = "SchemaDecodeFailed"
    HEARTBEAT_FAILED = "HeartbeatFailed"
    LEADER_HANDOFF_FAILED = "LeaderHandoffFailed"


#: The reasons that pass by themselves, and so are worth another try.
RETRYABLE_REASONS = frozenset(
    {SingletonErrorReason.STATE_LOAD_FAILED, SingletonErrorReason.STATE_PERSIST_FAILED}
)


class SingletonError(Exception):
    """A singleton could not run, load, save or keep its lease.

    Raised as one of five subclasses, one for each reason, so that a reason can stand in
    ``autoretry_for``, ``throws`` and ``except``.

    Both arguments are positional and both are kept in ``args``: an exception that cannot
    be rebuilt from its ``args`` loses its type in Celery's result backends.

    :param singleton: the singleton's name, as ``celery singleton ls`` shows it.
    :param detail: what happened, for people. Empty when left out.
    """

    reason: ClassVar[SingletonErrorReason]

    def __init__(self, singleton: str, detail: str = "", /) -> None:
        super().__init__(singleton, detail)

    @property
    def singleton(self) -> str:
        """Name of the singleton."""
        return str(self.args[0])

    @property
    def detail(self) -> str:
        """What happened, for people."""
        return str(self.args[1])

    @property
    def retryable(self) -> bool:
        """Whether the reason is one that passes by itself."""
        return is_retryable(self.reason)

    def __str__(self) -> str:
        return f"{self.singleton}: {self.detail}" if self.detail else self.singleton

    @staticmethod
    def from_reason(reason: str, singleton: str, detail: str = "") -> SingletonError:
        """Build the error that belongs to a reason's name.

        :raises ValueError: the name is not one of the five; the message lists them.
        """
        return _CLASSES[parse_reason(reason)](singleton, detail)


class StateLoadFailed(SingletonError):
    """The store could not be reached to acquire the lease and load the state."""

    reason = SingletonErrorReason.STATE_LOAD_FAILED


class StatePersistFailed(SingletonError):
    """The store could not be reached to save the state."""

    reason = SingletonErrorReason.STATE_PERSIST_FAILED


class SchemaDecodeFailed(SingletonError):
    """The stored value, or the state that a run left, does not fit the schema; the new state would
    not come back the same; or the store cannot hold the state or the key: its encoding lacks a
    character, or it is too large.
    """

    reason = SingletonErrorReason.SCHEMA_DECODE_FAILED


class HeartbeatFailed(SingletonError):
    """The run lost its lease; what it wanted to write was refused."""

    reason = SingletonErrorReason.HEARTBEAT_FAILED


class LeaderHandoffFailed(SingletonError):
    """The lease was not obtained in the time that the conflict policy allows."""

    reason = SingletonErrorReason.LEADER_HANDOFF_FAILED


_CLASSES: dict[SingletonErrorReason, type[SingletonError]] = {
    error.reason: error
    for error in (
        StateLoadFailed,
        StatePersistFailed,
        SchemaDecodeFailed,
        HeartbeatFailed,
        LeaderHandoffFailed,
    )
}


def parse_reason(name: str) -> SingletonErrorReason:
    """The reason with this name; :exc:`ValueError` lists the five when there is none."""
    try:
        return SingletonErrorReason(name)
    except ValueError:
        allowed = ", ".join(SingletonErrorReason)
        raise ValueError(f"unknown reason {name!r}; the reasons are {allowed}") from None


def is_retryable(reason: str) -> bool:
    """Whether a reason passes by itself, so that a retry may succeed."""
    return reason in RETRYABLE_REASONS


class KeyValueStoreError(Exception):
    """The key-value store could not be reached, cannot hold the value, or holds what cannot be
    read.
    """
