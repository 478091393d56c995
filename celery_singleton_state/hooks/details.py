"""What there is to observe: one frozen class for each kind of thing that happens.

The tag of a class is the type of its Celery event.
"""

from __future__ import annotations

import time

import msgspec


class Details(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """What is known of everything that happens to a singleton.

    :param singleton: the task's name, of which there are few.
    :param key: the singleton's own name, as ``celery singleton ls`` prints it.
    :param task_id: of the message; ``None`` for a direct call.
    :param timestamp: seconds since the epoch, by this host's clock.
    """

    singleton: str
    key: str
    task_id: str | None = None
    timestamp: float = msgspec.field(default_factory=time.time)


class Acquired(Details, frozen=True, kw_only=True, tag="singleton-acquired"):
    """A run begins. One :class:`Released` or :class:`Lost` follows, if its process lives."""

    holder: str
    fence: int


class TookOver(Details, frozen=True, kw_only=True, tag="singleton-took-over"):
    """The run that begins follows one that did not end by itself.

    :param how: the lease of the other ``"expired"``, its process ``"died"``, or it
        ``"handoff"`` as it was asked to.
    """

    holder: str
    fence: int
    how: str


class StateLoaded(Details, frozen=True, kw_only=True, tag="singleton-state-loaded"):
    """The state was loaded.

    :param size: characters of its JSON.
    :param schema_version: of the stored value; ``None`` where there is none yet.
    """

    size: int
    schema_version: int | None


class StateSaved(Details, frozen=True, kw_only=True, tag="singleton-state-saved"):
    """The state was written.

    :param operation: ``"save"`` at a run's end, ``"checkpoint"`` or ``"transaction"``.
    :param size: characters of its JSON.
    """

    operation: str
    size: int


class WriteRefused(Details, frozen=True, kw_only=True, tag="singleton-write-refused"):
    """The store refused a write, as the lease was no longer held.

    :param operation: as in :class:`StateSaved`, or ``"release"``.
    """

    operation: str


class Lost(Details, frozen=True, kw_only=True, tag="singleton-lost"):
    """A run has lost its lease.

    :param seconds: since it began; also in :class:`Released`.
    """

    holder: str
    fence: int
    why: str
    seconds: float


class Released(Details, frozen=True, kw_only=True, tag="singleton-released"):
    """A run is over.

    :param outcome: as in the row's history.
    :param error: the body's error in one line.
    :param given_back: whether the lease is; where the store was out of reach it runs out.
    """

    holder: str
    fence: int
    outcome: str
    seconds: float
    error: str | None
    given_back: bool = True


class Conflicted(Details, frozen=True, kw_only=True, tag="singleton-conflicted"):
    """A delivery found the lease taken; told once for each message.

    :param policy: of the task's ``on_conflict``.
    :param found: who holds it, and for how long, for people.
    """

    policy: str
    found: str


class Skipped(Details, frozen=True, kw_only=True, tag="singleton-skipped"):
    """A delivery ended without a run.

    :param outcome: ``"skipped"``, or ``"duplicate"`` for a message that was done before.
    :param why: for people.
    :param tick: the schedule entry whose tick was refused as done before, if it was one.
    """

    outcome: str
    why: str
    tick: str | None = None


class Failed(Details, frozen=True, kw_only=True, tag="singleton-failed"):
    """A delivery met one of the five reasons; it is retried or not.

    :param reason: its name.
    """

    reason: str
    detail: str


class Changed(Details, frozen=True, kw_only=True, tag="singleton-changed"):
    """An operator has changed something.

    :param what: ``"released"``, ``"state set"``, ``"state reset"``, or ``"3 keys pruned"``, of a
        task whose name is the ``key`` then.
    :param by: who, as the operating system says.
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
