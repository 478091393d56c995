"""The errors of singletons: one class for each of the five reasons why a run can fail."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

from celery.exceptions import SoftTimeLimitExceeded

#: Errors that can interrupt code at any point. If one of them is raised while a value is read or
#: written, this does not mean that the value is wrong.
FROM_OUTSIDE = (SoftTimeLimitExceeded, MemoryError)


class SingletonErrorReason(StrEnum):
    """The five reasons for which a singleton's run can fail.

    Each reason's value is the name of its error class.
    """

    STATE_LOAD_FAILED = "StateLoadFailed"
    STATE_PERSIST_FAILED = "StatePersistFailed"
    SCHEMA_DECODE_FAILED = "SchemaDecodeFailed"
    HEARTBEAT_FAILED = "HeartbeatFailed"
    LEADER_HANDOFF_FAILED = "LeaderHandoffFailed"


#: The reasons after which a retry may succeed: their cause can pass without a change to code or
#: data.
RETRYABLE_REASONS = frozenset(
    {SingletonErrorReason.STATE_LOAD_FAILED, SingletonErrorReason.STATE_PERSIST_FAILED}
)


class SingletonError(Exception):
    """Base class of the five errors with which a run of a singleton can fail.

    Each subclass stands for one reason, so ``autoretry_for``, ``throws`` and ``except`` can name a
    single reason.

    Both arguments are positional, and ``args`` keeps both, because Celery's result backends rebuild
    an exception from its ``args``. If the rebuilding failed, the result backends would replace the
    exception by one of another type.

    :param singleton: the singleton's name, as ``celery singleton ls`` prints it.
    :param detail: a text that says what happened. Default: empty.
    """

    #: The reason that a subclass of this error stands for.
    reason: ClassVar[SingletonErrorReason]

    def __init__(self, singleton: str, detail: str = "", /) -> None:
        super().__init__(singleton, detail)

    @property
    def singleton(self) -> str:
        """The singleton's name, as ``celery singleton ls`` prints it."""
        return str(self.args[0])

    @property
    def detail(self) -> str:
        """A text that says what happened; empty if there is none."""
        return str(self.args[1])

    @property
    def retryable(self) -> bool:
        """Whether a retry may succeed without a change to code or data."""
        return is_retryable(self.reason)

    def __str__(self) -> str:
        return f"{self.singleton}: {self.detail}" if self.detail else self.singleton

    @staticmethod
    def from_reason(reason: str, singleton: str, detail: str = "") -> SingletonError:
        """Make the error for a reason, given the name of the reason.

        :param reason: one of the values of :class:`SingletonErrorReason`.
        :param singleton: the singleton's name.
        :param detail: a text that says what happened. Default: empty.
        :raises ValueError: there is no such reason; the message lists the five reasons.
        """
        return _CLASSES[parse_reason(reason)](singleton, detail)


class StateLoadFailed(SingletonError):
    """The lease could not be acquired, or the state could not be loaded, because the store is
    unavailable.
    """

    reason = SingletonErrorReason.STATE_LOAD_FAILED


class StatePersistFailed(SingletonError):
    """The state could not be saved, because the store is unavailable."""

    reason = SingletonErrorReason.STATE_PERSIST_FAILED


class SchemaDecodeFailed(SingletonError):
    """A state does not fit its schema, or cannot be stored. One of these is true:

    - the stored value does not fit the schema,
    - the state that the body left does not fit the schema,
    - the next load would return a state that differs from the state that the body left,
    - the store cannot hold the state or the key: it is too large, or the database's encoding lacks
      one of its characters.
    """

    reason = SingletonErrorReason.SCHEMA_DECODE_FAILED


class HeartbeatFailed(SingletonError):
    """The run lost its lease or was asked to hand it over. Later writes of its state are refused.

    Also raised for a message whose earlier runs have killed their process too often.
    """

    reason = SingletonErrorReason.HEARTBEAT_FAILED


class LeaderHandoffFailed(SingletonError):
    """Another run holds the lease, and the options ``on_conflict`` and ``conflict_timeout`` do not
    let this message wait any longer.
    """

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
    """Return the reason with this name.

    :raises ValueError: there is no such reason; the message lists the five reasons.
    """
    try:
        return SingletonErrorReason(name)
    except ValueError:
        allowed = ", ".join(SingletonErrorReason)
        raise ValueError(f"unknown reason {name!r}; the reasons are {allowed}") from None


def is_retryable(reason: str) -> bool:
    """Whether a retry may succeed after a failure for this reason."""
    return reason in RETRYABLE_REASONS


class KeyValueStoreError(Exception):
    """The database of a :class:`KeyValueStore` is unavailable or refuses a value, or a stored value
    cannot be read.
    """
