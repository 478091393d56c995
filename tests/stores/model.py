"""A model of a singleton's row and of the lease's protocol, in plain Python.

tests/spec/PROTOCOL.md has the rules. :class:`Model` has the methods of a store and answers as every
store must. It has no clock: a lease lives for the short first life or the long life, and expires
when a test says so.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from celery_singleton_state.message.place import is_before
from celery_singleton_state.store.base import (
    TAKEN_OVER,
    Acquired,
    Ended,
    Lease,
    NewValue,
    Queued,
    Released,
    Row,
    Saved,
    Write,
)

#: The life in seconds that an acquire gives a lease, and the life that a confirmation or a renewal
#: gives it. Both are longer than any test, so that a lease expires only when a test says so.
FIRST, LONG = 10_000.0, 20_000.0


@dataclass(frozen=True)
class State:
    """A singleton's state: the number of checkpoints, and of items done in transactions."""

    checkpoints: int = 0
    items: int = 0

    def encoded(self) -> NewValue:
        return NewValue(json.dumps(vars(self)), 1)


def decoded(value: str) -> State:
    return State(**(json.loads(value) or {}))


@dataclass
class ModelRow:
    """The columns of a singleton's row."""

    value: str = "null"
    schema_version: int | None = None
    fence: int = 0
    write: int = 0
    #: The lease's holder; ``None`` if the row is free, and also in a hold period, in which ``life``
    #: is above 0.
    holder: str | None = None
    task_id: str | None = None
    #: About how many more seconds the lease or the hold period lasts; 0 if it has expired.
    life: float = 0.0
    #: Whether the run has taken longer than any hold period, so that its release begins none.
    outlasted: bool = False
    run_count: int = 0
    last_outcome: str | None = None
    history: str | None = None
    ticks_done: str | None = None
    handoff_to: str | None = None
    wanted: str | None = None
    queue: int = 0
    queued_task_id: str | None = None
    #: Whether the queued message still counts as queued, because its claim has not expired.
    queued: bool = False
    #: The largest rank that any message had when it asked for a handoff, and the time at which the
    #: newest message was sent. A rank orders messages by age, on the same scale as fences.
    newest: int = 0
    newest_sent: str | None = None
    #: The task's name. The newest holder has set it, or the caller that made the row.
    task: str | None = None

    @property
    def rank(self) -> int:
        return max(self.fence, self.newest)

    @property
    def in_hold_period(self) -> bool:
        return self.holder is None and self.life > 0

    def is_held(self, lease: Lease | Row) -> bool:
        mine = self.holder is not None and self.holder == lease.holder
        return mine and self.fence == lease.fence

    def is_as_seen(self, row: Row) -> bool:
        """Return whether the row still has the holder, or the hold period, that a caller saw."""
        return (self.holder, self.fence) == (row.holder, row.fence) and self.life > 0

    def may_be_taken(self, rank: int, sent: str | None) -> bool:
        """Return whether a new holder may acquire the lease: no lease and no hold period
        lasts, and no newer message has asked for the lease.

        :param rank: the rank of the new holder's message; 0 if it has none yet.
        :param sent: the time at which this message was sent.
        """
        newest = self.rank <= rank if rank else not is_before(sent, self.newest_sent)
        return newest and not self.life

    def free(self) -> None:
        self.holder = self.task_id = None
        self.life = 0.0

    def expire(self) -> None:
        """Let the lease or the hold period, and the claim of the queued message, expire."""
        self.life, self.outlasted, self.queued = 0.0, True, False

    def store(self, write: Write) -> None:
        self.value, self.schema_version = write.new.value, write.new.schema_version
        self.write = write.number

    def seen(self) -> dict[str, Any]:
        """Return the values of the row that :meth:`Leases.peek` shows."""
        names = ("value", "schema_version", "fence", "write", "holder", "task_id", "wanted")
        more = ("task", "run_count", "last_outcome", "history", "ticks_done")
        more += ("handoff_to", "newest", "newest_sent")
        return {name: getattr(self, name) for name in names + more} | {
            "held": self.life > 0,
            "in_hold_period": self.in_hold_period,
        }

    def hidden(self) -> tuple[Any, ...]:
        """Return the values of the row that no method of the store shows."""
        return self.queue, self.queued_task_id if self.queued else None

    def unused(self) -> bool:
        asked = self.handoff_to is not None or self.wanted is not None
        return self.holder is None and not self.life and not asked and not self.queued


