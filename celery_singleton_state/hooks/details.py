"""The details of what happens to a singleton: one frozen class for each kind of event.

The tag of a class, for example ``"singleton-acquired"``, is the type of its Celery event.
"""

from __future__ import annotations

import time

import msgspec


class Details(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """The fields that the details of all events have.

    :param singleton: the name of the task.
    :param key: the name of the singleton, as ``celery singleton ls`` prints it. It differs from the
        task's name if the task has the option ``unique_on``.
    :param task_id: the task id of the message; ``None`` for a direct call.
    :param timestamp: the time of the event by this host's clock, in seconds since the epoch. Left
        out: now.
    """

    singleton: str
    key: str
    task_id: str | None = None
    timestamp: float = msgspec.field(default_factory=time.time)


class Acquired(Details, frozen=True, kw_only=True, tag="singleton-acquired"):
    """A run has acquired the lease and begins.

    One :class:`Released` or :class:`Lost` follows, unless the process dies.

    :param holder: the holder of the lease, as ``nodename:pid:nonce``.
    :param fence: the fence of the lease.
    """

    holder: str
    fence: int


class TookOver(Details, frozen=True, kw_only=True, tag="singleton-took-over"):
    """A run begins after a run that did not end by itself. Sent in addition to :class:`Acquired`.

    :param holder: the holder of the new lease, as ``nodename:pid:nonce``.
    :param fence: the fence of the new lease.
    :param how: why the earlier run ended: ``"expired"`` if its lease expired, ``"died"`` if its
        process died, ``"handoff"`` if it handed over because it was asked to, or if an operator
        released its lease.
    """

    holder: str
    fence: int
    how: str


class StateLoaded(Details, frozen=True, kw_only=True, tag="singleton-state-loaded"):
    """A run has loaded the state.

    :param size: the length of the stored JSON in characters.
    :param schema_version: the schema version of the stored value; ``None`` if the row has no value.
    """

    size: int
    schema_version: int | None


class StateSaved(Details, frozen=True, kw_only=True, tag="singleton-state-saved"):
    """A run has written the state.

    :param operation: ``"save"`` at the end of a run, ``"checkpoint"`` or ``"transaction"``.
    :param size: the length of the written JSON in characters.
    """

    operation: str
    size: int


class WriteRefused(Details, frozen=True, kw_only=True, tag="singleton-write-refused"):
    """The store refused a run's write, because the run no longer held the lease.

    :param operation: ``"save"``, ``"checkpoint"``, ``"transaction"`` or ``"release"``.
    """

    operation: str


class Lost(Details, frozen=True, kw_only=True, tag="singleton-lost"):
    """A run has lost its lease.

    :param holder: the holder of the lost lease, as ``nodename:pid:nonce``.
    :param fence: the fence of the lost lease.
    :param why: the reason, as a text for people.
    :param seconds: the seconds since the run began.
    """

    holder: str
    fence: int
    why: str
    seconds: float


class Released(Details, frozen=True, kw_only=True, tag="singleton-released"):
    """A run has ended without losing its lease.

    :param holder: the holder of the lease, as ``nodename:pid:nonce``.
    :param fence: the fence of the lease.
    :param outcome: how the run ended, as the history records it: ``"succeeded"``, ``"failed"``,
        ``"retried"``, ``"skipped"`` if the body raised ``Ignore``, or ``"lost"`` if the run handed
        over to a newer message.
    :param seconds: the seconds since the run began.
    :param error: the body's error in one line; ``None`` if the body raised none.
    :param given_back: whether the store has released the lease. False if the store was
        unavailable; the process then releases the lease when the store answers again.
    """

    holder: str
    fence: int
    outcome: str
    seconds: float
    error: str | None
    given_back: bool = True


class Conflicted(Details, frozen=True, kw_only=True, tag="singleton-conflicted"):
    """A delivery conflicted: another run holds the lease. Sent once for each message.

    :param policy: the conflict policy, as in the task's option ``on_conflict``.
    :param found: the holder and the rest of the lease's life, as a text for people.
    """

    policy: str
    found: str


class Skipped(Details, frozen=True, kw_only=True, tag="singleton-skipped"):
    """A delivery ended without a run.

    :param outcome: ``"skipped"`` after a conflict, or ``"duplicate"`` if an earlier run did the
        message's work.
    :param why: the reason, as a text for people.
    :param tick: the name of the schedule entry, if the message is a duplicate of a tick; ``None``
        otherwise.
    """

    outcome: str
    why: str
    tick: str | None = None


class Failed(Details, frozen=True, kw_only=True, tag="singleton-failed"):
    """A delivery ended with a :class:`~celery_singleton_state.SingletonError`.

    The message may be retried after that.

    :param reason: the name of the error's reason, for example ``"StateLoadFailed"``.
    :param detail: the error's message.
    """

    reason: str
    detail: str


class Changed(Details, frozen=True, kw_only=True, tag="singleton-changed"):
    """An operator has changed a singleton on the command line.

    :param what: ``"released"``, ``"state set"``, ``"state reset"``, or for example ``"3 keys
        pruned"``. After pruning, ``key`` is the name of the task.
    :param by: the operator's name, as the operating system tells it.
    """

    what: str
    by: str


KINDS: tuple[type[Details], ...] = (
    Acquired,
    TookOver,
    StateLoaded,
    StateSaved,
    WriteRefused,
    Lost,
    Released,
    Conflicted,
    Skipped,
    Failed,
    Changed,
)