class Model:
    """The rows of all singletons, and the entries of a schedule.

    A method whose request is refused returns ``None`` or ``False``, and changes nothing.
    """

    def __init__(self) -> None:
        self.rows: dict[str, ModelRow] = {}
        self.entries: dict[str, str] = {}

    def row(self, key: str, task: str | None = None) -> ModelRow:
        """Return the row of a key for changing it; make the row if there is none."""
        return self.rows.setdefault(key, ModelRow(task=task))

    def seen(self, key: str) -> ModelRow:
        """Return the row of a key for reading; an empty one if there is none."""
        return self.rows.get(key, ModelRow())

    def held(self, lease: Lease | Row) -> ModelRow | None:
        row = self.seen(lease.key)
        return row if row.is_held(lease) else None

    def in_order(self, lease: Lease, number: int, seen: int) -> ModelRow | None:
        row = self.held(lease)
        return row if row and seen <= row.write <= number else None

    def refuses(self, request: Request) -> bool:
        """Return whether the model will refuse a request. The store must refuse it, too, and change
        nothing.
        """
        if request.verb == "acquire":
            key, holder, _, _, rank, sent, _ = request.arguments
            row = self.seen(key)
            return row.holder != holder and not row.may_be_taken(rank, sent)
        if request.verb in ("dequeue", "pending_run_sent"):
            return False
        trial = Model()
        trial.rows, trial.entries = copy.deepcopy(self.rows), dict(self.entries)
        return getattr(trial, request.verb)(*request.arguments) in (None, False)

    # -- a holder's requests

    def acquire(
        self,
        key: str,
        holder: str,
        ttl: float,
        task_id: str | None,
        rank: int,
        sent: str | None,
        task: str,
        found: Acquired | None,
    ) -> Acquired | None:
        """Acquire a lease.

        :param found: the store's answer. The model takes the fence and the times from it, because
            it has no clock; :func:`fence_is_right` checks the fence.
        """
        row = self.seen(key)
        if row.holder != holder and not row.may_be_taken(rank, sent):
            return None
        assert found is not None
        row = self.row(key)
        row.task = task
        if row.holder == holder:
            row.life = max(row.life, ttl)
        else:
            row.fence = found.lease.fence
            row.write = 0 if row.holder is None else TAKEN_OVER
            row.queue += 1
            row.queued = row.queued and row.queued_task_id != task_id
            row.life, row.outlasted, row.handoff_to = ttl, False, None
            row.holder, row.task_id, row.newest_sent = holder, task_id, sent
        lease = Lease(key, holder, row.fence, ttl)
        return Acquired(
            lease,
            row.value,
            row.schema_version,
            row.history,
            found.acquired_at,
            row.write,
            row.ticks_done,
        )

    def renew(self, leases: Sequence[Lease]) -> dict[str, str | None]:
        renewed = {}
        for lease in leases:
            if row := self.held(lease):
                row.life = lease.ttl
                renewed[lease.key] = row.handoff_to
        return renewed

    def save(self, lease: Lease, write: Write) -> Saved | None:
        row = self.in_order(lease, write.number, write.seen)
        if row is None:
            return None
        row.store(write)
        row.life = lease.ttl
        return Saved(row.handoff_to)

    def written(self, lease: Lease, number: int) -> bool | None:
        row = self.held(lease)
        return row.write >= number if row else None

    def release(self, lease: Lease, ended: Ended, write: Write | None = None) -> Released | None:
        row = self.held(lease)
        if write is not None:
            row = self.in_order(lease, write.number, write.seen)
        if row is None:
            return None
        if write is not None:
            row.store(write)
        row.run_count += 1
        row.last_outcome, row.history = ended.outcome, ended.history
        if ended.ticks_done is not None:
            row.ticks_done = ended.ticks_done
        row.free()
        if ended.hold > 0 and not row.outlasted:
            row.life = ended.hold
        return Released(row.wanted)

    def give_back(self, key: str, holder: str) -> Released | None:
        row = self.seen(key)
        if row.holder != holder:
            return None
        row.free()
        return Released(row.wanted)

    # -- requests by others, which name the row that they saw

    def request_handoff(self, row: Row, who: str, rank: int, sent: str | None) -> bool:
        mine = self.seen(row.key)
        if not mine.is_as_seen(row):
            return False
        if rank <= mine.newest and (rank, who) != (mine.newest, mine.handoff_to):
            return False
        mine.handoff_to, mine.newest, mine.newest_sent = who, rank, sent
        return True

    def release_early(self, row: Row) -> bool:
        mine = self.seen(row.key)
        if not mine.is_as_seen(row) or not mine.in_hold_period:
            return False
        mine.free()
        return True

    def request_run(self, row: Row, pending_run: str) -> bool:
        mine = self.seen(row.key)
        if not mine.is_as_seen(row) or mine.wanted != row.wanted:
            return False
        mine.wanted = pending_run
        return True

    def pending_run_sent(self, key: str, pending_run: str) -> None:
        row = self.seen(key)
        if row.wanted == pending_run:
            row.wanted = None

    def queued(self, key: str) -> Queued:
        row = self.seen(key)
        if row.queued:
            return Queued(row.queue, row.queued_task_id)
        running = row.task_id if row.life else None
        return Queued(row.queue, running, running is not None)

    def claim(
        self,
        key: str,
        task_id: str,
        life: float,
        number: int,
        first: bool = False,
        task: str | None = None,
    ) -> bool:
        row = self.seen(key)
        repeated = row.queue == number + 1 and row.queued_task_id == task_id and row.queued
        repeated = repeated and not first
        if row.queue != number and not repeated:
            return False
        row = self.row(key, task)
        row.queue, row.queued_task_id, row.queued = number + 1, task_id, True
        return True

    def dequeue(self, key: str, task_id: str, task: str | None = None) -> None:
        row = self.row(key, task)
        row.queue += 1
        row.queued = row.queued and row.queued_task_id != task_id

    def put(self, key: str, row: Row | None, new: NewValue, task: str | None = None) -> bool:
        mine = self.seen(key)
        fence, write = (row.fence, row.write) if row else (0, 0)
        if mine.holder is not None or mine.life or (mine.fence, mine.write) != (fence, write):
            return False
        self.row(key, task).store(Write(write + 1, write, new))
        return True

    def prune(self, keys: Sequence[str], older_than: float) -> list[str]:
        found = [key for key in keys if key in self.rows and self.rows[key].unused()]
        for key in found:
            del self.rows[key]
        return found

    # -- the leading beat's requests

    def record(
        self, lease: Lease, entries: Mapping[str, str], number: int, seen: int
    ) -> bool | None:
        row = self.in_order(lease, number, seen)
        if row is None:
            return None
        row.write, row.life = number, lease.ttl
        self.entries |= entries
        return True

    def forget(self, lease: Lease, keys: Sequence[str], number: int, seen: int) -> bool:
        row = self.in_order(lease, number, seen)
        if row is None:
            return False
        row.write = number
        for key in keys:
            self.entries.pop(key, None)
        return True


@dataclass(frozen=True)
class Request:
    """A call of a store's method. It can be carried out at any time, and repeatedly."""

    verb: str
    arguments: tuple[Any, ...]
    #: If the request is a transaction: the number of the business row that it writes before its
    #: save, and whether it commits.
    item: int | None = None
    commits: bool = True

    @property
    def key(self) -> str:
        first = self.arguments[0]
        if isinstance(first, (list, tuple)):
            first = first[0]
        return first if isinstance(first, str) else str(first.key)

    def __str__(self) -> str:
        return f"{self.verb}{self.arguments}"


@dataclass(eq=False)
class Run:
    """What a process knows of its own run."""

    key: str
    holder: str
    process: int
    task_id: str | None
    #: Whether the run confirms its lease (extends the first life) before its body begins.
    confirms: bool = False
    #: The run's phase, one of: "acquires", "confirms", "body", "commits" (its COMMIT was not
    #: answered), "releases".
    phase: str = "acquires"
    #: The request whose answer the run waits for, and whether an earlier copy of this request was
    #: not answered.
    request: Request | None = None
    unsure: bool = False
    lease: Lease | None = None
    #: The state in memory, the state before the open transaction, and the number of the last write.
    state: State = field(default_factory=State)
    before: State = field(default_factory=State)
    number: int = 0
    seen: int = 0
    #: Whether the run will never learn the outcome of one of its COMMITs.
    undecided: bool = False
    trusts: bool = False
    history: list[list[Any]] = field(default_factory=list)
    outcome: str = ""


def fence_is_right(fence: int, before: int, earliest: float, latest: float) -> bool:
    """Return whether a fence is right: the clock's milliseconds, or ``before`` + 1 if that is
    larger.

    :param before: the largest fence or rank of the row before the acquisition.
    :param earliest, latest: the store read its clock between these two times, in seconds since
        1970.
    """
    low, high = int(earliest * 1000) - 2, int(latest * 1000) + 2
    return max(before + 1, low) <= fence <= max(before + 1, high)
